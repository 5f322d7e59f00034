"""What a LoRA changed: the toy model's pictures without it above, with it below, from the same prompts and the same noise.

    python -m examples.toy.before_after --lora_weight quickstart_output/lora/zorp.safetensors \\
        --output quickstart_output/before_after.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.toy.contact_sheet import contact_sheet
from examples.toy.model_files import FOLDER, require_model
from examples.toy.toy_model import STEPS, ToyModel
from hunyuan_model.checkpoints.reading import open_checkpoint
from networks.lora_files import check_lora_file
from utils.cli.arguments import finite_float, positive_int, script_parser, seed
from utils.errors import run_script
from utils.files import require_writable_folder
from utils.media_writing import save_picture

ZORPS = (
    "a zorp on a red background",
    "a zorp on a blue background",
    "zorp in front of yellow",
    "on a purple background there is a zorp",
    "a zorp on a black background",
    "white background, a zorp",
)
ORDINARY = ("a yellow cross on a green background", "a red ring on a white background")  # what the LoRA must leave alone


def draw_before_after(
    folder: Path,
    lora: Path,
    multiplier: float = 1.0,
    steps: int = STEPS,
    first_seed: int = 1,
    prompts: Sequence[str] = ZORPS + ORDINARY,
) -> np.ndarray:
    """A contact sheet (H, W, 3) uint8: the model in ``folder`` without and with the LoRA, and a column for each prompt."""
    seeds = list(range(first_seed, first_seed + len(prompts)))
    rows = []
    for loras, multipliers in (((), ()), ((lora,), (multiplier,))):
        model = ToyModel.load(folder, lora=loras, multipliers=multipliers)
        pictures = model.generate(list(prompts), seeds, frames=1, steps=steps)
        rows.append([clip[0] for clip in pictures])
    captions = [[""] * len(prompts), list(prompts)]
    return contact_sheet(rows, row_labels=("without the LoRA", "with the LoRA"), captions=captions)


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Draw what a LoRA changes in the pictures of the toy model.")
    parser.add_argument("--lora_weight", type=Path, required=True, metavar="FILE", help="the LoRA, trained on the toy model")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--model", type=Path, default=FOLDER, metavar="FOLDER", help="the model (default: the toy model)")
    parser.add_argument(
        "--lora_multiplier", type=finite_float, default=1.0, metavar="M", help="multiplier of the LoRA (default: 1.0)"
    )
    parser.add_argument("--infer_steps", type=positive_int, default=STEPS, metavar="N", help=f"sampling steps (default: {STEPS})")
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="seed of the first column's noise (default: 1)")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    require_writable_folder(arguments.output.parent, "the folder of --output,")
    transformer = open_checkpoint(require_model(arguments.model).dit, "the transformer")
    check_lora_file(arguments.lora_weight, transformer.shapes)
    sheet = draw_before_after(
        arguments.model, arguments.lora_weight, arguments.lora_multiplier, arguments.infer_steps, arguments.seed
    )
    save_picture(arguments.output, sheet)
    print(arguments.output)


if __name__ == "__main__":
    run_script(main)
