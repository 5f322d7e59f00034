"""How large the updates of a LoRA are, relative to the weights that they change: logged at saves, and at the end of a training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from hunyuan_model.quantization.linear import dequantized_weight
from hunyuan_model.runtime.sharding import whole_weights
from networks.lora import LoRANetwork

logger = logging.getLogger(__name__)

# At this size the LoRA of the toy model (which has 0.2) changes no pixel of a picture by more than 1 of 255. Rounding weights to
# bfloat16, as merging does, changes them by 1e-3 of their size.
WITHOUT_EFFECT = 1e-4


@dataclass(frozen=True)
class ChangedWeights:
    """The weights that a LoRA changes; ``norm``: the Frobenius norm of all of them together."""

    norm: float

    @torch.no_grad()
    def share(self, network: LoRANetwork) -> float:
        """The norm of all updates relative to that of the weights, from products of rank x rank."""
        return network.update_norms().norm().item() / self.norm


@torch.no_grad()
def measure_changed_weights(network: nn.Module, transformer: nn.Module, device: torch.device) -> ChangedWeights | None:
    """Read the weights once, layer by layer on ``device``, from wherever they are and however they are stored.

    All processes call it where they share sharded weights.

    None for networks of other modules, whose updates are not known, and for weights that are all zero.
    """
    if not isinstance(network, LoRANetwork):
        return None
    norms = []
    for block, paths in groupby(network.paths.values(), lambda path: ".".join(path.split(".")[:2])):
        with whole_weights(transformer.get_submodule(block)):
            weights = (dequantized_weight(transformer.get_submodule(path), device) for path in paths)
            norms += [torch.linalg.vector_norm(weight, dtype=torch.float32) for weight in weights]
    norm = torch.stack(norms).norm().item()
    return ChangedWeights(norm) if norm else None


def log_size(share: float, at_end: bool) -> None:
    """Log it; at the end with a warning where it is so small that nothing of the LoRA will be seen."""
    logger.info("size of the updates relative to the weights they change: %.2g", share)
    if at_end and share < WITHOUT_EFFECT:
        logger.warning(
            "the updates are %.1g of the weights they change, and below %g nothing of a LoRA is seen (rounding to bfloat16 alone "
            "changes weights by 1e-3). Train longer, or with a higher --learning_rate or --network_alpha.",
            *(share, WITHOUT_EFFECT),
        )
