"""Training in two processes on the CPU: it goes on exactly where it stopped, shares swapped weights, and fails in both at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from wholeness import broken, unfinished

from utils.processes.locks import sole_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's launcher needs a server that torch lacks on Windows"),
]

SECONDS = 300
FULL_DISK = """
import sys

sys.path.insert(0, {root!r})

import hv_train_network
from networks.training.saving import state as training_state
from utils.errors import run_script


def save_tensors(*_, **__):
    open({marker!r}, "w").close()
    raise OSError(28, "No space left on device")


training_state.save_tensors = save_tensors
run_script(hv_train_network.main)
"""

NOT_LOADED = """
import os, sys

sys.path.insert(0, {root!r})

import hv_train_network
from hunyuan_model.runtime.offload import block_swap
from utils.errors import run_script


def host_copy(tensor):
    open({marker!r}, "w").close()
    raise OSError(5, "Input/output error")


if os.environ["RANK"] == {rank!r}:
    block_swap.host_copy = host_copy
run_script(hv_train_network.main)
"""

LEFT_OPEN = """
import atexit, sys

sys.path.insert(0, {root!r})

import torch.distributed

import hv_train_network
from utils.errors import run_script

atexit.register(lambda: torch.distributed.is_initialized() and print("a process group is left open", file=sys.stderr))
run_script(hv_train_network.main)
"""


@pytest.fixture
def launch(tiny_model, cached: Path, tmp_path: Path):
    """``launch(*flags, script=path)``: the ended launcher of two processes that train with these flags."""
    toml = cached.with_name("one_by_one.toml")  # five batches, three for each process
    toml.write_text(cached.read_text("utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    places = ("--num_processes", 2, "--num_machines", 1, "--main_process_port", 0)
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", *places, "--mixed_precision", "no", "--dynamo_backend", "no")
    base = ("--dit", tiny_model.dit, "--dataset_config", toml, "--output_dir", tmp_path / "out", "--seed", 3)
    flags = ("--max_data_loader_n_workers", 0, "--learning_rate", 1e-2, "--network_dropout", 0.2)
    # A cosine without transformers, which takes each process seconds to import.
    flags += ("--lr_scheduler_type", "torch.optim.lr_scheduler.CosineAnnealingLR", "--lr_scheduler_args", "T_max=4")
    # `--cpu` would start one process without MPI, whatever --num_processes says.
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "no_settings")}

    def run(*more: object, script: Path = ROOT / "hv_train_network.py") -> subprocess.CompletedProcess:
        words = [sys.executable, *launcher, script, *base, *flags, "--max_train_steps", 4, *more]
        command = [str(word) for word in words]
        return subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=SECONDS, check=False)

    return run


def test_two_processes_go_on_to_the_very_same_lora(launch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = launch("--output_name", "whole", "--save_every_n_steps", 1, "--save_state", "--loss_log", out / "whole.csv")
    assert whole.returncode == 0, whole.stderr
    state = out / "whole-step00000002-state"
    assert {path.name for path in state.glob("random-*.pt")} == {"random-0.pt", "random-1.pt"}
    noise = [torch.load(state / f"random-{rank}.pt", weights_only=True)["noise"] for rank in (0, 1)]
    assert not torch.equal(*noise), "each process draws its own noise"
    assert not broken(out) and not unfinished(out)
    assert whole.stderr.count(f"saved {out / 'whole_comfyui.safetensors'}") == 1, "one process saves"

    script = tmp_path / "left_open.py"
    script.write_text(LEFT_OPEN.format(root=str(ROOT)), encoding="utf-8")
    again = launch("--output_name", "again", "--resume", state, "--loss_log", out / "again.csv", script=script)
    assert again.returncode == 0, again.stderr
    assert "left open" not in again.stderr, "its threads would run on while Python ends"
    for copy in ("", "_comfyui"):
        first, second = (load_file(out / f"{name}{copy}.safetensors") for name in ("whole", "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    lines = [(out / f"{name}.csv").read_text("utf-8").splitlines() for name in ("whole", "again")]
    assert len(lines[0]) == 5 and lines[0][3:] == lines[1][1:]


def test_a_full_disk_in_one_process_ends_both_soon(launch, tmp_path: Path) -> None:
    """Only the main process writes the network of a state: the other one waits for it when it fails."""
    script, marker = tmp_path / "full_disk.py", tmp_path / "marker"
    script.write_text(FULL_DISK.format(root=str(ROOT), marker=str(marker)), encoding="utf-8")
    ended = launch("--output_name", "lora", "--save_every_n_steps", 1, "--save_state", script=script)
    seconds = time.time() - marker.stat().st_mtime
    assert ended.returncode == 1 and seconds < 60, f"ended {seconds:.0f} seconds after the failure: {ended.stderr}"
    print(f"both processes ended {seconds:.1f} seconds after the failure of one")
    assert "error: cannot write" in ended.stderr and "No space left on device" in ended.stderr
    assert not list((tmp_path / "out").glob("*-state")) and not unfinished(tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory that is found through a process")
def test_two_processes_share_swapped_weights_and_train_the_very_same_lora(launch, tmp_path: Path) -> None:
    runs = {"plain": (), "swapped": ("--blocks_to_swap", 3, "--img_in_txt_in_offloading")}
    ended = {name: launch("--output_name", name, *flags) for name, flags in runs.items()}
    for run in ended.values():
        assert run.returncode == 0, run.stderr
    assert "shared by" not in ended["plain"].stderr
    assert ended["swapped"].stderr.count("shared by 2 processes") == 1 and "of their own" not in ended["swapped"].stderr
    first, second = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in runs)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_fails_while_it_loads_ends_both_soon(launch, tmp_path: Path, rank: str) -> None:
    script, marker = tmp_path / "not_loaded.py", tmp_path / "marker"
    script.write_text(NOT_LOADED.format(root=str(ROOT), marker=str(marker), rank=rank), encoding="utf-8")
    ended = launch("--output_name", "lora", "--blocks_to_swap", 3, script=script)
    seconds = time.time() - marker.stat().st_mtime
    assert ended.returncode == 1 and seconds < 60, f"ended {seconds:.0f} seconds after the failure: {ended.stderr}"
    assert "Input/output error" in ended.stderr and "shared by" not in ended.stderr


def test_two_processes_are_one_run_and_both_end_where_another_has_the_name(launch, tmp_path: Path) -> None:
    with sole_run(tmp_path / "out" / ".lora.lock", "trains lora", ""):
        ended = launch("--output_name", "lora")
    assert "error: another run trains lora" in ended.stderr and "(exitcode: 2)" in ended.stderr, "which the launcher says"
    assert ended.returncode == 1
    assert not (tmp_path / "out").exists()
