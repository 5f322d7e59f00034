"""The flags of what is put on the transformer: weights in one byte, block swap, compiled blocks, kernels of a GPU."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from utils.cli.arguments import non_negative_int
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from hunyuan_model.runtime.block_swap import SwapSettings
    from hunyuan_model.runtime.compilation import CompileSettings
    from hunyuan_model.runtime.shared_memory import SharedMemory

logger = logging.getLogger(__name__)

# Those of torch.compile without CUDA graphs, which want weights and inputs that lie at the same place in every call.
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


def add_compile_arguments(group: argparse._ArgumentGroup) -> None:
    """--compile and its mode; ``compile_settings`` reads them."""
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks: faster steps after a slow first one (default: off)",
    )
    group.add_argument(
        "--compile_mode",
        choices=COMPILE_MODES,
        default=COMPILE_MODES[0],
        help="with --compile, whether to try many kernels for each matrix product, which takes minutes (default: default)",
    )


def compile_settings(args: argparse.Namespace) -> CompileSettings | None:
    """As the flags of ``add_compile_arguments`` say; None without --compile.

    Raises:
        UserError: a mode without --compile.
    """
    if not args.compile:
        if args.compile_mode != COMPILE_MODES[0]:
            raise UserError("--compile_mode says how --compile is done; give --compile as well, or leave --compile_mode out.")
        return None
    from hunyuan_model.runtime import compilation  # with torch, which the help does without

    return compilation.CompileSettings(args.compile_mode, compilation.BACKEND)


def check_compile_arguments(args: argparse.Namespace, device: torch.device) -> None:
    """Find out whether what the flags ask for can be compiled on ``device``, before a model is loaded.

    Raises:
        UserError: see ``compile_settings`` and ``hunyuan_model.runtime.compilation.check_compile``.
    """
    settings = compile_settings(args)
    if settings is not None:
        from hunyuan_model.runtime.compilation import check_compile

        check_compile(device, settings)


def add_kernel_arguments(group: argparse._ArgumentGroup) -> None:
    """--tf32 and --cudnn_benchmark; ``apply_kernel_arguments`` sees to them."""
    group.add_argument(
        "--tf32",
        action="store_true",
        help="let the card round the factors of float32 matrix products to 10 bits: faster; half precision and the CPU do not "
        "change (default: off)",
    )
    group.add_argument(
        "--cudnn_benchmark",
        action="store_true",
        help="have cuDNN try its convolutions for each new size, which the VAE is made of, and keep the fastest (default: off)",
    )


def apply_kernel_arguments(args: argparse.Namespace, device: torch.device) -> None:
    """Tell torch, for this process, which kernels it may use; says so where ``device`` has none of them."""
    given = [flag for flag in ("tf32", "cudnn_benchmark") if getattr(args, flag)]
    if not given:
        return
    if device.type != "cuda":
        logger.warning(
            "%s: no effect on %s; only CUDA has a choice of such kernels.", ", ".join(f"--{flag}" for flag in given), device
        )
        return
    import torch

    if args.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True  # so it is in torch by default
    if args.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True


AUTO = "auto"


def count_or_auto(text: str) -> int | str:
    """argparse type: a whole number of at least 0, or auto."""
    return AUTO if text == AUTO else non_negative_int(text)


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
