"""What the transformer takes in memory, by arithmetic, in bytes: its weights, and what a batch needs beside them.

Activations follow from what ``blocks.py`` keeps for a backward pass through LoRA on every linear layer of the blocks. The
numbers of a token are added up below in the order in which a block makes them. Compiled blocks keep less than these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from hunyuan_model.quantization.formats import GROUP, WeightFormat, is_quantized_name
from hunyuan_model.runtime.block_swap import SLOTS, on_host
from hunyuan_model.runtime.host_weights import ALIGNMENT
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from hunyuan_model.transformer.rope import TEXT_ROWS_STEP

FLOAT32 = 4
INPUTS_IN_FLIGHT = 2  # block inputs on the device where the others wait in host memory: one is used, one comes or goes


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


@dataclass(frozen=True)
class WeightBytes:
    """Of the transformer's weights.

    Attributes:
        resident: on the device for good.
        slots: on the device, room for swapped blocks.
        host: of swapped weights, in host memory.
        dequantized: the largest copy that is made of one weight for its matmul; 0 where none is.
    """

    resident: int
    slots: int
    host: int
    dequantized: int


@lru_cache
def weight_bytes(config: TransformerConfig, dtype: torch.dtype, runtime: RuntimeSettings) -> WeightBytes:
    """Where the weights are, and how large.

    Raises:
        UserError: see ``check_blocks_to_swap``.
    """
    away = on_host(runtime.swap, config)
    resident = host = dequantized = 0
    streamed: dict[str, int] = {}
    for name, shape in _shapes(config).items():
        size = _stored_bytes(name, shape, dtype, runtime)
        if not away(name):
            resident += size
        else:
            size = -(-size // ALIGNMENT) * ALIGNMENT
            host += size
            owner = ".".join(name.split(".")[:2])
            if "blocks" in owner:
                streamed[owner] = streamed.get(owner, 0) + size
        if runtime.weights is not WeightFormat.PLAIN and is_quantized_name(name):
            dequantized = max(dequantized, math.prod(shape) * _dequantized_itemsize(dtype, runtime))
    slots = SLOTS * max(streamed.values(), default=0)
    return WeightBytes(resident, slots, host, dequantized)


@lru_cache
def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in HYVideoDiffusionTransformer(config).state_dict().items()}


def _stored_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, runtime: RuntimeSettings) -> int:
    if runtime.weights is WeightFormat.PLAIN or not is_quantized_name(name):
        return math.prod(shape) * dtype.itemsize
    scales = 0
    if runtime.weights is WeightFormat.FP8_SCALED:
        scales = FLOAT32 * shape[0]
    elif runtime.weights is WeightFormat.INT8:
        scales = torch.bfloat16.itemsize * shape[0] * (shape[1] // GROUP if shape[1] % GROUP == 0 else 1)
    return math.prod(shape) + scales


def _dequantized_itemsize(dtype: torch.dtype, runtime: RuntimeSettings) -> int:
    """Bytes per value of the copies of a weight that exist at once while it is dequantized."""
    if runtime.fp8_fast:
        return 1  # transposed, for the backward pass
    return dtype.itemsize + (FLOAT32 if runtime.weights is not WeightFormat.FP8 and dtype == torch.float16 else 0)


@dataclass(frozen=True)
class Computation:
    """How a batch is computed.

    Attributes:
        dtype: of the activations.
        checkpointing: whether blocks are computed again in the backward pass.
        inputs_on_host: whether block inputs wait for it in host memory.
        network_values: numbers in what is trained, spread over the linear layers of the blocks as LoRA is.
    """

    dtype: torch.dtype
    checkpointing: bool = False
    inputs_on_host: bool = False
    network_values: int = 0


@dataclass(frozen=True)
class ActivationBytes:
    """What a batch needs at the peak of its step.

    Attributes:
        inputs: of the blocks, on the device.
        host_inputs: of the blocks, in host memory.
        kept: by the blocks for their backward passes: by all of them, or with checkpointing by one.
        working: what comes and goes beside it.
    """

    inputs: int
    host_inputs: int
    kept: int
    working: int

    @property
    def device(self) -> int:
        return self.inputs + self.kept + self.working


def training_activations(config: TransformerConfig, batch: BatchSize, how: Computation, dequantized: int = 0) -> ActivationBytes:
    """Of a forward and a backward pass, without the loss; the peak is in the last block's backward pass.

    Args:
        dequantized: see ``WeightBytes``.
    """
    tokens = batch.tokens(config)
    one_input = _residual_bytes(config, how) * tokens
    blocks = config.double_depth + config.single_depth
    kept_by_double = _kept_by_double(config, how, batch.samples) * tokens
    kept_by_single = _kept_by_single(config, how) * tokens
    copies = _copies_of_network(how)
    work_of_double = _work_of_backward(tokens, how, config.mlp_size, dequantized) + 2 * one_input
    work_of_single = _work_of_backward(tokens, how, config.hidden_size + config.mlp_size, dequantized) + one_input
    if not how.checkpointing:
        inputs = blocks * one_input
        kept = config.double_depth * kept_by_double + config.single_depth * kept_by_single + copies
        return ActivationBytes(
            inputs + _last(config, how) * tokens, 0, kept, work_of_single if config.single_depth else work_of_double
        )
    copies //= max(1, blocks)
    phases = [(config.double_depth, kept_by_double + copies, work_of_double), (blocks, kept_by_single + copies, work_of_single)]
    depth, kept, working = max(
        phases if config.single_depth else phases[:1], key=lambda phase: phase[0] * one_input + phase[1] + phase[2]
    )
    inputs = depth * one_input + _last(config, how) * tokens
    if not how.inputs_on_host:
        return ActivationBytes(inputs, 0, kept, working)
    on_device = min(inputs, INPUTS_IN_FLIGHT * one_input + _last(config, how) * tokens)
    return ActivationBytes(on_device, blocks * one_input, kept, working)


def sampling_activations(
    config: TransformerConfig, batch: BatchSize, dtype: torch.dtype, dequantized: int = 0, *, network: bool = False
) -> int:
    """Of one forward pass without a backward pass; ``network`` says that a LoRA computes beside the layers."""
    hidden, mlp = config.hidden_size, config.mlp_size
    # Before linear2: tokens, what linear1 gives, attended, and linear2's input.
    single = 6 * hidden + 2 * mlp
    if network:  # In linear1: tokens, their norm, what linear1 gives and what is added to it.
        single = max(single, 8 * hidden + 2 * mlp)
    # In the attention: tokens, qkv, q and k, all three joined with the text's, the result, and what the kernel works with.
    # In the MLP: tokens twice, attended, their norm, what fc1 gives and its GELU.
    double = max(12 * hidden, 4 * hidden + 2 * mlp)
    return max(single if config.single_depth else 0, double) * dtype.itemsize * batch.tokens(config) + dequantized


def table_bytes(config: TransformerConfig, batch: BatchSize) -> int:
    """Of the rotation tables for one size, float32."""
    rows = batch.image_tokens(config) + -(-max(1, batch.text_tokens) // TEXT_ROWS_STEP) * TEXT_ROWS_STEP
    return rows * config.head_dim * FLOAT32


def loss_bytes(config: TransformerConfig, batch: BatchSize) -> int:
    """Of latents, noise, their mixture, the target, the velocity, and the loss with its gradients, float32."""
    return 8 * FLOAT32 * batch.samples * config.in_channels * math.prod(batch.size)


def _residual_bytes(config: TransformerConfig, how: Computation) -> int:
    return config.hidden_size * how.dtype.itemsize


def _last(config: TransformerConfig, how: Computation) -> int:
    """Bytes per token of what the final layer keeps."""
    return config.hidden_size * how.dtype.itemsize


def _kept_by_double(config: TransformerConfig, how: Computation, samples: int) -> int:
    """Bytes per token that a double block keeps, its input excepted."""
    hidden, mlp, item = config.hidden_size, config.mlp_size, how.dtype.itemsize
    norms = item * hidden  # the input of the second one
    linears = item * (hidden + hidden + mlp)  # inputs of qkv, fc1 and fc2
    q_and_k = 3 * item * hidden  # as their norms read them: parts of what qkv gives
    attention = item * (3 + 1) * hidden  # q, k and v of image and text in one piece, and the result, which proj reads
    copy = item * hidden if samples > 1 else 0  # of that result, as the rows of one sample's image and text are neighbours
    return norms + linears + q_and_k + attention + copy + item * mlp + _small(config, how, linears=4, norms=2)


def _kept_by_single(config: TransformerConfig, how: Computation) -> int:
    """Bytes per token that a single block keeps, its input excepted."""
    hidden, mlp, item = config.hidden_size, config.mlp_size, how.dtype.itemsize
    linears = item * (hidden + hidden + mlp)  # inputs of linear1 and linear2
    output = item * (3 * hidden + mlp)  # of linear1, of which v, what q's and k's norms read and what the GELU reads are parts
    q_and_k = 2 * item * hidden  # rotated
    return linears + output + q_and_k + item * hidden + _small(config, how, linears=2, norms=1)


def _small(config: TransformerConfig, how: Computation, linears: int, norms: int) -> int:
    """Of the inner sides of LoRA, of the attention's sums, and of the means and deviations of the layers' norms."""
    rank = how.network_values / _sides(config)
    return round(linears * rank * how.dtype.itemsize) + FLOAT32 * (config.heads + 2 * norms)


@lru_cache
def _sides(config: TransformerConfig) -> int:
    """Numbers in a LoRA of rank 1."""
    return sum(sum(shape) for name, shape in _shapes(config).items() if is_quantized_name(name))


def _copies_of_network(how: Computation) -> int:
    """Of what is trained, which is float32, in the dtype of the activations."""
    return how.network_values * how.dtype.itemsize if how.dtype.itemsize < FLOAT32 else 0


def _work_of_backward(tokens: int, how: Computation, width: int, dequantized: int) -> int:
    """The gradient of the widest layer's input, by the layer, by its LoRA, and their sum; the input itself is gone by then."""
    one = tokens * how.dtype.itemsize * width
    return max(2 * one, one + dequantized)
