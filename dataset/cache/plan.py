"""Which cache files an item calls for, and how much room they take. Decodes no more than that needs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dataset.cache.files import latent_shape_for
from dataset.cache.names import CacheKey, latent_cache_path, list_caches
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.decoding import VideoInfo, frame_times, probe_image, probe_video
from dataset.media.frame_rate import EVERY_FRAME, Resampling, frames_at, resample
from dataset.media.frames import Window, frames_needed

RATE_SECONDS = 1.0  # of a video, at least, are needed to measure its frame rate; single gaps between frames vary
HEADER_BYTES = 256  # of a cache file, at least


@dataclass(frozen=True)
class Target:
    """One latent cache file that an item calls for.

    Attributes:
        window: (first frame, frames) of a clip, None for a picture.
        original_size: (W, H) of the source.
        bucket: (W, H) to train at.
        resampling: which frames of the file the clip is cut from, None for every frame. Windows count the chosen frames.
    """

    item: Item
    window: Window | None
    original_size: tuple[int, int]
    bucket: tuple[int, int]
    resampling: Resampling | None = None

    @property
    def key(self) -> CacheKey:
        """Stem and window, under which the listing has the cache file."""
        return self.item.stem, self.window

    @property
    def frames(self) -> int:
        """Number of frames; 1 for a picture."""
        return 1 if self.window is None else self.window[1]

    @property
    def cache_path(self) -> Path:
        """The cache file."""
        return latent_cache_path(self.item, self.original_size, self.window)

    @property
    def label(self) -> str:
        """For messages: the file, and the frames for a clip."""
        if self.window is None:
            return str(self.item.path)
        resampled = f" ({self.resampling})" if self.resampling else ""
        return f"{self.item.path} frames {self.window[0]} to {self.window[0] + self.window[1] - 1}{resampled}"

    @property
    def frame_rate(self) -> str | None:
        """How the frames are chosen, for the record; None for a picture."""
        if self.window is None:
            return None
        return EVERY_FRAME if self.resampling is None else self.resampling.record


def plan_targets(item: Item, estimate: bool = False) -> tuple[Target, ...]:
    """The cache files an item calls for; none for a clip that is too short.

    Args:
        estimate: believe the number of frames that a video states, instead of decoding it to count them.

    Raises:
        MediaError: the file is unreadable.
    """
    dataset = item.dataset
    windows: list[Window | None] = [None]
    resampling = None
    if dataset.kind == "image":
        size = probe_image(item.path)
    else:
        info = probe_video(item.path)
        size = (info.width, info.height)
        if estimate:
            frames = frames_at(dataset.target_fps, info.frames or 0, dataset.source_fps or info.fps)
        else:
            frames, resampling = _count_frames(item, info)
        windows = list(dataset.windows_of(frames))
    bucket = dataset.bucket_for(size)
    return tuple(Target(item, window, size, bucket, resampling) for window in windows)


def _count_frames(item: Item, info: VideoInfo) -> tuple[int, Resampling | None]:
    """How many frames of a clip, as far as they decide its windows, and how it is resampled."""
    dataset = item.dataset
    fps = dataset.source_fps or info.fps
    given = dataset.source_fps is not None
    needed = frames_needed(dataset.target_frames, dataset.frame_extraction, dataset.max_frames)
    limit = None
    if needed is not None:
        limit = needed, max(needed / dataset.target_fps, RATE_SECONDS) if dataset.target_fps else 0.0
    times = frame_times(item.path, fps, not given, limit)
    resampling = resample(times, fps, dataset.target_fps, given)
    return len(times if resampling is None else resampling.indices), resampling


def missing_latents_bytes(dataset: DatasetConfig, items: Sequence[Item], dtype: torch.dtype, num_workers: int) -> int:
    """About how many bytes the latents of those items take that have none yet.

    Reads the headers of their media, and a frame of each clip. What cannot be known so counts as nothing: nobody is refused
    because of a guess.
    """
    cached = {stem for stem, _ in list_caches(dataset).latents}
    with ThreadPoolExecutor(num_workers) as threads:
        return sum(threads.map(partial(_latents_bytes, dtype=dtype), [item for item in items if item.stem not in cached]))


def _latents_bytes(item: Item, dtype: torch.dtype) -> int:
    with suppress(Exception):  # decoders fail in ways of their own; whoever reads the file reports what is wrong with it
        shapes = (latent_shape_for(target.bucket, target.frames) for target in plan_targets(item, estimate=True))
        return sum(torch.Size(shape).numel() * dtype.itemsize + HEADER_BYTES for shape in shapes)
    return 0


def text_bytes(rows: int, widths: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of the text encoder outputs of one caption: ``rows`` states and the pooled output, of ``widths``, and the mask."""
    return (rows * widths[0] + widths[1]) * dtype.itemsize + rows * torch.int64.itemsize + HEADER_BYTES
