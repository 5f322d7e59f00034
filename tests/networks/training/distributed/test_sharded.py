"""Training with sharded weights (FSDP2) in two processes on the CPU: the same losses, LoRA and samples as without."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from tiny.variants import write_lora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's launcher needs a server that torch lacks on Windows"),
]

SECONDS = 300
PLAIN, SHARDED = ("--multi_gpu",), ("--use_fsdp", "--fsdp_version", 2)
ONE_SHORT = ("--validation_split", 0.4)  # of five items three are left: one process has no batch in every other step


@pytest.fixture
def launch(tiny_model, cached: Path, tmp_path: Path):
    """``launch(launcher's flags, *flags)``: the ended launcher of two processes that train with these flags."""
    toml = cached.with_name("one_by_one.toml")
    toml.write_text(cached.read_text("utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    write_lora(tiny_model.dit, tmp_path / "base.safetensors")
    places = (
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--main_process_port",
        0,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    flags = ("--dit", tiny_model.dit, "--dataset_config", toml, "--output_dir", tmp_path / "out", "--seed", 3)
    flags += ("--max_data_loader_n_workers", 0, "--learning_rate", 1e-2, "--base_weights", tmp_path / "base.safetensors")
    flags += ("--int8_base", "--gradient_checkpointing", "--max_train_steps", 4)
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "no_settings")}

    def run(engine: tuple[object, ...], name: str, *more: object) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "accelerate.commands.launch", *engine, *places, ROOT / "hv_train_network.py", *flags]
        words += ["--output_name", name, "--loss_log", tmp_path / f"{name}.csv", *more]
        command = [str(word) for word in words]
        return subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=SECONDS, check=False)

    return run


def numbers(path: Path, column: str) -> list[float]:
    with path.open(encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_sharded_weights_train_the_same_lora(launch, tiny_model, tmp_path: Path) -> None:
    plain = launch(PLAIN, "plain", *ONE_SHORT)
    assert plain.returncode == 0, plain.stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball --w 32 --h 32 --s 2\na cube --w 32 --h 32 --f 5 --s 1 --d 4\n", encoding="utf-8")
    samples = ("--sample_prompts", prompts, "--vae", tiny_model.vae, "--sample_at_first", "--sample_every_n_steps", 2)
    samples += ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    saving = ("--save_every_n_steps", 2, "--save_state")
    sharded = launch(SHARDED, "sharded", "--dry_step", "always", *saving, *samples, *ONE_SHORT)
    assert sharded.returncode == 0, sharded.stderr
    assert sharded.stderr.count("are shared by 2 processes") == 1 and "shared by" not in plain.stderr
    assert "size of the updates relative to the weights they change" in sharded.stderr
    for column in ("loss", "validation_loss"):
        first, second = (numbers(tmp_path / f"{name}.csv", column) for name in ("plain", "sharded"))
        assert len(first) == len(second) > 0 and second == pytest.approx(first, rel=1e-5)
    first, second = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("plain", "sharded"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)  # what Adam makes of rounding
    made = {"_".join(path.name.split("_")[1:3]) for path in (tmp_path / "out" / "sample").iterdir()}
    assert made == {f"{step:06d}_{index:02d}" for step in (0, 2, 4) for index in (0, 1)}

    state = tmp_path / "out" / "sharded-step00000002-state"
    again = launch(SHARDED, "again", "--resume", state, *ONE_SHORT)
    assert again.returncode == 0, again.stderr
    resumed = load_file(tmp_path / "out" / "again.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in second.items())
