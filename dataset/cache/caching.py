"""What both caching scripts begin and end with: from a dataset config to items with reports, and from failures to a status."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dataset.cache.preparation import Failure
from dataset.cache.report import CachingOutcome, DatasetReport, format_table, require_items
from dataset.config import DatasetConfig, load_dataset_config
from dataset.items import Item, list_items, settle_captions
from utils.disk_space import require_room
from utils.errors import STATUS_FAILED, name_some
from utils.files import is_temporary, require_writable_folder, wait_for_files
from utils.output import show, with_names_of_invisible
from utils.processes.locks import sole_run
from utils.processes.ranks import Ranks

logger = logging.getLogger(__name__)

ROOM_BYTES = 16 * 10**6  # more than one cache file takes; a disk that fills up later ends the run with whole files
ABANDONED_SECONDS = 600  # a cache file takes moments to write; what has been unfinished for longer was left by a killed run


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


def open_jobs(path: str, writes: bool = True) -> list[Job]:
    """List every item of every dataset, and print the table of what is there.

    Raises a UserError also where a dataset has no items, or, if something ``writes`` there, for a cache directory that lets it not.
    """
    jobs = [Job(list_items(dataset), DatasetReport(dataset)) for dataset in load_dataset_config(path).datasets]
    for job in jobs:
        job.report.count_items(job.items)
        job.report.count_caches()
    show(format_table([job.report for job in jobs]))
    require_items(job.report for job in jobs)
    for job in jobs if writes else ():
        folder = require_writable_folder(job.dataset.cache_directory, f"cache_directory of {job.dataset.label}")
        require_room(folder, ROOM_BYTES, "a cache file takes", "give another cache_directory")
    return jobs


@contextmanager
def open_caching(settings: CachingSettings, what: str, ranks: Ranks) -> Iterator[list[Job]]:
    """``open_jobs``, with items that have captions as ``missing_caption`` says. No other run caches the same there meanwhile.

    The main process looks, and holds the locks, for all.

    ``what``: latents or texts.
    """
    with ExitStack() as stack:

        def open_them() -> list[Job]:
            jobs = open_jobs(settings.dataset_config)
            for job in jobs:
                job.items = settle_captions(job.items, settings.missing_caption)
                job.report.outcome = CachingOutcome(skipped=job.report.found - len(job.items))
            for job in jobs:
                folder = job.dataset.cache_directory
                stack.enter_context(
                    sole_run(folder / f".{what}.lock", f"caches {what} in {folder}", "give another cache_directory")
                )
            return jobs

        yield ranks.from_main(open_them)


def require_seen(paths: Iterable[Path]) -> None:
    """Wait for cache files that other processes wrote, perhaps on other machines; log those that do not come."""
    if missing := wait_for_files(paths):
        logger.error(
            "%d cache file(s) that other processes wrote are not seen here: %s. All machines must share the cache_directory.",
            *(len(missing), name_some(missing)),
        )


def close_job(
    job: Job, failures: Iterable[Failure], there: Iterable[Path], called_for: Iterable[Path], remove_orphans: bool
) -> None:
    """Count what failed and what the cache directory holds now; list the orphans, and delete them if asked.

    Orphans are cache files that belong to no item, or that stand beside the right one, and what killed runs left unfinished.
    Training goes by the cache files alone: it uses orphans too.

    Args:
        there: the cache files of the script's kind whose items could be read.
        called_for: the right file of each item, or of each window.
    """
    report, folder = job.report, job.dataset.cache_directory
    report.failed = len({failure.item.stem for failure in failures if failure.item.dataset == job.dataset})
    right = _file_numbers(called_for)
    orphans = sorted(path for path in there if _file_numbers([path]).isdisjoint(right))
    if folder.is_dir():
        before = time.time() - ABANDONED_SECONDS
        unfinished = (path for path in folder.iterdir() if is_temporary(path) and path.suffix == ".safetensors")
        orphans += sorted(path for path in unfinished if path.stat().st_mtime < before)
    if orphans:
        advice = " Training uses orphans that have latents and text; --remove_orphans deletes the listed files."
        message = "%s: %d cache file(s) in %s belong to no item any more.%s"
        logger.warning(message, job.dataset.label, len(orphans), folder, "" if remove_orphans else advice)
    report.outcome.orphans = len(orphans)
    for path in orphans:
        removed = False
        if remove_orphans:
            try:
                path.unlink(missing_ok=True)
                removed = True
            except OSError as error:
                logger.warning("cannot delete %s: %s.", path, error.strerror or error)
        report.outcome.removed += removed
        show(f"    {'removed' if removed else 'orphan'}: {path.name}")
    report.count_caches()


def _file_numbers(paths: Iterable[Path]) -> set[tuple[int, int]]:
    """Device and number of the files that exist: where a.png became A.png, both names may mean one cache file."""
    found = set()
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            found.add((status.st_dev, status.st_ino))
    return found


def print_failures(failures: Sequence[Failure]) -> int:
    """Name on stderr what failed; returns the exit status."""
    if failures:
        show(f"{len(failures)} failure(s):", error=True)
    for failure in failures:
        show(f"  {with_names_of_invisible(failure.message)}", error=True)
    return STATUS_FAILED if failures else 0
