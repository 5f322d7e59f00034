"""Caching in several processes: the files, the tables and the failures are those of one process, and each item is read once."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several_processes import in_each, join_threads
from variations import slow_but

import cache_latents
import cache_text_encoder_outputs
from dataset import load_dataset_config
from dataset.cache.files import NonFiniteError
from dataset.cache.latents import LatentEncoder
from dataset.cache.sharing import share_items
from dataset.items import list_items
from hunyuan_model.text.llm import LlamaTextEncoder
from utils.errors import UserError
from utils.processes.locks import sole_run
from utils.processes.ranks import ALONE


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tiny_model, tiny_dataset: Path, capsys):
    """``run(script, count, *flags)``: what each process ended with, and what all printed."""

    def call(script, count: int, *flags: object, dataset: Path = tiny_dataset) -> tuple[list[int | BaseException], str, str]:
        models = ["--vae", tiny_model.vae]
        if script is cache_text_encoder_outputs:
            models = ["--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2]
        words = ["--dataset_config", dataset, "--device", "cpu", *models, *flags]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        join_threads(monkeypatch, script)
        capsys.readouterr()
        return in_each(count, lambda ranks: script.main()), *capsys.readouterr()

    return call


def take(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The caches in a folder, which are gone afterwards."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found[path.name] = {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
    return found


def same(first: dict[str, dict[str, torch.Tensor]], second: dict[str, dict[str, torch.Tensor]]) -> bool:
    return first.keys() == second.keys() and all(
        first[path].keys() == second[path].keys()
        and all(torch.equal(first[path][name], second[path][name]) for name in first[path])
        for path in first
    )


@pytest.mark.parametrize("count", slow_but([2, 3, 11], 3))
def test_latents_are_those_of_one_process(run, tiny_dataset: Path, monkeypatch, count: int) -> None:
    folder = tiny_dataset.parent
    (folder / "images" / "blue_square.png").write_bytes(b"no picture")
    (folder / "images" / "blue_square.txt").write_text("a blue square")
    (folder / "clips" / "broken.mp4").write_bytes(b"no clip")
    (folder / "clips" / "broken.txt").write_text("nothing")
    alone, table, failures = run(cache_latents, 1, "--batch_size", 1)  # larger batches differ in last bits by who is in them
    expected = take(folder)
    assert alone == [1] and "2 failure(s)" in failures and len(expected) > 6

    saved: Counter[str] = Counter()
    plain = LatentEncoder.save

    def save(encoder, batch):
        saved.update(prepared.target.label for prepared in batch)
        return plain(encoder, batch)

    monkeypatch.setattr(LatentEncoder, "save", save)
    ended, shared_table, shared_failures = run(cache_latents, count, "--batch_size", 1)
    assert ended == [1] + [0] * (count - 1)
    assert same(take(folder), expected)
    assert set(saved.values()) == {1} and len(saved) == len(expected)
    assert shared_table == table
    assert shared_failures[shared_failures.index("2 failure(s)") :] == failures[failures.index("2 failure(s)") :]
    assert not list(folder.rglob("*.lock"))


def test_texts_are_those_of_one_process(run, tiny_dataset: Path, monkeypatch) -> None:
    folder = tiny_dataset.parent
    next(folder.rglob("*.txt")).write_text("a red ball " * 100)  # which is cut, and said to be
    alone, table, _ = run(cache_text_encoder_outputs, 1, "--batch_size", 2)
    expected = take(folder)
    assert alone == [0] and len(expected) == 8 and "not read: " in table

    encoded: Counter[str] = Counter()
    plain = LlamaTextEncoder.encode

    def encode(encoder, prompts):
        encoded.update(prompts)
        return plain(encoder, prompts)

    monkeypatch.setattr(LlamaTextEncoder, "encode", encode)
    ended, shared_table, _ = run(cache_text_encoder_outputs, 3, "--batch_size", 2)
    assert ended == [0, 0, 0]
    assert same(take(folder), expected)
    assert encoded.total() == 8
    assert shared_table == table


def test_what_one_process_cannot_make_all_count(run, monkeypatch) -> None:
    plain = cache_text_encoder_outputs.save_text
    failing = []

    def save_text(path: Path, *rest: object) -> None:
        if "circle" in path.name:
            failing.append(path)
            raise NonFiniteError("NaN")
        plain(path, *rest)

    monkeypatch.setattr(cache_text_encoder_outputs, "save_text", save_text)
    ended, table, failures = run(cache_text_encoder_outputs, 2)
    count = len(failing)
    assert ended == [1, 0] and count > 1
    assert f"8 captions: {8 - count} encoded, 0 kept, {count} failed" in table
    assert f"{count} failure(s)" in failures and all(path.name.removesuffix("_hv_te.safetensors") in failures for path in failing)


@pytest.mark.parametrize("script", [cache_latents, cache_text_encoder_outputs])
def test_what_is_there_is_kept_and_orphans_are_those_of_all(run, tiny_dataset: Path, script) -> None:
    assert run(script, 2)[0] == [0, 0]
    caches = sorted(tiny_dataset.parent.rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in caches]
    images = load_dataset_config(tiny_dataset).datasets[0].cache_directory
    name = "gone_0064x0064_hv.safetensors" if script is cache_latents else "gone_hv_te.safetensors"
    orphan = shutil.copy(next(images.glob("*.safetensors")), images / name)
    ended, table, _ = run(script, 3, "--skip_existing", "--remove_orphans")
    assert ended == [0, 0, 0]
    assert "6 kept, 0 redone, 0 skipped, 1 orphans (1 removed)" in table and table.count("removed: gone") == 1
    assert not Path(orphan).exists()
    assert [path.stat().st_mtime_ns for path in caches] == times


@pytest.mark.parametrize(("script", "what"), [(cache_latents, "latents"), (cache_text_encoder_outputs, "texts")])
def test_where_another_run_is_at_work_all_end(run, tiny_dataset: Path, script, what: str) -> None:
    folder = load_dataset_config(tiny_dataset).datasets[1].cache_directory
    with sole_run(folder / f".{what}.lock", f"caches {what}", "wait"):
        ended, table, _ = run(script, 3)
    assert [type(error) for error in ended] == [UserError] * 3 and len(set(map(str, ended))) == 1
    assert table.count("dataset  ") == 1 and not list(tiny_dataset.parent.rglob("*.safetensors"))


def test_one_process_looks_at_the_data(run) -> None:
    ended, printed, _ = run(cache_latents, 3, "--debug_mode", "console", "--console_num_images", 2)
    assert ended == [0, 0, 0]
    assert printed.count(" -> ") == run(cache_latents, 1, "--debug_mode", "console", "--console_num_images", 2)[1].count(" -> ")


def test_a_share_is_of_what_has_to_be_encoded(tiny_dataset: Path) -> None:
    datasets = [list_items(dataset) for dataset in load_dataset_config(tiny_dataset).datasets]
    clips = [item.stem for item in datasets[1]]

    def shares(wanted: list) -> list[list[list[str]]]:
        found = in_each(2, lambda ranks: share_items(datasets, ranks, 2, wanted))
        return [[[item.stem for item in items] for items in share] for share in found]

    for_all = shares([lambda target: True] * 2)
    assert sorted(stem for share in for_all for items in share for stem in items) == sorted(
        item.stem for items in datasets for item in items
    )
    assert [share[1] for share in for_all] in ([clips[:1], clips[1:]], [clips[1:], clips[:1]])  # nobody has both clips
    for_pictures = shares([lambda target: True, lambda target: False])
    assert [len(share[0]) for share in for_pictures] == [3, 3]
    assert share_items(datasets, ALONE, 2, []) == datasets
