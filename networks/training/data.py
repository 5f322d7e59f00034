"""What a training takes its batches from. Whoever brings the data makes one of these."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hunyuan_model.runtime.memory import BatchSize
from networks.training.saving.metadata import DataFacts


class BatchReader(Protocol):
    """Where the batches come from (``dataset.batches.reading.EpochReader``)."""

    def __len__(self) -> int:
        """Batches of an epoch, of this process."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Mapping[str, Any]]:
        """The batches of epoch ``number``, counted from 0, from its batch ``start`` on."""

    def fingerprint(self) -> str:
        """Changes with the items and with their order."""

    def due(self) -> str:
        """The items of the batch that ``epoch`` gives next, for a sentence."""

    def close(self) -> None:
        """End whatever reads ahead."""


class LargestBatch(Protocol):
    """The batch that takes the most memory (``dataset.batches.batches.LargestBatch``)."""

    size: BatchSize

    def load(self) -> Mapping[str, Any]:
        """The batch, read now."""


@dataclass(frozen=True)
class TrainingData:
    """What a training takes its batches from."""

    reader: BatchReader
    largest: LargestBatch
    facts: DataFacts
    held_out: Collection[Mapping[str, Any]] = ()  # batches of one item for the validation loss
    prior_preservation: bool = False  # whether any dataset wants the model's own predictions kept
