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
SHARDED = ("--use_fsdp", "--fsdp_version", 2, "--num_processes", 2, "--num_machines", 1, "--dynamo_backend", "no")
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_offload_params: true
"""
ONE_SHORT = ("--validation_split", 0.4)  # of five items three are left: one process has no batch in every other step


@pytest.fixture
def run(tiny_model, cached: Path, tmp_path: Path):
    """``run(launcher's flags or (), name, *flags)``: the ended training of that name."""
    toml = cached.with_name("one_by_one.toml")
    toml.write_text(cached.read_text("utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    write_lora(tiny_model.dit, tmp_path / "base.safetensors")
    flags = ("--dit", tiny_model.dit, "--dataset_config", toml, "--output_dir", tmp_path / "out", "--seed", 3)
    flags += ("--max_data_loader_n_workers", 0, "--learning_rate", 1e-2, "--base_weights", tmp_path / "base.safetensors")
    flags += ("--int8_base", "--gradient_checkpointing", "--max_train_steps", 4, *ONE_SHORT)
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "no_settings")}

    def train(engine: tuple[object, ...], name: str, *more: object) -> subprocess.CompletedProcess:
        launcher = ("-m", "accelerate.commands.launch", *engine, "--main_process_port", 0, "--mixed_precision", "no")
        words = [sys.executable, *(launcher if engine else ()), ROOT / "hv_train_network.py", *flags]
        words += ["--output_name", name, "--loss_log", tmp_path / f"{name}.csv", *more]
        command = [str(word) for word in words]
        ended = subprocess.run(
            command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended

    return train


def numbers(path: Path, column: str) -> list[float]:
    with path.open(encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_sharded_weights_train_the_same_lora(run, tiny_model, tmp_path: Path) -> None:
    run((), "one", "--gradient_accumulation_steps", 2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball --w 32 --h 32 --s 2\na cube --w 32 --h 32 --f 5 --s 1 --d 4\n", encoding="utf-8")
    samples = ("--sample_prompts", prompts, "--vae", tiny_model.vae, "--sample_at_first", "--sample_every_n_steps", 2)
    samples += ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    saving = ("--save_every_n_steps", 2, "--save_state")
    said = run(SHARDED, "sharded", "--dry_step", "always", *saving, *samples).stderr
    assert said.count("are shared by 2 processes") == 1
    assert "size of the updates relative to the weights they change" in said
    for column in ("loss", "validation_loss"):
        first, second = (numbers(tmp_path / f"{name}.csv", column) for name in ("one", "sharded"))
        assert len(first) == len(second) > 0 and second == pytest.approx(first, rel=1e-5)
    first, second = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("one", "sharded"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)  # what Adam makes of rounding
    made = {"_".join(path.name.split("_")[1:3]) for path in (tmp_path / "out" / "sample").iterdir()}
    assert made == {f"{step:06d}_{index:02d}" for step in (0, 2, 4) for index in (0, 1)}

    config = tmp_path / "fsdp.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    run(("--config_file", config), "again", "--resume", tmp_path / "out" / "sharded-step00000002-state")
    resumed = load_file(tmp_path / "out" / "again.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in second.items())
