"""The table that opens and closes the caching scripts and opens training: what became of each dataset's items and caches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataset.cache.files import LatentShape, bucket_of, read_latent_header
from dataset.cache.freshness import NEW
from dataset.cache.names import list_caches, newest_latents
from dataset.config import DatasetConfig
from dataset.items import EXTENSIONS, Item, unread_files
from utils.errors import UserError, name_some

logger = logging.getLogger(__name__)


@dataclass
class CachingOutcome:
    """What a caching run did with the cache files of one dataset; ``redone`` by the reason."""

    made: int = 0
    kept: int = 0
    redone: Counter[str] = field(default_factory=Counter)
    skipped: int = 0  # items that were left out
    orphans: int = 0
    removed: int = 0  # of the orphans

    def count(self, reason: str | None) -> None:
        """Count one cache file by the reason of its verdict, see ``freshness.Verdict``."""
        if reason is None:
            self.kept += 1
        elif reason == NEW:
            self.made += 1
        else:
            self.redone[reason] += 1

    def add(self, other: CachingOutcome) -> None:
        """Add what another process did with items of its own."""
        self.made += other.made
        self.kept += other.kept
        self.redone += other.redone

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.redone.most_common())
        redone = f"{self.redone.total()} redone" + (f" ({reasons})" if reasons else "")
        orphans = f"{self.orphans} orphans" + (f" ({self.removed} removed)" if self.removed else "")
        return f"{self.made} made, {self.kept} kept, {redone}, {self.skipped} skipped, {orphans}"


# The columns of the table, each an attribute of DatasetReport.
COLUMNS = ("found", "no caption", "decoded", "too short", "failed", "latents", "texts", "cut", "used", "batches")


@dataclass
class DatasetReport:
    """Counts of one dataset; None where this stage did not look."""

    dataset: DatasetConfig
    found: int | None = None  # media files in the folder, or lines of the JSONL file
    no_caption: int | None = None  # of those
    decoded: int | None = None  # files, in this run
    failed: int | None = None  # files that could not be decoded or encoded in this run
    too_short: int | None = None  # clips with fewer frames than every target_frames
    latents: int = 0  # pictures and windows whose latents are cached
    texts: int = 0  # items whose text encoder outputs are cached
    cut: int | None = None  # captions that the text encoders do not read to the end
    used: int = 0  # pictures and windows that have both, which is what training sees
    buckets: dict[tuple[int, int, int], int] = field(default_factory=dict)  # of all cached latents, by (W, H, frames) in pixels
    unread: list[str] = field(default_factory=list)  # files with a caption whose ending is not read
    changed: dict[str, list[str]] = field(default_factory=dict)  # names of the files whose frames or colours were, by how
    outcome: CachingOutcome | None = None  # of a caching run; None before it and in training
    notes: list[str] = field(default_factory=list)  # on the caches, for training

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return sum(map(self.batches_of, self.buckets.values()))

    def batches_of(self, items: int) -> int:
        """Batches that so many items of one bucket make in an epoch, repeats included."""
        return -(-items * self.dataset.num_repeats // self.dataset.batch_size)

    def count_items(self, items: Sequence[Item]) -> None:
        """Set the counts of items."""
        self.found = len(items)
        self.unread = unread_files(self.dataset)
        self.no_caption = sum(item.caption is None for item in items)

    def count_shapes(self, shapes: Iterable[LatentShape]) -> None:
        """Set the counts of latents and buckets."""
        counted = Counter(shapes)
        self.latents = counted.total()
        self.buckets = {bucket_of(shape): count for shape, count in sorted(counted.items())}

    def count_caches(self) -> None:
        """Set the counts of cache files from what lies in the cache directory now. Unreadable ones are left out, with a warning."""
        listing = list_caches(self.dataset)
        shapes = {}
        for key, path in newest_latents(listing).items():
            try:
                shapes[key], _ = read_latent_header(path)
            except UserError as error:
                logger.warning("%s", error)
        self.count_shapes(shapes.values())
        self.texts = len(listing.texts)
        self.used = sum(stem in listing.texts for stem, _ in shapes)

    def note_changes(self, item: Item, changes: Iterable[str]) -> None:
        """Add the name of an item to what was done to its frames."""
        for change in changes:
            self.changed.setdefault(change, []).append(item.path.name)

    def add(self, other: DatasetReport) -> None:
        """Add what another process did with items of its own."""
        self.decoded += other.decoded
        self.too_short += other.too_short
        for change, names in other.changed.items():
            self.changed[change] = sorted([*self.changed.get(change, []), *names])
        self.outcome.add(other.outcome)

    def lines(self, kinds: Collection[str]) -> Iterator[str]:
        """What stands below the dataset's row of the table. ``kinds``: of all datasets of the same folder."""
        yield f"{self.dataset.source} -> {self.dataset.cache_directory}"
        for (width, height, frames), items in self.buckets.items():
            bucket = f"{width}x{height}" + (f", {frames} frame(s)" if self.dataset.kind == "video" else "")
            yield f"{bucket}: {items} in {self.batches_of(items)} batch(es) of up to {self.dataset.batch_size}"
        yield from (f"{done}: {', '.join(names)}" for done, names in sorted(self.changed.items()))
        read = frozenset().union(*(EXTENSIONS[kind] for kind in kinds))
        if unread := [name for name in self.unread if Path(name).suffix.lower() not in read]:
            yield f"{len(unread)} file(s) with a caption but of a kind not read here: {name_some(unread)}"
        if self.outcome is not None:
            yield f"cache files: {self.outcome}"
        yield from self.notes


def table_rows(reports: Sequence[DatasetReport]) -> Iterator[tuple[str, list[str], list[str]]]:
    """A label, the cells of ``COLUMNS``, and the lines below them, for each dataset."""
    for report in reports:
        values = (getattr(report, column.replace(" ", "_")) for column in COLUMNS)
        kinds = {other.dataset.kind for other in reports if other.dataset.directory == report.dataset.directory}
        label = f"{report.dataset.index + 1} ({report.dataset.kind}s)"
        yield label, ["-" if value is None else str(value) for value in values], list(report.lines(kinds))


def format_table(reports: Sequence[DatasetReport]) -> str:
    """The counts as plain text: a row for each dataset, and lines below it."""
    rows = list(table_rows(reports))
    width = max(len("dataset"), *(len(label) for label, _, _ in rows))
    lines = ["  ".join(["dataset".ljust(width), *COLUMNS])]
    for label, cells, below in rows:
        lines.append("  ".join([label.ljust(width), *(cell.rjust(len(column)) for column, cell in zip(COLUMNS, cells))]))
        lines += [f"    {line}" for line in below]
    return "\n".join(lines)


def require_items(reports: Iterable[DatasetReport]) -> None:
    """Raise a UserError for the first dataset in which no media file was found."""
    for report in reports:
        if report.found == 0:
            dataset = report.dataset
            what = "no lines" if dataset.jsonl_file else f"no {dataset.kind} files with a known file ending"
            raise UserError(f"{dataset.label}: {dataset.source} holds {what}; put some there, or take the dataset out.")


def require_batches(reports: Sequence[DatasetReport]) -> None:
    """Raise a UserError with the rule that removed the items, if not one batch is left."""
    if any(report.batches for report in reports):
        return
    require_items(reports)
    sentences = []
    for report in reports:
        reasons = {
            "have no caption and were skipped (--missing_caption skip)": report.outcome and report.outcome.skipped,
            f"have fewer frames than the {min(report.dataset.target_frames)} that target_frames asks for": report.too_short,
            "could not be cached (they are listed above)": report.failed,
        }
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        sentences.append(
            f"In {report.dataset.label}, of {report.found} item(s) {why or 'none has cached latents: run cache_latents.py'}."
        )
    raise UserError(f"there is nothing to train on. {' '.join(sentences)}")
