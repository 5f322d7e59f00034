"""Results made again from their metadata: what --show prints, and the flags of --repeat."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from networks.generation.record import RUN_FLAGS, settings_of
from networks.generation.requests import START_FIELDS
from utils.errors import UserError
from utils.media.metadata import PICTURE, SETTINGS, read_media_metadata

logger = logging.getLogger(__name__)

REPEAT_FLAG, SHOW_FLAG = "--repeat", "--show"
_EXCLUSIVE = (START_FIELDS, ("prompt", "from_file"), ("prompt", "interactive"), ("xy", "from_file"))
_SHOWN_DIGITS = 12  # of a hash


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
    return {**flags, "save_path": str(_folder(Path(path)))}


def warn_of_changes(path: str, metadata: Mapping[str, str]) -> None:
    """Log which files of ``metadata`` are others than those that made ``path``, and what else may change the last bits."""
    old, new = settings_of(read_media_metadata(path, REPEAT_FLAG)), settings_of(metadata)
    if old is None or new is None:
        return
    before = {entry.get("file"): entry.get("sha256") for entry in (*old["lora"], old["start"])}
    for entry in (*new["lora"], new["start"]):
        if before.get(entry.get("file"), entry.get("sha256")) != entry.get("sha256"):
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
    settings = settings_of(metadata)
    lines = [path, *(f"  {key}: {value}" for key, value in metadata.items() if value and key not in (SETTINGS, "lora"))]
    if settings is None:
        return "\n".join([*lines, *[f"  lora: {metadata['lora']}"] * bool(metadata.get("lora"))])
    files = [(f"multiplier {entry.get('multiplier')}", entry) for entry in settings["lora"]]
    files += [("start", settings["start"])] if settings["start"] else []
    lines += [f"  {entry.get('file')}: {role}, SHA-256 {str(entry.get('sha256'))[:_SHOWN_DIGITS]}..." for role, entry in files]
    lines.append(f"  made with {', '.join(f'{name} {version}' for name, version in settings['versions'].items())}")
    flags = {name: value for name, value in settings["flags"].items() if name not in RUN_FLAGS}
    return "\n".join([*lines, "", command({**flags, "save_path": str(_folder(Path(path)))})])


def command(flags: Mapping[str, Any]) -> str:
    """The command line with these flags, in the words of a POSIX shell."""
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
    return shlex.join(words)


def _folder(path: Path) -> Path:
    """Where the result lies: a folder of pictures is one result."""
    if path.is_dir() or (path.suffix == ".png" and (path.parent / PICTURE).is_file()):
        path = path if path.is_dir() else path.parent
    return path.parent
