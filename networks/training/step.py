"""One optimizer step of a training: losses, gradients of all processes, and steps that are skipped.

The host waits for the device once in a step, after its last backward pass: whether everything is finite has to be known before
the optimizer changes the weights. Losses and the gradient's norm come to the host together then, in one copy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hunyuan_model.sampling.flow import TIMESTEPS
from networks.network_module import call_if_there
from networks.training.optim.lr_schedules import step_schedule
from networks.training.optim.optimizers import describe_optimizer
from networks.training.run import Training, TrainingBroken
from utils.devices import is_out_of_memory
from utils.errors import UserError, first_line

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class Step:
    """The result of an optimizer step."""

    loss: float  # mean over its batches; not finite where the step was skipped for that
    gradient_norm: float  # before clipping
    skipped: str | None = None  # why the weights were not changed


def train_step(training: Training, batches: Sequence[Mapping[str, Any]]) -> Step:
    """One optimizer step over the batches it accumulates; it is skipped where a loss or a gradient is not finite.

    Waits for the device once. What may wait beyond that: the loss scaler of fp16 (twice, as it looks at the gradients only
    after the losses are known to be finite), ``--scale_weight_norms``, optimizers that look at their own numbers, and those of
    bitsandbytes, which wait after every parameter.
    """
    accelerator, network, optimizer = training.accelerator, training.network, training.optimizer
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
    scaled = accelerator.scaler is not None  # a scaler looks at the gradients once, when it divides them
    clipped = None if scaled else _clip(training, has_gradient)
    own, finite, has_any_gradient, norm = _read(accelerator, losses, has_gradient, clipped)

    skipped = None
    if not finite:
        norm, skipped = math.nan, _loss_not_finite(own, batches, timesteps)
    elif has_any_gradient:  # not where dropout left out the whole network
        if scaled:
            clipped = _clip(training, has_gradient)
            norm = math.nan if clipped is None else float(clipped)
        named = ", ".join(_named(batch, t) for batch, t in zip(batches, timesteps))
        if not scaled and not math.isfinite(norm):  # a scaler finds out by itself, and tries a smaller scale
            skipped = f"the gradient is not finite for {named}"
        else:
            training.updating = True
            with _explained(optimizer):
                optimizer.step()
            if accelerator.optimizer_step_was_skipped:
                skipped = f"the gradient is too large for fp16, whose scale is halved, for {named}"
    optimizer.zero_grad(set_to_none=True)
    total = sum(loss / len(batches) for loss in own)
    if skipped is None:
        step_schedule(training.lr_scheduler, total)
        if most := training.settings.network.scale_weight_norms:
            call_if_there(network, "apply_max_norm_regularization", most, accelerator.device)
    return Step(total, norm, skipped)


def require_some_made(training: Training, reason: str | None) -> None:
    """Log why the last step was skipped, or None. Raises TrainingBroken where the last ten were, or two or more at the end."""
    progress, steps = training.progress, training.plan.steps
    if reason is not None:
        logger.warning("step %d was skipped: %s", progress.step, reason)
    ends = progress.step >= steps and (progress.skipped > 1 or progress.skipped == steps)
    if progress.skipped >= MAX_SKIPPED_IN_A_ROW or ends:
        what = "1 step was" if progress.skipped == 1 else f"{progress.skipped} steps in a row were"
        last = "" if reason is None else f", the last because {reason}"
        raise TrainingBroken(
            f"{what} skipped{' at the end' if ends else ''}{last}. The models and states that were saved before are whole; start "
            "from the last model with --network_weights, and a lower --learning_rate or another precision."
        )


@contextmanager
def _explained(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A UserError for what an optimizer of another package raises inside, but not for want of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the optimizer {describe_optimizer(optimizer)} fails ({type(error).__name__}: {first_line(error).rstrip('.')}). "
            "Use another --optimizer_type or other --optimizer_args."
        ) from error


def _clip(training: Training, has_gradient: bool) -> Tensor | None:
    """The norm of the mean gradients of all processes, which are then clipped; None where there are none.

    The network is hooked into the transformer's layers: no wrapper of torch's could average its gradients.
    """
    accelerator, parameters = training.accelerator, list(training.network.parameters())
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.requires_grad:
                # Dropout may leave a layer out on one process only; all of them must still take part.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = accelerator.reduce(gradient, reduction="mean")
    elif not has_gradient:
        return None
    return accelerator.clip_grad_norm_(parameters, training.settings.optimizer.max_grad_norm or math.inf)


def _read(
    accelerator: Accelerator, losses: Sequence[Tensor], has_gradient: bool, norm: Tensor | None
) -> tuple[list[float], bool, bool, float]:
    """Everything that the step depends on, with one copy from the device, which is when it is waited for.

    Returns:
        The losses of this process; whether those of all are finite; whether any has a gradient; the norm, 0 for None.
    """
    values = torch.stack([loss.float() for loss in losses])
    not_finite = (~torch.isfinite(values)).any().float()
    gradient = torch.full_like(not_finite, float(has_gradient))
    if accelerator.num_processes > 1:
        not_finite, gradient = accelerator.reduce(torch.stack((not_finite, gradient)), reduction="sum").unbind()
    norm = torch.zeros_like(not_finite) if norm is None else norm.detach().to(not_finite)
    *own, any_not_finite, any_gradient, norm = torch.cat((values, torch.stack((not_finite, gradient, norm)))).tolist()
    return own, not any_not_finite, any_gradient > 0, norm


def _loss_not_finite(losses: Sequence[float], batches: Sequence[Mapping[str, Any]], timesteps: Sequence[Tensor]) -> str:
    for loss, batch, t in zip(losses, batches, timesteps):
        if not math.isfinite(loss):
            return f"the loss is {loss} for {_named(batch, t)}"
    return "the loss is not finite in another process"


def _named(batch: Mapping[str, Any], t: Tensor) -> str:
    """A batch, for a sentence."""
    return f"{', '.join(batch['names'])} at timestep {', '.join(f'{value * TIMESTEPS:.0f}' for value in t.tolist())}"
