"""Flags that have the same computed faster: compiled blocks, and which kernels a card may use."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from hunyuan_model.runtime.compilation import CompileSettings

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
