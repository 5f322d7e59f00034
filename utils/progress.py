"""Progress bars for terminals and for log files."""

from __future__ import annotations

import io
import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LOG_LINES = 60.0


class ProgressBar(tqdm):
    """tqdm's bar; where stderr is no terminal it writes a line of its own at the start, at the end, and once a minute between.

    ``set_postfix`` does not redraw: the next update that is due shows it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._to_terminal = sys.stderr.isatty()
        if not self._to_terminal:
            options |= {"mininterval": SECONDS_BETWEEN_LOG_LINES, "maxinterval": SECONDS_BETWEEN_LOG_LINES, "ascii": True}
        super().__init__(*args, **options)

    def set_postfix(self, ordered_dict: dict[str, Any] | None = None, refresh: bool = False, **values: Any) -> None:
        super().set_postfix(ordered_dict, refresh, **values)

    @staticmethod
    def status_printer(file: TextIO) -> Any:
        if sys.stderr.isatty():
            return tqdm.status_printer(file)

        def print_line(line: str) -> None:
            file.write(f"{line}\n")
            file.flush()

        return print_line

    def moveto(self, n: int) -> None:
        if self._to_terminal:
            super().moveto(n)

    def close(self) -> None:
        if not (self.disable or self._to_terminal):
            self.refresh()
            self.sp, self.fp = (lambda line: None), io.StringIO()  # what ends the line of a terminal
        super().close()
