"""What a training says of its data: the table at its start, and facts for the metadata of the trained file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset.batches.cached_items import CachedGroup
from dataset.cache.files import CAPTION, read_text_header
from dataset.cache.records import (
    FRAME_RATE,
    SOURCE_HASH,
    WINDOW,
    has_record,
    latents_made,
    latents_mismatch,
    mismatch,
    target_record,
)
from dataset.cache.report import DatasetReport
from dataset.items import Item, list_items
from dataset.media.frame_rate import possible_records
from utils.errors import UserError, name_some

logger = logging.getLogger(__name__)

GONE = "no such item any more"


@dataclass(frozen=True)
class DataFacts:
    """What a training knows about its data."""

    items: int  # in all datasets, repeats included
    resolution: tuple[int, int]  # (width, height) of the largest dataset, for ModelSpec
    datasets: Sequence[Mapping[str, Any]] = ()  # one JSON-ready description for each


def data_facts(groups: Sequence[CachedGroup]) -> DataFacts:
    """The facts about these datasets, of which there is at least one."""
    return DataFacts(
        items=sum(len(group.items) * group.dataset.num_repeats for group in groups),
        resolution=max((group.dataset.resolution for group in groups), key=lambda size: size[0] * size[1]),
        datasets=[_describe(group) for group in groups],
    )


def _describe(group: CachedGroup) -> dict[str, object]:
    """The settings of a dataset and how much it holds, and of its paths only the last name."""
    settings = {key: value for key, value in asdict(group.dataset).items() if value is not None and key != "cache_directory"}
    if group.dataset.kind == "image":
        settings = {key: value for key, value in settings.items() if not key.startswith(("target_", "frame_"))}
    paths = {key: value.name for key, value in settings.items() if isinstance(value, Path)}
    return settings | paths | {"items": len(group.items)}


def report_cached_group(group: CachedGroup) -> DatasetReport:
    """The counts for training, which uses caches alone: found and without caption are None where the media are gone."""
    report = DatasetReport(group.dataset, used=len(group.items), texts=len({item.stem for item in group.items}))
    report.count_shapes(item.shape for item in group.items)
    try:
        items = list_items(group.dataset)
    except UserError:
        items = None
    else:
        report.count_items(items)
    if group.dataset.prior_preservation:
        report.notes.append("prior preservation: the model's own predictions are the targets, not the latents")
    report.notes += _notes(group, items)
    return report


def _notes(group: CachedGroup, items: Sequence[Item] | None) -> list[str]:
    """Lines on media without caches, and on caches that carry no record or do not match; the first and the last are warned of."""
    dataset, notes = group.dataset, []
    cached = {item.stem for item in group.items}
    # those without a caption have a column of the table
    if uncached := [item.path.name for item in items or () if item.stem not in cached and item.caption is not None]:
        what = "picture(s)" if dataset.kind == "image" else "clip(s)"
        note = f"{len(uncached)} of {len(items)} {what} have no cache: {name_some(uncached)}; run cache_latents.py"
        if dataset.kind == "video" and dataset.frame_extraction != "full":
            note += f" (clips of fewer than {min(dataset.target_frames)} frame(s) get none)"
        logger.warning("%s: %s", dataset.label, note)
        notes.append(note)
    if dataset.kind == "video" and dataset.frame_extraction != "full":
        lengths = sorted(set(dataset.target_frames) - {item.window[1] for item in group.items})
        if lengths:
            frames = " or ".join(map(str, lengths))
            notes.append(f"no clip has a cache of {frames} frame(s) (target_frames); run cache_latents.py, unless all are shorter")
    without_record = 0
    mismatches: dict[str, list[str]] = {}
    for path, recorded, reason in judged_caches(group, items):
        without_record += not recorded
        if reason is not None:
            mismatches.setdefault(reason, []).append(path.name)
    if without_record:
        notes.append(f"{without_record} cache(s) carry no record of what made them: whether they match is not known")
    for reason, names in mismatches.items():
        notes.append(f"{len(names)} cache(s) do not match, {reason}: {name_some(names)}")
    if mismatches:
        logger.warning(
            "%s: %d cache(s) do not match the dataset, see the table. They are trained as they are; "
            "run both caching scripts with --skip_existing to make only those again, and with --remove_orphans to delete those "
            "of items that are gone.",
            dataset.label,
            sum(map(len, mismatches.values())),
        )
    return notes


def judged_caches(group: CachedGroup, items: Sequence[Item] | None) -> Iterator[tuple[Path, bool, str | None]]:
    """Each cache file, whether it carries a record, and why it does not match the dataset or what is known of its media.

    No media file is read. ``items`` is None where they cannot be reached; one whose file is missing is not compared.
    """
    sources = None if items is None else {item.stem: item for item in items}
    last_starts: dict[tuple[str, int], int] = {}  # what is known of a clip's own length: its last window of each length
    for entry in group.items:
        if entry.window is not None:
            start, frames = entry.window
            last_starts[entry.stem, frames] = max(start, last_starts.get((entry.stem, frames), 0))
    for entry in group.items:
        made, reason = latents_made(entry.latents_path), None
        if sources is not None and entry.stem not in sources:
            reason = GONE
        elif SOURCE_HASH in made:
            size = int(made["width"]), int(made["height"])
            wanted = {key: {value} for key, value in target_record(group.dataset.bucket_for(size), entry.window).items()}
            if WINDOW in wanted:
                frames = entry.window[1]
                if entry.window not in group.dataset.windows_of(last_starts[entry.stem, frames] + frames):
                    wanted[WINDOW] = set()  # no window is right
            if FRAME_RATE in wanted:
                wanted[FRAME_RATE] = possible_records(group.dataset.target_fps, group.dataset.source_fps)
            source = sources[entry.stem].path if sources is not None and os.path.exists(sources[entry.stem].path) else None
            reason = latents_mismatch(made, wanted, source, group.dataset.kind, read_source=False)
        yield entry.latents_path, has_record(made), reason
    for path, stem in {entry.text_path: entry.stem for entry in group.items}.items():
        with suppress(UserError):  # reading the file for training reports what is wrong with it
            _, made = read_text_header(path)
            known = sources is not None and stem in sources
            yield path, has_record(made), mismatch(made, {CAPTION: {sources[stem].caption or ""}} if known else {})
