"""The items of a dataset: media files with their captions, from a folder or a JSONL file. Opens no media."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.config import DatasetConfig
from dataset.media.decoding import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from utils.errors import UserError, name_some
from utils.toml_files import has_escaped_backslash_accident

FILE_NAME_BYTES = 255  # what the common file systems allow
# The longest that follows the stem in the name of a cache file, with room for long clips and large sources. cache_files.py
# makes these names.
LONGEST_CACHE_SUFFIX = {"image": "_00000x00000_hv.safetensors", "video": "_000000-0000_00000x00000_hv.safetensors"}


@dataclass(frozen=True)
class Item:
    """One picture or clip.

    Attributes:
        dataset: the dataset it belongs to.
        path: the media file; it need not exist yet when the item comes from a JSONL file.
        caption: the caption without surrounding white space; None where there is no caption file or no ``caption`` key.
            An empty caption file is an empty caption, which is allowed.
        stem: what the names of its cache files begin with.
    """

    dataset: DatasetConfig
    path: Path
    caption: str | None
    stem: str


def list_items(dataset: DatasetConfig) -> list[Item]:
    """Every item of a dataset, sorted by path (folder) or in the order of the lines (JSONL).

    Raises:
        UserError: the folder or file cannot be read, a JSONL line is malformed (file and line are named), a caption is
            not UTF-8, a name cannot be that of a cache file, or two items would share a cache file (both are named).
    """
    items = _items_of_folder(dataset) if dataset.jsonl_file is None else _items_of_jsonl(dataset)
    _refuse_impossible_names(items)
    _refuse_shared_caches(items)
    return items


def settle_captions(items: Sequence[Item], missing: str) -> list[Item]:
    """The items to cache, each with a caption.

    Args:
        missing: what becomes of items without one: ``error``, ``skip`` (left out), or ``empty`` (an empty caption).

    Raises:
        UserError: with ``error``, as ``require_captions``.
    """
    if missing == "empty":
        return [replace(item, caption=item.caption or "") for item in items]
    if missing == "error":
        require_captions(items)
    return [item for item in items if item.caption is not None]


def require_captions(items: Iterable[Item]) -> None:
    """Raise a UserError that names up to five of the items that have no caption, if there are any."""
    missing = [item for item in items if item.caption is None]
    if not missing:
        return
    first = missing[0].dataset
    if first.jsonl_file is None:
        remedy = f"write a text file {missing[0].stem}{first.caption_extension} beside each, or set caption_extension"
    else:
        remedy = f'give each line of {first.jsonl_file} a "caption"'
    raise UserError(
        f"{len(missing)} item(s) have no caption: {name_some([item.path for item in missing])}; {remedy}, "
        "or run both caching scripts with --missing_caption skip or empty."
    )


def _items_of_folder(dataset: DatasetConfig) -> list[Item]:
    extensions = IMAGE_EXTENSIONS if dataset.kind == "image" else VIDEO_EXTENSIONS
    try:
        with os.scandir(dataset.directory) as entries:
            files = {entry.name for entry in entries if entry.is_file()}
    except OSError as error:
        raise UserError(f"cannot list the folder {dataset.directory}: {error.strerror or error}.") from error
    items = []
    for name in sorted(files):
        path = dataset.directory / name
        # Dot files are temporary or the "._x" doubles that macOS writes; neither is a picture.
        if path.suffix.lower() in extensions and not name.startswith("."):
            caption_name = path.stem + dataset.caption_extension if dataset.caption_extension else None
            caption = _read_text(dataset.directory / caption_name).strip() if caption_name in files else None
            items.append(Item(dataset, path, caption, path.stem))
    return items


def _items_of_jsonl(dataset: DatasetConfig) -> list[Item]:
    key = f"{dataset.kind}_path"
    items = []
    # split("\n"), not splitlines(): a caption may hold U+2028 and its like unescaped.
    for number, line in enumerate(_read_text(dataset.jsonl_file).split("\n"), start=1):
        if line.strip():
            where = f"{dataset.jsonl_file}:{number}"
            path, caption = _parse_line(line, key, where)
            path = _find_media(path, dataset.jsonl_file, f"{where}: {key!r}")
            items.append(Item(dataset, path, caption, path.stem))
    return items


def _parse_line(line: str, key: str, where: str) -> tuple[str, str | None]:
    """Media path and caption of one JSONL line; ``where`` is ``file:line`` for the errors."""
    example = f'expected one object a line, such as {{"{key}": "folder/name.ext", "caption": "what it shows"}}'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); {example}.") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} holds a {type(entry).__name__}, not an object; {example}.")
    path, caption = entry.get(key), entry.get("caption")
    if path is None:
        keys = ", ".join(map(repr, entry)) or "no keys"
        raise UserError(f"{where} has no {key!r} (it has {keys}); {example}.")
    if not isinstance(path, str) or not Path(path).stem.strip() or "\0" in path:
        raise UserError(f"{where}: {key!r} must be the path of a file, not {path!r}; {example}.")
    if has_escaped_backslash_accident(path):
        raise UserError(
            f"{where}: {key!r} holds control characters ({path!r}): write C:/folder/name.ext, or double every backslash."
        )
    if not isinstance(caption, str | None):
        raise UserError(f"{where}: 'caption' must be text, not {caption!r}; {example}.")
    try:
        f"{path}{caption}".encode()
    except UnicodeEncodeError:  # "\ud800" is legal JSON, but no text
        raise UserError(f"{where} holds half of a surrogate pair; write the character itself, in UTF-8.") from None
    return path, None if caption is None else caption.strip()


def _find_media(path: str, jsonl_file: Path, where: str) -> Path:
    """Relative paths are those of the working folder, or else of the JSONL file's folder. ``where`` is for the error."""
    found = Path(path)
    try:
        if stat.S_ISDIR(os.stat(found).st_mode):
            raise UserError(f"{where} {path} is a folder; name one file on each line.")
        return found
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{where} is too long for a path ({len(path)} characters, {path[:40]!r}...); shorten it.") from None
    beside = jsonl_file.parent / found
    return beside if os.path.exists(beside) else found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error


def _refuse_impossible_names(items: list[Item]) -> None:
    """A name that the disk takes for a picture may be too long with what a cache file has behind it, or be no text."""
    for item in items:
        try:
            item.stem.encode()
        except UnicodeEncodeError:  # safetensors would write the cache file, but not open it again
            raise UserError(
                f"the name of {os.fsencode(item.path)!r} is not UTF-8, as those of cache files must be; rename it."
            ) from None
        longest = FILE_NAME_BYTES - len(LONGEST_CACHE_SUFFIX[item.dataset.kind])
        length = len(os.fsencode(item.stem))
        if length > longest:
            raise UserError(
                f"the name of {item.path} is too long for its cache files: {length} bytes before the ending, "
                f"at most {longest} fit; rename it."
            )


def _refuse_shared_caches(items: list[Item]) -> None:
    """Cache files are named by stem, so one stem may stand only once in a dataset."""
    seen: dict[str, Item] = {}
    for item in items:
        key = os.path.normcase(item.stem)  # Windows does not tell a.png from A.png
        other = seen.setdefault(key, item)
        if other is not item:
            raise UserError(
                f"{other.path} and {item.path} would share the cache files {item.stem}_*_hv*.safetensors in "
                f"{item.dataset.cache_directory}; rename one of them, or put it in a dataset with another cache_directory."
            )
