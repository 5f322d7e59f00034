"""Killed at any moment: nothing under a final name is ever half-written, and going on ends with the very same numbers."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from killing import run_plan
from safetensors.torch import load_file
from wholeness import LOG, is_saved, unfinished

from examples.toy.make_concept import CONCEPT
from examples.toy.model_files import FOLDER, files_in
from networks.training.report.reading import REPORT_FILE, read_report
from networks.training.report.record import Status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, to start the same script quickly many times"),
]


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
    """Datasets of folders of the toy model's concept; ``datasets``: from the name of a folder to further keys."""
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


def saved(folder: Path) -> list[str]:
    """Models and states; not the reports of what was killed before its first state."""
    return sorted(path.name for path in folder.glob("lora*") if path.suffix != ".html")


def killed_training(tmp_path: Path, dit: Path, dataset: Path, kills: int, steps: int, at_once: int, workers: int) -> None:
    """Train to the end in spite of the kills, each within ``at_once`` steps, and compare with what was never killed."""
    flags = ("--max_train_steps", steps, "--max_data_loader_n_workers", workers)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    plain, again = (training(dit, dataset, folder, *flags) for folder in (whole, killed))
    run_plan(tmp_path, "hv_train_network", plain, again, (whole, killed), kills, at_once / steps)
    assert_same(whole / "lora.safetensors", killed / "lora.safetensors")
    assert (whole / LOG).read_text("utf-8") == (killed / LOG).read_text("utf-8")
    # The last run finds and removes what the killed ones left of models and states; of the log only if it rewrites it.
    assert not [path for path in unfinished(killed) if is_saved(path)]
    assert saved(killed) == saved(whole)
    report, expected = (read_report(folder / REPORT_FILE)[0] for folder in (killed, whole))
    assert report.curves["loss/current"] == expected.curves["loss/current"] and report.status == Status.FINISHED


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_change_no_bit_of_a_training(concept: Path, tmp_path: Path, workers: int) -> None:
    killed_training(tmp_path, files_in(FOLDER).dit, concept, kills=10, steps=24, at_once=2, workers=workers)


def test_fifty_kills_of_a_training_that_always_saves(tiny_model, cached: Path, tmp_path: Path) -> None:
    killed_training(tmp_path, tiny_model.dit, cached, kills=50, steps=54, at_once=1, workers=0)


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
    run_plan(tmp_path, script, plain, again, (tmp_path / "wanted", tmp_path / "killed"), kills=50, share=0.018)

    def caches(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*_hv*.safetensors"))}

    first, second = caches(tmp_path / "wanted"), caches(tmp_path / "killed")
    assert first.keys() == second.keys() and first
    for name in first:
        assert first[name].keys() == second[name].keys(), name
        assert all(torch.allclose(first[name][key].float(), second[name][key].float(), atol=1e-4) for key in first[name]), name
