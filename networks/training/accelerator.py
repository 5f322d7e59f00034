"""Accelerate's view of devices, processes and precision, and the dtypes that follow from it."""

from __future__ import annotations

import argparse
import logging
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from utils.devices import choose_dtype
from utils.errors import UserError, first_line

logger = logging.getLogger(__name__)

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of --mixed_precision
WRAPPER_FLAGS = ("ddp_gradient_as_bucket_view", "ddp_static_graph")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate's view of devices, processes and precision. Accumulation is the loop's business, not accelerate's.

    Raises:
        UserError: accelerate refuses, or was launched with a precision in which nothing can be trained here.
    """
    try:
        handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=args.ddp_timeout))] if args.ddp_timeout else []
        accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=handlers)
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate refuses this setup: {first_line(error).rstrip('.')}.") from error
    if accelerator.mixed_precision not in PRECISIONS:
        raise UserError(
            f"accelerate was launched with --mixed_precision {accelerator.mixed_precision}, in which nothing can be trained here. "
            "Use bf16; --int8_base or --fp8_base stores the frozen weights in one byte each."
        )
    if accelerator.is_main_process and (unused := [f"--{name}" for name in WRAPPER_FLAGS if getattr(args, name)]):
        logger.warning("%s: no effect, as gradients are averaged without torch's wrapper.", ", ".join(unused))
    return accelerator


def base_dtype(args: argparse.Namespace, accelerator: Accelerator) -> torch.dtype:
    """What the transformer computes in: --dit_dtype, else the mixed precision's, else the device's default."""
    if args.dit_dtype is None and accelerator.mixed_precision in ("fp16", "bf16"):
        return PRECISIONS[accelerator.mixed_precision]
    return choose_dtype(args.dit_dtype, "--dit_dtype", accelerator.device, torch.bfloat16)


def compute_dtype(args: argparse.Namespace, accelerator: Accelerator) -> torch.dtype:
    """What the layers of the transformer answer in: the mixed precision's, else that of its weights."""
    return base_dtype(args, accelerator) if accelerator.mixed_precision == "no" else PRECISIONS[accelerator.mixed_precision]


def save_dtype(args: argparse.Namespace, accelerator: Accelerator) -> torch.dtype:
    """Of saved models: --save_precision, else the mixed precision's."""
    return PRECISIONS["no" if args.save_precision == "float" else args.save_precision or accelerator.mixed_precision]
