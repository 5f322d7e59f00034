"""A step that leaves no trace: the largest batch forward and backward, to see whether memory suffices before a training begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from hunyuan_model.runtime.memory_report import explain_batch_out_of_memory
from networks.training.optim.optimizers import without_wrapper
from networks.training.pause import kept_random_state
from networks.training.run import Training
from utils.devices import free_memory
from utils.disk_space import readable

logger = logging.getLogger(__name__)

TIMESTEP = 0.5


def wants_dry_step(choice: str, device: torch.device) -> bool:
    """What --dry_step comes to: auto is for GPUs, where memory that does not suffice ends a training at once."""
    return choice == "always" or (choice == "auto" and device.type == "cuda")


def dry_step(training: Training, batch: Mapping[str, Any]) -> None:
    """Compute the loss of ``batch`` and its gradients, and forget them.

    No weight changes and no generator moves, so that the training is the same to the last bit. Memory that the optimizer will
    take in its first step is held meanwhile. Call it with the network in training mode.

    Raises:
        UserError: out of memory; with what to change.
    """
    device, plan = training.accelerator.device, training.plan.memory
    on_gpu = device.type == "cuda"
    if on_gpu:
        for each in plan.devices:
            torch.cuda.reset_peak_memory_stats(each)
    with kept_random_state(*plan.devices), explain_batch_out_of_memory(plan, [batch], "trying the largest batch,"):
        coming = on_gpu and not without_wrapper(training.optimizer).state
        held = [
            torch.empty(need.optimizer if coming else 0, dtype=torch.uint8, device=each)
            for each, need in zip(plan.devices, plan.needs())
        ]
        noise = torch.zeros(batch["latents"].shape, device=device)
        loss = training.flow_matching.loss_at(batch, noise, torch.full((len(noise),), TIMESTEP))
        if loss.requires_grad:  # dropout may leave out the whole network
            loss.backward()
        del loss, held
    for parameter in training.network.parameters():
        parameter.grad = None
    if on_gpu:
        for each, need in zip(plan.devices, plan.needs()):
            peak, where = torch.cuda.max_memory_allocated(each), "" if len(plan.devices) == 1 else f" on {each}"
            logger.info("the largest batch took %s at its peak%s; %s were expected", readable(peak), where, readable(need.of_step))
    free_memory(device)
