"""What is asked of a running training from outside: to save, to stop, or both, by signals or by files in its output folder."""

from __future__ import annotations

import enum
import logging
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

SAVE_FILE, SAVE_AND_STOP_FILE = "save", "save_and_stop"


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


_REQUEST_OF_SIGNAL = {signal.SIGINT: Request.INTERRUPT, signal.SIGTERM: Request.TERMINATE}


class TrainingRequests:
    """While it is open, SIGINT and SIGTERM wait for ``poll``; a second signal ends the process at once.

    Args:
        folder: where a file called ``save`` or ``save_and_stop`` is a request, too; it is removed when it is read.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self._folder, self._accelerator = folder, accelerator
        self._received = Request.NOTHING
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> TrainingRequests:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            self._before = {number: signal.signal(number, self._on_signal) for number in _REQUEST_OF_SIGNAL}
        return self

    def __exit__(self, *_: object) -> None:
        if self._accelerator.is_main_process:
            for name in (SAVE_FILE, SAVE_AND_STOP_FILE):  # one that came after the last step must not stop the next training
                with suppress(OSError):
                    (self._folder / name).unlink()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._received.is_signal:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what ends now must not be interrupted again while it cleans up
            if number == signal.SIGTERM:
                raise SystemExit(128 + number)
            raise KeyboardInterrupt
        self._received = _REQUEST_OF_SIGNAL[signal.Signals(number)]
        if self._accelerator.is_main_process:
            logger.warning("%s: saving after this step and stopping; once more stops at once.", signal.Signals(number).name)

    def poll(self) -> Request:
        """What to do now; the same answer on all processes, which must call this together."""
        request = max(self._received, self._file_request())
        if self._accelerator.num_processes > 1:
            mine = torch.tensor([int(request)], device=self._accelerator.device)
            request = Request(int(self._accelerator.gather(mine).max()))
        return request

    @property
    def signalled(self) -> bool:
        """Whether this process was sent a signal, which the next ``poll`` returns."""
        return self._received.is_signal

    def _file_request(self) -> Request:
        if not self._accelerator.is_main_process:
            return Request.NOTHING
        for name, request in ((SAVE_AND_STOP_FILE, Request.SAVE_AND_STOP), (SAVE_FILE, Request.SAVE)):
            path = self._folder / name
            if path.is_file():
                with suppress(OSError):  # one that cannot be removed is found again after the next step
                    path.unlink()
                logger.info("found %s: saving%s", path, " and stopping" if request.stops else "")
                return request
        return Request.NOTHING
