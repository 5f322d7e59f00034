"""--xy: what axes hold, which requests they make, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from hunyuan_model.sampling.generation import SamplingSettings
from networks.generation.comparison import Comparison, order_of_checkpoint, read_axis
from networks.generation.requests import Request
from utils.errors import UserError

BASE = Request("a ball", SamplingSettings(seed=3, video_size=(32, 32), video_length=1, infer_steps=4))


def values(text: str) -> list[object]:
    return [value.value for value in read_axis(text).values]


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "zorp",
        "zorp-000002",
        "zorp-000010",
        "zorp-step00000300",
        "zorp-step00000020",
        "zorp_comfyui",
        "other/zorp",
        "a, b",
        "x[1]",
    ):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=1, 2,3", [1, 2, 3]),
        ("multiplier=0,0.5,-1", [0, 0.5, -1]),
        ("infer_steps=5", [5]),  # a flag's own name
        ("cfg=1,4.5", [1, 4.5]),
        ('prompt="a, b",c', ["a, b", "c"]),
        ('prompt="say ""hello"", twice"', ['say "hello", twice']),
        ("prompt=猫が歩く,a=b", ["猫が歩く", "a=b"]),
        ("lora=zorp.safetensors,none", ["zorp.safetensors", None]),
        ("lora=zorp-0*.safetensors", ["zorp-000002.safetensors", "zorp-000010.safetensors"]),
        ('lora="a, b.safetensors",x[1].safetensors', ["a, b.safetensors", "x[1].safetensors"]),
    ],
)
def test_axes_are_read(loras: None, text: str, expected: list[object]) -> None:
    assert values(text) == expected


def test_checkpoints_stand_in_the_order_of_training_the_final_one_last(loras: None) -> None:
    found = values("lora=zorp*.safetensors")
    assert [str(path).removesuffix(".safetensors") for path in found] == [
        *("zorp-000002", "zorp-000010", "zorp-step00000020", "zorp-step00000300", "zorp")
    ]
    assert sorted(["l-step00000009.pt", "l.pt", "l-step00000010.pt"], key=order_of_checkpoint)[-1] == "l.pt"


def test_a_pattern_leaves_out_copies_of_what_it_finds(loras: None, caplog) -> None:
    caplog.set_level("INFO")
    assert "zorp_comfyui.safetensors" not in values("lora=zorp*.safetensors")
    assert "left out copies of others in another layout: zorp_comfyui.safetensors" in caplog.text
    assert values("lora=*_comfyui.safetensors") == ["zorp_comfyui.safetensors"]


def test_home_is_found_within_an_axis(loras: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert values("lora=~/zorp-0*.safetensors")[0] == str(tmp_path / "zorp-000002.safetensors")


def test_labels_say_what_a_value_is(loras: None) -> None:
    labels = [value.label for value in read_axis("lora=zorp.safetensors,other/zorp.safetensors,none,x[1].safetensors").values]
    assert labels == ["zorp.safetensors", "other/zorp.safetensors", "none", "x[1]"]
    assert [value.label for value in read_axis("guidance=6,7.50").values] == ["guidance 6", "guidance 7.50"]


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# two\na ball, red\n\n猫\n", encoding="utf-8")
    assert values(f"prompt=@{tmp_path / 'prompts.txt'}") == ["a ball, red", "猫"]
    (tmp_path / "options.txt").write_text("a ball --s 4\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"options\.txt, line 1 has options"):
        read_axis(f"prompt=@{tmp_path / 'options.txt'}")


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("stepz=1,2", "seed=1"), "compares no 'stepz'. Did you mean 'steps'"),
        (("seed", "steps=1"), "wants name=value"),
        (("seed=1", "seed=2"), "has seed twice"),
        (("steps=1", "infer_steps=2"), "has steps twice"),
        (("seed=", "steps=1"), "lacks a value"),
        (("seed=1,,2", "steps=1"), "lacks a value"),
        (("seed=1,two", "steps=1"), "--xy seed: 'two' is not a whole number"),
        (("steps=0", "seed=1"), "--xy steps: '0' is not a whole number from 1"),
        (("guidance=nan", "seed=1"), "neither NaN nor infinite"),
        (("cfg=-1", "seed=1"), "--xy cfg: '-1' is not a finite number of at least 0"),
        (("seed=1,1", "steps=1"), "has 'seed 1' twice"),
        (('prompt="a, b', "steps=1"), "quotes that do not belong together"),
        (("prompt=a --s 4,b", "steps=1"), "holds an option of a prompt line"),
        (("lora=gone-*.safetensors", "seed=1"), "no file matches the pattern gone-*.safetensors"),
        (("prompt=@gone.txt", "seed=1"), "gone.txt does not exist"),
        ((f"seed={','.join(map(str, range(20)))}", f"steps={','.join(map(str, range(1, 21)))}"), "asks for 400 results; 256"),
    ],
)
def test_what_cannot_be_compared_is_refused(loras: None, texts: tuple[str, str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        Comparison.read(texts)
    assert says in str(refused.value)


def test_a_cell_has_the_values_of_its_column_and_row() -> None:
    grid = Comparison.read(("seed=1,2,3", "guidance=5,6")).grid(BASE)
    found = [[(request.sampling.seed, request.sampling.embedded_cfg_scale) for request in row] for row in grid]
    assert found == [[(1, 5), (2, 5), (3, 5)], [(1, 6), (2, 6), (3, 6)]]
    assert [request.name for request in grid[1]] == ["xy_2_1", "xy_2_2", "xy_2_3"]
    assert str(grid[1][2]) == "--xy, 'seed 3', 'guidance 6'"
    assert all(request.sampling.infer_steps == 4 and request.prompt == "a ball" for row in grid for request in row)


def test_multipliers_are_of_all_lora_or_of_the_compared_one(loras: None) -> None:
    both = BASE.changed({"lora_multiplier": (1.0, 0.3)})
    grid = Comparison.read(("multiplier=0,0.5", "seed=1")).grid(both)
    assert [request.lora_multiplier for request in grid[0]] == [(0, 0), (0.5, 0.5)]
    # One more than there are files of --lora_weight: that of the compared ones.
    axis = "lora=zorp-000002.safetensors,zorp.safetensors,none"
    grid = Comparison.read((axis, "seed=1")).grid(both)
    assert [request.lora_multiplier for request in grid[0]] == [(1, 0.3, 0), (1, 0, 0.3), (1, 0, 0)]
    grid = Comparison.read(("multiplier=0,2", axis)).grid(both)
    assert [[request.lora_multiplier for request in row] for row in grid] == [
        [(1, 0, 0), (1, 2, 0)],
        [(1, 0, 0), (1, 0, 2)],
        [(1, 0, 0), (1, 0, 0)],
    ]
    with pytest.raises(UserError, match="there is none: give --lora_weight"):
        Comparison.read(("multiplier=0,2", "seed=1")).grid(BASE)


def test_cells_that_ask_for_the_same_are_made_once(loras: None) -> None:
    base = BASE.changed({"lora_multiplier": (1.0,)})
    grid = Comparison.read(("lora=zorp.safetensors,none", "multiplier=0,1")).grid(base)
    assert [[request.name for request in row] for row in grid] == [["xy_1_1", "xy_1_1"], ["xy_2_1", "xy_1_1"]]


def test_a_cell_that_cannot_be_sampled_is_named() -> None:
    with pytest.raises(UserError, match="--xy, 'strength 2', 'seed 1'"):
        Comparison.read(("strength=0.5,2", "seed=1")).grid(BASE)
