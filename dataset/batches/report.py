"""What the table that opens a training has on the caches: their counts, media without caches, and caches that do not match."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dataset.batches.batches import CachedGroup
from dataset.cache.freshness import check_caches
from dataset.cache.report import DatasetReport
from dataset.items import Item, list_items
from utils.errors import UserError, name_some

logger = logging.getLogger(__name__)


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
    report.notes = describe_caches(group, items)
    if group.dataset.prior_preservation:
        report.notes.insert(0, "prior preservation: the model's own predictions are the targets, not the latents")
    return report


def describe_caches(group: CachedGroup, items: Sequence[Item] | None) -> list[str]:
    """Lines on media without caches, and on caches that carry no record or do not match; the first and the last are warned of.

    ``items``: those of the dataset, None where the media cannot be reached.
    """
    without_record, mismatches = check_caches(group.dataset, group.items, items)
    notes = []
    if items is not None and (uncached := describe_uncached(group, items)):
        logger.warning("%s: %s", group.dataset.label, uncached)
        notes.append(uncached)
    if lengths := uncached_lengths(group):
        frames = " or ".join(map(str, lengths))
        notes.append(f"no clip has a cache of {frames} frame(s) (target_frames); run cache_latents.py, unless all are shorter")
    if without_record:
        notes.append(f"{without_record} cache(s) carry no record of what made them: whether they match is not known")
    for reason, names in mismatches.items():
        notes.append(f"{len(names)} cache(s) do not match, {reason}: {name_some(names)}")
    if mismatches:
        logger.warning(
            "%s: %d cache(s) do not match the dataset, see the table. They are trained as they are; "
            "run both caching scripts with --skip_existing to make only those again, and with --remove_orphans to delete those "
            "of items that are gone.",
            group.dataset.label,
            sum(map(len, mismatches.values())),
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
