"""Reading an epoch's batches with worker processes, so that whatever goes wrong in one names the files it was about."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.queues import Queue

import torch
from torch.utils.data import DataLoader, Sampler

from dataset.batches.batches import Batch, StepBatches, read_batch
from dataset.batches.cached_items import CachedGroup, CachedItem
from dataset.batches.order import BatchOrder, PlannedStep
from utils.errors import UserError, first_line, name_some
from utils.output import show

logger = logging.getLogger(__name__)

FLAG = "--max_data_loader_n_workers"
HANDLES_OF_A_WORKER = 12  # open files in this process: pipes, and the tensors of the batches that were read ahead
SPARE_HANDLES = 40  # for everything else that a training opens


def _batch_or_error(items: Sequence[CachedItem]) -> Batch | UserError:
    """``read_batch``, with its error as a value: raised in a worker it would arrive wrapped in a traceback."""
    try:
        return read_batch(items)
    except UserError as error:
        return error
    except Exception as error:  # memory, open files, a library
        names = name_some(item.latents_path.name for item in items)
        return UserError(f"cannot read {names} ({type(error).__name__}: {first_line(error).rstrip('.')}). {_remedy()}")


def _remedy() -> str:
    return f"Look at these files, or give a lower {FLAG}."


def _leave_it_to_the_training(_worker: int) -> None:
    """Signals of a terminal or a launcher reach a whole group of processes; only the training answers, and stops its workers.

    They say nothing of a training that is gone, and of anything else one line. One that cannot hand on a batch, as shared memory is
    full say, ends: the training would wait for that batch for ever.
    """
    sys.excepthook = _say_in_a_line
    Queue._on_queue_feeder_error = staticmethod(_end_without_handing_on)
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _say_in_a_line(kind: type[BaseException], error: BaseException, _: object) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        show(f"a process that reads the caches: {kind.__name__}: {first_line(error)}", error=True)


def _end_without_handing_on(error: Exception, _batch: object) -> None:
    show(f"a process that reads the caches cannot hand on a batch: {type(error).__name__}: {first_line(error)}", error=True)
    os._exit(1)


def possible_workers(wanted: int) -> int:
    """At most one for each CPU core, and no more than the system has open files for; a warning says so of the latter."""
    wanted = min(wanted, os.cpu_count() or 1)
    if sys.platform == "win32":
        return wanted
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    possible = max(0, min(wanted, (limit - SPARE_HANDLES) // HANDLES_OF_A_WORKER))
    if possible < wanted:
        message = "%s: %d, as this process may have only %d open files (ulimit -n)"
        logger.warning(message, FLAG, possible, limit)
    return possible


class HeldOut(Sequence[Batch]):
    """Items that training does not see, as batches of one, each read when it is taken."""

    def __init__(self, items: Sequence[CachedItem]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Batch:
        return read_batch([self._items[index]])


class _OwnBatches(Sampler[list[int]]):
    """What the loader reads: the batches of this process, step after step."""

    def __init__(self) -> None:
        self.steps: Sequence[PlannedStep] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return (step.batches[place] for step in self.steps for place in step.own)

    def __len__(self) -> int:
        return sum(len(step.own) for step in self.steps)


class EpochReader:
    """The steps of one epoch after the other, in an order of the same groups; of each this process reads its own batches.

    ``workers``: processes that read ahead, if ``possible_workers``; 0 reads in this process. ``persistent``: start them once, not
    for each epoch.
    """

    def __init__(self, groups: Sequence[CachedGroup], order: BatchOrder, workers: int, persistent: bool) -> None:
        self.order = order
        self._items = [item for group in groups for item in group.items]
        self._own = _OwnBatches()
        self._due = 0
        workers = possible_workers(workers)
        # A generator of its own: torch takes a number from it at each epoch, which must not change the global one.
        self._loader = DataLoader(
            self._items,
            batch_sampler=self._own,
            num_workers=workers,
            collate_fn=_batch_or_error,
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_leave_it_to_the_training,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Batches of an epoch, of all processes."""
        return len(self.order)

    @property
    def batches_per_step(self) -> int:
        """Of all processes; the last step of an epoch may have fewer."""
        return self.order.batches_per_step

    def fingerprint(self) -> str:
        """Of the items, their repeats and batch sizes, on which the order of the batches depends, and of what their targets are."""
        # Nothing is added for ordinary items, so that the fingerprint stays that of older states.
        kinds = {False: (), True: ("prior_preservation",)}
        items = [(item.latents_path.name, item.shape, *kinds[item.prior_preservation]) for item in self._items]
        return hashlib.sha256(repr((self.order.pools, items)).encode("utf-8", "surrogateescape")).hexdigest()

    def epoch(self, number: int, start: int = 0, per_step: int | None = None) -> Iterator[StepBatches]:
        """The steps of epoch ``number``, counted from 0, from its batch ``start`` on.

        Args:
            per_step: the order is that of steps of so many batches; by default of those that there are.

        Raises:
            UserError: as in ``read_batch``; or processes cannot be started, or one died, and which files it was about to read.
        """
        self._own.steps = list(self.order.steps(number, start, per_step))
        self._due = 0
        batches = self._batches()
        for step in self._own.steps:
            yield StepBatches(step.shapes, {place: next(batches) for place in step.own}, step.most)
        next(batches, None)  # so that the loader knows that it is done

    def _batches(self) -> Iterator[Batch]:
        batches: Iterator[Batch | UserError] | None = None
        while True:
            try:
                batches = batches or self._begin()
                batch = next(batches, None)
            except Exception as error:  # of the connection to a process that died, too
                raise self._explained(error, starting=batches is None) from error
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            self._due += 1
            yield batch

    def close(self) -> None:
        """End the processes. It cannot be read from any more."""
        del self._loader

    def _explained(self, error: Exception, starting: bool) -> UserError:
        if starting and isinstance(error, OSError):
            reason = error.strerror or error
            return UserError(f"cannot start the processes that read the caches ({reason}); give a lower {FLAG}, or 0.")
        died = "died, killed or out of memory," if "DataLoader worker" in str(error) else f"fails ({first_line(error)})"
        return UserError(
            f"a process that reads the caches {died} while it was about to read {self.due(3)}. Use {FLAG} 0, or look at "
            "these files."
        )

    def _begin(self) -> Iterator[Batch | UserError]:
        """The loader's own iterator.

        torch's handler of SIGCHLD is taken away again: it would raise for a process that died in the middle of anything, of an
        optimizer's step say. The iterator itself looks after them when it waits.
        """
        in_main = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if in_main else None
        batches = iter(self._loader)
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
        return batches

    def due(self, count: int = 1) -> str:
        """The items of the next batches, for a sentence."""
        ahead = itertools.islice(self._own, self._due, self._due + count)
        return name_some(self._items[index].latents_path.name for batch in ahead for index in batch)
