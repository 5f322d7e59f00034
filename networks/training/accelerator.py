"""Accelerate's view of devices, processes and precision, and the dtypes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs, parse_flag_from_env

from hunyuan_model.runtime.sharding import ShardingSettings
from networks.training.settings import TrainingSettings
from utils.devices import choose_dtype
from utils.errors import UserError, first_line
from utils.processes.ranks import LONGEST_WAIT, check_launcher

PROCESSES = frozenset(
    {
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_XPU,
        DistributedType.FSDP,
    }
)
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of --mixed_precision


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """What accelerate knows. Raises UserError where it refuses, or was launched with a precision that cannot train here."""
    check_launcher()
    loop = settings.loop
    try:
        # torch's ten minutes are less than one process takes for a sample that is long.
        wait = timedelta(minutes=loop.ddp_timeout) if loop.ddp_timeout else LONGEST_WAIT
        accelerator = Accelerator(mixed_precision=loop.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=wait)])
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


def with_sharding(settings: TrainingSettings, accelerator: Accelerator) -> TrainingSettings:
    """The settings, with the weights sharded where accelerate is set up for FSDP.

    Raises:
        UserError: version 1, an option that would have no effect or the wrong one, or flags that sharded weights exclude.
    """
    if accelerator.distributed_type is DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
    elif parse_flag_from_env("ACCELERATE_USE_FSDP"):  # what accelerate itself knows only of GPUs
        plugin = FullyShardedDataParallelPlugin()
    else:
        return settings
    from torch.distributed.fsdp import CPUOffloadPolicy

    if getattr(plugin, "fsdp_version", 1) != 2:
        raise UserError(
            "accelerate is set up for version 1 of FSDP, with which nothing can be trained here. "
            "Set fsdp_version to 2 in its config, or give accelerate launch --fsdp_version 2."
        )
    if not plugin.reshard_after_forward:
        raise UserError(
            "with fsdp_reshard_after_forward: false every process would hold all weights, as it does without FSDP. "
            "Set it to true, or train without FSDP, which is faster."
        )
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing is done by --gradient_checkpointing here: give that, and set the option to false."
        )
    for name, given in {
        "fsdp_ignored_modules": plugin.ignored_modules,
        "parallelism_config": getattr(accelerator, "parallelism_config", None),
    }.items():
        if given is not None:
            raise UserError(
                f"accelerate is set up with {name}, which has no effect here: all processes share all weights. Leave it out."
            )
    sharding = ShardingSettings(accelerator.num_processes, offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy))
    return replace(settings, runtime=replace(settings.runtime, sharding=sharding))


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
