"""Which cache files a caching script keeps and which it makes, and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dataset.cache.files import CAPTION, read_text_header
from dataset.cache.names import CacheListing, latent_cache_path, newest, text_cache_path
from dataset.cache.preparation import Target
from dataset.cache.records import SOURCE_HASH, SOURCE_REPLACED, VAE, latents_made, latents_mismatch, mismatch
from dataset.items import Item
from utils.errors import UserError

logger = logging.getLogger(__name__)

# Reasons why a cache file is made or made again, besides those of ``records``.
NEW = "new"
NOT_KEPT = "without --skip_existing"
UNREADABLE = "unreadable"
SOURCE_NEWER = "source newer"  # all that can be known without a record


@dataclass(frozen=True)
class Verdict:
    """What becomes of one cache file."""

    reason: str | None  # why it is made (``NEW``) or made again; None when it is kept
    path: Path  # that is kept or will be made


def judge_latents(listing: CacheListing, target: Target, vae: str, skip_existing: bool) -> Verdict:
    """Whether the latents of a target are kept; judged is the file that training would use.

    ``listing``: of the cache directory before this run. ``vae``: the fingerprint of the VAE that is to encode.
    """
    paths = listing.latents.get(target.key)
    if not paths or not skip_existing:
        return Verdict(NOT_KEPT if paths else NEW, target.cache_path)
    found = newest(paths)
    reason = _why_again(found, target, vae)
    return Verdict(reason, found if reason is None else target.cache_path)


def _why_again(path: Path, target: Target, vae: str) -> str | None:
    try:
        made = latents_made(path)
    except UserError as error:
        logger.warning("%s; it is made again.", error)
        return UNREADABLE
    wanted = {key: {value} for key, value in {**target.record, VAE: vae}.items()}
    source = target.item.path
    if SOURCE_HASH in made:
        return latents_mismatch(made, wanted, source, target.item.dataset.kind, read_source=True)
    # Without a record: a name of ours, or for clips of other tools, says that the source had this size.
    names = {target.cache_path.name}
    if target.window is not None:
        names.add(latent_cache_path(target.item, target.bucket, target.window).name)
    if path.name not in names:
        return SOURCE_REPLACED
    return SOURCE_NEWER if path.stat().st_mtime_ns < source.stat().st_mtime_ns else mismatch(made, wanted)


def judge_text(item: Item, encoders: Mapping[str, str], skip_existing: bool) -> str | None:
    """Why the text encoder outputs of an item are made, None if they are kept. ``encoders``: what the record has of them."""
    path = text_cache_path(item)
    if not path.is_file() or not skip_existing:
        return NOT_KEPT if path.is_file() else NEW
    try:
        _, made = read_text_header(path)
    except UserError as error:
        logger.warning("%s; it is made again.", error)
        return UNREADABLE
    return mismatch(made, {key: {value} for key, value in {**encoders, CAPTION: item.caption or ""}.items()})
