"""What is known of a tensor in a file before it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file, or one that is made of several of them when it is asked for.

    Attributes:
        shape, dtype: of the tensor; known without reading it.
        pieces: the tensors of the file that it is made of. They may lie in the mapped file: reading ahead accesses these.
        assemble: makes the tensor of its pieces, as new memory or as a view of the only piece; None if that is the tensor.
        count: how many pieces there are.
        quantized: whether assembling dequantizes: the file holds fewer digits than ``dtype`` has.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], tuple[Tensor, ...]]
    assemble: Callable[[Sequence[Tensor]], Tensor] | None = None
    count: int = 1
    quantized: bool = False

    def made_of(self, pieces: Sequence[Tensor]) -> Tensor:
        """The tensor, from its ``pieces()``."""
        return pieces[0] if self.assemble is None else self.assemble(pieces)
