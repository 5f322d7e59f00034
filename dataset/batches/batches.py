"""From cached items to training batches: which belong together, in which order, and how they are read and stacked.

A batch holds items of one dataset whose latents have one shape, and that shape is the one in the cache file: nothing here
computes a bucket.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

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


class ShapeBatchSampler(Sampler[list[int]]):
    """Batches of positions in the items of all groups, one after the other; each batch has one dataset and one shape.

    The order of an epoch depends on the seed and the number of the epoch only, so any position in it can be found again.
    A last batch that is not full is kept. With several ranks every rank gets the same number of batches: where they do not
    divide evenly, the first ones of the epoch are used again at its end.
    """

    def __init__(self, groups: Sequence[CachedGroup], seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size
        offsets = accumulate((len(group.items) for group in groups), initial=0)
        self.pools = [
            ([offset + position for position in positions], group.dataset.batch_size)
            for offset, group in zip(offsets, groups)
            for positions in group.by_shape().values()
        ]
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank, wherever it begins."""
        batches = sum(-(-len(pool) // size) for pool, size in self.pools)
        return -(-batches // self.world_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, without its first ``start`` batches of this rank."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        # A generator seeded with text is the same on every platform and Python version.
        order = random.Random(f"{self.seed}:{self.epoch}")
        batches = []
        for pool, size in self.pools:
            shuffled = order.sample(pool, len(pool))
            batches += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        order.shuffle(batches)
        # The epoch comes round again when there are fewer batches than ranks ask for.
        for number in range(self.start, len(self)):
            yield batches[(self.rank + number * self.world_size) % len(batches)]
