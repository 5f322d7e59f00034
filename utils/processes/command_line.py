"""Command lines: that of this process, which other people of the machine can read, and that of its launcher."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

LAUNCHERS = ("accelerate", "torchrun")


def hide_on_command_line(secret: str) -> None:
    """Overwrite a word, or what stands behind ``=``, by stars: in ``sys.argv``, and on Linux where ``ps`` reads it (proc(5))."""
    sys.argv[:] = ["***" if word == secret else word.replace(f"={secret}", "=***") for word in sys.argv]
    if sys.platform != "linux":
        return
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        words = (ctypes.c_char * (end - start)).from_address(start)
        for found in re.finditer(rb"(?<=[\0=])" + re.escape(os.fsencode(secret)) + rb"(?=\0)", words.raw):
            words[found.start() : found.end()] = b"*" * len(found[0])


def launcher_words() -> list[str]:
    """What stands before the script on the command line of this process's launcher; nothing where that is unknown."""
    import psutil  # comes with accelerate

    try:
        words = psutil.Process(os.getppid()).cmdline()
        words = words[: words.index(sys.argv[0])]
    except (psutil.Error, OSError, ValueError):  # it has ended, or was started in another way
        return []
    for place, word in enumerate(words[:2]):  # behind the Python of a console script
        if (name := re.split(r"[/\\]", word)[-1].removesuffix(".exe")) in LAUNCHERS:
            return [name, *words[place + 1 :]]
    return words
