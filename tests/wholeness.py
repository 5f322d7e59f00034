"""Whether what stands under final names is whole, told by the files themselves and not by the code that wrote them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from utils.files import is_temporary

STATE_PARTS = {"network.safetensors", "optimizer.pt", "random-0.pt"}
PROBE = ".tmp"  # ends the name of an empty file that shows whether a folder can be written to
LOG = "loss.csv"  # what the trainings here call it
PNG_END = b"IEND\xaeB`\x82"
LENGTH_BYTES = 8  # at the start of a safetensors file: how long its header is


def unfinished(folder: Path) -> set[Path]:
    """Temporary files and folders under ``folder``; of those inside one another the outermost."""
    return {path for path in _all_below(folder) if is_temporary(path)}


def is_saved(name: str | Path) -> bool:
    """Whether the temporary file or folder of that name was to become a model, a state or a cache file."""
    return not str(name).endswith((PROBE, LOG))


def broken(folder: Path) -> list[str]:
    """What is not whole under ``folder`` though it has its final name, and why."""
    return [f"{path.relative_to(folder)}: {fault}" for path in _all_below(folder) if (fault := _fault(path))]


def _all_below(folder: Path) -> Iterator[Path]:
    """Everything under ``folder``, but not what lies in temporary folders."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        yield path
        if path.is_dir() and not is_temporary(path):
            yield from _all_below(path)


def _fault(path: Path) -> str | None:
    if is_temporary(path):
        return None
    try:
        if path.is_dir():
            return _fault_of_state(path) if path.name.endswith("-state") else None
        if path.suffix == ".safetensors":
            promised, found = _promised_bytes(path), path.stat().st_size
            return None if promised == found else f"{found} bytes, its header promises {promised}"
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".png" and not path.read_bytes().endswith(PNG_END):
            return "no PNG with an end"
        if path.suffix == ".mp4" and b"moov" not in path.read_bytes():  # the table of frames, which is written last
            return "no MP4 with an end"
        if path.suffix == ".html" and not path.read_bytes().rstrip().endswith(b"</html>"):
            return "no page with an end"
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):  # looks for the directory, which is written last
            return "no zip file with an end"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return repr(error)
    return None


def _promised_bytes(path: Path) -> int:
    """The size that the header of a safetensors file claims for it."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    return LENGTH_BYTES + length + max(value["data_offsets"][1] for name, value in header.items() if name != "__metadata__")


def _fault_of_state(folder: Path) -> str | None:
    there = {path.name: path.stat().st_size for path in folder.iterdir()}
    named = json.loads((folder / "state.json").read_text(encoding="utf-8"))["files"]
    if not there.keys() >= STATE_PARTS:
        return f"lacks {', '.join(sorted(STATE_PARTS - there.keys()))}"
    there.pop("state.json")
    return None if named == there else f"holds {there}, its state.json names {named}"
