"""Linear layers whose weights are stored as float8: half the memory of bfloat16, computed in a wider dtype.

The weights stay float8 in memory. A layer widens its weight for its own matrix product, once in forward and once more
in backward, so that no wide copy outlives the product. The layers stay plain ``nn.Linear`` objects: what looks for
layers by class, or wraps ``forward`` on top, finds what it expects.
"""

from __future__ import annotations

import functools
import re

import torch
import torch.nn.functional as F
from torch import nn

FP8_DTYPE = torch.float8_e4m3fn
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

# The modulation layers steer every token at once and the norms are tiny: both keep the wide dtype.
_FP8_TARGET = re.compile(r"(double|single)_blocks\.\d+\.(?!.*(_mod|modulation|norm)\.).+\.weight")


def is_fp8_target(name: str) -> bool:
    """Whether the transformer parameter ``name`` is stored as float8: Linear weights of the blocks, modulation excepted."""
    return _FP8_TARGET.fullmatch(name) is not None


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` as ``dtype``; values beyond the range of a float8 dtype become its largest instead of NaN."""
    if tensor.dtype == dtype or dtype not in FP8_DTYPES or not tensor.numel():
        return tensor.to(dtype)
    wide = tensor.float() if tensor.dtype in FP8_DTYPES else tensor
    # Older torch versions turn what is out of range into NaN. Weights seldom need the clamp, and it would cost a copy.
    low, high = torch.aminmax(wide)
    limit = torch.finfo(dtype).max
    return (wide.clamp(-limit, limit) if low < -limit or high > limit else wide).to(dtype)


def dequantise(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A stored float8 weight as the wide dtype it is computed in."""
    return weight.to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` that keeps only the float8 weight for backward. The weight is frozen: it has no gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, dequantise(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output.matmul(dequantise(weight, grad_output.dtype))
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_x, None, grad_bias


def _forward(linear: nn.Linear, compute_dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    """Forward of a float8 Linear: like any Linear it answers in the autocast dtype under autocast, else in x's dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return _Fp8Linear.apply(x.to(torch.get_autocast_dtype(x.device.type)), linear.weight, linear.bias)
    return _Fp8Linear.apply(x.to(compute_dtype), linear.weight, linear.bias).to(x.dtype)


def enable_fp8_linears(module: nn.Module, compute_dtype: torch.dtype) -> int:
    """Give every ``nn.Linear`` in ``module`` that stores a float8 weight a forward which computes in ``compute_dtype``.

    Call it once after loading, before anything else wraps ``forward``. Under autocast the autocast dtype wins.

    Returns:
        How many layers were found.
    """
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.weight.dtype in FP8_DTYPES]
    for linear in linears:
        linear.weight.requires_grad_(False)
        linear.forward = functools.partial(_forward, linear, compute_dtype)
    return len(linears)
