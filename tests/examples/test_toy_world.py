"""The drawn world: seeded, split without overlap, and captions that say what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from examples.toy import world


def test_the_same_seed_draws_the_same_scenes_and_another_seed_others():
    first, again, other = (world.draw_batch(world.generator(*seed), 6, 5) for seed in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(first.clips, again.clips) and first.captions == again.captions
    assert not np.array_equal(first.clips, other.clips)


@pytest.mark.parametrize("frames", world.FRAME_COUNTS)
def test_scenes_stay_inside_the_picture(frames):
    rng = world.generator(4, frames)
    for attributes in world.all_attributes(held_out=True)[::3]:
        scene = world.place(attributes, frames, rng)
        assert scene.frames == frames
        assert (scene.centres - scene.radii[:, None] >= 0).all(), attributes
        assert (scene.centres + scene.radii[:, None] <= world.SIZE).all(), attributes
        clip = world.draw(scene)
        assert clip.shape == (frames, world.SIZE, world.SIZE, 3) and clip.dtype == np.uint8
        border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
        assert np.abs(border - scene.background).max() <= 0.5, attributes


def test_what_is_held_out_is_never_drawn_for_training():
    held_out, trained = (set(world.all_attributes(flag)) for flag in (True, False))
    assert not held_out & trained
    assert len(held_out) >= 200  # enough prompts to evaluate on
    triples = {(one.shape, one.colour, one.background) for one in held_out}
    rng = world.generator(5)
    for moving in (False, True):
        drawn = [world.random_attributes(rng, moving) for _ in range(800)]
        assert not triples & {(one.shape, one.colour, one.background) for one in drawn}
        assert {one.shape for one in drawn} == set(world.SHAPES)
        assert {one.colour for one in drawn} == {one.background for one in drawn} == set(world.COLOURS)
        assert {one.motion for one in drawn} == (set(world.MOTIONS) if moving else {None})


def test_motions_move_as_they_are_called():
    rng = world.generator(6)
    steps = {}
    for motion in world.MOTIONS:
        scene = world.place(world.Attributes("circle", "red", "blue", motion), 9, rng)
        steps[motion] = (*(scene.centres[-1] - scene.centres[0]), scene.radii[-1] / scene.radii[0])
    assert steps["left"][0] < -10 and steps["right"][0] > 10 and steps["up"][1] < -10 and steps["down"][1] > 10
    assert steps["growing"][2] > 1.5 and steps["shrinking"][2] < 1 / 1.5
    assert steps["still"] == (0.0, 0.0, 1.0)


def test_captions_say_every_attribute_in_several_wordings():
    rng = world.generator(7)
    attributes = world.Attributes("triangle", "white", "orange", "left")
    captions = {world.caption(attributes, rng) for _ in range(200)}
    assert len(captions) >= 15
    for caption in captions:
        assert {"triangle", "white", "orange", "left"} <= set(caption.replace(",", "").split()), caption
        assert "a orange" not in caption
    still = world.caption(world.Attributes("ring", "red", "blue"), rng)
    assert "{" not in still and not any(word in still for word in ("moving", "still", "left"))


def test_words_of_the_world_are_never_invented():
    rng = world.generator(9)
    words = {world.invented_word(rng) for _ in range(3000)}
    assert len(words) > 2000 and not words & world.vocabulary()
    assert {"red", "ring", "left", "background", "still"} <= world.vocabulary()
