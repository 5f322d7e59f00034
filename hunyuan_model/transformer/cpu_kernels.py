"""What a CPU computes in another way than torch would or a GPU does: GELU in float32, RMS norms, rotations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# 0.5 (1 + tanh(y)) is sigmoid(2y), where y = sqrt(2 / pi) (x + 0.044715 x^3). torch's tanh takes three times as long there.
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715

SLICE_VALUES = 2**19  # 2 MiB, which stay in the caches from one pass over a slice to the next


def gelu_is_faster(x: Tensor) -> bool:
    """Whether ``write_gelu`` and ``gelu_gradient`` are for x."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def write_gelu(x: Tensor, out: Tensor) -> None:
    """The GELU of x (..., L, C), in its tanh approximation, written to out of the same shape."""
    linear = x.new_tensor(LINEAR)
    for part, place in zip(_slices(x), _slices(out)):
        torch.mul(_sigmoid(part, linear), part, out=place)


def gelu_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x (..., L, C) from that of its GELU."""
    # With s = sigmoid(x (LINEAR + CUBIC x^2)), the derivative of x s is s (1 + x (LINEAR + 3 CUBIC x^2) (1 - s)).
    of_x, linear = torch.empty_like(x), x.new_tensor(LINEAR)
    for part, above, place in zip(_slices(x), _slices(gradient), _slices(of_x)):
        sigmoid = _sigmoid(part, linear)
        slope = torch.addcmul(linear, part, part, value=3 * CUBIC).mul_(part)
        slope.addcmul_(slope, sigmoid, value=-1).add_(1).mul_(sigmoid)
        torch.mul(slope, above, out=place)
    return of_x


def _sigmoid(x: Tensor, linear: Tensor) -> Tensor:
    return torch.addcmul(linear, x, x, value=CUBIC).mul_(x).sigmoid_()


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of (..., L, C), each of as many of the L rows as make a slice."""
    return x.split(max(1, SLICE_VALUES * x.shape[-2] // max(1, x.numel())), dim=-2)


def rms_norm(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """x (..., D) times its inverse root mean square (..., 1) and weight (D,), all float32: torch makes two more such tensors."""
    return (x * inverse).mul_(weight)


def row_products(x: Tensor, other: Tensor) -> Tensor:
    """The inner products of rows: (..., D) twice -> (..., 1). On GPUs many small matmuls are slow."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.einsum("...d,...d->...", x, other)[..., None]
    return (x * other).sum(-1, keepdim=True)


def rotate_pairs(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``rope.rotate_pairs``, for the compiler: four times as fast in the vectors of a CPU."""
    a, b = pairs.unbind(-1)
    cos, sin = cos.squeeze(-1), sin.squeeze(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
