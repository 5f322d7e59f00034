"""What both caching scripts begin and end with: from a dataset config to items with reports, and from failures to a status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.cache.orphans import abandoned_files
from dataset.cache.preparation import Failure
from dataset.cache.report import DatasetReport, format_table, require_items
from dataset.config import DatasetConfig, load_dataset_config
from dataset.items import Item, list_items, settle_captions
from utils.errors import STATUS_FAILED
from utils.files import require_writable_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachingSettings:
    """The flags that both caching scripts have, see ``dataset.arguments``."""

    dataset_config: str
    num_workers: int = 1
    batch_size: int | None = None
    skip_existing: bool = False
    missing_caption: str = "error"
    remove_orphans: bool = False


@dataclass
class Job:
    """One dataset of a caching run: the items to cache, and what becomes of them."""

    items: list[Item]
    report: DatasetReport

    @property
    def dataset(self) -> DatasetConfig:
        """The dataset."""
        return self.report.dataset


def open_jobs(path: str) -> list[Job]:
    """List every item of every dataset, and print the table of what is there.

    Raises:
        UserError: as ``load_dataset_config`` and ``list_items``, or a dataset has no items.
    """
    jobs = [Job(list_items(dataset), DatasetReport(dataset)) for dataset in load_dataset_config(path).datasets]
    for job in jobs:
        job.report.count_items(job.items)
        job.report.count_caches()
    print(format_table([job.report for job in jobs]), flush=True)
    require_items(job.report for job in jobs)
    return jobs


def require_writable_caches(jobs: Iterable[Job]) -> None:
    """Refuse cache directories that cannot be written to."""
    for job in jobs:
        require_writable_folder(job.dataset.cache_directory, f"cache_directory of {job.dataset.label}")


def open_caching(settings: CachingSettings) -> list[Job]:
    """``open_jobs`` with items that have captions, and cache directories that can be written to.

    Raises:
        UserError: also for captions that are missing, if ``missing_caption`` is "error".
    """
    jobs = open_jobs(settings.dataset_config)
    require_writable_caches(jobs)
    for job in jobs:
        job.items = settle_captions(job.items, settings.missing_caption)
    return jobs


def close_job(job: Job, failures: Iterable[Failure], orphans: Sequence[Path], remove_orphans: bool) -> None:
    """Count what failed and what the cache directory holds now; list the orphans, and delete them if asked."""
    report = job.report
    report.failed = len({failure.item.stem for failure in failures if failure.item.dataset is job.dataset})
    orphans = [*orphans, *abandoned_files(job.dataset)]
    if orphans:
        report.outcome.orphans = len(orphans)
        advice = (
            ""
            if remove_orphans
            else " Training uses orphans that have latents and text; --remove_orphans deletes the listed files."
        )
        logger.warning(
            "%s: %d cache file(s) in %s belong to no item any more.%s",
            job.dataset.label,
            len(orphans),
            job.dataset.cache_directory,
            advice,
        )
        for path in orphans:
            removed = remove_orphans and _remove(path)
            report.outcome.removed += removed
            print(f"    {'removed' if removed else 'orphan'}: {path.name}")
    report.count_caches()


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot delete %s: %s.", path, error.strerror or error)
        return False
    return True


def print_failures(failures: Sequence[Failure]) -> int:
    """Name on stderr what failed; returns the exit status."""
    if failures:
        print(f"{len(failures)} failure(s):", file=sys.stderr)
    for failure in failures:
        print(f"  {failure.message}", file=sys.stderr)
    return STATUS_FAILED if failures else 0
