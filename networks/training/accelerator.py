"""Accelerate's view of devices, processes and precision, and the dtypes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs

from networks.training.settings import TrainingSettings
from utils.devices import choose_dtype
from utils.errors import UserError, first_line

PROCESSES = frozenset({DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU})
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of --mixed_precision


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """What accelerate knows. Raises UserError where it refuses, or was launched with a precision that cannot train here."""
    loop = settings.loop
    try:
        handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=loop.ddp_timeout))] if loop.ddp_timeout else []
        accelerator = Accelerator(mixed_precision=loop.mixed_precision, kwargs_handlers=handlers)
    except (ValueError, ImportError, RuntimeError, AssertionError) as error:
        raise UserError(f"accelerate refuses this setup: {first_line(error).rstrip('.')}.") from error
    if accelerator.distributed_type not in PROCESSES:
        raise UserError(
            f"accelerate is set up for {accelerator.distributed_type.value}, with which nothing can be trained here. "
            "Choose no distributed training or several GPUs (`accelerate config`), or give accelerate launch --multi_gpu."
        )
    if accelerator.mixed_precision not in PRECISIONS:
        raise UserError(
            f"accelerate was launched with --mixed_precision {accelerator.mixed_precision}, in which nothing can be trained here. "
            "Use bf16; --int8_base or --fp8_base stores the frozen weights in one byte each."
        )
    return accelerator


@dataclass(frozen=True)
class Precision:
    """The dtypes of a training."""

    base: torch.dtype  # of the transformer's weights: --dit_dtype, else the mixed precision's, else the device's default
    compute: torch.dtype  # of the activations: the mixed precision's, else that of the weights
    saved: torch.dtype  # of saved models: --save_precision, else the mixed precision's

    @classmethod
    def of(cls, settings: TrainingSettings, accelerator: Accelerator) -> Precision:
        mixed, dtype = accelerator.mixed_precision, settings.model.dit_dtype
        if dtype is None and mixed != "no":
            base = PRECISIONS[mixed]
        else:
            base = choose_dtype(dtype, "--dit_dtype", accelerator.device, torch.bfloat16)
        saved = settings.loop.save_precision or mixed
        return cls(base, base if mixed == "no" else PRECISIONS[mixed], PRECISIONS["no" if saved == "float" else saved])
