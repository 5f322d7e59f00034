"""The batch of a training that takes the most memory, found from the headers of the caches and their text masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dataset.batches.batches import Batch, CachedDataset, CachedGroup, collate
from dataset.cache.files import CachedItem, read_text_length
from hunyuan_model.runtime.memory import BatchSize
from hunyuan_model.transformer.config import TransformerConfig


@dataclass(frozen=True)
class LargestBatch:
    """Items that may meet in a batch, and what they come to."""

    items: tuple[CachedItem, ...]
    size: BatchSize

    def load(self) -> Batch:
        """The batch, read now.

        Raises:
            UserError: a cache file is missing, damaged, changed or holds NaN; the message names it.
        """
        data = CachedDataset.of_items(self.items)
        return collate([data[index] for index in range(len(data))])


def largest_batch(groups: Sequence[CachedGroup], config: TransformerConfig) -> LargestBatch:
    """The batch of the most tokens that the sampler can make of ``groups``: of every shape the longest captions together.

    Raises:
        UserError: text encoder outputs that cannot be read.
    """
    lengths = {path: read_text_length(path) for path in {item.text_path for group in groups for item in group.items}}
    candidates = []
    for group in groups:
        for shape, positions in group.by_shape().items():
            items = sorted((group.items[position] for position in positions), key=lambda item: -lengths[item.text_path])
            items = tuple(items[: group.dataset.batch_size])
            candidates.append(LargestBatch(items, BatchSize(len(items), shape[1:], lengths[items[0].text_path])))
    return max(candidates, key=lambda batch: batch.size.tokens(config))
