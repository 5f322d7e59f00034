"""A disk that really fills up: one clear error, earlier files whole, nothing half-written under a final name."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from networks.training import loop

KIB = 1024


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(kib)``: a folder on a file system in memory of that size."""
    mounted: list[Path] = []

    def make(kib: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"needs a file system of its own: {error}")
        if done.returncode:
            pytest.skip(f"needs a file system of its own, which only root may mount: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def fill(folder: Path, leave: int) -> None:
    """Leave so many bytes free."""
    (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - leave))


def whole_models(folder: Path) -> list[str]:
    """The names of all models, each of which is read to its end."""
    paths = sorted(folder.glob("*.safetensors"))
    assert all(load_file(path) for path in paths)
    return [path.name for path in paths]


@pytest.mark.parametrize(("leave", "named"), [(8 * KIB, "lora-step00000003.safetensors"), (0.6, "lora-step00000003-state")])
def test_training_ends_with_a_sentence_and_its_models_stay(train, small_disk, tmp_path, monkeypatch, leave, named) -> None:
    """The disk fills up before the model, or where the model fits and its state does not, whose optimizer is the largest."""
    disk, step = small_disk(4096), loop.train_step
    (tmp_path / "out").symlink_to(disk, target_is_directory=True)
    made = []

    def then_fill(training, batches):
        made.append(step(training, batches))
        if len(made) == 3:
            size = sum(path.stat().st_size for path in (disk / "lora-step00000002-state").iterdir())
            model = (disk / "lora-step00000002.safetensors").stat().st_size
            fill(disk, leave if leave > 1 else int(model + leave * size) // 4096 * 4096)
        return made[-1]

    monkeypatch.setattr(loop, "train_step", then_fill)
    ended = train("--max_train_steps", 5, "--network_dim", 2, "--save_every_n_steps", 1, "--save_state")
    assert ended.status == 2 and "No space left" in ended.stderr and named in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
    models = ["lora-step00000001.safetensors", "lora-step00000002.safetensors"]
    assert whole_models(disk) == (models if leave > 1 else [*models, "lora-step00000003.safetensors"])
    assert sorted(path.name for path in disk.glob("*-state")) == ["lora-step00000001-state", "lora-step00000002-state"]
    assert not [name for name in os.listdir(disk) if name.startswith(".")], "what was begun is gone"

    (disk / "filler").unlink()
    monkeypatch.setattr(loop, "train_step", step)
    assert train("--max_train_steps", 5, "--network_dim", 2, "--resume", "latest").status == 0
    assert "lora.safetensors" in whole_models(disk)


@pytest.mark.parametrize("script", ["cache_latents", "cache_text_encoder_outputs"])
def test_caching_ends_with_a_sentence_and_goes_on_where_it_stopped(
    call_script, tiny_model, tiny_dataset, small_disk, script: str, monkeypatch
) -> None:
    """Another program filled it after the check of the beginning."""
    parts = {
        "cache_latents": ("--vae", tiny_model.vae, "--num_workers", 1),
        "cache_text_encoder_outputs": ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2),
    }[script]
    disk = small_disk(4096)
    text = tiny_dataset.read_text(encoding="utf-8")
    (tiny_dataset.parent / "on_disk.toml").write_text(to_cache_in(text, disk), encoding="utf-8")
    flags = ("--dataset_config", tiny_dataset.parent / "on_disk.toml", *parts, "--batch_size", 1, "--device", "cpu")
    fill(disk, leave=40 * KIB)
    monkeypatch.setattr("dataset.cache.caching.require_room", lambda *_: None)
    ended = call_script(script, *flags)
    made = whole_caches(disk)
    assert ended.status in (1, 2) and "No space left" in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
    assert not list(disk.rglob(".*")), "what was begun is gone"
    (disk / "filler").unlink()
    assert call_script(script, *flags, "--skip_existing").status == 0
    assert made < whole_caches(disk)


def to_cache_in(toml: str, disk: Path) -> str:
    """The same datasets, with their caches on ``disk``."""
    lines = []
    for line in toml.splitlines():
        if line.startswith("cache_directory"):
            continue
        lines.append(line)
        if line.startswith("[[datasets]]"):
            lines.append(f"cache_directory = '{disk / f'cache{len(lines)}'}'")
    return "\n".join(lines) + "\n"


def whole_caches(disk: Path) -> set[str]:
    paths = list(disk.rglob("*.safetensors"))
    assert all(load_file(path) for path in paths)
    return {path.name for path in paths}
