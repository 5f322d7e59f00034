"""What a training takes its batches from. Whoever brings the data makes one of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hunyuan_model.runtime.memory import BatchSize
from networks.training.saving.metadata import DataFacts


class StepBatches(Protocol):
    """What an optimizer step is made of (``dataset.batches.batches.StepBatches``).

    Attributes:
        shapes: of the latents of every batch, also of other processes, (B, C, F, H, W), in the order of the epoch.
        own: the batches that this process computes, by their places in ``shapes``; none where the others have them all.
        most: how many batches the process has that has the most.
    """

    shapes: Sequence[tuple[int, ...]]
    own: Mapping[int, Mapping[str, Any]]
    most: int


class BatchReader(Protocol):
    """Where the batches come from (``dataset.batches.reading.EpochReader``)."""

    batches_per_step: int  # of all processes; the last step of an epoch may have fewer

    def __len__(self) -> int:
        """Batches of an epoch, of all processes."""

    def epoch(self, number: int, start: int = 0, per_step: int | None = None) -> Iterator[StepBatches]:
        """The steps of epoch ``number``, counted from 0, from its batch ``start`` on, in the order for ``per_step`` of them."""

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
    table: str = ""  # of the datasets, as it was printed
    held_out: Sequence[Mapping[str, Any]] = ()  # batches of one item for the validation loss
    prior_preservation: bool = False  # whether any dataset wants the model's own predictions kept

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer batches than the others."""
        return -(-len(self.reader) // self.reader.batches_per_step)
