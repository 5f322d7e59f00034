"""Reading an epoch's batches with worker processes, so that whatever goes wrong in one names the files it was about."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from dataset.batches.batches import Batch, ShapeBatchSampler, read_batch
from dataset.batches.cached_items import CachedGroup, CachedItem
from utils.errors import UserError, name_some


def _batch_or_error(items: Sequence[CachedItem]) -> Batch | UserError:
    """``read_batch``, with its error as a value: raised in a worker it would arrive wrapped in a traceback."""
    try:
        return read_batch(items)
    except UserError as error:
        return error


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; only the training itself answers it, and stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class HeldOut:
    """Items that training does not see, as batches of one, in the same order every time they are gone through."""

    def __init__(self, items: Sequence[CachedItem]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Batch]:
        return (read_batch([item]) for item in self._items)


class EpochReader:
    """The batches of one epoch after the other, from a sampler over the same groups.

    ``workers``: processes that read ahead, at most one for each CPU core; 0 reads in this process. ``persistent``: start them
    once, not for each epoch.
    """

    def __init__(self, groups: Sequence[CachedGroup], sampler: ShapeBatchSampler, workers: int, persistent: bool) -> None:
        self.sampler = sampler
        self._items = [item for group in groups for item in group.items]
        self._due = 0
        workers = min(workers, os.cpu_count() or 1)
        # A generator of its own: torch takes a number from it at each epoch, which must not change the global one.
        self._loader = DataLoader(
            self._items,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_batch_or_error,
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank."""
        return len(self.sampler)

    def fingerprint(self) -> str:
        """Of the items, their repeats and batch sizes, on which the order of the batches depends, and of what their targets are."""
        # Nothing is added for ordinary items, so that the fingerprint stays that of older states.
        kinds = {False: (), True: ("prior_preservation",)}
        items = [(item.latents_path.name, item.shape, *kinds[item.prior_preservation]) for item in self._items]
        return hashlib.sha256(repr((self.sampler.pools, items)).encode("utf-8", "surrogateescape")).hexdigest()

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number``, counted from 0, from its batch ``start`` on. Errors as in ``read_batch``."""
        self.sampler.set_epoch(number, start)
        self._due = 0
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
            self._due += 1

    def explain(self, error: RuntimeError) -> RuntimeError | UserError:
        """``error`` itself, or a UserError that names the files if a worker process died.

        torch may raise it at any moment, also outside the loader.
        """
        if "DataLoader worker" not in str(error):
            return error
        ahead = itertools.islice(self.sampler, self._due, self._due + 3)
        names = name_some(self._items[index].latents_path.name for batch in ahead for index in batch)
        return UserError(
            f"a process that reads the caches died, killed or out of memory, while it was about to read {names}. "
            "Training stopped. Use --max_data_loader_n_workers 0, or look at these files."
        )
