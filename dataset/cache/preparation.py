"""Decode, cut and resize items in threads while the caller encodes what came before.

Threads and not processes: Pillow and PyAV release the interpreter lock while they work, frames need no copying between
processes, and an error always carries the file it is about.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from queue import Full, Queue
from threading import Event

import numpy as np

from dataset.cache.plan import Target, plan_targets
from dataset.cache.records import source_record
from dataset.items import Item
from dataset.media.decoding import read_clip_windows, read_image
from dataset.media.frames import Window
from dataset.media.resizing import fit_to_bucket
from utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Pixels (F, H, W, 3) uint8 RGB at the size of the target's bucket, and the record of the source when they were read."""

    target: Target
    pixels: np.ndarray
    source: dict[str, str]


@dataclass(frozen=True)
class Finished:
    """An item is through. ``targets``: all that it calls for, also unwanted ones; none means that the clip is too short."""

    item: Item
    targets: tuple[Target, ...]
    decoded: bool


@dataclass(frozen=True)
class Failure:
    """An item could not be read; ``message`` names the file. Windows that came before stay valid."""

    item: Item
    message: str


Result = Prepared | Finished | Failure


def prepare_item(item: Item, wanted: Callable[[Target], bool] = lambda target: True) -> Iterator[Result]:
    """Prepare one item: each wanted target, then ``Finished``; or, wherever it fails, a ``Failure`` and nothing more."""
    try:
        targets = plan_targets(item)
        missing = {target.window: target for target in targets if wanted(target)}
        if missing:
            source = source_record(item.path, item.dataset.kind)
            for window, pixels in _read_windows(item, missing, targets[0]):
                yield Prepared(missing[window], pixels, source)
    except UserError as error:
        yield Failure(item, str(error))
    except Exception as error:
        # Decoders fail on damaged files in ways nobody can list; one such file must not end the others' night.
        logger.debug("%s", item.path, exc_info=True)
        yield Failure(item, f"{item.path}: {type(error).__name__}: {error}")
    else:
        yield Finished(item, targets, decoded=bool(missing))


def _read_windows(
    item: Item, windows: Collection[Window | None], any_of_them: Target
) -> Iterator[tuple[Window | None, np.ndarray]]:
    bucket, resampling = any_of_them.bucket, any_of_them.resampling
    if item.dataset.kind == "image":
        yield None, fit_to_bucket(read_image(item.path), bucket)[None]
    else:
        yield from read_clip_windows(item.path, windows, bucket, resampling and resampling.indices)


def prepare(items: Iterable[Item], num_workers: int, wanted: Callable[[Target], bool] = lambda target: True) -> Iterator[Result]:
    """``prepare_item`` over many items in ``num_workers`` threads, with the results in the order of the items.

    Memory is bounded: at most ``num_workers`` items are being decoded, and at most two more wait; each holds one result
    back, besides the windows it is cutting. ``wanted`` is called in the threads.
    """
    stop = Event()
    remaining = iter(items)
    waiting: deque[Queue[Result | None]] = deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prepare") as pool:

        def start(count: int) -> None:
            for item in islice(remaining, count):
                queue: Queue[Result | None] = Queue(maxsize=1)
                waiting.append(queue)
                pool.submit(_fill, queue, item, wanted, stop)

        try:
            start(num_workers + 2)
            while waiting:
                queue = waiting.popleft()
                while (result := queue.get()) is not None:
                    yield result
                start(1)
        finally:
            stop.set()


def _fill(queue: Queue[Result | None], item: Item, wanted: Callable[[Target], bool], stop: Event) -> None:
    """Put an item's results into its queue, then None; leave when ``stop`` is set, since nobody reads any more."""
    results = prepare_item(item, wanted)
    while not stop.is_set():
        result = next(results, None)
        while not stop.is_set():
            try:
                queue.put(result, timeout=0.1)
                break
            except Full:
                continue
        if result is None:
            return
