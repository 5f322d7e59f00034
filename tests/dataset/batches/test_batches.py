"""Training batches: pairing of caches, shapes, order, ranks, and errors that name the file."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dataset.batches.batches import read_batch
from dataset.batches.cached_items import CachedGroup, CachedItem, find_cached_items
from dataset.batches.order import BatchOrder
from dataset.batches.reading import EpochReader, possible_workers
from dataset.cache.files import save_latents, save_text
from dataset.config import DatasetConfig, DatasetGroup
from utils.errors import UserError

WIDTH, POOLED = 6, 5


def dataset_in(folder: Path, index: int = 0, kind: str = "image", batch_size: int = 2, num_repeats: int = 1) -> DatasetConfig:
    return DatasetConfig(index, kind, folder, None, folder, batch_size=batch_size, num_repeats=num_repeats)


def write_latents(folder: Path, name: str, height: int, width: int, value: float = 0.0, frames: int = 1) -> Path:
    path = folder / f"{name}_hv.safetensors"
    save_latents(path, torch.full((16, frames, height, width), float(value)), (99, 99))
    return path


def write_text(folder: Path, stem: str, valid: int, rows: int = 8) -> Path:
    path = folder / f"{stem}_hv_te.safetensors"
    states = torch.arange(1, rows + 1).float()[:, None].expand(rows, WIDTH).clone()
    save_text(path, states, (torch.arange(rows) < valid).long(), torch.full((POOLED,), float(valid)), stem)
    return path


@pytest.fixture
def group(tmp_path) -> DatasetGroup:
    """Five pictures in two shapes, each twice per epoch, and one clip in two windows."""
    images, clips = tmp_path / "images", tmp_path / "clips"
    for number in range(5):
        write_latents(images, f"pic_{number}_0640x0480", 4, 6 if number < 3 else 4, value=number)
        write_text(images, f"pic_{number}", valid=number)
    write_latents(clips, "clip_00000-001_0099x0099", 4, 4)
    write_latents(clips, "clip_00000-009_0099x0099", 4, 4, frames=3)
    write_text(clips, "clip", valid=8)
    datasets = (dataset_in(images, num_repeats=2), dataset_in(clips, index=1, kind="video", batch_size=3))
    return DatasetGroup(tmp_path / "d.toml", datasets)


def test_caches_are_paired_by_stem_without_media(group):
    images, clips = find_cached_items(group)
    assert [(item.stem, item.window, item.shape) for item in images.items] == [
        *((f"pic_{number}", None, (16, 1, 4, 6)) for number in range(3)),
        *((f"pic_{number}", None, (16, 1, 4, 4)) for number in (3, 4)),
    ]
    assert [(item.window, item.shape) for item in clips.items] == [((0, 1), (16, 1, 4, 4)), ((0, 9), (16, 3, 4, 4))]
    assert {item.text_path.name for item in clips.items} == {"clip_hv_te.safetensors"}


def test_missing_latents_and_missing_text_name_the_script_to_run(group, tmp_path):
    (tmp_path / "images" / "pic_3_hv_te.safetensors").unlink()
    with pytest.raises(UserError, match=r"pic_3; run: python cache_text_encoder_outputs\.py --dataset_config .*d\.toml"):
        find_cached_items(group)
    empty = DatasetGroup(group.path, (dataset_in(tmp_path / "none"),))
    with pytest.raises(UserError, match=r"number 1 of .*run: python cache_latents\.py --dataset_config .*d\.toml"):
        find_cached_items(empty)
    clips = DatasetConfig(0, "video", tmp_path, None, tmp_path / "none", target_frames=(129, 201))
    with pytest.raises(UserError, match=r"clips are shorter than target_frames \(129\); mend that, or"):
        find_cached_items(DatasetGroup(group.path, (clips,)))


def test_newest_of_two_names_for_one_window_is_used(group, tmp_path, caplog):
    old = tmp_path / "clips" / "clip_00000-009_0099x0099_hv.safetensors"
    new = write_latents(tmp_path / "clips", "clip_00000-009_0032x0064", 8, 4, frames=3)
    os.utime(old, ns=(1, 1))
    with caplog.at_level(logging.WARNING):
        clips = find_cached_items(group)[1]
    assert [item.latents_path for item in clips.items][1] == new
    assert clips.items[1].shape == (16, 3, 8, 4)  # from the tensor, not from the name
    assert old.name in caplog.text


def items_of(groups: list[CachedGroup]) -> list[CachedItem]:
    return [item for group in groups for item in group.items]


def test_every_item_comes_as_often_as_asked_in_batches_of_one_shape(group):
    groups = find_cached_items(group)
    items, order = items_of(groups), BatchOrder(groups, seed=1)
    batches = order.batches(0)
    assert len(batches) == len(order) == 3 + 2 + 1 + 1  # 6 and 4 pictures in pairs; two windows of different length
    assert Counter(index for batch in batches for index in batch) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1}
    for batch in batches:
        assert len({items[index].shape for index in batch}) == 1
        assert len({items[index].latents_path.parent for index in batch}) == 1


def made_up(sizes: list[int], batch_size: int) -> list[CachedGroup]:
    """Groups without files: ``sizes`` items of one shape each."""
    groups = []
    for index, size in enumerate(sizes):
        items = [CachedItem(str(n), None, Path(str(n)), Path(str(n)), (16, 1, 4, 4)) for n in range(size)]
        groups.append(CachedGroup(dataset_in(Path("x"), index, batch_size=batch_size), tuple(items)))
    return groups


def test_last_partial_batch_is_kept():
    batches = BatchOrder(made_up([7], batch_size=3), seed=0).batches(0)
    assert sorted(map(len, batches)) == [1, 3, 3]
    assert sorted(index for batch in batches for index in batch) == list(range(7))


def test_order_is_a_function_of_seed_and_epoch():
    groups = made_up([20, 11], batch_size=2)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return BatchOrder(groups, seed).batches(epoch)

    assert order(5, 2) == order(5, 2)
    orders = [order(5, 2), order(5, 3), order(6, 2)]
    assert all(first != second for position, first in enumerate(orders) for second in orders[:position])
    # the same on every machine and in every version, or a run could not be resumed elsewhere
    assert order(5, 0)[:3] == [[13, 5], [24, 29], [2, 11]]


def test_batches_of_datasets_are_mixed():
    batches = BatchOrder(made_up([40, 40], batch_size=1), seed=0).batches(0)
    halves = [batch[0] < 40 for batch in batches]
    assert 8 < sum(halves[:40]) < 32


def test_batch_is_trimmed_to_the_longest_caption_and_padded_with_zeros(group):
    items = items_of(find_cached_items(group))
    batch = read_batch([items[1], items[2], items[0]])
    assert batch["latents"].shape == (3, 16, 1, 4, 6)
    assert batch["latents"][:, 0, 0, 0, 0].tolist() == [1, 2, 0]
    assert batch["text_states"][..., 0].tolist() == [[1, 0], [1, 2], [0, 0]]
    assert batch["text_mask"].tolist() == [[1, 0], [1, 1], [0, 0]] and batch["text_mask"].dtype == torch.int64
    assert batch["text_states_2"][:, 0].tolist() == [1, 2, 0]
    assert batch["names"][0] == "pic_1_0640x0480_hv.safetensors"


def test_batch_of_empty_captions_has_one_masked_row(group):
    first = items_of(find_cached_items(group))[0]
    batch = read_batch([first, first])
    assert batch["text_states"].shape == (2, 1, WIDTH) and not batch["text_states"].any()
    assert batch["text_mask"].tolist() == [[0], [0]]


def test_a_cache_with_nan_or_of_another_shape_than_at_the_start_is_named(group):
    first = items_of(find_cached_items(group))[0]
    save_file({"latents_1x4x6_float32": torch.full((16, 1, 4, 6), float("nan"))}, first.latents_path)
    with pytest.raises(UserError, match=r"pic_0_0640x0480_hv\.safetensors holds NaN"):
        read_batch([first])
    write_latents(first.latents_path.parent, "pic_0_0640x0480", 2, 2)
    with pytest.raises(UserError, match=r"pic_0.* changed from"):
        read_batch([first])


@pytest.mark.slow
def test_spawned_workers_read_batches(group):
    groups = find_cached_items(group)
    reader = EpochReader(groups, BatchOrder(groups, seed=1), 1, persistent=False)
    reader._loader.multiprocessing_context = "spawn"
    assert len(list(reader.epoch(0))) == len(reader) > 0


def test_workers_are_started_once_and_every_epoch_has_its_order(group):
    groups = find_cached_items(group)
    orders, workers = [], []
    for count in (0, 2):
        reader = EpochReader(groups, BatchOrder(groups, seed=1), count, persistent=True)
        orders.append([])
        for epoch, start in ((0, 0), (1, 2), (2, 0), (1, 0)):
            orders[-1].append([step.own[0]["names"] for step in reader.epoch(epoch, start)])
            workers.append({process.pid for process in multiprocessing.active_children()})
        reader.close()
        assert not multiprocessing.active_children()
    assert orders[0] == orders[1] and orders[0][3][2:] == orders[0][1]
    assert workers[:4] == [set()] * 4 and workers[4] and workers[5:] == [workers[4]] * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_cache_is_one_sentence_from_any_worker(group, workers):
    groups = find_cached_items(group)
    reader = EpochReader(groups, BatchOrder(groups, seed=1), workers, persistent=True)
    assert len(list(reader.epoch(0))) == len(reader) > 0
    path = items_of(groups)[6].latents_path
    path.unlink()
    with pytest.raises(UserError) as raised:
        list(reader.epoch(1))
    assert str(path) in str(raised.value) and "does not exist" in str(raised.value)
    assert "Traceback" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process with SIGKILL")
def test_a_killed_worker_is_one_sentence_that_names_files(group):
    groups = find_cached_items(group)
    reader = EpochReader(groups, BatchOrder(groups, seed=1), 1, persistent=True)
    with pytest.raises(UserError, match=r"died, killed or out of memory.*_hv\.safetensors"):
        for _ in reader.epoch(0):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.1)  # nothing is raised here, where a step would be under way


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process with SIGKILL")
def test_a_worker_that_is_killed_between_epochs_is_a_sentence_too(group):
    groups = find_cached_items(group)
    reader = EpochReader(groups, BatchOrder(groups, seed=1), 1, persistent=True)
    list(reader.epoch(0))
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"died, killed or out of memory.*_hv\.safetensors"):
        list(reader.epoch(1))


@pytest.mark.slow
def test_a_worker_that_cannot_hand_on_what_it_read_does_not_hang(group, monkeypatch):
    groups = find_cached_items(group)
    monkeypatch.setattr("dataset.batches.reading.read_batch", lambda items: threading.Lock())  # which no process can send
    reader = EpochReader(groups, BatchOrder(groups, seed=1), 1, persistent=False)
    with pytest.raises(UserError, match=r"a process that reads the caches died.*_hv\.safetensors"):
        list(reader.epoch(0))


def test_what_fails_in_a_worker_is_one_sentence(group, monkeypatch):
    def no_memory(_path):
        raise MemoryError("cannot allocate")

    groups = find_cached_items(group)
    monkeypatch.setattr("dataset.batches.batches.read_latents", no_memory)
    reader = EpochReader(groups, BatchOrder(groups, seed=1), 1, persistent=False)
    with pytest.raises(UserError, match=r"cannot read \S+_hv.* \(MemoryError: cannot allocate\)") as raised:
        list(reader.epoch(0))
    assert "Traceback" not in str(raised.value)


@pytest.mark.slow
def test_processes_that_cannot_start_are_one_sentence(group, monkeypatch):
    def none_left(_process):
        raise OSError(errno.EMFILE, "Too many open files")

    groups = find_cached_items(group)
    monkeypatch.setattr(BaseProcess, "start", none_left)
    reader = EpochReader(groups, BatchOrder(groups, seed=1), 1, persistent=False)
    with pytest.raises(UserError, match=r"cannot start .*Too many open files.*lower --max_data_loader_n_workers"):
        list(reader.epoch(0))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(("files", "workers"), [(1024, 8), (64, 2), (30, 0)])
def test_few_open_files_are_fewer_workers(monkeypatch, caplog, files, workers):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert possible_workers(8) == workers
    assert (f"--max_data_loader_n_workers: {workers}, as" in caplog.text) == (workers < 8)
