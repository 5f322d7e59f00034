"""What a training wrote, and what to do with it in each program, with the keys that the program's loader takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from networks.formats.clients import Verdict
from networks.formats.description import THIS_PROJECT, Program, describe
from networks.training.report.record import WrittenFile
from networks.training.settings import TrainingSettings
from utils.processes.command_line import command_line

MUST_BE_SAID = (THIS_PROJECT, "ComfyUI", "diffusers")  # also where they load nothing
USAGE = {
    "ComfyUI": 'Put it into models/loras of ComfyUI and choose it in the node "Load LoRA".',
    "ComfyUI-HunyuanVideoWrapper": 'Put it into models/loras of ComfyUI and choose it in the node "HunyuanVideo Lora Select".',
    "diffusers": "pipe.load_lora_weights({path!r})",
    "FramePack (musubi-tuner)": "Give it to fpack_generate_video.py as --lora_weight.",
    "FramePack Studio": "Put it into its folder loras.",
}


def written_files(models: Sequence[Path], settings: TrainingSettings) -> list[WrittenFile]:
    """The model that was saved last and its copies in other layouts; for each program the file of which it loads the most.

    Raises:
        UserError: a file cannot be read.
    """
    programs = {path: {program.name: program for program in describe(path).programs} for path in models}
    entries = []
    for name in (THIS_PROJECT, *USAGE):
        best = max(models, key=lambda path: _usefulness(programs[path][name]))
        program = programs[best][name]
        if program.verdict == Verdict.ALL:
            entries.append(_entry(best, settings, program, _usage(name, best, settings)))
        elif name in MUST_BE_SAID:
            entries.append(_entry(best, settings, program, program.command or ""))
    return entries


def _usefulness(program: Program) -> tuple[bool, bool, int]:
    """How well a program loads a file, to compare."""
    return program.verdict == Verdict.ALL, program.command is not None, program.keys


def _entry(path: Path, settings: TrainingSettings, program: Program, usage: str) -> WrittenFile:
    checked = f"{program.keys} of {program.of_keys} keys"
    if program.reason:
        checked += f": {program.reason}"
    if program.command:
        checked += ". This converts it to a file of which all is loaded:"
    return WrittenFile(os.path.relpath(path, settings.saving.folder).replace(os.sep, "/"), program.name, usage, checked)


def _usage(name: str, model: Path, settings: TrainingSettings) -> str:
    """What to do with a model; in a command, three dots stand for files that the training did not need."""
    if name != THIS_PROJECT:
        return USAGE[name].format(path=model.as_posix())
    samples = settings.samples
    files = {"dit": settings.model.dit, "vae": samples.vae_settings.vae}
    files |= {name: getattr(samples.text_settings, name) for name in ("text_encoder1", "text_encoder2")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path or "..."))]
    return command_line(["python", "hv_generate_video.py", *words, "--lora_weight", str(model), "--prompt", "..."])
