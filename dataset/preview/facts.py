"""What a preview says of one file of a dataset."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dataset.cache.preparation import Failure, Finished, Source
from dataset.config import DatasetConfig
from dataset.items import Item
from dataset.media.buckets import Size
from dataset.media.frame_rate import MODEL_FPS, TOLERANCE
from dataset.media.frames import Window, longest_clip
from dataset.media.resizing import kept_box
from dataset.preview.duplicates import Alike, Fingerprints
from utils.errors import SHOWN_NAMES, name_some
from utils.key_values import TextEnum
from utils.output import visible

if TYPE_CHECKING:
    from hunyuan_model.text.encoding import TextLength

# An enlargement by less is rounding: sides are multiples of 16, which is 6 % of 256.
ENLARGED = 1.1
# Of the area. A picture of 3:2 loses 33 % in a square, one of 4:3 25 % there and in 16:9; a panorama of 3:1 loses 41 % in 16:9.
MOST_CUT_AWAY = 0.35
# Of a clip's frames may show the one before them once more. Animation on twos, 12 frames per second, has half of them.
MOST_REPEATS = 0.55
# Phones film fewer frames in the dark than they state: 24 of 30, 50 of 60. The slowest slow motion films 60 and plays 30.
SLOW_MOTION = 1.5


class Concern(TextEnum):
    """What may be wrong with a file, in the words of the page's filter."""

    FAILED = "cannot be read"
    SHORT = "too short"
    CROPPED = "much cut away"
    UPSCALED = "enlarged"
    SPEED = "wrong speed"
    STUTTER = "stutters"
    DUPLICATE = "near-duplicate"
    NO_CAPTION = "no caption"
    SAME_CAPTION = "same caption"
    LONG_CAPTION = "caption too long"
    CACHE = "cache not current"


@dataclass(frozen=True)
class Note:
    """One concern, as a sentence that says what is wrong and what to do.

    ``mentions``: what the sentence calls other files, in its order, for links to them.
    """

    concern: Concern
    text: str
    mentions: tuple[tuple[str, Item], ...] = ()

    @property
    def parts(self) -> Iterator[tuple[str, Item | None]]:
        """The text in pieces, with the file that a piece names."""
        rest = self.text
        for name, item in self.mentions:
            before, name, rest = rest.partition(name)
            yield before, None
            yield name, item
        yield rest, None


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
        windows: the clips that are cut from it, as first frame and frames at the rate that is trained.
        seconds: how long a clip's file plays; None for pictures, and where the file does not say.
        spans: the parts of a clip's file that are in a window, from second to second, in order.
        changes: what is done to its frames, as ``Target.changes``.
        rate: of a clip, in words: frames per second of its file, and what is made of them.
        done: to its pixels, as ``VideoInfo.done``.
        tokens: for encoder 1 and 2; None where no tokenizers were given.
    """

    item: Item
    size: Size | None = None
    bucket: Size | None = None
    kept: tuple[float, float, float, float] | None = None
    fps: float | None = None
    windows: list[Window] = field(default_factory=list)
    seconds: float | None = None
    spans: list[tuple[float, float]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    rate: str = ""
    done: str = ""
    tokens: tuple[TokenCount, TokenCount] | None = None
    notes: list[Note] = field(default_factory=list)

    @property
    def use(self) -> str:
        """How much of a clip is trained, such as "2.0 of 14.5 s are used"; empty for pictures and what cannot be read."""
        if self.fps is None:
            return ""
        used = sum(end - start for start, end in self.spans)
        whole = "" if self.seconds is None else f" of {self.seconds:.1f}"
        return f"{used:.1f}{whole} s are used"


def facts_of(finished: Finished) -> ItemFacts:
    """What is known of a file that was read, also of a clip that is too short. ``compare_items`` adds what needs the others."""
    item, source, dataset = finished.item, finished.source, finished.item.dataset
    bucket = dataset.bucket_for(source.size)
    facts = ItemFacts(item, source.size, bucket, kept_box(source.size, bucket))
    if dataset.kind == "video":
        rate = _frames_of_a_second(source, dataset)
        facts.fps, facts.seconds = source.fps or MODEL_FPS, source.seconds
        facts.rate = f"{facts.fps:.4g} fps"
        facts.windows = [target.window for target in finished.targets]
        facts.spans = [(start / rate, end / rate) for start, end in _joined(facts.windows)]
    if not finished.targets:
        facts.notes = [_short(source, dataset)]
        return facts
    facts.changes, facts.done = finished.targets[0].changes, source.done
    notes = [_cropped(facts), _enlarged(facts)]
    if dataset.kind == "video":
        facts.rate = _rate(source, dataset)
        notes += [_speed(source, dataset), _stutter(source, facts.windows)]
    facts.notes = [note for note in notes if note is not None]
    return facts


def facts_of_failure(failure: Failure) -> ItemFacts:
    """Of a file that cannot be read."""
    return ItemFacts(failure.item, notes=[Note(Concern.FAILED, failure.message)])


def compare_items(facts: Sequence[ItemFacts], fingerprints: Fingerprints, lengths: Mapping[str, TextLength] | None = None) -> None:
    """Add the notes and token counts of captions, and the notes of near-duplicates.

    ``lengths``: of all captions, as ``hunyuan_model.text_lengths`` counts them.
    """
    names = _Names([each.item for each in facts])
    _add_caption_notes(facts, names, lengths)
    alike = fingerprints.alike()
    for each in facts:
        if (found := alike.get(each.item)) is not None:
            each.notes.append(_duplicate(found, names))


class _Names:
    """What notes call files: by their names, and where several have the same one, with the folder."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._folders: dict[str, set[str]] = defaultdict(set)
        for item in items:
            self._folders[item.path.name].add(os.path.abspath(item.path.parent))

    def __call__(self, item: Item) -> str:
        is_unique = len(self._folders[item.path.name]) == 1
        return item.path.name if is_unique else f"{item.path.parent.name}/{item.path.name}"


def _add_caption_notes(facts: Sequence[ItemFacts], names: _Names, lengths: Mapping[str, TextLength] | None) -> None:
    files: dict[str, dict[str, Item]] = defaultdict(dict)  # of each caption: one item of each file
    for each in facts:
        if each.item.caption:
            files[each.item.caption].setdefault(os.path.realpath(each.item.path), each.item)
    shared = {}
    for caption, items in files.items():
        some = _name_some([names(item) for item in islice(items.values(), SHOWN_NAMES)], len(items))
        shared[caption] = f"{len(items)} files have this same caption: {some}. Say in each what only that one shows."
    for each in facts:
        caption = each.item.caption
        if not caption:
            what = "It has no caption" if caption is None else "Its caption is empty"
            each.notes.append(Note(Concern.NO_CAPTION, f"{what}. Write down what it shows."))
        elif len(files[caption]) > 1:
            each.notes.append(Note(Concern.SAME_CAPTION, shared[caption]))
        if lengths is not None and caption is not None:
            length = lengths[caption]
            each.tokens = tuple(TokenCount(*counts) for counts in length.counts)
            if length.is_cut:
                text = f"The end of its caption is not read: it has {length}. Shorten it, with what matters first."
                each.notes.append(Note(Concern.LONG_CAPTION, text))


def _duplicate(found: Alike, names: _Names) -> Note:
    some = [f"{names(item)}{' (mirrored)' if item in found.mirrored else ''}" for item in found.items[:SHOWN_NAMES]]
    text = f"It looks nearly the same as {_name_some(some, len(found.items))}. Keep one of them."
    return Note(Concern.DUPLICATE, text, tuple((visible(names(item)), item) for item in found.items[:SHOWN_NAMES]))


def _name_some(first: Sequence[str], count: int) -> str:
    """``name_some`` of ``count`` names, of which the first suffice."""
    more = f" and {count - SHOWN_NAMES} more" if count > SHOWN_NAMES else ""
    return name_some(first[:SHOWN_NAMES]) + more


def _frames_of_a_second(source: Source, dataset: DatasetConfig) -> float:
    """How many of the frames that windows count come from one second of a clip's file."""
    own = source.fps or MODEL_FPS
    if source.resampling is None:
        return own
    return dataset.target_fps * own / (dataset.source_fps or own)


def _rate(source: Source, dataset: DatasetConfig) -> str:
    own = source.fps or MODEL_FPS
    stated = f"{own:.4g} fps" + (f", taken for {dataset.source_fps:g}" if dataset.source_fps and dataset.target_fps else "")
    if source.resampling is None:
        text = f"{stated}, every frame taken"
    else:
        uneven = "uneven " if source.resampling.uneven else ""
        text = f"{uneven}{stated} → {source.resampling.target_fps:.4g} fps, resampled"
    speed = MODEL_FPS / _frames_of_a_second(source, dataset)
    return text if abs(speed - 1) <= TOLERANCE else f"{text}: plays at {speed:.2g}x"


def _joined(windows: Sequence[Window]) -> list[tuple[int, int]]:
    """First frame and end of each stretch of frames that are in a window."""
    stretches: list[tuple[int, int]] = []
    for start, length in sorted(windows):
        if stretches and start <= stretches[-1][1]:
            stretches[-1] = stretches[-1][0], max(stretches[-1][1], start + length)
        else:
            stretches.append((start, start + length))
    return stretches


def _cropped(facts: ItemFacts) -> Note | None:
    (width, height), (_, _, kept_width, kept_height) = facts.size, facts.kept
    lost = 1 - kept_width * kept_height / (width * height)
    if lost <= MOST_CUT_AWAY:
        return None
    sides = "left and right" if width - kept_width > height - kept_height else "top and bottom"
    advice = "" if facts.item.dataset.enable_bucket else ", or set enable_bucket = true"
    return Note(
        Concern.CROPPED,
        f"{lost:.0%} of {_sides(facts.size)} is cut away at the {sides}, to fit {_sides(facts.bucket)}. "
        f"Crop it yourself to what matters{advice}.",
    )


def _enlarged(facts: ItemFacts) -> Note | None:
    times = facts.bucket[0] / facts.kept[2]
    if times < ENLARGED:
        return None
    dataset = facts.item.dataset
    could_keep_size = dataset.enable_bucket and not dataset.bucket_no_upscale
    advice = "set bucket_no_upscale = true" if could_keep_size else "set a smaller resolution"
    return Note(
        Concern.UPSCALED,
        f"{_sides(facts.size)} is enlarged {times:.1f} times to fit {_sides(facts.bucket)} and looks soft. "
        f"Take a larger original, or {advice}.",
    )


def _short(source: Source, dataset: DatasetConfig) -> Note:
    count = source.frames
    at_rate = f" at {dataset.target_fps:g} per second" if dataset.target_fps else ""
    return Note(
        Concern.SHORT,
        f"It has {count} frame{'s' if count > 1 else ''}{at_rate}, fewer than the {min(dataset.target_frames)} of target_frames: "
        f"nothing of it is trained. Take a longer clip, or put {longest_clip(count)} into the list target_frames.",
    )


def _speed(source: Source, dataset: DatasetConfig) -> Note | None:
    own = source.fps or MODEL_FPS
    filmed = source.filmed_fps or own
    if max(filmed / own, own / filmed) < SLOW_MOTION:
        filmed = own
    rate = _frames_of_a_second(source, dataset) * filmed / own  # trained frames of one second before the camera
    if abs(rate / MODEL_FPS - 1) <= TOLERANCE:
        return None
    result = f"it is trained at {MODEL_FPS / rate:.3g} times its speed"
    if filmed != own:
        text = (
            f"It was filmed at {filmed:.4g} frames per second, and its file plays {own:.4g} of them in a second: {result}. "
            f"Put such clips into a dataset of their own with source_fps = {filmed:.4g}, or say in the caption how fast it is."
        )
    elif dataset.source_fps is not None and dataset.target_fps:
        text = (
            f"It was filmed at {own:.4g} frames per second by its file, and source_fps takes them for {dataset.source_fps:.4g}: "
            f"{result}. Remove source_fps unless the file is wrong."
        )
    else:
        taken = "every frame" if dataset.target_fps == 0 else f"{dataset.target_fps:g} frames of each second"
        text = (
            f"It was filmed at {own:.4g} frames per second. target_fps = {dataset.target_fps:g} takes {taken}, and "
            f"{MODEL_FPS} are a second for the model: {result}. Remove target_fps."
        )
    return Note(Concern.SPEED, text)


def _stutter(source: Source, windows: Sequence[Window]) -> Note | None:
    if source.resampling is None:
        return None
    repeats = np.diff(source.resampling.indices) == 0
    before = np.concatenate([[0], np.cumsum(repeats)])  # repeats up to a frame
    repeated = sum(int(before[start + length - 1] - before[start]) for start, length in windows)
    share = repeated / max(1, sum(length - 1 for _, length in windows))
    if share <= MOST_REPEATS:
        return None
    return Note(
        Concern.STUTTER,
        f"It has {source.resampling.fps:.3g} frames per second, so that {share:.0%} of the frames that are trained "
        f"only repeat the one before. Take a version with more frames per second, or leave it out.",
    )


def _sides(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
