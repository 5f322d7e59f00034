"""What a LoRA file can hold for one weight, and the change of the weight that it means.

LoRA (arXiv 2106.09685), LoHa and LoKr (LyCORIS, arXiv 2309.14859), DoRA (arXiv 2402.09353), and differences of whole weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

Rows = Callable[[Tensor], Tensor]
"""Takes or reorders rows (the first dimension) of a tensor."""


class CannotConvert(Exception):
    """An update that has no form of the kind asked for; the message is the reason, to stand after a colon."""


@dataclass(frozen=True)
class LowRank:
    """LoRA: ``alpha / rank * up @ down``, with down (rank, in) and up (out, rank). Of convolutions with more dimensions."""

    down: Tensor
    up: Tensor
    alpha: float
    kind: ClassVar[str] = "LoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Of the update: (out, in)."""
        return self.up.shape[0], math.prod(self.down.shape[1:])

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to ``weight`` (out, in) float32, on its device, at a multiplier of 1."""
        down, up = (factor.to(weight.device, torch.float32).flatten(1) for factor in (self.down, self.up))
        return up @ (down * self.scale)

    def with_rows(self, take: Rows) -> LowRank:
        """The update of the rows that ``take`` gives of the weight."""
        return replace(self, up=take(self.up))

    def norm(self) -> float:
        """The Frobenius norm of ``delta``, from products of rank x rank."""
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        return abs(self.scale) * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt().item()


@dataclass(frozen=True)
class LoHa:
    """``alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)``, elementwise, with w1_a and w2_a (out, rank), w1_b and w2_b (rank, in)."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    kind: ClassVar[str] = "LoHa"

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = (
            factor.to(weight.device, torch.float32) for factor in (self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        )
        return (w1_a @ w1_b).mul_(w2_a @ w2_b).mul_(self.scale)

    def with_rows(self, take: Rows) -> LoHa:
        return replace(self, w1_a=take(self.w1_a), w2_a=take(self.w2_a))


@dataclass(frozen=True)
class LoKr:
    """``scale * kron(w1, w2)``. Each factor is one matrix, or two whose product it is.

    ``scale`` is alpha / rank, and 1 where no factor has a rank.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    alpha: float | None
    kind: ClassVar[str] = "LoKr"

    @property
    def rank(self) -> int | None:
        return next((factors[1].shape[0] for factors in (self.w2, self.w1) if len(factors) == 2), None)

    @property
    def scale(self) -> float:
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1[0].shape[0] * self.w2[0].shape[0], self.w1[-1].shape[1] * self.w2[-1].shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = (self._product(factors, weight.device) for factors in (self.w1, self.w2))
        return torch.kron(w1, w2 * self.scale)

    def with_rows(self, take: Rows) -> Difference:
        return Difference(take(self.delta(torch.empty(0, device=self.w1[0].device))))

    @staticmethod
    def _product(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
        first, *rest = (factor.to(device, torch.float32) for factor in factors)
        return first @ rest[0] if rest else first


@dataclass(frozen=True)
class Difference:
    """A tensor that is added to the parameter."""

    value: Tensor
    kind: ClassVar[str] = "a whole difference"
    rank: ClassVar[None] = None
    scale: ClassVar[float] = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out,) of a bias or norm."""
        return _matrix_shape(self.value)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device, torch.float32).reshape(self.shape)

    def with_rows(self, take: Rows) -> Difference:
        return Difference(take(self.value))


@dataclass(frozen=True)
class Replacement:
    """A tensor that takes the place of the parameter, whatever the multiplier, if that is not 0."""

    value: Tensor
    kind: ClassVar[str] = "a replaced weight"
    rank: ClassVar[None] = None
    scale: ClassVar[float] = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return _matrix_shape(self.value)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device, torch.float32).reshape(self.shape) - weight

    def with_rows(self, take: Rows) -> Replacement:
        return Replacement(take(self.value))


@dataclass(frozen=True)
class DoRA:
    """The weight with another update, brought to a given length: ``magnitude * v / |v|`` with v = weight + delta.

    ``magnitude`` is (out, 1), the length of each row, or (1, in), that of each column.
    """

    direction: LowRank | LoHa | LoKr
    magnitude: Tensor

    @property
    def kind(self) -> str:
        return "DoRA" if isinstance(self.direction, LowRank) else f"DoRA on {self.direction.kind}"

    @property
    def rank(self) -> int | None:
        return self.direction.rank

    @property
    def scale(self) -> float:
        return self.direction.scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.direction.shape

    @property
    def per_output(self) -> bool:
        return self.magnitude.shape[1] == 1

    def delta(self, weight: Tensor) -> Tensor:
        changed = self.direction.delta(weight) + weight
        length = torch.linalg.vector_norm(changed, dim=1 if self.per_output else 0, keepdim=True)
        length += torch.finfo(torch.float32).eps
        return changed.mul_(self.magnitude.to(weight.device, torch.float32) / length) - weight

    def with_rows(self, take: Rows) -> DoRA:
        if not self.per_output:
            raise CannotConvert("DoRA with a magnitude for each input needs all rows of the weight at once")
        return DoRA(self.direction.with_rows(take), take(self.magnitude))


def all_finite(tensor: Tensor) -> bool:
    """Whether no value of ``tensor``, of any floating-point dtype, is NaN or infinite."""
    if tensor.itemsize > 1 and tensor.sum(dtype=torch.float32).isfinite():  # the quick answer; a sum may overflow
        return True
    return bool(tensor.float().isfinite().all())


def with_rows_permuted(update: Update, permute: Rows) -> Update:
    """The update of the rows in another order."""
    if isinstance(update, DoRA) and not update.per_output:  # the length of a column does not depend on it
        return replace(update, direction=update.direction.with_rows(permute))
    return update.with_rows(permute)


Update = LowRank | LoHa | LoKr | Difference | Replacement | DoRA


def strength(update: Update, multiplier: float) -> float:
    """What ``delta`` is multiplied by: a replaced weight takes its place whole, or not at all."""
    return float(multiplier != 0) if isinstance(update, Replacement) else multiplier


def _matrix_shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape) if value.dim() < 2 else (value.shape[0], math.prod(value.shape[1:]))
