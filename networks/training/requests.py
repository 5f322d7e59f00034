"""What is asked of a running training from outside: to save, to stop, or both, by signals or by files in its output folder."""

from __future__ import annotations

import enum
import logging
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from utils.errors import STATUS_INTERRUPTED, STATUS_TERMINATED

logger = logging.getLogger(__name__)

TOGETHER = 2.0  # seconds in which the signal of a terminal or a cluster and that of a launcher arrive


class Request(enum.IntEnum):
    """What to do after the step under way; of several at once the largest counts."""

    NOTHING = 0
    SAVE = 1
    SAVE_AND_STOP = 2
    INTERRUPT = 3
    TERMINATE = 4

    @property
    def stops(self) -> bool:
        return self >= Request.SAVE_AND_STOP

    @property
    def is_signal(self) -> bool:
        return self >= Request.INTERRUPT

    @property
    def status(self) -> int:
        """What the process ends with."""
        return {Request.INTERRUPT: STATUS_INTERRUPTED, Request.TERMINATE: STATUS_TERMINATED}.get(self, 0)


_OF_SIGNAL = {signal.SIGINT: Request.INTERRUPT, signal.SIGTERM: Request.TERMINATE}
if hasattr(signal, "SIGHUP"):  # the terminal was closed; not on Windows
    _OF_SIGNAL[signal.SIGHUP] = Request.TERMINATE
_OF_FILE = {"save_and_stop": Request.SAVE_AND_STOP, "save": Request.SAVE}


class TrainingRequests:
    """While it is open, SIGINT, SIGTERM and SIGHUP wait for ``poll``; a second signal ends the process at once.

    What is sent to a launcher may reach each of its processes twice, directly and from it: that is one signal.

    A file called ``save`` or ``save_and_stop`` in ``folder`` is a request, too; it is removed when it is read.

    Attributes:
        received: by signals.
        answered: whether a signal was returned by ``poll``.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self._folder, self._accelerator = folder, accelerator
        self.received = Request.NOTHING
        self.answered = False
        self._received_at = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> TrainingRequests:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            for number, request in _OF_SIGNAL.items():
                # nohup ignores the end of the terminal, and so does a training below it
                if request is not Request.TERMINATE or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._read_files()  # one that came after the last step must not stop the next training
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signalled:
            if self._accelerator.num_processes > 1 and time.monotonic() - self._received_at < TOGETHER:
                return
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what ends now must not be interrupted again while it cleans up
            if number != signal.SIGINT:
                raise SystemExit(128 + number)
            raise KeyboardInterrupt
        self.received, self._received_at = _OF_SIGNAL[signal.Signals(number)], time.monotonic()
        if self._accelerator.is_main_process:
            logger.warning("%s: saving after this step and stopping; once more stops at once.", signal.Signals(number).name)

    @property
    def signalled(self) -> bool:
        """Whether this process was sent a signal, which the next ``poll`` returns."""
        return self.received.is_signal

    def poll(self) -> Request:
        """What to do now; the same answer on all processes, which must call this together."""
        request = max(self.received, self._read_files())
        if request in _OF_FILE.values():
            logger.info("a file in %s asks for saving%s", self._folder, " and stopping" if request.stops else "")
        if self._accelerator.num_processes > 1:
            mine = torch.tensor([int(request)], device=self._accelerator.device)
            request = Request(int(self._accelerator.gather(mine).max()))
        self.answered = request.is_signal
        return request

    def _read_files(self) -> Request:
        """The largest request for which there is a file; the files are removed. One that cannot be is found again later."""
        if not self._accelerator.is_main_process:
            return Request.NOTHING
        found = [name for name in _OF_FILE if (self._folder / name).is_file()]
        for name in found:
            with suppress(OSError):
                (self._folder / name).unlink()
        return max((_OF_FILE[name] for name in found), default=Request.NOTHING)
