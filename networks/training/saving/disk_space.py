"""How large a saved model and its state will be, and whether the disk has room for one save. Sizes are estimates in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.disk_space import readable, require_room

__all__ = ["NetworkSize", "readable", "require_room_for_save"]

MODEL_OVERHEAD = 128  # bytes a tensor, for its header
STATE_OVERHEAD = 1152  # bytes a tensor, for its header and for its entries in the optimiser's file


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
        return dtype.itemsize * self.values + MODEL_OVERHEAD * self.tensors

    def state_bytes(self, optimizer_bytes: float) -> int:
        """Of a saved state: the network in float32, and the optimiser's ``optimizer_bytes`` for each value."""
        return round((torch.float32.itemsize + optimizer_bytes) * self.values) + STATE_OVERHEAD * self.tensors


def require_room_for_save(folder: Path, model_bytes: int, state_bytes: int = 0) -> None:
    """Refuse a disk without room for one save, before a model is loaded.

    Args:
        folder: --output_dir.
        state_bytes: 0 for a training that saves no state.

    Raises:
        UserError: with the sizes.
    """
    what = "one model with its state takes" if state_bytes else "one model takes"
    require_room({folder: model_bytes + state_bytes}, what, "give another --output_dir")
