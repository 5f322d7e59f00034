"""The table that opens and closes the caching scripts and opens training: what became of each dataset's items and caches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset.batches.batches import CachedGroup
from dataset.cache.files import LatentShape, bucket_of, list_caches, newest_latents, read_latent_shape
from dataset.cache.freshness import NEW, check_caches
from dataset.cache.orphans import remove_files
from dataset.config import DatasetConfig
from dataset.items import Item, list_items
from utils.errors import UserError, name_some

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BucketCount:
    """Items (pictures or windows, without repeats) of one bucket, and the batches they make in an epoch, with repeats."""

    items: int
    batches: int


@dataclass
class CachingOutcome:
    """What a caching run did with the cache files of one dataset.

    Attributes:
        made: where there was none.
        redone: where there was one, by the reason.
        skipped: items that were left out.
        orphans: files that belong to no item any more.
        removed: of those.
    """

    made: int = 0
    kept: int = 0
    redone: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    orphans: int = 0
    removed: int = 0

    def count(self, reason: str | None) -> None:
        """Count one cache file by the reason of its verdict, see ``freshness.Verdict``."""
        if reason is None:
            self.kept += 1
        elif reason == NEW:
            self.made += 1
        else:
            self.redone[reason] += 1

    def __str__(self) -> str:
        redone = f"{self.redone.total()} redone"
        if self.redone:
            redone += f" ({', '.join(f'{count} {reason}' for reason, count in self.redone.most_common())})"
        orphans = f"{self.orphans} orphans" + (f" ({self.removed} removed)" if self.removed else "")
        return f"{self.made} made, {self.kept} kept, {redone}, {self.skipped} skipped, {orphans}"


@dataclass
class DatasetReport:
    """Counts of one dataset; None where this stage did not look.

    Attributes:
        found: media files in the folder, or lines of the JSONL file.
        without_caption: of those.
        decoded: files decoded in this run.
        failed: files that could not be decoded or encoded in this run.
        too_short: clips with fewer frames than every target_frames.
        latents: pictures and windows whose latents are cached.
        texts: items whose text encoder outputs are cached.
        used: pictures and windows that have both, which is what training sees.
        buckets: by (W, H, frames) in pixels, of all cached latents.
        resampled: names of the clips whose frame rate was changed, by what was done.
        outcome: what a caching run did; None before it and in training.
        notes: lines about the caches, for training.
    """

    dataset: DatasetConfig
    found: int | None = None
    without_caption: int | None = None
    decoded: int | None = None
    failed: int | None = None
    too_short: int | None = None
    latents: int = 0
    texts: int = 0
    used: int = 0
    buckets: dict[tuple[int, int, int], BucketCount] = field(default_factory=dict)
    resampled: dict[str, list[str]] = field(default_factory=dict)
    outcome: CachingOutcome | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return sum(count.batches for count in self.buckets.values())


def report_items(dataset: DatasetConfig, items: Sequence[Item] | None) -> DatasetReport:
    """The counts that the items (None: not looked at) and the files in the cache directory give.

    Unreadable cache files are left out with a warning.
    """
    report = DatasetReport(dataset)
    if items is not None:
        report.found = len(items)
        report.without_caption = sum(item.caption is None for item in items)
    count_caches(report)
    return report


def count_caches(report: DatasetReport) -> None:
    """Set the counts of cache files from what lies in the cache directory now."""
    listing = list_caches(report.dataset)
    shapes = {}
    for key, path in newest_latents(listing).items():
        try:
            shapes[key] = read_latent_shape(path)
        except UserError as error:
            logger.warning("%s", error)
    report.latents, report.texts = len(shapes), len(listing.texts)
    report.used = sum(stem in listing.texts for stem, _ in shapes)
    report.buckets = count_buckets(report.dataset, shapes.values())


def report_cached_group(group: CachedGroup) -> DatasetReport:
    """The counts for training, which uses caches alone: found and without caption are None where the media are gone."""
    try:
        items = list_items(group.dataset)
    except UserError:
        items = None
    report = DatasetReport(group.dataset, latents=len(group.items), used=len(group.items))
    if items is not None:
        report.found, report.without_caption = len(items), sum(item.caption is None for item in items)
    report.texts = len({item.stem for item in group.items})
    report.buckets = count_buckets(group.dataset, (item.shape for item in group.items))
    report.notes = describe_caches(group, items)
    if group.dataset.prior_preservation:
        report.notes.insert(0, "prior preservation: kept as the model draws them without the network, not learnt from")
    return report


def describe_caches(group: CachedGroup, items: Sequence[Item] | None) -> list[str]:
    """Lines on media without caches, and on caches that carry no record or do not match; the first and the last are warned of.

    ``items``: those of the dataset, None where the media cannot be reached.
    """
    check = check_caches(group.dataset, group.items, items)
    notes = []
    if items is not None and (uncached := describe_uncached(group, items)):
        logger.warning("%s: %s", group.dataset.label, uncached)
        notes.append(uncached)
    if lengths := uncached_lengths(group):
        frames = " or ".join(map(str, lengths))
        notes.append(f"no clip has a cache of {frames} frame(s) (target_frames); run cache_latents.py, unless all are shorter")
    if check.without_record:
        notes.append(f"{check.without_record} cache(s) do not say what made them: whether they match is not known")
    for reason, names in check.mismatches.items():
        notes.append(f"{len(names)} cache(s) do not match, {reason}: {name_some(names)}")
    if check.mismatches:
        logger.warning(
            "%s: %d cache(s) do not match what they were made from, or how, see the table. They are trained as they are; "
            "run both caching scripts with --skip_existing to make only those again, and with --remove_orphans to delete those "
            "that belong to nothing any more.",
            group.dataset.label,
            sum(map(len, check.mismatches.values())),
        )
    return notes


def describe_uncached(group: CachedGroup, items: Sequence[Item]) -> str | None:
    """A line on the media that training does not see; None if there are none. Those without a caption are counted elsewhere."""
    cached, dataset = {item.stem for item in group.items}, group.dataset
    names = [item.path.name for item in items if item.stem not in cached and item.caption is not None]
    if not names:
        return None
    exception = ""
    if dataset.kind == "video" and dataset.frame_extraction != "full":
        exception = f" (clips of fewer than {min(dataset.target_frames)} frame(s) get none)"
    what = "picture(s)" if dataset.kind == "image" else "clip(s)"
    return f"{len(names)} of {len(items)} {what} have no cache: {name_some(names)}; run cache_latents.py{exception}"


def uncached_lengths(group: CachedGroup) -> list[int]:
    """Those of target_frames of which there is not one clip."""
    if group.dataset.kind == "image" or group.dataset.frame_extraction == "full":
        return []
    return sorted(set(group.dataset.target_frames) - {item.window[1] for item in group.items if item.window is not None})


def count_buckets(dataset: DatasetConfig, shapes: Iterable[LatentShape]) -> dict[tuple[int, int, int], BucketCount]:
    """Items and batches by bucket (W, H, frames), sorted, for latents of these shapes."""
    return {
        bucket_of(shape): BucketCount(items, -(-items * dataset.num_repeats // dataset.batch_size))
        for shape, items in sorted(Counter(shapes).items())
    }


def deal_with_orphans(report: DatasetReport, orphans: Sequence[Path], remove: bool) -> None:
    """List cache files that belong to no item, delete them if ``remove``, and count them in the outcome."""
    if not orphans:
        return
    assert report.outcome is not None
    removed = set(remove_files(orphans) if remove else ())
    report.outcome.orphans, report.outcome.removed = len(orphans), len(removed)
    advice = "" if remove else " Training would use them; --remove_orphans deletes them."
    folder = report.dataset.cache_directory
    logger.warning("%s: %d cache file(s) in %s belong to no item any more.%s", report.dataset.label, len(orphans), folder, advice)
    for path in orphans:
        print(f"    {'removed' if path in removed else 'orphan'}: {path.name}")


COLUMNS = ("found", "no caption", "decoded", "too short", "failed", "latents", "texts", "used", "batches")


def format_table(reports: Sequence[DatasetReport]) -> str:
    """The counts as plain text: a row for each dataset, and below it a line for each bucket."""
    labels = [f"{report.dataset.index + 1} ({report.dataset.kind}s)" for report in reports]
    width = max(len("dataset"), *map(len, labels))
    lines = ["  ".join(["dataset".ljust(width), *COLUMNS])]
    for label, report in zip(labels, reports):
        values = (
            report.found,
            report.without_caption,
            report.decoded,
            report.too_short,
            report.failed,
            report.latents,
            report.texts,
            report.used,
            report.batches,
        )
        cells = ("-" if value is None else str(value) for value in values)
        lines.append("  ".join([label.ljust(width), *(cell.rjust(len(name)) for name, cell in zip(COLUMNS, cells))]))
        lines.append(f"    {report.dataset.source} -> {report.dataset.cache_directory}")
        for (bucket_width, bucket_height, frames), count in report.buckets.items():
            bucket = f"{bucket_width}x{bucket_height}" + (f", {frames} frame(s)" if report.dataset.kind == "video" else "")
            lines.append(f"    {bucket}: {count.items} in {count.batches} batch(es) of up to {report.dataset.batch_size}")
        lines += [f"    {done}: {', '.join(names)}" for done, names in sorted(report.resampled.items())]
        if report.outcome is not None:
            lines.append(f"    cache files: {report.outcome}")
        lines += [f"    {note}" for note in report.notes]
    return "\n".join(lines)


def require_items(reports: Iterable[DatasetReport]) -> None:
    """Raise a UserError for the first dataset in which no media file was found."""
    for report in reports:
        if report.found == 0:
            dataset = report.dataset
            what = "no lines" if dataset.jsonl_file else f"no {dataset.kind} files with a known file ending"
            raise UserError(f"{dataset.label}: {dataset.source} holds {what}; put some there, or take the dataset out.")


def require_batches(reports: Sequence[DatasetReport]) -> None:
    """Raise a UserError that says which rule removed the items, if not one batch is left."""
    if any(report.batches for report in reports):
        return
    require_items(reports)
    raise UserError("there is nothing to train on. " + " ".join(f"{_why_empty(report)}." for report in reports))


def _why_empty(report: DatasetReport) -> str:
    dataset, found = report.dataset, report.found
    reasons = []
    if report.outcome is not None and report.outcome.skipped:
        reasons.append(f"{report.outcome.skipped} of {found} item(s) have no caption and were skipped (--missing_caption skip)")
    if report.too_short:
        shortest = min(dataset.target_frames)
        reasons.append(
            f"{report.too_short} of {found} clip(s) have fewer frames than the {shortest} that target_frames asks for at least "
            "(lower target_frames or use longer clips)"
        )
    if report.failed:
        reasons.append(f"{report.failed} of {found} file(s) could not be cached (they are listed above)")
    return f"In {dataset.label}: " + (" and ".join(reasons) or "no latents are cached (run cache_latents.py)")
