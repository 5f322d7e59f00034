"""Flags that several scripts share, in groups, and the parser they hang on."""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from utils.errors import UserError, shown

if TYPE_CHECKING:
    import torch

    from hunyuan_model.runtime.block_swap import SwapSettings
    from hunyuan_model.runtime.shared_memory import SharedMemory

AUTO = "auto"
MAX_SEED = 2**32 - 1
VAE_TILE_SIZE = 256
SECRET_ENDINGS = ("_api_key", "_token", "_password", "_secret")  # of flags that are stored nowhere
MAX_COUNT = 2**31 - 1  # no flag means anything beyond, and some libraries count no further

N = TypeVar("N", int, float)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=116)


def script_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help is laid out in groups. Abbreviated flags are refused: a typo must not become another flag."""
    return argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def _number(text: str, convert: Callable[[str], N], kind: str) -> N:
    try:
        return convert(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {kind}") from None


def whole_number(text: str) -> int:
    """argparse type: a whole number."""
    number = _number(text, int, "a whole number")
    if abs(number) > MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{shown(text)} is beyond {MAX_COUNT}")
    return number


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def non_negative_int(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    number = whole_number(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def count_or_auto(text: str) -> int | str:
    """argparse type: a whole number of at least 0, or auto."""
    return AUTO if text == AUTO else non_negative_int(text)


def int_up_to(limit: int) -> Callable[[str], int]:
    """An argparse type: a whole number from 1 to ``limit``."""

    def bounded(text: str) -> int:
        number = positive_int(text)
        if number > limit:
            raise argparse.ArgumentTypeError(f"{text} is above {limit}")
        return number

    bounded.__doc__ = f"argparse type: a whole number from 1 to {limit}."
    return bounded


def finite_float(text: str) -> float:
    """argparse type: a number that is neither NaN nor infinite."""
    number = _number(text, float, "a number")
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    number = finite_float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    number = finite_float(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def seed(text: str) -> int:
    """argparse type: a whole number from 0 to 4294967295, which every random generator in use accepts."""
    number = _number(text, int, "a whole number")
    if not 0 <= number <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{shown(text)} is outside 0 to {MAX_SEED}")
    return number


def require_text(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values that are no text: bytes of the command line that are not UTF-8 cannot be written into metadata or names.

    Raises:
        UserError: names the flag.
    """
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        for text in value if isinstance(value, list) else [value]:
            try:
                if isinstance(text, str):
                    text.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{action.option_strings[-1]} {os.fsencode(text)!r} is not UTF-8 text; write it in UTF-8, or rename the file."
                ) from None


def public_flags(args: argparse.Namespace) -> dict[str, object]:
    """The flags that were given or have a default; keys and tokens are left out."""
    return {name: value for name, value in vars(args).items() if value is not None and not name.endswith(SECRET_ENDINGS)}


def text_encoder_settings(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What ``hunyuan_model.encode_prompts`` is told beside the prompts, as the flags of ``add_text_encoder_arguments`` say."""
    import torch  # here, as parsing alone does not need it

    from utils.devices import choose_dtype

    return {
        "text_encoder_1": args.text_encoder1,
        "text_encoder_2": args.text_encoder2,
        "tokenizer_1": args.tokenizer1,
        "tokenizer_2": args.tokenizer2,
        "device": device,
        "dtype": choose_dtype(args.text_encoder_dtype, "--text_encoder_dtype", device, torch.float16),
        "fp8_llm": args.fp8_llm,
    }


def drawn_seed() -> int:
    """A seed for runs that were given none. Not drawn from the generators that it will seed."""
    return random.SystemRandom().randint(0, MAX_SEED)


def add_dataset_arguments(group: argparse._ArgumentGroup, *, batch_size: str, num_workers: str, skip_existing: str) -> None:
    """--dataset_config and how a caching script goes through it; the texts say what the flags mean to that script."""
    group.add_argument("--dataset_config", metavar="TOML", required=True, help="dataset description, see dataset/dataset_config.md")
    group.add_argument("--batch_size", type=positive_int, metavar="N", help=batch_size)
    workers = max(1, (os.cpu_count() or 2) - 1)
    group.add_argument(
        "--num_workers", type=positive_int, default=workers, metavar="N", help=f"{num_workers} (default: processor cores - 1)"
    )
    group.add_argument("--skip_existing", action="store_true", help=skip_existing)
    group.add_argument(
        "--missing_caption",
        choices=("error", "skip", "empty"),
        default="error",
        help="what to do with items that have no caption: stop, leave them out, or give them an empty one; "
        "the same for both caching scripts (default: error)",
    )
    group.add_argument(
        "--remove_orphans",
        action="store_true",
        help="delete the cache files that belong to no item any more, which are listed at the end (default: list them only)",
    )


def add_vae_arguments(group: argparse._ArgumentGroup, *, required: bool, tiling_switch: bool = True) -> None:
    """--vae and how it runs. ``hunyuan_model.vae.loading`` reads the file; ``configure_vae`` applies the rest."""
    group.add_argument("--vae", metavar="PATH", required=required, help="VAE checkpoint: a .pt or .safetensors file, or a folder")
    group.add_argument(
        "--vae_dtype",
        metavar="DTYPE",
        help="precision of the VAE (default: float16 on CUDA, float32 on the CPU, where half is slow)",
    )
    if tiling_switch:
        group.add_argument(
            "--vae_tiling",
            action="store_true",
            help="run the VAE in overlapping spatial tiles: less memory, slower (default: only where memory is short)",
        )
    group.add_argument(
        "--vae_chunk_size",
        type=positive_int,
        metavar="N",
        help="run the VAE's 3D convolutions in chunks of N, with the same result in less memory "
        "(default: whole, or 32 where memory is short)",
    )
    group.add_argument(
        "--vae_spatial_tile_sample_min_size",
        type=positive_int,
        metavar="PIXELS",
        help="side of a spatial tile, a multiple of 32; implies tiling (default: 256 with tiling, else as free memory asks)",
    )


def vae_tile_size(args: argparse.Namespace) -> int | None:
    """Side of the VAE's spatial tiles in pixels, as the flags of ``add_vae_arguments`` say; None without tiling."""
    return args.vae_spatial_tile_sample_min_size or (VAE_TILE_SIZE if getattr(args, "vae_tiling", False) else None)


def vae_settings_given(args: argparse.Namespace) -> bool:
    """Whether the flags of ``add_vae_arguments`` say how the VAE works; else ``vae_memory.VAEFit`` goes by what is free."""
    return args.vae_chunk_size is not None or vae_tile_size(args) is not None


def next_vae_settings(args: argparse.Namespace) -> str:
    """Flags with which the VAE takes less memory than with those given, lightest last; empty where there are none."""
    tile = vae_tile_size(args)
    lighter = [] if args.vae_chunk_size is not None and args.vae_chunk_size <= 32 else ["--vae_chunk_size 32"]
    if tile is None or tile > 64:
        lighter.append(f"--vae_spatial_tile_sample_min_size {128 if tile is None or tile > 128 else 64}")
    return " and ".join(lighter)


def add_text_encoder_arguments(group: argparse._ArgumentGroup, *, required: bool) -> None:
    """--text_encoder1/2 with their tokenizers and precision."""
    group.add_argument(
        "--text_encoder1",
        metavar="PATH",
        required=required,
        help="Llama-type text encoder: a Hugging Face folder or one .safetensors file",
    )
    group.add_argument(
        "--text_encoder2",
        metavar="PATH",
        required=required,
        help="CLIP-type text encoder: a Hugging Face folder or one .safetensors file",
    )
    group.add_argument(
        "--tokenizer1", metavar="PATH", help="tokenizer folder or hub id for --text_encoder1 (default: the one beside the weights)"
    )
    group.add_argument(
        "--tokenizer2", metavar="PATH", help="tokenizer folder or hub id for --text_encoder2 (default: the one beside the weights)"
    )
    group.add_argument(
        "--text_encoder_dtype",
        metavar="DTYPE",
        help="precision of the text encoders (default: float16 on CUDA, float32 on the CPU)",
    )
    group.add_argument(
        "--fp8_llm", action="store_true", help="keep text encoder 1's weights in float8: half the memory (default: off)"
    )


def add_swap_arguments(group: argparse._ArgumentGroup) -> None:
    """What of the transformer lives in main memory; ``swap_settings`` reads it."""
    group.add_argument(
        "--blocks_to_swap",
        type=count_or_auto,
        default=0,
        metavar="N",
        help="hold N of the transformer's blocks less on the card: they come from main memory in turn; up to all but two; "
        "auto: as few as the free memory of the card allows (default: 0)",
    )
    group.add_argument(
        "--img_in_txt_in_offloading",
        action="store_true",
        help="hold img_in and txt_in in main memory too, and on the card only while they compute (default: off)",
    )
    group.add_argument(
        "--no_pinned_swap_memory",
        action="store_true",
        help="do not page-lock the main memory that the card copies from and to: the system may move it to disk, and copies "
        "are slower (default: off)",
    )


def swap_settings(args: argparse.Namespace, *, recomputed: bool, shared: SharedMemory | None = None) -> SwapSettings:
    """As the flags of ``add_swap_arguments`` say, once a number of blocks stands for auto.

    Args:
        recomputed: whether gradient checkpointing wraps the blocks.
        shared: see ``SwapSettings``.
    """
    from hunyuan_model.runtime.block_swap import SwapSettings  # here, as parsing alone does not need torch

    return SwapSettings(
        blocks=args.blocks_to_swap,
        embedders=args.img_in_txt_in_offloading,
        pinned=not args.no_pinned_swap_memory,
        recomputed=recomputed,
        shared=shared,
    )


def add_fp8_arguments(group: argparse._ArgumentGroup, base: str) -> None:
    """--fp8_scaled and --fp8_fast, which say how the flag ``base`` is done."""
    group.add_argument(
        "--fp8_scaled", action="store_true", help=f"with {base}, give the weights scales: far less rounding (default: off)"
    )
    group.add_argument(
        "--fp8_fast", action="store_true", help=f"with {base}, multiply in float8 on cards that can: faster, coarser (default: off)"
    )


def check_fp8_arguments(args: argparse.Namespace, base: str, device: torch.device) -> None:
    """Refuse what ``add_fp8_arguments`` adds without the flag ``base``, or on a device that cannot do it.

    Raises:
        UserError: with what to give or to leave out.
    """
    from hunyuan_model.quantization.scaled_mm import check_fp8_products  # with torch, which the help does without

    for flag in ("fp8_scaled", "fp8_fast"):
        if getattr(args, flag) and not getattr(args, base):
            raise UserError(f"--{flag} says how --{base} is done; give --{base} as well, or leave --{flag} out.")
    if args.fp8_fast:
        check_fp8_products(device, "--fp8_fast")


def add_device_argument(group: argparse._ArgumentGroup) -> None:
    """--device."""
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
