"""What a page shows of one file: small pictures and clips that keep to a number of bytes. Made in threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dataset.cache.preparation import Prepared
from dataset.items import Item
from dataset.media.frame_rate import MODEL_FPS
from dataset.media.frames import Window
from utils.pages.media import clip_uri, picture_uri, smaller

PAGE_BYTES = 24_000_000  # that a page takes at most, if it has no more than a few thousand files
ITEM_WORDS = 1500  # bytes of a file's words and tags, without its caption
LEAST_ITEM_BYTES, MOST_ITEM_BYTES = 3000, 160_000
CAPTION_LETTERS = 2000  # that are shown; the encoders read less
SIDES = {40_000: 256, 18_000: 192, 13_000: 144}  # of pictures and clips, by the bytes that a file may take at least
LEAST_SIDE = 128
LONG = 2.2  # from this ratio of its sides on, a whole file is shown longer than others
OVERVIEW_SHARE, CLIP_SHARE = 0.2, 0.55  # of the bytes of a file, and of those of a window
QUALITIES = (80, 60, 40, 20)


@dataclass(frozen=True)
class Room:
    """How large one file may be on a page: ``item_bytes`` for all its media, ``side`` in pixels, and how many windows."""

    item_bytes: int
    side: int
    windows: int

    @classmethod
    def for_items(cls, items: Sequence[Item]) -> Room:
        """So that a page of all of them stays small enough to open at once."""
        captions = sum(len((item.caption or "")[:CAPTION_LETTERS].encode("utf-8", "replace")) for item in items)
        free = (PAGE_BYTES - captions) // max(1, len(items)) - ITEM_WORDS
        item_bytes = min(max(free, LEAST_ITEM_BYTES), MOST_ITEM_BYTES)
        side = next((side for least, side in SIDES.items() if item_bytes >= least), LEAST_SIDE)
        return cls(item_bytes, side, 3 if item_bytes >= 100_000 else 1)

    def windows_of(self, item: Item) -> int:
        """How many windows of each length are shown: at least one, so that none is missed."""
        return max(1, self.windows // self._lengths(item))

    def overview(self, frame: np.ndarray) -> Image.Image:
        """A whole frame (H, W, 3) uint8 of a file, made small; a long one less, so that its short side can be seen."""
        height, width, _ = frame.shape
        ratio = max(height / width, width / height)
        return smaller(frame, round(self.side * min(4, max(1, (ratio / 1.5) ** 0.5))))

    def overview_uri(self, overview: Image.Image) -> str:
        """The small picture of a whole frame, as a data URI."""
        return _picture_within(np.asarray(overview), max(overview.size), self.item_bytes * OVERVIEW_SHARE)

    def view(self, prepared: Prepared) -> WindowView:
        """A picture, or the first, middle and last frame of a clip, and the clip."""
        target, pixels = prepared.target, prepared.pixels
        room = self.item_bytes * (1 - OVERVIEW_SHARE)
        if len(pixels) == 1:
            return WindowView(target.window, [_picture_within(pixels[0], self.side, room)])
        room /= self.windows_of(target.item) * self._lengths(target.item)
        places = sorted({0, len(pixels) // 2, len(pixels) - 1})
        stills = [_picture_within(pixels[place], self.side, room * (1 - CLIP_SHARE) / len(places)) for place in places]
        clip = clip_uri(pixels, MODEL_FPS, self.side, most_bytes=int(room * CLIP_SHARE))
        return WindowView(target.window, stills, places, clip)

    @staticmethod
    def _lengths(item: Item) -> int:
        dataset = item.dataset
        return 1 if dataset.kind == "image" or dataset.frame_extraction == "full" else len(set(dataset.target_frames))


@dataclass(frozen=True)
class WindowView:
    """What is shown of a picture (``window`` None) or a window of a clip.

    Attributes:
        stills: data URIs.
        places: which frames of the window they are.
        clip: the data URI of a video; None for one frame.
    """

    window: Window | None
    stills: list[str]
    places: list[int] = field(default_factory=lambda: [0])
    clip: str | None = None


def _picture_within(pixels: np.ndarray, side: int, most_bytes: float) -> str:
    """A data URI of at most so many bytes, if the lowest quality allows it."""
    for quality in QUALITIES:
        uri = picture_uri(pixels, side, quality)
        if len(uri) <= most_bytes:
            break
    return uri
