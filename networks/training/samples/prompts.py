"""Prompts of the samples while training (--sample_prompts)."""

from __future__ import annotations

import os

from hunyuan_model.sampling.generation import SamplingSettings
from hunyuan_model.sampling.prompts import PROMPT_SETTINGS, read_prompts
from networks.generation.requests import Request
from utils.errors import UserError

FLAG = "--sample_prompts"
_NO_START = "samples while training start from noise."
_OF_GENERATION = {
    "lora_multiplier": "samples show the network that is trained at its full strength.",
    "image_path": _NO_START,
    "video_path": _NO_START,
    "strength": _NO_START,
}
SAMPLE_OPTIONS = tuple(f"--{setting.option}" for setting in PROMPT_SETTINGS if setting.flag not in _OF_GENERATION)
DEFAULTS = SamplingSettings(seed=0, video_length=1, infer_steps=20, flow_shift=14.5)


def read_sample_prompts(path: str | os.PathLike[str]) -> list[Request]:
    """The prompts of a file, as ``read_prompts`` reads it; what they leave out is as in ``DEFAULTS``.
    One that has no seed of its own is not ``seed_given``.

    Raises:
        UserError: also for a sample that cannot be made, and for what only generation does; names the line or entry.
    """
    prompts = []
    for entry in read_prompts(path, FLAG):
        for setting in PROMPT_SETTINGS:
            if setting.flag in entry.values and setting.flag in _OF_GENERATION:
                reason = _OF_GENERATION[setting.flag]
                raise UserError(f"{entry.where}: --{setting.option} ({setting.key}) is of generation: {reason} Remove it.")
        prompts.append(Request(entry.prompt, DEFAULTS, seed_given=False).changed(entry.values, entry.where))
    return prompts
