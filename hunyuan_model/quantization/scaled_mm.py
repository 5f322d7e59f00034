"""Matrix products of float8 by float8, on cards that have them: twice the rate of bfloat16, for a rounding of the activations.

Forward, and the gradient of the input, of a Linear layer whose weight is stored as float8. Activations and gradients are
scaled and rounded as they come, each row by its largest value where the card's kernel takes a scale per row (else all by
one): nothing waits for the device. The layer's own gradients do not exist: its weight is frozen.

Formats and scaling: Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hunyuan_model.quantization.custom_op import opaque
from hunyuan_model.runtime.recomputation import result_unneeded, stand_in
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
    """Refuse a device that cannot multiply float8.

    Raises:
        UserError: names ``flag``, the device, and what it takes.
    """
    wanted = f"{flag} multiplies in float8, which takes an NVIDIA card of compute capability 8.9 or later (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        raise UserError(f"{wanted}, but this runs on {device}; leave {flag} out.")
    if torch.version.hip is not None:
        raise UserError(f"{wanted}, but this torch is built for AMD; leave {flag} out.")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise UserError(
            f"{wanted}, but {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; leave {flag} out."
        )


def find_float8_matmuls(device: torch.device) -> Float8Matmuls:
    """How ``device`` multiplies float8, found out by trying: scales per row came later than the products themselves."""
    left = torch.ones(ALIGNMENT, ALIGNMENT, device=device).to(CODES)
    ones = torch.ones(ALIGNMENT, 1, device=device)
    try:
        _multiply(left, left.t(), ones, ones.t())
    except (RuntimeError, ValueError):
        return Float8Matmuls(per_row=False)
    return Float8Matmuls(per_row=True)


def fits_float8_matmuls(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether the kernels take this layer: float8, sides that are multiples of 16, at most one scale for each output channel."""
    aligned = all(side % ALIGNMENT == 0 for side in weight.shape)
    return weight.dtype == CODES and aligned and (scale is None or scale.shape[1] == 1) and x.numel() > 0


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, products: Float8Matmuls
) -> torch.Tensor:
    """``x @ (weight * scale).T + bias`` in float8, with a gradient for x that is computed in float8 too.

    Args:
        x: (..., in); rounded to bfloat16 first, whatever it is.
        weight: (out, in) float8_e4m3fn, with ``scale`` (out or 1, 1) or None.

    Returns:
        (..., out) in the dtype of x, with the digits of bfloat16.
    """
    return _Float8Linear.apply(x, weight, scale, bias, products.per_row)


class _Float8Linear(torch.autograd.Function):
    """Keeps only the stored weight and its scale for backward."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, per_row: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.per_row = per_row
        if result_unneeded():
            return stand_in(x, len(weight))
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        channels = None if scale is None else scale.float().expand(len(weight), 1).t()  # (1, out)
        out = _product(rows, weight.t(), channels, bias, per_row)
        return out.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = _gradient(rows, weight, scale, ctx.per_row)
            grad_x = grad_x.view(*grad_output.shape[:-1], -1).to(grad_output.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)
        return grad_x, None, None, grad_bias, None


@opaque(lambda rows, weight, scale, per_row: rows.new_empty(rows.shape[0], weight.shape[1], dtype=torch.bfloat16))
def _gradient(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, per_row: bool) -> torch.Tensor:
    """That of the input, (M, in) bfloat16, from that of the result, (M, out)."""
    scaled = rows.to(torch.bfloat16)
    if scale is not None:  # the channels of the weight are summed over here, so their scales belong to the gradient
        scaled = scaled * scale.t().to(scaled.dtype)
    columns = weight.t().contiguous().t()  # the kernels take the right matrix column by column only
    return _product(scaled, columns, None, None, per_row)


def _product(
    rows: torch.Tensor, right: torch.Tensor, channels: torch.Tensor | None, bias: torch.Tensor | None, per_row: bool
) -> torch.Tensor:
    """``rows`` (M, K) bfloat16 by float8 ``right`` (K, N), each column times ``channels`` (1, N) or 1: (M, N) bfloat16."""
    codes, scale = _quantise(rows, per_row)
    bias = None if bias is None else bias.to(torch.bfloat16)
    one = torch.ones((), dtype=torch.float32, device=rows.device)
    if per_row:
        columns = one.expand(1, right.shape[1]) if channels is None else channels
        return _multiply(codes, right, scale, columns.contiguous(), bias)
    if channels is None:
        return _multiply(codes, right, scale, one, bias)
    out = _multiply(codes, right, scale, one)
    channels = channels.to(out.dtype)
    return out * channels if bias is None else torch.addcmul(bias, out, channels)


def _quantise(x: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 (M, K) as float8 codes and the float32 scale, (M, 1) or (), that they are to be multiplied with."""
    absmax = torch.linalg.vector_norm(x, torch.inf, dim=1 if per_row else (0, 1), keepdim=per_row, dtype=torch.float32)
    factor = (LARGEST / absmax.clamp(min=SMALLEST_ABSMAX)).to(x.dtype)  # as it is applied; its rounding stays below the next code
    return (x * factor).to(CODES), factor.float().reciprocal()


def _multiply(
    left: torch.Tensor, right: torch.Tensor, left_scale: torch.Tensor, right_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    # Exact sums would halve the rate on consumer cards; what they would gain is far below the rounding of the codes.
    return torch._scaled_mm(
        left, right, scale_a=left_scale, scale_b=right_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
