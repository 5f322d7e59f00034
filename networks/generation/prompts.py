"""Requests from prompt files, and what does not belong into --prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hunyuan_model.sampling.prompts import PROMPT_FILE_ENDINGS, PromptEntry, options_within, read_prompts, shortened
from networks.generation.requests import Request
from networks.merging import complete_multipliers
from utils.cli.arguments import MAX_SEED, random_seed
from utils.errors import UserError

FLAG = "--from_file"


def check_prompt(text: str) -> None:
    """Refuse a --prompt that is meant as something else.

    Raises:
        UserError: it is the name of a prompt file, or holds options of prompt lines; says what to use.
    """
    if text.lower().endswith(PROMPT_FILE_ENDINGS) and os.path.isfile(text):
        raise UserError(f"--prompt {text} is a file. Give it to {FLAG}, which reads a prompt from each of its lines.")
    if options := options_within(text):
        written = ", ".join(f"--{option.option}" for option in options)
        flags = ["video_size" if option.flag in ("width", "height") else option.flag for option in options]
        raise UserError(
            f"--prompt {shortened(text)} holds {written}, which would be read as words. "
            f"On the command line use {', '.join(f'--{flag}' for flag in dict.fromkeys(flags))} behind the prompt, "
            f"or write the line into a file for {FLAG}."
        )


def requests_of_file(path: str | os.PathLike[str], base: Request, files: Sequence[str], seed: int | None) -> list[Request]:
    """One request for each prompt of a file, in its order, named after the file and the place in it, from 1.

    Args:
        base: what the prompts leave out.
        files: of LoRA.
        seed: of the first prompt, if it has none of its own; each that follows has one more. None for random seeds.

    Raises:
        UserError: as of ``read_prompts``; a result that cannot be sampled. Names the line.
    """
    requests = []
    for place, entry in enumerate(read_prompts(path, FLAG)):
        own_seed = random_seed() if seed is None else (seed + place) % (MAX_SEED + 1)
        own = {"name": f"{Path(path).stem}_{place + 1:04d}", "seed": own_seed, "seed_given": seed is not None}
        named = base.changed({**own, "prompt": entry.prompt})
        requests.append(changed_by(entry, named, files))
    return requests


def changed_by(entry: PromptEntry, base: Request, files: Sequence[str]) -> Request:
    """``base`` with what the prompt line says of settings; ``files`` of LoRA.

    Raises:
        UserError: a result that cannot be sampled, or more multipliers than files.
    """
    values = dict(entry.values)
    if "lora_multiplier" in values:
        given = values["lora_multiplier"]
        values["lora_multiplier"] = complete_multipliers(files, given, "--lora_weight", f"{entry.where}: --am")
    return base.changed(values, entry.where)
