"""Telling what a run needs: before it starts, and when memory does not suffice."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hunyuan_model.runtime.arguments import AUTO
from hunyuan_model.runtime.block_swap import SwapSettings
from hunyuan_model.runtime.memory import BatchSize, Storage
from hunyuan_model.sampling.euler import latent_size
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.vae.model import SPATIAL_COMPRESSION, TIME_COMPRESSION
from networks.training.memory_plan import MemoryPlan, MemorySettings
from networks.training.saving.disk_space import NetworkSize, readable
from utils.devices import explain_out_of_memory
from utils.free_memory import free_device_memory, free_host_memory

if TYPE_CHECKING:
    from networks.training.samples.prompts import SamplePrompt

logger = logging.getLogger(__name__)

MAX_TEXT_TOKENS = 256  # of a prompt

SMALLER = "fewer frames or a smaller resolution"


def plan_table(plan: MemoryPlan, free: int | None, free_main: int | None) -> str:
    """What the plan needs, part by part, beside what is free, and which flags would make it fit. Several lines.

    Args:
        free: bytes on the plan's device; None where that is not known.
        free_main: bytes of main memory.
    """
    need, on_card = plan.need(), plan.device.type == "cuda"
    place = f"memory on {plan.device}" if on_card else "main memory"
    tokens = plan.batch.tokens(plan.config)
    lines = [f"{place} for the largest batch, {batch_name(plan.batch)} ({tokens} tokens):"]
    parts = need.device if on_card else {**need.device, **need.host}
    total = need.on_device if on_card else need.on_device + need.on_host
    rows = [*parts.items(), ("in all", total)]
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:<{width}}  {readable(size):>9}" for name, size in rows]
    lines[-1] += "" if free is None else f" of {readable(free)} free"
    if plan.trains and plan.network is None:
        lines.append("  without what is trained, whose size its module tells only later")
    if free is not None:
        lines.append(f"  {verdict(plan, free if on_card else free - need.on_host)}")
    if on_card and need.host:
        held = f"  main memory holds {readable(need.on_host)} of it"
        if free_main is not None and need.on_host > free_main:
            held += f", but only {readable(free_main)} are free: close other programs, or swap fewer blocks"
        lines.append(held + ".")
    return "\n".join(lines)


def verdict(plan: MemoryPlan, free: int) -> str:
    """Whether the plan fits into ``free`` bytes of its device, and what would make it."""
    missing = plan.need().on_device - free
    if missing <= 0:
        return "It fits."
    short = f"{readable(missing)} are missing"
    fitting = plan.until_it_fits(free)
    if not fitting.flags:
        return f"{short}: use {SMALLER}."
    return f"{short}: give {' '.join(fitting.flags)}{'' if fitting.enough else f', and use {SMALLER}'}."


def advice(plan: MemoryPlan) -> str:
    """What to change next after running out of memory."""
    remedy = plan.next_remedy()
    if remedy is None:
        return f"use {SMALLER}: every flag that saves memory is in use"
    return f"give {remedy.text} next, which saves about {readable(remedy.saves)}"


def batch_name(batch: BatchSize) -> str:
    """Samples, width, height and frames in pixels: ``2 x 960x544x33``."""
    frames, height, width = batch.size
    length = "" if frames == 1 else f"x{TIME_COMPRESSION * (frames - 1) + 1}"
    return f"{batch.samples} x {SPATIAL_COMPRESSION * width}x{SPATIAL_COMPRESSION * height}{length}"


def size_of(batch: Mapping[str, Any]) -> BatchSize:
    """Of a batch of ``dataset.batches.batches.collate``."""
    samples, _, *size = batch["latents"].shape
    return BatchSize(samples, tuple(size), batch["text_states"].shape[1])


def names_the_batch(plan: MemoryPlan, batches: Sequence[Mapping[str, Any]], doing: str) -> AbstractContextManager[None]:
    """For computing ``batches`` inside: running out of memory says which was the largest, and what to change next."""
    largest = max(batches, key=lambda batch: size_of(batch).tokens(plan.config))
    size = size_of(largest)
    where = f"{doing} {batch_name(size)} ({', '.join(largest['names'])})"
    return explain_out_of_memory(where, lambda: advice(replace(plan, batch=size)), plan.device)


def plan_training(
    args: argparse.Namespace,
    config: TransformerConfig,
    batch: BatchSize,
    *,
    device: torch.device,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    network: NetworkSize | None,
    optimizer_bytes: float,
    prompts: Sequence[SamplePrompt] = (),
    shown: bool = True,
) -> MemoryPlan:
    """The plan of a training, printed where it is ``shown``. Puts a number in the place of ``--blocks_to_swap auto``.

    Args:
        batch: the largest one.
        dtype: of the transformer's weights.
        autocast: what autocast computes in; None without it.
        optimizer_bytes: for each value of the network.
        prompts: of the samples that it draws.
    """
    auto = args.blocks_to_swap == AUTO
    samples = [sample_size(prompt.height, prompt.width, prompt.frame_count) for prompt in prompts]
    plan = MemoryPlan(
        config,
        device,
        MemorySettings.of_training(args, device, dtype, autocast, 0 if auto else args.blocks_to_swap),
        batch,
        network,
        optimizer_bytes,
        sample=max(samples, key=lambda sample: sample.tokens(config), default=None),
    )
    free = free_device_memory(device)
    if auto:
        plan = _with_blocks_that_fit(args, plan, free)
    if shown:
        print(plan_table(plan, free, free_host_memory()), flush=True)
    return plan


def plan_sampling(
    args: argparse.Namespace, config: TransformerConfig, text_tokens: int, *, device: torch.device, dtype: torch.dtype
) -> MemoryPlan:
    """The plan of a generation. Puts a number in the place of ``--blocks_to_swap auto``.

    Args:
        args: of hv_generate_video.py.
        text_tokens: of the prompt.
        dtype: of the transformer.
    """
    auto, on_card = args.blocks_to_swap == AUTO, device.type == "cuda"
    settings = MemorySettings(
        Storage(dtype, args.fp8, args.fp8_scaled, args.fp8_fast),
        dtype,
        swap=SwapSettings(0 if auto else args.blocks_to_swap, args.img_in_txt_in_offloading),
        offers=frozenset({"fp8", "blocks_to_swap", "img_in_txt_in_offloading"} if on_card else {"fp8"}),
    )
    batch = BatchSize(1, latent_size(*args.video_size, args.video_length), text_tokens)
    plan = MemoryPlan(config, device, settings, batch, trains=False)
    return _with_blocks_that_fit(args, plan, free_device_memory(device)) if auto else plan


def _with_blocks_that_fit(args: argparse.Namespace, plan: MemoryPlan, free: int | None) -> MemoryPlan:
    args.blocks_to_swap = plan.blocks_that_fit(free)
    logger.info("--blocks_to_swap auto: %d", args.blocks_to_swap)
    return plan.with_blocks(args.blocks_to_swap)


def sample_size(height: int, width: int, frames: int) -> BatchSize:
    """Of one sample in pixels, whose caption may have any length."""
    return BatchSize(1, latent_size(height, width, frames), MAX_TEXT_TOKENS)
