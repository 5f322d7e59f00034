"""Command lines: that of this process, which other people of the machine can read, and those that people copy."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def command_line(words: Sequence[str]) -> str:
    """The words as the shells of this system read them: of POSIX, or of Windows."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


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
