"""Locks: files that say which run writes here. They need nothing of a file system that network mounts lack."""

from __future__ import annotations

import json
import logging
import os
import platform
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import UNSUPPORTED, explain_failed_writing

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30.0  # a run rewrites its lock so often, and by that says that it lives
LOST_SECONDS = 300.0  # of silence, after which a run on another machine is taken to have ended
SETTLE_SECONDS = 0.3  # in which another run that took the same lock at the same moment has written it
MAX_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        numbers: the space of process numbers: containers have their own.
        started: what tells it from another process of its number; None where that is not known.
    """

    host: str
    numbers: str
    pid: int
    started: str | None

    @classmethod
    def this_process(cls) -> Holder:
        numbers = ""
        with suppress(OSError, AttributeError):  # only Linux has them
            numbers = os.readlink("/proc/self/ns/pid")
        return cls(platform.node(), numbers, os.getpid(), start_of(os.getpid()))

    @property
    def is_here(self) -> bool:
        """Whether it can be looked up."""
        here = Holder.this_process()
        return (self.host, self.numbers) == (here.host, here.numbers)


def start_of(pid: int) -> str | None:
    """When the running process ``pid`` of this machine began, as a text to compare; None where there is no such process."""
    if sys.platform == "linux":  # by a clock that nobody can set
        with suppress(OSError):
            state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return None if state in "ZX" else f"{boot} {fields[18]}"
        return None
    import psutil  # comes with accelerate

    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    return None


@contextmanager
def sole_run(path: Path, doing: str, remedy: str) -> Iterator[None]:
    """Hold the lock file ``path``, which no other run holds meanwhile. Folders are made for it, and removed if they stay empty.

    Args:
        doing: what both runs do, for the message: ``trains lora``.
        remedy: for the message: ``give another --output_name``.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    holder = Holder.this_process()
    text, made = json.dumps(asdict(holder)), [folder for folder in path.parents if not folder.exists()]
    ended = threading.Event()
    try:
        with explain_failed_writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _take(path, text, doing, remedy)
        threading.Thread(target=_show_life, args=(path, text, ended), name="lock", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            with suppress(OSError):
                if path.read_text(encoding="utf-8") == text:  # not the lock of a run that took this one for ended
                    path.unlink()
    finally:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def is_held(path: Path) -> bool:
    """Whether a run that lives holds the lock file, as far as can be known."""
    try:
        return _content(path) is not None and _life(path)[0]
    except (OSError, UserError):
        return False


def _take(path: Path, text: str, doing: str, remedy: str) -> None:
    settled = True  # whether nobody else can have taken it at the same moment
    while True:
        alone = _create(path, text)
        if alone is not None:
            if settled and alone:
                return
            time.sleep(SETTLE_SECONDS)
            if _content(path) == text:
                return
        found = _content(path)
        lives, who, hint = _life(path)
        if not who:
            continue  # it has gone meanwhile
        if lives:
            raise UserError(f"another run {doing} ({who}). Wait for its end, or {remedy}.{hint}")
        logger.info("%s is the lock of a run that has ended (%s); it is replaced.", path, who)
        if _content(path) == found:  # and not that of a run that was quicker
            path.unlink(missing_ok=True)
        settled = False


def _life(path: Path) -> tuple[bool, str, str]:
    """Whether the run that holds a lock lives, which process it is, and a hint; no words where the lock is gone."""
    holder = _holder(path)
    if holder is not None and holder.is_here:
        return start_of(holder.pid) == holder.started, f"process {holder.pid}", ""
    silence = _silence(path)
    if silence is None:
        return False, "", ""
    who = f"process {holder.pid} on {holder.host}" if holder is not None else "an unknown process"
    who += f", which wrote to {path.name} {max(silence, 0):.0f} seconds ago"
    return silence <= LOST_SECONDS, who, f" If it has ended, delete {path}."


def _create(path: Path, text: str) -> bool | None:
    """Write the lock if there is none: whether the file system makes sure that one process alone can; None if there is one."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
        return True
    except FileExistsError:
        return None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if path.exists():
            return None
        path.write_text(text, encoding="utf-8")
        logger.info("the file system of %s does not make sure that one run alone takes a lock; its content decides.", path.parent)
        return False


def _content(path: Path) -> str | None:
    """What is in a lock; None where there is none.

    Raises:
        UserError: it is no file.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):  # reading a pipe would wait for ever
            raise UserError(f"{path} is no regular file, but has the name of a lock. Delete it.")
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        return None


def _holder(path: Path) -> Holder | None:
    """Whose lock it is; None where it does not say, also after some time in which it may still be written."""
    for _ in range(2):
        try:
            stored = json.loads(_content(path) or "")
            holder = Holder(str(stored["host"])[:80], str(stored["numbers"]), int(stored["pid"]), stored["started"])
            if 0 < holder.pid < 2**31:
                return holder
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            pass
        time.sleep(SETTLE_SECONDS)
    return None


def _silence(path: Path) -> float | None:
    """Seconds since the lock was written, by the clock of its file system; None where it is gone."""
    probe = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _show_life(path: Path, text: str, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError, ValueError), open(path, "r+", encoding="utf-8") as file:  # a disk may be away for a while
            if file.read(MAX_BYTES) != text:
                return
            file.seek(0)
            file.write(text)
