"""The loss on held-out items: what is held out, that it is measured alike every time, and that it changes nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from conftest import write_caches
from safetensors.torch import load_file

from dataset import load_dataset_config
from dataset.batches.cached_items import find_cached_items, hold_out
from utils.errors import UserError


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A dataset of ten pictures of one size."""
    write_caches(tmp_path / "many", {f"picture {number}": (1, 4, 4) for number in range(10)}, seed=2)
    toml = tmp_path / "many.toml"
    toml.write_text(
        f"[general]\nresolution = [32, 32]\nbatch_size = 2\n[[datasets]]\n"
        f"image_directory = '{tmp_path / 'gone'}'\ncache_directory = '{tmp_path / 'many'}'\n",
        encoding="utf-8",
    )
    return toml


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_share_is_held_out_whole_clips_together(tmp_path: Path, many: Path) -> None:
    groups = find_cached_items(load_dataset_config(many, require_media=False))
    kept, held_out = hold_out(groups, 0.3, seed=1)
    assert len(held_out) == 3 and len(kept[0].items) == 7
    assert not {item.stem for item in held_out} & {item.stem for item in kept[0].items}
    assert [item.stem for item in hold_out(groups, 0.3, seed=1)[1]] == [item.stem for item in held_out]
    assert any([item.stem for item in hold_out(groups, 0.3, seed)[1]] != [item.stem for item in held_out] for seed in range(2, 6))
    assert len(hold_out(groups, 0.01, seed=1)[1]) == 1 and len(hold_out(groups, 0.99, seed=1)[1]) == 9


def test_windows_of_one_clip_are_not_divided(tmp_path: Path) -> None:
    write_caches(tmp_path / "clips", {"a": (2, 4, 4), "b": (2, 4, 4)})
    for path in (tmp_path / "clips").glob("*00000-005*"):
        path.with_name(path.name.replace("00000-005", "00005-005")).write_bytes(path.read_bytes())
    toml = tmp_path / "clips.toml"
    toml.write_text(
        f"[general]\nresolution = [32, 32]\n[[datasets]]\nvideo_directory = '{tmp_path / 'gone'}'\n"
        f"cache_directory = '{tmp_path / 'clips'}'\ntarget_frames = [5]\nframe_extraction = 'chunk'\n",
        encoding="utf-8",
    )
    kept, held_out = hold_out(find_cached_items(load_dataset_config(toml, require_media=False)), 0.5, seed=0)
    assert len(held_out) == 2 and len({item.stem for item in held_out}) == 1 and len(kept[0].items) == 2


def test_a_data_set_of_one_cannot_be_divided(tmp_path: Path) -> None:
    write_caches(tmp_path / "one", {"a": (1, 4, 4)})
    toml = tmp_path / "one.toml"
    toml.write_text(
        f"[general]\nresolution = [32, 32]\n[[datasets]]\nimage_directory = '{tmp_path / 'gone'}'\n"
        f"cache_directory = '{tmp_path / 'one'}'\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="every dataset without prior_preservation has only one"):
        hold_out(find_cached_items(load_dataset_config(toml, require_media=False)), 0.5, seed=0)


def test_it_is_logged_when_asked_and_changes_nothing(train, many: Path, tmp_path: Path) -> None:
    flags = ("--max_train_steps", 4, "--learning_rate", 1e-2, "--network_dropout", 0.3, "--validation_split", 0.2)
    for name, every in (("often", 1), ("seldom", 2)):
        ended = train(*flags, "--validate_every_n_steps", every, "--loss_log", tmp_path / f"{name}.csv", name=name, dataset=many)
        assert ended.status == 0, ended.stderr
    often, seldom = rows(tmp_path / "often.csv"), rows(tmp_path / "seldom.csv")
    assert [row["loss"] for row in often] == [row["loss"] for row in seldom]
    first, second = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("often", "seldom"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(row["validation_loss"] for row in often)
    measured = [row["validation_loss"] for row in seldom]
    assert [bool(value) for value in measured] == [False, True, False, True]
    assert (measured[1], measured[3]) == (often[1]["validation_loss"], often[3]["validation_loss"])
    assert len({row["validation_loss"] for row in often}) == 4


@pytest.mark.slow
def test_without_learning_it_is_the_same_every_time(train, many: Path, tmp_path: Path) -> None:
    flags = ("--max_train_steps", 8, "--learning_rate", 1e-30, "--validation_split", 0.2)
    ended = train(*flags, "--loss_log", tmp_path / "loss.csv", dataset=many)
    assert ended.status == 0, ended.stderr
    measured = [row["validation_loss"] for row in rows(tmp_path / "loss.csv")]
    assert measured[3] == measured[7] != "" and measured[0] == "", "after each epoch of four steps"
    assert len({row["loss"] for row in rows(tmp_path / "loss.csv")}) == 8


@pytest.mark.parametrize(
    ("flags", "says"),
    [(("--validation_split", 1), "below 1"), (("--validate_every_n_steps", 2), "--validation_split")],
)
def test_impossible_flags_are_refused(train, flags: tuple, says: str) -> None:
    ended = train(*flags)
    assert ended.status == 2 and says in ended.stderr
