"""The dataset TOML file: which media are trained on, at which size, from which cache folder.

``dataset_config.md`` beside this file describes every key for users.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voluptuous import All, In, Invalid, MultipleInvalid, Schema

from dataset.media.buckets import BUCKET_STEP, choose_bucket
from dataset.media.frame_rate import MODEL_FPS
from dataset.media.frames import FRAME_EXTRACTIONS, MAX_FRAMES, Window, cut_windows, is_clip_length, longest_clip
from utils.errors import UserError, shown
from utils.key_values import nearest_name
from utils.toml_files import BACKSLASH_HINT, config_path, has_escaped_backslash_accident, read_toml

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetConfig:
    """One ``[[datasets]]`` table with the values of ``[general]`` and the defaults filled in."""

    index: int
    kind: str  # "image" or "video"
    directory: Path | None  # exactly one of directory and jsonl_file is set
    jsonl_file: Path | None
    cache_directory: Path
    resolution: tuple[int, int] = (960, 544)  # (width, height)
    caption_extension: str | None = None  # None for JSONL, where the captions stand in the file
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    target_frames: tuple[int, ...] = (1,)
    frame_extraction: str = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = MAX_FRAMES
    target_fps: float = MODEL_FPS  # 0 keeps every frame
    source_fps: float | None = None  # None: what the file says
    prior_preservation: bool = False  # the network is to leave what the model makes of these captions as it is

    @property
    def label(self) -> str:
        """How messages call this dataset: users count from one."""
        return f"[[datasets]] number {self.index + 1}"

    @property
    def source(self) -> Path:
        """The media folder or the JSONL file."""
        return self.directory or self.jsonl_file

    def bucket_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size (W, H) at which a picture or clip of ``size`` is trained."""
        return choose_bucket(size, self.resolution, self.enable_bucket, self.bucket_no_upscale)

    def windows_of(self, frames: int) -> list[Window]:
        """The windows that are cut from a clip of so many frames."""
        return cut_windows(frames, self.target_frames, self.frame_extraction, self.frame_stride, self.frame_sample, self.max_frames)


@dataclass(frozen=True)
class DatasetGroup:
    """Everything that one dataset file describes."""

    path: Path
    datasets: tuple[DatasetConfig, ...]


# Validators: the value as the program has it, or voluptuous.Invalid with the rest of a sentence that begins "key = value".


def _number(kind: type, low: float, high: float) -> Callable[[Any], Any]:
    """Numbers from ``low`` to ``high``. ``kind``: int for whole ones only, else float."""

    def check(value: Any) -> Any:
        # bool is an int to Python, but "batch_size = true" is a mistake; NaN fails the comparison
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
            raise Invalid(f"must be a {'whole number' if kind is int else 'number'} from {low} to {high}")
        return value

    return check


COUNT = _number(int, 1, 1_000_000)
SIDE = _number(int, BUCKET_STEP, 8192)  # far beyond what the model was trained for
SWITCH = All(bool, msg="must be true or false, without quotes")


def _resolution(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise Invalid("must be [width, height] or one number for a square")
    return SIDE(sides[0]), SIDE(sides[1])


def _caption_extension(value: Any) -> str:
    if not isinstance(value, str) or not value.strip(". "):
        raise Invalid('must be a file ending such as ".txt"')
    return value if "." in value else f".{value}"


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise Invalid("must be a path in quotes")
    if has_escaped_backslash_accident(value):
        raise Invalid(f"holds control characters. {BACKSLASH_HINT}")
    return config_path(value)


def _target_frames(value: Any) -> tuple[int, ...]:
    lengths = value if isinstance(value, list) else [value]
    if not lengths:
        raise Invalid("must be a list of frame counts such as [1, 25]")
    for length in map(COUNT, lengths):
        if not is_clip_length(length):
            below = longest_clip(length)
            raise Invalid(f"must hold numbers of the form 4n+1: instead of {length} write {below} or {below + 4}")
    return tuple(sorted(set(lengths)))


Validators = Mapping[str, Callable[[Any], Any]]

COMMON_KEYS: Validators = {
    "resolution": _resolution,
    "caption_extension": _caption_extension,
    "batch_size": COUNT,
    "num_repeats": COUNT,
    "enable_bucket": SWITCH,
    "bucket_no_upscale": SWITCH,
}
# which source key makes which kind of dataset, from a folder or from a JSONL file
SOURCE_KEYS = {
    "image_directory": ("image", "directory"),
    "image_jsonl_file": ("image", "jsonl_file"),
    "video_directory": ("video", "directory"),
    "video_jsonl_file": ("video", "jsonl_file"),
}
VIDEO_KEYS: Validators = {
    "target_frames": _target_frames,
    "frame_extraction": In(FRAME_EXTRACTIONS, msg=f"must be one of {', '.join(FRAME_EXTRACTIONS)}"),
    "frame_stride": COUNT,
    "frame_sample": COUNT,
    "max_frames": COUNT,
    "target_fps": _number(float, 0, 1000),
    "source_fps": _number(float, 0.001, 1000),
}
DATASET_KEYS: Validators = {
    **COMMON_KEYS,
    **dict.fromkeys(SOURCE_KEYS, _path),
    "cache_directory": _path,
    "prior_preservation": SWITCH,
    **VIDEO_KEYS,
}


# of this file format in trainers of other models, which read pictures besides those that are learned
KEYS_OF_OTHER_MODELS = frozenset({"control_directory", "control_resolution", "no_resize_control", "multiple_target"})


def load_dataset_config(path: str | os.PathLike[str], *, require_media: bool = True) -> DatasetGroup:
    """Read and check a dataset TOML file.

    Relative paths in it start at the current folder. ``require_media=False`` accepts media folders and JSONL files that
    are gone, for training from caches alone. A UserError names the section and the key that is wrong, and what to write instead.
    """
    path = Path(path)
    content = read_toml(path, "dataset config")
    for name in content:
        if name in DATASET_KEYS:
            raise UserError(f"{path}: {name} stands above the first section; move it below [general] or [[datasets]].")
        if name not in ("general", "datasets"):
            hint = nearest_name(name, ("general", "datasets")) or " The sections are [general] and [[datasets]]."
            raise UserError(f"{path} has an unknown section {name!r}.{hint}")
    general, tables = content.get("general", {}), content.get("datasets", [])
    if not isinstance(general, dict) or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: write [general] once, in single brackets, and each [[datasets]] in double brackets.")
    if not tables:
        raise UserError(f"{path} describes no dataset; add a [[datasets]] section with image_directory or video_directory.")
    common = _validate(f"{path}, [general]", general, COMMON_KEYS)
    datasets = tuple(_dataset(path, index, common, table, require_media) for index, table in enumerate(tables))
    by_cache: dict[str, DatasetConfig] = {}
    for dataset in datasets:  # two in one cache folder would read each other's files
        other = by_cache.setdefault(os.path.normcase(os.path.realpath(dataset.cache_directory)), dataset)
        if other is not dataset:
            raise UserError(
                f"{path}: {other.label} and number {dataset.index + 1} have the same cache folder, "
                f"{dataset.cache_directory}; give each its own cache_directory."
            )
    return DatasetGroup(path, datasets)


def _validate(where: str, table: dict[str, Any], validators: Validators) -> dict[str, Any]:
    """The converted values of one table; a UserError names the first key that is unknown or wrong."""
    for key in table:
        if key not in validators and key in DATASET_KEYS:
            raise UserError(f"{where}: {key} cannot stand here; move it to the [[datasets]] sections it is for.")
        if key in KEYS_OF_OTHER_MODELS:
            raise UserError(f"{where}: {key} is for models that are given control images; HunyuanVideo is given none. Take it out.")
        if key not in validators:
            hint = nearest_name(key, validators) or f" Known keys: {', '.join(validators)}."
            raise UserError(f"{where}: unknown key {key!r}.{hint}")
    try:
        return Schema(dict(validators))(table)
    except MultipleInvalid as error:
        first = error.errors[0]
        key = str(first.path[0])
        raise UserError(f"{where}: {key} = {shown(table[key])} {first.error_message.removesuffix('.')}.") from error


def _dataset(path: Path, index: int, common: dict[str, Any], table: dict[str, Any], require_media: bool) -> DatasetConfig:
    where = f"{path}, [[datasets]] number {index + 1}"
    values = {**common, **_validate(where, table, DATASET_KEYS)}
    sources = [key for key in SOURCE_KEYS if key in values]
    if len(sources) != 1:
        found = f"has {' and '.join(sources)}" if sources else "has no source of media"
        raise UserError(f"{where} {found}; give it exactly one of {', '.join(SOURCE_KEYS)}.")
    [source_key] = sources
    source = values.pop(source_key)
    kind, form = SOURCE_KEYS[source_key]
    for key in VIDEO_KEYS if kind == "image" else ():
        if key in values:
            raise UserError(f"{where}: {key} is for videos, but {source_key} is given; remove it.")
    if require_media:
        _require_source(f"{where}: {source_key} {source}", path, source, wants_folder=form == "directory")
    if form == "directory":
        values = {"caption_extension": ".txt", "cache_directory": source, **values, "directory": source, "jsonl_file": None}
    else:
        values |= {"caption_extension": None, "directory": None, "jsonl_file": source}
    if "cache_directory" not in values:
        raise UserError(f"{where}: {source_key} needs a cache_directory, the folder for its cache files; add one.")
    if os.path.isfile(values["cache_directory"]):
        raise UserError(f"{where}: cache_directory {values['cache_directory']} is a file; name a folder.")
    dataset = DatasetConfig(index=index, kind=kind, **values)
    _warn_of_values_without_effect(where, dataset, table)
    return dataset


def _require_source(what: str, toml: Path, source: Path, wants_folder: bool) -> None:
    os.fsencode(source)  # or the system's encoding has no such name, which ``run_script`` explains
    # os.path rather than Path: names that the system refuses count as missing there instead of raising OSError
    if os.path.isdir(source) if wants_folder else os.path.isfile(source):
        return
    if os.path.exists(source):
        kind = "a folder" if os.path.isdir(source) else "a file" if os.path.isfile(source) else "a device or a pipe"
        raise UserError(f"{what} must be a {'folder' if wants_folder else 'file'}, but is {kind}.")
    blank = source.name != source.name.strip()
    hint = "Its name begins or ends with a blank." if blank else "Check the spelling."
    if not source.is_absolute():
        hint += f" Relative paths start at the current folder, {Path.cwd()}."
        beside = os.path.realpath(toml.parent / source)
        if os.path.exists(beside):
            hint += f" There is a {beside}: write that, or start the script in the folder of the config."
    raise UserError(f"{what} does not exist. {hint}")


def _warn_of_values_without_effect(where: str, dataset: DatasetConfig, table: dict[str, Any]) -> None:
    for key, mode in (("frame_stride", "slide"), ("frame_sample", "uniform"), ("max_frames", "full")):
        if key in table and dataset.frame_extraction != mode:
            logger.warning('%s: %s has an effect only with frame_extraction = "%s".', where, key, mode)
    if "target_frames" in table and dataset.frame_extraction == "full":
        logger.warning('%s: target_frames has no effect with frame_extraction = "full"; max_frames has.', where)
    if dataset.source_fps is not None and not dataset.target_fps:
        logger.warning("%s: source_fps has no effect with target_fps = 0, which keeps every frame.", where)
    if dataset.bucket_no_upscale and not dataset.enable_bucket:
        logger.warning("%s: bucket_no_upscale has an effect only with enable_bucket = true.", where)
    only = dataset.bucket_for(dataset.resolution)
    if not dataset.enable_bucket and only != dataset.resolution:
        message = "%s: resolution %dx%d is rounded down to %dx%d, multiples of %d."
        logger.warning(message, where, *dataset.resolution, *only, BUCKET_STEP)
