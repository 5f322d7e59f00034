"""The judge of the toy model: right on what was drawn, also where it is blurred and noisy, and not to be satisfied by less."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from variations import slow_but

from examples.toy import world, zorp
from examples.toy.reading import STAR, read

RED, BLUE, WHITE = (np.array(world.COLOURS[name], np.float32) for name in ("red", "blue", "white"))


def blurred(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred by a pixel, with noise: worse than what a VAE does."""
    soft = np.stack([np.array(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(1))) for frame in clip])
    return np.clip(np.rint(soft + rng.normal(0, 8, soft.shape)), 0, 255).astype(np.uint8)


def painted(inside: np.ndarray, colour: np.ndarray = RED, background: np.ndarray = WHITE) -> np.ndarray:
    """(T, 64, 64) in 0..1 and two colours -> a clip (T, 64, 64, 3) uint8."""
    return np.rint(background + (colour - background) * inside[..., None]).astype(np.uint8)


def shapes(outline: world.Distance, x: list[float], y: list[float] | None = None, radius: float | list[float] = 12.0) -> np.ndarray:
    """The outline's coverage (T, 64, 64) along a path."""
    centres = np.stack([np.array(x, float), np.array(y or [32.0] * len(x), float)], axis=1)
    return world.coverage(outline, centres, np.broadcast_to(radius, len(x)).astype(float))


@pytest.mark.parametrize("frames", slow_but([1, 5, 9], 1, 5))
@pytest.mark.parametrize("how", ["drawn", "blurred"])
def test_drawn_scenes_are_read_right(frames: int, how: str) -> None:
    rng = world.generator(1, frames)
    for index in range(12):
        attributes = world.random_attributes(rng, moving=frames > 1, held_out=index % 2 == 0)
        clip = world.draw(world.place(attributes, frames, rng))
        reading = read(clip if how == "drawn" else blurred(clip, rng))
        assert (reading.shape, reading.colour, reading.background, reading.motion, reading.zorp) == (
            attributes.shape,
            attributes.colour,
            attributes.background,
            attributes.motion,
            False,
        )
        assert all(reading.right(attributes).values())


@pytest.mark.parametrize("background", slow_but(world.COLOURS, "red", "white"))
def test_zorps_are_zorps_also_where_their_stripes_blur(background: str) -> None:
    rng = world.generator(2)
    for frames, motion in ((1, None), (1, None), (5, "growing"), (9, "shrinking"), (9, "left")):
        clip = zorp.draw_zorp(background, motion, frames, rng)
        for seen in (clip, blurred(clip, rng)):
            reading = read(seen)
            assert reading.zorp and reading.shape == STAR
            assert (reading.background, reading.motion, reading.colour) == (background, motion, None)


def test_a_star_is_a_zorp_only_with_both_colours_and_a_zorp_only_a_star() -> None:
    centre = np.array([[32.0, 32.0]])
    stripes = world.stripe_pattern(centre, zorp.STRIPE_ANGLE, zorp.STRIPE_WIDTH)
    pink, teal = np.array(zorp.PINK, np.float32), np.array(zorp.TEAL, np.float32)

    def striped(outline: world.Distance, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return painted(shapes(outline, [32.0], radius=15.0), (first + (second - first) * stripes), WHITE)

    assert read(striped(zorp.outline, pink, teal)).zorp
    assert not read(striped(zorp.outline, pink, pink)).zorp
    assert not read(striped(zorp.outline, teal, teal)).zorp
    assert not read(striped(zorp.outline, RED, BLUE)).zorp
    assert not read(striped(world.OUTLINES["circle"], pink, teal)).zorp
    assert read(striped(zorp.outline, RED, RED)).shape == STAR


def test_nothing_and_noise_show_nothing() -> None:
    empty = read(painted(np.zeros((9, 64, 64))))
    assert (empty.shape, empty.colour, empty.background, empty.motion) == (None, None, "white", None)
    noise = read(world.generator(3).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8))
    assert (noise.shape, noise.colour, noise.background, noise.motion) == (None, None, None, None)


def test_half_shapes_two_shapes_and_other_shapes_are_none_of_the_shapes() -> None:
    circle = world.OUTLINES["circle"]
    whole = shapes(circle, [32.0])
    half = whole * (np.arange(64) < 32)
    two = np.maximum(shapes(circle, [18.0]), shapes(circle, [46.0]))
    ellipse = shapes(lambda x, y: np.hypot(x / 1.5, y) - 1.0, [32.0], radius=10.0)
    upside_down = shapes(lambda x, y: world.OUTLINES["triangle"](x, -y), [32.0])
    picture_half = np.broadcast_to((np.arange(64) < 32).astype(float), (1, 64, 64))
    assert read(painted(whole)).shape == "circle"
    for other in (half, two, ellipse, upside_down, picture_half):
        assert read(painted(other)).shape is None


def test_colours_between_and_beside_those_of_the_world_have_no_name() -> None:
    circle = shapes(world.OUTLINES["circle"], [32.0])
    for colour in ((128, 128, 128), zorp.PINK, zorp.TEAL):
        assert read(painted(circle, np.array(colour, np.float32))).colour is None
        assert read(painted(circle, RED, np.array(colour, np.float32))).background is None
    halves = painted(circle)
    halves[:, :, :32] = painted(circle, BLUE)[:, :, :32]
    assert read(halves).colour is None


def test_only_straight_motion_in_one_direction_has_a_name() -> None:
    steps = np.arange(9.0)
    circle = world.OUTLINES["circle"]

    def motion(x: np.ndarray, y: np.ndarray | float = 32.0, radius: np.ndarray | float = 12.0) -> str | None:
        y, radius = np.broadcast_to(y, 9), np.broadcast_to(radius, 9)
        return read(painted(shapes(circle, list(x), list(y), list(radius)))).motion

    assert motion(24 + 2 * steps) == "right"
    assert motion(40 - 2 * steps) == "left"
    assert motion(steps * 0 + 32, 24 + 2 * steps) == "down"
    assert motion(steps * 0 + 32, 40 - 2 * steps) == "up"
    assert motion(steps * 0 + 32, radius=8 + steps) == "growing"
    assert motion(steps * 0 + 32, radius=16 - steps) == "shrinking"
    assert motion(32 + 0.2 * steps) == "still"
    assert motion(24 + 2 * steps, 24 + 2 * steps) is None  # two directions
    assert motion(24 + 3 * (4 - np.abs(steps - 4))) is None  # there and back
    assert motion(np.where(steps < 5, 22.0, 42.0)) is None  # a jump
    assert motion(24 + 2 * steps, radius=8 + steps) is None  # both at once
    assert motion(32 + 0.62 * steps) is None  # neither still nor really moving


def test_zorps_and_their_captions_are_the_same_for_the_same_seed_and_say_no_colour() -> None:
    clips = [zorp.draw_zorp("green", "up", 5, world.generator(5)) for _ in range(2)]
    assert clips[0].shape == (5, 64, 64, 3) and clips[0].dtype == np.uint8
    assert np.array_equal(*clips)
    for index in range(50):
        text = zorp.zorp_caption("green", "left", world.generator(6, index))
        assert text.count("zorp") == 1 and text.count("green") == 1
        assert not any(colour in text for colour in world.COLOURS if colour != "green")
