"""What storing weights as float8 changes in a transformer's output: a Markdown table.

Each row compares one network with float8 block weights, computing in float32, with the same network in float32, on
random latents; "weights" is the relative error of the stored weights themselves, "output" that of what comes out (root mean
square of the difference over that of the float32 value). bfloat16 weights stand beside it for scale.

    python benchmarks/fp8_error.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hunyuan_model.architecture import TransformerConfig, rope_dims_for  # noqa: E402
from hunyuan_model.fp8 import FP8_DTYPE, is_fp8_target  # noqa: E402
from hunyuan_model.loading import load_transformer  # noqa: E402
from hunyuan_model.transformer import HYVideoDiffusionTransformer  # noqa: E402

TOY = ROOT / "examples" / "toy" / "dit.safetensors"


def full_width(double_depth: int, single_depth: int) -> HYVideoDiffusionTransformer:
    """Random blocks of the published width, 3072."""
    config = TransformerConfig(
        double_depth=double_depth, single_depth=single_depth, rope_dims=rope_dims_for(128), text_dim=64, pooled_dim=64
    )
    torch.manual_seed(0)
    return HYVideoDiffusionTransformer(config)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return ((value.float() - reference).norm() / reference.norm()).item()


def inputs_for(config: TransformerConfig, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A 128x128 image at t = 500 with 20 tokens of text and guidance 6."""
    return (
        torch.randn(1, config.in_channels, 1, 16, 16, generator=generator),
        torch.tensor([500.0]),
        torch.randn(1, 20, config.text_dim, generator=generator),
        torch.ones(1, 20),
        torch.randn(1, config.pooled_dim, generator=generator),
        torch.tensor([6000.0]),
    )


def measure(name: str, transformer: HYVideoDiffusionTransformer, folder: Path, generator: torch.Generator) -> str:
    """A row of the table."""
    path = folder / "transformer.safetensors"
    save_file(transformer.state_dict(), path)
    inputs = inputs_for(transformer.config, generator)
    targets = [weight for name, weight in transformer.state_dict().items() if is_fp8_target(name)]
    weights = torch.cat([weight.flatten() for weight in targets[:4]])
    with torch.no_grad():
        reference = transformer(*inputs)
        in_fp8 = load_transformer(path, device="cpu", dtype=torch.float32, fp8=True)(*inputs)
        for parameter in transformer.parameters():  # bfloat16 weights, float32 arithmetic: the rounding alone
            parameter.copy_(parameter.to(torch.bfloat16))
        in_bf16 = transformer(*inputs)
    cells = [
        relative(weights.to(FP8_DTYPE), weights),
        relative(in_fp8, reference),
        relative(weights.to(torch.bfloat16), weights),
        relative(in_bf16, reference),
    ]
    return f"| {name} | " + " | ".join(f"{100 * cell:.2f} %" for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what float8 weights change in a transformer's output.")
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 2), metavar=("D", "S"), help="full-width blocks (default: 1 2)")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    double, single = args.blocks
    print("| network | float8 weights | float8 output | bfloat16 weights | bfloat16 output |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        toy = load_transformer(TOY, device="cpu", dtype=torch.float32)
        print(measure("the toy model", toy, Path(folder), generator), flush=True)
        wide = full_width(double, single)
        print(measure(f"{double} + {single} random blocks of width 3072", wide, Path(folder), generator))


if __name__ == "__main__":
    main()
