"""Pictures and clips of a dataset that look nearly the same, as copies of one file do.

What is compared are small thumbnails without their mean colour and at one contrast, by their correlation: saving anew, shrinking
and a little more light hardly change it. Of the best pairs, crops by a few percent are tried too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from PIL import Image

from dataset.cache.preparation import Prepared
from dataset.items import Item

THUMBNAIL, CELLS = 48, 12  # sides; crops are cut from the first, and all are compared as the second
CROPS = tuple((first, 1 - last) for first, last in product((0.0, 0.015, 0.03), repeat=2))  # along each side; the first is none
# Correlations of different pictures, after the best crop: up to 0.976 of the toy concept (one ring on one green, moved by 3 % of
# the width, and 0.973 mirrored), 0.62 of the photographs of scikit-image, 0.92 of its stereo pair.
# Of one picture in two files, at least: JPEG of quality 50 0.984; half as large 0.999; up to 3 % cut off each side 0.978, but 0.83
# to 0.97 of a wall, gravel and grass, whose coarse structure is weak.
ALIKE = 0.978
PROMISING = 0.7  # before the best crop
MOST_PROMISING = 64  # for one picture, so that time is bounded
LEAST_CONTRAST = 1.0  # standard deviation; a plain frame looks like every other
BLOCK_NUMBERS = 1 << 23  # of correlations at once: 32 MB


@dataclass
class Alike:
    """The files that look like one; of the mirrored ones the mirror image does."""

    items: list[Item] = field(default_factory=list)
    mirrored: set[Item] = field(default_factory=set)


class Fingerprints:
    """Thumbnails of pictures, and of the first, middle and last frame of clips: 7 KB each."""

    def __init__(self) -> None:
        self._frames: dict[Item, int] = {}
        self._thumbnails: dict[Item, np.ndarray] = {}  # (1 or 3, THUMBNAIL, THUMBNAIL, 3) uint8

    def add(self, prepared: Prepared) -> None:
        """Of several windows of a clip the longest counts, and of these the first."""
        item, frames = prepared.target.item, len(prepared.pixels)
        if frames > self._frames.get(item, 0):
            self._frames[item] = frames
            chosen = prepared.pixels[[0]] if frames == 1 else prepared.pixels[[0, frames // 2, -1]]
            self._thumbnails[item] = np.stack([_thumbnail(pixels) for pixels in chosen])

    def alike(self) -> dict[Item, Alike]:
        """Every item that looks like another: clips where all three frames do, a picture and a clip where one does.

        A file in several datasets is among those of another once.
        """
        items = list(self._thumbnails)
        files = [os.path.realpath(item.path) for item in items]
        found: dict[Item, Alike] = {}
        named = set(enumerate(files))
        for (first, second), is_mirrored in sorted(_pairs(list(self._thumbnails.values())).items()):
            for one, other in ((first, second), (second, first)):
                if (one, files[other]) not in named:
                    named.add((one, files[other]))
                    alike = found.setdefault(items[one], Alike())
                    alike.items.append(items[other])
                    if is_mirrored:
                        alike.mirrored.add(items[other])
        return found


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=2))


Pairs = dict[tuple[int, int], bool]  # two positions, the smaller first: whether one is mirrored


def _pairs(thumbnails: Sequence[np.ndarray]) -> Pairs:
    if not thumbnails:
        return {}
    clips = np.flatnonzero([len(frames) > 1 for frames in thumbnails])
    pictures = np.flatnonzero([len(frames) == 1 for frames in thumbnails])
    first = np.stack([frames[0] for frames in thumbnails])
    vectors = _whole_vectors(first)
    pairs = _alike_pairs(first, vectors)
    if len(clips):
        later = [_whole_vectors(np.stack([thumbnails[clip][k] for clip in clips])) for k in (1, 2)]
        number = {clip: k for k, clip in enumerate(clips.tolist())}
        pairs = {
            (one, other): is_mirrored
            for (one, other), is_mirrored in pairs.items()
            if one not in number
            or other not in number
            or all(
                _alike(thumbnails[one][k + 1], each[number[one]], thumbnails[other][k + 1], each[number[other]], is_mirrored)
                for k, each in enumerate(later)
            )
        }
        for each in later:
            for picture, correlations in _rows(vectors[pictures], each):
                for clip in np.flatnonzero(correlations >= ALIKE)[:MOST_PROMISING]:
                    pairs.setdefault(tuple(sorted((int(pictures[picture]), int(clips[clip])))), False)
    return pairs


def _alike_pairs(thumbnails: np.ndarray, vectors: np.ndarray) -> Pairs:
    """Of pictures (N, THUMBNAIL, THUMBNAIL, 3) with their vectors."""
    pairs: Pairs = {}
    for one, correlations in _rows(vectors, _mirrored(vectors)):
        for other in _best(correlations, one, ALIKE):
            pairs[min(one, other), max(one, other)] = True
    for one, correlations in _rows(vectors, vectors):
        promising = _best(correlations, one, PROMISING)
        alike = correlations[promising] >= ALIKE
        if not alike.all():
            alike |= (_cropped_vectors(thumbnails[one]) @ vectors[promising].T).max(axis=0) >= ALIKE
        for other in promising[alike].tolist():
            pairs[min(one, other), max(one, other)] = False
    return pairs


def _alike(one: np.ndarray, vector: np.ndarray, other: np.ndarray, other_vector: np.ndarray, is_mirrored: bool) -> bool:
    """Two thumbnails with their vectors."""
    if is_mirrored:
        return float(_mirrored(vector[None])[0] @ other_vector) >= ALIKE
    correlation = float(vector @ other_vector)
    if not PROMISING <= correlation < ALIKE:
        return correlation >= ALIKE
    return max((_cropped_vectors(one) @ other_vector).max(), (_cropped_vectors(other) @ vector).max()) >= ALIKE


def _rows(vectors: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each position with its correlations to all others, in blocks of bounded memory."""
    rows = max(1, BLOCK_NUMBERS // max(1, len(others)))
    for start in range(0, len(vectors), rows):
        yield from enumerate(vectors[start : start + rows] @ others.T, start)


def _best(correlations: np.ndarray, own: int, least: float) -> np.ndarray:
    """The positions of the highest correlations that are at least ``least``, but for the ``own``."""
    found = np.flatnonzero(correlations >= least)
    found = found[found != own]
    if len(found) > MOST_PROMISING:
        found = found[np.argpartition(-correlations[found], MOST_PROMISING)[:MOST_PROMISING]]
    return found


def _crop_matrix() -> np.ndarray:
    """(crops * CELLS, THUMBNAIL): the means of equal parts of each of ``CROPS``."""
    edges = np.concatenate([np.linspace(first, last, CELLS + 1) * THUMBNAIL for first, last in CROPS]).reshape(len(CROPS), -1)
    starts, ends, pixels = edges[:, :-1].reshape(-1, 1), edges[:, 1:].reshape(-1, 1), np.arange(THUMBNAIL)
    covered = np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0, None)
    return (covered / covered.sum(axis=1, keepdims=True)).astype(np.float32)


CROP_MATRIX = _crop_matrix()


def _cropped_vectors(thumbnail: np.ndarray) -> np.ndarray:
    """(THUMBNAIL, THUMBNAIL, 3) -> (crops squared, CELLS * CELLS * 3), unit vectors."""
    rows = np.tensordot(CROP_MATRIX, thumbnail.astype(np.float32), axes=(1, 0))  # (crops * CELLS, THUMBNAIL, 3)
    cells = np.tensordot(rows, CROP_MATRIX, axes=(1, 1))  # (crops * CELLS, 3, crops * CELLS)
    cells = cells.reshape(len(CROPS), CELLS, 3, len(CROPS), CELLS).transpose(0, 3, 1, 4, 2)
    return _unit_vectors(cells.reshape(-1, CELLS, CELLS, 3))


def _whole_vectors(thumbnails: np.ndarray) -> np.ndarray:
    """(N, THUMBNAIL, THUMBNAIL, 3) -> (N, CELLS * CELLS * 3), unit vectors, or zero where there is no contrast."""
    step = THUMBNAIL // CELLS
    vectors = [
        _unit_vectors(part.reshape(len(part), CELLS, step, CELLS, step, 3).mean(axis=(2, 4), dtype=np.float32))
        for part in np.array_split(thumbnails, max(1, len(thumbnails) // 1024))
    ]
    return np.concatenate(vectors)


def _unit_vectors(cells: np.ndarray) -> np.ndarray:
    vectors = (cells - cells.mean(axis=(1, 2), keepdims=True)).reshape(len(cells), -1)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(norms >= LEAST_CONTRAST * vectors.shape[1] ** 0.5, vectors / np.maximum(norms, 1e-6), 0).astype(np.float32)


def _mirrored(vectors: np.ndarray) -> np.ndarray:
    return vectors.reshape(-1, CELLS, CELLS, 3)[:, :, ::-1].reshape(len(vectors), -1)
