"""docs/advanced_config.md: its recipes train, and its tables say what the code does."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest
import torch
from documented_commands import ROOT
from safetensors.torch import load_file
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from networks.training.arguments import build_training_parser
from networks.training.loss.timestep_sampling import TimestepSettings, loss_weights, timesteps_from_uniform
from utils.cli.settings import settings_from

TEXT = (ROOT / "docs" / "advanced_config.md").read_text(encoding="utf-8")
RECIPES = [line for block in re.findall(r"^```text\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
OF_OTHERS = re.compile(r"(?<=--optimizer_type )(prodigyopt|lion_pytorch|schedulefree)(?=\.)")
ROW = re.compile(r"^\| `(--timestep_sampling [^`]+)`[^|]* \|" + r" (\d+) \|" * 3 + "$", re.MULTILINE)


def parse(flags: str):
    return build_training_parser().parse_args(shlex.split(flags))


def test_every_recipe_is_one_line_of_flags():
    assert len(RECIPES) >= 14
    for recipe in RECIPES:
        assert recipe.startswith("--")
        parse(recipe)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "huggingface" not in recipe])
def test_every_recipe_trains(train, tmp_path, recipe):
    package = OF_OTHERS.search(recipe)
    if package and importlib.util.find_spec(package[0]) is None:
        pytest.skip(f"{package[0]} is not installed")
    rate = () if "--learning_rate" in recipe else ("--learning_rate", 1e-3)
    ended = train(*shlex.split(recipe), *rate, "--max_train_steps", 2)
    assert ended.status == 0, ended.stderr
    lora = load_file(tmp_path / "out" / "lora.safetensors")
    assert any(weight.any() for name, weight in lora.items() if "lora_up" in name), "nothing was learned"


def test_lora_plus_and_prodigy_are_refused_together(train):
    pytest.importorskip("prodigyopt")
    ended = train("--optimizer_type", "prodigyopt.Prodigy", "--learning_rate", 1, "--network_args", "loraplus_lr_ratio=4")
    assert ended.status == 2 and "different lr values" in ended.stderr.splitlines()[-1]


def test_the_table_of_timesteps():
    rows = ROW.findall(TEXT)
    assert len(rows) == 14
    tenths = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for flags, *stated in rows:
        drawn = timesteps_from_uniform(u, settings_from(TimestepSettings, parse(flags))).double() * 1000
        assert drawn.quantile(tenths).tolist() == pytest.approx([int(value) for value in stated], abs=1.1), flags


def test_the_table_of_weights():
    for scheme in ("cosmap", "sigma_sqrt"):
        stated = [float(cell) for cell in re.search(rf"^\| `{scheme}` \| (.*) \|$", TEXT, re.MULTILINE)[1].split(" | ")]
        weights = loss_weights(torch.tensor([0.001, 0.1, 0.5, 0.9, 1.0]), scheme)
        assert weights.tolist() == pytest.approx(stated, rel=0.01)


def test_every_schedule_is_there():
    schedules = TEXT.partition("## Learning rate over time")[2].partition("\n## ")[0]
    missing = [kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION if f"`{kind.value}`" not in schedules]
    assert not missing
