"""The dataset TOML file: which media are trained on, at which size, from which cache folder.

``dataset_config.md`` beside this file describes every key for users.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import voluptuous

from dataset.media.buckets import BUCKET_STEP, bucket_resolutions, choose_bucket
from dataset.media.frame_rate import MODEL_FPS
from dataset.media.frames import FRAME_EXTRACTIONS, MAX_FRAMES, Window, cut_windows, is_clip_length, is_cut
from utils.errors import UserError
from utils.key_values import nearest_name
from utils.toml_files import BACKSLASH_HINT, config_path, has_escaped_backslash_accident, read_toml

logger = logging.getLogger(__name__)

DEFAULT_CAPTION_EXTENSION = ".txt"
MAX_SIDE = 8192  # far beyond what the model was trained for; the number of buckets grows with the resolution
MAX_AREA = 4096 * 4096
MAX_NUMBER = 1_000_000
MAX_FPS = 1000


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
        return dataset_label(self.index)

    @property
    def source(self) -> Path:
        """The media folder or the JSONL file."""
        source = self.directory or self.jsonl_file
        assert source is not None
        return source

    def bucket_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size (W, H) at which a picture or clip of ``size`` is trained."""
        return choose_bucket(size, self.resolution, self.enable_bucket, self.bucket_no_upscale)

    def windows_of(self, frames: int) -> list[Window]:
        """The windows that are cut from a clip of so many frames."""
        return cut_windows(frames, self.target_frames, self.frame_extraction, self.frame_stride, self.frame_sample, self.max_frames)

    def cuts(self, window: Window, last_start: int) -> bool:
        """Whether ``window`` is cut from a clip whose last window of that length begins at frame ``last_start``."""
        mode, stride, sample = self.frame_extraction, self.frame_stride, self.frame_sample
        return is_cut(window, last_start, self.target_frames, mode, stride, sample, self.max_frames)


@dataclass(frozen=True)
class DatasetGroup:
    """Everything that one dataset file describes."""

    path: Path
    datasets: tuple[DatasetConfig, ...]


def dataset_label(index: int) -> str:
    """``0`` -> ``"[[datasets]] number 1"``."""
    return f"[[datasets]] number {index + 1}"


def _whole_number(value: Any) -> int:
    # bool is an int to Python, but "batch_size = true" is a mistake
    if isinstance(value, bool) or not isinstance(value, int):
        raise voluptuous.Invalid("must be a whole number")
    return value


def _at_least_one(value: Any) -> int:
    if _whole_number(value) < 1:
        raise voluptuous.Invalid("must be at least 1")
    if value > MAX_NUMBER:
        raise voluptuous.Invalid(f"must be at most {MAX_NUMBER}")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise voluptuous.Invalid("must be true or false, without quotes")
    return value


def _resolution(value: Any) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list) or len(sides) != 2:
        raise voluptuous.Invalid("must be [width, height] or one number for a square")
    width, height = (_whole_number(side) for side in sides)
    if min(width, height) < BUCKET_STEP:
        raise voluptuous.Invalid(f"must have sides of at least {BUCKET_STEP} pixels")
    if max(width, height) > MAX_SIDE:
        raise voluptuous.Invalid(f"must have sides of at most {MAX_SIDE} pixels")
    if width * height > MAX_AREA:
        raise voluptuous.Invalid(f"must have an area of at most {MAX_AREA} pixels (4096x4096)")
    return width, height


def _caption_extension(value: Any) -> str:
    if not isinstance(value, str) or not value.strip(". "):
        raise voluptuous.Invalid('must be a file ending such as ".txt"')
    return value if "." in value else f".{value}"


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise voluptuous.Invalid("must be a path in quotes")
    if has_escaped_backslash_accident(value):
        raise voluptuous.Invalid(f"holds control characters. {BACKSLASH_HINT}")
    return config_path(value)


def _target_frames(value: Any) -> tuple[int, ...]:
    lengths = [value] if isinstance(value, int) else value
    if not isinstance(lengths, list) or not lengths:
        raise voluptuous.Invalid("must be a list of frame counts such as [1, 25]")
    for length in lengths:
        if _whole_number(length) > MAX_NUMBER:
            raise voluptuous.Invalid(f"must hold numbers of at most {MAX_NUMBER}")
        if not is_clip_length(length):
            below = max(1, length - (length - 1) % 4)
            nearest = f"{below}" if length < 1 else f"{below} or {below + 4}"
            raise voluptuous.Invalid(
                f"must hold numbers of the form 4n+1 (1, 5, 9, ..., 25, ...): instead of {length} write {nearest}"
            )
    return tuple(sorted(set(lengths)))


def _frame_extraction(value: Any) -> str:
    if value not in FRAME_EXTRACTIONS:
        raise voluptuous.Invalid(f"must be one of {', '.join(FRAME_EXTRACTIONS)}.{nearest_name(value, FRAME_EXTRACTIONS)}")
    return value


def _fps(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_FPS:  # NaN fails as well
        raise voluptuous.Invalid(f"must be a number of frames per second from 0 to {MAX_FPS}")
    return value


def _source_fps(value: Any) -> float:
    if not _fps(value):
        raise voluptuous.Invalid("must be above 0; leave it out to use the rate in the file")
    return value


Validators = Mapping[str, Callable[[Any], Any]]

COMMON_KEYS: Validators = {
    "resolution": _resolution,
    "caption_extension": _caption_extension,
    "batch_size": _at_least_one,
    "num_repeats": _at_least_one,
    "enable_bucket": _switch,
    "bucket_no_upscale": _switch,
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
    "frame_extraction": _frame_extraction,
    "frame_stride": _at_least_one,
    "frame_sample": _at_least_one,
    "max_frames": _at_least_one,
    "target_fps": _fps,
    "source_fps": _source_fps,
}
OTHER_DATASET_KEYS: Validators = {"cache_directory": _path, "prior_preservation": _switch}
DATASET_KEYS: Validators = {**COMMON_KEYS, **dict.fromkeys(SOURCE_KEYS, _path), **OTHER_DATASET_KEYS, **VIDEO_KEYS}


def load_dataset_config(path: str | os.PathLike[str], *, require_media: bool = True) -> DatasetGroup:
    """Read and check a dataset TOML file.

    Relative paths in it start at the current folder. ``require_media=False`` accepts media folders and JSONL files that
    are gone, for training from caches alone.

    Raises:
        UserError: the file, the section and the key that is wrong, and what to write instead.
    """
    path = Path(path)
    content = read_toml(path, "dataset config")
    general, tables = _sections(path, content)
    common = _validate(path, "[general]", general, COMMON_KEYS)
    datasets = tuple(_dataset(path, index, common, table, require_media) for index, table in enumerate(tables))
    _refuse_shared_caches(path, datasets)
    return DatasetGroup(path, datasets)


def _sections(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for name in content:
        if name in DATASET_KEYS:
            raise UserError(f"{path}: {name} stands above the first section; move it below [general] or [[datasets]].")
        if name not in ("general", "datasets"):
            hint = nearest_name(name, ("general", "datasets")) or " The sections are [general] and [[datasets]]."
            raise UserError(f"{path} has an unknown section {name!r}.{hint}")
    general, tables = content.get("general", {}), content.get("datasets", [])
    if not isinstance(general, dict):
        raise UserError(f"{path}: [general] must stand in single brackets, and once.")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: each dataset starts with a line [[datasets]], in double brackets.")
    if not tables:
        raise UserError(f"{path} describes no dataset; add a [[datasets]] section with image_directory or video_directory.")
    return general, tables


def _validate(path: Path, section: str, table: dict[str, Any], validators: Validators) -> dict[str, Any]:
    """The converted values of one table; a UserError names the first key that is unknown or wrong."""
    for key in table:
        if key in validators:
            continue
        if key in DATASET_KEYS:
            raise UserError(f"{path}, {section}: {key} cannot stand here; move it to the [[datasets]] sections it is for.")
        hint = nearest_name(key, validators) or f" Known keys: {', '.join(validators)}."
        raise UserError(f"{path}, {section}: unknown key {key!r}.{hint}")
    schema = voluptuous.Schema({voluptuous.Optional(key): validator for key, validator in validators.items()})
    try:
        return schema(table)
    except voluptuous.MultipleInvalid as error:
        first = error.errors[0]
        key = str(first.path[0])
        end = "" if first.error_message.endswith((".", "?")) else "."
        raise UserError(f"{path}, {section}: {key} = {table[key]!r} {first.error_message}{end}") from error


def _dataset(path: Path, index: int, common: dict[str, Any], table: dict[str, Any], require_media: bool) -> DatasetConfig:
    section = dataset_label(index)
    values = {**common, **_validate(path, section, table, DATASET_KEYS)}
    sources = [key for key in SOURCE_KEYS if key in values]
    if len(sources) != 1:
        found = f"has {' and '.join(sources)}" if sources else "has no source of media"
        raise UserError(f"{path}, {section} {found}; give it exactly one of {', '.join(SOURCE_KEYS)}.")
    source_key = sources[0]
    source = values.pop(source_key)
    kind, form = SOURCE_KEYS[source_key]
    if kind == "image":
        for key in VIDEO_KEYS:
            if key in values:
                raise UserError(f"{path}, {section}: {key} is for videos, but {source_key} is given; remove it.")
    if require_media:
        _require_source(path, section, source_key, source)
    if form == "directory":
        values.setdefault("caption_extension", DEFAULT_CAPTION_EXTENSION)
        values.setdefault("cache_directory", source)
    else:
        values["caption_extension"] = None
    if "cache_directory" not in values:
        raise UserError(f"{path}, {section}: {source_key} needs a cache_directory, the folder for its cache files; add one.")
    if os.path.isfile(values["cache_directory"]):
        raise UserError(f"{path}, {section}: cache_directory {values['cache_directory']} is a file; name a folder.")
    sources_by_form = {"directory": None, "jsonl_file": None, form: source}
    dataset = DatasetConfig(index=index, kind=kind, **sources_by_form, **values)
    _warn_of_values_without_effect(path, dataset, table)
    return dataset


def _require_source(path: Path, section: str, key: str, source: Path) -> None:
    # os.path rather than Path: names that the system refuses count as missing there instead of raising OSError
    wants_folder = key.endswith("_directory")
    if os.path.isdir(source) if wants_folder else os.path.isfile(source):
        return
    if os.path.exists(source):
        wanted = "a file, but it must be a folder" if wants_folder else "a folder, but it must be a file"
        raise UserError(f"{path}, {section}: {key} {source} is {wanted}.")
    hint = "Check the spelling."
    if not source.is_absolute():
        hint = f"Relative paths start at the current folder, {Path.cwd()}."
        beside = path.parent / source
        if os.path.exists(beside):
            hint += f" There is a {os.path.realpath(beside)}: write that, or start the script in the folder of the config."
    raise UserError(f"{path}, {section}: {key} {source} does not exist. {hint}")


def _warn_of_values_without_effect(path: Path, dataset: DatasetConfig, table: dict[str, Any]) -> None:
    where = f"{path}, {dataset.label}"
    for key, mode in (("frame_stride", "slide"), ("frame_sample", "uniform"), ("max_frames", "full")):
        if key in table and dataset.frame_extraction != mode:
            logger.warning('%s: %s has an effect only with frame_extraction = "%s".', where, key, mode)
    if "target_frames" in table and dataset.frame_extraction == "full":
        logger.warning('%s: target_frames has no effect with frame_extraction = "full"; max_frames has.', where)
    if dataset.source_fps is not None and not dataset.target_fps:
        logger.warning("%s: source_fps has no effect with target_fps = 0, which keeps every frame.", where)
    if dataset.bucket_no_upscale and not dataset.enable_bucket:
        logger.warning("%s: bucket_no_upscale has an effect only with enable_bucket = true.", where)
    if not dataset.enable_bucket:
        only = bucket_resolutions(dataset.resolution, enable_bucket=False)[0]
        if only != dataset.resolution:
            message = "%s: resolution %dx%d is rounded down to %dx%d, multiples of %d."
            logger.warning(message, where, *dataset.resolution, *only, BUCKET_STEP)


def _refuse_shared_caches(path: Path, datasets: Iterable[DatasetConfig]) -> None:
    """Two datasets in one cache folder would read each other's files."""
    seen: dict[str, DatasetConfig] = {}
    for dataset in datasets:
        resolved = os.path.normcase(os.path.realpath(dataset.cache_directory))
        if resolved in seen:
            raise UserError(
                f"{path}: {seen[resolved].label} and number {dataset.index + 1} have the same cache folder, "
                f"{dataset.cache_directory}; give each its own cache_directory."
            )
        seen[resolved] = dataset
