"""Whether a cache file is still what its item calls for: which are kept, which are made again, and why.

The caching scripts and the table that opens a training ask the same questions (``latents_mismatch``, ``text_mismatch``); training
knows less, as it reads no media.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dataset.cache.files import CAPTION, CachedItem, LatentShape, latent_shape_for, read_latent_header, read_text_metadata
from dataset.cache.names import CacheListing, latent_cache_path, newest, text_cache_path
from dataset.cache.plan import Target
from dataset.cache.records import FRAME_RATE, SOURCE_HASH, TEXT_ENCODERS, TOKENIZERS, VAE, has_record, is_same_source
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.frame_rate import possible_records
from utils.errors import UserError

logger = logging.getLogger(__name__)

# Reasons why a cache file is made or made again.
NEW = "new"
NOT_KEPT = "without --skip_existing"
UNREADABLE = "unreadable"
GONE = "no such item any more"
SOURCE_REPLACED = "source replaced"
SOURCE_NEWER = "source newer"  # all that can be known without a record
SOURCE_TOUCHED = "source perhaps changed, its time has"
OTHER_SIZE = "another size"
OTHER_WINDOW = "another window"
OTHER_FRAME_RATE = "another frame rate"
OTHER_VAE = "another VAE"
OTHER_CAPTION = "another caption"
OTHER_ENCODERS = dict.fromkeys(TEXT_ENCODERS, "another text encoder") | dict.fromkeys(TOKENIZERS, "another tokenizer")


@dataclass(frozen=True)
class Verdict:
    """What becomes of one cache file.

    Attributes:
        reason: why it is made (``NEW``) or made again; None when it is kept.
        path: the file that is kept or will be made.
    """

    reason: str | None
    path: Path


@dataclass(frozen=True)
class Wanted:
    """What latents must be to fit their dataset; None: not known, and not compared.

    Attributes:
        shape: of the latents.
        is_cut: whether the dataset cuts this window.
        frame_rates: records of how frames may have been chosen.
        vae: the fingerprint of the VAE.
    """

    shape: LatentShape | None
    is_cut: bool = True
    frame_rates: Collection[str] | None = None
    vae: str | None = None


def latents_mismatch(
    shape: LatentShape, metadata: Mapping[str, str], wanted: Wanted, source: Item | None, read_source: bool
) -> str | None:
    """Why latents that carry a record are not the wanted ones; None if they are, or if that cannot be known.

    Args:
        source: the item they belong to, None where it cannot be reached.
        read_source: whether the media file may be read, to distinguish a copied file from a changed one.
    """
    is_same = True
    if source is not None:
        is_same = is_same_source(metadata, source.path, source.dataset.kind, read_source)
    if is_same is False:
        return SOURCE_REPLACED
    if wanted.shape not in (None, shape):
        return OTHER_SIZE
    if not wanted.is_cut:
        return OTHER_WINDOW
    if wanted.frame_rates is not None and metadata.get(FRAME_RATE) not in (None, *wanted.frame_rates):
        return OTHER_FRAME_RATE
    if wanted.vae is not None and metadata.get(VAE) not in (None, wanted.vae):
        return OTHER_VAE
    return SOURCE_TOUCHED if is_same is None else None


def text_mismatch(metadata: Mapping[str, str], caption: str | None, encoders: Mapping[str, str]) -> str | None:
    """Why text encoder outputs are not those of ``caption`` by ``encoders``; what either side lacks is not compared.

    Args:
        encoders: fingerprints under the keys of ``records.TEXT_ENCODERS`` and ``records.TOKENIZERS``.
    """
    if metadata.get(CAPTION) not in (None, caption or ""):
        return OTHER_CAPTION
    for key, reason in OTHER_ENCODERS.items():
        if key in metadata and key in encoders and metadata[key] != encoders[key]:
            return reason
    return None


def judge_latents(listing: CacheListing, target: Target, vae: str, skip_existing: bool) -> Verdict:
    """Whether the latents of a target are kept; judged is the file that training would use.

    A file without a record is kept if it has the right shape, a name of ours or of other tools, and is younger than its
    source.

    Args:
        listing: of the cache directory before this run.
        vae: the fingerprint of the VAE that is to encode.
    """
    paths = listing.latents.get(target.key)
    if not paths or not skip_existing:
        return Verdict(NOT_KEPT if paths else NEW, target.cache_path)
    found = newest(paths)
    reason = _why_again(found, target, vae)
    return Verdict(reason, found if reason is None else target.cache_path)


def _why_again(path: Path, target: Target, vae: str) -> str | None:
    try:
        shape, metadata = read_latent_header(path)
    except UserError as error:
        logger.warning("%s; it is made again.", error)
        return UNREADABLE
    wanted_shape = latent_shape_for(target.bucket, target.frames)
    if SOURCE_HASH in metadata:
        wanted = Wanted(wanted_shape, frame_rates=_frame_rates(target.window, {target.frame_rate or ""}), vae=vae)
        return latents_mismatch(shape, metadata, wanted, target.item, read_source=True)
    names = {target.cache_path.name}
    if target.window is not None:
        names.add(latent_cache_path(target.item, target.bucket, target.window).name)
    if path.name not in names:
        return SOURCE_REPLACED
    if path.stat().st_mtime_ns < target.item.path.stat().st_mtime_ns:
        return SOURCE_NEWER
    return None if shape == wanted_shape else OTHER_SIZE


def _frame_rates(window: tuple[int, int] | None, rates: Collection[str]) -> Collection[str] | None:
    """``rates``, if they matter: a picture has none, and the first frame of a clip is the same at every rate."""
    return None if window in (None, (0, 1)) else rates


def judge_text(item: Item, encoders: Mapping[str, str], skip_existing: bool) -> Verdict:
    """Whether the text encoder outputs of an item are kept. ``encoders``: as in ``text_mismatch``."""
    path = text_cache_path(item)
    if not path.is_file():
        return Verdict(NEW, path)
    if not skip_existing:
        return Verdict(NOT_KEPT, path)
    try:
        metadata = read_text_metadata(path)
    except UserError as error:
        logger.warning("%s; it is made again.", error)
        return Verdict(UNREADABLE, path)
    return Verdict(text_mismatch(metadata, item.caption, encoders), path)


def check_caches(
    dataset: DatasetConfig, cached: Iterable[CachedItem], items: Iterable[Item] | None
) -> tuple[int, dict[str, list[str]]]:
    """Compare the caches of a dataset with its description, and with captions, sizes and times of its media.

    No media file is read. ``items`` is None where they cannot be reached; one whose file is missing is not compared.

    Returns:
        How many files carry no record, and the names of files by what does not match.
    """
    sources = None if items is None else {item.stem: item for item in items}
    cached = list(cached)
    last_starts = _last_starts(cached)
    without_record = 0
    mismatches: dict[str, list[str]] = {}

    def add(path: Path, metadata: Mapping[str, str], mismatch: str | None) -> None:
        nonlocal without_record
        without_record += not has_record(metadata)
        if mismatch is not None:
            mismatches.setdefault(mismatch, []).append(path.name)

    texts = set()
    for entry in cached:
        source = None if sources is None else sources.get(entry.stem)
        with suppress(UserError):  # reading the file for training reports what is wrong with it
            shape, metadata = read_latent_header(entry.latents_path)
            mismatch = GONE if sources is not None and source is None else None
            if mismatch is None and SOURCE_HASH in metadata:
                reachable = source if source is not None and os.path.exists(source.path) else None
                wanted = _wanted_without_media(dataset, entry, metadata, last_starts)
                mismatch = latents_mismatch(shape, metadata, wanted, reachable, read_source=False)
            add(entry.latents_path, metadata, mismatch)
        if entry.text_path not in texts:
            texts.add(entry.text_path)
            with suppress(UserError):
                metadata = read_text_metadata(entry.text_path)
                add(entry.text_path, metadata, None if source is None else text_mismatch(metadata, source.caption, {}))
    return without_record, mismatches


def _last_starts(cached: Iterable[CachedItem]) -> dict[tuple[str, int], int]:
    """The first frame of the last window, by stem and length: what is known of a clip's own length without reading it."""
    found: dict[tuple[str, int], int] = {}
    for entry in cached:
        if entry.window is not None:
            start, length = entry.window
            found[entry.stem, length] = max(start, found.get((entry.stem, length), 0))
    return found


def _wanted_without_media(
    dataset: DatasetConfig, entry: CachedItem, metadata: Mapping[str, str], last_starts: Mapping[tuple[str, int], int]
) -> Wanted:
    """What the latents of ``entry`` must be, from the size of their source in the metadata and from the dataset alone."""
    shape = None
    sides = [metadata.get(side, "") for side in ("width", "height")]
    if all(side.isdecimal() and int(side) for side in sides):
        bucket = dataset.bucket_for((int(sides[0]), int(sides[1])))
        channels = entry.shape[0]  # those of the model are compared when it is known
        shape = latent_shape_for(bucket, 1 if entry.window is None else entry.window[1], channels)
    if entry.window is None:
        return Wanted(shape)
    return Wanted(
        shape,
        dataset.cuts(entry.window, last_starts[entry.stem, entry.window[1]]),
        _frame_rates(entry.window, possible_records(dataset.target_fps, dataset.source_fps)),
    )
