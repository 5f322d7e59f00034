"""Every flag of every script does what it says. The rows are in flag_tables.py, what they measure is in flag_effects.py."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_caches
from flag_runs import Bench, Row
from flag_tables import TABLES
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny.variants import write_lora, write_other_models


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory) -> Callable[[str], Bench]:
    """``bench("cache_latents")`` runs that script; what the rows need is there."""
    data = tmp_path_factory.mktemp("data")
    write_other_models(tiny_model, data)
    write_media(data)
    write_training_data(data)
    write_lora(tiny_model.dit, data / "rank3.safetensors")
    save_file({**load_file(data / "rank3.safetensors"), "other.model": torch.ones(1)}, data / "partly.safetensors")
    one_module = {"include_patterns": "['double_blocks.0.img_attn_qkv']", "exclude_patterns": "['.*']"}
    write_lora(tiny_model.dit, data / "one_module.safetensors", **one_module)
    strange = load_file(data / "one_module.safetensors") | {"strange.weight": torch.ones(1)}
    save_file(strange, data / "in_part.safetensors")
    places = {"data": data, "model": tiny_model.dit.parent}
    benches = {script: Bench(script, TABLES[script].base, tmp_path_factory.mktemp(script), **places) for script in TABLES}
    ready: set[str] = set()

    def prepared(script: str) -> Bench:
        """With what earlier runs of the script leave for some rows."""
        found = benches[script]
        if script in ready:
            return found
        ready.add(script)
        if script == "hv_train_network":
            shutil.copytree(found.run("--save_every_n_steps 1 --save_state").file("lora-state"), data / "state")
        elif script == "hv_generate_video":
            shutil.copy(found.run("").file("*_latent.safetensors"), data / "x_latent.safetensors")
        elif script == "convert_lora":
            shutil.copy(found.run("").file("converted.safetensors"), data)
        else:
            found.prepare = lambda out: write_datasets(data, out)
            caches = found.run("").file("cache")
            found.runs.clear()
            found.folder, found.prepare = found.folder / "again", lambda out: write_datasets(data, out, caches)
        return found

    return prepared


@pytest.mark.parametrize("script", TABLES)
def test_every_flag_has_a_row_and_every_row_a_flag(script: str) -> None:
    parser = importlib.import_module(script).build_parser()
    flags = {action.option_strings[-1] for action in parser._actions if action.dest != "help"}
    rowed = {row.flag for row in TABLES[script].rows}
    assert flags - rowed == set(), "flags without a row"
    assert rowed - flags == set(), "rows of flags that are gone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "row"),
    [pytest.param(script, row, id=f"{script} {row.given}") for script, table in TABLES.items() for row in table.rows],
)
def test_a_flag_is_not_ignored(bench: Callable[[str], Bench], script: str, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # stdout is no terminal here
    bench(script).check(row)


# What the rows name


def write_training_data(data: Path) -> None:
    """Caches of two pictures in one batch and of a clip, and the small files of rows."""
    write_caches(data / "pictures", {"a": (1, 4, 4), "b": (1, 4, 4)})
    shutil.copy(data / "pictures" / "a_hv_te.safetensors", data / "pictures" / "b_hv_te.safetensors")  # of one length
    write_caches(data / "clips", {"clip": (2, 4, 4)}, seed=1)
    pictures = (
        f"[[datasets]]\nresolution = 32\nimage_directory = '{data}/gone'\ncache_directory = '{data}/pictures'\nbatch_size = 2\n"
    )
    clips = (
        f"[[datasets]]\nresolution = 32\nvideo_directory = '{data}/too'\ncache_directory = '{data}/clips'\ntarget_frames = [5]\n"
    )
    texts = {
        "pictures.toml": pictures,
        "dataset.toml": pictures + clips,
        "flags.toml": "network_dim = 2\n",
        "batch_size.toml": "batch_size = 1\n",
        "flow_shift.toml": "flow_shift = 1.0\n",
        "trackers.toml": "[tensorboard]\nmax_queue = 1\n",
        "prompts.txt": "a red ball --w 48 --h 32 --s 1 --d 7\n",
        "wide.txt": "a red ball --w 272 --h 16 --s 1 --d 7\n",
        "network_of_rank_3.py": "from networks import lora\n\n\ndef create_network(multiplier, dim, *rest, **options):\n"
        "    return lora.create_network(multiplier, 3, *rest, **options)\n",
    }
    for name, text in texts.items():
        (data / name).write_text(text, encoding="utf-8")


def write_media(data: Path) -> None:
    """Two pictures with captions, and one without."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 288, 3), np.uint8)
    for stem, folder, noise in zip("abc", ("media", "media", "uncaptioned"), pixels):
        (data / folder).mkdir(exist_ok=True)
        Image.fromarray(noise).save(data / folder / f"{stem}.png")
    (data / "media" / "a.txt").write_text("a red ball", encoding="utf-8")
    (data / "media" / "b.txt").write_text("two blue cubes on the grass", encoding="utf-8")


def write_datasets(data: Path, out: Path, caches: Path | None = None) -> None:
    """Dataset TOMLs over the pictures, and ``caches`` in the cache directory beside one that belongs to nothing."""
    for name, media, cache in (("dataset", "media", "cache"), ("other", "media", "other"), ("uncaptioned", "uncaptioned", "cache")):
        (out / f"{name}.toml").write_text(
            f"[[datasets]]\nresolution = [288, 64]\nbatch_size = 2\nimage_directory = '{data / media}'\n"
            f"caption_extension = '.txt'\ncache_directory = '{out / cache}'\n",
            encoding="utf-8",
        )
    if caches is not None:
        shutil.copytree(caches, out / "cache")
        write_caches(out / "cache", {"gone": (1, 4, 4)})
