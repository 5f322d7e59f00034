"""The flags of what is put on the transformer, and the settings they make. Parsing alone does not import torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from utils.cli.arguments import count_or_auto, share
from utils.errors import UserError

if TYPE_CHECKING:
    from hunyuan_model.quantization.formats import WeightFormat
    from hunyuan_model.runtime.settings import KernelSettings, RuntimeSettings

# Those of torch.compile without CUDA graphs, which need weights and inputs at the same addresses in every call.
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


def add_weight_format_arguments(group: argparse._ArgumentGroup, fp8: str, int8: str) -> None:
    """The storage of the blocks' Linear weights; ``fp8`` and ``int8`` are the flags that choose it, with dashes."""
    group.add_argument(
        int8,
        action="store_true",
        help="store the Linear weights of the blocks as int8 codes with a scale for each 64 inputs: 16.9 GB in place of 25.6 GB, "
        "closest to the original (default: off)",
    )
    group.add_argument(
        fp8, action="store_true", help="store them as float8 by a plain cast: 16.6 GB in place of 25.6 GB (default: off)"
    )
    group.add_argument(
        "--fp8_scaled", action="store_true", help=f"with {fp8}, a scale for each output channel: less rounding (default: off)"
    )
    group.add_argument(
        "--fp8_fast", action="store_true", help=f"with {fp8}, multiply in float8 on GPUs that can: faster, coarser (default: off)"
    )


def add_swap_arguments(group: argparse._ArgumentGroup) -> None:
    """What of the transformer is kept in RAM."""
    group.add_argument(
        "--blocks_to_swap",
        type=count_or_auto,
        default=0,
        metavar="N",
        help="keep N of the transformer's blocks in RAM and copy each to the GPU when it computes; up to all but two; "
        "auto: as few as the free memory of the GPU allows (default: 0)",
    )
    group.add_argument(
        "--split_blocks",
        metavar="N,M",
        help="several smaller GPUs as one: how many of the transformer's blocks each GPU of this process has, such as 20,40; "
        "auto: as the free memory of all visible GPUs allows (default: all on one GPU)",
    )
    group.add_argument(
        "--img_in_txt_in_offloading",
        action="store_true",
        help="keep img_in and txt_in in RAM too, except while they compute (default: off)",
    )
    group.add_argument(
        "--no_pinned_swap_memory",
        action="store_true",
        help="do not page-lock the RAM that the GPU copies from and to: the system may then move it to disk, and copies "
        "are slower (default: off)",
    )


def add_compile_arguments(group: argparse._ArgumentGroup) -> None:
    """--compile and its mode."""
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks: faster steps after a slow first one (default: off)",
    )
    group.add_argument(
        "--compile_mode",
        choices=COMPILE_MODES,
        help="with --compile, whether to try many kernels for each matmul, which takes minutes (default: default)",
    )


def add_kernel_arguments(group: argparse._ArgumentGroup) -> None:
    """--tf32, --cudnn_benchmark, --gpu_memory_fraction and --no_fused_kernels."""
    group.add_argument(
        "--tf32",
        action="store_true",
        help="let the GPU round the factors of float32 matmuls to 10 bits: faster; half precision and the CPU do not change "
        "(default: off)",
    )
    group.add_argument(
        "--cudnn_benchmark",
        action="store_true",
        help="let cuDNN try its convolutions for each new size and keep the fastest; the VAE consists of them (default: off)",
    )
    group.add_argument(
        "--gpu_memory_fraction",
        type=share,
        metavar="SHARE",
        help="run out of memory at this share of the GPU's memory: on Windows a full GPU would go on in RAM, many times slower "
        "(default: no limit; on Windows what is free at the start)",
    )
    group.add_argument(
        "--no_fused_kernels",
        action="store_true",
        help="do not compile norms, rotations and dequantization to one kernel each where Triton is installed: slower steps, "
        "but the first one does not wait for the compiler (default: off)",
    )


def runtime_settings(args: argparse.Namespace, attn_mode: str) -> RuntimeSettings:
    """What the flags of this file say, and those of checkpointing where the script has them.

    Raises:
        UserError: flags that miss or exclude each other.
    """
    from hunyuan_model.runtime import compilation
    from hunyuan_model.runtime.device_split import parse_split
    from hunyuan_model.runtime.settings import RuntimeSettings

    if args.compile_mode is not None and not args.compile:
        raise UserError("--compile_mode says how --compile is done; give --compile as well, or leave --compile_mode out.")
    return RuntimeSettings(
        weights=weight_format(args),
        fp8_fast=args.fp8_fast,
        attn_mode=attn_mode,
        split_attn=args.split_attn,
        blocks_to_swap=args.blocks_to_swap,
        split_blocks=parse_split(args.split_blocks),
        img_in_txt_in_offloading=args.img_in_txt_in_offloading,
        pinned_swap_memory=not args.no_pinned_swap_memory,
        gradient_checkpointing=getattr(args, "gradient_checkpointing", False),
        gradient_checkpointing_cpu_offload=getattr(args, "gradient_checkpointing_cpu_offload", False),
        keep_attention={"on": True, "off": False}.get(keep := getattr(args, "keep_attention", "off"), keep),
        compile=compilation.CompileSettings(args.compile_mode or COMPILE_MODES[0], compilation.BACKEND) if args.compile else None,
    )


def weight_format(args: argparse.Namespace) -> WeightFormat:
    """What the flags of ``add_weight_format_arguments`` say. Raises UserError where they miss or exclude each other."""
    from hunyuan_model.quantization.formats import WeightFormat

    fp8, int8 = ("fp8_base", "int8_base") if hasattr(args, "fp8_base") else ("fp8", "int8")
    float8 = getattr(args, fp8) or (fp8 == "fp8" and args.fp8_scaled)  # generation takes --fp8_scaled alone, too
    for flag in ("fp8_scaled", "fp8_fast"):
        if getattr(args, flag) and not float8:
            raise UserError(f"--{flag} says how --{fp8} is done; give --{fp8} as well, or leave --{flag} out.")
    if getattr(args, int8):
        if float8:
            raise UserError(f"--{int8} and --{fp8} exclude each other: weights are stored in one way. Give one of them.")
        return WeightFormat.INT8
    if float8:
        return WeightFormat.FP8_SCALED if args.fp8_scaled else WeightFormat.FP8
    return WeightFormat.PLAIN


def kernel_settings(args: argparse.Namespace) -> KernelSettings:
    """What the flags of ``add_kernel_arguments`` say."""
    from hunyuan_model.runtime.settings import KernelSettings

    return KernelSettings(args.tf32, args.cudnn_benchmark, args.gpu_memory_fraction, args.no_fused_kernels)
