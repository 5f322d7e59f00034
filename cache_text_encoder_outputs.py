"""Cache the text encoder outputs of every caption of a dataset, so that training needs no text encoder.

The small encoder reads every caption first and is freed; only then is the large one loaded. A clip has one caption and one
cache file, however many windows are cut from it.
"""

from __future__ import annotations

import utils.interrupts  # noqa: F401  # isort: skip

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

import hunyuan_model
from dataset import DatasetConfig, load_dataset_config
from dataset.arguments import add_dataset_arguments
from dataset.batches.report import (
    CachingOutcome,
    DatasetReport,
    count_caches,
    deal_with_orphans,
    format_table,
    report_items,
    require_items,
)
from dataset.cache.files import NonFiniteError, list_caches, save_text, text_cache_path
from dataset.cache.freshness import NEW, Verdict, judge_text
from dataset.cache.orphans import abandoned_files, orphaned_texts
from dataset.cache.preparation import Failure
from dataset.cache.records import TEXT_ENCODERS, TOKENIZERS
from dataset.cache.sizes import text_bytes
from dataset.items import Item, list_items, settle_captions
from hunyuan_model.checkpoints.fingerprint import fingerprint_weights
from hunyuan_model.text.arguments import add_text_encoder_arguments
from hunyuan_model.text.template import TEXT_LENGTH
from hunyuan_model.text.tokenizers import fingerprint_tokenizer
from utils.cli.arguments import add_device_argument, script_parser
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.devices import choose_dtype, free_memory, pick_device, warn_of_cpu
from utils.disk_space import require_room
from utils.errors import STATUS_FAILED, UserError, name_some, run_script
from utils.files import require_writable_folder
from utils.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hunyuan_model.text.clip import CLIPTextEncoder
    from hunyuan_model.text.llm import LlamaTextEncoder

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
        skip_existing="keep caches that were made from the same caption by the same text encoders (default: make all again)",
    )
    model = parser.add_argument_group("model")
    add_text_encoder_arguments(model, required=True)
    add_device_argument(model)
    return parser


def fingerprints(args: argparse.Namespace, tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]) -> dict[str, str]:
    """What tells these encoders and tokenizers from others, by the keys of the records."""
    encoders = (args.text_encoder1, args.text_encoder2)
    weights = {key: fingerprint_weights(path, f"--{key}") for key, path in zip(TEXT_ENCODERS, encoders)}
    return weights | dict(zip(TOKENIZERS, map(fingerprint_tokenizer, tokenizers)))


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
    for batch in ProgressBar(batches, desc="text encoder 2", unit="batch"):
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
    record: dict[str, str],
    num_workers: int,
) -> Iterator[Failure]:
    """Encode each batch with encoder 1 and write its cache files while the next one is computed; yields what failed."""
    with ThreadPoolExecutor(num_workers) as writers:
        writing: list[tuple[Item, Future]] = []
        for batch in ProgressBar(batches, desc="text encoder 1", unit="batch"):
            states, masks = (output.cpu() for output in encode(encoder, [item.caption for item in batch]))
            yield from finish(writing)
            writing = [
                (item, writers.submit(save_text, text_cache_path(item), llm, mask, clip[item.caption], item.caption, record))
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
    record: dict[str, str],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Failure]:
    """Make the cache files of ``items``; returns what failed. ``record``: the fingerprints that go into the files."""
    batches = make_batches(items, args.batch_size)
    clip = encode_clip(args, tokenizers[1], batches, device, dtype)
    encoder = hunyuan_model.load_text_encoder_1(
        args.text_encoder1, device=device, dtype=dtype, fp8=args.fp8_llm, tokenizer=tokenizers[0]
    )
    return list(encode_and_save(encoder, batches, clip, record, args.num_workers))


def finish_report(
    report: DatasetReport, verdicts: Sequence[tuple[Item, Verdict]], failures: Sequence[Failure], remove_orphans: bool
) -> None:
    """Fill in what became of a dataset's items and what the cache directory holds now; list the orphans."""
    failed = {failure.item.stem for failure in failures if failure.item.dataset is report.dataset}
    report.failed = len(failed)
    report.outcome = CachingOutcome(skipped=report.found - len(verdicts))
    for item, verdict in verdicts:
        if item.stem not in failed:
            report.outcome.count(verdict.reason)
    orphans = orphaned_texts(report.dataset, [verdict.path for _, verdict in verdicts]) + abandoned_files(report.dataset)
    deal_with_orphans(report, orphans, remove_orphans)
    count_caches(report)
    warn_of_latents_without_text(report)


def warn_of_latents_without_text(report: DatasetReport) -> None:
    """Training refuses latents without text encoder outputs; say so now where items were skipped."""
    listing = list_caches(report.dataset)
    without = sorted({stem for stem, _ in listing.latents} - set(listing.texts))
    if report.outcome.skipped and without:
        logger.warning(
            "%s: %d item(s) have latents, but no text encoder outputs, which training refuses: %s. Give both scripts the same "
            "--missing_caption; cache_latents.py --skip_existing --missing_caption skip --remove_orphans deletes their latents.",
            report.dataset.label,
            len(without),
            name_some(without),
        )


def main() -> int:
    """Parse, check, load, cache, report."""
    args = parse_with_config(build_parser())
    device = pick_device(args.device)
    dtype = choose_dtype(args.text_encoder_dtype, "--text_encoder_dtype", device, on_cuda=torch.float16)
    widths = hunyuan_model.check_text_encoder_files(args.text_encoder1, args.text_encoder2)
    group = load_dataset_config(args.dataset_config)
    listed = [list_items(dataset) for dataset in group.datasets]
    reports = [report_items(dataset, items) for dataset, items in zip(group.datasets, listed)]
    print(format_table(reports), flush=True)
    require_items(reports)
    listed = [settle_captions(items, args.missing_caption) for items in listed]
    for dataset in group.datasets:
        require_writable_folder(dataset.cache_directory, f"cache_directory of {dataset.label}")
    tokenizers = (
        hunyuan_model.load_tokenizer_1(args.text_encoder1, args.tokenizer1),
        hunyuan_model.load_tokenizer_2(args.text_encoder2, args.tokenizer2),
    )

    record = fingerprints(args, tokenizers)
    with ThreadPoolExecutor(args.num_workers) as readers:
        verdicts = [
            list(zip(items, readers.map(lambda item: judge_text(item, record, args.skip_existing), items))) for items in listed
        ]
    items = [item for judged in verdicts for item, verdict in judged if verdict.reason is not None]
    each = text_bytes(TEXT_LENGTH, widths, dtype)
    new = [(report.dataset, sum(verdict.reason == NEW for _, verdict in judged)) for report, judged in zip(reports, verdicts)]
    require_room(
        {dataset.cache_directory: count * each for dataset, count in new},
        "the text encoder outputs that are still to be cached take",
        "give another cache_directory",
    )
    warn_of_cpu(args.device, device)
    failures = cache(args, tokenizers, items, record, device, dtype) if items else []

    for report, judged in zip(reports, verdicts):
        finish_report(report, judged, failures, args.remove_orphans)
    print(format_table(reports))
    found = sum(map(len, listed))
    print(f"{found} captions: {len(items) - len(failures)} encoded, {found - len(items)} kept, {len(failures)} failed")
    for failure in failures:
        print(f"  {failure.message}", file=sys.stderr)
    return STATUS_FAILED if failures else 0


if __name__ == "__main__":
    run_script(main)
