"""The launcher of several processes, accelerate launch or torchrun: what a process knows of it and owes it."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from contextlib import suppress

NAMES = ("accelerate", "torchrun")
SPEAKING_SECONDS = 10.0  # in which the first process says what is wrong, and the launcher ends the others
PR_SET_PDEATHSIG = 1  # prctl(2)


def launcher_words() -> list[str]:
    """What stands before the script on the command line of this process's launcher; nothing where that is unknown."""
    import psutil  # comes with accelerate

    try:
        words = psutil.Process(os.getppid()).cmdline()
        words = words[: words.index(sys.argv[0])]
    except (psutil.Error, OSError, ValueError):  # it has ended, or was started in another way
        return []
    for place, word in enumerate(words[:2]):  # behind the Python of a console script
        if (name := re.split(r"[/\\]", word)[-1].removesuffix(".exe")) in NAMES:
            return [name, *words[place + 1 :]]
    return words


def words_before_script(processes: int) -> list[str]:
    """What a command begins with that starts so many processes like this one."""
    return ["python"] if processes == 1 else launcher_words() or ["accelerate", "launch"]


def end_with_launcher() -> None:
    """Have Linux send SIGTERM to this process once its launcher is gone, killed say: nobody else would end it."""
    # The launcher of torch starts processes from its main thread: the signal comes when the thread ends that did.
    if sys.platform == "linux" and os.environ.get("TORCHELASTIC_RUN_ID"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def let_first_process_speak() -> None:
    """Return at once in the first process of a machine: the others usually found the same mistake, and are ended meanwhile."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SPEAKING_SECONDS)


def says_that_another_ended(error: BaseException) -> bool:
    """Whether an error of torch.distributed means that another process is gone, which explains itself."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    lost = "gloo" in str(error) and re.search(r"connection (reset|closed)|broken pipe|read error|write error", str(error).lower())
    return "RuntimeError" in kinds and ("DistBackendError" in kinds or bool(lost))
