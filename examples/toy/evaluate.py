"""How well the toy model draws what a prompt says, and how well its VAE shows pictures: tables, a contact sheet, a JSON file.

``scoring`` makes the prompts and counts, ``reading.read`` says what each clip shows.

    python -m examples.toy.evaluate
    python -m examples.toy.evaluate --lora_weight quickstart_output/lora/zorp.safetensors
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dataset.media.pictures import IMAGE_EXTENSIONS, read_image
from dataset.media.resizing import fit_to_bucket
from examples.toy import world, zorp
from examples.toy.reading import read
from examples.toy.scoring import (
    NO_ZORP,
    Generated,
    Prompt,
    Table,
    held_out_prompts,
    in_words,
    score_prompts,
    score_vae,
    score_zorps,
    zorp_prompts,
)
from examples.toy.toy_model import BATCH_SIZE, FLOW_SHIFT, FOLDER, FRAMES, GUIDANCE, STEPS, ToyModel
from hunyuan_model.runtime.arguments import add_weight_format_arguments, weight_format
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.sampling.flow import latent_size
from hunyuan_model.sampling.step_cache import check_step_cache
from hunyuan_model.transformer.attention import ATTENTION_MODES, check_attention_device, make_attention
from utils.cli.arguments import (
    add_device_argument,
    finite_float,
    non_negative_float,
    positive_float,
    positive_int,
    script_parser,
    seed,
)
from utils.devices import choose_dtype, explain_out_of_memory, pick_device
from utils.errors import UserError, run_script
from utils.files import atomic_path, require_writable_folder
from utils.media.writing import save_picture
from utils.sheets.contact_sheet import Cell, ContactSheet

SHEET_COLUMNS, SHEET_PROMPTS, SHEET_ZORPS, SHEET_SIDE = 4, 24, 8, 400


def count(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Score the toy model on prompts about things it has not seen in training.")
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, default=FOLDER, metavar="FOLDER", help="the model (default: the toy model)")
    model.add_argument("--lora_weight", nargs="*", default=[], metavar="PATH", help="LoRA files, merged while the model loads")
    model.add_argument(
        "--lora_multiplier", nargs="*", type=finite_float, default=[], metavar="M", help="their multipliers (default: 1.0 each)"
    )
    model.add_argument(
        "--inject_lora", action="store_true", help="keep the LoRA beside the weights, as in training (default: merged into them)"
    )
    model.add_argument("--dit_dtype", metavar="DTYPE", help="precision of the transformer (default: float32)")
    add_weight_format_arguments(model, "--fp8", "--int8")
    model.add_argument("--attn_mode", choices=ATTENTION_MODES, default="torch", help="attention kernel (default: torch)")
    model.add_argument("--split_attn", action="store_true", help="attend sample by sample (default: off)")
    add_device_argument(model)

    tasks = parser.add_argument_group("what is drawn")
    tasks.add_argument("--prompts", type=positive_int, default=200, metavar="N", help="held-out prompts (default: 200)")
    tasks.add_argument(
        "--concept_samples", type=count, default=50, metavar="N", help="prompts about zorps, half of them pictures (default: 50)"
    )
    tasks.add_argument(
        "--photographs", type=Path, metavar="FOLDER", help="pictures for the VAE, cut to squares of 64 pixels (default: none)"
    )
    tasks.add_argument("--frames", type=positive_int, default=FRAMES, metavar="N", help=f"of a clip, 4n+1 (default: {FRAMES})")
    tasks.add_argument("--infer_steps", type=positive_int, default=STEPS, metavar="N", help=f"sampling steps (default: {STEPS})")
    tasks.add_argument(
        "--flow_shift", type=positive_float, default=FLOW_SHIFT, metavar="S", help=f"shift of the schedule (default: {FLOW_SHIFT})"
    )
    tasks.add_argument(
        "--step_cache",
        type=non_negative_float,
        default=0.0,
        metavar="THRESHOLD",
        help="skip steps, as hv_generate_video.py does (default: 0, every step is computed)",
    )
    tasks.add_argument(
        "--embedded_cfg_scale", type=finite_float, default=GUIDANCE, metavar="G", help=f"distilled guidance (default: {GUIDANCE})"
    )
    tasks.add_argument("--seed", type=seed, default=0, metavar="N", help="of prompts, noise and drawings (default: 0)")
    tasks.add_argument(
        "--batch_size", type=positive_int, default=BATCH_SIZE, metavar="N", help=f"clips at a time (default: {BATCH_SIZE})"
    )
    tasks.add_argument(
        "--output",
        type=Path,
        default=Path("evaluate_output"),
        metavar="FOLDER",
        help="for contact_sheet.png and scores.json (default: evaluate_output)",
    )
    return parser


def read_photographs(folder: Path) -> np.ndarray:
    """All pictures directly in ``folder``, their middles: (N, 1, 64, 64, 3) uint8.

    Raises:
        UserError: no such folder, no picture in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"--photographs {folder} is not a folder. Give a folder of pictures, or leave the flag out.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
    if not paths:
        raise UserError(f"--photographs {folder} holds no pictures. Give a folder of pictures, or leave the flag out.")
    return np.stack([fit_to_bucket(read_image(path), (world.SIZE, world.SIZE))[None] for path in paths])


# ---------------------------------------------------------------------------------------------------------------------
# The contact sheet


def film_strip(clip: np.ndarray) -> np.ndarray:
    """The first, middle and last frame of a clip (T, H, W, 3) side by side, a single picture alone: (H, W', 3) uint8."""
    if len(clip) == 1:
        return clip[0]
    gap = np.full((clip.shape[1], 2, 3), 255, np.uint8)
    return np.concatenate([clip[0], gap, clip[len(clip) // 2], gap, clip[-1]], axis=1)


def sheet_rows(groups: Sequence[Generated], numbers: Sequence[int]) -> list[list[Cell]]:
    """Film strips of the first clips of each group with their prompts.

    Those that do not show what was asked for have a red frame, and their caption says what was read.
    """
    cells = []
    for group, number in zip(groups, numbers):
        for prompt, clip, reading in list(zip(group.prompts, group.clips, group.read))[:number]:
            right = reading.zorp if prompt.attributes.shape == zorp.NAME else all(reading.right(prompt.attributes).values())
            caption = prompt.text if right else f"{prompt.text}\nread: {in_words(reading)}"
            cells.append(Cell(film_strip(clip)[None], caption, failed=not right))
    return [cells[start : start + SHEET_COLUMNS] for start in range(0, len(cells), SHEET_COLUMNS)]


# ---------------------------------------------------------------------------------------------------------------------
# The script


def generate_and_read(args: argparse.Namespace, model: ToyModel, prompts: list[Prompt], frames: int) -> Generated:
    """The model's clips of the prompts, read, and their drawings read too."""
    started = time.perf_counter()
    with explain_out_of_memory("sampling", "use a smaller --batch_size or fewer --frames"):
        clips = model.generate(
            [prompt.text for prompt in prompts],
            [prompt.seed for prompt in prompts],
            frames=frames,
            steps=args.infer_steps,
            guidance=args.embedded_cfg_scale,
            flow_shift=args.flow_shift,
            step_cache=args.step_cache,
            batch_size=args.batch_size,
        )
    seconds = time.perf_counter() - started
    drawings = np.stack([prompt.drawn for prompt in prompts])
    rebuilt = model.through_vae(drawings, args.batch_size)
    readings = ([read(clip) for clip in group] for group in (clips, drawings, rebuilt))
    return Generated(prompts, clips, seconds, *readings)


def evaluate(args: argparse.Namespace, model: ToyModel, photographs: np.ndarray | None) -> None:
    """Score ``model``, print the tables, and write the contact sheet and the scores."""
    started = time.perf_counter()
    held_out = generate_and_read(args, model, held_out_prompts(args.prompts, args.frames, args.seed), args.frames)
    tables, groups = {"prompts": score_prompts(held_out)}, {NO_ZORP: held_out}
    of_clips = args.concept_samples // 2 if args.frames > 1 else 0
    for name, number, frames in (("a picture", args.concept_samples - of_clips, 1), ("a clip", of_clips, args.frames)):
        if number:
            groups[f"zorp, {name}"] = generate_and_read(args, model, zorp_prompts(number, frames, args.seed), frames)
    if args.concept_samples:
        tables["zorps"] = score_zorps(groups)
    tables["vae"] = score_vae(model, photographs, args.seed)
    alone = generate_and_read(args, model, held_out.prompts[:1], args.frames).seconds
    times = {"per_clip": held_out.seconds / args.prompts, "clip_alone": alone, "total": time.perf_counter() - started}

    rows = sheet_rows(list(groups.values()), (SHEET_PROMPTS, SHEET_ZORPS // 2, SHEET_ZORPS // 2))
    save_picture(args.output / "contact_sheet.png", ContactSheet(rows, SHEET_SIDE).picture())
    write_scores(args, groups, tables, times)
    for table in tables.values():
        print(table.markdown())
    print(
        f"{times['clip_alone']:.2f} seconds for one clip of {args.frames} frames in {args.infer_steps} steps, "
        f"{times['per_clip']:.2f} for each in batches of {args.batch_size}, {times['total']:.0f} in all"
    )
    print(args.output / "contact_sheet.png")
    print(args.output / "scores.json")


def write_scores(args: argparse.Namespace, groups: dict[str, Generated], tables: dict[str, Table], times: dict[str, float]) -> None:
    """Everything that was counted, with the flags of the run and what was read of every clip."""
    scores = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        **{name: table.scores for name, table in tables.items()},
        "seconds": times,
        "clips": [
            {"prompt": prompt.text, "seed": prompt.seed, "read": asdict(reading)}
            for group in groups.values()
            for prompt, reading in zip(group.prompts, group.read)
        ],
    }
    with atomic_path(args.output / "scores.json") as temporary:
        temporary.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    args = build_parser().parse_args()
    if args.inject_lora and not args.lora_weight:
        raise UserError("--inject_lora says how a LoRA is applied, and none is given: name one with --lora_weight.")
    device = pick_device(args.device)
    dtype = choose_dtype(args.dit_dtype, "--dit_dtype", device, torch.float32)
    latent_size(world.SIZE, world.SIZE, args.frames)
    check_step_cache(args.step_cache, args.infer_steps)
    require_writable_folder(args.output, "--output")
    check_attention_device(args.attn_mode, device)
    make_attention(args.attn_mode)
    photographs = None if args.photographs is None else read_photographs(args.photographs)
    model = ToyModel.load(
        args.model,
        lora=args.lora_weight,
        multipliers=args.lora_multiplier,
        inject=args.inject_lora,
        runtime=RuntimeSettings(weight_format(args), args.fp8_fast, args.attn_mode, args.split_attn),
        device=device,
        dtype=dtype,
    )
    evaluate(args, model, photographs)


if __name__ == "__main__":
    run_script(main)
