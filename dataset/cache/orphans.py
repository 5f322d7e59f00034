"""Cache files that belong to no item any more.

``cache_latents.py`` lists those of latents, ``cache_text_encoder_outputs.py`` those of text encoder outputs, at the end of each
dataset. With --remove_orphans a script deletes what it lists. Training goes by the cache files alone: it uses orphans too.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from dataset.cache.names import CacheKey, list_caches
from dataset.config import DatasetConfig
from utils.files import is_temporary

ABANDONED_SECONDS = 600  # a cache file takes moments to write; what has been unfinished for longer was left by a killed run


def orphaned_latents(dataset: DatasetConfig, called_for: Mapping[CacheKey, Path], unknown: Collection[str]) -> list[Path]:
    """Latent caches of items that are gone, of windows that are no longer cut, and older ones next to the right one.

    Args:
        called_for: the right file of each picture and window.
        unknown: stems of items that could not be read; theirs are no orphans.
    """
    right = _identities(called_for.values())
    latents = list_caches(dataset).latents
    candidates = [path for (stem, _), paths in latents.items() if stem not in unknown for path in paths]
    return sorted(path for path in candidates if _identities([path]).isdisjoint(right))


def orphaned_texts(dataset: DatasetConfig, called_for: Iterable[Path]) -> list[Path]:
    """Text caches of items that are gone; ``called_for``: those of the items that are there."""
    right = _identities(called_for)
    return sorted(path for path in list_caches(dataset).texts.values() if _identities([path]).isdisjoint(right))


def _identities(paths: Iterable[Path]) -> set[tuple[int, int]]:
    """Device and file number of those that exist: where a.png became A.png, both names may mean one cache file."""
    found = set()
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            found.add((status.st_dev, status.st_ino))
    return found


def abandoned_files(dataset: DatasetConfig) -> list[Path]:
    """Unfinished cache files that killed runs left."""
    folder = dataset.cache_directory
    if not folder.is_dir():
        return []
    before = time.time() - ABANDONED_SECONDS
    unfinished = (path for path in folder.iterdir() if is_temporary(path) and path.suffix == ".safetensors")
    return sorted(path for path in unfinished if path.stat().st_mtime < before)
