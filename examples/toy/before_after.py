"""What a LoRA changes: the toy model's pictures without it above, with it below, from the same prompts and the same noise.

    python -m examples.toy.before_after --lora_weight quickstart_output/lora/zorp.safetensors \\
        --output quickstart_output/before_after.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.toy.contact_sheet import Cell, save_contact_sheet
from examples.toy.model_files import FOLDER, require_model
from examples.toy.toy_model import STEPS, ToyModel
from hunyuan_model.checkpoints.reading import open_checkpoint
from networks.formats.reading import check_lora_file
from utils.cli.arguments import finite_float, positive_int, script_parser, seed
from utils.errors import run_script
from utils.files import require_writable_folder

ZORPS = (
    "a zorp on a red background",
    "a zorp on a blue background",
    "zorp in front of yellow",
    "on a purple background there is a zorp",
    "a zorp on a black background",
    "white background, a zorp",
)
ORDINARY = ("a yellow cross on a green background", "a red ring on a white background")  # what the LoRA must leave alone


def pictures_before_and_after(arguments: argparse.Namespace) -> list[list[Cell]]:
    """Two rows: the model without and with the LoRA; a column for each prompt."""
    prompts = ZORPS + ORDINARY
    seeds = list(range(arguments.seed, arguments.seed + len(prompts)))
    rows = []
    for loras in ([], [arguments.lora_weight]):
        model = ToyModel.load(arguments.model, lora=loras, multipliers=[arguments.lora_multiplier] * len(loras))
        clips = model.generate(list(prompts), seeds, frames=1, steps=arguments.infer_steps)
        rows.append([Cell(clip[0], prompt if loras else "") for clip, prompt in zip(clips, prompts)])
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Show what a LoRA changes in the pictures of the toy model.")
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
    save_contact_sheet(arguments.output, pictures_before_and_after(arguments), ("without the LoRA", "with the LoRA"))
    print(arguments.output)


if __name__ == "__main__":
    run_script(main)
