"""Norms in float32 of what is computed in bfloat16 or float16; autograd keeps only the tensors in those."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.transformer import cpu_kernels

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root mean square norm over the head dimension (arXiv 1910.07467), in float32 whatever comes in."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which chooses by itself what to keep
            return _rms_norm(x, self.weight)
        return _RMSNormKeepingInputs.apply(x, self.weight)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift. x (B, L, hidden); shift, scale (B, 1, hidden).

    Under autocast in float32, and rounded once to the dtype in which a linear layer takes it; else in the dtype of x.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _modulated_norm(x, shift, scale)
    dtype = torch.get_autocast_dtype(device)
    if torch.compiler.is_compiling():
        return _modulated_norm_in_float32(dtype, x, shift, scale)
    return _ModulatedNormKeepingInputs.apply(dtype, x, shift, scale)


class _ModulatedNormKeepingInputs(torch.autograd.Function):
    """Computed once more in the backward pass, which is cheap: autograd would keep float32 copies of half-precision tokens."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(*tensors)
        return _modulated_norm_in_float32(dtype, *tensors)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad():
            output = _modulated_norm_in_float32(ctx.dtype, *inputs)
        gradients = iter(torch.autograd.grad(output, [x for x in inputs if x.requires_grad], gradient))
        return None, *(next(gradients) if need else None for need in needed)


class _RMSNormKeepingInputs(torch.autograd.Function):
    """Its backward pass by the formula, in place where it can be: autograd's own holds twice as many float32 copies at once."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _rms_norm(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        exact, dim = x.to(torch.float32, copy=True), x.shape[-1]
        inverse = _inverse_rms(exact)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * exact * inverse).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, of_weight
        scaled = gradient * weight.float()
        along = torch.einsum("...d,...d->...", scaled, exact)[..., None]
        of_x = scaled.mul_(inverse).sub_(exact.mul_(along * inverse.pow(3) / dim))
        return of_x.to(x.dtype), of_weight


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.float(), weight.float()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return cpu_kernels.rms_norm(x, weight, _inverse_rms(x))
    return F.rms_norm(x, weight.shape, weight, NORM_EPS)


def _inverse_rms(x: Tensor) -> Tensor:
    """(..., D) float32 -> (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and len(x) == 1 and x.dtype == shift.dtype == scale.dtype:
        # One sample's modulation is what LayerNorm calls weight and bias: one pass over x in place of two.
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], NORM_EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def _modulated_norm_in_float32(dtype: torch.dtype, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _modulated_norm(x.float(), shift.float(), scale.float()).to(dtype)
