"""Linear layers with quantized weights: one byte for each weight in memory, computed in a full-precision dtype.

A layer dequantizes its weight for its own matmul, once in the forward and once in the backward pass, so no full-precision copy
outlives the matmul. The layers stay plain ``nn.Linear`` objects that read their weight, and the frozen parameter ``weight_scale``
beside it, at every call: code that looks for layers by class, wraps ``forward``, or moves weights finds what it expects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_model.quantization.custom_op import opaque
from hunyuan_model.quantization.formats import FP8_DTYPES, SCALE_SUFFIX, cast, dequantize, quantize_channels, quantize_groups
from hunyuan_model.quantization.scaled_mm import Float8Matmuls, fits_float8_matmuls, float8_input_gradient, float8_linear


@opaque(lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
def _dequantized_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, dequantize(weight, x.dtype, scale), None if bias is None else bias.to(x.dtype))


@opaque(lambda gradient, weight, scale: gradient.new_empty(*gradient.shape[:-1], weight.shape[1]))
def _dequantized_gradient(gradient: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return gradient.matmul(dequantize(weight, gradient.dtype, scale))


class _Path(torch.autograd.Function):
    """The way of the gradient through ``x @ weight.T + bias``: (..., in) -> any values (..., out), which take no memory.

    A Function of its own, before the matmul, because autograd keeps what a Function asks for after its forward: checkpointing,
    which stops a recomputation once everything is kept, then leaves the matmul out.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        matmuls: Float8Matmuls | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.matmuls = matmuls
        return x.new_empty(()).expand(*x.shape[:-1], len(weight))  # nobody reads it

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0] and ctx.matmuls is not None:
            of_x = float8_input_gradient(gradient, weight, scale, ctx.matmuls)
        elif ctx.needs_input_grad[0]:
            of_x = _dequantized_gradient(gradient, weight, scale)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_x, None, None, of_bias, None


class _Value(torch.autograd.Function):
    """The matmul, whose gradient goes along ``path``."""

    @staticmethod
    def forward(
        ctx,
        path: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        matmuls: Float8Matmuls | None,
    ) -> torch.Tensor:
        if matmuls is not None:
            return float8_linear(x, weight, scale, bias, matmuls)
        return _dequantized_matmul(x, weight, scale, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient, None, None, None, None, None


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    matmuls: Float8Matmuls | None = None,
) -> torch.Tensor:
    """``x @ (weight * scale).T + bias``, with a gradient for x and bias. No dequantized weight outlives its matmul.

    Args:
        x: (..., in), in whose dtype the layer computes.
        weight: codes (out, in), with ``scale`` (out or 1, groups of inputs) or None.
        matmuls: multiply float8 by float8 in this way; only for what ``fits_float8_matmuls``. None dequantizes.

    Returns:
        (..., out) in the dtype of x.
    """
    path = _Path.apply(x, weight, scale, bias, matmuls)
    return _Value.apply(path, x.detach(), weight, scale, None if bias is None else bias.detach(), matmuls)


@dataclass(frozen=True, eq=False)
class QuantizedForward:
    """The forward of a quantized Linear. A method: the compiler compares bound methods by their function."""

    linear: nn.Linear
    compute_dtype: torch.dtype
    matmuls: Float8Matmuls | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like any Linear it answers in the autocast dtype under autocast, else in x's dtype."""
        weight, scale, bias = self.linear.weight, weight_scale(self.linear), self.linear.bias
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.compute_dtype
        matmuls = self.matmuls if self.matmuls is not None and fits_float8_matmuls(x, weight, scale) else None
        out = quantized_linear(x.to(dtype), weight, scale, bias, matmuls)
        return out if autocast else out.to(x.dtype)


def weight_scale(linear: nn.Module) -> torch.Tensor | None:
    """The scale beside a layer's weight, if it has one."""
    return getattr(linear, f"weight{SCALE_SUFFIX}", None)


def is_quantized(linear: nn.Linear) -> bool:
    """Whether a layer stores its weight in one byte per value."""
    return linear.weight.dtype in FP8_DTYPES or weight_scale(linear) is not None


def enable_quantized_linears(module: nn.Module, compute_dtype: torch.dtype, matmuls: Float8Matmuls | None = None) -> int:
    """Give every ``nn.Linear`` in ``module`` that stores a quantized weight a forward which computes in ``compute_dtype``.

    Call it once after loading, before anything else wraps ``forward``. Under autocast the autocast dtype wins.
    ``matmuls``: multiply float8 by float8, in this way, where sizes and scales allow it. Returns how many layers were found.
    """
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and is_quantized(layer)]
    for linear in linears:
        linear.weight.requires_grad_(False)
        linear.forward = QuantizedForward(linear, compute_dtype, matmuls).forward
    return len(linears)


def dequantized_weight(linear: nn.Linear, device: torch.device | str | None = None) -> torch.Tensor:
    """The weight of a layer as a tensor on ``device``: full-precision weights as they are, quantized ones as float32."""
    weight, scale = linear.weight.detach().to(device or linear.weight.device), weight_scale(linear)
    if not is_quantized(linear):
        return weight
    return dequantize(weight, torch.float32, None if scale is None else scale.detach().to(weight.device))


def replace_weight(linear: nn.Linear, value: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Store ``value`` (out, in) as the weight of ``linear``: as ``dtype``, or in the way in which the weight is stored now."""
    weight, scale = linear.weight, weight_scale(linear)
    if scale is None or dtype is not None:
        weight.data = cast(value, dtype or weight.dtype).to(weight.device)
        if scale is not None:
            delattr(linear, f"weight{SCALE_SUFFIX}")
        return
    codes, new = quantize_channels(value) if weight.dtype in FP8_DTYPES else quantize_groups(value)
    weight.data, scale.data = codes.to(weight.device), new.to(scale.device)
