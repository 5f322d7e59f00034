"""Room on the disk for what a run will write, looked at before anything is loaded. Sizes are estimates in bytes."""

from __future__ import annotations

import bisect
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from networks.training.saving.files import SaveRules, written_over
from utils.errors import UserError

logger = logging.getLogger(__name__)

HEADER_BYTES = 128  # of a tensor in a safetensors file
METADATA_BYTES = 4096  # of a model
ARCHIVE_BYTES = 1024  # of a trained tensor in an optimiser's file, whose every entry has a name and is aligned
RANDOM_BYTES = 20_000  # of the random generators of a process


@dataclass(frozen=True)
class NetworkSize:
    """How much a network holds: ``values`` in ``tensors``."""

    values: int
    tensors: int

    @classmethod
    def of_shapes(cls, shapes: Iterable[tuple[int, ...]]) -> NetworkSize:
        """From the shapes of its tensors."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        return cls(sum(sizes), len(sizes))

    def model_bytes(self, dtype: torch.dtype) -> int:
        """Of a saved model whose values have ``dtype``."""
        return dtype.itemsize * self.values + HEADER_BYTES * self.tensors + METADATA_BYTES

    def state_bytes(self, optimizer_bytes: float, processes: int = 1) -> int:
        """Of a saved state: the network in float32, the optimiser's ``optimizer_bytes`` for each value, random generators."""
        tensors = (HEADER_BYTES + ARCHIVE_BYTES) * self.tensors
        return round((torch.float32.itemsize + optimizer_bytes) * self.values) + tensors + RANDOM_BYTES * processes + METADATA_BYTES


def check_room_to_save(
    folder: Path,
    name: str,
    rules: SaveRules,
    *,
    model_bytes: int,
    state_bytes: int,
    steps: int,
    steps_per_epoch: int,
    start: int = 0,
) -> None:
    """Refuse a disk without room for the first save of a training, and warn of one without room for all that is kept at once.

    What is drawn, logged, or saved on request is not counted.

    Args:
        folder, name: --output_dir and --output_name.
        steps, start: of the whole training, and those that a resumed one has made.

    Raises:
        UserError: with the sizes.
    """
    models, states = rules.most_at_once(steps, steps_per_epoch, start)

    def wanted(saves: int) -> int:
        """Bytes of the first ``saves``."""
        with_state = min(saves, states) if rules.states else states * (saves >= models)
        return min(saves, models) * model_bytes + with_state * state_bytes

    what = "model with its state" if wanted(1) > model_bytes else "model"
    require_room({folder: wanted(1)}, f"one {what} takes", "give another --output_dir")
    free = free_bytes(folder)
    if free is None:
        return
    room = free + sum(map(_size, written_over(folder, name, rules, start, steps_per_epoch)))
    all_of_them = max(models, states)
    fitting = bisect.bisect_right(range(all_of_them + 1), room, key=wanted) - 1
    if fitting < all_of_them:
        limits = (("--save_last_n_steps", rules.every_n_steps), ("--save_last_n_epochs", rules.every_n_epochs))
        logger.warning(
            "%s has %s free: room for %d of %d models%s (%s each). Training ends when the disk is full; keep fewer with %s, or "
            "free some space.",
            folder,
            readable(free),
            fitting,
            all_of_them,
            " with their states" if rules.states else "",
            readable(wanted(1)),
            " and ".join(flag for flag, every in limits if every),
        )


def _size(path: Path) -> int:
    """Of a file, or of the files in a folder."""
    try:
        return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def require_room(wanted: Mapping[Path, int], what: str, remedy: str) -> None:
    """Refuse to start where what will be written does not fit.

    Args:
        wanted: bytes by the folder they go to; folders on one disk share its room.
        what: and its verb, for the message.
        remedy: the same.

    Raises:
        UserError: with the sizes.
    """
    by_disk: dict[int, list[Path]] = {}
    for folder in wanted:
        by_disk.setdefault(os.stat(_existing(folder)).st_dev, []).append(folder)
    for folders in by_disk.values():
        free, needed = free_bytes(folders[0]), sum(wanted[folder] for folder in folders)
        if free is not None and free < needed:
            where = ", ".join(map(str, folders))
            raise UserError(
                f"the disk of {where} has {readable(free)} free, but {what} about {readable(needed)}. Free some space, or {remedy}."
            )


def free_bytes(folder: Path) -> int | None:
    """What may still be written to the disk of a folder that need not exist yet; None where the system does not say."""
    try:
        usage = shutil.disk_usage(_existing(folder))
    except OSError:
        return None
    return usage.free if usage.total else None  # some network file systems say 0 of 0


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
