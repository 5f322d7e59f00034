"""The processes that a launcher started together: which of them this one is, and how they talk to each other."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from utils.errors import ANOTHER_ENDED, STATUS_FAILED, STATUS_USER_ERROR, UserError, show_user_error, shown
from utils.processes.launcher import says_that_another_ended

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what launchers set
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
LONGEST_WAIT = timedelta(days=30)  # for processes that still have work; one that has ended is noticed at once
SAYING = timedelta(seconds=10)  # what is said by another process is out by then


@dataclass(frozen=True)
class Ranks:
    """``count`` processes of which this one is number ``index``, from 0; on its machine it is number ``local_index``.

    All must call each method together.

    Attributes:
        group: of torch.distributed; the default group if None.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    group: Any = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order. A value is anything that pickles.

        Raises:
            SystemExit: another process has ended, which it explains itself.
        """
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(values, value, self.group)
        except RuntimeError as error:
            logger.debug("gathering", exc_info=True)
            logger.error(ANOTHER_ENDED)
            raise SystemExit(STATUS_FAILED) from error
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the main process, in all of them. A UserError there is raised in all of them."""
        if self.count == 1:
            return make()
        made, refusal = None, None
        if self.is_main:
            try:
                made = make()
            except UserError as error:
                refusal = str(error)
        theirs, refusal = self.gather((made, refusal))[0]
        if refusal is not None:
            raise UserError(refusal)
        return made if self.is_main else theirs

    def map(self, function: Callable[[Sequence[T]], Sequence[R]], values: Sequence[T]) -> list[R]:
        """``function`` of a part of ``values`` in each process; all get the results of all, in the order of ``values``."""
        results: list[Any] = [None] * len(values)
        for index, part in enumerate(self.gather(function(values[self.index :: self.count]))):
            results[index :: self.count] = part
        return results


ALONE = Ranks()


def launched_with_others() -> bool:
    """Whether this process was started together with others: accelerate launch and torchrun say so in the environment."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def check_launcher() -> None:
    """Raise a UserError where the environment speaks of several processes, but not as launchers do."""
    if not launched_with_others():
        return
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    missing = [name for name, value in values.items() if not value]
    numbers = () if missing else NUMBERS
    wrong = [f"{name} is {shown(values[name])}" for name in numbers if not re.fullmatch("[0-9]{1,9}", values[name])]
    if not (missing or wrong) and int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        wrong = [f"RANK {values['RANK']} is not below WORLD_SIZE {values['WORLD_SIZE']}"]
    if missing or wrong:
        what = f"WORLD_SIZE is {shown(values['WORLD_SIZE'])}, but {', '.join(missing)} are missing" if missing else "; ".join(wrong)
        raise UserError(
            f"the environment variables of several processes are not whole: {what}. "
            "Start several processes with accelerate launch or torchrun; for one process unset WORLD_SIZE."
        )


def join_ranks(device: str | None = None) -> Ranks:
    """Join the process group of the launcher, if there is one.

    Args:
        device: "cpu" where the processes compute there though there are GPUs.

    Raises:
        UserError: the environment speaks of several processes but does not say how to reach them.
    """
    if not launched_with_others():
        return ALONE
    check_launcher()
    import torch
    from torch import distributed

    gpus = device != "cpu" and torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return Ranks(distributed.get_rank(), distributed.get_world_size(), int(os.environ["LOCAL_RANK"]), group)


def leave_ranks(ranks: Ranks) -> None:
    """Before Python ends: the threads of a process group would abort it."""
    if ranks.count > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()


@contextmanager
def joined_ranks(device: str | None = None) -> Iterator[Ranks]:
    """``join_ranks`` for the work of a script, and ``leave_ranks`` at its end.

    The main process alone informs; a warning or error of several processes is said once. Errors are said before the others notice
    that this process has ended: the launcher then ends all.
    """
    ranks = join_ranks(device)
    if ranks.count == 1:
        yield ranks
        return
    sayings = _Sayings(ranks)
    handlers = logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(sayings)
    try:
        yield ranks
    except UserError as error:
        sayings.show_error(error)
        raise SystemExit(STATUS_USER_ERROR) from error
    except Exception as error:
        if says_that_another_ended(error):
            logger.error(ANOTHER_ENDED)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(STATUS_FAILED) from error
    finally:
        for handler in handlers:
            handler.removeFilter(sayings)
        leave_ranks(ranks)


class _Sayings(logging.Filter):
    """What the processes have said, in the store through which they found each other."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        from torch.distributed import PrefixStore, TCPStore

        self._speaks = ranks.is_main
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=SAYING)
        self._store = PrefixStore(f"said {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._is_first(record.getMessage()) if record.levelno >= logging.WARNING else self._speaks

    def show_error(self, error: UserError) -> None:
        """Show it, or wait until the process that does has done so."""
        with suppress(RuntimeError):
            if not self._is_first(str(error)):
                self._store.wait([_key(f"{error} is out")], SAYING)
                return
        show_user_error(error)
        with suppress(RuntimeError):
            self._store.set(_key(f"{error} is out"), "")

    def _is_first(self, text: str) -> bool:
        try:
            return self._store.add(_key(text), 1) == 1
        except RuntimeError:  # the process that held the store has ended
            return True


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


def split_by_cost(costs: Sequence[float], parts: int) -> list[list[int]]:
    """The positions of ``costs`` in ``parts`` lists whose costs add up to about the same, each in ascending order.

    The largest first, each to the list that has the least so far: at most 4/3 of the best split (Graham, 1969).
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        least = sums.index(min(sums))
        lists[least].append(position)
        sums[least] += costs[position]
    return [sorted(positions) for positions in lists]
