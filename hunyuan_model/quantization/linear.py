"""Linear layers whose weights are stored in one byte each: half the memory of bfloat16, computed in a wider dtype.

A weight is stored as float8 alone, or as codes with scales beside it (``weight_scale``, a frozen parameter of the layer that
swapping and moving see like any other): float8 codes with one scale per output channel or per tensor, or whole numbers
-127..127 with one scale for each block of 64 inputs. The last is the most exact by far: a scale makes the wide range of
float8 superfluous, and whole numbers spend all their codes within it.

Weights stay narrow in memory. A layer widens its weight for its own matrix product, once in forward and once more in backward,
so that no wide copy outlives the product. The layers stay plain ``nn.Linear`` objects that read their weight and scale at every
call: what looks for layers by class, wraps ``forward`` on top, or points weights elsewhere, finds what it expects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hunyuan_model.quantization.custom_op import opaque
from hunyuan_model.quantization.scaled_mm import Products, fits_products, fp8_linear
from hunyuan_model.runtime.recomputation import result_unneeded, stand_in

FP8_DTYPE = torch.float8_e4m3fn
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_MAX = torch.finfo(FP8_DTYPE).max
INT8_MAX = 127
BLOCK = 64  # inputs that share a scale where codes are whole numbers
SCALE_SUFFIX = "_scale"
SLICE_ELEMENTS = 1 << 18  # what is quantised at once: its float32 copy stays in the cache

Quantised = tuple[torch.Tensor, torch.Tensor | None]
"""Codes of the weight's shape (out, in), and scales (out or 1, blocks of inputs), with which the codes are multiplied."""
Quantiser = Callable[[torch.Tensor], Quantised]

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


def quantise_plainly(weight: torch.Tensor) -> Quantised:
    """``weight`` cast to float8, without scales."""
    return cast(weight, FP8_DTYPE), None


def quantise_channels(weight: torch.Tensor) -> Quantised:
    """``weight`` (out, in) as float8 with a float32 scale (out, 1) for each output channel, as fp8 products take them."""
    codes = torch.empty(weight.shape, dtype=FP8_DTYPE, device=weight.device)
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    for rows in _row_slices(weight):
        part = weight[rows].float()
        largest = torch.linalg.vector_norm(part, torch.inf, dim=1, keepdim=True)
        scale[rows] = torch.where(largest == 0, 1.0, largest / FP8_MAX)
        codes[rows] = (part / scale[rows]).clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    return codes, scale


def quantise_blocks(weight: torch.Tensor, block: int = BLOCK) -> Quantised:
    """``weight`` (out, in) as int8 with a bfloat16 scale for each ``block`` inputs of a channel (all, if they do not divide).

    The codes are rounded with the scale as it is stored: that it has few digits costs nothing.
    """
    blocks = weight.shape[1] // block if weight.shape[1] % block == 0 else 1
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), blocks, dtype=torch.bfloat16, device=weight.device)
    for rows in _row_slices(weight):
        part = weight[rows].float().unflatten(1, (blocks, -1))
        scale[rows] = (part.abs().amax(2) / INT8_MAX).to(scale.dtype)
        steps = scale[rows].float()[:, :, None]
        steps.masked_fill_(steps == 0, 1.0)  # what is divided by it rounds to zero
        codes[rows] = (part / steps).round_().clamp_(-INT8_MAX, INT8_MAX).flatten(1)
    return codes, scale


def _row_slices(weight: torch.Tensor) -> Iterator[slice]:
    count = max(1, SLICE_ELEMENTS // weight.shape[1])
    return (slice(start, start + count) for start in range(0, len(weight), count))


def dequantise(weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """A stored weight (out, in) as the wide dtype it is computed in; ``scale`` is (out or 1, blocks of inputs) or None."""
    if scale is None:
        return weight.to(dtype)
    # Scales may be too small for float16.
    exact = torch.float32 if dtype == torch.float16 else dtype
    scale = scale.to(exact)[:, :, None]
    if weight.dtype in FP8_DTYPES:  # which no arithmetic takes
        return weight.to(exact).unflatten(1, (scale.shape[1], -1)).mul_(scale).flatten(1).to(dtype)
    return weight.unflatten(1, (scale.shape[1], -1)).mul(scale).flatten(1).to(dtype)


@opaque(lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))
def _widened_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, dequantise(weight, x.dtype, scale), None if bias is None else bias.to(x.dtype))


@opaque(lambda gradient, weight, scale: gradient.new_empty(*gradient.shape[:-1], weight.shape[1]))
def _widened_gradient(gradient: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return gradient.matmul(dequantise(weight, gradient.dtype, scale))


class _Fp8Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` that keeps only the narrow weight for backward. The weight is frozen: it has no gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        if result_unneeded():
            return stand_in(x, len(weight))
        return _widened_product(x, weight, scale, bias)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _widened_gradient(grad_output, weight, scale)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_x, None, None, grad_bias


@dataclass(frozen=True, eq=False)
class _NarrowForward:
    """The forward of a narrow Linear. A method, as the compiler tells functions apart that are bound in another way."""

    linear: nn.Linear
    compute_dtype: torch.dtype
    products: Products | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like any Linear it answers in the autocast dtype under autocast, else in x's dtype."""
        weight, scale, bias = self.linear.weight, weight_scale(self.linear), self.linear.bias
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.compute_dtype
        if self.products is not None and fits_products(x, weight, scale):
            out = fp8_linear(x.to(dtype), weight, scale, bias, self.products)
        else:
            out = _Fp8Linear.apply(x.to(dtype), weight, scale, bias)
        return out if autocast else out.to(x.dtype)

    forward.only_multiplies = True  # see hunyuan_model.runtime.recomputation


def weight_scale(linear: nn.Module) -> torch.Tensor | None:
    """The scale beside a layer's weight, if it has one."""
    return getattr(linear, f"weight{SCALE_SUFFIX}", None)


def is_narrow(linear: nn.Linear) -> bool:
    """Whether a layer stores its weight in one byte per value."""
    return linear.weight.dtype in FP8_DTYPES or weight_scale(linear) is not None


def enable_fp8_linears(module: nn.Module, compute_dtype: torch.dtype, products: Products | None = None) -> int:
    """Give every ``nn.Linear`` in ``module`` that stores a narrow weight a forward which computes in ``compute_dtype``.

    Call it once after loading, before anything else wraps ``forward``. Under autocast the autocast dtype wins.

    Args:
        products: multiply float8 by float8, in this way, in the layers whose sizes and scales allow it.

    Returns:
        How many layers were found.
    """
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and is_narrow(layer)]
    for linear in linears:
        linear.weight.requires_grad_(False)
        linear.forward = _NarrowForward(linear, compute_dtype, products).forward
    return len(linears)


def true_weight(linear: nn.Linear, device: torch.device | str | None = None) -> torch.Tensor:
    """What the stored weight of a layer stands for, a tensor on ``device``: wide weights as they are, narrow ones as float32."""
    weight, scale = linear.weight.detach().to(device or linear.weight.device), weight_scale(linear)
    if not is_narrow(linear):
        return weight
    return dequantise(weight, torch.float32, None if scale is None else scale.detach().to(weight.device))


def replace_weight(linear: nn.Linear, value: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Store ``value`` (out, in) as the weight of ``linear``: as ``dtype``, or in the way in which the weight is stored now."""
    weight, scale = linear.weight, weight_scale(linear)
    if scale is None or dtype is not None:
        weight.data = cast(value, dtype or weight.dtype).to(weight.device)
        if scale is not None:
            delattr(linear, f"weight{SCALE_SUFFIX}")
        return
    codes, new = quantise_channels(value) if weight.dtype in FP8_DTYPES else quantise_blocks(value)
    weight.data, scale.data = codes.to(weight.device), new.to(scale.device)
