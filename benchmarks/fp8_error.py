"""What storing block weights in one byte each changes in a transformer's output: Markdown tables.

The first table has the relative error of single weights, which is that of what they make of random inputs. Then every way of
storing them is compared, in float32 arithmetic, with the same network in float32 on random latents: "weights" is
the relative error of the stored weights themselves, "output" that of what comes out (root mean square of the difference over
that of the float32 value). The formats of ``--fp8``, ``--fp8_scaled`` and ``--int8`` stand beside others that were tried.
"--fp8_fast" computes with the CPU kernel for float8 matmuls, in bfloat16 and with a scale per row.

    python benchmarks/fp8_error.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hunyuan_model.quantization.formats import (  # noqa: E402
    Quantized,
    cast_to_float8,
    dequantize,
    is_quantized_name,
    quantize_channels,
    quantize_groups,
)
from hunyuan_model.quantization.linear import enable_quantized_linears  # noqa: E402
from hunyuan_model.quantization.scaled_mm import Float8Matmuls  # noqa: E402
from hunyuan_model.runtime.loading import load_transformer  # noqa: E402
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for  # noqa: E402
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer  # noqa: E402

TOY = ROOT / "examples" / "toy" / "dit.safetensors"


def float8_blocks(weight: torch.Tensor) -> Quantized:
    """float8 with a scale for each 64 inputs."""
    codes, scale = quantize_channels(weight.reshape(-1, 64))
    return codes.reshape(weight.shape), scale.reshape(len(weight), -1)


def searched_blocks(weight: torch.Tensor) -> Quantized:
    """float8 with a scale for each 32 inputs: of eight within a factor of two the one with the least error."""
    parts = weight.reshape(-1, 32)
    largest = parts.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    codes, scale, least = None, None, None
    for step in range(8):
        candidate = largest * 2 ** (step / 8)
        rounded, _ = cast_to_float8(parts / candidate)
        error = (rounded.float() * candidate - parts).square().sum(1, keepdim=True)
        if least is None:
            codes, scale, least = rounded, candidate, error
            continue
        better = error < least
        codes = torch.where(better, rounded.float(), codes.float()).to(rounded.dtype)
        scale, least = torch.where(better, candidate, scale), torch.minimum(error, least)
    return codes.reshape(weight.shape), scale.reshape(len(weight), -1)


def as_bfloat16(weight: torch.Tensor) -> Quantized:
    return weight.to(torch.bfloat16), None


WAYS: dict[str, Callable[[torch.Tensor], Quantized]] = {
    "float8, plain (`--fp8`)": cast_to_float8,
    "float8, scale per channel (`--fp8_scaled`)": quantize_channels,
    "float8, scale per 64 inputs": float8_blocks,
    "float8, best scale per 32 inputs": searched_blocks,
    "int8, scale per channel": lambda weight: quantize_groups(weight, weight.shape[1]),
    "int8, scale per 128 inputs": lambda weight: quantize_groups(weight, 128),
    "int8, scale per 64 inputs (`--int8`)": quantize_groups,
    "bfloat16": as_bfloat16,
}
FAST = {
    "float8, plain": cast_to_float8,
    "float8, scale per channel": quantize_channels,
}


def full_width(double_depth: int, single_depth: int, std: float | None) -> HYVideoDiffusionTransformer:
    """Random blocks of the published width, 3072; their Linear weights normal with ``std``, or torch's."""
    config = TransformerConfig(
        double_depth=double_depth, single_depth=single_depth, rope_dims=rope_dims_for(128), text_dim=64, pooled_dim=64
    )
    torch.manual_seed(0)
    transformer = HYVideoDiffusionTransformer(config).requires_grad_(False)
    for name, weight in transformer.named_parameters():
        if std is not None and is_quantized_name(name):
            weight.normal_(0, std)
    return transformer


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return ((value.float() - reference).norm() / reference.norm()).item()


def inputs_for(config: TransformerConfig, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Images of 128x128 at several t, with 20 tokens of text and guidance 6."""
    t = torch.tensor([100.0, 300.0, 500.0, 700.0, 900.0])
    count = len(t)
    return (
        torch.randn(count, config.in_channels, 1, 16, 16, generator=generator),
        t,
        torch.randn(count, 20, config.text_dim, generator=generator),
        torch.ones(count, 20),
        torch.randn(count, config.pooled_dim, generator=generator),
        torch.full((count,), 6000.0),
    )


def some_weights() -> dict[str, torch.Tensor]:
    """One layer of the toy model, and random weights 1024 x 3072 of several distributions."""
    generator = torch.Generator().manual_seed(0)
    shape = (1024, 3072)
    normal, others = torch.randn(shape, generator=generator), torch.randn((4, *shape), generator=generator)
    return {
        "torch's initial weights": torch.empty(shape).uniform_(-(3072**-0.5), 3072**-0.5, generator=generator),
        "normal, 0.02": 0.02 * normal,
        "Student's t, 4 degrees, 0.02": 0.02 * normal / others.square().mean(0).sqrt(),  # heavy tails
        "the toy model's single_blocks.3.linear2": load_file(TOY)["single_blocks.3.linear2.weight"].float(),
    }


def measure_layers() -> None:
    """Print the table of single weights."""
    weights = some_weights()
    print("| stored as | bytes per weight | " + " | ".join(weights) + " |\n|---|---|" + "---|" * len(weights))
    for way, quantize in WAYS.items():
        errors = [f"{100 * relative(restored(quantize, weight), weight):.2f} %" for weight in weights.values()]
        codes, scale = quantize(next(iter(weights.values())))
        size = (codes.nbytes + (0 if scale is None else scale.nbytes)) / codes.numel()
        print(f"| {way} | {size:.3f} | " + " | ".join(errors) + " |", flush=True)
    print()


def measure(title: str, transformer: HYVideoDiffusionTransformer, generator: torch.Generator) -> None:
    """Print the table of one network."""
    inputs = inputs_for(transformer.config, generator)
    exact = {name: weight for name, weight in transformer.named_parameters() if is_quantized_name(name)}
    reference = transformer(*inputs)
    print(f"| {title} | weights | output |\n|---|---|---|")
    for way, quantize in WAYS.items():
        if quantize is searched_blocks:  # slow, and in the first table
            continue
        changed = transformer.state_dict() | {name: restored(quantize, weight) for name, weight in exact.items()}
        squares = [((changed[name] - weight).square().sum(), weight.square().sum()) for name, weight in exact.items()]
        error = (sum(square for square, _ in squares) / sum(whole for _, whole in squares)).sqrt().item()
        output = torch.func.functional_call(transformer, changed, inputs)
        print(f"| {way} | {100 * error:.2f} % | {100 * relative(output, reference):.2f} % |", flush=True)
        del changed
    for way, quantize in FAST.items():
        for name, weight in exact.items():
            store(transformer.get_submodule(name.removesuffix(".weight")), quantize(weight))
        enable_quantized_linears(transformer, torch.float32, Float8Matmuls(per_row=True))
        print(f"| `--fp8_fast`: {way} | | {100 * relative(transformer(*inputs), reference):.2f} % |", flush=True)
        for name, weight in exact.items():
            linear = transformer.get_submodule(name.removesuffix(".weight"))
            linear.weight = weight
            del linear.forward
    print()


def restored(quantize: Callable[[torch.Tensor], Quantized], weight: torch.Tensor) -> torch.Tensor:
    codes, scale = quantize(weight)
    return dequantize(codes, torch.float32, scale)


def store(linear: nn.Linear, quantized: Quantized) -> None:
    codes, scale = quantized
    linear.weight = nn.Parameter(codes, requires_grad=False)
    linear.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what quantized weights change in a transformer's output.")
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 1), metavar=("D", "S"), help="full-width blocks (default: 1 1)")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    double, single = args.blocks
    measure_layers()
    measure("the toy model", load_transformer(TOY, device="cpu", dtype=torch.float32), generator)
    for std, how in ((None, "torch's initial weights, 0.018 at most"), (0.02, "normal weights, standard deviation 0.02")):
        measure(f"{double} + {single} blocks of width 3072, {how}", full_width(double, single, std), generator)
    print(f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
