"""GELU in its tanh approximation (arXiv 1606.08415), alone and written straight to where a block needs it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hunyuan_model.transformer import cpu_kernels


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) of x (..., L, C), in its shape and dtype."""
    return cat_gelu(x.new_empty(*x.shape[:-1], 0), x)


def cat_gelu(left: Tensor, x: Tensor) -> Tensor:
    """left (..., A) and x (..., C), of one dtype -> (..., A + C): left, then the GELU of x."""
    if torch.compiler.is_compiling():  # the compiler avoids the copy of the GELU by itself
        return torch.cat((left, F.gelu(x, approximate="tanh")), dim=-1)
    return _CatGelu.apply(left, x)


class _CatGelu(torch.autograd.Function):
    """The GELU is computed where it belongs, so that it never exists twice."""

    @staticmethod
    def forward(ctx, left: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.left_size = left.shape[-1]
        joined = x.new_empty(*x.shape[:-1], left.shape[-1] + x.shape[-1])
        place_of_left, place = joined.split((left.shape[-1], x.shape[-1]), dim=-1)
        place_of_left.copy_(left)
        if cpu_kernels.gelu_is_faster(x):
            cpu_kernels.write_gelu(x, out=place)
        else:
            torch.ops.aten.gelu.out(x, approximate="tanh", out=place)
        return joined

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        of_left, above = gradient.split((ctx.left_size, x.shape[-1]), dim=-1)
        if cpu_kernels.gelu_is_faster(x):
            return of_left, cpu_kernels.gelu_gradient(x, above)
        return of_left, torch.ops.aten.gelu_backward(above, x, approximate="tanh")
