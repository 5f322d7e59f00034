"""Imported first by every script: from then on Ctrl-C ends in a word, not in a traceback, also while libraries are imported."""

from __future__ import annotations

import sys
from types import TracebackType

from utils.errors import STATUS_INTERRUPTED


def _say_interrupted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr)
    raise SystemExit(STATUS_INTERRUPTED)


sys.excepthook = _say_interrupted
