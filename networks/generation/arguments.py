"""The flags of LoRA and of what a run of generation makes."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

import hunyuan_model
from hunyuan_model.runtime.arguments import runtime_settings
from hunyuan_model.runtime.memory import weight_shapes
from hunyuan_model.sampling.arguments import output_settings, sampling_settings
from hunyuan_model.sampling.generation import SamplingSettings
from hunyuan_model.text.arguments import text_encoder_settings
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.vae.arguments import vae_settings
from networks.block_strengths import FLAG as BLOCK_FLAG
from networks.block_strengths import BlockStrengths
from networks.formats.reading import check_lora_file
from networks.generation.prompts import FLAG as PROMPT_FILE_FLAG
from networks.generation.prompts import check_prompt, requests_of_file
from networks.generation.requests import Request, without_effect
from networks.generation.settings import GenerationSettings
from networks.generation.starts import one_for_each
from networks.merging import complete_multipliers
from utils.cli.arguments import StoreOnce, finite_float, require_flags
from utils.cli.settings import settings_from
from utils.devices import choose_dtype
from utils.errors import UserError

logger = logging.getLogger(__name__)


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
        help="merge LoRA into the weights while they load, or compute it beside them in every step (default: merge)",
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


def lora_multipliers(args: argparse.Namespace) -> tuple[float, ...]:
    """One for each --lora_weight."""
    return complete_multipliers(args.lora_weight, args.lora_multiplier, "--lora_weight", "--lora_multiplier")


def block_strengths(args: argparse.Namespace, config: TransformerConfig) -> BlockStrengths:
    """As the flags say; errors as of ``BlockStrengths.parse``."""
    return BlockStrengths.parse(args.lora_block_multiplier, config, args.exclude_single_blocks)


def generation_settings(args: argparse.Namespace, device: torch.device, requests: Sequence[Request]) -> GenerationSettings:
    """The models of a run that samples ``requests``, checked; no weights are read.

    Raises:
        UserError: a flag that is missing, impossible, or names a file that is not what the flag expects.
    """
    if args.output_type != "latent":
        require_flags(args, f"--output_type {args.output_type}", "vae")
    if args.preview_every is not None:
        require_flags(args, "--preview_every", "vae")
    if any(request.image_path or request.video_path for request in requests):
        require_flags(args, "starting from a picture or clip", "vae")
    config = hunyuan_model.check_transformer_file(args.dit, "--dit")
    settings = settings_from(
        GenerationSettings,
        args,
        dit_dtype=choose_dtype(args.dit_dtype, "--dit_dtype", device, torch.bfloat16),
        runtime=runtime_settings(args, args.attn_mode),
        text=text_encoder_settings(args, device),
        vae=vae_settings(args, device),
        output=output_settings(args),
        config=config,
        lora_blocks=block_strengths(args, config),
    )
    settings.runtime.check(device, settings.dit_dtype, settings.config)
    for path in settings.lora_weight:
        check_lora_file(path, weight_shapes(settings.config), partial=settings.lora_partial)
    hunyuan_model.check_text_encoder_files(args.text_encoder1, args.text_encoder2)
    if args.vae:
        hunyuan_model.check_vae_file(args.vae)
    return settings


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


def requests_from(args: argparse.Namespace) -> list[Request]:
    """What the flags ask for, in the order in which it is made.

    Raises:
        UserError: something that cannot be sampled.
    """
    if args.prompt is not None and args.from_file is not None:
        raise UserError(f"--prompt and {PROMPT_FILE_FLAG} both say what to sample; give one of them.")
    prompt = [] if args.from_file else ["prompt"]
    require_flags(args, "generation", "save_path", "dit", "text_encoder1", "text_encoder2", *prompt)
    given = {"lora_multiplier": lora_multipliers(args), "latent_path": args.latent_path[0] if args.latent_path else None}
    if args.from_file:
        sampling = settings_from(SamplingSettings, args, seed=args.seed or 0)
        base = settings_from(Request, args, prompt="", sampling=sampling, **given)
        requests = requests_of_file(args.from_file, base, args.lora_weight, args.seed)
    else:
        check_prompt(args.prompt)
        requests = [settings_from(Request, args, sampling=sampling_settings(args), **given)]
    for sentence in without_effect(requests):
        logger.warning(sentence)
    if len(args.latent_path) < 2:
        return requests
    paths = [Path(path) for path in args.latent_path]
    return [one for request in requests for one in (one_for_each(request, "latent", paths) if request.latent_path else [request])]
