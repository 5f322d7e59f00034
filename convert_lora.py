"""Convert a LoRA file to the layout that another program reads, or say what it is and which programs read it (``--check``)."""

from __future__ import annotations

import utils.startup  # noqa: F401  # isort: skip

import argparse
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from networks.formats.description import describe
from networks.formats.layouts import LAYOUTS, TARGETS
from networks.formats.reading import LoraFile, check_lora_file, lora_path, read_lora
from networks.formats.report import report
from networks.formats.writing import save_lora, to_layout
from utils.cli.arguments import script_parser
from utils.errors import UserError, run_script
from utils.files import require_possible_file, require_writable_folder
from utils.output import show
from utils.safetensors_io import read_header

CONVERSION = ("input", "output", "target", "lora_partial")
CHECK = ("dit", "norms", "json")


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the script."""
    parser = script_parser(
        "Convert a LoRA file to another layout of its keys, or say with --check what it is and which programs read it."
    )
    group = parser.add_argument_group("conversion")
    group.add_argument("--input", metavar="PATH", help="LoRA to read (.safetensors), or a folder that PEFT saved")
    group.add_argument("--output", metavar="PATH", help="file to write (.safetensors)")
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="layout to write: default (as trained, lora_unet_*), other (for ComfyUI, its wrapper and diffusers, "
        "diffusion_model.*.lora_A), diffusers (its names), comfy (ComfyUI's names, any kind of update), framepack",
    )
    group.add_argument(
        "--lora_partial", action="store_true", help="leave out keys that cannot be read instead of refusing the file"
    )
    group = parser.add_argument_group("check")
    group.add_argument("--check", metavar="PATH", help="LoRA to describe; nothing is written")
    group.add_argument("--dit", metavar="PATH", help="transformer to compare the modules with")
    group.add_argument(
        "--norms", action="store_true", help="also compute the norms of the updates, with --dit relative to the weights"
    )
    group.add_argument("--json", action="store_true", help="print the description as one JSON object")
    return parser


def require_one_task(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with a sentence where flags are missing or belong to the other task."""
    task, others = ("--check", CONVERSION) if args.check else ("a conversion", CHECK)
    if given := [f"--{name}" for name in others if getattr(args, name)]:
        parser.error(f"{', '.join(given)} cannot be given with {task}")
    if not args.check and (missing := [f"--{name}" for name in CONVERSION[:3] if not getattr(args, name)]):
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def check_conversion(args: argparse.Namespace) -> None:
    """Refuse what cannot be converted, from the file's header alone."""
    if Path(args.output).suffix != ".safetensors":
        raise UserError(f"--output {args.output} must end in .safetensors.")
    require_possible_file(args.output, "--output")
    if os.path.realpath(lora_path(args.input)) == os.path.realpath(args.output):
        raise UserError(f"--input and --output are the same file, {args.input}; give the result another name.")
    with without_warnings():
        lora = check_lora_file(args.input, partial=args.lora_partial)
        same = _is_written_so(lora, args.target)
    if same:
        raise UserError(
            f"--input {args.input} has the layout {lora.layout} already ({LAYOUTS[lora.layout].example}); "
            f"convert it to --target {' or '.join(name for name in TARGETS if name != lora.layout)}."
        )
    require_writable_folder(Path(args.output).parent, "the folder of --output,")


def _is_written_so(lora: LoraFile, target: str) -> bool:
    """Whether the file would stay as it is. Also refuses what the target cannot hold."""
    shapes = {key: tuple(tensor.shape) for key, tensor in to_layout(lora, target).items()}
    return shapes == read_header(lora_path(lora.source)).shapes


@contextmanager
def without_warnings() -> Iterator[None]:
    """For readings of the header: what is left out is described, or logged when the file itself is read."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def print_description(args: argparse.Namespace) -> None:
    with without_warnings():
        facts = describe(args.check, args.dit, norms=args.norms)
    show(json.dumps(facts.as_json(), indent=1) if args.json else report(facts))


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    require_one_task(parser, args)
    if args.check:
        print_description(args)
        return
    check_conversion(args)
    save_lora(args.output, read_lora(args.input, partial=args.lora_partial), args.target)
    show(args.output)


if __name__ == "__main__":
    run_script(main)
