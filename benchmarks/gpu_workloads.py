"""What a row of ``gpu.py`` computes: training steps and forward passes of random weights made on the GPU, ours and diffusers'."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.compilation import CompileSettings
from hunyuan_model.runtime.loading import transformer_from
from hunyuan_model.runtime.memory import BatchSize, weight_bytes
from hunyuan_model.runtime.memory_plan import MemoryPlan
from hunyuan_model.runtime.offload.block_swap import SLOTS, block_sizes, max_blocks_to_swap, streamed_blocks
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.flow import latent_size
from hunyuan_model.transformer import fused
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.lora import create_network
from networks.training.optim.optimizers import OptimizerSettings, make_optimizer

RANK = 32
TEXT_ROWS, VALID_TEXT = 256, 60
SIZES = {"image": (960, 544, 1), "image720": (1280, 720, 1), "clip33": (960, 544, 33), "clip65": (960, 544, 65)}
TINY_SIZES = {"image": (64, 32, 1), "image720": (64, 48, 1), "clip33": (64, 32, 5), "clip65": (64, 32, 9)}
TINY = TransformerConfig(hidden_size=256, heads=2, mlp_size=1024, text_dim=64, pooled_dim=32)
SHORT = {"double_depth": 2, "single_depth": 4}
TIMES_SHORT, TIMES_SHORT_TINY = 10, 2  # blocks of the full depth, beside the short one
GIB, TERA = 1 << 30, 1e12
LONGEST_NAME = 80  # of a kernel, in a profile


@dataclass(frozen=True)
class Bench:
    """What is measured with.

    Attributes:
        steps: of which the median is taken, after one that does not count.
    """

    device: torch.device
    tiny: bool = False
    steps: int = 2

    @property
    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """Width, height and frames."""
        return TINY_SIZES if self.tiny else SIZES

    def config(self, short: bool = False) -> TransformerConfig:
        """The published model's or a tiny one; short with a tenth of the blocks, or half of them."""
        times = 1 if short else self.times_short
        return replace(TINY if self.tiny else TransformerConfig(), **{name: depth * times for name, depth in SHORT.items()})

    @property
    def times_short(self) -> int:
        return TIMES_SHORT_TINY if self.tiny else TIMES_SHORT

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds, with the work that the device does after the call."""
        self.synchronise()
        start = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - start

    def repeated(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds, and those of the first time, which does not count."""
        first = self.timed(run)
        return statistics.median(self.timed(run) for _ in range(self.steps)), first

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> dict[str, float]:
        """Of tensors, and of what torch has taken for them; empty on the CPU."""
        if self.device.type != "cuda":
            return {}
        peaks = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return {"peak_gib": peaks[0] / GIB, "reserved_gib": peaks[1] / GIB}

    def profile(self, run: Callable[[], object], kernels: int = 12) -> dict[str, Any]:
        """How many kernels ``run`` starts, and those that take longest: name, milliseconds, calls. On the CPU operators."""
        on_gpu = self.device.type == "cuda"
        activities = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as profile:
            run()
            self.synchronise()
        times = [
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
            for event in profile.key_averages()
        ]
        longest = sorted((event for event in times if event[0] > 0), reverse=True)
        top = [[key[:LONGEST_NAME], round(microseconds / 1e3, 3), count] for microseconds, count, key in longest[:kernels]]
        return {"kernels": sum(count for _, count, _ in longest), "top": top}


@dataclass(frozen=True)
class Row:
    """What one line of the table measures of a transformer.

    Attributes:
        work: "step" (a LoRA training step) or "forward" (one of sampling).
        size: of SIZES.
        weights: bf16, fp8, fp8_scaled, int8 or fp8_fast; diffusers knows the first two.
        short: with few blocks; the time at full depth is extrapolated.
        swap: blocks. For diffusers any number means group offloading, of every block.
        keep: the results of attention through checkpointing.
        unfused: with --no_fused_kernels.
    """

    size: str = "clip33"
    weights: str = "bf16"
    work: str = "step"
    who: str = "ours"
    short: bool = False
    swap: int = 0
    offload: bool = False
    keep: bool = False
    unfused: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        parts = ["short" if self.short else "full", self.work, self.size, self.who, self.weights]
        if self.swap:
            parts.append(f"swap {self.swap}" if self.who == "ours" else "group offloading")
        parts += [option for option in ("offload", "keep", "unfused", "compile") if getattr(self, option)]
        return ", ".join(parts)


def tokens_of(size: tuple[int, int, int]) -> int:
    """Of an image or clip and its text."""
    frames, height, width = latent_size(size[1], size[0], size[2])
    return frames * (height // 2) * (width // 2) + VALID_TEXT


def block_flops(config: TransformerConfig, size: tuple[int, int, int]) -> tuple[float, float]:
    """(matmuls, attention) of one forward pass through the blocks, in floating-point operations."""
    tokens = tokens_of(size)
    hidden, depth = config.hidden_size, config.double_depth + config.single_depth
    # Both kinds of block have 4 hidden x hidden and 2 hidden x mlp products for each token.
    return 2.0 * depth * tokens * hidden * (4 * hidden + 2 * config.mlp_size), 4.0 * depth * tokens**2 * hidden


def last_layer_flops(config: TransformerConfig, size: tuple[int, int, int]) -> float:
    """Operations of the matmuls that our recomputation leaves out; those of the text are too few to count."""
    inputs = config.double_depth * config.mlp_size + config.single_depth * (config.hidden_size + config.mlp_size)
    return 2.0 * tokens_of(size) * config.hidden_size * inputs


def row_flops(row: Row, config: TransformerConfig, size: tuple[int, int, int]) -> tuple[float, float]:
    """Operations of the model, and with what checkpointing computes again."""
    products, attention = block_flops(config, size)
    if row.work == "forward":
        return products + attention, products + attention
    model, done = 2 * products + 3 * attention, 3 * products + 4 * attention  # the weights have no gradients
    if row.who == "ours" and not row.compile:
        done -= last_layer_flops(config, size)
    if row.keep:
        done -= attention
    return model, done


def runtime_of(row: Row, config: TransformerConfig, backend: str = "inductor") -> RuntimeSettings:
    """What a row of ours puts on the transformer."""
    formats = {"bf16": WeightFormat.PLAIN, "fp8_fast": WeightFormat.FP8}
    trains = row.work == "step"
    return RuntimeSettings(
        weights=formats.get(row.weights) or WeightFormat(row.weights),
        fp8_fast=row.weights == "fp8_fast",
        blocks_to_swap=min(row.swap, max_blocks_to_swap(config)),
        gradient_checkpointing=trains,
        gradient_checkpointing_cpu_offload=trains and row.offload,
        keep_attention=trains and row.keep,
        compile=CompileSettings(backend=backend) if row.compile else None,
    )


def predicted_bytes(row: Row, config: TransformerConfig, size: tuple[int, int, int]) -> int:
    """What the plan of a training or of sampling says of the peak on the GPU, of tensors alone."""
    with torch.device("meta"):
        network = create_network(1.0, RANK, RANK, None, None, HYVideoDiffusionTransformer(config))
    trains = row.work == "step"
    plan = MemoryPlan(
        config,
        torch.device("cuda"),
        runtime_of(row, config),
        BatchSize(1, latent_size(size[1], size[0], size[2]), VALID_TEXT),
        torch.bfloat16,
        torch.bfloat16,
        sum(parameter.numel() for parameter in network.parameters()) if trains else None,
        2.0 * torch.float32.itemsize,
        trains=trains,
    )
    need = plan.need()
    return need.of_step if trains else need.on_device - need.kernels


def copied_bytes(row: Row, config: TransformerConfig) -> float:
    """That block swap brings to the GPU for a step or a forward pass; a backward pass finds the last blocks there."""
    runtime = runtime_of(row, config)
    streamed = len(streamed_blocks(block_sizes(config), runtime.blocks_to_swap))
    passes = 2 - SLOTS / streamed if row.work == "step" else 1
    return weight_bytes(config, torch.bfloat16, runtime).host * passes


def make_inputs(config: TransformerConfig, size: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
    """Named as ``HYVideoDiffusionTransformer.forward`` names them."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return {
        "x": torch.randn(1, config.in_channels, *latent_size(size[1], size[0], size[2]), **options),
        "t": torch.tensor([500.0], device=device),
        "text_states": torch.randn(1, TEXT_ROWS, config.text_dim, **options),
        "text_mask": (torch.arange(TEXT_ROWS) < VALID_TEXT).long()[None],
        "text_states_2": torch.randn(1, config.pooled_dim, **options),
        "guidance": torch.tensor([6000.0], device=device),
    }


class RandomWeights:
    """In place of a ``Checkpoint``: random bfloat16 weights, each made on the device when it is asked for."""

    what, path = "random weights", "of no file"

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        with torch.device("meta"):
            model = HYVideoDiffusionTransformer(config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.dtypes = dict.fromkeys(self.shapes, torch.bfloat16)
        self.scales: dict[str, Tensor] = {}
        self._device = device

    def pieces(self, name: str) -> tuple[Tensor]:
        return (random_weight(torch.empty(self.shapes[name], dtype=torch.bfloat16, device=self._device)),)

    def assemble(self, name: str, pieces: tuple[Tensor], allocate: object) -> Tensor:
        return pieces[0]


def random_weight(tensor: Tensor) -> Tensor:
    return tensor.normal_(0, 0.02) if tensor.ndim > 1 else tensor.normal_(1, 0.02)


def our_transformer(row: Row, config: TransformerConfig, device: torch.device) -> HYVideoDiffusionTransformer:
    """Loaded as the scripts load it, but for where the weights come from."""
    # On the CPU only the plumbing is tried: tracing is enough for that.
    runtime = runtime_of(row, config, "inductor" if device.type == "cuda" else "eager")
    weights = RandomWeights(config, device)
    return transformer_from(weights, config, device=device, dtype=torch.bfloat16, runtime=runtime)


def their_transformer(row: Row, config: TransformerConfig, device: torch.device) -> nn.Module:
    """diffusers' own, made on the device, with its way to the same savings."""
    from benchmarks.diffusers_twins import diffusers_model

    with torch.device("meta"):
        model = diffusers_model(config).to(torch.bfloat16)
    offloaded = row.swap > 0 and device.type != "cpu"
    model.to_empty(device="cpu" if offloaded else device).requires_grad_(False)
    for parameter in model.parameters():  # one at a time on the device, whose random numbers come fast
        parameter.copy_(random_weight(torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)))
    model.eval()
    if row.work == "step":
        add_adapters(model)
        model.enable_gradient_checkpointing()
        model.train()
    if row.weights != "bf16":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    if offloaded:
        model.enable_group_offload(
            onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=True, record_stream=True
        )
    return model


def add_adapters(model: nn.Module) -> None:
    """peft's LoRA on the layers that ours has one on."""
    from peft import LoraConfig

    from benchmarks.diffusers_twins import linears_of_blocks

    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linears_of_blocks(model)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as its training examples do


class Model:
    """A transformer as a row wants it, with its LoRA and its optimizer; for inputs of any size."""

    def __init__(self, row: Row, config: TransformerConfig, device: torch.device) -> None:
        self._row, self._config, self._device = row, config, device
        torch.manual_seed(0)
        self.parameters: list[nn.Parameter] = []
        if row.who == "diffusers":
            self.transformer = their_transformer(row, config, device)
            self.parameters = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
            self._block_lists = ("transformer_blocks", "single_transformer_blocks")
        else:
            self.transformer = our_transformer(row, config, device)
            if row.work == "step":
                self.parameters = add_lora(self.transformer, device)
            self._block_lists = ("double_blocks", "single_blocks")
        if row.work == "step":
            self._optimizer = make_optimizer(OptimizerSettings(learning_rate=1e-4), self.parameters)

    def work(self, size: tuple[int, int, int]) -> Callable[[], object]:
        """What is to be timed: a training step, or a forward pass of sampling."""
        inputs = make_inputs(self._config, size, self._device)
        velocity: Callable[[], Tensor] = functools.partial(self.transformer, **inputs)
        if self._row.who == "diffusers":
            from benchmarks.diffusers_twins import run_diffusers

            # It computes padding as well: the best that one can do for it is to leave none.
            for name in ("text_states", "text_mask"):
                inputs[name] = inputs[name][:, :VALID_TEXT].to(self._device)
            velocity = functools.partial(run_diffusers, self.transformer, inputs)
        if self._row.work == "forward":
            return torch.no_grad()(velocity)
        target = torch.randn_like(inputs["x"], dtype=torch.float32)

        def step() -> None:
            with torch.autocast(self._device.type, torch.bfloat16):
                out = velocity()
            F.mse_loss(out.float(), target).backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

        return step

    @contextmanager
    def half_of_the_blocks(self) -> Iterator[None]:
        """Inside, the other half is left out."""
        whole = {name: getattr(self.transformer, name) for name in self._block_lists}
        try:
            for name, blocks in whole.items():
                setattr(self.transformer, name, blocks[: len(blocks) // 2])
            yield
        finally:
            for name, blocks in whole.items():
                setattr(self.transformer, name, blocks)


def add_lora(transformer: nn.Module, device: torch.device) -> list[nn.Parameter]:
    network = create_network(1.0, RANK, RANK, None, None, transformer)
    network.apply_to(None, transformer)
    network.to(device)
    transformer.train()
    return list(network.parameters())


class Models:
    """Measures rows one after the other, with the model of the one before where only the size of the inputs is another."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.drop()

    def drop(self) -> None:
        """Free the model; after errors too."""
        self._key = self._model = None
        gc.collect()
        self._bench.forget_peak()

    def measure(self, row: Row) -> dict[str, Any]:
        bench, config = self._bench, self._bench.config(row.short)
        size, key = bench.sizes[row.size], replace(row, size="")
        if key != self._key:
            self.drop()
            self._model, self._key = Model(row, config, bench.device), key
        fused.allow(not row.unfused)
        bench.forget_peak()
        work = self._model.work(size)
        seconds, first = bench.repeated(work)
        model, done = row_flops(row, config, size)
        result = {"seconds": seconds, "first": first, "model_tflops": model / seconds / TERA, "done_tflops": done / seconds / TERA}
        result |= bench.peak()
        if row.who == "ours":
            result["planned_gib"] = predicted_bytes(row, config, size) / GIB
        if row.short:
            with self._model.half_of_the_blocks():
                half, _ = bench.repeated(work)
            result["at_full_depth"] = extrapolated(half, seconds, bench.times_short)
            result |= bench.profile(work)
        return result


def extrapolated(half: float, short: float, times_short: int) -> float:
    """Seconds with ``times_short`` times the blocks, of those with the short depth and with half of it."""
    return half + (short - half) * (2 * times_short - 1)
