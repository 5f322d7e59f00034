"""Which flags a GPU of a given size needs for training, by arithmetic: Markdown tables. Nothing is loaded or run.

For the published model and a LoRA of rank 32 with AdamW, in bfloat16, one picture or clip of 960x544 per batch with the longest
caption. A GPU of N GB is taken as N * 2^30 bytes, of which the driver and other programs hold 0.8 * 10^9. Of the flags that
would do, the tables name those that training itself would name, in its order.

    python benchmarks/gpu_table.py
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hunyuan_model.runtime.memory import BatchSize  # noqa: E402
from hunyuan_model.runtime.memory_plan import MemoryPlan  # noqa: E402
from hunyuan_model.runtime.memory_report import MAX_TEXT_TOKENS  # noqa: E402
from hunyuan_model.runtime.settings import RuntimeSettings  # noqa: E402
from hunyuan_model.sampling.flow import latent_size  # noqa: E402
from hunyuan_model.transformer.config import TransformerConfig  # noqa: E402
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer  # noqa: E402
from networks.lora import create_network  # noqa: E402

GPUS = (6, 8, 10, 12, 16, 24, 32, 48, 80)  # GB as they are sold
HELD = 800_000_000
ADAM_BYTES = 8.0
SIZES = {"pictures of 960x544": (544, 960, 1), "clips of 960x544 and 33 frames": (544, 960, 33)}


def training_plan(size: tuple[int, int, int], rank: int = 32, mixed_precision: bool = True) -> MemoryPlan:
    """Training without any flag that saves memory, on a GPU, for batches of one; ``size`` is (height, width, frames)."""
    config = TransformerConfig()
    with torch.device("meta"):
        network = create_network(1.0, rank, 1.0, None, None, HYVideoDiffusionTransformer(config))
    values = sum(parameter.numel() for parameter in network.parameters())
    batch = BatchSize(1, latent_size(*size), MAX_TEXT_TOKENS)
    dtype, compute_dtype = torch.bfloat16, torch.bfloat16 if mixed_precision else torch.float32
    return MemoryPlan(config, torch.device("cuda"), RuntimeSettings(), batch, dtype, compute_dtype, values, ADAM_BYTES)


def gpu_table(plan: MemoryPlan, gpus: tuple[int, ...] = GPUS) -> str:
    """A Markdown table: a row for each size of GPU."""
    exact = replace(plan, may_quantize=False)
    lines = [
        "| GPU | flags | takes | RAM | without quantization | takes | RAM |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {gpu} GB | {_cells(plan, gpu)} | {_cells(exact, gpu)} |" for gpu in gpus]
    return "\n".join(lines)


def _cells(plan: MemoryPlan, gpu: int) -> str:
    free = gpu * 2**30 - HELD
    flags, plan = plan.until_it_fits(free)
    need = plan.need()
    if need.on_device > free:
        return "too small | |"
    given = f"`{' '.join(flags)}`" if flags else "none needed"
    return f"{given} | {need.on_device / 1e9:.1f} GB | {need.on_host / 1e9:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA (32)")
    args = parser.parse_args()
    logging.disable()
    for name, size in SIZES.items():
        plan = training_plan(size, args.rank)
        print(f"\n{name[0].upper()}{name[1:]}, {plan.batch.tokens(plan.config)} tokens:\n\n{gpu_table(plan)}")
    print(f"\nrank {args.rank}, captions of {MAX_TEXT_TOKENS} tokens, --mixed_precision bf16, AdamW in float32")


if __name__ == "__main__":
    main()
