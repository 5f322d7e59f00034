"""GELU in its tanh approximation (arXiv 1606.08415), and GELU written straight to where it is needed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# 0.5 (1 + tanh(y)) is sigmoid(2y), where y = sqrt(2 / pi) (x + 0.044715 x^3).
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715

SLICE_VALUES = 2**19
"""Values of one slice: 2 MiB, which stay in a processor's caches from one pass over them to the next."""


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) of x (..., L, C), in its shape and dtype.

    Without gradients it takes the place of x: whoever asks for it must have no more use for x.
    """
    if not _may_overwrite():
        return _GeluBySigmoid.apply(x) if _tanh_is_slow(x) else F.gelu(x, approximate="tanh")
    return _write_gelu(x, out=x)


def join_gelu(left: Tensor, x: Tensor) -> Tensor:
    """left (..., A) and x (..., C), of one dtype -> (..., A + C): left, then the GELU of x.

    Without gradients the GELU is computed where it belongs, so that it never exists twice.
    """
    if not _may_overwrite():
        return torch.cat((left, gelu(x)), dim=-1)
    joined = x.new_empty(*x.shape[:-1], left.shape[-1] + x.shape[-1])
    place_of_left, place = joined.split((left.shape[-1], x.shape[-1]), dim=-1)
    place_of_left.copy_(left)
    _write_gelu(x, out=place)
    return joined


def _may_overwrite() -> bool:
    """Nothing is kept for a backward pass, and no compiler plans by itself what to write where."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _tanh_is_slow(x: Tensor) -> bool:
    """On a processor torch's tanh takes three times as long as its sigmoid."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _write_gelu(x: Tensor, out: Tensor) -> Tensor:
    """out may be x."""
    if not _tanh_is_slow(x):
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    linear = x.new_tensor(LINEAR)
    for part, place in zip(_slices(x), _slices(out)):
        torch.mul(_sigmoid(part, linear), part, out=place)
    return out


class _GeluBySigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _write_gelu(x, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # With s = sigmoid(x (LINEAR + CUBIC x^2)), the derivative of x s is s (1 + x (LINEAR + 3 CUBIC x^2) (1 - s)).
        (x,) = ctx.saved_tensors
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
