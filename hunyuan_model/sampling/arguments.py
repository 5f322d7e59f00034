"""The flags of sampling and of what is written."""

from __future__ import annotations

import argparse
import logging

from hunyuan_model.sampling.decoding import ENDINGS, OutputSettings
from utils.cli.arguments import (
    finite_float,
    int_up_to,
    non_negative_float,
    positive_float,
    positive_int,
    random_seed,
    seed,
    whole_number,
)
from utils.cli.settings import settings_from
from utils.files import require_writable_folder

logger = logging.getLogger(__name__)

MAX_STEPS = 10_000  # the schedule has 1000 timesteps
MAX_FPS = 1000  # video files hold no higher rate


def add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    """Size, seed and schedule of a video."""
    group.add_argument(
        "--video_size",
        nargs=2,
        type=whole_number,
        default=[256, 256],
        metavar=("H", "W"),
        help="height and width, multiples of 16 (default: 256 256)",
    )
    group.add_argument(
        "--video_length", type=whole_number, default=129, metavar="N", help="frames, 4n+1; 1 is a picture (default: 129)"
    )
    group.add_argument("--infer_steps", type=int_up_to(MAX_STEPS), default=50, metavar="N", help="sampling steps (default: 50)")
    group.add_argument("--seed", type=seed, metavar="N", help="seed of the noise (default: random, and logged)")
    group.add_argument(
        "--embedded_cfg_scale", type=finite_float, default=6.0, metavar="G", help="distilled guidance (default: 6.0)"
    )
    group.add_argument(
        "--guidance_scale",
        type=non_negative_float,
        default=1.0,
        metavar="G",
        help="classifier-free guidance away from --negative_prompt, which takes two passes a step; 1 is off (default: 1.0)",
    )
    group.add_argument(
        "--guidance_range",
        nargs=2,
        type=finite_float,
        default=[0.0, 1.0],
        metavar=("START", "END"),
        help="shares of the steps between which --guidance_scale applies (default: 0 1)",
    )
    group.add_argument(
        "--split_uncond",
        action="store_true",
        help="compute prompt and negative prompt one after the other, not as a batch of two: less memory (default: off)",
    )
    group.add_argument(
        "--flow_shift", type=positive_float, default=7.0, metavar="S", help="shift of the schedule towards noise (default: 7.0)"
    )
    group.add_argument(
        "--step_cache",
        type=non_negative_float,
        default=0.0,
        metavar="THRESHOLD",
        help="skip steps while the input of the transformer's blocks changes by less than this share, 0.1 say: faster, coarser; "
        "0 skips none (default: 0)",
    )
    group.add_argument(
        "--step_cache_check",
        action="store_true",
        help="with --step_cache, sample with all steps as well and log how far the latents are apart: saves no time (default: off)",
    )


def add_start_arguments(group: argparse._ArgumentGroup) -> None:
    """What a video starts from, in place of noise alone."""
    group.add_argument(
        "--image_path", metavar="PATH", help="start from this picture, or make one result from each of a folder (default: none)"
    )
    group.add_argument(
        "--video_path",
        metavar="PATH",
        help="start from this clip, or from each clip of a folder; a folder of pictures is one clip (default: none)",
    )
    group.add_argument(
        "--latent_path",
        nargs="*",
        default=[],
        metavar="PATH",
        help="start from these latents; without a prompt only decode them, which needs no --dit",
    )
    group.add_argument(
        "--strength",
        type=non_negative_float,
        default=0.75,
        metavar="S",
        help="share of the steps made from a start: 0 keeps it as it is, 1 ignores it (default: 0.75)",
    )


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    """Where results go, and in which form."""
    group.add_argument("--save_path", metavar="FOLDER", help="folder for what is generated")
    group.add_argument(
        "--fps", type=int_up_to(MAX_FPS), default=24, metavar="N", help="frames per second of the file written (default: 24)"
    )
    group.add_argument(
        "--output_type",
        choices=tuple(ENDINGS),
        default="video",
        help="an MP4, PNG frames, the latent for a later --latent_path, latent and MP4, an animated WebP or GIF (default: video)",
    )
    group.add_argument(
        "--preview_every",
        type=positive_int,
        metavar="N",
        help="write a small picture of what the latents would become after every N steps, beside the results, and remove it when "
        "the result is there; needs --vae (default: none)",
    )
    group.add_argument("--no_metadata", action="store_true", help="do not write prompt and settings into the files (default: off)")


def chosen_seed(args: argparse.Namespace) -> int:
    """--seed; a random one, which is logged, where it is not given."""
    if args.seed is not None:
        return args.seed
    logger.info("seed %d", seed := random_seed())
    return seed


def output_settings(args: argparse.Namespace) -> OutputSettings:
    """As the flags of ``add_output_arguments`` say; the folder is tried.

    Raises:
        UserError: a folder that cannot be written to.
    """
    require_writable_folder(args.save_path, "--save_path")
    return settings_from(OutputSettings, args)
