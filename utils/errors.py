"""The one exception for mistakes a user can mend, and the entry point that prints it without a traceback."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType

from utils.output import VisibleFormatter, outlast_readers, show, visible, with_names_of_invisible
from utils.processes.launcher import end_with_launcher, let_first_process_speak, says_that_another_ended

SHOWN_CHARACTERS = 80
SHOWN_NAMES = 5
STATUS_FAILED = 1
STATUS_USER_ERROR = 2
STATUS_INTERRUPTED = 130
STATUS_TERMINATED = 143
ANOTHER_ENDED = "another process has ended, and this one with it."


class UserError(Exception):
    """A mistake in input, flags or environment.

    The message is a full sentence: what is wrong, where (file, line, key, item), and what to do about it.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none: a reason to put into a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shown(value: object) -> str:
    """``repr(value)`` for a sentence, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a very long number"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def name_some(names: Iterable[object], count: int = SHOWN_NAMES) -> str:
    """``"a, b, c and 7 more"``: at most ``count`` names, for a sentence."""
    listed = [visible(str(name)) for name in names]
    rest = len(listed) - count
    return ", ".join(listed[:count]) + (f" and {rest} more" if rest > 0 else "")


def show_user_error(error: UserError) -> None:
    """One line on stderr."""
    show(f"error: {with_names_of_invisible(str(error))}", error=True)


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave the process with its status.

    ``main`` returns None or 0 for success, or an exit status. A ``UserError`` is printed as one line on stderr and
    ends with status 2; Ctrl-C ends with status 130, SIGTERM and SIGHUP with 143 and 129; anything else keeps its traceback. A
    reader of the output that ends does not end the script.
    """
    outlast_readers()  # before anything keeps a stream
    _clean_up_on_signals()
    end_with_launcher()
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    # transformers imports peft, and that bitsandbytes, which warns of a package for products in 4 bits. Nothing here uses them.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        status = main()
    except UserError as error:
        let_first_process_speak()
        show_user_error(error)
        sys.exit(STATUS_USER_ERROR)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "") in ("utf8", "utf"):  # a fault of ours
            raise
        text = ascii(error.object[error.start : error.end])
        print(
            f"error: the system's encoding, {error.encoding}, has no {text}: set LC_ALL=C.UTF-8 or PYTHONUTF8=1.", file=sys.stderr
        )
        sys.exit(STATUS_USER_ERROR)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more does not wait for threads that are still at work
        print("interrupted", file=sys.stderr)
        sys.exit(STATUS_INTERRUPTED)
    except RuntimeError as error:
        if not says_that_another_ended(error):
            raise
        let_first_process_speak()
        show(f"error: {ANOTHER_ENDED}", error=True)
        sys.exit(STATUS_FAILED)
    sys.exit(status or 0)


def _clean_up_on_signals() -> None:
    """Have what ends a process end it as an exception does: temporary files and locks go."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows lacks the second
        number, here = getattr(signal, name, None), threading.current_thread() is threading.main_thread()
        if number is not None and here and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)


def _exit(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # once more ends at once
    raise SystemExit(128 + number)
