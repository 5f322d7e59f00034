"""From cached items to training batches: how they are read and stacked, and which one takes the most memory.

A batch holds items of one dataset whose latents have one shape, and that shape is the one in the cache file: nothing here
computes a bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence

from dataset.batches.cached_items import CachedGroup, CachedItem
from dataset.cache.files import read_latents, read_text, read_text_length
from hunyuan_model.runtime.memory import BatchSize
from hunyuan_model.transformer.config import TransformerConfig
from utils.errors import UserError


class Batch(TypedDict):
    """What the training loop gets.

    latents (B, C, F, H, W) as stored, not multiplied by the scaling factor; text_states (B, L, D), L the longest caption in
    the batch (at least 1), rows beyond a caption are zero; text_mask (B, L) int64, the ones come first; text_states_2 (B, D2);
    names: the items, for messages. prior_preservation: the target is the model's own prediction, not the latents.
    """

    latents: torch.Tensor
    text_states: torch.Tensor
    text_mask: torch.Tensor
    text_states_2: torch.Tensor
    names: list[str]
    prior_preservation: bool


class StepBatches(NamedTuple):
    """What an optimizer step is made of.

    shapes: of the latents of every batch, also of other processes, (B, C, F, H, W), in the order of the epoch.
    own: the batches that this process computes, by their places in ``shapes``.
    most: how many batches the process has that has the most.
    """

    shapes: Sequence[tuple[int, ...]]
    own: Mapping[int, Batch]
    most: int


def read_batch(items: Sequence[CachedItem]) -> Batch:
    """Read the caches of items whose latents have one shape, and stack them.

    Raises a UserError that names a cache file which is missing, damaged, changed or holds NaN.
    """
    latents, states, pooled = [], [], []
    for item in items:
        latents.append(read_latents(item.latents_path))
        if (shape := tuple(latents[-1].shape)) != item.shape:
            raise UserError(f"{item.latents_path} changed from {item.shape} to {shape} since the start; start again.")
        text = read_text(item.text_path)
        states.append(text.llm[text.llm_mask.bool()])
        pooled.append(text.clip)
    lengths = torch.tensor([len(rows) for rows in states])
    text_states = pad_sequence(states, batch_first=True)
    if text_states.shape[1] == 0:  # every caption is empty
        text_states = text_states.new_zeros(len(items), 1, text_states.shape[2])
    return Batch(
        latents=torch.stack(latents),
        text_states=text_states,
        text_mask=(torch.arange(text_states.shape[1]) < lengths[:, None]).to(torch.int64),
        text_states_2=torch.stack(pooled),
        names=[item.latents_path.name for item in items],
        prior_preservation=all(item.prior_preservation for item in items),
    )


@dataclass(frozen=True)
class LargestBatch:
    """The items of the batch that takes the most memory, and what they come to."""

    items: tuple[CachedItem, ...]
    size: BatchSize

    def load(self) -> Batch:
        """The batch, read now. Errors as in ``read_batch``."""
        return read_batch(self.items)


def largest_batch(groups: Sequence[CachedGroup], config: TransformerConfig) -> LargestBatch:
    """The batch of the most tokens that the sampler can make of ``groups``: of every shape the longest captions together."""
    lengths = {path: read_text_length(path) for path in {item.text_path for group in groups for item in group.items}}
    candidates = []
    for group in groups:
        for shape, positions in group.by_shape().items():
            items = sorted((group.items[position] for position in positions), key=lambda item: -lengths[item.text_path])
            items = tuple(items[: group.dataset.batch_size])
            candidates.append(LargestBatch(items, BatchSize(len(items), shape[1:], lengths[items[0].text_path])))
    return max(candidates, key=lambda batch: batch.size.tokens(config))
