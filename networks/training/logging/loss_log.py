"""The loss of a training, step by step, as a CSV file (--loss_log)."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from utils.errors import UserError
from utils.files import atomic_path, remove_leftovers_of, require_possible_file, require_writable_folder

logger = logging.getLogger(__name__)

COLUMNS = ("step", "epoch", "loss", "average_loss", "learning_rate", "validation_loss")
WHOLE_LINE = re.compile(r"([0-9]{1,18})(,[^,]*){5}")


def check_loss_log(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before a model is loaded. Leaves nothing behind."""
    require_possible_file(path, "--loss_log")
    require_writable_folder(Path(path).parent, "the folder of --loss_log,")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise UserError(f"--loss_log {path} exists and cannot be written to; give another file.")


class LossLog:
    """A CSV file with a line for each optimizer step, or nothing where ``path`` is None.

    Every line is handed to the system at once, so that a training that is killed leaves all the steps it made. A file of
    that name is replaced, but where a training continues after ``steps_made`` the lines of these steps stay.
    """

    def __init__(self, path: str | os.PathLike[str] | None, steps_made: int = 0) -> None:
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            goes_on = steps_made > 0 and os.path.isfile(path)  # and no device
            if goes_on:
                _forget_after(Path(path), steps_made)
            self._file = open(path, "a" if goes_on else "w", encoding="utf-8", newline="\n", buffering=1)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(f"cannot write --loss_log {path}: {error.strerror or error}. Give another file.") from error
        if not goes_on:
            self._write_line(",".join(COLUMNS))

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(
        self,
        step: int,
        epoch: int,
        loss: float,
        average: float,
        learning_rate: float | None,
        validation_loss: float | None = None,
    ) -> None:
        """One step. A field is empty where its value is None: a rate that the optimizer has not, a loss that was not measured.

        Losses have nine digits: as many as two float32 numbers need to differ.
        """
        rate = "" if learning_rate is None else f"{float(learning_rate):.6g}"
        held_out = "" if validation_loss is None else f"{validation_loss:.9g}"
        self._write_line(f"{step},{epoch},{loss:.9g},{average:.9g},{rate},{held_out}")

    def _write_line(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
        except OSError as error:  # hours of training are worth more than their log
            logger.warning("--loss_log %s: %s; training continues without it.", self._file.name, error.strerror or error)
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what could not be written above is still in its buffer
                file.close()


def _forget_after(path: Path, step: int) -> None:
    """Leave the heading and the whole lines up to ``step``: what a killed training logged later is made, and logged, again."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if (found := WHOLE_LINE.fullmatch(line)) and int(found[1]) <= step]
    remove_leftovers_of(path)
    with atomic_path(path, keep_name=True) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in (",".join(COLUMNS), *kept)), encoding="utf-8", newline="\n")
