"""How much room the cache files that are still to be made will take, for a check before anything is loaded.

What is not known for certain counts for nothing: nobody is refused because of a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from dataset.cache.files import latent_shape_for, list_caches
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.buckets import choose_bucket
from dataset.media.decoding import VideoInfo, probe_image, probe_video
from dataset.media.frame_rate import frames_at
from dataset.media.frames import cut_windows

HEADER_BYTES = 256  # of a cache file, at least


def missing_latents_bytes(dataset: DatasetConfig, items: Sequence[Item], dtype: torch.dtype, num_workers: int) -> int:
    """Bytes of the latents of those items that have none yet; reads the headers of their media, and a frame of each clip."""
    cached = {stem for stem, _ in list_caches(dataset).latents}
    with ThreadPoolExecutor(num_workers) as threads:
        return sum(threads.map(partial(_latents_bytes, dtype=dtype), [item for item in items if item.stem not in cached]))


def _latents_bytes(item: Item, dtype: torch.dtype) -> int:
    dataset = item.dataset
    with suppress(Exception):  # decoders fail in ways of their own; whoever reads the file says what is wrong with it
        if dataset.kind == "image":
            size, lengths = probe_image(item.path), [1]
        else:
            info = probe_video(item.path)
            size, lengths = (info.width, info.height), _clip_lengths(dataset, info)
        bucket = choose_bucket(size, dataset.resolution, dataset.enable_bucket, dataset.bucket_no_upscale)
        shapes = (latent_shape_for(bucket, frames) for frames in lengths)
        return sum(torch.Size(shape).numel() * dtype.itemsize + HEADER_BYTES for shape in shapes)
    return 0


def _clip_lengths(dataset: DatasetConfig, info: VideoInfo) -> list[int]:
    """Frames of each clip cut from a video, if it says truly how long it is."""
    frames = frames_at(dataset.target_fps, info.frames or 0, dataset.source_fps or info.fps)
    mode, stride, sample = dataset.frame_extraction, dataset.frame_stride, dataset.frame_sample
    return [length for _, length in cut_windows(frames, dataset.target_frames, mode, stride, sample, dataset.max_frames)]


def text_bytes(rows: int, widths: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of the text encoder outputs of one caption: ``rows`` states and the pooled output, of ``widths``, and the mask."""
    return (rows * widths[0] + widths[1]) * dtype.itemsize + rows * torch.int64.itemsize + HEADER_BYTES
