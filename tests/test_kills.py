"""Killed at any moment: nothing under a final name is ever half-written, and going on ends with the very same numbers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from examples.toy.make_concept import make_concept
from examples.toy.model_files import FOLDER, files_in
from utils.files import is_temporary
from utils.training_state import read_state_file

KILLING = Path(__file__).parent / "killing.py"
SECONDS = 400

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, to start the same script quickly many times"),
]


def run_plan(tmp_path: Path, script: str, arguments: list[object], kills: list[dict]) -> tuple[list[int], float]:
    """Exit statuses of the runs, the last of which was left alone, and how many seconds that one took."""
    plan = tmp_path / "plan.json"
    content = {"script": script, "arguments": [str(word) for word in arguments], "kills": kills}
    plan.write_text(json.dumps(content), encoding="utf-8")
    ended = subprocess.run([sys.executable, KILLING, plan], capture_output=True, text=True, timeout=SECONDS, check=True)
    statuses, seconds = zip(*json.loads(ended.stdout.splitlines()[-1]))
    return list(statuses), seconds[-1]


def some_kills(count: int, seconds: float, flushes: int, seed: object) -> list[dict]:
    """Half of them within the first ``seconds``, the others at one of the first ``flushes`` times that a file is flushed."""
    choose = random.Random(str(seed))
    return [
        {"at_flush": choose.randint(1, flushes)} if number % 2 else {"after": choose.uniform(0.05, 0.95) * seconds}
        for number in range(count)
    ]


def assert_whole(folder: Path) -> None:
    """Everything under a final name can be read to its end."""
    for path in folder.rglob("*.safetensors"):
        if not any(is_temporary(part) for part in (path, *path.parents)):
            with safe_open(path, "pt") as file:
                assert all(torch.isfinite(file.get_tensor(name).float()).all() for name in file.keys()), path
    for path in folder.glob("*-state"):
        if not is_temporary(path):
            read_state_file(path)


@pytest.fixture(scope="module")
def concept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model's data set of pictures and clips, cached."""
    folder = tmp_path_factory.mktemp("concept")
    toml, files = make_concept(folder, cache=folder / "cache"), files_in(FOLDER)
    encoders = ["--text_encoder1", files.text_encoder1, "--text_encoder2", files.text_encoder2]
    for script, flags in (("cache_latents", ["--vae", files.vae]), ("cache_text_encoder_outputs", encoders)):
        statuses, _ = run_plan(folder, script, ["--dataset_config", toml, *flags, "--device", "cpu"], [])
        assert statuses == [0]
    return toml


def training(concept: Path, output: Path, workers: int) -> list[object]:
    return [
        *("--dit", files_in(FOLDER).dit, "--dataset_config", concept, "--output_dir", output, "--output_name", "lora"),
        *("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--learning_rate", 1e-3, "--network_dropout", 0.1),
        *("--max_train_steps", 40, "--save_every_n_steps", 2, "--save_state", "--save_last_n_steps", 4, "--resume", "latest"),
        *("--loss_log", output / "loss.csv", "--seed", 5, "--max_data_loader_n_workers", workers),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_change_no_bit_of_a_training(concept: Path, tmp_path: Path, workers: int) -> None:
    statuses, seconds = run_plan(tmp_path, "hv_train_network", training(concept, tmp_path / "whole", workers), [])
    assert statuses == [0]
    kills = some_kills(10, 0.7 * seconds, 14, workers)  # about five flushes belong to one save, of a model and a state
    statuses, _ = run_plan(tmp_path, "hv_train_network", training(concept, tmp_path / "killed", workers), kills)
    assert statuses[-1] == 0 and statuses.count(-9) >= 8, statuses
    assert_whole(tmp_path / "killed")
    first, second = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "killed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "whole" / "loss.csv").read_text("utf-8") == (tmp_path / "killed" / "loss.csv").read_text("utf-8")
    # The last run finds and removes what the killed ones left of models and states; of the log only if it rewrites it.
    left = [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    assert not [name for name in left if "loss.csv" not in name]


@pytest.mark.parametrize("script", ["cache_latents", "cache_text_encoder_outputs"])
def test_killed_caching_is_completed_by_another_run(tmp_path: Path, script: str) -> None:
    files = files_in(FOLDER)
    models = ["--vae", files.vae] if script == "cache_latents" else []
    models = models or ["--text_encoder1", files.text_encoder1, "--text_encoder2", files.text_encoder2]
    flags = [*models, "--device", "cpu", "--skip_existing"]
    wanted, killed = (make_concept(tmp_path / name, cache=tmp_path / name / "cache") for name in ("wanted", "killed"))
    statuses, seconds = run_plan(tmp_path, script, ["--dataset_config", wanted, *flags], [])
    kills = some_kills(25, seconds, 4, script)
    statuses, _ = run_plan(tmp_path, script, ["--dataset_config", killed, *flags], kills)
    assert statuses[-1] == 0 and -9 in statuses, statuses
    assert_whole(tmp_path / "killed")

    def caches(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*_hv*.safetensors"))}

    first, second = caches(tmp_path / "wanted"), caches(tmp_path / "killed")
    assert first.keys() == second.keys() and first
    for name in first:
        assert first[name].keys() == second[name].keys(), name
        assert all(torch.allclose(first[name][key].float(), second[name][key].float(), atol=1e-4) for key in first[name]), name
