"""Names of what training writes, and the saving of a network under them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import nn

from utils.files import atomic_path

logger = logging.getLogger(__name__)


def final_name(name: str) -> str:
    """The file of the finished training."""
    return f"{name}.safetensors"


def epoch_name(name: str, epoch: int) -> str:
    """The file of the state after ``epoch`` epochs."""
    return f"{name}-{epoch:06d}.safetensors"


def step_name(name: str, step: int) -> str:
    """The file of the state after ``step`` optimiser steps."""
    return f"{name}-step{step:08d}.safetensors"


def save_network(network: nn.Module, path: str | os.PathLike[str], dtype: torch.dtype, metadata: dict[str, str]) -> Path:
    """Save ``network`` by its own ``save_weights`` under ``path``, which appears only when whole.

    Works for any network module of the common contract, whose ``save_weights`` may write in place.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        network.save_weights(str(temporary), dtype, metadata)
    logger.info("saved %s", path)
    return path
