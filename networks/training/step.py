"""One optimiser step of a training: losses, gradients of all processes, and what spoils them.

The device is waited for once in a step, after its last backward pass: whether there is anything to learn from has to be known
before the optimiser moves the weights. Losses and the gradient's norm come to the host together then, in one copy. Until that
moment the host only gives work out, so that the device has all of a step ahead of it, whatever number of batches it accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hunyuan_model.sampling.flow import TIMESTEPS
from networks.optional_methods import call_if_there
from networks.training.optim.lr_schedules import step_schedule
from networks.training.run import Training


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


@dataclass(frozen=True)
class _Told:
    """What the device told at the end of the backward passes.

    Attributes:
        losses: of the batches of this process.
        spoiled: whether a loss is not finite, in any process.
        learnt: whether any process has a gradient.
        gradient_norm: before clipping; 0 where it was not asked for.
    """

    losses: list[float]
    spoiled: bool
    learnt: bool
    gradient_norm: float


def train_step(training: Training, batches: Sequence[Mapping[str, Any]]) -> Step:
    """One optimiser step over the batches it accumulates. A loss or a gradient that is not finite spoils nothing: it is skipped.

    Waits for the device once. What may wait beyond that: the loss scaler of fp16 (twice, for gradients that it cannot tell
    before it has looked at the losses), ``--scale_weight_norms``, and optimisers that look at their own numbers.
    """
    accelerator, network = training.accelerator, training.network
    call_if_there(network, "on_step_start")
    losses: list[Tensor] = []
    timesteps: list[Tensor] = []
    for batch in batches:
        loss, t = training.flow_matching.loss(batch)
        if loss.requires_grad:  # not where dropout leaves out the whole network
            accelerator.backward(loss / len(batches))
        losses.append(loss.detach())
        timesteps.append(t)
    has_gradient = any(parameter.grad is not None for parameter in network.parameters())
    scaler = accelerator.scaler  # looks at the gradients once, when it divides them: not before the losses are known to be sound
    norm = _clip(training, has_gradient) if scaler is None else None
    told = _wait_and_read(accelerator, losses, has_gradient, norm)

    total = sum(loss / len(batches) for loss in told.losses)
    if told.spoiled:
        training.optimizer.zero_grad(set_to_none=True)
        return Step(total, math.nan, _reason(told.losses, batches, timesteps))
    if not told.learnt:  # dropout left out the whole network
        training.optimizer.zero_grad(set_to_none=True)
        step_schedule(training.lr_scheduler, total, optimizer_stood_still=True)
        return Step(total, 0.0)
    norm = told.gradient_norm if scaler is None else _number(_clip(training, has_gradient))
    if not math.isfinite(norm) and scaler is None:  # a scaler finds out by itself, and tries a smaller scale
        training.optimizer.zero_grad(set_to_none=True)
        return Step(total, norm, f"the gradient is not finite for {_all_named(batches, timesteps)}")
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    if accelerator.optimizer_step_was_skipped:
        reason = f"the gradient is too large for fp16, whose scale is halved, for {_all_named(batches, timesteps)}"
        return Step(total, norm, reason)
    step_schedule(training.lr_scheduler, total)
    if training.settings.network.scale_weight_norms:
        call_if_there(network, "apply_max_norm_regularization", training.settings.network.scale_weight_norms, accelerator.device)
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


def _clip(training: Training, has_gradient: bool) -> Tensor | None:
    """The norm of the mean gradients of all processes, which are then clipped; None where there are none."""
    average_gradients(training.accelerator, training.network)
    if training.accelerator.num_processes == 1 and not has_gradient:
        return None
    return training.accelerator.clip_grad_norm_(
        training.network.parameters(), training.settings.optimizer.max_grad_norm or math.inf
    )


def _wait_and_read(accelerator: Accelerator, losses: Sequence[Tensor], has_gradient: bool, norm: Tensor | None) -> _Told:
    """Everything that the step depends on, with one copy from the device, which is when it is waited for."""
    values = torch.stack([loss.float() for loss in losses])
    spoiled = (~torch.isfinite(values)).any().float()
    learnt = torch.full_like(spoiled, float(has_gradient))
    if accelerator.num_processes > 1:
        spoiled, learnt = accelerator.reduce(torch.stack((spoiled, learnt)), reduction="sum").unbind()
    norm = torch.zeros_like(spoiled) if norm is None else norm.detach().to(spoiled)
    *own, any_spoiled, any_learnt, length = torch.cat((values, torch.stack((spoiled, learnt, norm)))).tolist()
    return _Told(own, any_spoiled > 0, any_learnt > 0, length)


def _number(norm: Tensor | None) -> float:
    return math.nan if norm is None else float(norm)


def _reason(losses: Sequence[float], batches: Sequence[Mapping[str, Any]], timesteps: Sequence[Tensor]) -> str:
    """Why a step is skipped whose loss is not finite."""
    for loss, batch, t in zip(losses, batches, timesteps):
        if not math.isfinite(loss):
            return f"the loss is {loss} for {_named(batch, t)}"
    return "the loss is not finite in another process"


def _all_named(batches: Sequence[Mapping[str, Any]], timesteps: Sequence[Tensor]) -> str:
    return ", ".join(_named(batch, t) for batch, t in zip(batches, timesteps))


def _named(batch: Mapping[str, Any], t: Tensor) -> str:
    """A batch, for a sentence."""
    return f"{', '.join(batch['names'])} at timestep {', '.join(f'{value * TIMESTEPS:.0f}' for value in t.tolist())}"
