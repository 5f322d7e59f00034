"""What ``gpu.py`` measures beside whole models: the machine, single operations, whether results stay the same, and the VAE."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_workloads import GIB, RANK, TERA, VALID_TEXT, Bench, Model, Row, make_inputs, our_transformer, tokens_of
from hunyuan_model.quantization.formats import WeightFormat, dequantize
from hunyuan_model.quantization.scaled_mm import check_float8_matmuls, find_float8_matmuls, float8_input_gradient, float8_linear
from hunyuan_model.runtime.offload.block_swap import max_blocks_to_swap
from hunyuan_model.runtime.offload.host_weights import host_memory, page_lock
from hunyuan_model.sampling.flow import latent_size
from hunyuan_model.transformer import fused
from hunyuan_model.transformer.blocks import add_branch
from hunyuan_model.transformer.gelu import cat_gelu
from hunyuan_model.transformer.norms import RMSNorm, modulated_norm, rotated_norms
from hunyuan_model.transformer.rope import rotation_table
from hunyuan_model.vae import cpu_kernels
from hunyuan_model.vae.memory import Clip, VAEFit, VAESettings, working_bytes
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig
from networks.lora import LoRAModule, create_network

Measured = dict[str, Any]
Rows = dict[str, Callable[[], Measured]]
"""What to call for each line of the table, by its name. Nothing is computed before that."""

GIGA = 1e9
MATMUL = "matmul, bf16"
COPY = "copies"
PACKAGES = ("torch", "triton", "diffusers", "peft", "accelerate")
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
NEW_LENGTHS = 5
AGREEING = 0.02  # largest difference beside the largest value; backward passes of attention add up in any order


def hardware(bench: Bench) -> Rows:
    """The machine, what it does at best, and what a fork copies of page-locked memory."""
    return {
        "versions": partial(versions, bench),
        MATMUL: partial(matmul, bench),
        COPY: partial(copies, bench),
        "fork": partial(fork, bench),
    }


def versions(bench: Bench) -> Measured:
    found: Measured = {"python": platform.python_version()} | ({"model": "tiny"} if bench.tiny else {})
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if bench.device.type != "cuda":
        return {"device": f"{platform.machine()} CPU"} | found
    gpu = torch.cuda.get_device_properties(bench.device)
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "capability": f"{gpu.major}.{gpu.minor}"}
    return {"device": f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB"} | found


def matmul(bench: Bench) -> Measured:
    side = 512 if bench.tiny else 8192
    left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return rates(bench, lambda: left @ right, operations=2 * side**3)


def copies(bench: Bench) -> Measured:
    """GB/s between host memory and the device, and of page-locking."""
    size = 1 << 16 if bench.tiny else 1 << 30
    on_device, host = torch.empty(size, dtype=torch.uint8, device=bench.device), host_memory(size).fill_(1)
    found = {"pageable_gb_s": rates(bench, lambda: on_device.copy_(host), moved=size, rounds=2)["gb_s"]}
    owner = nn.Module()
    if bench.device.type == "cuda":
        start = time.perf_counter()
        if not page_lock(host, bench.device, owner):
            return found | {"error": "the system refuses to page-lock"}
        found["locking_gb_s"] = size / (time.perf_counter() - start) / GIGA
    found["to_device_gb_s"] = rates(bench, lambda: on_device.copy_(host, non_blocking=True), moved=size)["gb_s"]
    found["to_host_gb_s"] = rates(bench, lambda: host.copy_(on_device, non_blocking=True), moved=size)["gb_s"]
    del owner  # before the memory
    return found


def fork(bench: Bench) -> Measured:
    """Seconds that a fork takes, and GiB that the child has of its own, with page-locked memory of both kinds."""
    if not Path("/proc/self/smaps_rollup").exists():
        return {"skipped": "only Linux tells it"}
    size = 1 << 20 if bench.tiny else 4 << 30
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    allocate = {
        "private": lambda: torch.frombuffer(mmap.mmap(-1, size, flags=private), dtype=torch.uint8),
        "ours": lambda: host_memory(size),
    }
    found: Measured = {}
    for name, make in allocate.items():
        owner = nn.Module()
        memory = make().fill_(1)
        if bench.device.type == "cuda" and not page_lock(memory, bench.device, owner):
            return {"error": "the system refuses to page-lock"}
        found[f"{name}_s"], found[f"{name}_child_gib"] = private_memory_of_a_child()
        del owner  # before the memory
    return found


def private_memory_of_a_child() -> tuple[float, float]:
    read_end, write_end = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:  # no more than this: torch and CUDA do not work here
        with open("/proc/self/smaps_rollup", "rb") as file:
            os.write(write_end, file.read(4096))
        os._exit(0)
    seconds = time.perf_counter() - start
    os.waitpid(child, 0)
    lines = os.read(read_end, 4096).decode().splitlines()
    os.close(read_end)
    os.close(write_end)
    return seconds, sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / GIB


# ---------------------------------------------------------------------------------------------------------------------
# What is to change nothing but speed and memory


def equality(bench: Bench) -> Rows:
    """Outputs and gradients beside those without anything of that, and how often a step waits for the device."""
    most = max_blocks_to_swap(bench.config(short=True))
    rows = {
        "once more": Row("image", short=True),
        "swap": Row("image", short=True, swap=most),
        "offload": Row("image", short=True, offload=True),
        "swap and offload": Row("image", short=True, swap=most, offload=True),
        "kept attention": Row("image", short=True, keep=True),
        "kept attention and offload": Row("image", short=True, keep=True, offload=True),
    }
    without = lru_cache(partial(gradients, bench, Row("image", short=True)))
    found: Rows = {f"same, {name}": partial(difference, bench, row, without) for name, row in rows.items()}
    found |= {f"waits, {name}": partial(waits, bench, rows[name]) for name in ("once more", "swap and offload")}
    return found


def gradients(bench: Bench, row: Row) -> list[Tensor]:
    """Of two steps, and their outputs."""
    config = bench.config(row.short)
    torch.manual_seed(0)
    transformer = our_transformer(row, config, bench.device)
    torch.manual_seed(0)
    network = create_network(1.0, RANK, RANK, None, None, transformer)
    for lora in network.loras():
        nn.init.normal_(lora.lora_up.weight, std=0.01)
    network.apply_to(None, transformer)
    network.to(bench.device)
    transformer.train()
    found = []
    for _ in range(2):
        with torch.autocast(bench.device.type, torch.bfloat16):
            found.append(transformer(**make_inputs(config, bench.sizes[row.size], bench.device)))
        found[-1].float().square().mean().backward()
    return [*(output.detach() for output in found), *(parameter.grad for parameter in network.parameters())]


def difference(bench: Bench, row: Row, without: Callable[[], list[Tensor]]) -> Measured:
    pairs = list(zip(gradients(bench, row), without(), strict=True))
    largest = max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)
    return {"agrees": largest < AGREEING, "to_the_bit": all(torch.equal(*pair) for pair in pairs), "largest_difference": largest}


def waits(bench: Bench, row: Row) -> Measured:
    """As torch reports them, and from where."""
    if bench.device.type != "cuda":
        return {"skipped": "needs CUDA"}
    step = Model(row, bench.config(row.short), bench.device).work(bench.sizes[row.size])
    step()
    bench.synchronise()
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in reported if "synchroniz" in str(warning.message)]
    return {"waits": len(places), "places": sorted(set(places))[:5]}


# ---------------------------------------------------------------------------------------------------------------------
# Single operations, as they occur in a training step of an image and of a clip


def rates(bench: Bench, run: Callable[[], object], operations: float = 0, moved: float = 0, rounds: int = 5) -> Measured:
    """Milliseconds; TFLOP/s of ``operations``; GB/s of ``moved`` bytes, those that cannot be avoided."""
    first = bench.timed(run)

    def several() -> None:
        for _ in range(rounds):
            run()

    seconds = bench.timed(several) / rounds
    found = {"ms": seconds * 1e3, "first_ms": first * 1e3}
    if operations:
        found["tflops"] = operations / seconds / TERA
    if moved:
        found["gb_s"] = moved / seconds / GIGA
    return found


class Operations:
    """The tensors of one size of input."""

    def __init__(self, bench: Bench, size: str) -> None:
        self.bench, config = bench, bench.config()
        self.latents = latent_size(*(bench.sizes[size][index] for index in (1, 0, 2)))
        self.config, self.tokens = config, tokens_of(bench.sizes[size])
        self.hidden, self.mlp, self.heads, self.dim = config.hidden_size, config.mlp_size, config.heads, config.head_dim

    def random(self, *shape: int, gradient: bool = False) -> Tensor:
        return torch.randn(*shape, device=self.bench.device, dtype=torch.bfloat16, requires_grad=gradient)

    def of_tokens(self, width: int) -> Tensor:
        return self.random(1, self.tokens, width, gradient=True)

    def both_ways(self, function: Callable[..., Any], inputs: tuple[Any, ...], passes: float) -> Measured:
        """A function of tokens and the gradients of those inputs that want them; it moves ``passes`` times its outputs."""
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        with torch.autocast(self.bench.device.type, torch.bfloat16):
            outputs = function(*inputs)
            above = [torch.randn_like(out) for out in (outputs if isinstance(outputs, tuple) else [outputs])]

            def run() -> None:
                torch.autograd.grad(function(*inputs), wanted, above)

            return rates(self.bench, run, moved=passes * sum(gradient.nbytes for gradient in above))

    def attention(self, backend: str | None) -> Measured:
        q, k, v = (self.random(1, self.tokens, self.heads, self.dim, gradient=True).transpose(1, 2) for _ in range(3))
        above, operations = torch.randn_like(q), 4 * self.tokens**2 * self.hidden
        attend = partial(F.scaled_dot_product_attention, q, k, v)
        with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
            with torch.no_grad():
                forward = rates(self.bench, attend, operations)
            both = rates(self.bench, lambda: torch.autograd.grad(attend(), (q, k, v), above), 3.5 * operations)
        return {
            "forward_ms": forward["ms"],
            "forward_tflops": forward["tflops"],
            "both_ms": both["ms"],
            "both_tflops": both["tflops"],
        }

    def new_lengths(self, backend: str | None) -> Measured:
        """The first call for each of some lengths, forward and backward: what planning a kernel for each would cost."""
        found = []
        for extra in range(1, NEW_LENGTHS + 1):
            q = self.random(1, self.tokens + 7 * extra, self.heads, self.dim, gradient=True).transpose(1, 2)

            def both(q: Tensor = q) -> None:
                torch.autograd.grad(F.scaled_dot_product_attention(q, q, q), q, torch.ones_like(q))

            with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
                found.append(self.bench.timed(both))
        return {"first_call_ms": [round(seconds * 1e3, 2) for seconds in found]}

    def product(self, inputs: int, outputs: int, gradient: bool = False) -> Measured:
        """Of a linear layer, or its gradient of x."""
        x, weight = self.random(self.tokens, outputs if gradient else inputs), self.random(outputs, inputs)
        run = (lambda: x @ weight) if gradient else (lambda: F.linear(x, weight))
        return rates(self.bench, run, 2 * self.tokens * inputs * outputs)

    def float8_product(self, inputs: int, outputs: int, gradient: bool = False) -> Measured:
        check_float8_matmuls(self.bench.device, "fp8_fast")
        x, matmuls = self.random(self.tokens, outputs if gradient else inputs), find_float8_matmuls(self.bench.device)
        weight = self.random(outputs, inputs).to(torch.float8_e4m3fn)
        run = partial(float8_input_gradient, x, weight, None, matmuls)
        if not gradient:
            run = partial(float8_linear, x, weight, None, None, matmuls)
        return rates(self.bench, run, 2 * self.tokens * inputs * outputs) | {"scales_per_row": matmuls.per_row}

    @torch.no_grad()
    def dequantization(self, weights: WeightFormat) -> Measured:
        codes, scale = weights.quantizer(self.random(3 * self.hidden + self.mlp, self.hidden))
        moved = codes.nbytes + 2 * codes.numel() + (0 if scale is None else scale.nbytes)
        return rates(self.bench, lambda: dequantize(codes, torch.bfloat16, scale), moved=moved)

    def norm(self) -> Measured:
        shift, scale = self.random(1, 1, self.hidden), self.random(1, 1, self.hidden)
        return self.both_ways(modulated_norm, (self.of_tokens(self.hidden), shift, scale), 5)

    def norm_and_rope(self) -> Measured:
        norm = RMSNorm(self.dim).to(self.bench.device).requires_grad_(False)
        frames, height, width = self.latents
        size = frames, height // 2, width // 2
        table = rotation_table(size, self.config.rope_dims, self.config.rope_theta, self.bench.device, VALID_TEXT)
        queries, keys = self.random(2, 1, self.tokens, self.heads, self.dim, gradient=True)
        return self.both_ways(rotated_norms, (queries, keys, norm, norm, table), 5)

    def gelu_and_cat(self) -> Measured:
        inputs = self.of_tokens(self.hidden), self.of_tokens(self.mlp)
        return self.both_ways(cat_gelu, inputs, 4 + self.mlp / (self.mlp + self.hidden))

    def residual(self) -> Measured:
        inputs = self.of_tokens(self.hidden), self.random(1, 1, self.hidden), self.of_tokens(self.hidden)
        return self.both_ways(add_branch, inputs, 5)

    def linear_and_lora(self, lora: bool) -> Measured:
        """Forward and backward of the widest layer."""
        inputs, outputs = self.hidden, 3 * self.hidden + self.mlp
        linear = nn.Linear(inputs, outputs, device=self.bench.device, dtype=torch.bfloat16).requires_grad_(False)
        wanted: list[Tensor] = []
        if lora:
            module = LoRAModule(inputs, outputs, RANK, RANK).to(self.bench.device)
            module.attach(linear)
            wanted = list(module.parameters())
        x, above = self.of_tokens(inputs), self.random(1, self.tokens, outputs)

        def run() -> None:
            with torch.autocast(self.bench.device.type, torch.bfloat16):
                out = linear(x)
            torch.autograd.grad(out, [x, *wanted], above)

        return rates(self.bench, run, 4 * self.tokens * inputs * outputs)


def not_fused(measure: Callable[[], Measured]) -> Callable[[], Measured]:
    def run() -> Measured:
        fused.allow(False)
        try:
            return measure()
        finally:
            fused.allow(True)

    return run


def operations(bench: Bench) -> Rows:
    rows: Rows = {}

    def add(name: str, method: Callable[..., Measured], *arguments: object, sizes: tuple[str, ...] = ("clip33", "image")) -> None:
        for size in sizes:
            # Its tensors are made when it is called, and gone after.
            rows[f"{name}, {size}"] = lambda size=size: method(Operations(bench, size), *arguments)

    def add_fused(name: str, method: Callable[..., Measured], *arguments: object, sizes: tuple[str, ...] = ("clip33",)) -> None:
        """As it is, and as torch computes it operator by operator."""
        add(name, method, *arguments, sizes=sizes)
        for size in sizes:
            rows[f"{name}, not fused, {size}"] = not_fused(rows[f"{name}, {size}"])

    hidden, mlp = bench.config().hidden_size, bench.config().mlp_size
    for backend in (None, *BACKENDS):
        add(f"attention, {backend or 'default'}", Operations.attention, backend)
    for backend in (None, "flash", "cudnn"):
        add(f"new lengths, {backend or 'default'}", Operations.new_lengths, backend, sizes=("image",))
    for weights in (WeightFormat.INT8, WeightFormat.FP8_SCALED):
        add_fused(f"dequantization, {weights.value}", Operations.dequantization, weights, sizes=("image",))
    add("dequantization, fp8", Operations.dequantization, WeightFormat.FP8, sizes=("image",))
    add_fused("norm and modulation", Operations.norm)
    add_fused("q and k norms and RoPE", Operations.norm_and_rope)
    add("GELU and cat", Operations.gelu_and_cat, sizes=("clip33",))
    add("gated residual", Operations.residual, sizes=("clip33",))
    for lora in (False, True):
        add("linear1 with LoRA" if lora else "linear1", Operations.linear_and_lora, lora)
    widths = {"qkv": (hidden, 3 * hidden), "linear1": (hidden, 3 * hidden + mlp), "linear2": (hidden + mlp, hidden)}
    for gradient in (False, True):
        for name, sides in widths.items():
            of = f"gradient of {name}" if gradient else name
            add(f"product, {of}", Operations.product, *sides, gradient)
            add(f"float8 product, {of}", Operations.float8_product, *sides, gradient)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The VAE, in the dtype in which the scripts run it


def decode(bench: Bench) -> Rows:
    vae = lru_cache(partial(random_vae, bench))
    return {
        "decode, image": partial(run_vae, bench, vae, "image", encode=False),
        "decode, clip33": partial(run_vae, bench, vae, "clip33", encode=False),
        "one convolution of a frame, fp16": partial(one_convolution, bench),
        "encode, clip33": partial(run_vae, bench, vae, "clip33", encode=True),
    }


def random_vae(bench: Bench) -> AutoencoderKLCausal3D:
    config = VAEConfig(block_out_channels=(32, 32, 32, 32)) if bench.tiny else VAEConfig()
    with torch.device(bench.device):
        vae = AutoencoderKLCausal3D(config).eval().requires_grad_(False)
    vae.reuse_buffers()
    return vae.to(torch.float16 if bench.device.type == "cuda" else torch.float32)


@torch.no_grad()
def run_vae(bench: Bench, make: Callable[[], AutoencoderKLCausal3D], size: str, encode: bool) -> Measured:
    """Whole, or in parts as far as free memory demands."""
    vae = make()
    width, height, frames = bench.sizes[size]
    dtype = next(vae.parameters()).dtype
    shape = (1, 3, frames, height, width) if encode else (1, 16, *latent_size(height, width, frames))
    x, clip = torch.randn(shape, device=bench.device, dtype=dtype), Clip(1, frames, height, width)
    splitting = VAEFit(vae, VAESettings(None, dtype), encode=encode).fit(clip)
    bench.forget_peak()
    first = bench.timed(lambda: vae.encode(x) if encode else vae.decode(x))
    seconds = bench.timed(lambda: vae.encode(x) if encode else vae.decode(x))
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    found = {"seconds": seconds, "first": first, "split": str(splitting) or "no"} | bench.peak()
    if bench.device.type == "cuda":
        working = working_bytes(vae.config, clip, dtype, "cuda", splitting, encode=encode)
        found["planned_gib"] = (weights + working) / GIB
    return found


@torch.no_grad()
def one_convolution(bench: Bench) -> Measured:
    channels, (width, height, _) = (16 if bench.tiny else 128), bench.sizes["image"]
    dtype = torch.float16 if bench.device.type == "cuda" else torch.float32
    window = torch.randn(1, channels, 3, height + 2, width + 2, device=bench.device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, 3, device=bench.device, dtype=dtype)
    run = partial(cpu_kernels.convolution, window, weight, None, (1, 1, 1))
    bench.forget_peak()
    found = rates(bench, run, 2 * 27 * channels**2 * height * width)
    return found | bench.peak() | bench.profile(run, kernels=3)
