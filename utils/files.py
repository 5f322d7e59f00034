"""Files that appear under their final name only when whole, and what is wrong with paths and files that users name."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError

logger = logging.getLogger(__name__)

UNSUPPORTED = frozenset({errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_warned: set[str] = set()  # operations that were found missing
SIGNATURE_BYTES = 64  # of a file, enough for ``foreign_content``
TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{8}\.tmp(\.|$)")
MOST_TEXT_BYTES = 4 << 20  # of a text that is read whole; a larger one is something else
MAX_NAME_BYTES = 240  # of a file name: file systems allow 255; temporary names and other tools need some


@contextmanager
def explain_failed_writing(final: str | os.PathLike[str]) -> Iterator[None]:
    """Raise a UserError for an OSError inside, on a full disk for example; it names ``final``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror or error}. Check the folder and the free disk space.") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str], keep_name: bool = False, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it to ``path``.

    On any exception the temporary file is removed and whatever stood under ``path`` is untouched. The temporary name
    keeps the suffix, which some writers look at; with ``keep_name`` all of the name (see ``final_of_temporary``). Without
    ``flush``, a power cut may leave an older file or a damaged one, for what is written again soon.

    Raises:
        UserError: the folder cannot be written to, or nothing can have the name ``path``.
    """
    final = Path(path)
    require_possible_file(final)
    temporary = _temporary_beside(final, keep_name)
    try:
        with explain_failed_writing(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            _create(temporary)
            mode = _make_private(temporary)
            yield temporary
            with _where_supported(final.parent, "permissions"):
                os.chmod(temporary, mode)
            if flush:
                _flush_file(temporary)
            _rename(temporary, final)
            if flush:
                _flush_folder(final.parent)
    finally:
        with suppress(OSError):  # usually gone by now, or its folder could not be made
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new temporary folder beside ``path``; on success flush all that is in it and rename it to ``path``.

    On any exception it is removed and whatever stood under ``path`` is untouched. A folder that stood there gives way at
    the very end.
    """
    final = Path(path)
    temporary, outdated = _temporary_beside(final, keep_name=True), None
    try:
        with explain_failed_writing(final):
            temporary.mkdir(parents=True)
            mode = _make_private(temporary)
            yield temporary
            with _where_supported(final.parent, "permissions"):
                os.chmod(temporary, mode)
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _flush_file(Path(folder, name))
            _flush_folder(temporary)
            if final.exists():
                outdated = _temporary_beside(final, keep_name=True)
                _rename(final, outdated)
            _rename(temporary, final)
            _flush_folder(final.parent)
    finally:
        if outdated is not None and outdated.exists() and not final.exists():
            _rename(outdated, final)
        for leftover in (temporary, outdated):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and all that is in it. If that is interrupted, nothing half-removed stands under ``path``.

    Raises:
        OSError: it, or something in it, cannot be removed.
    """
    outdated = _temporary_beside(path, keep_name=True)
    try:
        os.replace(path, outdated)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        outdated = path
    shutil.rmtree(outdated)


def _create(path: Path) -> None:
    """Make an empty file, and follow no link that somebody has laid there."""
    try:
        open(path, "x").close()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        path.touch()


def _make_private(path: Path) -> int:
    """Let nobody else see into a file or folder that is being written; returns the mode that the user's umask gave it."""
    mode = path.stat().st_mode
    with _where_supported(path.parent, "permissions"):
        os.chmod(path, 0o700 if stat.S_ISDIR(mode) else 0o600)
    return mode


def _temporary_beside(final: Path, keep_name: bool) -> Path:
    name = final_of_temporary(final)  # where ``final`` is itself being written for another name, that one is kept
    ending = f".{name or final.name}" if name or keep_name else final.suffix
    return final.with_name(f".{uuid.uuid4().hex[:8]}.tmp{ending}")


@contextmanager
def _where_supported(folder: Path, what: str) -> Iterator[None]:
    """Go on, with one warning, where the file system of ``folder`` lacks an operation, as network and cloud mounts do."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(folder, what, error)


def _warn_once(folder: Path, what: str, error: OSError) -> None:
    if what not in _warned:
        _warned.add(what)
        reason = error.strerror or error
        logger.warning("the file system of %s has no %s (%s): files are written without.", folder, what, reason)


def _flush_file(path: Path) -> None:
    """Make what was written survive a power cut."""
    with _where_supported(path.parent, "flushing to disk"), open(path, "rb+") as file:
        os.fsync(file.fileno())


def _rename(temporary: Path, final: Path) -> None:
    """Rename a file, over what stands under ``final``, or a folder; where that is not possible, copy, so that there is always one
    whole."""
    try:
        os.replace(temporary, final)
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.EEXIST} or not temporary.exists():
            raise
        _copy(temporary, final)
        _warn_once(final.parent, "renaming over a file", error)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            _copy(path, target / path.name)
        shutil.rmtree(source)
    else:
        shutil.copyfile(source, target)


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system lets folders be flushed (Windows does not)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def final_of_temporary(path: Path) -> str | None:
    """The final name of a temporary file or folder that kept it; None for anything else."""
    match = TEMPORARY_NAME.match(path.name)
    return path.name[match.end() :] if match and match[1] else None


def remove_leftovers_of(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it, if they kept its name."""
    for other in path.parent.iterdir():
        if final_of_temporary(other) == path.name:
            with suppress(OSError):
                other.unlink()


def is_temporary(path: Path) -> bool:
    """Whether ``path`` has a name that ``atomic_path`` gives to a file which is still being written."""
    return TEMPORARY_NAME.match(path.name) is not None


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """Return ``path`` if it is a file, else raise a UserError that says ``what`` was expected there."""
    found = require_there(path, what)
    if not os.path.isfile(found):
        kind = "is a folder" if os.path.isdir(found) else "is not a regular file"  # but a device or a pipe
        raise UserError(f"{what} must be a file, but {found} {kind}.")
    if is_of_system(found):
        raise UserError(f"{what} must be a file, but {found} is a view into the system.")
    return found


def is_of_system(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads, through links too, to /proc or /sys: what looks like a file there may never end, or wait for ever."""
    return os.path.realpath(path).startswith(("/proc/", "/sys/"))


def read_text(path: str | os.PathLike[str], what: str, most: int = MOST_TEXT_BYTES) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, of at most so many bytes.

    Raises:
        UserError: says ``what`` was expected there.
    """
    found = require_file(path, what)
    with explain_failed_reading(found, what):
        with open(found, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise UserError(f"{what} {found} is larger than {most >> 10} KB. Check that it is the right file.")
        return content.decode("utf-8-sig")


@contextmanager
def explain_failed_reading(path: Path, what: str) -> Iterator[None]:
    """Turn what reading a text raises into a UserError that names ``path`` and says ``what`` was expected there."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8 in your editor.") from error
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}.") from error


def require_there(path: str | os.PathLike[str], what: str) -> Path:
    """Return ``path`` if there is something, else raise a UserError that says ``what`` was expected there, and the reason."""
    found = Path(path)
    try:
        os.stat(found)
    except FileNotFoundError:
        raise UserError(f"{what} not found: {found} does not exist.") from None
    except OSError as error:  # a name too long, a folder that may not be looked into, links in a circle
        raise UserError(f"{what} not found: {found} cannot be opened ({error.strerror or error}).") from None
    return found


def wait_for_files(paths: Iterable[Path], seconds: float = 60) -> list[Path]:
    """Until all are there, as mounted folders show what other machines wrote some seconds later; returns those that are not."""
    missing, end = list(paths), time.monotonic() + seconds
    while (missing := [path for path in missing if not path.exists()]) and time.monotonic() < end:
        for folder in {path.parent for path in missing}:
            with suppress(OSError):
                os.listdir(folder)  # a list that a system keeps is made anew
        time.sleep(1)
    return missing


def require_possible_file(path: str | os.PathLike[str], what: str = "the file to write") -> None:
    """Refuse with a UserError a path under which no file can appear: a folder's, or a name that the system does not take."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # what is wrong with its folder shows when that is made
    except OSError as error:
        raise UserError(f"{what} {path} cannot have that name ({error.strerror or error}). Give a shorter one.") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{what} {path} is a folder. Give the name of a file.")


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents, Path()) if os.path.exists(path))


def require_writable_folder(path: str | os.PathLike[str], flag: str) -> Path:
    """Refuse a folder in which no file can be made, before hours are spent on what would go there. Leaves nothing behind.

    Raises:
        UserError: ``path`` is a file, or neither it nor the nearest folder above it that exists can be written to.
    """
    folder = Path(path)
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # what follows finds out more
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be a folder ({error.strerror or error}). Give another one.") from error
    existing = nearest_existing(folder)
    probe = existing / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        for _ in range(2):  # all that saving does, over a file that is there as well
            with atomic_path(probe) as temporary:
                temporary.write_bytes(b"probe")
    except UserError as error:
        reason = error.__cause__
        what = "is a file" if existing.is_file() else getattr(reason, "strerror", None) or str(reason or error)
        raise UserError(f"{flag} {folder} cannot be written to ({existing}: {what}). Give another folder.") from error
    finally:
        with suppress(OSError):
            probe.unlink()
    return folder


def foreign_content(start: bytes) -> str | None:
    """What a file holds that should hold tensors, and what to do about it, to complete "the file ..."; None if unknown.

    ``start`` is its first ``SIGNATURE_BYTES`` bytes.
    """
    if not start:
        return "is empty. Copy or download it again."
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
    if start.startswith(b"GGUF"):
        return "is a GGUF file. Use a .safetensors file."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not weights: the download went wrong. Download it again."
    return None


def is_torch_file(start: bytes) -> bool:
    """Whether these are the first bytes of a file that ``torch.save`` wrote: a zip archive, or a bare pickle."""
    return start.startswith(b"PK") or start[:1] == b"\x80"
