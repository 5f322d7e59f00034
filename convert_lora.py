"""Convert a LoRA file between the layout of sd-scripts (``default``) and the one that ComfyUI and diffusers read (``other``)."""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

import argparse
import os
from pathlib import Path

from networks.lora_files import check_lora_file, read_lora
from networks.lora_layouts import LAYOUTS, TARGETS
from networks.lora_writing import save_lora
from utils.cli.arguments import script_parser
from utils.errors import UserError, run_script
from utils.files import require_possible_file, require_writable_folder


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the conversion."""
    parser = script_parser("Convert a LoRA file to another layout of its keys.")
    parser.add_argument("--input", metavar="PATH", required=True, help="LoRA to read (.safetensors)")
    parser.add_argument("--output", metavar="PATH", required=True, help="file to write (.safetensors)")
    parser.add_argument(
        "--target",
        choices=TARGETS,
        required=True,
        help="layout to write: other (diffusion_model.*.lora_A, for ComfyUI and diffusers) or default (lora_unet_*, as trained)",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be converted, from the file's header alone."""
    if Path(args.output).suffix != ".safetensors":
        raise UserError(f"--output {args.output} must end in .safetensors.")
    require_possible_file(args.output, "--output")
    if os.path.realpath(args.input) == os.path.realpath(args.output):
        raise UserError(f"--input and --output are the same file, {args.input}; give the result another name.")
    layout = check_lora_file(args.input).layout
    if layout == args.target:
        raise UserError(
            f"--input {args.input} has the layout {layout} already ({LAYOUTS[layout].example}); "
            f"convert it to --target {' or '.join(name for name in TARGETS if name != layout)}."
        )
    require_writable_folder(Path(args.output).parent, "the folder of --output,")


def main() -> None:
    args = build_parser().parse_args()
    check_arguments(args)
    save_lora(args.output, read_lora(args.input), args.target)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
