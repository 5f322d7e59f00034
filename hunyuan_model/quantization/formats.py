"""How the Linear weights of the blocks are stored: full precision, or one byte for each weight with or without scales.

Codes have the weight's shape (out, in). Scales have the shape (out or 1, groups of inputs); a weight is its codes times its scales.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

import torch

from hunyuan_model.transformer.fused import fused


class WeightFormat(str, Enum):
    """Storage of the Linear weights of the transformer's blocks; everything else keeps full precision.

    PLAIN: as loaded. FP8: cast to float8_e4m3fn. FP8_SCALED: float8_e4m3fn with a float32 scale for each output channel.
    INT8: whole numbers -127..127 with a bfloat16 scale for each 64 inputs of an output channel, the closest to the original.
    """

    PLAIN = "plain"
    FP8 = "fp8"
    FP8_SCALED = "fp8_scaled"
    INT8 = "int8"

    @property
    def is_float8(self) -> bool:
        return self in (WeightFormat.FP8, WeightFormat.FP8_SCALED)

    @property
    def quantizer(self) -> Quantizer:
        """What makes codes and scales from a weight (out, in)."""
        return {WeightFormat.INT8: quantize_groups, WeightFormat.FP8_SCALED: quantize_channels}.get(self, cast_to_float8)


FP8_DTYPE = torch.float8_e4m3fn
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_MAX = torch.finfo(FP8_DTYPE).max
INT8_MAX = 127
GROUP = 64  # inputs that share a scale of INT8
SCALE_SUFFIX = "_scale"
SMALL_SLICE_ELEMENTS = 1 << 15  # torch does not share them out to threads, whose waiting takes longer
DEVICE_SLICE_ELEMENTS = 1 << 24  # on GPUs, where each slice costs several launches
SLICE_ELEMENTS = 1 << 18  # what is quantized at once: its float32 copy stays in the cache

Quantized = tuple[torch.Tensor, torch.Tensor | None]
"""Codes of the weight's shape (out, in), and scales (out or 1, groups of inputs), with which the codes are multiplied."""
Quantizer = Callable[[torch.Tensor], Quantized]

# The modulation layers steer every token at once and the norms are tiny: both keep full precision.
_QUANTIZED = re.compile(r"(double|single)_blocks\.\d+\.(?!.*(_mod|modulation|norm)\.).+\.weight")


def is_quantized_name(name: str) -> bool:
    """Whether the transformer parameter ``name`` is quantized: Linear weights of the blocks, modulation excepted."""
    return _QUANTIZED.fullmatch(name) is not None


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` as ``dtype``; values beyond the range of a float8 dtype become its largest instead of NaN."""
    if tensor.dtype == dtype or dtype not in FP8_DTYPES or not tensor.numel():
        return tensor.to(dtype)
    exact = tensor.float() if tensor.dtype in FP8_DTYPES else tensor
    # Older torch versions turn what is out of range into NaN. Weights seldom need the clamp, and it would cost a copy.
    low, high = torch.aminmax(exact)
    limit = torch.finfo(dtype).max
    return (exact.clamp(-limit, limit) if low < -limit or high > limit else exact).to(dtype)


def cast_to_float8(weight: torch.Tensor) -> Quantized:
    return cast(weight, FP8_DTYPE), None


def quantize_channels(weight: torch.Tensor) -> Quantized:
    """``weight`` (out, in) as float8 with a float32 scale (out, 1) for each output channel, as float8 matmuls take them."""
    codes = torch.empty(weight.shape, dtype=FP8_DTYPE, device=weight.device)
    scale = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    for rows in _row_slices(weight):
        part = weight[rows].float()
        largest = part.abs().amax(1, keepdim=True)  # which the CPU computes ten times as fast as a norm
        scale[rows] = torch.where(largest == 0, 1.0, largest / FP8_MAX)
        codes[rows] = (part / scale[rows]).clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    return codes, scale


def quantize_groups(weight: torch.Tensor, group: int = GROUP) -> Quantized:
    """``weight`` (out, in) as int8 with a bfloat16 scale for each ``group`` inputs of a channel (all, if they do not divide).

    The codes are rounded with the scale as it is stored: that it has few digits costs nothing.
    """
    groups = weight.shape[1] // group if weight.shape[1] % group == 0 else 1
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), groups, dtype=torch.bfloat16, device=weight.device)

    def quantize(slices: Sequence[slice]) -> None:
        values, magnitudes = (torch.empty(0, device=weight.device) for _ in range(2))  # which every slice uses again
        for rows in slices:
            stored = weight.detach()[rows].unflatten(1, (groups, -1))
            values.resize_(stored.shape).copy_(stored)
            torch.abs(values, out=magnitudes.resize_(stored.shape))
            scale[rows] = magnitudes.amax(2).div_(INT8_MAX).to(scale.dtype)
            steps = scale[rows].float()[:, :, None]
            steps.masked_fill_(steps == 0, 1.0)  # what is divided by it rounds to zero
            codes[rows] = values.div_(steps).round_().clamp_(-INT8_MAX, INT8_MAX).flatten(1)

    _in_threads(quantize, list(_row_slices(weight)), weight.device)
    return codes, scale


def _in_threads(work: Callable[[Sequence[slice]], None], slices: Sequence[slice], device: torch.device) -> None:
    """``work`` on the CPU in as many threads as torch has, each with a share of the slices: threads within a slice, which is small,
    would wait for each other in every operation."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(slices) < 2 * threads:
        work(slices)
        return

    inference = torch.is_inference_mode_enabled()  # which each thread has for itself

    def alone(share: Sequence[slice]) -> None:
        torch.set_num_threads(1)  # of this thread
        with torch.inference_mode(inference):
            work(share)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(alone, (slices[first::threads] for first in range(threads))))
    torch.set_num_threads(threads)  # of threads that begin later


def _row_slices(weight: torch.Tensor, elements: int = SLICE_ELEMENTS) -> Iterator[slice]:
    count = max(1, (elements if weight.device.type == "cpu" else DEVICE_SLICE_ELEMENTS) // weight.shape[1])
    return (slice(start, start + count) for start in range(0, len(weight), count))


def dequantize_stored(weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """As ``dequantize``, with the product in float32 whatever ``dtype`` is, and without a float32 copy of the whole weight."""
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    by_table = weight.device.type == "cpu" and weight.dtype in FP8_DTYPES  # four times as fast as the conversion
    table = torch.arange(256, dtype=torch.uint8).view(weight.dtype).float() if by_table else None
    for rows in _row_slices(weight, SMALL_SLICE_ELEMENTS):
        part, scale_of_part = weight[rows], scale if len(scale) == 1 else scale[rows]
        if by_table:
            part = table.index_select(0, part.reshape(-1).view(torch.uint8).int()).view(part.shape)
        values[rows] = dequantize(part.float(), torch.float32, scale_of_part)
    return values


def dequantize(weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """A stored weight (out, in) in the ``dtype`` it is computed in; ``scale`` is (out or 1, groups of inputs) or None."""
    return weight.to(dtype) if scale is None else _scaled(weight, scale, dtype)


@fused((0,), (0,))
def _scaled(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Scales may be too small for float16.
    exact = torch.float32 if dtype == torch.float16 else dtype
    scale = scale.to(exact)[:, :, None]
    if weight.dtype in FP8_DTYPES:  # which no arithmetic takes
        return weight.to(exact).unflatten(1, (scale.shape[1], -1)).mul_(scale).flatten(1).to(dtype)
    return weight.unflatten(1, (scale.shape[1], -1)).mul(scale).flatten(1).to(dtype)
