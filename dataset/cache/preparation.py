"""Which cache files an item calls for; decoding, cutting and resizing for them in threads while the caller encodes.

Threads and not processes: Pillow and PyAV release the interpreter lock while they work, frames need no copying between
processes, and an error always carries the file it is about.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dataset.cache.names import CacheKey, latent_cache_path
from dataset.cache.records import PIXELS, source_record, target_record
from dataset.items import Item
from dataset.media.decoding import frames_at_rate, probe_video, read_clip_windows
from dataset.media.frame_rate import EVERY_FRAME, Resampling
from dataset.media.frames import Window, frames_needed
from dataset.media.memory import SharedMemory
from dataset.media.pictures import probe_image, read_image
from dataset.media.videos import decoding_bytes
from utils.errors import UserError, first_line
from utils.free_memory import return_freed_memory
from utils.processes.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """One latent cache file that an item calls for."""

    item: Item
    window: Window | None  # (first frame, frames) of a clip, None for a picture
    original_size: tuple[int, int]  # (W, H) of the source
    bucket: tuple[int, int]  # (W, H) to train at
    resampling: Resampling | None = None  # the frames of the file that windows count, None for every frame
    done: str = ""  # to the pixels, as ``VideoInfo.done``

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
    def changes(self) -> list[str]:
        """What is done to the frames of the file before they are fitted, for the table."""
        return [str(change) for change in (self.resampling, self.done) if change]

    @property
    def record(self) -> dict[str, str]:
        """What is done to the source, as it stands in the cache file."""
        frame_rate = EVERY_FRAME if self.resampling is None else self.resampling.record
        return {**target_record(self.bucket, self.window, frame_rate), PIXELS: self.done}


@dataclass(frozen=True)
class Source:
    """What is known of an item's file before it is cut; from ``frames`` on, of a clip.

    Attributes:
        size: (W, H) of its upright frames.
        done: to the pixels, as ``VideoInfo.done``.
        frames: that windows are cut from, as far as they were counted.
        resampling: as ``Target.resampling``.
        fps: by the times of the frames, or as stated where they do not count.
        seconds, filmed_fps: as ``VideoInfo`` has them.
    """

    size: tuple[int, int]
    done: str
    frames: int = 1
    resampling: Resampling | None = None
    fps: float | None = None
    seconds: float | None = None
    filmed_fps: float | None = None


def read_source(item: Item) -> Source:
    """Decodes no more than ``plan_targets`` needs. Raises a MediaError where the file is unreadable."""
    dataset = item.dataset
    if dataset.kind == "image":
        return Source(*probe_image(item.path))
    info = probe_video(item.path)
    needed = frames_needed(dataset.target_frames, dataset.frame_extraction, dataset.max_frames)
    counted = frames_at_rate(item.path, info.fps, dataset.target_fps, needed, dataset.source_fps)
    return Source((info.width, info.height), info.done, *counted, info.seconds, info.filmed_fps)


def plan_targets(item: Item, source: Source | None = None) -> tuple[Target, ...]:
    """The cache files an item calls for; none for a clip that is too short. ``source``: where it was read before.

    Raises a MediaError where the file is unreadable.
    """
    dataset, source = item.dataset, source or read_source(item)
    windows = [None] if dataset.kind == "image" else dataset.windows_of(source.frames)
    bucket = dataset.bucket_for(source.size)
    return tuple(Target(item, window, source.size, bucket, source.resampling, source.done) for window in windows)


@dataclass(frozen=True)
class Prepared:
    """Pixels (F, H, W, 3) uint8 RGB at the size of the target's bucket, and the record of the source when they were read.

    ``seen``: what ``see`` made of the file's first frame, before it was fitted.
    """

    target: Target
    pixels: np.ndarray
    source: dict[str, str]
    seen: Any = None


@dataclass(frozen=True)
class Finished:
    """An item is through. ``targets``: all that it calls for, also unwanted ones; none means that the clip is too short."""

    item: Item
    source: Source
    targets: tuple[Target, ...]
    decoded: bool


@dataclass(frozen=True)
class Failure:
    """An item could not be read; ``message`` names the file. Windows that came before stay valid."""

    item: Item
    message: str


@dataclass(frozen=True)
class Later:
    """The memory for large frames is not free. Asked again, the item is read anyway."""


Result = Prepared | Finished | Failure
Wanted = Callable[[Target], bool]
See = Callable[[np.ndarray], Any]
CLIP_MEMORY = SharedMemory(1 << 30)  # for what decodes large frames before it is due


def prepare_item(item: Item, wanted: Wanted = lambda target: True, see: See = lambda frame: None) -> Iterator[Result | Later]:
    """Prepare one item: each wanted target, then ``Finished``; or, wherever it fails, a ``Failure`` and nothing more.

    Before all that there may be ``Later``.
    """
    taken, seen = 0, []
    try:
        needed = decoding_bytes(item.path) if item.dataset.kind == "video" else 0
        if not CLIP_MEMORY.take(needed):
            yield Later()
            CLIP_MEMORY.take(needed, anyway=True)
        taken = needed
        source = read_source(item)
        targets = plan_targets(item, source)
        if taken:
            return_freed_memory()
        missing = {target.window: target for target in targets if wanted(target)}
        if missing:
            record = source_record(item.path, item.dataset.kind)
            bucket, resampling = targets[0].bucket, targets[0].resampling
            if item.dataset.kind == "image":
                cut = [(None, read_image(item.path, bucket, lambda frame: seen.append(see(frame)))[None])]
            else:
                indices = resampling and resampling.indices
                cut = read_clip_windows(item.path, missing, bucket, indices, lambda frame: seen.append(see(frame)))
            for window, pixels in cut:
                yield Prepared(missing[window], pixels, record, *seen)
    except UserError as error:
        yield Failure(item, str(error))
    except Exception as error:
        # Decoders fail on damaged files in ways nobody can list; one such file must not end the others' night.
        logger.debug("%s", item.path, exc_info=True)
        yield Failure(item, f"{item.path}: {type(error).__name__}: {first_line(error)}")
    else:
        yield Finished(item, source, targets, decoded=bool(missing))
    finally:
        if taken:
            return_freed_memory()
            CLIP_MEMORY.give_back(taken)


def prepare(
    items: Iterable[Item],
    num_workers: int,
    wanted: Wanted = lambda target: True,
    watchdog: Watchdog | None = None,
    see: See = lambda frame: None,
) -> Iterator[Result]:
    """``prepare_item`` over many items in ``num_workers`` threads, with the results in the order of the items.

    Memory is bounded: of the item that is due and of ``num_workers + 1`` items after it one result each is prepared ahead, besides
    the windows that are being cut; of clips with large frames only as many are read ahead as ``CLIP_MEMORY`` allows. ``wanted`` and
    ``see`` are called in the threads. ``watchdog`` says which file is waited for.
    """
    watchdog = watchdog or Watchdog()
    started = ((item, prepare_item(item, wanted, see)) for item in items)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prepare") as pool:
        waiting = deque((item, results, pool.submit(next, results, None)) for item, results in islice(started, num_workers + 1))
        try:
            while waiting:
                item, results, ahead = waiting.popleft()
                waiting.extend((item, results, pool.submit(next, results, None)) for item, results in islice(started, 1))
                while (result := _awaited(ahead, item, watchdog)) is not None:
                    ahead = pool.submit(next, results, None)
                    if not isinstance(result, Later):
                        yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _awaited(ahead: Future[Result | Later | None], item: Item, watchdog: Watchdog) -> Result | Later | None:
    with watchdog.during("reading", item.path.__str__):
        return ahead.result()
