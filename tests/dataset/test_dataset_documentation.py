"""What dataset_config.md says is what the code does: its files load, its keys and defaults are complete, its picture is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dataset.config import DATASET_KEYS, DatasetConfig, load_dataset_config
from dataset.media.buckets import bucket_resolutions
from dataset.media.decoding import VIDEO_EXTENSIONS
from dataset.media.frames import FRAME_EXTRACTIONS, cut_windows
from dataset.media.pictures import IMAGE_EXTENSIONS

TEXT = (Path(__file__).resolve().parents[2] / "dataset" / "dataset_config.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("example", "datasets"), list(zip(EXAMPLES, [1, 1, 4], strict=True)))
def test_the_files_shown_are_accepted(tmp_path, caplog, example, datasets):
    (tmp_path / "data.toml").write_text(example, encoding="utf-8")
    assert len(load_dataset_config(tmp_path / "data.toml", require_media=False).datasets) == datasets
    assert not caplog.records


def test_every_key_has_a_row_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \|(.*?)\| .*\|$", TEXT, re.MULTILINE))
    assert set(rows) == set(DATASET_KEYS)
    defaults = {key: rows[key].strip(" `") for key in rows}
    fields = DatasetConfig.__dataclass_fields__
    assert defaults.pop("caption_extension") == '".txt"'
    for key, written in defaults.items():
        if key not in fields or key == "cache_directory":
            continue
        default = fields[key].default
        if default is None:
            assert written == "that of the file", key
            continue
        if isinstance(default, bool | str):
            assert written == (f'"{default}"' if isinstance(default, str) else str(default).lower()), key
        else:
            assert written == str(list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize("mode", FRAME_EXTRACTIONS)
def test_the_picture_shows_the_windows_that_are_cut(mode):
    part = re.search(rf"^{mode}  .*?(?:\n\n|\n```)", TEXT, re.MULTILINE | re.DOTALL)[0]
    video = re.search(r"^video +(#+)$", TEXT, re.MULTILINE)
    drawn = [(bar.start(), len(bar[0])) for line in part.splitlines() if (bar := re.search(r"\[=*\]", line))]
    written = [(int(first), int(last)) for first, last in re.findall(r"frames +(\d+) to +(\d+)", part)]
    options = dict(re.findall(r"frame_(stride|sample) = (\d+)", part))
    windows = cut_windows(len(video[1]), [9], mode, **{key: int(value) for key, value in options.items()})
    left = video.start(1) - video.start()
    assert [(start - left, length) for start, length in drawn] == windows
    assert [(first, last - first + 1) for first, last in written] == windows


def test_the_endings_and_the_buckets_named_are_those_of_the_code():
    pictures, videos = (re.search(rf"^- {kind}: (.*?)$", TEXT, re.MULTILINE)[1] for kind in ("pictures", "videos"))
    assert set(re.findall(r"\.\w+", pictures)) == IMAGE_EXTENSIONS
    assert set(re.findall(r"\.\w+", videos)) == VIDEO_EXTENSIONS
    buckets = bucket_resolutions((960, 544), enable_bucket=True)
    first, last = buckets[0], buckets[-1]
    assert f"{len(buckets)} sizes from {first[0]}x{first[1]} to {last[0]}x{last[1]}" in " ".join(TEXT.split())
