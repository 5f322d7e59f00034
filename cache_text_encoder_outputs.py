"""Cache the text encoder outputs of every caption of a dataset, so that training needs no text encoder.

The small encoder reads every caption first and is freed; only then is the large one loaded. A clip has one caption and one
cache file, however many windows are cut from it.
"""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

import hunyuan_model
from dataset import DatasetConfig
from dataset.arguments import add_dataset_arguments
from dataset.cache.caching import CachingSettings, Job, close_job, open_caching, print_failures, require_seen
from dataset.cache.files import NonFiniteError, save_text
from dataset.cache.freshness import judge_text
from dataset.cache.names import list_caches, text_cache_path
from dataset.cache.preparation import Failure
from dataset.cache.report import format_table
from dataset.items import Item
from hunyuan_model.text.arguments import TextEncoderSettings, add_text_encoder_arguments, text_encoder_settings
from hunyuan_model.text.encoding import TextLength, cut_texts, fingerprints
from utils.cli.arguments import add_device_argument, script_parser
from utils.cli.config_files import add_config_file_argument, parse_with_config
from utils.cli.settings import settings_from
from utils.devices import explain_out_of_memory, free_memory, pick_device, warn_of_cpu
from utils.errors import name_some, run_script
from utils.output import show
from utils.processes.ranks import Ranks, joined_ranks, split_by_cost
from utils.processes.watchdog import OTHERS, Watchdog
from utils.progress import ProgressBar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPTION_LETTERS = 20  # what follows a caption in the template takes as long
ADVICE = "use a smaller --batch_size, or --fp8_llm"


def build_parser() -> argparse.ArgumentParser:
    """Every flag of this script."""
    parser = script_parser("Cache the text encoder outputs of the captions of a dataset.")
    data = parser.add_argument_group("data")
    add_config_file_argument(data)
    add_dataset_arguments(
        data,
        batch_size="encode N captions at once (default: the dataset's batch_size)",
        num_workers="threads that write cache files",
        skip_existing="keep caches that were made from the same caption by the same text encoders (default: make all again)",
    )
    model = parser.add_argument_group("model")
    add_text_encoder_arguments(model, required=True)
    add_device_argument(model)
    return parser


def make_batches(items: Sequence[Item], batch_size: int | None, processes: int = 1) -> list[list[Item]]:
    """Batches of one dataset each, of captions of like length: a batch takes the time of its longest caption.

    Where items are few, batches are small enough that each of ``processes`` has one.
    """
    by_dataset: dict[DatasetConfig, list[Item]] = {}
    for item in sorted(items, key=lambda item: len(item.caption)):
        by_dataset.setdefault(item.dataset, []).append(item)
    batches = []
    for dataset, members in by_dataset.items():
        size = min(batch_size or dataset.batch_size, -(-len(items) // processes))
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches


@contextmanager
def _encoding(batch: Sequence[Item], watchdog: Watchdog) -> Iterator[None]:
    with explain_out_of_memory(f"encoding {len(batch)} captions", ADVICE), watchdog.during("encoding", batch[0].path.__str__):
        yield


def encode_pooled(
    encoders: TextEncoderSettings,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Item]],
    device: torch.device,
    is_main: bool,
    watchdog: Watchdog,
) -> dict[str, torch.Tensor]:
    """The pooled output (768,) for each caption, on the CPU. Encoder 2 is gone from the device afterwards."""
    dtype = encoders.text_encoder_dtype
    encoder = hunyuan_model.load_text_encoder_2(encoders.text_encoder2, device=device, dtype=dtype, tokenizer=tokenizer)
    pooled = {}
    with ProgressBar(batches, desc="text encoder 2", unit="batch", disable=not is_main) as progress:
        for batch in progress:
            captions = [item.caption for item in batch]
            with _encoding(batch, watchdog):
                pooled |= zip(captions, encoder.encode(captions).cpu())
    del encoder
    free_memory(device)
    return pooled


def cache(
    batches: Sequence[Sequence[Item]],
    settings: CachingSettings,
    encoders: TextEncoderSettings,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    record: dict[str, str],
    device: torch.device,
    is_main: bool,
    watchdog: Watchdog,
) -> list[Failure]:
    """Make the cache files of ``batches``, and write them while the next batch is computed; returns what failed.

    ``record``: the fingerprints that go into the files. ``is_main``: whether bars are shown.
    """
    pooled = encode_pooled(encoders, tokenizers[1], batches, device, is_main, watchdog)
    encoder = hunyuan_model.load_text_encoder_1(
        encoders.text_encoder1, device=device, dtype=encoders.text_encoder_dtype, fp8=encoders.fp8_llm, tokenizer=tokenizers[0]
    )
    failures: list[Failure] = []

    def save(item: Item, states: torch.Tensor, mask: torch.Tensor) -> None:
        try:
            save_text(text_cache_path(item), states, mask, pooled[item.caption], item.caption, record)
        except NonFiniteError as error:  # this item's alone; a disk that is full ends the run
            failures.append(Failure(item, f"{item.path}: {error}"))

    with (
        ThreadPoolExecutor(settings.num_workers) as writers,
        ProgressBar(batches, desc="text encoder 1", unit="batch", disable=not is_main) as progress,
    ):
        writing: list[Future] = []
        for batch in progress:
            folder = batch[0].dataset.cache_directory.__str__
            with _encoding(batch, watchdog):
                states, masks = (output.cpu() for output in encoder.encode([item.caption for item in batch]))
            with watchdog.during("writing", folder):
                for future in writing:
                    future.result()
            writing = [writers.submit(save, *each) for each in zip(batch, states, masks)]
        with watchdog.during("writing", folder):
            for future in writing:
                future.result()
    return failures


def share_batches(items: Sequence[Item], batch_size: int | None, ranks: Ranks) -> list[list[Item]]:
    """The batches that this process encodes; they cost as much as the letters of their longest captions, each of their items."""
    batches = make_batches(items, batch_size, ranks.count)
    costs = [len(batch) * (CAPTION_LETTERS + len(batch[-1].caption)) for batch in batches]
    return [batches[position] for position in split_by_cost(costs, ranks.count)[ranks.index]]


def count_cut(jobs: Sequence[Job], tokenizers: Sequence[PreTrainedTokenizerBase], ranks: Ranks) -> None:
    """Count the captions of each dataset that the encoders do not read to their ends, and name them."""

    def cut_ones(captions: Sequence[str]) -> list[TextLength | None]:
        cut = cut_texts(captions, tokenizers)
        return [cut.get(caption) for caption in captions]

    captions = list(dict.fromkeys(item.caption for job in jobs for item in job.items))
    cut = {caption: how for caption, how in zip(captions, ranks.map(cut_ones, captions)) if how is not None}
    for job in jobs:
        too_long = [item for item in job.items if item.caption in cut]
        job.report.cut = len(too_long)
        if too_long:
            names = name_some([f"{item.path.name} ({cut[item.caption]})" for item in too_long])
            job.report.notes.append(f"the ends of these captions are not read: {names}")


def judge(jobs: Sequence[Job], record: dict[str, str], skip_existing: bool, ranks: Ranks) -> list[dict[Item, str | None]]:
    """Of each dataset the reason why an item's cache file is made; None where it is kept."""

    def reasons(items: Sequence[Item]) -> list[str | None]:
        return [judge_text(item, record, skip_existing) for item in items]

    found = iter(ranks.map(reasons, [item for job in jobs for item in job.items]))
    return [dict(zip(job.items, found)) for job in jobs]


def count_outcome(job: Job, reasons: dict[Item, str | None], failures: Sequence[Failure], remove_orphans: bool) -> None:
    """Count what became of a dataset's items, and list the orphans."""
    failed = {failure.item for failure in failures}
    for item, reason in reasons.items():
        if item not in failed:
            job.report.outcome.count(reason)
    there, called_for = list_caches(job.dataset).texts.values(), map(text_cache_path, job.items)
    close_job(job, failures, there, called_for, remove_orphans)


def main() -> int:
    """Settings, data, tokenizers, what is to be made, one encoder after the other, report."""
    args = parse_with_config(build_parser())
    with joined_ranks(args.device) as ranks:
        settings = settings_from(CachingSettings, args)
        device = pick_device(args.device, ranks)
        encoders = text_encoder_settings(args, device)
        hunyuan_model.check_text_encoder_files(encoders.text_encoder1, encoders.text_encoder2)
        with open_caching(settings, "texts", ranks) as jobs:
            tokenizers = hunyuan_model.load_tokenizers(encoders)
            count_cut(jobs, tokenizers, ranks)
            record = fingerprints(encoders, tokenizers)
            judged = judge(jobs, record, settings.skip_existing, ranks)
            items = [item for reasons in judged for item, reason in reasons.items() if reason]
            warn_of_cpu(args.device, device)
            batches = share_batches(items, settings.batch_size, ranks)
            failed = []
            with Watchdog(process=ranks.index) as watchdog:
                if batches:
                    failed = cache(batches, settings, encoders, tokenizers, record, device, ranks.is_main, watchdog)
                with watchdog.during(OTHERS):
                    failures = [failure for each in ranks.gather(failed) for failure in each]
            if not ranks.is_main:
                return 0
            if ranks.count > 1:
                unwritten = {failure.item for failure in failures}
                require_seen(text_cache_path(item) for item in items if item not in unwritten)
            for job, reasons in zip(jobs, judged):
                count_outcome(job, reasons, failures, settings.remove_orphans)

        show(format_table([job.report for job in jobs]))
        found = sum(map(len, judged))
        show(f"{found} captions: {len(items) - len(failures)} encoded, {found - len(items)} kept, {len(failures)} failed")
        return print_failures(failures)


if __name__ == "__main__":
    run_script(main)
