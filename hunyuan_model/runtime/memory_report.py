"""Memory plans in words: before a run starts, and when memory does not suffice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from hunyuan_model.runtime.memory import BatchSize
from hunyuan_model.runtime.memory_plan import Free, MemoryPlan, of_each
from hunyuan_model.vae.model import SPATIAL_COMPRESSION, TIME_COMPRESSION
from utils.devices import explain_out_of_memory
from utils.disk_space import readable

MAX_TEXT_TOKENS = 256  # of a prompt
SMALLER = "fewer frames or a smaller resolution"


LABELS = {  # of the fields of ``Need``
    "weights": "weights of the transformer",
    "swap_slots": "room for swapped or gathered blocks",
    "network": "trained network, float32",
    "gradients": "its gradients",
    "optimizer": "optimizer state",
    "block_inputs": "inputs of the blocks",
    "attention": "results of attention kept for backward",
    "activations": "activations kept for backward",
    "working": "working memory of a block",
    "sampling": "more for sampling",
    "tables": "latents and tables",
    "kernels": "kernels and fragmentation (a guess)",
    "host_weights": "weights kept in RAM",
    "host_inputs": "offloaded inputs of the blocks",
}


def plan_table(plan: MemoryPlan, free: Free, free_main: int | None) -> str:
    """What the plan needs, part by part and device by device, beside what is free, and which flags would make it fit.

    Args:
        free_main: bytes of RAM.
    """
    need, needs, on_gpu, known = plan.need(), plan.needs(), plan.device.type == "cuda", of_each(free)
    several, is_known = len(needs) > 1, any(there is not None for there in known)
    place = f"memory on {' and '.join(map(str, plan.devices))}" if on_gpu else "RAM"
    tokens = plan.batch.tokens(plan.config)
    lines = [f"{place} for the largest batch, {batch_name(plan.batch)} ({tokens} tokens):"]
    rows = {LABELS[name]: [getattr(each, name) for each in needs] for name in LABELS if not (on_gpu and name.startswith("host_"))}
    rows = {text: sizes for text, sizes in rows.items() if any(sizes)}
    rows["in all"] = [each.on_device + (0 if on_gpu else each.on_host) for each in needs]
    columns = {text: [readable(size) for size in sizes] for text, sizes in rows.items()}
    if several:
        columns = {"": [str(device) for device in plan.devices], **columns}
        columns |= {"free": ["" if there is None else readable(there) for there in known]} if is_known else {}
    width = max(map(len, columns))
    lines += [f"  {text:<{width}}" + "".join(f"  {cell:>9}" for cell in cells) for text, cells in columns.items()]
    lines[-1] += "" if several or not is_known else f" of {readable(known[0])} free"
    if plan.trains and plan.network_values is None:
        lines.append("  without the trained network, whose size its module shows only later")
    if is_known:
        lines.append(f"  {verdict(plan, known if on_gpu else [known[0] - need.on_host])}")
    if on_gpu and need.on_host:
        held = f"  RAM holds {readable(need.on_host)} more"
        if free_main is not None and need.on_host > free_main:
            held += f", but only {readable(free_main)} are free: close other programs, or swap fewer blocks"
        lines.append(held + ".")
    return "\n".join(lines)


def verdict(plan: MemoryPlan, free: int | Sequence[int | None]) -> str:
    """Whether the plan fits into ``free`` bytes of its device, or of each of them, and what would make it fit."""
    pairs = zip(plan.devices, plan.needs(), of_each(free))
    missing = {device: need.on_device - there for device, need, there in pairs if there is not None}
    tightest = max(missing, key=missing.get)
    if missing[tightest] <= 0:
        return "It fits."
    short = f"{readable(missing[tightest])} are missing{f' on {tightest}' if len(plan.devices) > 1 else ''}"
    flags, fitting = plan.until_it_fits(free)
    if not flags:
        return f"{short}: use {SMALLER}."
    return f"{short}: give {' '.join(flags)}{'' if fitting.room(free) >= 0 else f', and use {SMALLER}'}."


def advice(plan: MemoryPlan) -> str:
    """What to change next after running out of memory."""
    remedy = plan.next_remedy()
    if remedy is None:
        return f"use {SMALLER}: every flag that saves memory is in use"
    where = " on each GPU" if len(plan.devices) > 1 else ""
    return f"give {remedy[0]} next, which saves about {readable(remedy[2])}{where}"


def batch_name(batch: BatchSize) -> str:
    """Samples, width, height and frames in pixels: ``2 x 960x544x33``."""
    frames, height, width = batch.size
    length = "" if frames == 1 else f"x{TIME_COMPRESSION * (frames - 1) + 1}"
    return f"{batch.samples} x {SPATIAL_COMPRESSION * width}x{SPATIAL_COMPRESSION * height}{length}"


def size_of(batch: Mapping[str, Any]) -> BatchSize:
    """Of a training batch: ``latents`` (B, C, F, H, W) and ``text_states`` (B, L, width)."""
    samples, _, *size = batch["latents"].shape
    return BatchSize(samples, tuple(size), batch["text_states"].shape[1])


def explain_batch_out_of_memory(plan: MemoryPlan, batches: Sequence[Mapping[str, Any]], doing: str) -> AbstractContextManager[None]:
    """For computing ``batches`` inside: running out of memory names the largest of them and what to change next."""
    if not batches:  # all of them are those of other processes
        return explain_out_of_memory("updating the network", lambda: advice(plan), *plan.devices)
    largest = max(batches, key=lambda batch: size_of(batch).tokens(plan.config))
    size = size_of(largest)
    where = f"{doing} {batch_name(size)} ({', '.join(largest['names'])})"
    return explain_out_of_memory(where, lambda: advice(replace(plan, batch=size)), *plan.devices)
