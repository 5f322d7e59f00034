"""Memory of the transformer in bytes, by arithmetic: its weights, and what a batch needs beside them.

Activations follow from what ``blocks.py`` keeps for a backward pass through a LoRA on every Linear layer of the blocks. What is
small beside that (the inner side of a LoRA, statistics of norms) is left out. Compiled blocks keep less.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from hunyuan_model.quantization.formats import GROUP, WeightFormat, is_quantized_name
from hunyuan_model.runtime.device_split import Share
from hunyuan_model.runtime.offload.activation_offload import ON_DEVICE
from hunyuan_model.runtime.offload.block_swap import SLOTS, on_host
from hunyuan_model.runtime.offload.host_weights import ALIGNMENT
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.runtime.sharding import GATHERED_BLOCKS
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer

FLOAT32 = 4


@dataclass(frozen=True)
class BatchSize:
    """A batch as the transformer meets it.

    Attributes:
        samples: how many.
        size: of their latents, (F, H, W).
        text_tokens: of the longest caption.
    """

    samples: int
    size: tuple[int, int, int]
    text_tokens: int

    def image_tokens(self, config: TransformerConfig) -> int:
        """Of one sample."""
        return math.prod(side // patch for side, patch in zip(self.size, config.patch_size))

    def tokens(self, config: TransformerConfig) -> int:
        """Of all samples, image and text."""
        return self.samples * (self.image_tokens(config) + max(1, self.text_tokens))


class WeightBytes(NamedTuple):
    """Of the transformer's weights.

    Attributes:
        resident: on the device for good.
        slots: on the device, room for swapped blocks, or for what is gathered of sharded weights.
        host: of swapped weights, or of the shards that are kept there, in host memory.
        dequantized: the largest copy that is made of one weight for its matmul; 0 where none is.
    """

    resident: int
    slots: int
    host: int
    dequantized: int


@lru_cache
def weight_bytes(
    config: TransformerConfig, dtype: torch.dtype, runtime: RuntimeSettings, share: Share | None = None
) -> WeightBytes:
    """Where the weights are, and how large; those that are not quantized have ``dtype``.

    Args:
        share: only what is on this device; None for all.

    Raises:
        UserError: see ``check_blocks_to_swap``.
    """
    is_on_host, parts, largest = on_host(runtime.swap, config), *_part_bytes(config, dtype, runtime.weights)
    parts = {part: size for part, size in parts.items() if share is None or share.has(part, config)}
    if runtime.fp8_fast:
        itemsize = 1  # transposed, for the backward pass
    else:  # scales may be too small for float16, so the product of codes and scales is made in float32
        itemsize = dtype.itemsize + (FLOAT32 if dtype == torch.float16 and runtime.weights is not WeightFormat.FP8 else 0)
    blocks = [part for part in parts if "_blocks." in part]
    if runtime.sharding is not None:
        whole = sum(size.plain for size in parts.values())
        shard, rest = -(-whole // runtime.sharding.processes), whole - sum(parts[part].plain for part in blocks)
        gathered = rest + GATHERED_BLOCKS * max(parts[part].plain for part in blocks)
        resident, host = (0, shard) if runtime.sharding.offload else (shard, 0)
        return WeightBytes(resident, gathered, host, largest * itemsize)
    swapped = {part: size.aligned for part, size in parts.items() if is_on_host(f"{part}.")}
    slots = SLOTS * max((swapped[part] for part in blocks if part in swapped), default=0)
    resident = sum(size.plain for part, size in parts.items() if part not in swapped)
    return WeightBytes(resident, slots, sum(swapped.values()), largest * itemsize)


class _PartBytes(NamedTuple):
    """Of the weights of a block, or of what is in none; ``aligned``: as they lie in one piece."""

    plain: int
    aligned: int


@lru_cache
def _part_bytes(config: TransformerConfig, dtype: torch.dtype, weights: WeightFormat) -> tuple[dict[str, _PartBytes], int]:
    """Bytes by the names of modules, and the numbers in the largest weight that is quantized, 0 without one."""
    parts, largest = {}, 0
    for name, shape in weight_shapes(config).items():
        count = shape.numel()
        size = count * dtype.itemsize
        if weights is not WeightFormat.PLAIN and is_quantized_name(name):
            largest = max(largest, count)
            size = count
            if weights is WeightFormat.FP8_SCALED:
                size += FLOAT32 * shape[0]
            elif weights is WeightFormat.INT8:
                size += torch.bfloat16.itemsize * (count // GROUP if shape[1] % GROUP == 0 else shape[0])
        part = _part_of(name)
        before = parts.get(part, _PartBytes(0, 0))
        parts[part] = _PartBytes(before.plain + size, before.aligned + -(-size // ALIGNMENT) * ALIGNMENT)
    return parts, largest


@lru_cache
def trained_share(config: TransformerConfig, share: Share) -> float:
    """The part of a LoRA on every Linear layer of the blocks that is on a device: ranks are the same everywhere."""
    sides = _part_sides(config)
    return sum(size for part, size in sides.items() if share.has(part, config)) / max(1, sides.total())


@lru_cache
def _part_sides(config: TransformerConfig) -> Counter[str]:
    """By block, the sides of its Linear layers that are quantized: as many values has a LoRA of rank 1."""
    sides: Counter[str] = Counter()
    for name, shape in weight_shapes(config).items():
        if is_quantized_name(name):
            sides[_part_of(name)] += sum(shape)
    return sides


def _part_of(name: str) -> str:
    words = name.split(".")
    return ".".join(words[:2]) if words[0].endswith("_blocks") else words[0]


@lru_cache
def weight_shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    """Of the transformer's parameters, by their names."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in HYVideoDiffusionTransformer(config).state_dict().items()}


class ActivationBytes(NamedTuple):
    """What a batch needs at the peak of its step.

    Attributes:
        inputs: of the blocks, on the device.
        host_inputs: of the blocks, in host memory, and what is kept of their attention there.
        attention: what is kept of the attention of blocks beside it, on the device.
        kept: by the blocks for their backward passes: by all of them, or with checkpointing by one.
        working: temporary memory beside it.
    """

    inputs: int
    host_inputs: int
    attention: int
    kept: int
    working: int

    @property
    def device(self) -> int:
        return self.inputs + self.attention + self.kept + self.working


def training_activations(
    config: TransformerConfig,
    batch: BatchSize,
    dtype: torch.dtype,
    runtime: RuntimeSettings,
    network_values: int = 0,
    dequantized: int = 0,
) -> ActivationBytes:
    """Of a forward and a backward pass, without the loss.

    Args:
        dtype: of the activations.
        network_values: numbers in the trained network.
        dequantized: see ``WeightBytes``.
    """
    hidden, mlp = config.hidden_size, config.mlp_size
    value = batch.tokens(config) * dtype.itemsize  # bytes of one number for each token
    # Inputs of qkv, fc1, fc2 and GELU; of the second norm; q and k before (3: parts of qkv's output) and after their norms, with
    # v; the attention's output, which is copied where the rows of a sample's image and text are no neighbours.
    double = (10 + (batch.samples > 1)) * hidden + 2 * mlp
    # Inputs of linear1 and linear2; the output of linear1; rotated q and k; the attention's output.
    single = 8 * hidden + 2 * mlp
    # In a backward pass: the gradient of the widest layer's input, while its weight is dequantized, or with the one that GELU makes
    # of it; and the gradients of the block's input.
    widest_double, widest_single = value * mlp, value * (hidden + mlp)
    double_working = widest_double + max(widest_double, dequantized) + 2 * value * hidden
    single_working = widest_single + max(widest_single, dequantized) + value * hidden
    depth = config.double_depth + config.single_depth
    final = value * hidden  # the input of the final layer
    if not runtime.gradient_checkpointing:
        kept = value * (config.double_depth * double + config.single_depth * single)
        kept += network_values * dtype.itemsize if dtype.itemsize < FLOAT32 else 0  # the network is float32: copies in ``dtype``
        working = single_working if config.single_depth else double_working
        return ActivationBytes(depth * value * hidden + final, 0, 0, kept, working)
    # The peak is in the backward pass of the last single block or of the last double block, where fewer inputs are left.
    peaks = [(config.double_depth, value * double, double_working), (depth, value * single, single_working)]
    peaks = [peak for peak, count in zip(peaks, (config.double_depth, config.single_depth)) if count]
    # Of each block's attention the output and, for each token and head, the log-sum-exp.
    results = value * hidden + batch.tokens(config) * config.heads * FLOAT32 if runtime.keep_attention is True else 0
    left, kept, working = max(peaks, key=lambda peak: peak[0] * (value * hidden + results) + peak[1] + peak[2])
    offload = runtime.gradient_checkpointing_cpu_offload
    left = min(left, ON_DEVICE) if offload else left
    attention = left * results - (value * hidden if results else 0)  # the output of the block that computes is in ``kept``
    host = depth * (value * hidden + results) if offload else 0
    return ActivationBytes(left * value * hidden + final, host, attention, kept, working)


def sampling_activations(
    config: TransformerConfig,
    batch: BatchSize,
    dtype: torch.dtype,
    dequantized: int = 0,
    *,
    injected: bool = False,
    processes: int = 1,
) -> int:
    """Of one forward pass without a backward pass.

    Args:
        injected: with LoRA that is computed beside what Linear layers give.
        processes: that compute the batch together, see ``sequence_parallel``.
    """
    hidden, mlp = config.hidden_size, config.mlp_size
    # Before linear2: tokens, linear1's output, the attention's output, and linear2's input.
    single = 6 * hidden + 2 * mlp
    if injected:  # In linear1: tokens, their norm, linear1's output and the LoRA's.
        single = max(single, 8 * hidden + 2 * mlp)
    # In the attention: tokens, qkv, q and k, all three joined with the text's, the result, and the kernel's work space.
    # In the MLP: tokens twice, the attention's output, their norm, fc1's output and its GELU.
    double = max(12 * hidden, 4 * hidden + 2 * mlp)
    image_tokens = embedded = batch.image_tokens(config)
    if processes > 1:
        # With q, k and v for the own heads, and one of them on its way. The first double block's input is still that of all.
        image_tokens = -(-image_tokens // processes)
        double, single = max(double, 12 * hidden + 2 * hidden), max(single, 10 * hidden + mlp)
    tokens = image_tokens + max(1, batch.text_tokens)
    of_single = tokens * single if config.single_depth else 0
    of_double = tokens * double + (embedded - image_tokens) * hidden if config.double_depth else 0
    return max(of_single, of_double) * batch.samples * dtype.itemsize + dequantized


def table_bytes(config: TransformerConfig, batch: BatchSize) -> int:
    """Of the RoPE tables for one size, float32."""
    rows = batch.image_tokens(config) + max(1, batch.text_tokens)
    return rows * config.head_dim * FLOAT32


def loss_bytes(config: TransformerConfig, batch: BatchSize) -> int:
    """Of latents, noise, their mixture, the target, the velocity, and the loss with its gradients, float32."""
    return 8 * FLOAT32 * batch.samples * config.in_channels * math.prod(batch.size)
