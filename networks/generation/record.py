"""What made a result, in its metadata: for people by key, and for programs as JSON under ``settings``.

The JSON holds ``flags``, with which the result is made again; ``lora`` and ``start``, files with their SHA-256; and ``versions``.
--show prints it, and --repeat takes the flags from it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from networks.formats.reading import lora_path
from networks.generation.requests import SAMPLING_FIELDS, START_FIELDS, Request
from utils.checksums import file_sha256
from utils.devices import device_name
from utils.errors import UserError
from utils.media.metadata import PICTURE, SETTINGS, read_media_metadata
from utils.processes.command_line import command_line
from utils.toml_files import read_toml

logger = logging.getLogger(__name__)

LORA_FLAGS = ("lora_weight", "lora_multiplier", "lora_mode")
# Flags of a run that are none of its results', and those that ask for several; what a result takes of these is in its request.
RUN_FLAGS = frozenset(("config_file", "show", "repeat", "skip_existing", "interactive")) | {
    *("save_path", "sheet", "text_cache", "preview_every", "no_metadata", "save_merged_model")
}
BATCH_FLAGS = ("from_file", "xy")
# Flags that change a result by rounding at most: one of an earlier run counts as the same. Of LoRA files there is a list.
WITHOUT_EFFECT = frozenset(("output_type", "device", "decode_on_cpu", "split_uncond", "split_attn", "vae_chunk_size")) | {
    *LORA_FLAGS,
    *("blocks_to_swap", "img_in_txt_in_offloading", "no_pinned_swap_memory", "gpu_memory_fraction"),
    *("compile", "compile_mode", "tf32", "cudnn_benchmark", "no_fused_kernels"),
}
ATTENTION_PACKAGES = {"flash": "flash-attn", "xformers": "xformers", "sageattn": "sageattention"}
_OF_REQUESTS = {entry.name for entry in fields(Request)} - {"sampling", "name", "where", "seed_given"}

REPEAT_FLAG, SHOW_FLAG = "--repeat", "--show"
_EXCLUSIVE = (START_FIELDS, ("prompt", "from_file"), ("prompt", "interactive"), ("xy", "from_file"))
_SHOWN_DIGITS = 12  # of a hash


@dataclass(frozen=True)
class Recorder:
    """Writes the metadata of a run's results. Files are read once, when the first result that they made is recorded.

    Attributes:
        flags: those that were given, by name, with their values.
        lora_weight, lora_mode: of the run; the mode is the one that is used.
        versions: of what computes.
    """

    flags: Mapping[str, Any]
    lora_weight: tuple[str, ...]
    lora_mode: str
    versions: Mapping[str, str]
    _digests: dict[str, str] = field(default_factory=dict)

    def metadata(self, request: Request) -> dict[str, str]:
        """Of one result, all as text."""
        loras = self._loras(request)
        settings = {
            "flags": self._flags(request, loras),
            "lora": [{"file": path, "sha256": self._digest(lora_path(path)), "multiplier": m} for path, m in loras],
            "start": {"file": request.start, "sha256": self._digest(Path(request.start))} if request.start else {},
            "versions": dict(self.versions),
        }
        if not request.seed_given:
            settings["random"] = ["seed"]
        return {
            **request.metadata(),
            "lora": ", ".join(f"{Path(path).name} ({multiplier:g})" for path, multiplier in loras),
            SETTINGS: json.dumps(settings, ensure_ascii=False),
        }

    def of_batch(self, requests: Sequence[Request]) -> dict[str, str]:
        """Of what shows all ``requests``: what they have in common, and the flags of the run."""
        first, *others = map(self.metadata, requests)
        flags = {name: value for name, value in self.flags.items() if name not in RUN_FLAGS}
        if len(seeds := {request.sampling.seed for request in requests}) == 1:
            (flags["seed"],) = seeds
        settings = {"flags": flags, "lora": [], "start": {}, "versions": dict(self.versions)}
        if "seed" not in flags and not all(request.seed_given for request in requests):
            settings["random"] = ["seed"]
        shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        return {**shared, SETTINGS: json.dumps(settings, ensure_ascii=False)}

    def _loras(self, request: Request) -> list[tuple[str, float]]:
        """The LoRA files and multipliers that a result needs: an injected one with 0 changes nothing, to the bit."""
        pairs = zip(self.lora_weight, request.lora_multiplier, strict=True)
        return [(path, multiplier) for path, multiplier in pairs if multiplier != 0 or self.lora_mode == "merge"]

    def _flags(self, request: Request, loras: list[tuple[str, float]]) -> dict[str, Any]:
        own = {name: getattr(request, name) for name in _OF_REQUESTS}
        own |= {name: getattr(request.sampling, name) for name in sorted(SAMPLING_FIELDS)}
        own |= dict.fromkeys(LORA_FLAGS)
        own["latent_path"] = request.latent_path and (request.latent_path,)
        if loras:
            paths, multipliers = zip(*loras)
            own |= {"lora_weight": paths, "lora_multiplier": multipliers, "lora_mode": self.lora_mode}
        of_run = {name: value for name, value in self.flags.items() if name not in RUN_FLAGS and name not in BATCH_FLAGS}
        flags = {name: value for name, value in {**of_run, **own}.items() if value not in (None, ())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}

    def _digest(self, path: Path) -> str:
        if str(path) not in self._digests:
            self._digests[str(path)] = file_sha256(path)
        return self._digests[str(path)]


def versions_of(attn_mode: str, device: torch.device, processes: int = 1) -> dict[str, str]:
    """What the bits of a result depend on besides its flags. ``processes``: that compute it together."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    versions = {"musubi-tuner": read_toml(project)["project"]["version"]} if project.is_file() else {}
    attention = ATTENTION_PACKAGES.get(attn_mode, "torch")
    with suppress(metadata.PackageNotFoundError):  # a build of one's own may have another name
        attention = f"{attention} {metadata.version(attention)}" if attention != "torch" else attention
    together = {"processes": str(processes)} if processes > 1 else {}
    return {**versions, "torch": torch.__version__, "attention": attention, "device": device_name(device), **together}


def settings_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What stands under ``settings``; None where there is none, or it is not what ``Recorder`` writes."""
    try:
        settings = json.loads(metadata.get(SETTINGS, ""))
    except (ValueError, RecursionError):
        return None
    kinds = {"flags": dict, "lora": list, "start": dict, "versions": dict}
    fits = isinstance(settings, dict) and all(isinstance(settings.get(key), kind) for key, kind in kinds.items())
    return settings if fits and all(isinstance(entry, dict) for entry in settings["lora"]) else None


def identity(metadata: Mapping[str, str]) -> str | None:
    """What two results must have in common to be the same, as text; None without settings. Random seeds are left out, and LoRA that
    change nothing."""
    settings = settings_of(metadata)
    if settings is None:
        return None
    random = ["seed"] if settings.get("random") == ["seed"] else []
    flags = {name: value for name, value in settings["flags"].items() if name not in WITHOUT_EFFECT and name not in random}
    loras = [entry for entry in settings["lora"] if entry.get("multiplier") != 0]
    return json.dumps([flags, loras, settings["start"], random], sort_keys=True)


def with_flags(metadata: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of latents for the file that they are decoded to, with the flags of decoding."""
    settings = settings_of(metadata)
    if settings is None:
        return dict(metadata)
    settings["flags"] |= flags
    return {**metadata, SETTINGS: json.dumps(settings, ensure_ascii=False)}


def recorded_flags(path: str, given: Container[str]) -> dict[str, Any]:
    """The flags that make ``path`` again, for ``parse_with_config``; its folder is that of the result.

    Args:
        given: flags of the command line; another start or source of prompts takes the place of the file's.

    Raises:
        UserError: a file without settings, or that cannot be read.
    """
    settings = settings_of(read_media_metadata(path, REPEAT_FLAG))
    if settings is None:
        raise UserError(
            f"{REPEAT_FLAG} {path} does not say how to make it again: an older version wrote it. --show prints what it holds."
        )
    flags = {name: value for name, value in settings["flags"].items() if name not in RUN_FLAGS}
    for group in _EXCLUSIVE:
        if any(name in given for name in group):
            flags = {name: value for name, value in flags.items() if name not in group}
    for name in ("tokenizer1", "tokenizer2"):
        if name not in flags or name in given:
            continue
        if not os.path.exists(str(flags[name])):  # a file may be a stranger's: it does not decide what is downloaded
            raise UserError(
                f"{path} was made with --{name} {flags[name]}, which is not here; give --{name}, also where it is a hub id."
            )
    return {**flags, "save_path": str(_folder(Path(path)))}


def warn_of_changes(path: str, metadata: Mapping[str, str]) -> None:
    """Log which files of ``metadata`` are others than those that made ``path``, and what else may change the last bits."""
    old, new = settings_of(read_media_metadata(path, REPEAT_FLAG)), settings_of(metadata)
    if old is None or new is None:
        return
    if old.get("random") == ["seed"] and "seed" not in old["flags"]:
        logger.warning(
            "%s shows results of random seeds: others are made. %s of each of its files makes it again.", path, REPEAT_FLAG
        )
    before = {str(entry.get("file")): entry.get("sha256") for entry in (*old["lora"], old["start"])}
    for entry in (*new["lora"], new["start"]):
        if before.get(str(entry.get("file")), entry.get("sha256")) != entry.get("sha256"):
            logger.warning("%s has changed since it made %s: the result will be another one.", entry["file"], path)
    versions = {**old["versions"], **new["versions"]}
    if differ := [name for name in versions if old["versions"].get(name) != new["versions"].get(name)]:
        changes = "; ".join(
            f"{name}: {old['versions'].get(name, 'none')}, here {new['versions'].get(name, 'none')}" for name in differ
        )
        logger.warning("%s was made elsewhere or with other versions, and the result may differ by rounding (%s)", path, changes)


def described(path: str) -> str:
    """What a file says of how it was made, for people, and the command that makes it again.

    Raises:
        UserError: as of ``read_media_metadata``.
    """
    metadata = read_media_metadata(path, SHOW_FLAG)
    lines = [path, *(f"  {name}: {text}" for name, text in facts(metadata))]
    again = command_again(metadata, _folder(Path(path)))
    return "\n".join([*lines, "", again] if again else lines)


def facts(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """What metadata say of a result, as names and texts for people."""
    found, settings = [(key, text) for key, text in metadata.items() if text and key != SETTINGS], settings_of(metadata)
    if settings is None:
        return found
    files = [("LoRA", f"multiplier {entry.get('multiplier')}", entry) for entry in settings["lora"]]
    files += [("start", f"strength {settings['flags'].get('strength')}", settings["start"])] if settings["start"] else []
    return [
        *(fact for fact in found if fact[0] != "lora"),
        *((kind, f"{each.get('file')}: {how}, SHA-256 {str(each.get('sha256'))[:_SHOWN_DIGITS]}...") for kind, how, each in files),
        ("made with", ", ".join(f"{name} {version}" for name, version in settings["versions"].items())),
    ]


def command_again(metadata: Mapping[str, str], folder: Path) -> str | None:
    """The command that makes it again into ``folder``; None where metadata do not say how."""
    settings = settings_of(metadata)
    if settings is None:
        return None
    flags = {name: value for name, value in settings["flags"].items() if name not in RUN_FLAGS}
    return command({**flags, "save_path": str(folder)})


def command(flags: Mapping[str, Any]) -> str:
    """The command line of generation with these flags."""
    words = ["python", "hv_generate_video.py"]
    for name, value in flags.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, bool):
            words += [f"--{name}"] if value else []
        elif str(value).startswith("-"):
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", str(value)]
    return command_line(words)


def _folder(path: Path) -> Path:
    """Where the result lies: a folder of pictures is one result."""
    if path.is_dir() or (path.suffix == ".png" and (path.parent / PICTURE).is_file()):
        path = path if path.is_dir() else path.parent
    return path.parent
