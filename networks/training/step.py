"""One optimizer step of a training: losses, gradients of all processes, and steps that are skipped.

The host waits for the device once in a step, after its last backward pass: whether everything is finite has to be known before
the optimizer changes the weights. Losses and the gradient's norm come to the host together then, in one copy.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from hunyuan_model.sampling.flow import TIMESTEPS
from networks.network_module import call_if_there
from networks.training.data import StepBatches
from networks.training.optim.lr_schedules import step_schedule
from networks.training.optim.optimizers import describe_optimizer
from networks.training.run import Training, TrainingBroken
from utils.devices import is_out_of_memory
from utils.errors import UserError, first_line

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
VALUES = 3  # summed over all processes with the gradients, see ``_sums``


@dataclass(frozen=True)
class Step:
    """The result of an optimizer step."""

    loss: float  # mean over its items, of all processes; not finite where the step was skipped for that
    gradient_norm: float  # before clipping
    skipped: str | None = None  # why the weights were not changed


def train_step(training: Training, batches: StepBatches) -> Step:
    """One optimizer step over batches of all processes; it is skipped where a loss or a gradient is not finite.

    Every item counts alike, whichever process and batch it is in. Noise and timesteps are those of one process that computes all.
    Waits for the device once. What may wait beyond that: the loss scaler of fp16 (twice, as it looks at the gradients only
    after the losses are known to be finite), ``--scale_weight_norms``, optimizers that look at their own numbers, and those of
    bitsandbytes, which wait after every parameter.
    """
    accelerator, network, optimizer = training.accelerator, training.network, training.optimizer
    call_if_there(network, "on_step_start")
    if training.gradients is not None:
        training.gradients.begin()
        # Dropout is of each process, and a training that goes on without one of them has it again.
        place = f"{training.plan.beginning.seed}:{training.progress.step}:{accelerator.process_index}"
        set_seed(random.Random(place).getrandbits(32))
    computed = [_backward(training, *each) for each in _with_noise(training, batches)]
    if training.plan.memory.runtime.sharding is not None:  # the passes of the others need this one's part of the weights
        for _ in range(batches.most - len(computed)):
            accelerator.backward(training.flow_matching.empty_loss())
    losses, weights, named = [one.loss for one in computed], [one.weight for one in computed], [one.named for one in computed]
    sums = _sums(training, losses, weights, any(one.has_gradient for one in computed))
    scaled = accelerator.scaler is not None  # a scaler looks at the gradients once, when it divides them
    clipped = None if scaled else _clip(training)
    own, total, finite, has_gradient, norm = _read(losses, sums, clipped)
    if training.gradients is None:  # as it is logged since there is a log
        total = sum(loss * weight for loss, weight in zip(own, weights))

    skipped = None
    if not finite:
        bad = [f"{loss} for {words}" for loss, words in zip(own, named) if not math.isfinite(loss)]
        norm, skipped = math.nan, f"the loss is {'; '.join(_of_all(training, bad))}"
    elif has_gradient:  # not where dropout left out the whole network
        if scaled:
            norm = float(_clip(training))
        if not scaled and not math.isfinite(norm):  # a scaler finds out by itself, and tries a smaller scale
            skipped = f"the gradient is not finite for {', '.join(_of_all(training, named))}"
        else:
            training.updating = True
            with _explained(optimizer):
                optimizer.step()
            if accelerator.optimizer_step_was_skipped:
                skipped = f"the gradient is too large for fp16, whose scale is halved, for {', '.join(_of_all(training, named))}"
    optimizer.zero_grad(set_to_none=True)
    if skipped is None:
        step_schedule(training.lr_scheduler, total)
        if most := training.settings.network.scale_weight_norms:
            call_if_there(network, "apply_max_norm_regularization", most, accelerator.device)
    return Step(total, norm, skipped)


@dataclass(frozen=True)
class _Computed:
    """A batch after its backward pass."""

    loss: Tensor  # a scalar
    weight: float  # of its items among those of the whole step
    has_gradient: bool
    named: str  # for a sentence


def _with_noise(training: Training, batches: StepBatches) -> Iterator[tuple[Mapping[str, Any], float, Tensor, Tensor]]:
    """The batches of this process with their weights, noise and timesteps: all processes sample those of the whole step."""
    items = sum(shape[0] for shape in batches.shapes)
    for place, shape in enumerate(batches.shapes):
        noise, t = training.flow_matching.sample(shape)
        if place in batches.own:
            yield batches.own[place], shape[0] / items, noise, t


def _backward(training: Training, batch: Mapping[str, Any], weight: float, noise: Tensor, t: Tensor) -> _Computed:
    loss = training.flow_matching.loss_at(batch, noise, t)
    if loss.requires_grad:  # not where dropout leaves out the whole network
        training.accelerator.backward(loss * weight)
    named = f"{', '.join(batch['names'])} at timestep {', '.join(f'{value * TIMESTEPS:.0f}' for value in t.tolist())}"
    return _Computed(loss.detach(), weight, loss.requires_grad, named)


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


def _sums(training: Training, losses: Sequence[Tensor], weights: Sequence[float], has_gradient: bool) -> Tensor:
    """(VALUES,) float32, of all processes: the mean loss, how many losses are not finite, how many processes have a gradient.

    The gradients are summed with it.
    """
    values = torch.zeros(VALUES, device=training.accelerator.device)
    for loss, weight in zip(losses, weights):
        values[0] += loss * weight
        values[1] += ~torch.isfinite(loss)
    values[2] = float(has_gradient)
    return values if training.gradients is None else training.gradients.sum(values)


def _clip(training: Training) -> Tensor:
    """The norm of the gradients, which are then clipped."""
    return training.accelerator.clip_grad_norm_(
        training.network.parameters(), training.settings.optimizer.max_grad_norm or math.inf
    )


def _read(losses: Sequence[Tensor], sums: Tensor, norm: Tensor | None) -> tuple[list[float], float, bool, bool, float]:
    """Everything that the step depends on, with one copy from the device, which is when it is waited for.

    Returns:
        The losses of this process; the mean of all; whether all are finite; whether any has a gradient; the norm, 0 for None.
    """
    norm = torch.zeros_like(sums[0]) if norm is None else norm.detach().to(sums)
    *own, total, not_finite, gradients, norm = torch.cat([*(loss.float()[None] for loss in losses), sums, norm[None]]).tolist()
    return own, total, not_finite == 0, gradients > 0, norm


def _of_all(training: Training, said: list[str]) -> list[str]:
    """What all processes have to say, which all call this together."""
    return said if training.gradients is None else gather_object(said)
