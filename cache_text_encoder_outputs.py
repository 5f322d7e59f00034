"""Cache the text encoder outputs of every caption of a dataset, so that training needs no text encoder.

The small encoder reads every caption first and is freed; only then is the large one loaded. A clip has one caption and one
cache file, however many windows are cut from it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

import hunyuan_model
from dataset import DatasetConfig, load_dataset_config
from dataset.cache_files import NonFiniteError, read_caption, save_text, text_cache_path
from dataset.items import Item, list_items, require_captions
from dataset.preparation import Failure
from dataset.report import DatasetReport, count_caches, format_table, report_items, require_items
from utils.arguments import add_dataset_arguments, add_device_argument, add_text_encoder_arguments, script_parser
from utils.config_files import add_config_file_argument, parse_with_config
from utils.devices import choose_dtype, free_memory, pick_device, warn_of_cpu
from utils.errors import STATUS_FAILED, UserError, run_script
from utils.files import require_writable_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hunyuan_model.text_encoder_clip import CLIPTextEncoder
    from hunyuan_model.text_encoder_llm import LlamaTextEncoder

logger = logging.getLogger("cache_text_encoder_outputs")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of this script."""
    parser = script_parser("Cache the text encoder outputs of the captions of a dataset.")
    data = parser.add_argument_group("data")
    add_config_file_argument(data)
    add_dataset_arguments(
        data,
        batch_size="encode N captions at once (default: the dataset's batch_size)",
        num_workers="threads that read and write cache files",
        skip_existing="keep caches that were made from the same caption (default: make all again)",
    )
    model = parser.add_argument_group("model")
    add_text_encoder_arguments(model, required=True)
    add_device_argument(model)
    return parser


def is_cached(item: Item) -> bool:
    """Whether there is a readable cache file that was made from this very caption, or does not say from which."""
    path = text_cache_path(item)
    if not path.is_file():
        return False
    try:
        return read_caption(path) in (None, item.caption)
    except UserError as error:
        logger.warning("%s; it is made again.", error)
        return False


def make_batches(items: Sequence[Item], batch_size: int | None) -> list[list[Item]]:
    """Batches of one dataset each, of captions of like length: a batch takes the time of its longest caption."""
    by_dataset: dict[DatasetConfig, list[Item]] = {}
    for item in sorted(items, key=lambda item: len(item.caption)):
        by_dataset.setdefault(item.dataset, []).append(item)
    batches = []
    for dataset, members in by_dataset.items():
        size = batch_size or dataset.batch_size
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches


def encode_clip(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Item]],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The pooled output (768,) for each caption, on the CPU. Encoder 2 is gone from the device afterwards."""
    encoder = hunyuan_model.load_text_encoder_2(args.text_encoder2, device=device, dtype=dtype, tokenizer=tokenizer)
    pooled = {}
    for batch in tqdm(batches, desc="text encoder 2", unit="batch"):
        captions = [item.caption for item in batch]
        pooled |= dict(zip(captions, encode(encoder, captions).cpu()))
    del encoder
    free_memory(device)
    return pooled


def encode(encoder: CLIPTextEncoder | LlamaTextEncoder, captions: list[str]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``encoder.encode``, with what to do when memory does not suffice."""
    try:
        return encoder.encode(captions)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory while encoding {len(captions)} captions; use a smaller --batch_size, or --fp8_llm."
        ) from error


def encode_and_save(
    encoder: LlamaTextEncoder,
    batches: Sequence[Sequence[Item]],
    clip: dict[str, torch.Tensor],
    num_workers: int,
) -> Iterator[Failure]:
    """Encode each batch with encoder 1 and write its cache files while the next one is computed; yields what failed."""
    with ThreadPoolExecutor(num_workers) as writers:
        writing: list[tuple[Item, Future]] = []
        for batch in tqdm(batches, desc="text encoder 1", unit="batch"):
            states, masks = (output.cpu() for output in encode(encoder, [item.caption for item in batch]))
            yield from finish(writing)
            writing = [
                (item, writers.submit(save_text, text_cache_path(item), llm, mask, clip[item.caption], item.caption))
                for item, llm, mask in zip(batch, states, masks)
            ]
        yield from finish(writing)


def finish(writing: Sequence[tuple[Item, Future]]) -> Iterator[Failure]:
    """Wait for cache files; values that are not numbers fail their item, a disk that is full ends the run."""
    for item, future in writing:
        try:
            future.result()
        except NonFiniteError as error:
            yield Failure(item, f"{item.path}: {error}")


def cache(
    args: argparse.Namespace,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    items: Sequence[Item],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Failure]:
    """Make the cache files of ``items``; returns what failed."""
    batches = make_batches(items, args.batch_size)
    clip = encode_clip(args, tokenizers[1], batches, device, dtype)
    encoder = hunyuan_model.load_text_encoder_1(
        args.text_encoder1, device=device, dtype=dtype, fp8=args.fp8_llm, tokenizer=tokenizers[0]
    )
    return list(encode_and_save(encoder, batches, clip, args.num_workers))


def finish_reports(reports: Sequence[DatasetReport], failures: Sequence[Failure]) -> None:
    """Fill in what the cache directories hold now, and what failed."""
    for report in reports:
        report.failed = sum(failure.item.dataset is report.dataset for failure in failures)
        count_caches(report)


def main() -> int:
    """Parse, check, load, cache, report."""
    args = parse_with_config(build_parser())
    device = pick_device(args.device)
    dtype = choose_dtype(args.text_encoder_dtype, "--text_encoder_dtype", device, on_cuda=torch.float16)
    hunyuan_model.check_text_encoder_files(args.text_encoder1, args.text_encoder2)
    group = load_dataset_config(args.dataset_config)
    listed = [list_items(dataset) for dataset in group.datasets]
    reports = [report_items(dataset, items) for dataset, items in zip(group.datasets, listed)]
    print(format_table(reports), flush=True)
    require_items(reports)
    for items in listed:
        require_captions(items)
    for dataset in group.datasets:
        require_writable_folder(dataset.cache_directory, f"cache_directory of {dataset.label}")
    tokenizers = (
        hunyuan_model.load_tokenizer_1(args.text_encoder1, args.tokenizer1),
        hunyuan_model.load_tokenizer_2(args.text_encoder2, args.tokenizer2),
    )

    items = [item for items in listed for item in items]
    found = len(items)
    if args.skip_existing:
        with ThreadPoolExecutor(args.num_workers) as readers:
            items = [item for item, cached in zip(items, readers.map(is_cached, items)) if not cached]
    warn_of_cpu(args.device, device)
    failures = cache(args, tokenizers, items, device, dtype) if items else []

    finish_reports(reports, failures)
    print(format_table(reports))
    print(f"{found} captions: {len(items) - len(failures)} encoded, {found - len(items)} kept, {len(failures)} failed")
    for failure in failures:
        print(f"  {failure.message}", file=sys.stderr)
    return STATUS_FAILED if failures else 0


if __name__ == "__main__":
    run_script(main)
