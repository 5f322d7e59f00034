"""What the toy model is asked to draw, and how well it did, as tables.

The prompts are about combinations of shape, colour and background that no training has seen. Beside the model's score
stand what guessing would reach, and what the reader makes of scenes drawn from the same words, before and after the VAE:
nothing can be expected to score higher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from examples.toy import world, zorp
from examples.toy.reading import Reading
from examples.toy.toy_model import FRAMES, ToyModel

PROMPTS, CAPTIONS, ZORPS, VAE = range(4)  # purposes of random numbers
ZORP_SEEDS = 1_000_000  # seeds of their noise begin here
VAE_PICTURES, VAE_CLIPS = 64, 24
ALL_WORDS, NO_ZORP = "all of them", "no zorp"


@dataclass(frozen=True)
class Prompt:
    """A sentence, the words it was made of, the seed of its noise, and a drawing of the same words."""

    text: str
    attributes: world.Attributes
    seed: int
    drawn: np.ndarray  # (T, 64, 64, 3) uint8


@dataclass(frozen=True)
class Generated:
    """Prompts with the model's clips of them, and readings of these clips, of the drawings, and of those after the VAE."""

    prompts: list[Prompt]
    clips: np.ndarray  # (N, T, 64, 64, 3) uint8
    seconds: float  # that the clips took
    read: list[Reading]
    read_of_drawings: list[Reading]
    read_through_vae: list[Reading]


@dataclass(frozen=True)
class Table:
    """Rows of cells below a heading, for people; ``scores`` holds the same for programs."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    scores: dict[str, dict[str, float]]

    def markdown(self) -> str:
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join([f"### {self.title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


# ---------------------------------------------------------------------------------------------------------------------
# What to ask for


def held_out_prompts(number: int, frames: int, first_seed: int) -> list[Prompt]:
    """Prompts about held-out combinations in random order; one comes again only when all have come."""
    combinations = world.all_attributes(held_out=True, motions=world.MOTIONS if frames > 1 else (None,))
    rng = world.generator(first_seed, PROMPTS)
    order = np.concatenate([rng.permutation(len(combinations)) for _ in range(math.ceil(number / len(combinations)))])
    prompts = []
    for index, chosen in enumerate(order[:number]):
        rng, attributes = world.generator(first_seed, CAPTIONS, index), combinations[chosen]
        drawn = world.draw(world.place(attributes, frames, rng))
        prompts.append(Prompt(world.caption(attributes, rng), attributes, first_seed + index, drawn))
    return prompts


def zorp_prompts(number: int, frames: int, first_seed: int) -> list[Prompt]:
    """Prompts about zorps on every background in turn; the shape and colour of their attributes mean nothing."""
    prompts = []
    for index in range(number):
        rng = world.generator(first_seed, ZORPS, index)
        background = list(world.COLOURS)[index % len(world.COLOURS)]
        motion = world.MOTIONS[rng.integers(len(world.MOTIONS))] if frames > 1 else None
        text, drawn = zorp.zorp_caption(background, motion, rng), zorp.draw_zorp(background, motion, frames, rng)
        attributes = world.Attributes(zorp.NAME, "", background, motion)
        prompts.append(Prompt(text, attributes, first_seed + ZORP_SEEDS * (frames + 1) + index, drawn))
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score_prompts(group: Generated) -> Table:
    """How often each word of the prompts was drawn."""
    chances = {"background": 1 / len(world.COLOURS), "colour": 1 / (len(world.COLOURS) - 1), "shape": 1 / len(world.SHAPES)}
    if group.prompts[0].attributes.motion:
        chances["motion"] = 1 / len(world.MOTIONS)
    chances[ALL_WORDS] = math.prod(chances.values())
    number = len(group.prompts)
    rows, scores = [], {}
    for name, chance in chances.items():
        shares = [
            sum(_is_right(reading, prompt, name) for reading, prompt in zip(readings, group.prompts)) / number
            for readings in (group.read, group.read_of_drawings, group.read_through_vae)
        ]
        rows.append((name, percent(shares[0]), str(number), percent(chance, 2), percent(shares[1]), percent(shares[2])))
        keys = ("right", "number", "chance", "right_of_drawn", "right_of_drawn_through_vae")
        scores[name] = dict(zip(keys, (shares[0], number, chance, *shares[1:])))
    columns = ("word", "right", "clips", "by chance", "reader on drawn scenes", "the same through the VAE")
    return Table("Prompts held out from training", columns, rows, scores)


def _is_right(reading: Reading, prompt: Prompt, name: str) -> bool:
    right = reading.right(prompt.attributes)
    return all(right.values()) if name == ALL_WORDS else right[name]


def score_zorps(groups: dict[str, Generated]) -> Table:
    """How many of each group are zorps, and of all that shall be."""
    rows, scores = [], {}
    asked_for = [group for name, group in groups.items() if name != NO_ZORP]
    for name, members in (*((name, [group]) for name, group in groups.items()), ("zorp, together", asked_for)):
        number = sum(len(group.prompts) for group in members)
        zorps = [
            sum(reading.zorp for group in members for reading in getattr(group, readings))
            for readings in ("read", "read_of_drawings", "read_through_vae")
        ]
        rows.append((name, percent(zorps[0] / number), str(number), percent(zorps[1] / number), percent(zorps[2] / number)))
        keys = ("zorps", "number", "zorps_of_drawn", "zorps_of_drawn_through_vae")
        scores[name] = dict(zip(keys, (zorps[0], number, zorps[1], zorps[2])))
    columns = ("asked for", "read as zorps", "clips", "reader on drawings", "the same through the VAE")
    return Table("Zorps", columns, rows, scores)


def score_vae(model: ToyModel, photographs: np.ndarray | None, first_seed: int) -> Table:
    """Peak signal-to-noise ratio of pictures encoded to the mean and decoded."""
    rng = world.generator(first_seed, VAE)
    groups = {
        "drawn pictures": world.draw_batch(rng, VAE_PICTURES, 1, held_out=True).clips,
        f"drawn clips of {FRAMES} frames": world.draw_batch(rng, VAE_CLIPS, FRAMES, held_out=True).clips,
    }
    if photographs is not None:
        groups["photographs"] = photographs
    rows, scores = [], {}
    for name, clips in groups.items():
        value = decibels(clips, model.through_vae(clips))
        rows.append((name, str(len(clips)), f"{value:.1f} dB"))
        scores[name] = {"number": len(clips), "psnr": value}
    return Table("VAE: what comes back", ("pictures", "number", "PSNR"), rows, scores)


def decibels(clips: np.ndarray, others: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 arrays, from the squared error averaged over everything."""
    error = np.square(clips.astype(np.float64) - others).mean()
    return 10 * math.log10(255**2 / max(error, 1e-9))


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def in_words(reading: Reading) -> str:
    """``"red circle on blue, left"``, with ``?`` for what was not read."""
    what = zorp.NAME if reading.zorp else f"{reading.colour or '?'} {reading.shape or '?'}"
    return f"{what} on {reading.background or '?'}" + (f", {reading.motion}" if reading.motion else "")
