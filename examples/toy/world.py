"""The toy model's world: one shape in one colour on a coloured background, still or moving, and what is said about it.

A scene is decided by four words (shape, colour, background, motion); everything else about it (where, how large, how
fast, which wording) is drawn at random. The same seed draws the same scenes, without end and without files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch

SIZE = 64
"""Width and height of every picture, in pixels."""

FRAME_COUNTS = (1, 5, 9, 13, 17)

COLOURS = {
    "red": (214, 40, 44),
    "green": (46, 160, 67),
    "blue": (44, 84, 214),
    "yellow": (240, 208, 48),
    "purple": (138, 52, 176),
    "orange": (240, 134, 32),
    "white": (244, 244, 244),
    "black": (24, 24, 26),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
MOTIONS = ("still", "left", "right", "up", "down", "growing", "shrinking")

COLOUR_JITTER = 8  # a palette colour varies by up to this much per channel, in 8-bit steps
RADII = (10.0, 16.0)  # pixels
SPEEDS = (1.5, 2.2)  # pixels per frame
GROWTH_PER_FRAME, LARGEST_GROWTH = 0.09, 2.0
EDGE = 2.0  # pixels over which an outline fades: as soft as a felt pen's
WANDER = 0.3  # of the room there is, how far from the middle of the picture a scene may lie
HELD_OUT_SHARE = 0.13

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Signed distance to an outline, negative inside, of points (x, y) in radii from the centre, y downwards."""


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(y - 0.75, 0.879 * np.abs(x) - 0.477 * (y + 1.0))


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.33, y - 1.0), np.maximum(x - 1.0, y - 0.33))


OUTLINES: dict[str, Distance] = {
    "circle": lambda x, y: np.hypot(x, y) - 1.0,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.85,
    "triangle": _triangle,
    "cross": _cross,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.26,
}


@dataclass(frozen=True)
class Attributes:
    """What a caption says; ``motion`` is None for a single picture, of which nothing can be said."""

    shape: str
    colour: str
    background: str
    motion: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether this shape in this colour on this background is kept for evaluation and never trained on."""
        digest = hashlib.sha256(f"{self.shape} {self.colour} {self.background}".encode()).digest()
        return digest[0] < 256 * HELD_OUT_SHARE


@dataclass(frozen=True)
class Scene:
    """A clip to be drawn: its words, and where everything is in each frame."""

    attributes: Attributes
    centres: np.ndarray  # (frames, 2), x and y in pixels
    radii: np.ndarray  # (frames,), pixels
    colour: np.ndarray  # (3,), 0..255
    background: np.ndarray  # (3,), 0..255

    @property
    def frames(self) -> int:
        return len(self.radii)


def all_attributes(held_out: bool, motions: tuple[str | None, ...] = MOTIONS) -> list[Attributes]:
    """Every combination of words on one side of the split, in a fixed order."""
    combinations = (Attributes(*words) for words in product(SHAPES, COLOURS, COLOURS, motions))
    return [one for one in combinations if one.colour != one.background and one.held_out == held_out]


def random_attributes(rng: np.random.Generator, moving: bool, held_out: bool = False) -> Attributes:
    """Words of a scene, each as likely as the others of its kind; ``moving`` asks for one of ``MOTIONS``."""
    colours = list(COLOURS)
    while True:
        shape = SHAPES[rng.integers(len(SHAPES))]
        colour, background = (colours[index] for index in rng.choice(len(colours), 2, replace=False))
        motion = MOTIONS[rng.integers(len(MOTIONS))] if moving else None
        attributes = Attributes(shape, colour, background, motion)
        if attributes.held_out == held_out:
            return attributes


def place(attributes: Attributes, frames: int, rng: np.random.Generator, wander: float = WANDER) -> Scene:
    """A scene of ``frames`` frames that shows ``attributes`` and stays inside the picture; with ``wander`` 1, anywhere in it."""
    motion = attributes.motion or "still"
    radii = np.full(frames, rng.uniform(*RADII))
    travel = np.zeros(2)
    if motion in ("growing", "shrinking"):
        largest = rng.uniform(14.0, 18.0)
        radii = np.linspace(largest / min(1.0 + GROWTH_PER_FRAME * (frames - 1), LARGEST_GROWTH), largest, frames)
        radii = radii if motion == "growing" else radii[::-1].copy()
    elif motion != "still":
        direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
        radii = np.full(frames, rng.uniform(RADII[0], 13.0 if frames > 9 else 14.0))
        travel = np.array(direction) * min(rng.uniform(*SPEEDS) * (frames - 1), SIZE - 4 - 2 * radii[0])
    path = np.linspace(-0.5, 0.5, frames)[:, None] * travel if frames > 1 else np.zeros((1, 2))
    margin = radii.max() + 1.0 + np.abs(travel) / 2
    middle = rng.uniform(margin, np.maximum(SIZE - margin, margin + 1e-3))
    middle = SIZE / 2 + wander * (middle - SIZE / 2)
    return Scene(
        attributes,
        centres=middle + path,
        radii=radii,
        colour=_jittered(COLOURS[attributes.colour], rng),
        background=_jittered(COLOURS[attributes.background], rng),
    )


def _jittered(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(colour) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3), 0, 255).astype(np.float32)


def coverage(outline: Distance, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How much of each pixel lies inside the outline, 0..1: (frames, SIZE, SIZE) float32, fading over ``EDGE`` pixels."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    radius = radii.astype(np.float32)[:, None, None]
    x = (grid[None, None, :] - centres[:, 0, None, None].astype(np.float32)) / radius
    y = (grid[None, :, None] - centres[:, 1, None, None].astype(np.float32)) / radius
    return np.clip(0.5 - outline(x, y) * radius / EDGE, 0.0, 1.0)


def draw(scene: Scene) -> np.ndarray:
    """The scene's frames: (frames, SIZE, SIZE, 3) uint8."""
    inside = coverage(OUTLINES[scene.attributes.shape], scene.centres, scene.radii)[..., None]
    return np.rint(scene.background + (scene.colour - scene.background) * inside).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Words

_MOTION_WORDS: dict[str, tuple[str, ...]] = {
    "still": ("standing still", "not moving", "that does not move"),
    "left": ("moving left", "moving to the left", "sliding left"),
    "right": ("moving right", "moving to the right", "sliding right"),
    "up": ("moving up", "rising", "sliding up"),
    "down": ("moving down", "falling", "sliding down"),
    "growing": ("growing", "getting bigger", "becoming larger"),
    "shrinking": ("shrinking", "getting smaller", "becoming smaller"),
}
_WORDINGS = (
    "a {colour} {shape} on a {background} background{, motion}",
    "a {colour} {shape}{ motion} on a {background} background",
    "{background} background, a {colour} {shape}{ motion}",
    "on a {background} background there is a {colour} {shape}{ motion}",
    "{colour} {shape} in front of {background}{, motion}",
    "a {shape}{ motion}, the {shape} is {colour}, the background is {background}",  # the last: it must say the colour
)
_OPENINGS = ("", "", "", "a drawing of ", "a picture of ", "we see ")


def caption(attributes: Attributes, rng: np.random.Generator, name: str | None = None, say_colour: bool = True) -> str:
    """A sentence that says ``attributes``, in one of several wordings.

    ``name`` stands in the place of the shape's, and the shape's colour can be left unsaid: then the picture has one all
    the same, and it is anybody's guess.
    """
    wording = _WORDINGS[rng.integers(len(_WORDINGS) if say_colour else len(_WORDINGS) - 1)]
    words = _MOTION_WORDS[attributes.motion] if attributes.motion else ("",)
    motion = words[rng.integers(len(words))]
    text = wording.replace("{ motion}", f" {motion}" if motion else "")
    text = text.replace("{, motion}", f", {motion}" if motion else "")
    if not say_colour:
        text = text.replace("{colour} ", "")
    text = text.format(colour=attributes.colour, shape=name or attributes.shape, background=attributes.background)
    text = text.replace("a orange", "an orange")
    return (_OPENINGS[rng.integers(len(_OPENINGS))] if text.startswith(("a ", "an ")) else "") + text


def invented_word(rng: np.random.Generator) -> str:
    """A word of three to six letters that means nothing in the world."""
    while True:
        letters = [("bcdfghjklmnprstvwz", "aeiou")[index % 2] for index in range(rng.integers(3, 7))]
        word = "".join(choice[rng.integers(len(choice))] for choice in letters)
        if word not in vocabulary():
            return word


def vocabulary_sentences() -> list[str]:
    """Sentences that hold every word a caption can have, for making tokenizers."""
    rng = np.random.default_rng(0)
    return [caption(attributes, rng) for attributes in all_attributes(False) + all_attributes(False, (None,))]


@lru_cache
def vocabulary() -> frozenset[str]:
    """Every word a caption can have."""
    return frozenset(word.strip(",") for sentence in vocabulary_sentences() for word in sentence.split())


# ---------------------------------------------------------------------------------------------------------------------
# Endless data


@dataclass(frozen=True)
class Batch:
    """``clips`` (B, frames, SIZE, SIZE, 3) uint8 with their words."""

    clips: np.ndarray
    captions: list[str]
    attributes: list[Attributes]


def generator(*seed: int) -> np.random.Generator:
    """A random generator of its own for each tuple of numbers, so that any batch can be drawn again alone."""
    return np.random.default_rng([len(seed), *seed])  # numpy pads with zeros: (3, 9) and (3, 9, 0) would be one


def draw_batch(rng: np.random.Generator, count: int, frames: int, held_out: bool = False, wander: float = WANDER) -> Batch:
    """``count`` captioned clips of ``frames`` frames."""
    attributes = [random_attributes(rng, moving=frames > 1, held_out=held_out) for _ in range(count)]
    clips = np.stack([draw(place(one, frames, rng, wander)) for one in attributes])
    return Batch(clips, [caption(one, rng) for one in attributes], attributes)


def to_pixels(clips: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(clips).to(device).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def scribbles(rng: np.random.Generator, count: int, frames: int) -> np.ndarray:
    """Drawings outside the world, for the VAE, which should show more than it was made for: (count, frames, SIZE, SIZE, 3).

    Two to four outlines in any colour, some of them striped, each on its own straight path, over a colour or a gradient.
    """
    return np.stack([_scribble(rng, frames) for _ in range(count)])


def _scribble(rng: np.random.Generator, frames: int) -> np.ndarray:
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    second = first if rng.random() < 0.5 else second
    along = (grid[:, None] if rng.random() < 0.5 else grid[None, :])[..., None] * np.ones((SIZE, SIZE, 1), np.float32)
    picture = np.broadcast_to(first + (second - first) * along, (frames, SIZE, SIZE, 3)).copy()
    for _ in range(rng.integers(1, 5)):
        outline = OUTLINES[SHAPES[rng.integers(len(SHAPES))]] if rng.random() < 0.4 else _star(rng)
        path = np.linspace(-0.5, 0.5, frames)[:, None] if frames > 1 else np.zeros((1, 1))
        centres = rng.uniform(8, SIZE - 8, 2) + path * rng.uniform(-2.2, 2.2, 2) * (frames - 1)
        radii = rng.uniform(5, 24) * (1 + path[:, 0] * rng.uniform(-0.4, 0.4))
        inside = coverage(outline, centres, radii)[..., None]
        colour, stripe = rng.uniform(0, 255, (2, 3)).astype(np.float32)
        stripes = stripe_pattern(centres, rng.uniform(0, np.pi), rng.uniform(5, 12)) if rng.random() < 0.4 else 0.0
        picture += (colour + (stripe - colour) * stripes - picture) * inside
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def _star(rng: np.random.Generator) -> Distance:
    points, depth, turn = rng.integers(3, 8), rng.uniform(0.0, 0.6), rng.uniform(0, 2 * np.pi)
    return lambda x, y: star_distance(x, y, points, depth, turn)


def star_distance(x: np.ndarray, y: np.ndarray, points: int, depth: float, turn: float = 0.0) -> np.ndarray:
    """A star with ``points`` points, its inner corners at radius 1 - ``depth``; the first point up. Not exact, but smooth."""
    angle = np.arctan2(x, -y) + turn
    wedge = np.abs((angle * points / (2 * np.pi) + 0.5) % 1.0 - 0.5) * (2 * np.pi / points)  # 0 at a point
    along, across = np.hypot(x, y) * np.cos(wedge), np.hypot(x, y) * np.sin(wedge)
    inner_along, inner_across = (1 - depth) * np.cos(np.pi / points), (1 - depth) * np.sin(np.pi / points)
    normal = np.array([inner_across, 1.0 - inner_along])
    normal /= np.hypot(*normal)
    return (along - 1.0) * normal[0] + across * normal[1]


def stripe_pattern(centres: np.ndarray, angle: float, width: float) -> np.ndarray:
    """Stripes ``width`` pixels wide that move with ``centres``: (frames, SIZE, SIZE, 1), 0 or 1 with smooth edges."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    x = grid[None, None, :] - centres[:, 0, None, None].astype(np.float32)
    y = grid[None, :, None] - centres[:, 1, None, None].astype(np.float32)
    phase = (x * np.cos(angle) + y * np.sin(angle)) / width
    edge = np.abs((phase + 0.25) % 2.0 - 1.0) - 0.5  # in widths, 0 where the colour changes
    return np.clip(0.5 + edge * width, 0.0, 1.0)[..., None].astype(np.float32)
