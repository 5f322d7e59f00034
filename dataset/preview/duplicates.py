"""Pictures and clips of a dataset that look nearly the same, as copies of one file do."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataset.cache.preparation import Prepared
from dataset.items import Item


@dataclass
class Alike:
    """The files that look like one: the first few, and how many there are. ``mirrored``: some of these are mirror images."""

    first: list[Item] = field(default_factory=list)
    count: int = 0
    mirrored: set[Item] = field(default_factory=set)


class Fingerprints:
    """Small descriptions of what pictures and clips look like, made while they are prepared."""

    def add(self, prepared: Prepared) -> None:
        """Describe a picture or a window; of several windows of a clip the longest counts."""

    def alike(self) -> dict[Item, Alike]:
        """Every item that looks like another."""
        return {}
