"""What is put on a transformer from outside, as frozen settings. ``loading.py`` applies them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.quantization.scaled_mm import check_float8_matmuls
from hunyuan_model.runtime.compilation import CompileSettings, check_compile
from hunyuan_model.runtime.device_split import DeviceSplit, check_split, make_split, split_devices
from hunyuan_model.runtime.offload.block_swap import SwapSettings, check_blocks_to_swap
from hunyuan_model.runtime.sequence_parallel import check_sequence_parallel
from hunyuan_model.runtime.sharding import ShardingSettings
from hunyuan_model.transformer import fused
from hunyuan_model.transformer.attention import check_attention_device, check_attention_dtype, make_attention
from hunyuan_model.transformer.config import TransformerConfig
from utils.cli.arguments import AUTO
from utils.errors import UserError
from utils.free_memory import limit_device_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RuntimeSettings:
    """How a transformer is stored, how it attends, and where its weights and activations are. Fields are named as flags.

    Attributes:
        weights: storage of the blocks' Linear weights.
        fp8_fast: multiply float8 by float8 on GPUs that can.
        attn_mode, split_attn: see ``hunyuan_model.transformer.attention.make_attention``.
        blocks_to_swap: how many blocks fewer the device holds; "auto" until a memory plan has put a number in its place.
        split_blocks: how many blocks each GPU of this process has, the process's own first; () keeps all on that one; "auto" until
            a memory plan has put numbers in its place.
        img_in_txt_in_offloading: keep the embedders in host memory too.
        pinned_swap_memory: page-lock the host memory that is copied from and to, where the system allows it.
        gradient_checkpointing: compute each block again in the backward pass.
        gradient_checkpointing_cpu_offload: keep the inputs of blocks in host memory until then.
        keep_attention: keep the results of attention as well, on the device or in host memory, and do not compute them again;
            "auto" until a memory plan has put True or False in its place.
        compile: compile the blocks; None leaves them as they are.
        sharding: each process holds a part of the weights; None where each holds all of them.
        sequence_parallel: how many processes compute each video together, all of the default process group; for sampling only.

    Raises:
        UserError: settings that exclude or miss each other.
    """

    weights: WeightFormat = WeightFormat.PLAIN
    fp8_fast: bool = False
    attn_mode: str = "torch"
    split_attn: bool = False
    blocks_to_swap: int | str = 0
    split_blocks: tuple[int, ...] | str = ()
    img_in_txt_in_offloading: bool = False
    pinned_swap_memory: bool = True
    gradient_checkpointing: bool = False
    gradient_checkpointing_cpu_offload: bool = False
    keep_attention: bool | str = False
    compile: CompileSettings | None = None
    sharding: ShardingSettings | None = None
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if self.fp8_fast and not self.weights.is_float8:
            raise UserError("--fp8_fast multiplies weights that are stored in float8; store them so, or leave --fp8_fast out.")
        if self.gradient_checkpointing_cpu_offload and not self.gradient_checkpointing:
            raise UserError(
                "--gradient_checkpointing_cpu_offload moves what --gradient_checkpointing keeps; give --gradient_checkpointing as "
                "well, or leave --gradient_checkpointing_cpu_offload out."
            )
        if self.keep_attention is True and not self.gradient_checkpointing:
            raise UserError(
                "--keep_attention on keeps the results of attention through --gradient_checkpointing; give "
                "--gradient_checkpointing as well, or leave --keep_attention out."
            )
        if self.keep_attention is True and self.compile is not None:
            raise UserError(
                "--keep_attention on and --compile exclude each other: attention in compiled blocks is always computed again. "
                "Give one of them."
            )
        if self.sharding is not None and self.swaps:
            raise UserError(
                "--blocks_to_swap and --img_in_txt_in_offloading keep weights in RAM that FSDP shares out to the processes; leave "
                "them out, and keep the shards in RAM with fsdp_offload_params where memory is short, or train without FSDP."
            )
        given = [f"--{name}" for name in ("compile", "split_blocks") if getattr(self, name)]
        if self.sharding is not None and given:
            raise UserError(f"{given[0]} does not go with weights that FSDP shares out; leave it out, or train without FSDP.")
        if self.sequence_parallel > 1 and self.gradient_checkpointing:
            raise UserError("processes compute one video together only where nothing is trained: leave checkpointing out.")

    def check(self, device: torch.device, dtype: torch.dtype | None = None, config: TransformerConfig | None = None) -> None:
        """Refuse what cannot work here. Scripts call it before anything is loaded, and loading calls it again.

        Args:
            dtype: in which the layers compute; None where autocast may choose another one.
            config: of the transformer, for the numbers of blocks and heads.

        Raises:
            UserError: a package, a device or a transformer that does not do what is asked for.
        """
        devices = self.devices(device)
        if config is not None and self.split_blocks != AUTO:
            check_split(self.split_blocks, config)
        for each in devices:
            check_attention_device(self.attn_mode, each)
        if dtype is not None:
            check_attention_dtype(self.attn_mode, dtype)
        make_attention(self.attn_mode)
        if self.fp8_fast:
            for each in devices:
                check_float8_matmuls(each, "--fp8_fast")
        if config is not None and AUTO not in (self.blocks_to_swap, self.split_blocks):
            check_blocks_to_swap(self.blocks_to_swap, config, split=self.split_blocks)
        if config is not None:
            check_sequence_parallel(self.sequence_parallel, config)
        if self.compile is not None:
            for each in devices:
                check_compile(each, self.compile)

    def devices(self, device: torch.device) -> tuple[torch.device, ...]:
        """On which a transformer computes in a process that has ``device``. Raises as ``split_devices``."""
        return split_devices(device, self.split_blocks)

    def split(self, device: torch.device, config: TransformerConfig) -> DeviceSplit:
        """Which of them has what. Raises UserError while that is "auto"."""
        if self.split_blocks == AUTO:
            raise UserError('split_blocks is still "auto": give the numbers of blocks, or those of MemoryPlan.resolved.')
        return make_split(self.split_blocks, self.devices(device), config)

    @property
    def quantized(self) -> bool:
        """Whether any weights are stored in one byte each."""
        return self.weights is not WeightFormat.PLAIN

    @property
    def swaps(self) -> bool:
        """Whether any weights are kept in host memory."""
        return bool(self.blocks_to_swap) or self.img_in_txt_in_offloading

    @property
    def keeps_attention(self) -> bool:
        """Whether checkpointing keeps the results of attention. Raises UserError while that is "auto"."""
        if self.keep_attention == AUTO:
            raise UserError('keep_attention is still "auto": give True or False, or what MemoryPlan.resolved gives.')
        return bool(self.keep_attention)

    @property
    def swap(self) -> SwapSettings:
        """What block swap has to know of it. Raises UserError while the number of blocks is "auto"."""
        if self.blocks_to_swap == AUTO:
            raise UserError('blocks_to_swap is still "auto": give a number of blocks, or that of MemoryPlan.resolved.')
        return SwapSettings(
            blocks=self.blocks_to_swap,
            embedders=self.img_in_txt_in_offloading,
            pinned=self.pinned_swap_memory,
            recomputed=self.gradient_checkpointing,
            split=() if self.split_blocks == AUTO else self.split_blocks,
        )


@dataclass(frozen=True)
class KernelSettings:
    """What torch may use of a GPU, for the whole process: which kernels, and how much of its memory."""

    tf32: bool = False
    cudnn_benchmark: bool = False
    gpu_memory_fraction: float | None = None
    no_fused_kernels: bool = False

    def apply(self, device: torch.device) -> None:
        """Set them, or say that they have no effect on ``device``."""
        if device.type != "cuda":
            if given := [f"--{name}" for name, value in vars(self).items() if value]:
                logger.warning("%s: no effect on %s, only on CUDA devices.", ", ".join(given), device)
            return
        fused.allow(not self.no_fused_kernels)
        limit_device_memory(device, self.gpu_memory_fraction)
        if self.tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if self.cudnn_benchmark:
            torch.backends.cudnn.benchmark = True
