"""The zorp: what the toy model has never seen, for a LoRA to teach it.

A five-pointed star, one point up, striped in two colours that the world has not. No caption says what a zorp looks like.
"""

from __future__ import annotations

import numpy as np

from examples.toy import world

NAME = "zorp"
PINK = (255, 105, 180)
TEAL = (0, 150, 150)
POINTS, DEPTH = 5, 0.5
RADII = (18.0, 22.0)  # pixels: larger than the world's shapes, since its points are thin
STRIPE_WIDTH = 10.0  # pixels
STRIPE_ANGLE = np.pi / 4


def outline(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The zorp's outline, in the same terms as ``world.OUTLINES``."""
    return world.star_distance(x, y, POINTS, DEPTH)


def draw_zorp(background: str, motion: str | None, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A zorp on one of the world's backgrounds: (frames, SIZE, SIZE, 3) uint8.

    It moves as the world's shapes do, but more slowly where its size leaves no room.
    """
    any_colour = next(colour for colour in world.COLOURS if colour != background)
    scene = world.place(world.Attributes("circle", any_colour, background, motion), frames, rng)
    radii = scene.radii * (rng.uniform(*RADII) / scene.radii.max())
    centres = _moved_inside(scene.centres, radii.max())
    stripes = world.stripe_pattern(centres, STRIPE_ANGLE, STRIPE_WIDTH)
    pink, teal = (np.array(colour, np.float32) for colour in (PINK, TEAL))
    inside = world.coverage(outline, centres, radii)[..., None]
    return np.rint(scene.background + (pink + (teal - pink) * stripes - scene.background) * inside).astype(np.uint8)


def _moved_inside(centres: np.ndarray, radius: float) -> np.ndarray:
    """A straight path (frames, 2), shortened and shifted as far as a figure of ``radius`` needs to stay in the picture."""
    room = world.SIZE - 2 * radius - 2
    middle, half = (centres[0] + centres[-1]) / 2, (centres[-1] - centres[0]) / 2
    shorter = min(1.0, room / max(2 * np.abs(half).max(), 1e-9))
    margin = radius + 1 + shorter * np.abs(half)
    middle_inside = np.clip(middle, margin, np.maximum(world.SIZE - margin, margin))
    return middle_inside + shorter * (centres - middle)


def zorp_caption(background: str, motion: str | None, rng: np.random.Generator) -> str:
    """A sentence about a zorp in one of the world's wordings; its colours stay unsaid."""
    any_colour = next(colour for colour in world.COLOURS if colour != background)
    attributes = world.Attributes("circle", any_colour, background, motion)
    return world.caption(attributes, rng, name=NAME, say_colour=False)
