"""Whether a cache file is still what its item calls for: which are kept, which are made again, and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dataset.cache.files import (
    CAPTION,
    CachedItem,
    CacheListing,
    bucket_of,
    latent_cache_path,
    latent_shape_for,
    newest,
    read_latent_header,
    read_text_metadata,
    text_cache_path,
)
from dataset.cache.preparation import Target
from dataset.cache.records import (
    BUCKET,
    FRAME_RATE,
    REASONS,
    SOURCE_BYTES,
    SOURCE_HASH,
    SOURCE_NEWER,
    SOURCE_REPLACED,
    SOURCE_TIME,
    WINDOW,
    first_difference,
    has_record,
    is_same_source,
    latent_record,
)
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.buckets import choose_bucket
from dataset.media.frame_rate import possible_records
from dataset.media.frames import Window, is_cut
from utils.errors import UserError

logger = logging.getLogger(__name__)

NEW = "new"
ASKED = "without --skip_existing"
UNREADABLE = "unreadable"
OTHER_CAPTION = "another caption"
GONE = "no such item any more"
SOURCE_TOUCHED = "source perhaps changed, its time has"


@dataclass(frozen=True)
class Verdict:
    """What becomes of one cache file.

    Attributes:
        reason: why it is made (``NEW``) or made again; None when it is kept.
        path: the file that is kept or will be made.
    """

    reason: str | None
    path: Path


def judge_latents(listing: CacheListing, target: Target, vae: str, skip_existing: bool) -> Verdict:
    """Whether the latents of a target are kept; judged is the file that training would use.

    A file without a record is kept if it has the right shape, a name of ours or of other tools, and is younger than its
    source: from an older one one cannot tell.

    Args:
        listing: of the cache directory before this run.
        vae: the fingerprint of the VAE that is to encode.
    """
    ours = target.cache_path
    paths = listing.latents.get(target.key)
    if not paths:
        return Verdict(NEW, ours)
    if not skip_existing:
        return Verdict(ASKED, ours)
    found = newest(paths)
    reason = _why_not_latents(found, target, vae)
    return Verdict(None, found) if reason is None else Verdict(reason, ours)


def _why_not_latents(path: Path, target: Target, vae: str) -> str | None:
    try:
        shape, metadata = read_latent_header(path)
    except UserError as error:
        logger.warning("%s; it is made again.", error)
        return UNREADABLE
    source = target.item.path
    if SOURCE_HASH in metadata:
        if not is_same_source(metadata, source, target.item.dataset.kind):
            return SOURCE_REPLACED
        difference = first_difference(metadata, latent_record(target.bucket, target.window, target.frame_rate, vae))
        if difference is not None:
            return difference
    else:
        names = {target.cache_path.name}
        if target.window is not None:
            names.add(latent_cache_path(target.item, target.bucket, target.window).name)
        if path.name not in names:
            return SOURCE_REPLACED
        if path.stat().st_mtime_ns < source.stat().st_mtime_ns:
            return SOURCE_NEWER
    return None if shape == latent_shape_for(target.bucket, target.frames) else REASONS[BUCKET]


def judge_text(item: Item, encoders: Mapping[str, str], skip_existing: bool) -> Verdict:
    """Whether the text encoder outputs of an item are kept. A file that does not say what made it is.

    ``encoders``: fingerprints under the keys of ``records.TEXT_ENCODERS`` and ``records.TOKENIZERS``.
    """
    path = text_cache_path(item)
    if not path.is_file():
        return Verdict(NEW, path)
    if not skip_existing:
        return Verdict(ASKED, path)
    try:
        metadata = read_text_metadata(path)
    except UserError as error:
        logger.warning("%s; it is made again.", error)
        return Verdict(UNREADABLE, path)
    if metadata.get(CAPTION, item.caption) != item.caption:
        return Verdict(OTHER_CAPTION, path)
    return Verdict(first_difference(metadata, encoders), path)


@dataclass
class CacheCheck:
    """What a quick look at caches found.

    Attributes:
        without_record: files that do not say what made them.
        mismatches: names of files by what does not match.
    """

    without_record: int = 0
    mismatches: dict[str, list[str]] = field(default_factory=dict)


def check_caches(dataset: DatasetConfig, cached: Iterable[CachedItem], items: Iterable[Item] | None) -> CacheCheck:
    """Compare the caches of a dataset with its description, and with captions, sizes and times of its media.

    No media file is read. ``items`` is None where they cannot be reached; one whose file is missing is not compared.
    """
    sources = None if items is None else {item.stem: item for item in items}
    cached = list(cached)
    last_starts = _last_starts(cached)
    check = CacheCheck()
    texts = set()
    for entry in cached:
        source = None if sources is None else sources.get(entry.stem)
        with suppress(UserError):  # whoever reads the file says what is wrong with it
            _, metadata = read_latent_header(entry.latents_path)
            gone = GONE if sources is not None and source is None else None
            _note(check, entry.latents_path, metadata, gone or _latent_mismatch(dataset, entry, metadata, source, last_starts))
        if entry.text_path not in texts:
            texts.add(entry.text_path)
            with suppress(UserError):
                metadata = read_text_metadata(entry.text_path)
                _note(check, entry.text_path, metadata, _text_mismatch(metadata, source))
    return check


def _note(check: CacheCheck, path: Path, metadata: Mapping[str, str], mismatch: str | None) -> None:
    check.without_record += not has_record(metadata)
    if mismatch is not None:
        check.mismatches.setdefault(mismatch, []).append(path.name)


def _last_starts(cached: Iterable[CachedItem]) -> dict[tuple[str, int], int]:
    """The first frame of the last window, by stem and length: what is known of a clip's own length without reading it."""
    found: dict[tuple[str, int], int] = {}
    for entry in cached:
        if entry.window is not None:
            start, length = entry.window
            found[entry.stem, length] = max(start, found.get((entry.stem, length), 0))
    return found


def _latent_mismatch(
    dataset: DatasetConfig,
    entry: CachedItem,
    metadata: Mapping[str, str],
    source: Item | None,
    last_starts: Mapping[tuple[str, int], int],
) -> str | None:
    if SOURCE_HASH not in metadata:
        return None
    found = None
    if source is not None:
        with suppress(OSError):  # the media may be elsewhere
            found = os.stat(source.path)
    if found is not None and metadata.get(SOURCE_BYTES) != str(found.st_size):
        return SOURCE_REPLACED
    if not _has_size(dataset, entry, metadata):
        return REASONS[BUCKET]
    if entry.window is not None and (difference := _other_frames(dataset, entry, entry.window, metadata, last_starts)):
        return difference
    return SOURCE_TOUCHED if found is not None and metadata.get(SOURCE_TIME) != str(found.st_mtime_ns) else None


def _has_size(dataset: DatasetConfig, entry: CachedItem, metadata: Mapping[str, str]) -> bool:
    width, height = (metadata.get(side, "") for side in ("width", "height"))
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        return True
    bucket = choose_bucket((int(width), int(height)), dataset.resolution, dataset.enable_bucket, dataset.bucket_no_upscale)
    return bucket == bucket_of(entry.shape)[:2]


def _other_frames(
    dataset: DatasetConfig,
    entry: CachedItem,
    window: Window,
    metadata: Mapping[str, str],
    last_starts: Mapping[tuple[str, int], int],
) -> str | None:
    """Why the dataset would not cut these frames of a clip, as far as that can be told without reading it."""
    mode, stride, sample = dataset.frame_extraction, dataset.frame_stride, dataset.frame_sample
    if not is_cut(window, last_starts[entry.stem, window[1]], dataset.target_frames, mode, stride, sample, dataset.max_frames):
        return REASONS[WINDOW]
    made_with = metadata.get(FRAME_RATE)
    is_same = made_with is None or made_with in possible_records(dataset.target_fps, dataset.source_fps)
    # the first frame is the same at every rate
    return None if is_same or window == (0, 1) else REASONS[FRAME_RATE]


def _text_mismatch(metadata: Mapping[str, str], source: Item | None) -> str | None:
    if source is None or metadata.get(CAPTION) in (None, source.caption or ""):
        return None
    return OTHER_CAPTION
