"""Training in two processes on the CPU: it goes on exactly where it stopped, shares swapped weights, and fails in both at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from launching import environment, launcher
from launching import launch as start
from safetensors.torch import load_file
from wholeness import broken, unfinished

from utils.processes.locks import sole_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's launcher needs a server that torch lacks on Windows"),
]

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
    if {killed}:
        os.kill(os.getpid(), 9)
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


WATCHED = """
import os
import sys

sys.path.insert(0, {root!r})

import torch
import torch.distributed

import hv_train_network
from networks.training import loop, step
from networks.training.loss.flow_matching import FlowMatching
from utils.errors import run_script

gradients, losses, sent, forwards = [], [], [], []
inside = False


def watch(name):
    plain = getattr(torch.distributed, name)

    def call(*arguments, **options):
        tensor = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[1]
        if inside:
            sent[-1].append((name, tensor.nbytes))
        return plain(*arguments, **options)

    setattr(torch.distributed, name, call)


for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "all_gather_object"):
    watch(name)
clip, train_step, loss_at = step._clip, loop.train_step, FlowMatching.loss_at


def noted_clip(training):
    parameters = [parameter for parameter in training.network.parameters() if parameter.requires_grad]
    gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    return clip(training)


def noted_step(training, batches):
    global inside
    inside = True
    sent.append([])
    forwards.append(0)
    made = train_step(training, batches)
    inside = False
    losses.append(made.loss)
    return made


def counted(*arguments):
    forwards[-1] += 1
    return loss_at(*arguments)


step._clip, loop.train_step, FlowMatching.loss_at = noted_clip, noted_step, counted


def main():
    status = hv_train_network.main()
    if os.environ.get("RANK", "0") == "0":
        torch.save(dict(gradients=gradients, losses=losses, sent=sent, forwards=forwards), {folder!r} + "/watched.pt")
    return status


run_script(main)
"""


@pytest.fixture
def launch(tiny_model, cached: Path, tmp_path: Path):
    """``launch(*flags, script=path, processes=2)``: the ended launcher of processes that train with these flags."""
    toml = cached.with_name("one_by_one.toml")  # five batches
    toml.write_text(cached.read_text("utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    base = ("--dit", tiny_model.dit, "--dataset_config", toml, "--output_dir", tmp_path / "out", "--seed", 3)
    flags = ("--max_data_loader_n_workers", 0, "--learning_rate", 1e-2, "--max_train_steps", 4)
    # A cosine without transformers, which takes each process seconds to import.
    flags += ("--lr_scheduler_type", "torch.optim.lr_scheduler.CosineAnnealingLR", "--lr_scheduler_args", "T_max=4")

    def run(*more: object, script: Path = ROOT / "hv_train_network.py", processes: int = 2) -> subprocess.CompletedProcess:
        return start(processes, script, *base, *flags, *more, home=tmp_path / "no_settings")

    return run


@pytest.fixture
def watched(launch, tmp_path: Path):
    """``watched(name, *flags, processes=2)``: what ``WATCHED`` notes of a training that ends well."""

    def run(name: str, *flags: object, processes: int) -> SimpleNamespace:
        script = tmp_path / "watched.py"
        script.write_text(WATCHED.format(root=str(ROOT), folder=str(tmp_path)), encoding="utf-8")
        ended = launch("--output_name", name, *flags, script=script, processes=processes)
        assert ended.returncode == 0, ended.stderr
        return SimpleNamespace(**torch.load(tmp_path / "watched.pt", weights_only=True), log=ended.stderr)

    return run


def test_the_number_of_processes_changes_no_gradient(watched, tmp_path: Path) -> None:
    """Five items in steps of four, and of one; noise, timesteps and weights are those of one process that accumulates."""
    runs = {
        processes: watched(f"of{processes}", "--gradient_accumulation_steps", 4 // processes, processes=processes)
        for processes in (1, 2, 4)
    }
    one = runs.pop(1)
    assert len(one.gradients) == 4 and not any(one.sent)
    for processes, run in runs.items():
        for step, (alone, together) in enumerate(zip(one.gradients, run.gradients, strict=True)):
            # The weights of later steps differ by the rounding of those before them.
            most = 1e-6 * alone.abs().max() if step == 0 else 1e-6
            assert (together - alone).abs().max() <= most, f"{processes} processes, step {step + 1}"
        assert run.losses == pytest.approx(one.losses, rel=1e-6)
    first, *others = (load_file(tmp_path / "out" / f"of{processes}.safetensors") for processes in (1, 2, 4))
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-4)


def test_a_step_sends_the_gradients_once_and_nothing_while_it_accumulates(watched) -> None:
    run = watched("lora", "--gradient_accumulation_steps", 2, processes=2)
    assert run.log.count("the processes wait for each other for about") == 1, "pictures and clips do not divide evenly"
    network = run.gradients[0].numel() * 4
    for calls in run.sent:  # of each step
        assert [name for name, _ in calls] == ["all_reduce"]
        assert network <= sum(size for _, size in calls) <= 1.05 * network
    assert max(run.forwards) == 2


def test_two_processes_go_on_to_the_very_same_lora(launch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dropout = ("--network_dropout", 0.2)
    whole = launch("--output_name", "whole", *dropout, "--save_every_n_steps", 1, "--save_state", "--loss_log", out / "whole.csv")
    assert whole.returncode == 0, whole.stderr
    state = out / "whole-step00000002-state"
    assert not broken(out) and not unfinished(out)
    assert whole.stderr.count(f"saved {out / 'whole_comfyui.safetensors'}") == 1, "one process saves"

    script = tmp_path / "left_open.py"
    script.write_text(LEFT_OPEN.format(root=str(ROOT)), encoding="utf-8")
    again = launch("--output_name", "again", *dropout, "--resume", state, "--loss_log", out / "again.csv", script=script)
    assert again.returncode == 0, again.stderr
    assert "left open" not in again.stderr, "its threads would run on while Python ends"
    for copy in ("", "_comfyui"):
        first, second = (load_file(out / f"{name}{copy}.safetensors") for name in ("whole", "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    lines = [(out / f"{name}.csv").read_text("utf-8").splitlines() for name in ("whole", "again")]
    assert len(lines[0]) == 5 and lines[0][3:] == lines[1][1:]


def test_one_process_goes_on_where_two_stopped(launch, tmp_path: Path) -> None:
    """In the middle of an epoch of five items: with two, one."""
    out, accumulate = tmp_path / "out", "--gradient_accumulation_steps"
    whole = launch("--output_name", "whole", "--save_every_n_steps", 1, "--save_state")
    assert whole.returncode == 0, whole.stderr
    state = ("--resume", out / "whole-step00000002-state")
    alone = launch("--output_name", "alone", *state, accumulate, 2, processes=1)
    assert alone.returncode == 0, alone.stderr
    assert "processes 2, now 1" in alone.stderr and "epoch 1 goes on with its batch 5" in alone.stderr
    assert "steps have as many batches as before" in alone.stderr
    first, second = (load_file(out / f"{name}.safetensors") for name in ("whole", "alone"))
    torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-4)


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
    """Beside checkpointing and quantized weights, whose inputs of blocks are in host memory, too."""
    both = ("--int8_base", "--gradient_checkpointing")
    swap = ("--blocks_to_swap", 3, "--img_in_txt_in_offloading", "--gradient_checkpointing_cpu_offload")
    runs = {"plain": (), "swapped": swap}
    ended = {name: launch("--output_name", name, *both, *flags) for name, flags in runs.items()}
    for run in ended.values():
        assert run.returncode == 0, run.stderr
    assert "shared by" not in ended["plain"].stderr
    assert ended["swapped"].stderr.count("shared by 2 processes") == 1 and "copies" not in ended["swapped"].stderr
    first, second = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in runs)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("rank", "killed"), [("0", False), ("1", True)], ids=["raises", "killed"])
def test_a_process_that_fails_while_it_loads_ends_both_soon(launch, tmp_path: Path, rank: str, killed: bool) -> None:
    script, marker = tmp_path / "not_loaded.py", tmp_path / "marker"
    script.write_text(NOT_LOADED.format(root=str(ROOT), marker=str(marker), rank=rank, killed=killed), encoding="utf-8")
    ended = launch("--output_name", "lora", "--blocks_to_swap", 3, script=script)
    seconds = time.time() - marker.stat().st_mtime
    assert ended.returncode == 1 and seconds < 60, f"ended {seconds:.0f} seconds after the failure: {ended.stderr}"
    assert ("SIGKILL" if killed else "Input/output error") in ended.stderr and "shared by" not in ended.stderr


def test_two_processes_are_one_run_and_both_end_where_another_has_the_name(launch, tmp_path: Path) -> None:
    with sole_run(tmp_path / "out" / ".lora.lock", "trains lora", ""):
        ended = launch("--output_name", "lora")
    assert "error: another run trains lora" in ended.stderr and "(exitcode: 2)" in ended.stderr, "which the launcher says"
    assert ended.returncode == 1
    assert not (tmp_path / "out").exists()


def test_a_signal_to_the_launcher_and_its_processes_saves_and_stops(tiny_model, cached: Path, tmp_path: Path) -> None:
    """As clusters send it; the launcher passes it on to the processes and whatever they started, so that each gets it twice."""
    flags = ("--dit", tiny_model.dit, "--dataset_config", cached, "--output_dir", tmp_path / "out", "--output_name", "lora")
    flags += ("--max_train_steps", 100_000, "--max_data_loader_n_workers", 1, "--loss_log", tmp_path / "loss.csv")
    command = [*launcher(2), "hv_train_network.py", *map(str, flags)]
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path / "no_settings"), stdout=log, stderr=log)
        try:
            losses = tmp_path / "loss.csv"
            while process.poll() is None and not (losses.is_file() and len(losses.read_text("utf-8").splitlines()) > 1):
                time.sleep(0.2)  # until both have made a step
            ranks = psutil.Process(process.pid).children()
            process.terminate()
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
    text = (tmp_path / "log").read_text("utf-8")
    assert "stopped after step" in text and "reads the caches" not in text, text
    saved = sorted(path.name.partition("-step")[2][8:] for path in (tmp_path / "out").glob("*-step*"))
    assert saved == ["-state", ".safetensors"]
