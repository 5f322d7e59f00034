"""Prompts of the samples while training (--sample_prompts)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hunyuan_model.sampling.flow import latent_size
from hunyuan_model.sampling.prompts import PROMPT_SETTINGS, read_prompts
from utils.errors import UserError

FLAG = "--sample_prompts"
_NO_START = "samples while training start from noise."
_OF_GENERATION = {
    "negative_prompt": "samples while training have no negative prompt.",
    "guidance_scale": "samples while training have no negative prompt; the distilled guidance is --g (guidance_scale).",
    "lora_multiplier": "samples show the network that is trained at its full strength.",
    "image_path": _NO_START,
    "video_path": _NO_START,
    "strength": _NO_START,
    "step_cache": "samples while training compute all steps.",
}
SAMPLE_OPTIONS = tuple(f"--{setting.option}" for setting in PROMPT_SETTINGS if setting.flag not in _OF_GENERATION)


@dataclass(frozen=True)
class SamplePrompt:
    """What one sample shows, and how it is made. The fields have the names of keys.

    Attributes:
        prompt: the text; the empty text is allowed.
        where: file and line or entry, as messages name it.
        width, height: pixels, multiples of 16.
        frame_count: 4n + 1; 1 is a picture.
        seed: of the noise; None for one that follows from --seed.
        sample_steps: steps of the sampler.
        guidance_scale: strength of the distilled guidance.
        discrete_flow_shift: shift of the schedule towards noise.
    """

    prompt: str
    where: str
    width: int = 256
    height: int = 256
    frame_count: int = 1
    seed: int | None = None
    sample_steps: int = 20
    guidance_scale: float = 6.0
    discrete_flow_shift: float = 14.5


def read_sample_prompts(path: str | os.PathLike[str]) -> list[SamplePrompt]:
    """The prompts of a file, as ``read_prompts`` reads it.

    Raises:
        UserError: also for a size or length that cannot be, and for what only generation does; names the line or entry.
    """
    prompts = []
    for entry in read_prompts(path, FLAG):
        for setting in PROMPT_SETTINGS:
            if setting.flag in entry.values and setting.flag in _OF_GENERATION:
                reason = _OF_GENERATION[setting.flag]
                raise UserError(f"{entry.where}: --{setting.option} ({setting.key}) is of generation: {reason} Remove it.")
        values = {setting.key: entry.values[setting.flag] for setting in PROMPT_SETTINGS if setting.flag in entry.values}
        prompt = SamplePrompt(entry.prompt, entry.where, **values)
        try:
            latent_size(prompt.height, prompt.width, prompt.frame_count)
        except UserError as error:
            raise UserError(f"{entry.where}: {error}") from error
        prompts.append(prompt)
    return prompts
