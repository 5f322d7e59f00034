"""What is known of a tensor in a file before it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Allocate(Protocol):
    """Gives memory for a tensor, as ``torch.empty`` does."""

    def __call__(self, shape: tuple[int, ...], /, *, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file, or one that is made of several of them when it is asked for.

    Attributes:
        shape, dtype: of the tensor; known without reading it.
        pieces: the tensors of the file that it is made of. They may lie in the mapped file: reading ahead accesses these.
        assemble: ``assemble(pieces, out)`` writes the tensor into ``out``, of its shape and, for floating point, of any dtype;
            None if the only piece is the tensor.
        count: how many pieces there are.
        quantized: whether assembling dequantizes: the file holds fewer digits than ``dtype`` has.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], tuple[Tensor, ...]]
    assemble: Callable[[Sequence[Tensor], Tensor], None] | None = None
    count: int = 1
    quantized: bool = False

    def made_of(self, pieces: Sequence[Tensor], allocate: Allocate = torch.empty) -> Tensor:
        """The tensor, from its ``pieces()``: the piece itself, or in memory from ``allocate``, which may choose the dtype."""
        if self.assemble is None:
            return pieces[0]
        out = allocate(self.shape, dtype=self.dtype)
        self.assemble(pieces, out)
        return out

    def write(self, pieces: Sequence[Tensor], out: Tensor) -> None:
        """Write the tensor, from its ``pieces()``, into ``out``."""
        if self.assemble is None:
            out.copy_(pieces[0])
        else:
            self.assemble(pieces, out)
