"""Seconds and memory on the CPU beside those of diffusers and peft, and of quantized weights beside bfloat16: Markdown tables.

Both sides have the same weights and the same inputs, in one process, and take turns; a ratio is the median of the ratios of
the rounds. "bare" is the time of nothing but the matrix products and the attention that the work consists of, so that what
is spent around them shows. Peak memory is anonymous memory above the start, each in a process of its own (Linux only).

    python benchmarks/compare_cpu.py
    python benchmarks/compare_cpu.py transformer text --rounds 5
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.diffusers_twins import diffusers_transformer, linears_of_blocks, run_diffusers  # noqa: E402
from benchmarks.gpu_workloads import SIZES, Bench, Model, Row  # noqa: E402
from benchmarks.memory_watch import MemoryWatch, in_new_process  # noqa: E402
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing  # noqa: E402
from hunyuan_model.text.llm import LlamaTextEncoder  # noqa: E402
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for  # noqa: E402
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer  # noqa: E402
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig  # noqa: E402
from networks.lora import create_network  # noqa: E402
from utils.progress import ProgressBar  # noqa: E402

Run = Callable[[], object]

CONFIG = TransformerConfig(
    hidden_size=512, heads=4, head_dim=128, double_depth=2, single_depth=4, mlp_size=2048, rope_dims=rope_dims_for(128)
)
IMAGE = (1, 68, 120)  # latents of 960x544 pixels
TEXT_ROWS, VALID_ROWS = 256, 60
LAST_LAYERS = ("img_mlp.fc2", "linear2")  # of a block, which a recomputation leaves out
RANK = 16
VAE_WIDTHS = (32, 64, 128, 128)
TILE = 128
CAPTIONS, LLAMA_LAYERS, LLAMA_VOCABULARY = 64, 4, 1024


def initialised(module: nn.Module) -> nn.Module:
    """``module`` with random weights that let every part of it matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.1)
        for name, parameter in module.named_parameters():
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1.0)
    return module


def transformer_inputs() -> dict[str, torch.Tensor]:
    """An image with 60 of 256 text rows valid, named as ``HYVideoDiffusionTransformer.forward`` names them."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(1, CONFIG.in_channels, *IMAGE, generator=generator),
        "t": torch.tensor([500.0]),
        "text_states": torch.randn(1, TEXT_ROWS, CONFIG.text_dim, generator=generator),
        "text_mask": (torch.arange(TEXT_ROWS) < VALID_ROWS).long()[None],
        "text_states_2": torch.randn(1, CONFIG.pooled_dim, generator=generator),
        "guidance": torch.tensor([6000.0]),
    }


@torch.no_grad()
def transformer_forward() -> dict[str, Run]:
    ours = initialised(HYVideoDiffusionTransformer(CONFIG)).eval()
    theirs, inputs = diffusers_transformer(ours), transformer_inputs()
    require_same(ours(**inputs), run_diffusers(theirs, inputs))
    return {
        "ours": torch.no_grad()(lambda: ours(**inputs)),
        "diffusers": torch.no_grad()(lambda: run_diffusers(theirs, inputs)),
        "bare": torch.no_grad()(bare_products(ours, inputs, lora=False)),
    }


def lora_step() -> dict[str, Run]:
    from peft import LoraConfig

    base = initialised(HYVideoDiffusionTransformer(CONFIG)).eval().requires_grad_(False)
    theirs = diffusers_transformer(base).requires_grad_(False)
    ours, inputs = base, transformer_inputs()
    bare = bare_products(ours, inputs, lora=True)
    target = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(2))

    enable_gradient_checkpointing(ours, keep_attention=True)  # as training does where there is room
    network = create_network(1.0, RANK, RANK, None, None, ours)
    network.apply_to(None, ours)
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linears_of_blocks(theirs)))
    theirs.enable_gradient_checkpointing()
    theirs.train()
    ours.train()

    def step(parameters: list[nn.Parameter], velocity: Run) -> Run:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)

        def run() -> None:
            F.mse_loss(velocity(), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    adapters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    return {
        "ours": step(list(network.parameters()), lambda: ours(**inputs)),
        "diffusers": step(adapters, lambda: run_diffusers(theirs, inputs)),
        "bare": bare,
    }


def quantized_step(weights: str) -> dict[str, Run]:
    """The step that ``gpu.py`` measures, of few and small blocks under bfloat16 autocast: with quantized weights and without."""
    cpu = torch.device("cpu")
    config, formats = Bench(cpu, tiny=True).config(short=True), {"ours": weights, "bf16": "bf16"}
    models = {name: Model(Row(weights=stored, keep=True), config, cpu) for name, stored in formats.items()}
    return {name: model.work(SIZES["image"]) for name, model in models.items()}


def bare_products(transformer: HYVideoDiffusionTransformer, inputs: dict[str, torch.Tensor], lora: bool) -> Run:
    """The matrix products of all Linear layers and the attention of all blocks at the sizes of these inputs, and nothing else.

    Args:
        lora: those of a training step of a LoRA with checkpointing: forward twice (the second time without the last layers of
            the blocks, whose results nothing needs), and the gradients of the inputs and of the LoRA's factors.
    """
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool, bool]] = []
    hooks = []
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            in_block = "_blocks." in name and ".mod" not in name and "_mod." not in name and not name.startswith("txt_in")
            kind = in_block, name.endswith(LAST_LAYERS)

            def note(linear: nn.Linear, arguments: tuple[torch.Tensor, ...], kind: tuple[bool, bool] = kind) -> None:
                calls.append((torch.randn_like(arguments[0]), linear.weight.detach(), linear.bias, *kind))

            hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        transformer(**inputs)
    for hook in hooks:
        hook.remove()
    patches = IMAGE[1] // 2 * (IMAGE[2] // 2)
    queries = torch.randn(3, 1, CONFIG.heads, patches + VALID_ROWS, CONFIG.head_dim)
    depth = CONFIG.double_depth + CONFIG.single_depth
    factors = [(torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK)) for _, weight, *_ in calls]

    @torch.no_grad()
    def products(again: bool = False) -> None:
        for (x, weight, bias, in_block, is_last), (down, up) in zip(calls, factors):
            if not (again and is_last):
                F.linear(x, weight, bias)
            if lora and in_block:
                F.linear(F.linear(x, down), up)

    def attention(gradients: bool) -> None:
        for _ in range(depth):
            q, k, v = queries.clone().requires_grad_(gradients) if gradients else queries
            out = F.scaled_dot_product_attention(q, k, v)
            if gradients:
                out.backward(out.detach())

    def once() -> None:
        products()
        attention(False)

    @torch.no_grad()
    def backward_products() -> None:
        for (x, weight, _, in_block, _), (down, up) in zip(calls, factors):
            if in_block:
                out = x.new_empty(*x.shape[:-1], weight.shape[0])
                out @ weight
                flat_out, flat_x = out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
                small_out, small_x = flat_out @ up, flat_x @ down.T
                flat_out.T @ small_x, small_out.T @ flat_x, small_out @ down

    def step() -> None:
        once()
        products(again=True)
        attention(True)  # with its own forward, which is the recomputation
        backward_products()

    return step if lora else once


def vaes() -> tuple[AutoencoderKLCausal3D, nn.Module]:
    """Ours and diffusers', with the same weights; its own tiling switched off."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=VAE_WIDTHS, norm_num_groups=32).eval().requires_grad_(False)
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = False
    ours = AutoencoderKLCausal3D(VAEConfig(VAE_WIDTHS)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def vae_runs(frames: int, side: int, direction: str, tiles: bool = False) -> dict[str, Run]:
    """Encoding or decoding a clip of ``frames`` frames of ``side`` pixels squared."""
    ours, theirs = vaes()
    if tiles:
        ours.split(tile_size=TILE)
        theirs.enable_tiling(TILE, TILE, None, TILE * 3 // 4, TILE * 3 // 4)
    generator = torch.Generator().manual_seed(3)
    if direction == "encode":
        x = torch.randn(1, 3, frames, side, side, generator=generator).clamp(-1, 1)
        runs = {"ours": lambda: ours.encode(x).mean, "diffusers": lambda: theirs.encode(x).latent_dist.mean}
    else:
        z = torch.randn(1, 16, (frames - 1) // 4 + 1, side // 8, side // 8, generator=generator)
        runs = {"ours": lambda: ours.decode(z), "diffusers": lambda: theirs.decode(z).sample}
    return {name: torch.no_grad()(run) for name, run in runs.items()}


def text_runs() -> dict[str, Run]:
    """64 captions of 5 to 60 tokens through four layers as wide as Llama-3 8B's, against padding all to the full length."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LLAMA_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=LLAMA_VOCABULARY,
        rope_theta=500000.0,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaModel(config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.rotary_emb = type(model.rotary_emb)(config)
    initialised(model)
    model.norm = nn.Identity()
    generator = torch.Generator().manual_seed(4)
    template = torch.randint(LLAMA_VOCABULARY, (95,), generator=generator).tolist()
    lengths = torch.randint(5, 61, (CAPTIONS,), generator=generator).tolist()
    sequences = [template + torch.randint(LLAMA_VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    encoder = LlamaTextEncoder.__new__(LlamaTextEncoder)
    encoder.model, encoder._template, encoder._template_cache = model, template, None
    full = len(template) + TEXT_ROWS
    padded = torch.tensor([ids + [0] * (full - len(ids)) for ids in sequences])
    mask = (torch.arange(full) < torch.tensor([len(ids) for ids in sequences])[:, None]).long()

    @torch.no_grad()
    def ours() -> list[torch.Tensor]:
        encoder._template_cache = None
        states = [encoder._states_after_template(sequences[start : start + 16]) for start in range(0, CAPTIONS, 16)]
        return [row[:length] for row, length in zip((row for batch in states for row in batch), lengths)]

    @torch.no_grad()
    def theirs() -> list[torch.Tensor]:
        out = []
        for start in range(0, CAPTIONS, 4):
            rows = slice(start, start + 4)
            states = model(input_ids=padded[rows], attention_mask=mask[rows], use_cache=False).last_hidden_state
            out += [row[len(template) : len(template) + length] for row, length in zip(states, lengths[rows])]
        return out

    return compared({"ours": ours, "padded": theirs})


def require_same(ours: torch.Tensor, theirs: torch.Tensor, within: float = 1e-4) -> None:
    """End the benchmark if the two do not compute the same thing."""
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    if not difference < within:
        raise SystemExit(f"error: the results differ by {difference:.2g}; there is nothing to compare.")


def compared(runs: dict[str, Callable[[], list[torch.Tensor]]]) -> dict[str, Run]:
    """Two runs whose tensors are compared as soon as both are there: for those that take too long to be made twice."""
    found: dict[str, list[torch.Tensor]] = {}

    def noting(name: str) -> None:
        found[name] = runs[name]()
        if len(found) == len(runs):
            for ours, theirs in zip(*found.values(), strict=True):
                require_same(ours, theirs, within=1e-5)
            found.clear()

    return {name: functools.partial(noting, name) for name in runs}


def alternating(runs: dict[str, Run], rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after ``warm_up`` ones that are not counted; who begins changes."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warm_up + rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            started = time.perf_counter()
            runs[name]()
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_of(direction: str, whose: str) -> int:
    """Bytes above the start of encoding or decoding in tiles."""
    run = vae_runs(17, 256, direction, tiles=True)[whose]
    with MemoryWatch(seconds=0.01) as watch:
        run()
    return watch.above_start


TIMED: dict[str, tuple[str, Callable[[], dict[str, Run]]]] = {
    "transformer": ("transformer forward, 960x544 image", transformer_forward),
    "step": (f"LoRA step, rank {RANK}, checkpointing", lora_step),
    "int8": ("LoRA step, int8 weights", lambda: quantized_step("int8")),
    "fp8": ("LoRA step, float8 weights", lambda: quantized_step("fp8")),
    "fp8_scaled": ("LoRA step, scaled float8 weights", lambda: quantized_step("fp8_scaled")),
    "encode": ("VAE encode, 17 frames of 256x256", lambda: vae_runs(17, 256, "encode")),
    "decode": ("VAE decode, 17 frames of 256x256", lambda: vae_runs(17, 256, "decode")),
    "image_encode": ("VAE encode, one image of 512x512", lambda: vae_runs(1, 512, "encode")),
    "image_decode": ("VAE decode, one image of 512x512", lambda: vae_runs(1, 512, "decode")),
    "text": (f"{CAPTIONS} captions, Llama of {LLAMA_LAYERS} full-width layers", text_runs),
}
MEMORY = "vae_memory"
LONG = ("text",)  # minutes for each round: no other before them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join((*TIMED, MEMORY))} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = args.parts or [*TIMED, MEMORY]
    if unknown := [part for part in parts if part not in (*TIMED, MEMORY)]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join((*TIMED, MEMORY))}")
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.machine()}, medians of {args.rounds} rounds\n")
    print("| | ours, seconds | beside it | its seconds | ours : beside it | bare : ours |")
    print("|---|---|---|---|---|---|")
    for part in ProgressBar([part for part in parts if part in TIMED], leave=False):
        label, prepare = TIMED[part]
        seconds = alternating(prepare(), args.rounds, warm_up=0 if part in LONG else 1)
        peer = next(name for name in seconds if name not in ("ours", "bare"))
        ratio = statistics.median(mine / its for mine, its in zip(seconds["ours"], seconds[peer]))
        bare = ""
        if "bare" in seconds:
            bare = f"{statistics.median(least / mine for least, mine in zip(seconds['bare'], seconds['ours'])):.2f}"
        mine, its = (statistics.median(seconds[name]) for name in ("ours", peer))
        print(f"| {label} | {mine:.2f} | {peer} | {its:.2f} | {ratio:.2f} | {bare} |", flush=True)
    if MEMORY in parts:
        print(f"\n| 17 frames of 256x256 in tiles of {TILE} | ours, GB above the start | diffusers | ratio |\n|---|---|---|---|")
        for direction in ("encode", "decode"):
            mine, its = (in_new_process(peak_of, direction, whose) for whose in ("ours", "diffusers"))
            print(f"| {direction} | {mine / 1e9:.2f} | {its / 1e9:.2f} | {mine / its:.2f} |", flush=True)


if __name__ == "__main__":
    main()
