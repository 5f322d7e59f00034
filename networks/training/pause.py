"""Using the network in the middle of a training, for samples say, and leaving the training exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from hunyuan_model.runtime.device_split import devices_of
from networks.training.optim.optimizers import set_optimizer_mode, without_wrapper


@contextmanager
def kept_random_state(*devices: torch.device) -> Iterator[None]:
    """Put the generators of Python, numpy and torch (CPU, and ``devices``) back to where they stood before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Schedule-free optimizers show the weights meant for use inside; nothing happens to others.

    Their way back to the weights of training rounds, so those are kept in host memory and put back bit by bit.
    The optimizer is in training mode before and after.
    """
    optimizer = without_wrapper(optimizer)
    if not callable(getattr(optimizer, "eval", None)):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        set_optimizer_mode(optimizer, training=False)
        yield
    finally:
        set_optimizer_mode(optimizer, training=True)
        with torch.no_grad():
            for parameter, weights in zip(parameters, kept):
                parameter.copy_(weights)


@contextmanager
def paused_training(
    transformer: nn.Module, network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Iterator[None]:
    """Everything in evaluation mode inside, and as it was afterwards: modes of every module, weights, random state.

    What is computed inside must be under ``torch.no_grad``. The optimizer is in training mode before.
    """
    modes = [(module, module.training) for model in (transformer, network) for module in model.modules()]
    with kept_random_state(*devices_of(transformer, device)), evaluation_weights(optimizer):
        try:
            transformer.eval()
            network.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
