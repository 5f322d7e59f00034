"""Caching and generation as accelerate launch starts them in two processes: what one makes, failures and kills."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from wholeness import broken, unfinished

from utils.media.reading import read_frames

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's launcher needs a server that torch lacks on Windows"),
]

SECONDS = 300
KILLED = """
import os, signal, sys

sys.path.insert(0, {root!r})

import cache_latents
from dataset.cache.latents import LatentEncoder
from utils.errors import run_script


def save(*_):
    open({marker!r}, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)


if os.environ["RANK"] == {rank!r}:
    LatentEncoder.save = save
run_script(cache_latents.main)
"""


@pytest.fixture
def launch(tmp_path: Path):
    """``launch(script, *flags)``: the ended launcher of two processes."""
    places = ("--num_processes", 2, "--num_machines", 1, "--main_process_port", 0)
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", *places, "--mixed_precision", "no", "--dynamo_backend", "no")
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "no_settings")}

    def run(script: Path | str, *flags: object) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, (*launcher, ROOT / script, *flags))]
        return subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=SECONDS, check=False)

    return run


@pytest.fixture
def caching(tiny_model, tiny_dataset: Path) -> dict[str, list[object]]:
    """The flags of both scripts; one picture of the dataset is damaged."""
    (tiny_dataset.parent / "images" / "damaged.jpg").write_bytes(b"no picture")
    (tiny_dataset.parent / "images" / "damaged.txt").write_text("nothing", encoding="utf-8")
    base = ["--dataset_config", tiny_dataset, "--device", "cpu", "--batch_size", 1]
    encoders = ["--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2]
    return {"cache_latents": [*base, "--vae", tiny_model.vae], "cache_text_encoder_outputs": [*base, *encoders]}


def tensors(folder: Path, ending: str = "*.safetensors") -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.rglob(ending))}


def same(first: dict[str, dict[str, torch.Tensor]], second: dict[str, dict[str, torch.Tensor]]) -> bool:
    return first.keys() == second.keys() and all(
        first[path].keys() == second[path].keys()
        and all(torch.equal(first[path][name], second[path][name]) for name in first[path])
        for path in first
    )


@pytest.mark.parametrize(("script", "status"), [("cache_latents", 1), ("cache_text_encoder_outputs", 0)])
def test_two_processes_cache_what_one_does(launch, call_script, caching, tiny_dataset: Path, script: str, status: int) -> None:
    alone = call_script(script, *caching[script])
    expected = tensors(tiny_dataset.parent)
    for path in tiny_dataset.parent.rglob("*.safetensors"):
        path.unlink()
    ended = launch(f"{script}.py", *caching[script])
    assert alone.status == ended.returncode == status, ended.stderr
    assert same(tensors(tiny_dataset.parent), expected) and len(expected) > 6
    assert ended.stdout == alone.stdout, "one table at the start, and one at the end"
    named = [line for line in ended.stderr.splitlines() if "damaged.jpg" in line]
    assert ended.stderr.count("1 failure(s)") == len(named) == status
    assert ended.stderr.count("Traceback") == status, "that of the launcher"
    assert not unfinished(tiny_dataset.parent) and not list(tiny_dataset.parent.rglob("*.lock"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_ends_both_and_another_run_goes_on(
    launch, call_script, caching, tiny_dataset, tmp_path, rank
) -> None:
    script, marker, folder = tmp_path / "killed.py", tmp_path / "marker", tiny_dataset.parent
    script.write_text(KILLED.format(root=str(ROOT), marker=str(marker), rank=rank), encoding="utf-8")
    ended = launch(script, *caching["cache_latents"])
    seconds = time.time() - marker.stat().st_mtime
    assert ended.returncode == 1 and seconds < 60, f"ended {seconds:.0f} seconds after the kill: {ended.stderr}"
    print(f"both processes ended {seconds:.1f} seconds after one was killed")
    assert not broken(folder) and not unfinished(folder)
    assert launch("cache_latents.py", *caching["cache_latents"], "--skip_existing").returncode == 1, "for the damaged picture"
    found = tensors(folder)
    assert call_script("cache_latents", *caching["cache_latents"]).status == 1
    assert same(tensors(folder), found)


def test_two_processes_generate_what_one_does(launch, call_script, bench) -> None:
    lines = "a ball --d 1\na cat --d 2 --s 4\na dog --w 48 --f 5\na cow\nan ox --l 4 --n a horse\n"
    models = ("--dit", bench.model.dit, "--vae", bench.model.vae, *bench.encoders, "--device", "cpu", "--seed", 5)
    size = ("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 2, "--output_type", "both")
    flags = (*models, *size, "--from_file", bench.write("p.txt", lines))
    one, two = bench.folder / "one", bench.folder / "two"
    assert call_script("hv_generate_video", *flags, "--save_path", one).status == 0
    ended = launch("hv_generate_video.py", *flags, "--blocks_to_swap", 3, "--save_path", two)
    assert ended.returncode == 0, ended.stderr
    assert "shared by 2 processes" in ended.stderr or not hasattr(os, "memfd_create")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and len(names) == 5 * 2 + 3
    assert same(tensors(one), tensors(two))
    clips = [name for name in names if name.startswith("p_0") and name.endswith(".mp4")]
    assert all(np.array_equal(read_frames(one / name), read_frames(two / name)) for name in clips) and len(clips) == 5
    assert sorted(ended.stdout.split()) == sorted(str(two / name) for name in names)
    assert ended.stderr.count("swapped weights save no memory") == 1, "which both would say"
    assert "Traceback" not in ended.stderr
