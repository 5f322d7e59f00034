"""Norms in float32 of what is computed in bfloat16 or float16; autograd keeps only the tensors in those."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.transformer import cpu_kernels
from hunyuan_model.transformer.fused import fused, usable
from hunyuan_model.transformer.rope import apply_rope

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """The weight (D,) of a root mean square norm over the head dimension (arXiv 1910.07467), see ``rotated_norms``."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def rotated_norms(
    queries: Tensor, keys: Tensor, query_norm: RMSNorm, key_norm: RMSNorm, rope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both (B, L, H, D) normed and rotated by rope (L, D/2, 2) float32: in float32, and rounded once to their dtype."""
    inputs = queries, keys, query_norm.weight, key_norm.weight, rope
    if torch.compiler.is_compiling():  # which chooses by itself what to keep
        return _rotated_norms(*inputs)
    return _RotatedNormsKeepingInputs.apply(*inputs)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift. x (B, L, hidden); shift, scale (B, 1, hidden).

    Under autocast in float32, and rounded once to the dtype in which a linear layer takes it; else in the dtype of x.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _modulated_norm(x, shift, scale)
    dtype = torch.get_autocast_dtype(device)
    if torch.compiler.is_compiling():
        return _modulated_norm_in_float32(x, shift, scale, dtype)
    return _ModulatedNormKeepingInputs.apply(dtype, x, shift, scale)


class _ModulatedNormKeepingInputs(torch.autograd.Function):
    """Computed once more in the backward pass, which is cheap: autograd would keep float32 copies of half-precision tokens."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(*tensors)
        return _modulated_norm_in_float32(*tensors, dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        saved = x, _, scale = ctx.saved_tensors
        if usable(x) and needed == (True, False, False):
            return None, _modulated_norm_gradient(gradient, x, scale), None, None
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(saved, needed)]
        with torch.enable_grad():
            output = _modulated_norm_in_float32(*inputs, ctx.dtype)
        gradients = iter(torch.autograd.grad(output, [x for x in inputs if x.requires_grad], gradient))
        return None, *(next(gradients) if need else None for need in needed)


class _RotatedNormsKeepingInputs(torch.autograd.Function):
    """Its backward pass by the formula: autograd's own holds more float32 copies at once."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, rope)
        return _rotated_norms(q, k, q_weight, k_weight, rope)

    @staticmethod
    def backward(ctx, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
        q, k, *weights, rope = ctx.saved_tensors
        of_inputs = of_weights = (None, None)
        if any(ctx.needs_input_grad[:2]):
            of_inputs = _rotated_norms_gradient(of_q, of_k, q, k, *weights, rope)
        if any(ctx.needs_input_grad[2:]):
            of_weights = (_weight_gradient(of, x, rope).to(w.dtype) for of, x, w in zip((of_q, of_k), (q, k), weights))
        return *of_inputs, *of_weights, None


# Queries and keys in one call: views of one tensor at two places would be two graphs.
@fused((0, 1), (0, 1), (), (), (0,))
def _rotated_norms(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    return _rotated_norm(q, q_weight, rope), _rotated_norm(k, k_weight, rope)


@fused((0, 1), (0, 1), (0, 1), (0, 1), (), (), (0,))
def _rotated_norms_gradient(
    of_q: Tensor, of_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _rotated_norm_gradient(of_q, q, q_weight, rope), _rotated_norm_gradient(of_k, k, k_weight, rope)


def _rotated_norm(x: Tensor, weight: Tensor, rope: Tensor | None) -> Tensor:
    normed = _rms_norm(x, weight)
    return (normed if rope is None else apply_rope(normed, rope)).to(x.dtype)


def _rotated_norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, rope: Tensor | None) -> Tensor:
    """The gradient of x from that of ``_rotated_norm``, in place where it can be."""
    scaled = _rotated_back(gradient.float(), rope) * weight.float()
    exact = x.to(torch.float32, copy=True)
    inverse = _inverse_rms(exact)
    along = cpu_kernels.row_products(scaled, exact)
    return scaled.mul_(inverse).sub_(exact.mul_(along * inverse.pow(3) / x.shape[-1])).to(x.dtype)


def _weight_gradient(gradient: Tensor, x: Tensor, rope: Tensor | None) -> Tensor:
    exact = x.float()
    return (_rotated_back(gradient.float(), rope) * exact * _inverse_rms(exact)).flatten(0, -2).sum(0)


def _rotated_back(gradient: Tensor, rope: Tensor | None) -> Tensor:
    return gradient if rope is None else apply_rope(gradient, rope, back=True)


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


@fused((0, 1), (0, 1), (0,))
def _modulated_norm_gradient(gradient: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x (B, L, hidden) from that of ``_modulated_norm_in_float32``, by the formula."""
    exact, above = x.float(), gradient.float() * (1 + scale.float())
    variance, mean = torch.var_mean(exact, dim=-1, correction=0, keepdim=True)
    inverse = (variance + NORM_EPS).rsqrt()
    normed = (exact - mean) * inverse
    centred = above - above.mean(-1, keepdim=True) - normed * (above * normed).mean(-1, keepdim=True)
    return (centred * inverse).to(x.dtype)


@fused((0, 1), (0,), (0,))
def _modulated_norm_in_float32(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _modulated_norm(x.float(), shift.float(), scale.float()).to(dtype)
