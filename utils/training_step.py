"""One optimiser step of a training: losses, gradients of all processes, and what spoils them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hunyuan_model.flow import TIMESTEPS
from utils.lr_schedules import step_schedule
from utils.optional_methods import call_if_there
from utils.training_run import Training


@dataclass(frozen=True)
class Step:
    """What an optimiser step came to.

    Attributes:
        loss: mean over its batches; not finite where the step was skipped for that.
        gradient_norm: before clipping.
        skipped: why nothing was learnt from it, or None.
    """

    loss: float
    gradient_norm: float
    skipped: str | None = None


def train_step(training: Training, batches: Sequence[Mapping[str, Any]]) -> Step:
    """One optimiser step over the batches it accumulates. A loss or a gradient that is not finite spoils nothing: it is skipped."""
    accelerator, network, args = training.accelerator, training.network, training.args
    call_if_there(network, "on_step_start")
    total, spoiled, learnt = 0.0, None, []
    for batch in batches:
        loss, t = training.flow_matching.loss(batch)
        total += loss.item() / len(batches)
        timesteps = ", ".join(f"{value * TIMESTEPS:.0f}" for value in t.tolist())
        learnt.append(f"{', '.join(batch['names'])} at timestep {timesteps}")
        if not torch.isfinite(loss):
            spoiled = spoiled or f"the loss is {loss.item()} for {learnt[-1]}"
        elif spoiled is None and loss.requires_grad:  # not where dropout leaves out the whole network
            accelerator.backward(loss / len(batches))
    if any_process(accelerator, spoiled is not None):
        training.optimizer.zero_grad(set_to_none=True)
        return Step(total, math.nan, spoiled or "the loss is not finite in another process")
    if not any_process(accelerator, any(parameter.grad is not None for parameter in network.parameters())):
        step_schedule(training.lr_scheduler, total)  # dropout left out the whole network
        return Step(total, 0.0)
    average_gradients(accelerator, network)
    norm = accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm or math.inf)
    norm = math.nan if norm is None else float(norm)
    if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler finds out by itself, and tries a smaller scale
        training.optimizer.zero_grad(set_to_none=True)
        return Step(total, norm, f"the gradient is not finite for {', '.join(learnt)}")
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    if accelerator.optimizer_step_was_skipped:
        return Step(total, norm, f"the gradient is too large for fp16, whose scale is halved, for {', '.join(learnt)}")
    step_schedule(training.lr_scheduler, total)
    if args.scale_weight_norms:
        call_if_there(network, "apply_max_norm_regularization", args.scale_weight_norms, accelerator.device)
    return Step(total, norm)


def average_gradients(accelerator: Accelerator, network: nn.Module) -> None:
    """Give every process the mean gradients. The network is hooked into the transformer's layers: no wrapper can do this."""
    if accelerator.num_processes == 1:
        return
    for parameter in network.parameters():
        if parameter.requires_grad:
            # Dropout may leave a layer out on one process only; all of them must still take part.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, reduction="mean")


def any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether something is so on any process; all must ask together."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.gather(torch.tensor([int(here)], device=accelerator.device)).max())
