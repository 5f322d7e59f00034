"""The table that opens and closes the caching scripts and opens training: what became of each dataset's items."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dataset.batches import CachedGroup, newest_latents
from dataset.cache_files import LatentShape, bucket_of, list_caches, read_latent_shape
from dataset.config import DatasetConfig
from dataset.items import Item, list_items
from utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BucketCount:
    """Items (pictures or windows, without repeats) of one bucket, and the batches they make in an epoch, with repeats."""

    items: int
    batches: int


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
    return report


def count_buckets(dataset: DatasetConfig, shapes: Iterable[LatentShape]) -> dict[tuple[int, int, int], BucketCount]:
    """Items and batches by bucket (W, H, frames), sorted, for latents of these shapes."""
    return {
        bucket_of(shape): BucketCount(items, -(-items * dataset.num_repeats // dataset.batch_size))
        for shape, items in sorted(Counter(shapes).items())
    }


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
    if report.too_short:
        shortest = min(dataset.target_frames)
        reasons.append(
            f"{report.too_short} of {found} clip(s) have fewer frames than the {shortest} that target_frames asks for at least "
            "(lower target_frames or use longer clips)"
        )
    if report.failed:
        reasons.append(f"{report.failed} of {found} file(s) could not be cached (they are listed above)")
    return f"In {dataset.label}: " + (" and ".join(reasons) or "no latents are cached (run cache_latents.py)")
