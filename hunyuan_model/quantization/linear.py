"""Linear layers with quantized weights: one byte for each weight in memory, computed in a full-precision dtype.

Weights stay quantized. A layer dequantizes its weight for its own matmul, once in the forward and once in the backward pass, so no
full-precision copy outlives the matmul. The layers stay plain ``nn.Linear`` objects that read their weight and scale at every
call: code that looks for layers by class, wraps ``forward``, or moves weights finds what it expects. The scales are a frozen
parameter beside the weight (``weight_scale``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_model.quantization.custom_op import opaque
from hunyuan_model.quantization.formats import FP8_DTYPES, SCALE_SUFFIX, cast, dequantize, quantize_channels, quantize_groups
from hunyuan_model.quantization.scaled_mm import Float8Matmuls, fits_float8_matmuls, fp8_linear
from hunyuan_model.runtime.recomputation import result_unneeded, stand_in


@opaque(lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
def _dequantized_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, dequantize(weight, x.dtype, scale), None if bias is None else bias.to(x.dtype))


@opaque(lambda gradient, weight, scale: gradient.new_empty(*gradient.shape[:-1], weight.shape[1]))
def _dequantized_gradient(gradient: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return gradient.matmul(dequantize(weight, gradient.dtype, scale))


class _QuantizedLinear(torch.autograd.Function):
    """``x @ weight.T + bias`` that keeps only the quantized weight for backward. The weight is frozen: it has no gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        if result_unneeded():
            return stand_in(x, len(weight))
        return _dequantized_matmul(x, weight, scale, bias)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _dequantized_gradient(grad_output, weight, scale)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_x, None, None, grad_bias


@dataclass(frozen=True, eq=False)
class QuantizedForward:
    """The forward of a quantized Linear. A method: the compiler compares bound methods by their function."""

    linear: nn.Linear
    compute_dtype: torch.dtype
    products: Float8Matmuls | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like any Linear it answers in the autocast dtype under autocast, else in x's dtype."""
        weight, scale, bias = self.linear.weight, weight_scale(self.linear), self.linear.bias
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.compute_dtype
        if self.products is not None and fits_float8_matmuls(x, weight, scale):
            out = fp8_linear(x.to(dtype), weight, scale, bias, self.products)
        else:
            out = _QuantizedLinear.apply(x.to(dtype), weight, scale, bias)
        return out if autocast else out.to(x.dtype)

    forward.only_multiplies = True  # see hunyuan_model.runtime.recomputation


def weight_scale(linear: nn.Module) -> torch.Tensor | None:
    """The scale beside a layer's weight, if it has one."""
    return getattr(linear, f"weight{SCALE_SUFFIX}", None)


def is_quantized(linear: nn.Linear) -> bool:
    """Whether a layer stores its weight in one byte per value."""
    return linear.weight.dtype in FP8_DTYPES or weight_scale(linear) is not None


def enable_quantized_linears(module: nn.Module, compute_dtype: torch.dtype, products: Float8Matmuls | None = None) -> int:
    """Give every ``nn.Linear`` in ``module`` that stores a quantized weight a forward which computes in ``compute_dtype``.

    Call it once after loading, before anything else wraps ``forward``. Under autocast the autocast dtype wins.

    Args:
        products: multiply float8 by float8, in this way, in the layers whose sizes and scales allow it.

    Returns:
        How many layers were found.
    """
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and is_quantized(layer)]
    for linear in linears:
        linear.weight.requires_grad_(False)
        linear.forward = QuantizedForward(linear, compute_dtype, products).forward
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
