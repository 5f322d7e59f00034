"""Room on the disk for what a script will write. Sizes are in bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from utils.errors import UserError


def require_room(wanted: Mapping[Path, int], what: str, remedy: str) -> None:
    """Refuse to start where what will be written does not fit.

    Args:
        wanted: bytes by the folder they go to; folders on one disk share its room.
        what: for the message, with its verb: ``the latents take``.
        remedy: for the message: ``give another folder``.

    Raises:
        UserError: with the sizes.
    """
    by_disk: dict[int, list[Path]] = {}
    for folder in wanted:
        by_disk.setdefault(os.stat(_existing(folder)).st_dev, []).append(folder)
    for folders in by_disk.values():
        usage, needed = shutil.disk_usage(_existing(folders[0])), sum(wanted[folder] for folder in folders)
        if usage.total and usage.free < needed:  # some network file systems say 0 of 0
            where = ", ".join(map(str, folders))
            raise UserError(
                f"the disk of {where} has {readable(usage.free)} free, but {what} about {readable(needed)}. "
                f"Free some space, or {remedy}."
            )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def readable(size: int) -> str:
    """``1234567`` -> ``"1.2 MB"``."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1000:.1f} kB"
