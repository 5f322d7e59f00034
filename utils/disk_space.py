"""Room on the disk for what a script will write. Sizes are in bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from utils.errors import UserError
from utils.files import nearest_existing


def require_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Refuse to start where what will be written to a folder, which need not exist yet, does not fit on its disk.

    Args:
        what: for the message, with its verb: ``the latents take``.
        remedy: for the message: ``give another folder``.

    Raises:
        UserError: with the sizes.
    """
    try:
        disk = shutil.disk_usage(nearest_existing(folder))
    except OSError:
        return
    if disk.total and disk.free < needed:  # some network file systems say 0 of 0
        raise UserError(
            f"the disk of {folder} has {readable(disk.free)} free, but {what} about {readable(needed)}. "
            f"Free some space, or {remedy}."
        )


def readable(size: int) -> str:
    """``1234567`` -> ``"1.2 MB"``."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.1f} kB"
