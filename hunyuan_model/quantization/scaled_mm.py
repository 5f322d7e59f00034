"""Matmuls of float8 by float8, on GPUs that have them: twice the rate of bfloat16, but the activations are rounded too.

Forward, and the gradient of the input, of a Linear layer whose weight is stored as float8 (arXiv 2209.05433) and frozen.
Activations and gradients are quantized on the fly, with a scale per row where the GPU's kernel takes that, else with one for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hunyuan_model.quantization.custom_op import opaque
from hunyuan_model.transformer.fused import fused
from utils.errors import UserError

CODES = torch.float8_e4m3fn
LARGEST = torch.finfo(CODES).max
SMALLEST_ABSMAX = 1e-30  # rows of zeros have no scale of their own
ALIGNMENT = 16  # sides of a weight that the kernels take
CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Float8Matmuls:
    """How a device multiplies float8: with a scale for each row of the left and each column of the right matrix, or one each."""

    per_row: bool


def check_float8_matmuls(device: torch.device, flag: str) -> None:
    """Raise a UserError for a device that cannot multiply float8."""
    if device.type != "cuda":
        found = f"this runs on {device}"
    elif torch.version.hip is not None:
        found = "this torch is built for AMD"
    elif (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    else:
        return
    raise UserError(
        f"{flag} multiplies in float8, which takes an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), but "
        f"{found}; leave {flag} out."
    )


def find_float8_matmuls(device: torch.device) -> Float8Matmuls:
    """How ``device`` multiplies float8, found out by a product: older kernels have no scales per row, or fail in computing."""
    steps = torch.arange(ALIGNMENT**2, device=device).view(ALIGNMENT, ALIGNMENT)
    left, right = (steps % 5 - 2).float(), (steps % 7 - 3).float().t()  # small whole numbers, whose sums no dtype rounds
    rows = torch.exp2(torch.arange(ALIGNMENT, device=device) % 4 - 2.0)[:, None]
    columns = 1 / rows.t()
    try:
        product = _multiply(left.to(CODES), right.to(CODES), rows, columns.contiguous())
        return Float8Matmuls(per_row=torch.equal(product.float(), (left * rows) @ (right * columns)))  # waits for the device
    except (RuntimeError, ValueError):
        return Float8Matmuls(per_row=False)


def fits_float8_matmuls(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether the kernels take this layer: float8, sides that are multiples of 16, at most one scale for each output channel."""
    aligned = all(side % ALIGNMENT == 0 for side in weight.shape)
    return weight.dtype == CODES and aligned and (scale is None or scale.shape[1] == 1) and x.numel() > 0


def float8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, matmuls: Float8Matmuls
) -> torch.Tensor:
    """``x @ (weight * scale).T + bias`` in float8: (..., out) in the dtype of x, with the digits of bfloat16.

    Args:
        x: (..., in); rounded to bfloat16 first.
        weight: (out, in) float8_e4m3fn, with ``scale`` (out or 1, 1) or None.
    """
    channels = None if scale is None else scale.float().expand(len(weight), 1).t()  # (1, out)
    codes = quantize(x.reshape(-1, x.shape[-1]), None, matmuls.per_row)
    out = _matmul(*codes, weight.t(), channels, bias, matmuls.per_row)
    return out.view(*x.shape[:-1], -1).to(x.dtype)


def float8_input_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, matmuls: Float8Matmuls
) -> torch.Tensor:
    """The gradient of ``float8_linear`` for x, computed in float8 too, from that of its result."""
    rows = _gradient(gradient.reshape(-1, gradient.shape[-1]), weight, scale, matmuls.per_row)
    return rows.view(*gradient.shape[:-1], -1).to(gradient.dtype)


@opaque(lambda rows, weight, scale, per_row: rows.new_empty(rows.shape[0], weight.shape[1], dtype=torch.bfloat16))
def _gradient(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, per_row: bool) -> torch.Tensor:
    """That of the input, (M, in) bfloat16, from that of the result, (M, out)."""
    # The channels of the weight are summed over here, so their scales belong to the gradient.
    codes = quantize(rows, None if scale is None else scale.t(), per_row)
    return _matmul(*codes, column_major(weight), None, None, per_row)


def column_major(weight: torch.Tensor) -> torch.Tensor:
    """float8 ``weight`` in the only layout in which the kernels take the right matrix.

    A copy for each product: that takes 2 % of an image's step or less, and keeping the copies as much memory as the weights.
    """
    return _transposed(weight.view(torch.uint8)).view(weight.dtype).t()


@fused((0,))
def _transposed(codes: torch.Tensor) -> torch.Tensor:
    return codes.t().contiguous()


def _matmul(
    codes: torch.Tensor,
    scale: torch.Tensor,
    right: torch.Tensor,
    channels: torch.Tensor | None,
    bias: torch.Tensor | None,
    per_row: bool,
) -> torch.Tensor:
    """What ``quantize`` gives of (M, K) by float8 ``right`` (K, N), each column times ``channels`` (1, N) or 1: (M, N) bfloat16."""
    bias = None if bias is None else bias.to(torch.bfloat16)
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    if per_row:
        columns = one.expand(1, right.shape[1]) if channels is None else channels
        return _multiply(codes, right, scale, columns.contiguous(), bias)
    if channels is None:
        return _multiply(codes, right, scale, one, bias)
    out = _multiply(codes, right, scale, one)
    channels = channels.to(out.dtype)
    return out * channels if bias is None else torch.addcmul(bias, out, channels)


@fused((0,), (1,))
def quantize(x: torch.Tensor, channels: torch.Tensor | None, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K), rounded to bfloat16, times ``channels`` (1, K or 1) or 1, as float8.

    Returns:
        Codes (M, K), and the float32 scale, (M, 1) or (), that they are to be multiplied with.
    """
    x = x.to(torch.bfloat16)
    if channels is not None:
        x = x * channels.to(x.dtype)
    absmax = torch.linalg.vector_norm(x, torch.inf, dim=1 if per_row else (0, 1), keepdim=per_row, dtype=torch.float32)
    factor = (LARGEST / absmax.clamp(min=SMALLEST_ABSMAX)).to(x.dtype)  # as it is applied; its rounding stays below the next code
    return (x * factor).to(CODES), factor.float().reciprocal()


def _multiply(
    left: torch.Tensor, right: torch.Tensor, left_scale: torch.Tensor, right_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    # Exact sums would halve the rate on consumer GPUs, and gain far less than the rounding of the codes loses.
    return torch._scaled_mm(
        left, right, scale_a=left_scale, scale_b=right_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
