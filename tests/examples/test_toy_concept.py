"""The dataset of the quickstart."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dataset import load_dataset_config
from dataset.items import list_items, settle_captions
from dataset.media.decoding import iterate_frames
from dataset.media.pictures import read_image
from examples.toy.make_concept import CACHE, CLIPS, CONCEPT, KNOWN_CLIPS, KNOWN_PICTURES, PICTURES, ROOT, make_concept
from examples.toy.world import COLOURS

ZORPS, KNOWN = ("pictures", "clips"), ("known_pictures", "known_clips")
SMALL = 400_000  # bytes that a dataset in the repository may take


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The concept as the script writes it now."""
    return make_concept(tmp_path_factory.mktemp("concept"), cache=CACHE).parent


def media(folder: Path, ending: str, parts: tuple[str, ...]) -> list[Path]:
    return sorted(path for part in parts for path in (folder / part).glob(f"*{ending}"))


def frames_of(path: Path) -> np.ndarray:
    return read_image(path)[None] if path.suffix == ".png" else np.stack(list(iterate_frames(path)))


# ---------------------------------------------------------------------------------------------------------------------
# The dataset


def test_the_repository_holds_what_the_script_writes(made: Path) -> None:
    names = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(CONCEPT) for path in sorted(CONCEPT.rglob("*")) if path.is_file()]
    for name in names:
        if name.suffix == ".txt":
            assert (made / name).read_text("utf-8") == (CONCEPT / name).read_text("utf-8"), name  # whatever git makes of line ends
        elif name.suffix != ".toml":
            new, kept = frames_of(made / name).astype(int), frames_of(CONCEPT / name).astype(int)
            assert new.shape == kept.shape and np.abs(new - kept).max() <= 1, name  # numpy's last digit may differ
    moved = made.as_posix()
    assert (made / "dataset.toml").read_text("utf-8").replace(moved, CONCEPT.relative_to(ROOT).as_posix()) == (
        CONCEPT / "dataset.toml"
    ).read_text("utf-8")
    assert sum((CONCEPT / name).stat().st_size for name in names) < SMALL


def test_the_data_set_loads_in_the_project_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    datasets = load_dataset_config(CONCEPT / "dataset.toml").datasets
    pictures, clips, known_pictures, known_clips = datasets
    assert (pictures.kind, clips.kind, clips.target_frames) == ("image", "video", (9,))
    assert (known_pictures.kind, known_clips.kind) == ("image", "video")
    assert {dataset.resolution for dataset in datasets} == {(64, 64)}
    items = [list_items(dataset) for dataset in datasets]
    settle_captions([item for some in items for item in some], "error")
    assert [len(some) for some in items] == [len(PICTURES), len(CLIPS), KNOWN_PICTURES, KNOWN_CLIPS]
    assert len(items[0]) == 10 and len(items[1]) == 2


def test_captions_name_the_zorp_and_its_background_and_no_colour_of_it() -> None:
    seen = set()
    for path in media(CONCEPT, ".txt", ZORPS):
        caption = path.read_text(encoding="utf-8").strip()
        words = re.findall(r"\w+", caption)
        assert words.count("zorp") == 1 and not {"star", "striped", "pink", "teal"} & set(words), caption
        (background,) = [word for word in words if word in COLOURS]
        assert background in path.stem
        seen.add(background)
    assert seen == set(COLOURS)
