"""The items of a dataset: media files with their captions, from a folder or a JSONL file. Opens no media."""

from __future__ import annotations

import itertools
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from dataset.config import DatasetConfig
from dataset.media.decoding import VIDEO_EXTENSIONS
from dataset.media.pictures import IMAGE_EXTENSIONS
from utils.errors import UserError, name_some, shown
from utils.files import explain_failed_reading, read_text, require_file
from utils.toml_files import config_path, has_escaped_backslash_accident

EXTENSIONS = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}
MOST_CAPTION_BYTES = 1 << 20  # also of a line of JSONL
FILE_NAME_BYTES = 255  # what the common file systems allow
LONGEST_CACHE_SUFFIX = "_000000-0000_00000x00000_hv.safetensors"  # after the stem, with room for long clips and large sources


@dataclass(frozen=True)
class Item:
    """One picture or clip."""

    dataset: DatasetConfig
    path: Path  # that of a JSONL line need not exist yet
    caption: str | None  # None where there is no caption file or no ``caption`` key; an empty file is an empty caption
    stem: str  # what the names of its cache files begin with


def list_items(dataset: DatasetConfig) -> list[Item]:
    """Every item of a dataset, sorted by path (folder) or in the order of the lines (JSONL).

    Raises a UserError where the folder or file cannot be read, a JSONL line is malformed (file and line are named), a caption is
    not UTF-8, a name cannot be that of a cache file, or two items would share a cache file (both are named).
    """
    items = _items_of_folder(dataset) if dataset.jsonl_file is None else _items_of_jsonl(dataset)
    longest = FILE_NAME_BYTES - len(LONGEST_CACHE_SUFFIX)
    by_stem: dict[str, Item] = {}
    for item in items:
        try:
            length = len(item.stem.encode())
        except UnicodeEncodeError:  # safetensors would write the cache file, but not open it again
            raise UserError(f"the name of {str(item.path)!r} is not UTF-8, as those of cache files must be; rename it.") from None
        if length > longest:
            raise UserError(
                f"the name of {item.path} is too long for its cache files: {length} bytes before the ending, "
                f"at most {longest} fit; rename it."
            )
        other = by_stem.setdefault(os.path.normcase(item.stem), item)  # Windows does not tell a.png from A.png
        if other is not item:
            raise UserError(
                f"{other.path} and {item.path} would share the cache files {item.stem}_*_hv*.safetensors in "
                f"{dataset.cache_directory}; rename one of them, or put it in a dataset with another cache_directory."
            )
    return items


def settle_captions(items: Sequence[Item], missing: str) -> list[Item]:
    """The items to cache, each with a caption.

    ``missing`` is what becomes of items without one: ``error`` (a UserError names some), ``skip``, or ``empty`` (an empty caption).
    """
    if missing == "empty":
        return [replace(item, caption=item.caption or "") for item in items]
    without = [item for item in items if item.caption is None]
    if without and missing == "error":
        dataset = without[0].dataset
        if dataset.jsonl_file is None:
            remedy = f"write a text file {without[0].stem}{dataset.caption_extension} beside each, or set caption_extension"
        else:
            remedy = f'give each line of {dataset.jsonl_file} a "caption"'
        raise UserError(
            f"{len(without)} item(s) have no caption: {name_some([item.path for item in without])}; {remedy}, "
            "or run both caching scripts with --missing_caption skip or empty."
        )
    return [item for item in items if item.caption is not None]


def unread_files(dataset: DatasetConfig) -> list[str]:
    """Names of files in a dataset's folder that have a caption but an ending that is not read in such a dataset."""
    if dataset.directory is None:
        return []
    paths, captions = _list_folder(dataset)
    caption_files = set(captions.values())
    read = {path.stem for path in paths if path.suffix.lower() in EXTENSIONS[dataset.kind]}
    others = (path for path in paths if path.stem not in read and path.name not in caption_files)
    return [path.name for path in others if _caption_of(path, dataset, captions)]


def _list_folder(dataset: DatasetConfig) -> tuple[list[Path], dict[str, str]]:
    """The files of a dataset's folder, sorted, and the names of those that may be captions, by ``_caption_key``."""
    try:
        with os.scandir(dataset.directory) as entries:
            # Dot files are temporary or the "._x" doubles that macOS writes; neither is a picture.
            # Pipes, devices and links that lead nowhere stay: whoever reads them says so.
            names = sorted(entry.name for entry in entries if not entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list the folder {dataset.directory}: {error.strerror or error}.") from error
    ending = dataset.caption_extension.lower()
    captions = {_caption_key(name): name for name in names if name.lower().endswith(ending)}
    return [dataset.directory / name for name in names], captions


def _items_of_folder(dataset: DatasetConfig) -> list[Item]:
    paths, captions = _list_folder(dataset)
    items = []
    for path in paths:
        if path.suffix.lower() in EXTENSIONS[dataset.kind]:
            name = _caption_of(path, dataset, captions)
            caption = None if name is None else read_text(dataset.directory / name, "the caption", MOST_CAPTION_BYTES).strip()
            items.append(Item(dataset, path, caption, path.stem))
    return items


def _caption_key(name: str) -> str:
    """A name as captions are looked up by: in Unicode NFC, its ending in lower case."""
    stem, ending = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + ending.lower()


def _caption_of(path: Path, dataset: DatasetConfig, captions: dict[str, str]) -> str | None:
    """The name of a media file's caption: that of ``a.png`` is ``a.txt``, or else ``a.png.txt``."""
    for stem in (path.stem, path.name):
        if (found := captions.get(_caption_key(f"{stem}{dataset.caption_extension}"))) is not None:
            return found
    return None


def _items_of_jsonl(dataset: DatasetConfig) -> list[Item]:
    key = f"{dataset.kind}_path"
    items = []
    for number, line in enumerate(_lines(dataset.jsonl_file), start=1):
        if line.strip():
            path, caption = _parse_line(line, key, f"{dataset.jsonl_file}:{number}")
            beside = dataset.jsonl_file.parent / path
            if not os.path.exists(path) and os.path.exists(beside):  # relative to the working folder, or else to the file
                path = beside
            if os.path.isdir(path):
                raise UserError(f"{dataset.jsonl_file}:{number}: {key!r} {path} is a folder; name one file on each line.")
            items.append(Item(dataset, path, caption, path.stem))
    return items


def _parse_line(line: str, key: str, where: str) -> tuple[Path, str | None]:
    """Media path and caption of one JSONL line; ``where`` is ``file:line`` for the errors."""
    example = f'expected one object a line, such as {{"{key}": "folder/name.ext", "caption": "what it shows"}}'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); {example}.") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} holds {shown(entry)}, not an object; {example}.")
    path, caption = entry.get(key), entry.get("caption")
    if path is None:
        keys = ", ".join(map(repr, entry)) or "no keys"
        raise UserError(f"{where} has no {key!r} (it has {keys}); {example}.")
    if not isinstance(path, str) or not Path(path).stem.strip():
        raise UserError(f"{where}: {key!r} must be the path of a file, not {shown(path)}; {example}.")
    if has_escaped_backslash_accident(path):
        raise UserError(
            f"{where}: {key!r} holds control characters ({path!r}): write C:/folder/name.ext, or double every backslash."
        )
    if not isinstance(caption, str | None):
        raise UserError(f"{where}: 'caption' must be text, not {shown(caption)}; {example}.")
    try:
        f"{path}{caption}".encode()
    except UnicodeEncodeError:  # "\ud800" is legal JSON, but no text
        raise UserError(f"{where} holds half of a surrogate pair; write the character itself, in UTF-8.") from None
    if path.startswith("file:"):
        path = url2pathname(urlsplit(path).path)
    return config_path(path), None if caption is None else caption.strip()


def _lines(path: Path) -> Iterator[str]:
    """One in memory at a time. They end with line feeds alone: a caption may hold U+2028 and its like unescaped."""
    with explain_failed_reading(path, "jsonl_file"), open(require_file(path, "jsonl_file"), "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MOST_CAPTION_BYTES + 1)
            if not line:
                return
            if len(line) > MOST_CAPTION_BYTES:
                raise UserError(f"{path}:{number} is longer than {MOST_CAPTION_BYTES >> 10} KB; name one file on each line.")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
