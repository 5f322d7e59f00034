"""Reads off a clip what it shows, by plain image analysis: the judge of the toy model, which knows nothing of models.

The background is the colour of the border, the foreground what differs from it. How far each pixel is covered by the foreground
is compared with each outline of the world, at the place and size at which it covers as much; its colour and its path are looked up.
What fits nothing well is read as None, and so counts as wrong: half a shape, two shapes, a colour in between, a jump.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from examples.toy import world, zorp

STAR = "star"
_OUTLINES = {**world.OUTLINES, STAR: zorp.outline}
_NAMES = list(world.COLOURS)
_PALETTE = np.array(list(world.COLOURS.values()), np.float32)

_BORDER = np.ones((world.SIZE, world.SIZE), bool)  # the outermost pixels, which shapes of the world hardly touch
_BORDER[2:-2, 2:-2] = False
LARGEST_BORDER_SHARE = 0.25  # that the foreground may cover of the border; beyond it is no figure on a background
SEEN = 32.0  # distance in RGB from the background at which a pixel may be foreground; the palette's closest are 75 apart
SPECKLE = 0.06  # of the largest part's area: smaller parts are not looked at
SMALLEST_AREA = 40  # pixels
LARGEST_COLOUR_DISTANCE = 60.0
PURITY = 0.6  # of a shape or a border must be nearest to the colour it is said to have
OVERLAPS = {"circle": 0.82, "square": 0.78, "triangle": 0.73, "cross": 0.68, "ring": 0.68, STAR: 0.68}
"""Intersection over union with the outline of a shape, at least: of corners, and of what is thin, blur takes more."""
SCALES = (0.94, 1.0, 1.07)  # of an outline: a soft edge makes what it covers uncertain
EDGE = 3  # pixels around a mask in which its soft edge may lie
LARGEST_DOUBT = 0.03  # by which other outlines may be closer, each frame to its own, on average: else the shape changes on the way
STRIPE_DISTANCE = 55.0  # of a zorp's pixels from the line in RGB that joins its two colours: stripes may blur
STRIPE_SHARE, STRIPES_SHARE = 0.15, 0.5  # of the star: more pink than teal and the other way round each, and together
STILL_SPEED, MOVING_SPEED = 0.5, 0.75  # pixels per frame; world.SPEEDS begin at twice the latter
LARGEST_DEVIATION = 2.0  # pixels from a straight path, root mean square
STILL_GROWTH, GROWING_GROWTH = 0.33, 0.5  # of how much the world's shapes grow


@dataclass(frozen=True)
class Reading:
    """What a clip shows; None where it shows nothing of the kind clearly. The motion of a single picture is None.

    ``shape`` is one of ``world.SHAPES`` or ``STAR``. ``zorp``: whether it is a star in a zorp's two colours.
    """

    shape: str | None
    colour: str | None
    background: str | None
    motion: str | None
    zorp: bool = False

    def right(self, attributes: world.Attributes) -> dict[str, bool]:
        """Which of the words of ``attributes`` were read; the motion only where they say one."""
        names = ("background", "colour", "shape", "motion") if attributes.motion else ("background", "colour", "shape")
        return {name: getattr(self, name) == getattr(attributes, name) for name in names}


def read(clip: np.ndarray) -> Reading:
    """The reading of a clip (T, 64, 64, 3) uint8, T = 1 for a picture."""
    pixels = clip.astype(np.float32)
    border = pixels[:, _BORDER].reshape(-1, 3)
    background = _common_colour(border)
    foregrounds = _foregrounds(pixels, np.median(border, axis=0))
    figures = [
        _Figure(masks, coverage)
        for masks, coverage in foregrounds
        if masks.sum((1, 2)).min() >= SMALLEST_AREA and masks[:, _BORDER].mean() <= LARGEST_BORDER_SHARE
    ]
    if not figures:
        return Reading(None, None, background, None)
    plain, striped = figures[::2], [figure for figure in figures[1::2] if figure.shape == STAR]
    figure = max(plain + striped, key=lambda figure: figure.overlap)
    colours = pixels[_inner(figure.masks)]
    is_zorp = figure.shape == STAR and _striped_as_zorps(colours)
    colour = None if is_zorp else _common_colour(colours)
    return Reading(figure.shape, colour, background, _motion(figure), is_zorp)


# ---------------------------------------------------------------------------------------------------------------------
# Colours


def _common_colour(colours: np.ndarray) -> str | None:
    """The name of the median of colours (N, 3), if most of them would be called so."""
    if not len(colours):  # a figure so thin that every pixel is edge
        return None
    distances = np.linalg.norm(_PALETTE - np.median(colours, axis=0), axis=1)
    best = distances.argmin()
    nearest = np.linalg.norm(colours[:, None] - _PALETTE, axis=2).argmin(1)
    clear = distances[best] <= LARGEST_COLOUR_DISTANCE and (nearest == best).mean() >= PURITY
    return _NAMES[best] if clear else None


def _striped_as_zorps(colours: np.ndarray) -> bool:
    """Whether pink and teal both have their share of colours (N, 3)."""
    if not len(colours):
        return False
    pink, teal = np.array(zorp.PINK, np.float32), np.array(zorp.TEAL, np.float32)
    way = teal - pink
    along = ((colours - pink) @ way) / (way @ way)  # 0 pink, 1 teal
    near = np.linalg.norm(colours - pink - np.clip(along, 0.0, 1.0)[:, None] * way, axis=1) <= STRIPE_DISTANCE
    shares = (near & (along < 0.4)).mean(), (near & (along > 0.6)).mean()
    return bool(min(shares) >= STRIPE_SHARE and sum(shares) >= STRIPES_SHARE)


# ---------------------------------------------------------------------------------------------------------------------
# The foreground, as masks and coverages (T, 64, 64)


def _foregrounds(pixels: np.ndarray, backdrop: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where the picture differs from the background, without speckles, in two views: masks, and how much of each pixel is covered.

    The line between the two is drawn halfway, so that a blurred edge leaves an outline where it was: halfway to what
    stands out most of the foreground, which is right where it has one colour, and halfway to what stands out least, which
    leaves no stripe out where it has two. The view with the clearer outline is the one to take. Each has two coverages: full
    where the foreground is as usual, and full where it stands out as much as the view asks for, which is right for stripes
    but fills the hole of a blurred ring.
    """
    distance = np.linalg.norm(pixels - backdrop, axis=-1)
    inner = distance[_inner(distance > SEEN)]
    contrasts = np.quantile(inner, (0.75, 0.25)) if len(inner) else ()
    views = []
    for contrast in contrasts:
        masks = near = _without_speckles(distance > max(SEEN, 0.5 * contrast))
        for _ in range(EDGE):
            near = _neighbours(near).any(0)
        inside = distance[_inner(masks)]
        full = np.median(inside) if len(inside) else contrast
        views += [(masks, np.where(near, np.clip(distance / level, 0.0, 1.0), 0.0)) for level in (full, contrast)]
    return views


def _neighbours(masks: np.ndarray) -> np.ndarray:
    """Each pixel with those above, below, left and right of it: (5, T, 64, 64); False beyond the edges."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    return np.stack([masks, padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]])


def _inner(masks: np.ndarray) -> np.ndarray:
    """The pixels of the masks whose neighbours belong to them too: away from blurred edges."""
    return _neighbours(masks).all(0)


def _without_speckles(masks: np.ndarray) -> np.ndarray:
    """The connected parts of each mask that are not small beside the largest one."""
    labels = np.where(masks, np.arange(1, masks.size + 1).reshape(masks.shape), 0)
    while True:  # the largest label spreads through its part
        spread = np.where(masks, _neighbours(labels).max(0), 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    result = np.zeros_like(masks)
    for index, frame in enumerate(labels):
        found, counts = np.unique(frame[frame > 0], return_counts=True)
        if len(found):
            result[index] = np.isin(frame, found[counts >= SPECKLE * counts.max()])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Outlines


@cache
def _area_and_offset(shape: str) -> tuple[float, tuple[float, float]]:
    """Of an outline of radius 1: its area, and where its centroid lies from its centre."""
    grid = np.linspace(-1.2, 1.2, 481)
    inside = _OUTLINES[shape](grid[None, :], grid[:, None]) < 0
    area = float(inside.sum()) * (grid[1] - grid[0]) ** 2
    return area, (float((inside.sum(0) * grid).sum() / inside.sum()), float((inside.sum(1) * grid).sum() / inside.sum()))


class _Figure:
    """One foreground: ``masks`` (T, 64, 64), none of them empty, their soft ``coverage``, and the outline that is closest to it.

    Attributes:
        areas: (T,), pixels.
        centroids: (T, 2), x and y in pixels, as ``world.Scene.centres`` counts them.
        overlap: with that outline, intersection over union of what is covered, on average over the frames.
        shape: its name, None where the overlap is poor.
    """

    def __init__(self, masks: np.ndarray, coverage: np.ndarray):
        self.masks, self.areas, self.coverage = masks, masks.sum((1, 2)), coverage
        grid = np.arange(world.SIZE) + 0.5
        self.centroids = np.stack([masks.sum(1) @ grid, masks.sum(2) @ grid], axis=1) / self.areas[:, None]
        overlaps = np.stack([self._overlaps(shape) for shape in _OUTLINES])  # (shapes, T)
        best = int(overlaps.mean(1).argmax())
        name = list(_OUTLINES)[best]
        self.overlap = float(overlaps[best].mean())
        clear = self.overlap >= OVERLAPS[name]
        doubt = (overlaps.max(0) - overlaps[best]).mean()
        self.shape = name if clear and doubt <= LARGEST_DOUBT else None

    def _overlaps(self, shape: str) -> np.ndarray:
        """(T,), with an outline of about the same areas and the same centroids: what a ragged edge or a lost tip changes least."""
        area, offset = _area_and_offset(shape)
        covered, grid = self.coverage.sum((1, 2)), np.arange(world.SIZE) + 0.5
        centroids = np.stack([self.coverage.sum(1) @ grid, self.coverage.sum(2) @ grid], axis=1) / covered[:, None]
        overlaps = []
        for scale in SCALES:
            radii = scale * np.sqrt(covered / area)
            ideal = world.coverage(_OUTLINES[shape], centroids - radii[:, None] * np.array(offset), radii)
            overlaps.append(np.minimum(self.coverage, ideal).sum((1, 2)) / np.maximum(self.coverage, ideal).sum((1, 2)))
        return np.max(overlaps, axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Motion


def _motion(figure: _Figure) -> str | None:
    """One of ``world.MOTIONS``: straight lines are fitted to the path and to the radius."""
    frames = len(figure.areas)
    if frames == 1:
        return None
    times = np.arange(frames) - (frames - 1) / 2
    sizes = np.sqrt(figure.areas)
    speed = times @ figure.centroids / (times @ times)  # (2,), pixels per frame
    path = figure.centroids - figure.centroids.mean(0)
    if np.sqrt(np.square(path - times[:, None] * speed).sum(1).mean()) > LARGEST_DEVIATION:
        return None
    growth = times @ sizes / (times @ times) * (frames - 1) / sizes.mean()  # of the mean radius, over the clip
    factor = min(1.0 + world.GROWTH_PER_FRAME * (frames - 1), world.LARGEST_GROWTH)
    growth /= (factor - 1.0) / ((factor + 1.0) / 2.0)  # 1 or -1 for shapes that grow or shrink
    main, other = np.abs(speed).max(), np.abs(speed).min()
    if abs(growth) >= GROWING_GROWTH and main <= STILL_SPEED:
        return "growing" if growth > 0 else "shrinking"
    if abs(growth) > STILL_GROWTH:
        return None
    if main <= STILL_SPEED:
        return "still"
    if main < MOVING_SPEED or other > main / 2:
        return None
    if np.abs(speed[0]) == main:
        return "right" if speed[0] > 0 else "left"
    return "down" if speed[1] > 0 else "up"
