"""Processes that die, are started again, or are on two machines: the LoRA is that of a training without all this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launching import environment, launch, launcher
from safetensors.torch import load_file
from wholeness import broken, unfinished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's launcher needs a server that torch lacks on Windows"),
]

DIES = """
import os, signal, sys

sys.path.insert(0, {root!r})

import hv_train_network
from networks.training import loop
from utils.errors import run_script

train_step = loop.train_step


def dies(training, batches):
    if os.environ["RANK"] == "1" and training.progress.step == 3 and not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(training, batches)


loop.train_step = dies
run_script(hv_train_network.main)
"""

COUNTS = """
import os, sys

sys.path.insert(0, {root!r})

import hv_train_network
from networks.training import loop
from utils.errors import run_script

train_step, sent = loop.train_step, []


def sent_so_far():
    with open("/proc/self/net/dev") as file:
        lines = [line.split() for line in file if ":" in line]
    return sum(int(words[9]) for words in lines if words[0] != "lo:")


def counted(training, batches):
    before = sent_so_far()
    made = train_step(training, batches)
    sent.append(sent_so_far() - before)
    size = sum(parameter.numel() * 4 for parameter in training.network.parameters())
    with open({counts!r} + os.environ["RANK"], "w") as file:
        file.write(repr([size, *sent]))
    return made


loop.train_step = counted
run_script(hv_train_network.main)
"""


@pytest.fixture
def flags(tiny_model, cached: Path, tmp_path: Path):
    """``flags(name, *more)``: those of a training of six steps that saves its state every second step."""
    toml = cached.with_name("one_by_one.toml")  # five batches
    toml.write_text(cached.read_text("utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    own = ("--dit", tiny_model.dit, "--dataset_config", toml, "--output_dir", tmp_path / "out", "--seed", 3, "--max_train_steps", 6)
    own += (
        "--max_data_loader_n_workers",
        0,
        "--network_dropout",
        0.2,
        "--save_every_n_steps",
        2,
        "--save_state",
        "--network_dim",
        16,
    )
    return lambda name, *more: [str(word) for word in (*own, "--output_name", name, *more)]


def assert_same_lora(folder: Path, first: str, second: str) -> None:
    one, other = (load_file(folder / f"{name}.safetensors") for name in (first, second))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_process_ends_all_and_they_go_on_by_hand_or_by_the_launcher(flags, tmp_path: Path) -> None:
    out, home, script = tmp_path / "out", tmp_path / "no_settings", tmp_path / "dies.py"
    whole = launch(2, ROOT / "hv_train_network.py", *flags("whole"), home=home)
    assert whole.returncode == 0, whole.stderr

    marker = tmp_path / "died"
    script.write_text(DIES.format(root=str(ROOT), marker=str(marker)), encoding="utf-8")
    ended = launch(2, script, *flags("killed", "--resume", "latest"), home=home)
    seconds = time.time() - marker.stat().st_mtime
    assert ended.returncode != 0 and seconds < 60, f"ended {seconds:.0f} seconds after the kill"
    assert "Signal 9 (SIGKILL)" in ended.stderr, "which the launcher says"
    assert not (out / "killed.safetensors").exists() and not broken(out)
    again = launch(2, script, *flags("killed", "--resume", "latest"), home=home)
    assert again.returncode == 0 and "resumed from" in again.stderr, again.stderr
    assert_same_lora(out, "whole", "killed")

    marker.unlink()
    restarting = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "1",
        "--master_port",
        "0",
        "--standalone",
    )
    command = [sys.executable, *restarting, str(script), *flags("restarted", "--resume", "latest")]
    own = environment(home) | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else the second attempt may read addresses of the first
    ended = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0 and marker.exists(), ended.stderr
    assert_same_lora(out, "whole", "restarted")
    assert not unfinished(out)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable: 10.79.0.1 and 10.79.0.2."""
    names = [f"musubi{os.getpid()}{letter}" for letter in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}"]
    for number, name in enumerate(names, start=1):
        commands += [f"ip -n {name} addr add 10.79.0.{number}/24 dev cable", f"ip -n {name} link set cable up"]
        commands += [f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("network namespaces need Linux, iproute2 and the right to make them")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_machines_train_the_lora_of_two_processes_and_send_little_more_than_its_size(machines, flags, tmp_path: Path) -> None:
    home, script = tmp_path / "no_settings", tmp_path / "counts.py"
    local = launch(2, ROOT / "hv_train_network.py", *flags("local"), home=home)
    assert local.returncode == 0, local.stderr
    script.write_text(COUNTS.format(root=str(ROOT), counts=str(tmp_path / "sent")), encoding="utf-8")
    running = []
    for rank, machine in enumerate(machines):
        places = ("--num_machines", 2, "--machine_rank", rank, "--main_process_ip", "10.79.0.1", "--main_process_port", 29555)
        command = ["ip", "netns", "exec", machine, *launcher(2, *places), str(script), *flags("remote")]
        own = environment(home) | {"GLOO_SOCKET_IFNAME": "cable"}
        running.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert_same_lora(tmp_path / "out", "local", "remote")
    size, *sent = json.loads((tmp_path / "sent0").read_text("utf-8"))
    print(f"a LoRA of {size} bytes; sent in each step: {sent}")
    assert all(0.95 * size <= each <= 1.05 * size for each in sent)
