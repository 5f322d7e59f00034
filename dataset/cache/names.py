"""Names of cache files, and which cache files a dataset has.

Latents lie in ``{stem}_{W:04d}x{H:04d}_hv.safetensors`` for a picture and
``{stem}_{start:05d}-{frames:03d}_{W:04d}x{H:04d}_hv.safetensors`` for a window of a clip, W and H being those of the source.
Other tools write the size of the bucket there for clips, so a size is always read from the tensor and never from a name.
Text encoder outputs lie in ``{stem}_hv_te.safetensors``, one per item. A stem may hold anything a file name may, so names
are parsed from their end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.frames import Window
from utils.errors import UserError
from utils.files import is_temporary

TEXT_SUFFIX = "_hv_te.safetensors"
IMAGE_NAME = re.compile(r"(?P<stem>.+)_(\d{4,})x(\d{4,})_hv\.safetensors", re.DOTALL)
VIDEO_NAME = re.compile(r"(?P<stem>.+)_(?P<start>\d{5,})-(?P<frames>\d{3,})_(\d{4,})x(\d{4,})_hv\.safetensors", re.DOTALL)

CacheKey = tuple[str, Window | None]  # stem; window for clips, None for pictures


@dataclass(frozen=True)
class CacheListing:
    """The cache files of one dataset; several latents of one key where tools or runs named one thing differently."""

    latents: dict[CacheKey, list[Path]] = field(default_factory=dict)
    texts: dict[str, Path] = field(default_factory=dict)  # by stem


def latent_cache_path(item: Item, original_size: tuple[int, int], window: Window | None = None) -> Path:
    """Where the latents of a picture (``window`` None) or of a window (start, frames) go. ``original_size``: (W, H)."""
    width, height = original_size
    frames = "" if window is None else f"_{window[0]:05d}-{window[1]:03d}"
    return item.dataset.cache_directory / f"{item.stem}{frames}_{width:04d}x{height:04d}_hv.safetensors"


def text_cache_path(item: Item) -> Path:
    """Where the text encoder outputs of an item go: one file for a clip, however many windows are cut from it."""
    return item.dataset.cache_directory / f"{item.stem}{TEXT_SUFFIX}"


def list_caches(dataset: DatasetConfig) -> CacheListing:
    """The cache files in a dataset's cache directory, sorted; empty if the directory does not exist."""
    listing, directory = CacheListing(), dataset.cache_directory
    if not os.path.isdir(directory):
        return listing
    try:
        names = {path.name for path in directory.iterdir() if path.suffix == ".safetensors" and not is_temporary(path)}
    except OSError as error:
        raise UserError(f"cannot list the cache_directory {directory}: {error.strerror or error}.") from error
    for path in sorted(directory / name for name in names):
        if path.name.startswith("._") and path.name[2:] in names:
            continue  # macOS leaves a "._x" beside an x that it copies to a foreign disk
        if path.name.endswith(TEXT_SUFFIX):
            listing.texts[path.name.removesuffix(TEXT_SUFFIX)] = path
        elif dataset.kind == "image" and (match := IMAGE_NAME.fullmatch(path.name)):
            listing.latents.setdefault((match["stem"], None), []).append(path)
        elif dataset.kind == "video" and (match := VIDEO_NAME.fullmatch(path.name)):
            key = (match["stem"], (int(match["start"]), int(match["frames"])))
            listing.latents.setdefault(key, []).append(path)
    return listing


def newest(paths: Collection[Path]) -> Path:
    """Of several caches of one thing (a source of another size, another tool), the one that training uses."""

    def age(path: Path) -> tuple[int, str]:
        try:
            return path.stat().st_mtime_ns, path.name
        except OSError:  # a link that leads nowhere, which whoever reads the file will name
            return -1, path.name

    return max(paths, key=age)


def newest_latents(listing: CacheListing) -> dict[CacheKey, Path]:
    """The latent cache of each (stem, window), sorted; the newest where several files stand for one."""
    keys = sorted(listing.latents, key=lambda key: (key[0], key[1] or (0, 0)))
    return {key: newest(listing.latents[key]) for key in keys}
