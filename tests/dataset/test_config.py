"""The dataset TOML: what is accepted, with which defaults, and the sentence for each mistake."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import utils.toml_files
from dataset import load_dataset_config
from utils.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder with pictures/, clips/ and a JSONL file."""
    for name in ("pictures", "clips"):
        (tmp_path / name).mkdir()
    (tmp_path / "list.jsonl").write_text('{"image_path": "a.png", "caption": "a"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: Path, text: str, **options):
    (folder / "data.toml").write_text(text, encoding="utf-8")
    return load_dataset_config(folder / "data.toml", **options)


PICTURES = '[[datasets]]\nimage_directory = "pictures"\n'
CLIPS = '[[datasets]]\nvideo_directory = "clips"\n'


def test_datasets_override_general(folder):
    group = load(
        folder,
        """
        [general]
        resolution = [640, 480]
        caption_extension = ".caption"
        batch_size = 2
        num_repeats = 3
        enable_bucket = true
        bucket_no_upscale = true

        [[datasets]]
        image_directory = "pictures"

        [[datasets]]
        video_jsonl_file = "list.jsonl"
        cache_directory = "cache"
        resolution = 256
        batch_size = 1
        enable_bucket = false
        bucket_no_upscale = false
        target_frames = [25, 1, 25]
        frame_extraction = "uniform"
        frame_sample = 4
        """,
    )
    pictures, clips = group.datasets
    assert group.path == folder / "data.toml"
    assert pictures.resolution == (640, 480)
    assert pictures.caption_extension == ".caption"
    assert (pictures.batch_size, pictures.num_repeats, pictures.enable_bucket, pictures.bucket_no_upscale) == (2, 3, True, True)
    assert (clips.kind, clips.directory, clips.jsonl_file) == ("video", None, Path("list.jsonl"))
    assert (clips.index, clips.label, clips.source) == (1, "[[datasets]] number 2", Path("list.jsonl"))
    assert clips.cache_directory == Path("cache")
    assert clips.caption_extension is None
    assert (clips.resolution, clips.batch_size, clips.num_repeats) == ((256, 256), 1, 3)
    assert (clips.enable_bucket, clips.bucket_no_upscale) == (False, False)
    assert (clips.target_frames, clips.frame_extraction, clips.frame_sample) == ((1, 25), "uniform", 4)


def test_one_number_and_an_extension_without_a_dot_are_understood(folder):
    (dataset,) = load(folder, CLIPS + 'target_frames = 9\ncaption_extension = "caption"').datasets
    assert (dataset.target_frames, dataset.caption_extension) == ((9,), ".caption")


def test_byte_order_mark_and_windows_line_ends(folder):
    text = ("\ufeff" + PICTURES + "# 絵\n").replace("\n", "\r\n")
    (folder / "data.toml").write_bytes(text.encode("utf-8"))
    assert load_dataset_config(folder / "data.toml").datasets[0].kind == "image"


MISTAKES = {
    "no dataset": ("[general]\nbatch_size = 1\n", ["describes no dataset", "[[datasets]]"]),
    "misspelt section": ('[[dataset]]\nimage_directory = "pictures"\n', ["'dataset'", "Did you mean 'datasets'?"]),
    "foreign section": ('[quux]\nx = 1\n[[datasets]]\nimage_directory = "pictures"\n', ["'quux'", "[general] and [[datasets]]"]),
    "single brackets": ('[datasets]\nimage_directory = "pictures"\n', ["[[datasets]]", "double brackets"]),
    "double brackets": ("[[general]]\nbatch_size = 1\n" + PICTURES, ["[general]", "single brackets"]),
    "key above the sections": ("batch_size = 1\n" + PICTURES, ["batch_size stands above the first section"]),
    "misspelt key in the second dataset": (PICTURES + CLIPS + 'frame_extract = "head"\n', ["number 2", "'frame_extraction'?"]),
    "misspelt general key": ("[general]\nenable_buckets = true\n" + PICTURES, ["[general]", "'enable_bucket'?"]),
    "unrelated key": (PICTURES + "zzz = 1\n", ["'zzz'", "Known keys: resolution"]),
    "key of other models": (PICTURES + 'control_directory = "x"\n', ["control_directory is for models that are given control"]),
    "key in the wrong section": ("[general]\ntarget_frames = [1]\n" + CLIPS, ["[general]", "target_frames", "move it to"]),
    "no source": ("[[datasets]]\nbatch_size = 1\n", ["has no source of media", "video_jsonl_file"]),
    "two sources": (PICTURES + 'video_directory = "clips"\n', ["has image_directory and video_directory", "exactly one"]),
    "video key for pictures": (PICTURES + "target_frames = [1]\n", ["target_frames is for videos", "image_directory"]),
    "JSONL without cache": ('[[datasets]]\nimage_jsonl_file = "list.jsonl"\n', ["image_jsonl_file needs a cache_directory"]),
    "JSONL missing": ('[[datasets]]\nvideo_jsonl_file = "no.jsonl"\ncache_directory = "c"\n', ["no.jsonl does not exist"]),
    "name too long": (f'[[datasets]]\nimage_directory = "{"x" * 5000}"\n', ["does not exist"]),
    "file for a folder": ('[[datasets]]\nimage_directory = "list.jsonl"\n', ["must be a folder"]),
    "folder for a file": ('[[datasets]]\nimage_jsonl_file = "pictures"\ncache_directory = "c"\n', ["must be a file"]),
    "cache is a file": (PICTURES + 'cache_directory = "list.jsonl"\n', ["cache_directory list.jsonl is a file"]),
    "path without quotes": ("[[datasets]]\nimage_directory = 3\n", ["image_directory = 3 must be a path in quotes"]),
    "text for a number": (PICTURES + 'batch_size = "2"\n', ["number 1", "batch_size = '2' must be a whole number"]),
    "switch for a number": (PICTURES + "batch_size = true\n", ["batch_size = True must be a whole number"]),
    "zero": (CLIPS + "frame_stride = 0\n", ["frame_stride = 0 must be a whole number from 1 to"]),
    "text for a switch": ('[general]\nbucket_no_upscale = "true"\n' + PICTURES, ["[general]", "without quotes"]),
    "resolution of three": (PICTURES + "resolution = [1, 2, 3]\n", ["resolution = [1, 2, 3] must be [width, height]"]),
    "small resolution": (PICTURES + "resolution = [960, 8]\n", ["resolution = [960, 8]", "from 16 to 8192"]),
    "huge resolution": (PICTURES + f"resolution = [{'9' * 26}, 16]\n", ["resolution", "from 16 to 8192"]),
    "frames not 4n+1": (CLIPS + "target_frames = [1, 24]\n", ["4n+1", "instead of 24 write 21 or 25"]),
    "empty list of frames": (CLIPS + "target_frames = []\n", ["must be a list of frame counts"]),
    "unknown extraction": (
        CLIPS + 'frame_extraction = "uniforms"\n',
        ["'uniforms' must be one of head, chunk, slide, uniform, full."],
    ),
    "negative rate": (CLIPS + "target_fps = -1\n", ["target_fps = -1 must be a number from 0 to 1000"]),
    "rate of nothing": (CLIPS + "source_fps = nan\n", ["source_fps = nan must be a number from 0.001 to 1000"]),
    "one cache folder by two names": (
        PICTURES + 'cache_directory = "cache"\n' + CLIPS + 'cache_directory = "clips/../cache"\n',
        ["number 1 and number 2", "its own cache_directory"],
    ),
    "Windows path": ('[[datasets]]\nimage_directory = "C:\\Users\\me"\n', ["not valid TOML", "line 2", "C:/folder"]),
    "Windows path with a tab in it": ('[[datasets]]\nimage_directory = "C:\\train"\n', ["control characters", "C:/folder"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(folder, name):
    text, parts = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        load(folder, text)
    message = str(caught.value)
    assert "data.toml" in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_the_parser_for_older_pythons_says_the_same(folder, monkeypatch):
    monkeypatch.setattr(utils.toml_files.sys, "version_info", (3, 10))
    test_mistakes_are_named(folder, "Windows path")
    assert load(folder, PICTURES).datasets[0].kind == "image"


def test_a_path_beside_the_config_is_hinted_at(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(UserError) as caught:
        load(folder, PICTURES)
    assert str((folder / "pictures").resolve()) in str(caught.value)


def test_training_from_caches_needs_no_media(folder):
    text = '[[datasets]]\nimage_directory = "moved_away"\ncache_directory = "cache"\n'
    with pytest.raises(UserError, match="does not exist"):
        load(folder, text)
    assert load(folder, text, require_media=False).datasets[0].cache_directory == Path("cache")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (CLIPS + "frame_stride = 4\n", 'frame_stride has an effect only with frame_extraction = "slide"'),
        (CLIPS + "target_fps = 0\nsource_fps = 30\n", "source_fps has no effect with target_fps = 0"),
        (CLIPS + "max_frames = 4\n", 'max_frames has an effect only with frame_extraction = "full"'),
        (CLIPS + 'frame_extraction = "full"\ntarget_frames = [5]\n', 'target_frames has no effect with frame_extraction = "full"'),
        (CLIPS + "frame_sample = 4\n", 'frame_sample has an effect only with frame_extraction = "uniform"'),
        (PICTURES + "bucket_no_upscale = true\n", "only with enable_bucket = true"),
        (PICTURES + "resolution = [1000, 550]\n", "resolution 1000x550 is rounded down to 992x544"),
    ],
)
def test_values_without_effect_are_mentioned(folder, caplog, text, part):
    with caplog.at_level(logging.WARNING):
        load(folder, text)
    assert part in caplog.text


def test_ordinary_configs_give_no_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        load(folder, "[general]\nenable_bucket = true\nbucket_no_upscale = true\n" + PICTURES + CLIPS)
    assert not caplog.records
