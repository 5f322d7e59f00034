"""What a run will need on the device and in host memory, which changes would make it need less, and how many blocks to swap."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache

import torch

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.device_split import FLAG, Share, shares
from hunyuan_model.runtime.memory import (
    ActivationBytes,
    BatchSize,
    loss_bytes,
    sampling_activations,
    table_bytes,
    trained_share,
    training_activations,
    weight_bytes,
)
from hunyuan_model.runtime.offload.block_swap import max_blocks_to_swap
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.config import TransformerConfig
from utils.cli.arguments import AUTO

logger = logging.getLogger(__name__)

# What arithmetic cannot know, on a GPU: kernels, which load when they first run, with the workspaces of matmuls; and what the
# allocator cannot use of the memory that is taken and given back.
KERNEL_BYTES = 400_000_000
FRAGMENTS = 0.04

SWAP_STEPS = 4  # in which blocks are offered for swapping
SPARE_SHARE = 0.1  # of free memory, left free where more of it only makes a step faster
CLEAR_SHARE, LEAST_SHARE = 0.1, 0.02  # of the whole: what a change should save to be offered at once, and to be offered at all


Free = int | None | Sequence[int | None]
"""Bytes that are free on the device of a plan, or on each of its devices; None where that is not known."""


def of_each(free: Free) -> Sequence[int | None]:
    """By device, also where there is one."""
    return free if isinstance(free, Sequence) else (free,)


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for.

    Attributes:
        kernels: a guess, for kernels and fragmentation.
        sampling: what sampling takes beyond a training step.
        host_weights, host_inputs: in host memory; everything else is on the device.
    """

    weights: int = 0
    swap_slots: int = 0
    network: int = 0
    gradients: int = 0
    optimizer: int = 0
    block_inputs: int = 0
    attention: int = 0
    activations: int = 0
    working: int = 0
    sampling: int = 0
    tables: int = 0
    kernels: int = 0
    host_weights: int = 0
    host_inputs: int = 0

    @property
    def on_host(self) -> int:
        return self.host_weights + self.host_inputs

    @property
    def on_device(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)) - self.on_host

    @property
    def of_step(self) -> int:
        """Of the tensors that a training step has on the device at its peak."""
        return self.on_device - self.kernels - self.sampling


@dataclass(frozen=True)
class MemoryPlan:
    """A run, as far as its memory is concerned.

    Attributes:
        config: of the transformer.
        device: where it runs; of a plan for the CPU everything is in RAM.
        batch: the largest; of training, or of sampling where ``trains`` is False.
        dtype: of the weights that are not quantized.
        compute_dtype: of the activations.
        network_values: numbers in what is trained; None where they are not known yet.
        optimizer_bytes: for each of them.
        sample: the largest that is sampled during training.
        may_quantize: whether quantized weights may be recommended.
        injected_bytes: of LoRA files beside the weights.
        others: the further devices of a split transformer.
    """

    config: TransformerConfig
    device: torch.device
    runtime: RuntimeSettings
    batch: BatchSize
    dtype: torch.dtype
    compute_dtype: torch.dtype
    network_values: int | None = None
    optimizer_bytes: float = 0.0
    sample: BatchSize | None = None
    trains: bool = True
    may_quantize: bool = True
    injected_bytes: int = 0
    others: tuple[torch.device, ...] = ()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Those that have a part of the transformer."""
        return (self.device, *self.others)[: max(1, len(self.runtime.split_blocks))]

    def need(self) -> Need:
        """What the plan comes to, on all devices together. On the CPU swapped weights are in the same memory."""
        needs = self.needs()
        return needs[0] if len(needs) == 1 else Need(*map(sum, zip(*map(astuple, needs))))

    def needs(self) -> tuple[Need, ...]:
        """What each device needs, and the host for it."""
        return tuple(self._need_of(share) for share in shares(self.runtime.split_blocks, self.config))

    def _need_of(self, share: Share) -> Need:
        whole, runtime = self.config, self.runtime
        weights = weight_bytes(whole, self.dtype, runtime, share)
        config, part = share.part_of(whole), trained_share(whole, share)
        values, injected_bytes = round(part * (self.network_values or 0)), round(part * self.injected_bytes)
        step = ActivationBytes(0, 0, 0, 0, 0)
        if self.trains:
            step = training_activations(config, self.batch, self.compute_dtype, runtime, values, weights.dequantized)
        sampled = self.sample if self.trains else self.batch
        sampling, injected = 0, self.injected_bytes > 0
        if sampled is not None:
            sampling = sampling_activations(
                config,
                sampled,
                self.compute_dtype,
                weights.dequantized,
                injected=injected,
                processes=runtime.sequence_parallel,
            )
        temporary = max(step.device, sampling)
        return Need(
            weights=weights.resident,
            swap_slots=weights.slots,
            network=torch.float32.itemsize * values + injected_bytes,
            gradients=torch.float32.itemsize * values if self.trains else 0,
            optimizer=round(self.optimizer_bytes * values),
            block_inputs=step.inputs,
            attention=step.attention,
            activations=step.kept,
            working=step.working,
            sampling=temporary - step.device,
            tables=(loss_bytes(config, self.batch) if share.is_first else 0) + table_bytes(config, self.batch),
            kernels=KERNEL_BYTES + round(FRAGMENTS * temporary) if self.device.type == "cuda" else 0,
            host_weights=weights.host,
            host_inputs=step.host_inputs,
        )

    def changed(self, **settings: object) -> MemoryPlan:
        """With other runtime settings."""
        return replace(self, runtime=replace(self.runtime, **settings))

    def with_blocks(self, count: int) -> MemoryPlan:
        """With ``count`` blocks swapped."""
        return self.changed(blocks_to_swap=count)

    def room(self, free: Free) -> int | None:
        """Bytes that the device with the least room has left; negative where they are missing, None where nothing is known."""
        known = [there - need.on_device for need, there in zip(self.needs(), of_each(free)) if there is not None]
        return min(known, default=None)

    def blocks_that_fit(self, free: Free) -> int:
        """The fewest blocks to swap so that the devices suffice; as many as possible if they never do; none on the CPU."""
        if self.device.type != "cuda" or all(there is None for there in of_each(free)):
            return 0
        limit = max_blocks_to_swap(self.config, self.runtime.split_blocks)
        return next((count for count in range(limit) if self.with_blocks(count).room(free) >= 0), limit)

    def balanced_split(self, free: Free) -> tuple[int, ...]:
        """How many blocks each device has so that the one with the least room has as much as possible; nothing is swapped yet."""
        depth = self.config.double_depth + self.config.single_depth
        plan = self.changed(split_blocks=(), blocks_to_swap=0, keep_attention=self.runtime.keep_attention is True)
        devices = list(of_each(free))[:depth]
        last = len(devices) - 1

        @cache
        def need(share: Share) -> int:
            return plan._need_of(share).on_device

        @cache
        def best(position: int, start: int) -> tuple[int, tuple[int, ...]]:
            """The least room of the devices from ``position`` on, with the blocks from ``start`` on, and their numbers."""

            def left(stop: int) -> int:
                share = Share(range(start, stop), position == 0, position == last)
                return (devices[position] or 0) - need(share)

            if position == last:
                return left(depth), (depth - start,)
            options = []
            for stop in range(start + 1, depth - (last - position) + 1):
                room, counts = best(position + 1, stop)
                options.append((min(left(stop), room), (stop - start, *counts)))
            return max(options, key=lambda option: option[0])

        return best(0, 0)[1]

    def resolved(self, free: Free, free_main: int | None = None) -> MemoryPlan:
        """With what follows from the memory in the place of auto; attention is kept in what swapping leaves.

        Args:
            free_main: bytes of RAM for this process.
        """
        plan = self
        if plan.runtime.split_blocks == AUTO:
            plan = plan.changed(split_blocks=plan.balanced_split(free))
            logger.info("%s auto: %s", FLAG, ",".join(map(str, plan.runtime.split_blocks)))
        if plan.runtime.blocks_to_swap == AUTO:
            plan = plan.with_blocks(plan.blocks_that_fit(free))
            logger.info("--blocks_to_swap auto: %d", plan.runtime.blocks_to_swap)
        if plan.runtime.keep_attention == AUTO:
            plan = plan.changed(keep_attention=plan._has_room_for_attention(free, free_main))
            if plan.runtime.gradient_checkpointing:
                logger.info("--keep_attention auto: %s", "on" if plan.runtime.keep_attention else "off")
        return plan

    def _has_room_for_attention(self, free: Free, free_main: int | None) -> bool:
        """Whether its results can be kept with memory to spare: what is only faster must not make anyone run out of memory."""
        runtime = self.runtime
        if not (self.trains and runtime.gradient_checkpointing) or runtime.compile is not None:
            return False
        plan = self.changed(keep_attention=True)
        need = plan.need()
        needs = [(own.on_device, there) for own, there in zip(plan.needs(), of_each(free))]
        if self.device.type != "cuda":
            needs = [(need.on_device + need.on_host, of_each(free)[0])]
        elif need.host_inputs:
            needs.append((need.on_host, free_main))
        return all(there is not None and size <= (1 - SPARE_SHARE) * there for size, there in needs)

    def remedies(self) -> Iterator[tuple[str, MemoryPlan]]:
        """What could be given or done next, and the plan with it, in the order in which to try it."""
        runtime, on_gpu = self.runtime, self.device.type == "cuda"
        if self.trains and not runtime.gradient_checkpointing:
            yield "--gradient_checkpointing", self.changed(gradient_checkpointing=True)
        if self.trains and runtime.keep_attention is True:
            yield "--keep_attention off", self.changed(keep_attention=False)
        if not self.trains and self.batch.samples > 1:
            yield "--split_uncond", replace(self, batch=replace(self.batch, samples=1))
        if self.may_quantize and not runtime.quantized:
            yield "--int8_base" if self.trains else "--int8", self.changed(weights=WeightFormat.INT8)
        if self.trains and on_gpu and runtime.gradient_checkpointing and not runtime.gradient_checkpointing_cpu_offload:
            yield "--gradient_checkpointing_cpu_offload", self.changed(gradient_checkpointing_cpu_offload=True)
        if on_gpu and runtime.sharding is not None and not runtime.sharding.offload:
            yield (
                "fsdp_offload_params: true in the config of accelerate",
                self.changed(sharding=replace(runtime.sharding, offload=True)),
            )
        limit = max_blocks_to_swap(self.config, runtime.split_blocks)
        swaps = on_gpu and runtime.sharding is None
        if swaps and runtime.blocks_to_swap < limit:
            step = -(-limit // SWAP_STEPS)
            count = min(limit, (runtime.blocks_to_swap // step + 1) * step)
            yield f"--blocks_to_swap {count}", self.with_blocks(count)
        if swaps and not runtime.img_in_txt_in_offloading:
            yield "--img_in_txt_in_offloading", self.changed(img_in_txt_in_offloading=True)
        if self.trains and self.batch.samples > 1:
            half = replace(self.batch, samples=self.batch.samples // 2)
            yield f"batch_size = {half.samples} in the dataset config", replace(self, batch=half)

    def next_remedy(self) -> tuple[str, MemoryPlan, int] | None:
        """The first one that saves much, else the first that saves a little, and the bytes that it saves on the device.

        Where there are several, on the one where it saves the least. None where only a smaller video is left.
        """
        needs = [need.on_device for need in self.needs()]
        whole = max(needs)
        remedies = [
            (text, plan, min(before - need.on_device for before, need in zip(needs, plan.needs())))
            for text, plan in self.remedies()
        ]
        clear, any_ = ([remedy for remedy in remedies if remedy[2] >= share * whole] for share in (CLEAR_SHARE, LEAST_SHARE))
        return next(iter([*clear, *any_]), None)

    def until_it_fits(self, free: int | Sequence[int | None]) -> tuple[list[str], MemoryPlan]:
        """What to give, one after the other, for ``free`` bytes to suffice, and the plan with all of it.

        Where nothing suffices, that is everything that saves memory.
        """
        plan, given = self, {}
        while plan.room(free) < 0 and (remedy := plan.next_remedy()) is not None:
            text, plan, _ = remedy
            given[text.split()[0]] = text
            if "--blocks_to_swap" in given:  # as few as fit; what is given after it may make room for some
                plan = plan.with_blocks(plan.blocks_that_fit(free))
                given["--blocks_to_swap"] = f"--blocks_to_swap {plan.runtime.blocks_to_swap}"
        return list(given.values()), plan
