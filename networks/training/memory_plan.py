"""What a run will need on the card and in main memory, which flags would make it need less, and how many blocks to swap."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from hunyuan_model.runtime.block_swap import SwapSettings, max_blocks_to_swap
from hunyuan_model.runtime.memory import (
    BatchSize,
    Computation,
    Storage,
    loss_bytes,
    sampling_activations,
    table_bytes,
    training_activations,
    weight_bytes,
)
from hunyuan_model.transformer.config import TransformerConfig
from networks.training.saving.disk_space import NetworkSize

# What arithmetic does not tell, on a card: kernels, which load when they first run, and the workspaces of matrix products; and
# what the allocator cannot use of the memory that comes and goes.
KERNEL_BYTES = 400_000_000
FRAGMENTS = 0.04

# Parts that are no tensors of a training step, and that of the optimiser.
GUESSED, SAMPLING, OPTIMIZER = "kernels and fragments (a guess)", "more for sampling", "state of the optimiser"

SWAP_STEPS = 4  # in which blocks are offered for swapping
CLEAR_SHARE, LEAST_SHARE = 0.1, 0.02  # of the whole: what a flag should save to be offered at once, and to be offered at all


@dataclass(frozen=True)
class MemorySettings:
    """What flags decide of the memory.

    Attributes:
        storage: of the transformer's weights.
        dtype: of the activations.
        offers: flags that this run could be given, by their names.
    """

    storage: Storage
    dtype: torch.dtype
    checkpointing: bool = False
    inputs_on_host: bool = False
    swap: SwapSettings = field(default_factory=SwapSettings)
    offers: frozenset[str] = frozenset()

    @classmethod
    def of_training(
        cls, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None, blocks: int
    ) -> MemorySettings:
        """As the training flags say.

        Args:
            dtype: of the transformer's weights.
            autocast: what autocast computes in; None without it.
            blocks: to swap, whatever --blocks_to_swap says.
        """
        flags = vars(args)
        offers = {"gradient_checkpointing", "fp8_base", "gradient_checkpointing_cpu_offload"} & flags.keys()
        if args.network_module.startswith("lycoris"):
            offers.discard("fp8_base")
        if device.type == "cuda":
            offers |= {"blocks_to_swap", "img_in_txt_in_offloading"}
        else:
            offers.discard("gradient_checkpointing_cpu_offload")
        inputs_on_host = bool(flags.get("gradient_checkpointing_cpu_offload"))
        return cls(
            Storage(dtype, args.fp8_base, args.fp8_scaled, args.fp8_fast),
            dtype if autocast is None else autocast,
            checkpointing=args.gradient_checkpointing or inputs_on_host,
            inputs_on_host=inputs_on_host,
            swap=SwapSettings(blocks, args.img_in_txt_in_offloading),
            offers=frozenset(offers),
        )


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for, on the device and in host memory."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def on_device(self) -> int:
        return sum(self.device.values())

    @property
    def on_host(self) -> int:
        return sum(self.host.values())

    @property
    def of_step(self) -> int:
        """Of the tensors that a training step has on the device at its peak."""
        return sum(size for name, size in self.device.items() if name not in (GUESSED, SAMPLING))


@dataclass(frozen=True)
class Remedy:
    """One thing to change: what to give or do, the plan that it makes, and the bytes that it saves on the device."""

    flag: str
    text: str
    plan: MemoryPlan
    saves: int


@dataclass(frozen=True)
class Fitting:
    """What was given, the plan with it, and whether that is enough."""

    flags: list[str]
    plan: MemoryPlan
    enough: bool


@dataclass(frozen=True)
class MemoryPlan:
    """A run, as far as its memory goes.

    Attributes:
        config: of the transformer.
        device: where it runs; of a plan for the CPU everything lies in main memory.
        batch: the largest; of training, or of sampling where ``trains`` is False.
        network: what is trained; None where its size shows only later.
        optimizer_bytes: for each value of the network.
        sample: the largest that training draws.
    """

    config: TransformerConfig
    device: torch.device
    settings: MemorySettings
    batch: BatchSize
    network: NetworkSize | None = None
    optimizer_bytes: float = 0.0
    sample: BatchSize | None = None
    trains: bool = True

    def need(self) -> Need:
        """What the plan comes to. On the CPU nothing is elsewhere: what is swapped lies in the same memory."""
        config, settings = self.config, self.settings
        weights = weight_bytes(config, settings.storage, settings.swap)
        values = self.network.values if self.network is not None else 0
        drawn = max(
            (batch for batch in (self.sample, None if self.trains else self.batch) if batch), key=self._tokens, default=None
        )
        drawing = 0
        if drawn is not None:
            drawing = sampling_activations(config, drawn, settings.dtype, weights.widened)
        inputs = kept = working = host_inputs = 0
        if self.trains:
            how = Computation(settings.dtype, settings.checkpointing, settings.inputs_on_host, values)
            step = training_activations(config, self.batch, how, weights.widened)
            inputs, kept, working, host_inputs = step.inputs, step.kept, step.working, step.host_inputs
        comes_and_goes = max(inputs + kept + working, drawing)
        device = {
            "weights of the transformer": weights.resident,
            "slots for the blocks that come in turn": weights.slots,
            "trained network, float32": 4 * values,
            "its gradients": 4 * values if self.trains else 0,
            OPTIMIZER: round(self.optimizer_bytes * values),
            "inputs of the blocks": inputs,
            "activations kept by " + ("one block" if settings.checkpointing else "the blocks"): kept,
            "working memory of a block": working,
            SAMPLING: comes_and_goes - inputs - kept - working,
            "latents and tables": loss_bytes(config, self.batch) + table_bytes(config, self.batch),
        }
        if self.device.type == "cuda":
            device[GUESSED] = KERNEL_BYTES + round(FRAGMENTS * comes_and_goes)
        host = {"blocks and embedders that come in turn": weights.host, "inputs of the blocks that wait": host_inputs}
        return Need(_without_nothing(device), _without_nothing(host))

    def _tokens(self, batch: BatchSize) -> int:
        return batch.tokens(self.config)

    def changed(self, **settings: object) -> MemoryPlan:
        """With other settings."""
        return replace(self, settings=replace(self.settings, **settings))

    def with_blocks(self, count: int) -> MemoryPlan:
        """With ``count`` blocks swapped."""
        return self.changed(swap=replace(self.settings.swap, blocks=count))

    def blocks_that_fit(self, free: int | None) -> int:
        """The fewest blocks to swap with which the device suffices; as many as can be where it never does; none on the CPU."""
        if self.device.type != "cuda" or free is None:
            return 0
        limit = max_blocks_to_swap(self.config)
        return next((count for count in range(limit) if self.with_blocks(count).need().on_device <= free), limit)

    def remedies(self) -> Iterator[Remedy]:
        """What could be changed next, in the order in which to try it."""
        settings, offers = self.settings, self.settings.offers
        if "gradient_checkpointing" in offers and not settings.checkpointing:
            yield self._remedy("gradient_checkpointing", "--gradient_checkpointing", self.changed(checkpointing=True))
        if "fp8_base" in offers and not settings.storage.fp8:
            narrow = replace(settings.storage, fp8=True, scaled=True)
            yield self._remedy("fp8_base", "--fp8_base --fp8_scaled", self.changed(storage=narrow))
        if "fp8" in offers and not settings.storage.fp8:
            narrow = replace(settings.storage, fp8=True, scaled=True)
            yield self._remedy("fp8", "--fp8 --fp8_scaled", self.changed(storage=narrow))
        if "gradient_checkpointing_cpu_offload" in offers and settings.checkpointing and not settings.inputs_on_host:
            flag = "gradient_checkpointing_cpu_offload"
            yield self._remedy(flag, f"--{flag}", self.changed(inputs_on_host=True))
        limit = max_blocks_to_swap(self.config)
        if "blocks_to_swap" in offers and settings.swap.blocks < limit:
            step = -(-limit // SWAP_STEPS)
            count = min(limit, (settings.swap.blocks // step + 1) * step)
            yield self._remedy("blocks_to_swap", f"--blocks_to_swap {count}", self.with_blocks(count))
        if "img_in_txt_in_offloading" in offers and not settings.swap.embedders:
            swap = replace(settings.swap, embedders=True)
            yield self._remedy("img_in_txt_in_offloading", "--img_in_txt_in_offloading", self.changed(swap=swap))
        if self.trains and self.batch.samples > 1:
            half = replace(self.batch, samples=self.batch.samples // 2)
            yield self._remedy("batch_size", f"batch_size = {half.samples} in the dataset config", replace(self, batch=half))

    def _remedy(self, flag: str, text: str, plan: MemoryPlan) -> Remedy:
        return Remedy(flag, text, plan, self.need().on_device - plan.need().on_device)

    def next_remedy(self) -> Remedy | None:
        """The first one that saves much, else the first that saves a little; None where nothing is left but a smaller video."""
        whole, remedies = self.need().on_device, list(self.remedies())
        for share in (CLEAR_SHARE, LEAST_SHARE):
            for remedy in remedies:
                if remedy.saves >= share * whole:
                    return remedy
        return None

    def until_it_fits(self, free: int) -> Fitting:
        """What to give, one after the other, for ``free`` bytes of the device to suffice."""
        plan, given = self, {}
        while plan.need().on_device > free:
            remedy = plan.next_remedy()
            if remedy is None:
                return Fitting(list(given.values()), plan, enough=False)
            plan, text = remedy.plan, remedy.text
            if remedy.flag == "blocks_to_swap":
                plan = plan.with_blocks(plan.blocks_that_fit(free))
                text = f"--blocks_to_swap {plan.settings.swap.blocks}"
            given[remedy.flag] = text
        if "blocks_to_swap" in given:  # what came after it may have made room for some
            plan = plan.with_blocks(plan.blocks_that_fit(free))
            given["blocks_to_swap"] = f"--blocks_to_swap {plan.settings.swap.blocks}"
        return Fitting(list(given.values()), plan, enough=True)


def _without_nothing(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size > 0}
