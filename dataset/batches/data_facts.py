"""Facts about the data, for the metadata of a trained file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset.batches.batches import CachedGroup


@dataclass(frozen=True)
class DataFacts:
    """What a training knows about its data.

    Attributes:
        items: in all data sets, repeats included.
        resolution: (width, height) of the largest data set, for ModelSpec.
        datasets: one JSON-ready description for each.
    """

    items: int
    resolution: tuple[int, int]
    datasets: Sequence[Mapping[str, Any]] = ()


def data_facts(groups: Sequence[CachedGroup]) -> DataFacts:
    """The facts about these data sets, of which there is at least one."""
    return DataFacts(
        items=sum(len(group.items) * group.dataset.num_repeats for group in groups),
        resolution=max((group.dataset.resolution for group in groups), key=lambda size: size[0] * size[1]),
        datasets=[describe_group(group) for group in groups],
    )


def describe_group(group: CachedGroup) -> dict[str, object]:
    """The settings of a data set and how much it holds, and of its paths only the last name."""
    settings = {key: value for key, value in asdict(group.dataset).items() if value is not None and key != "cache_directory"}
    if group.dataset.kind == "image":
        settings = {key: value for key, value in settings.items() if not key.startswith(("target_", "frame_"))}
    paths = {key: value.name for key, value in settings.items() if isinstance(value, Path)}
    return settings | paths | {"items": len(group.items)}
