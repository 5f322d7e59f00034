"""Generation in several processes: the files are those of one process, whoever samples what, and the main one makes the sheet."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from several_processes import in_each, join_threads
from variations import slow_but

import hv_generate_video
from hunyuan_model.sampling.generation import SamplingSettings
from networks.generation import batch
from networks.generation.requests import Request, share_of
from utils.errors import UserError
from utils.processes.ranks import Ranks
from utils.safetensors_io import read_header

LINES = "a ball --d 1\na cat --d 2 --s 4\na dog --w 48 --f 5\na cow\nan ox --l 4 --n a horse\n"


@pytest.fixture
def generate(bench, monkeypatch: pytest.MonkeyPatch, capsys):
    """``generate(count, *flags)``: what each process ended with, and what all printed; with no --prompt, five prompts."""
    prompts = bench.write("p.txt", LINES)
    join_threads(monkeypatch, hv_generate_video)

    def run(count: int, *flags: object, folder: str = "out", asks: tuple[object, ...] = ("--from_file", prompts)):
        models = ("--dit", bench.model.dit, "--vae", bench.model.vae, *bench.encoders, "--device", "cpu")
        size = ("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 2, "--output_type", "images")
        words = (*models, *size, "--save_path", bench.folder / folder, *asks, *flags)
        monkeypatch.setattr(sys, "argv", ["hv_generate_video.py", *map(str, words)])
        capsys.readouterr()
        return in_each(count, lambda ranks: hv_generate_video.main()), *capsys.readouterr()

    return run


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def equal(first: Path, second: Path) -> bool:
    """The same files with the same pictures, to the bit, and nothing else."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    one, other = pictures(first), pictures(second)
    return names[0] == names[1] and one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def watch_sampling(monkeypatch: pytest.MonkeyPatch, failing: str | None = None) -> Counter[str]:
    sampled, plain = Counter(), batch.Sampler.sample

    def sample(sampler, request, *rest):
        sampled[request.prompt] += 1
        if request.prompt == failing:
            raise UserError("too odd.")
        return plain(sampler, request, *rest)

    monkeypatch.setattr(batch.Sampler, "sample", sample)
    return sampled


@pytest.mark.parametrize("count", slow_but([2, 5], 2))
def test_files_and_sheet_are_those_of_one_process(generate, bench, monkeypatch, count: int) -> None:
    assert generate(1, "--seed", 5)[0] == [0]
    sampled = watch_sampling(monkeypatch)
    ended, printed, _ = generate(count, "--seed", 5, folder="shared")
    assert ended == [0] * count
    assert len(sampled) == 5 and set(sampled.values()) == {1}
    assert equal(bench.folder / "out", bench.folder / "shared")
    lines = printed.splitlines()
    assert len(lines) == len(set(lines)) == 8, "five results, and the sheet as PNG, MP4 and page"


def test_seeds_that_nobody_gave_are_those_of_the_main_process(generate, bench) -> None:
    ended, _, _ = generate(3, "--output_type", "latent")
    assert ended == [0] * 3
    files = sorted((bench.folder / "out").iterdir())
    assert len(files) == 5
    assert all(path.name.removesuffix("_latent.safetensors").endswith(f"_{read_header(path).metadata['seed']}") for path in files)


def test_a_comparison(generate, bench) -> None:
    asks = ("--xy", "seed=1,2", "steps=1,2,3", "--prompt", "a ball", "--sheet")
    assert generate(1, asks=(*asks, bench.folder / "one" / "xy.png"), folder="one")[0] == [0]
    assert generate(2, asks=(*asks, bench.folder / "two" / "xy.png"), folder="two")[0] == [0, 0]
    assert equal(bench.folder / "one", bench.folder / "two")


def test_what_fails_costs_one_result_and_is_named_once(generate, bench, monkeypatch, caplog) -> None:
    watch_sampling(monkeypatch, failing="a dog")
    ended, _, _ = generate(3, "--seed", 5)
    assert ended == [1, 0, 0]
    assert caplog.text.count("1 of 5 were not made: ") == 1 and "p.txt, line 3: too odd" in caplog.text
    assert len(pictures(bench.folder / "out")) == 4 + 1
    assert generate(1, "--seed", 5, folder="alone")[0] == [1]
    assert equal(bench.folder / "out", bench.folder / "alone")


def test_what_is_there_is_left_out(generate, bench, monkeypatch) -> None:
    assert generate(1, "--seed", 5)[0] == [0]
    before = pictures(bench.folder / "out")
    results = sorted(path for path in (bench.folder / "out").iterdir() if path.is_dir())
    for picture in [*results[1].iterdir(), *results[3].iterdir()]:
        picture.unlink()
    results[1].rmdir()
    results[3].rmdir()
    sampled = watch_sampling(monkeypatch)
    assert generate(2, "--seed", 5, "--skip_existing")[0] == [0, 0]
    assert sampled == {"a cat": 1, "a cow": 1}
    after = pictures(bench.folder / "out")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_swapped_weights_are_held_once_where_all_processes_sample(generate, bench, caplog) -> None:
    assert generate(1, "--seed", 5)[0] == [0]
    with caplog.at_level(logging.INFO):
        assert generate(2, "--seed", 5, "--blocks_to_swap", 3, folder="shared")[0] == [0, 0]
    assert "shared by 2 processes" in caplog.text or not hasattr(os, "memfd_create")
    assert equal(bench.folder / "out", bench.folder / "shared")
    result = next(path for path in (bench.folder / "shared").iterdir() if path.is_dir())
    shutil.rmtree(result)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert generate(2, "--seed", 5, "--blocks_to_swap", 3, "--skip_existing", folder="shared")[0] == [0, 0]
    assert result.exists() and "shared by" not in caplog.text, "one process samples"


def test_one_process_decodes_and_shows(generate, bench) -> None:
    assert generate(2, "--output_type", "latent", "--seed", 5)[0] == [0, 0]
    latents = sorted((bench.folder / "out").iterdir())
    ended, printed, _ = generate(2, asks=("--latent_path", *latents))
    assert ended == [None, None] and len(printed.splitlines()) == 5
    ended, printed, _ = generate(2, asks=("--show", latents[0]))
    assert ended == [None, None] and printed.count("a ball") == generate(1, asks=("--show", latents[0]))[1].count("a ball")


def test_requests_are_split_by_what_they_cost() -> None:
    def asks(steps: int, **others: object) -> Request:
        settings = {name: others.pop(name) for name in ("guidance_scale", "strength") if name in others}
        size = {"video_size": (32, 32), "video_length": 1}
        return Request("x", SamplingSettings(1, infer_steps=steps, **size, **settings), name=f"{steps}", **others)

    assert [asks(10).cost, asks(10, guidance_scale=2).cost] == [10 * 16, 20 * 16]
    assert asks(10, strength=0.5, image_path="x").cost == 5 * 16
    requests = [asks(1), asks(9), asks(4), asks(4)]
    shares = [share_of(requests, Ranks(index, 2)) for index in (0, 1)]
    assert shares == [[requests[1]], [requests[0], requests[2], requests[3]]]


def test_results_of_one_name_stay_together() -> None:
    settings = SamplingSettings(1, video_size=(32, 32), video_length=1, infer_steps=2)
    requests = [Request(str(place), settings, name="same" if place % 2 else str(place)) for place in range(6)]
    shares = [share_of(requests, Ranks(index, 2)) for index in (0, 1)]
    together = [request for request in requests if request.name == "same"]
    assert sorted(len([request for request in share if request in together]) for share in shares) == [0, 3]
    assert [request for share in shares for request in share if request in together] == together
