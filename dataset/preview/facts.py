"""What a preview says of one file of a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from dataset.items import Item
from dataset.media.buckets import Size
from dataset.media.frames import Window


class Concern(StrEnum):
    """What may be wrong with a file, in the words of the page's filter."""

    FAILED = "cannot be read"
    SHORT = "too short"
    CROPPED = "much cut away"
    UPSCALED = "enlarged"
    SPEED = "wrong speed"
    DUPLICATE = "near-duplicate"
    NO_CAPTION = "no caption"
    SAME_CAPTION = "same caption"
    LONG_CAPTION = "caption too long"


@dataclass(frozen=True)
class Note:
    """One concern, as a sentence that says what is wrong and what to do."""

    concern: Concern
    text: str


@dataclass(frozen=True)
class TokenCount:
    """The tokens of a caption for one text encoder, of which it reads ``limit``."""

    count: int
    limit: int


@dataclass
class ItemFacts:
    """One file.

    Attributes:
        size: of its frames; None where it cannot be read.
        bucket: the size it is trained at.
        kept: left, top, width, height of what is not cut away, in pixels of the file.
        fps: of a clip's file; None for pictures.
        windows: the clips that are cut from it, as first frame and frames at the model's rate.
        changes: what is done to its frames, as ``Target.changes``.
        tokens: for encoder 1 and 2; None where no tokenizers were given.
    """

    item: Item
    size: Size | None = None
    bucket: Size | None = None
    kept: tuple[float, float, float, float] | None = None
    fps: float | None = None
    windows: list[Window] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    tokens: tuple[TokenCount, TokenCount] | None = None
    notes: list[Note] = field(default_factory=list)
