"""What a training wrote, and what to do with it in each program, with the keys that the program's loader takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from networks.formats.clients import CLIENTS, Match, Verdict, match
from networks.training.report.record import WrittenFile
from networks.training.settings import TrainingSettings
from utils.processes.command_line import command_line
from utils.safetensors_io import read_header

MUST_BE_SAID = ("ComfyUI", "diffusers")  # also where they load nothing
_FOLDER = 'Put it into models/loras of ComfyUI and choose it in the node "{}".'
USAGE = {
    "ComfyUI": _FOLDER.format("Load LoRA"),
    "ComfyUI-HunyuanVideoWrapper": _FOLDER.format("HunyuanVideo Lora Select"),
    "diffusers": "pipe.load_lora_weights({path!r})",
    "FramePack (musubi-tuner)": "Give it to fpack_generate_video.py as --lora_weight.",
    "FramePack Studio": "Put it into its folder loras.",
}


def written_files(models: Sequence[Path], settings: TrainingSettings) -> list[WrittenFile]:
    """The model that was saved last and its copies in other layouts; for each program the file of which it loads the most.

    Raises:
        UserError: a file cannot be read.
    """
    entries = [_entry(models[0], settings, "this project", command_line(_generation(models[0], settings)), "")]
    shapes = {path: read_header(path).shapes for path in models}
    for client in CLIENTS:
        found = {path: match(client, shapes[path]) for path in models}
        best = max(models, key=lambda path: (found[path].verdict is Verdict.ALL, found[path].keys))
        if found[best].verdict is Verdict.ALL or client.title in MUST_BE_SAID:
            usage = USAGE[client.title].format(path=best.as_posix())
            entries.append(_entry(best, settings, client.title, usage, _counts(found[best])))
    return entries


def _entry(path: Path, settings: TrainingSettings, readers: str, usage: str, checked: str) -> WrittenFile:
    return WrittenFile(os.path.relpath(path, settings.saving.folder).replace(os.sep, "/"), readers, usage, checked)


def _counts(found: Match) -> str:
    counts = f"{found.keys} of {found.of_keys} keys"
    return f"{counts}: {found.reason}" if found.reason else counts


def _generation(model: Path, settings: TrainingSettings) -> list[str]:
    """The words of a command that uses the model; three dots stand for files that the training did not need."""
    samples = settings.samples
    files = {"dit": settings.model.dit, "vae": samples.vae_settings.vae}
    files |= {name: getattr(samples.text_settings, name) for name in ("text_encoder1", "text_encoder2")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path or "..."))]
    return ["python", "hv_generate_video.py", *words, "--lora_weight", str(model), "--prompt", "..."]
