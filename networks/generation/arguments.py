"""The flags of LoRA and of what a run of generation makes."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import hunyuan_model
from hunyuan_model.runtime.arguments import runtime_settings
from hunyuan_model.runtime.memory import weight_shapes
from hunyuan_model.sampling.arguments import chosen_seed, output_settings
from hunyuan_model.sampling.generation import SamplingSettings
from hunyuan_model.text.arguments import text_encoder_settings
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.vae.arguments import vae_settings
from networks.block_strengths import FLAG as BLOCK_FLAG
from networks.block_strengths import BlockStrengths
from networks.formats.reading import check_lora_file
from networks.generation.background import FLAG as BACKGROUND_FLAG
from networks.generation.comparison import AXES, Comparison
from networks.generation.comparison import FLAG as COMPARISON_FLAG
from networks.generation.interactive import LineSettings
from networks.generation.prompts import FLAG as PROMPT_FILE_FLAG
from networks.generation.prompts import check_prompt, requests_of_file
from networks.generation.record import REPEAT_FLAG, SHOW_FLAG
from networks.generation.requests import TIME, Request, without_effect
from networks.generation.sampler import injecting_where_needed
from networks.generation.settings import GenerationSettings
from networks.generation.sheets.sheet import BatchSheet
from networks.generation.starts import FindStarts, expand_starts, one_for_each
from networks.merging import complete_multipliers
from utils.cli.arguments import StoreOnce, finite_float, require_flags
from utils.cli.settings import settings_from
from utils.devices import choose_dtype
from utils.errors import UserError
from utils.files import require_possible_file, require_writable_folder
from utils.media.writing import unused_stem

logger = logging.getLogger(__name__)

MODEL_FLAGS = ("save_path", "dit", "text_encoder1", "text_encoder2")  # that sampling needs
SHEET_ENDINGS = (".png", ".mp4", ".html")


class Asked(NamedTuple):
    """What a run is to make, the LoRA files that the multipliers of its requests are for, and what shows it all."""

    requests: Sequence[Request]
    lora_weight: Sequence[str]
    sheet: BatchSheet | None = None


def add_lora_arguments(group: argparse._ArgumentGroup) -> None:
    """LoRA files, how strong they are, and where they are computed."""
    group.add_argument("--lora_weight", nargs="*", default=[], metavar="PATH", help="LoRA files of any layout and kind")
    group.add_argument(
        "--lora_multiplier", nargs="*", type=finite_float, default=[], metavar="M", help="their multipliers (default: 1.0 each)"
    )
    group.add_argument(
        "--lora_mode",
        choices=("merge", "inject"),
        default="merge",
        help="merge LoRA into the weights while they load, or compute it beside them in every step, as is done with --interactive "
        "and where multipliers differ (default: merge)",
    )
    group.add_argument("--lora_partial", action="store_true", help="use LoRA files that fit the model only in part (default: off)")
    group.add_argument(
        BLOCK_FLAG,
        nargs="*",
        default=[],
        metavar="PLACE=M",
        help="factors of the multipliers by block: double=M, single=M, other=M, single.0-9,12=M; the last counts (default: 1)",
    )
    group.add_argument("--exclude_single_blocks", action="store_true", help="use no LoRA in single blocks (default: off)")
    group.add_argument("--save_merged_model", metavar="PATH", help="write the transformer with the LoRA merged to PATH, and exit")


def add_background_argument(group: argparse._ArgumentGroup) -> None:
    """--decode_on_cpu."""
    group.add_argument(
        BACKGROUND_FLAG,
        action="store_true",
        help="decode each result on the CPU, in float32, while the next one is sampled on the GPU, if RAM suffices (default: off)",
    )


def add_record_arguments(group: argparse._ArgumentGroup) -> None:
    """What the metadata of files are good for."""
    group.add_argument(SHOW_FLAG, metavar="FILE", help="print how a file was made, with the command that makes it again, and exit")
    group.add_argument(
        REPEAT_FLAG,
        metavar="FILE",
        help="make a file again, to the bit on the same machine: its flags count where the command line has none; the folder "
        "is that of the file",
    )
    group.add_argument(
        "--skip_existing",
        action="store_true",
        help="leave out what an earlier run with the same flags has made, and only decode what it has sampled (default: off)",
    )


def lora_multipliers(args: argparse.Namespace, others: Sequence[str] = ()) -> tuple[float, ...]:
    """One for each --lora_weight, and for ``others`` behind them."""
    return complete_multipliers([*args.lora_weight, *others], args.lora_multiplier, "--lora_weight", "--lora_multiplier")


def block_strengths(args: argparse.Namespace, config: TransformerConfig) -> BlockStrengths:
    """As the flags say; errors as of ``BlockStrengths.parse``."""
    return BlockStrengths.parse(args.lora_block_multiplier, config, args.exclude_single_blocks)


def generation_settings(args: argparse.Namespace, device: torch.device, asked: Asked, processes: int = 1) -> GenerationSettings:
    """The models of a run that samples what is ``asked`` for, checked; no weights are read.

    ``processes``: that compute each video together.

    Raises:
        UserError: a flag that is missing, impossible, or names a file that is not what the flag expects.
    """
    if args.output_type != "latent":
        require_flags(args, f"--output_type {args.output_type}", "vae")
    if args.preview_every is not None:
        require_flags(args, "--preview_every", "vae")
    if any(request.image_path or request.video_path for request in asked.requests):
        require_flags(args, "starting from a picture or clip", "vae")
    config = hunyuan_model.check_transformer_file(args.dit, "--dit")
    settings = settings_from(
        GenerationSettings,
        args,
        dit_dtype=choose_dtype(args.dit_dtype, "--dit_dtype", device, torch.bfloat16),
        runtime=replace(runtime_settings(args, args.attn_mode), sequence_parallel=processes),
        text=text_encoder_settings(args, device),
        vae=vae_settings(args, device),
        output=output_settings(args),
        config=config,
        lora_weight=tuple(asked.lora_weight),
        lora_blocks=block_strengths(args, config),
    )
    settings.runtime.check(device, settings.dit_dtype, settings.config)
    for path in settings.lora_weight:
        check_lora_file(path, weight_shapes(settings.config), partial=settings.lora_partial)
    hunyuan_model.check_text_encoder_files(args.text_encoder1, args.text_encoder2)
    if args.vae:
        hunyuan_model.check_vae_file(args.vae)
    return replace(settings, lora_mode="inject") if args.interactive else injecting_where_needed(settings, asked.requests)


def add_request_arguments(group: argparse._ArgumentGroup) -> None:
    """What the results show."""
    group.add_argument(
        "--prompt",
        action=StoreOnce,
        instead=f"{PROMPT_FILE_FLAG} with a prompt a line",
        metavar="TEXT",
        help="what the video shows",
    )
    group.add_argument("--negative_prompt", metavar="TEXT", help="what --guidance_scale leads away from (default: the empty text)")
    group.add_argument(
        PROMPT_FILE_FLAG,
        metavar="FILE",
        help="one result for each prompt of a .txt (a line each), .toml or .json file, all from one load; the flags say what the "
        "prompts leave out, and the seeds count up from --seed (default: none)",
    )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="read prompt lines from the terminal or a pipe, and sample each with the networks that stay loaded (default: off)",
    )
    group.add_argument(
        COMPARISON_FLAG,
        nargs=2,
        metavar=("COLUMNS", "ROWS"),
        help=f"compare: one result for each pair of values, and a sheet of all with labels. Each is NAME=VALUE,VALUE; names are "
        f"{', '.join(AXES)}; lora takes patterns and none, prompt=@FILE reads prompts (default: none)",
    )
    group.add_argument(
        "--sheet",
        metavar="PATH",
        help="PNG for the contact sheet of several results, with a page and, for clips, an MP4 beside it (default: in --save_path, "
        "xy_TIME.png or FILE_sheet.png)",
    )


def asked_for(args: argparse.Namespace, find_starts: FindStarts) -> Asked:
    """What the flags ask for, in the order in which it is made.

    Raises:
        UserError: something that cannot be sampled, or a sheet that cannot be written.
    """
    if args.output_type == "latent" and (args.xy or args.sheet):
        flag = COMPARISON_FLAG if args.xy else "--sheet"
        raise UserError(f"{flag} shows what is decoded, and --output_type latent decodes nothing; use video, images or both.")
    if args.xy:
        return compared(args, find_starts)
    requests = expand_starts(requests_from(args), find_starts)
    if len(requests) == 1 and args.sheet:
        logger.warning("--sheet: no effect with a single result.")
    if len(requests) == 1 or args.output_type == "latent":
        return Asked(requests, args.lora_weight)
    columns = math.ceil(math.sqrt(len(requests)))
    grid = [requests[start : start + columns] for start in range(0, len(requests), columns)]
    stem = Path(args.from_file).stem if args.from_file else time.strftime(TIME)
    return Asked(requests, args.lora_weight, BatchSheet(sheet_path(args, f"{stem}_sheet"), grid, args.fps, args.lora_weight))


def compared(args: argparse.Namespace, find_starts: FindStarts) -> Asked:
    """What --xy asks for, as of ``asked_for``."""
    if args.from_file is not None:
        raise UserError(f"{COMPARISON_FLAG} and {PROMPT_FILE_FLAG} both say what to sample; give one of them.")
    comparison = Comparison.read(args.xy)
    compares = {axis.name for axis in comparison.axes}
    require_flags(args, COMPARISON_FLAG, *MODEL_FLAGS, *({"prompt"} - compares))
    for name in {"prompt", "seed"} & compares:
        if getattr(args, name) is not None:
            logger.warning("--%s: no effect, as %s compares it.", name, COMPARISON_FLAG)
    check_prompt(args.prompt or "")
    own = ["the LoRA of --xy"] if "lora" in compares else []
    grid = comparison.grid(request_of(args, 0 if "seed" in compares else chosen_seed(args), own))
    requests = list(dict.fromkeys(request for row in grid for request in row))
    warn_of_no_effect(requests)
    started = expand_starts(requests, find_starts)
    if len(started) > len(requests) or len(args.latent_path) > 1:
        raise UserError(f"{COMPARISON_FLAG} starts all its results from one file; name it in place of several or of their folder.")
    found = dict(zip(requests, started))
    cells = [[found[request] for request in row] for row in grid]
    files = [*args.lora_weight, *comparison.lora_files]
    labels = [[value.label for value in axis.values] for axis in comparison.axes]
    path = sheet_path(args, f"xy_{time.strftime(TIME)}")
    return Asked(started, files, BatchSheet(path, cells, args.fps, files, *labels, {"xy": shlex.join(args.xy)}))


def sheet_path(args: argparse.Namespace, stem: str) -> Path:
    """Where the contact sheet goes: --sheet, or ``stem`` in --save_path.

    Raises:
        UserError: nothing can be written there.
    """
    if args.sheet is None:
        folder = Path(args.save_path)
        return folder / f"{stem if args.skip_existing else unused_stem(folder, stem, SHEET_ENDINGS)}.png"
    path = Path(args.sheet)
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet {path} must end in .png; the .html, and for clips the .mp4, are beside it.")
    for ending in SHEET_ENDINGS:
        require_possible_file(path.with_suffix(ending), "--sheet")
    require_writable_folder(path.parent, "the folder of --sheet,")
    return path


def requests_from(args: argparse.Namespace) -> list[Request]:
    """What --prompt or --from_file asks for, in the order in which it is made.

    Raises:
        UserError: something that cannot be sampled.
    """
    if args.prompt is not None and args.from_file is not None:
        raise UserError(f"--prompt and {PROMPT_FILE_FLAG} both say what to sample; give one of them.")
    require_flags(args, "generation", *MODEL_FLAGS, *([] if args.from_file else ["prompt"]))
    if args.from_file:
        requests = requests_of_file(args.from_file, request_of(args, args.seed or 0), args.lora_weight, args.seed)
    else:
        check_prompt(args.prompt)
        requests = [request_of(args, chosen_seed(args))]
    warn_of_no_effect(requests)
    if len(args.latent_path) < 2:
        return requests
    paths = [Path(path) for path in args.latent_path]
    return [one for request in requests for one in (one_for_each(request, "latent", paths) if request.latent_path else [request])]


def request_of(args: argparse.Namespace, seed: int, other_loras: Sequence[str] = ()) -> Request:
    """What the flags say of a result, with an empty prompt where there is none, and multipliers also for ``other_loras``."""
    return settings_from(
        Request,
        args,
        prompt=args.prompt or "",
        sampling=settings_from(SamplingSettings, args, seed=seed),
        lora_multiplier=lora_multipliers(args, other_loras),
        latent_path=args.latent_path[0] if args.latent_path else None,
        seed_given=args.seed is not None,
    )


def line_settings(args: argparse.Namespace) -> LineSettings:
    """Those of --interactive before its first line.

    Raises:
        UserError: flags that cannot be, or prompts from elsewhere, too.
    """
    if given := [flag for flag in ("prompt", "from_file", "xy", "sheet") if getattr(args, flag) is not None]:
        raise UserError(f"--interactive reads prompts one by one; leave --{given[0]} out.")
    if len(args.latent_path) > 1:
        raise UserError("--interactive starts from one file; give one --latent_path.")
    require_flags(args, "--interactive", *MODEL_FLAGS)
    if args.skip_existing:
        logger.warning("--skip_existing: no effect with --interactive.")
    return LineSettings(request_of(args, args.seed or 0), args.seed, args.lora_weight)


def warn_of_no_effect(requests: Sequence[Request]) -> None:
    """Log what the requests ask for and do not get."""
    for sentence in without_effect(requests):
        logger.warning(sentence)
