"""Killed at any moment: nothing under a final name is ever half-written, and going on ends with the very same numbers."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from killing import Run
from safetensors.torch import load_file
from wholeness import LOG, is_saved, unfinished

from examples.toy.make_concept import CONCEPT
from examples.toy.model_files import FOLDER, files_in

KILLING = Path(__file__).resolve().parents[3] / "killing.py"
SECONDS = 900
KILLED = -9
SAVED_IN_A_STEP = 12  # flushes: four of a model, eight of a state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, to start the same script quickly many times"),
]


@dataclass(frozen=True)
class Runs:
    """All runs of a plan: the one that was left alone from the start, those that were to be killed, and the one after them."""

    whole: Run
    killed: list[Run]
    last: Run

    def inside(self) -> list[bool]:
        """Of each kill whether it fell inside a save: what it had written of a model, a state or a cache file is still there."""
        return [any(is_saved(name) for name in run.left) for run in self.killed]


def run_plan(tmp_path: Path, script: str, whole: list[object], killed: list[object], watched: Path, kills: list[dict]) -> Runs:
    """Runs of which every one was killed that should be, and after each of which everything was whole."""
    plan = tmp_path / f"{script}.json"
    content = {
        "script": script,
        "whole": [str(word) for word in whole],
        "killed": [str(word) for word in killed],
        "watched": str(watched),
        "kills": kills,
    }
    plan.write_text(json.dumps(content), encoding="utf-8")
    command, one_thread = [sys.executable, KILLING, plan], os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    first, *others, last = (Run(**run) for run in json.loads(ended.stdout))
    runs = Runs(first, others, last)
    said = plan.with_suffix(".log").read_text("utf-8", errors="replace")[-5000:]
    assert (first.status, last.status) == (0, 0), said
    for kill, run in zip(kills, others):
        assert run.status == KILLED, f"a run with the plan {kill} ended before it was killed, with {run}: {said}"
    for kill, run in zip([{}, *kills, {}], [first, *others, last]):
        assert not run.broken, f"broken after a run with the plan {kill}: {run}"
    seconds = [run.cpu_seconds for run in (first, *others, last)]
    tell_of_kills(script, kills, runs.inside())
    print(f"processor: {sum(seconds):.0f} s, {seconds[0]:.1f} unkilled")
    return runs


def some_kills(count: int, flushes: int, seed: object) -> list[dict]:
    """Every second one inside a save; the others in turn at a random moment, at a flush, at a renaming, and at a removal.

    All of them come within so many ``flushes``. Those inside a save are there by their plan, however fast the machine is, for a
    save makes at least as many calls while it has something half-written as it flushes.
    """
    choose = random.Random(str(seed))

    def inside() -> dict:
        return {"inside": choose.randint(1, flushes)}

    kinds = (
        *(inside, lambda: {"after": choose.uniform(0.1, 1)}),
        *(inside, lambda: {"fsync": choose.randint(1, flushes)}),
        *(inside, lambda: {"replace": choose.randint(1, flushes // 3 + 1)}),
        *(inside, lambda: {"unlink": choose.randint(1, flushes * 2 // 3)}),
    )
    kills = [kinds[number % len(kinds)]() for number in range(count)]
    return [kill | {"fsync": kill.get("fsync", flushes)} for kill in kills]


def tell_of_kills(script: str, kills: list[dict], inside: list[bool]) -> None:
    """How many fell inside a save, for each kind of kill."""
    kinds = [next(iter(kill)) for kill in kills]
    total, hits = Counter(kinds), Counter(kind for kind, hit in zip(kinds, inside) if hit)
    by_kind = ", ".join(f"{kind} {hits[kind]} of {number}" for kind, number in total.items())
    print(f"{script}: {sum(inside)} of {len(kills)} kills inside a save: {by_kind}")


def assert_same(first: Path, second: Path) -> None:
    """The same tensors under the same names, to the bit."""
    tensors, others = load_file(first), load_file(second)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def call_main(script: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        assert not importlib.import_module(script).main()


def write_toml(path: Path, datasets: dict[str, str], cache: Path) -> Path:
    """Data sets of folders of the toy model's concept; ``datasets``: from the name of a folder to further keys."""
    text = "[general]\nresolution = [64, 64]\ncaption_extension = '.txt'\nbatch_size = 2\n"
    for name, keys in datasets.items():
        kind = "video" if "clips" in name else "image"
        text += f"[[datasets]]\n{kind}_directory = '{CONCEPT / name}'\ncache_directory = '{cache / name}'\n{keys}\n"
    path.write_text(text, encoding="utf-8")
    return path


CLIPS = "target_frames = [9]\nframe_extraction = 'slide'\nframe_stride = 4"


@pytest.fixture(scope="module")
def concept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures and six windows of clips, cached by the toy model's VAE and text encoders."""
    folder, files = tmp_path_factory.mktemp("concept"), files_in(FOLDER)
    toml = write_toml(folder / "dataset.toml", {"pictures": "", "clips": CLIPS}, folder / "cache")
    encoders = ("--text_encoder1", files.text_encoder1, "--text_encoder2", files.text_encoder2)
    call_main("cache_latents", "--dataset_config", toml, "--vae", files.vae, "--device", "cpu")
    call_main("cache_text_encoder_outputs", "--dataset_config", toml, *encoders, "--device", "cpu")
    return toml


def training(dit: Path, dataset: Path, output: Path, *flags: object) -> list[object]:
    """A training that saves a model and a state after every step and keeps the last two."""
    return [
        *("--dit", dit, "--dataset_config", dataset, "--output_dir", output, "--output_name", "lora"),
        *("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--learning_rate", 1e-3, "--network_dropout", 0.1),
        *("--save_every_n_steps", 1, "--save_state", "--save_last_n_steps", 1, "--resume", "latest"),
        *("--loss_log", output / LOG, "--seed", 5, *flags),
    ]


def killed_training(tmp_path: Path, dit: Path, dataset: Path, kills: list[dict], steps: int, workers: int, inside: int) -> None:
    """Train to the end in spite of the kills, ``inside`` of them within a save, and compare with what was never killed."""
    flags = ("--max_train_steps", steps, "--max_data_loader_n_workers", workers)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    plain, again = (training(dit, dataset, folder, *flags) for folder in (whole, killed))
    runs = run_plan(tmp_path, "hv_train_network", plain, again, killed, kills)
    assert sum(runs.inside()) >= inside, f"only {sum(runs.inside())} of {len(kills)} kills fell inside a save"
    assert_same(whole / "lora.safetensors", killed / "lora.safetensors")
    assert (whole / LOG).read_text("utf-8") == (killed / LOG).read_text("utf-8")
    # The last run finds and removes what the killed ones left of models and states; of the log only if it rewrites it.
    assert not [path for path in unfinished(killed) if is_saved(path)]
    assert sorted(path.name for path in killed.glob("lora*")) == sorted(path.name for path in whole.glob("lora*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_change_no_bit_of_a_training(concept: Path, tmp_path: Path, workers: int) -> None:
    flushes = 2 * SAVED_IN_A_STEP + 4  # a run that is killed achieves two steps at most, ten of them twenty
    kills = some_kills(10, flushes, workers)
    killed_training(tmp_path, files_in(FOLDER).dit, concept, kills, steps=24, workers=workers, inside=3)


def test_fifty_kills_of_a_training_that_always_saves(tiny_model, cached: Path, tmp_path: Path) -> None:
    flushes = SAVED_IN_A_STEP + 6  # one step at most
    kills = some_kills(50, flushes, "saving")
    killed_training(tmp_path, tiny_model.dit, cached, kills, steps=54, workers=0, inside=20)


@pytest.mark.parametrize("script", ["cache_latents", "cache_text_encoder_outputs"])
def test_fifty_kills_of_caching_are_made_good_by_another_run(tmp_path: Path, script: str) -> None:
    files = files_in(FOLDER)
    models = ["--vae", files.vae] if script == "cache_latents" else []
    models = models or ["--text_encoder1", files.text_encoder1, "--text_encoder2", files.text_encoder2]
    flags = [*models, "--device", "cpu", "--skip_existing", "--num_workers", 2]
    # A run that is killed caches two at most: of a hundred pictures and clips there is always one left to be killed at.
    datasets = {"pictures": "", "clips": CLIPS, "known_pictures": "", "known_clips": "target_frames = [1, 9]"}
    wanted, killed = (write_toml(tmp_path / f"{name}.toml", datasets, tmp_path / name) for name in ("wanted", "killed"))
    plain, again = (["--dataset_config", toml, *flags] for toml in (wanted, killed))
    runs = run_plan(tmp_path, script, plain, again, tmp_path / "killed", some_kills(50, 4, script))
    assert sum(runs.inside()) >= 20, f"only {sum(runs.inside())} of 50 kills fell inside the writing of a cache file"

    def caches(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*_hv*.safetensors"))}

    first, second = caches(tmp_path / "wanted"), caches(tmp_path / "killed")
    assert first.keys() == second.keys() and first
    for name in first:
        assert first[name].keys() == second[name].keys(), name
        assert all(torch.allclose(first[name][key].float(), second[name][key].float(), atol=1e-4) for key in first[name]), name
