"""Swapped weights that processes share: the same memory in each, never another's, never written to; and what is done without it."""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from small_transformer import CPU, GOLDENS, MOST, add_lora, blocks_of, make_transformer, same, train_and_sample

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime import loading
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.offload.block_swap import SwappedParts, SwapSettings, enable_block_swap
from hunyuan_model.runtime.offload.host_weights import page_lock
from hunyuan_model.runtime.settings import RuntimeSettings
from networks.training.distributed.shared_weights import Address, SharedMemory, shared_host_memory

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory that is found through a process")
SIZES = (100_000, 0, 5)  # of pieces, in bytes
SECONDS = 120


def take_and_write(address: Address, pipe: Connection) -> None:
    """Another process: say what the pieces hold, write to each, and end when asked."""
    memory = SharedMemory.open(address)
    pieces = [memory.take(size) for size in SIZES]
    pipe.send([piece.unique().tolist() for piece in pieces])
    for piece in pieces:
        piece[-1:] = 77
    pipe.send((memory.shared_bytes, memory.own_bytes))
    pipe.recv()
    os._exit(1)  # nothing is tidied up


@linux
def test_a_piece_is_the_same_memory_in_two_processes():
    memory = SharedMemory.create()
    pieces = [memory.take(size) for size in SIZES]
    for value, piece in enumerate(pieces, start=1):
        piece.fill_(value)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    other = context.Process(target=take_and_write, args=(memory.address, there), daemon=True)
    other.start()
    there.close()  # so that its end is noticed
    assert here.poll(SECONDS)
    assert here.recv() == [[1], [], [3]]
    assert here.recv() == (sum(SIZES), 0) == (memory.shared_bytes, memory.own_bytes)
    assert [piece[-1:].tolist() for piece in pieces] == [[77], [], [77]]
    assert pieces[0][:-1].unique().tolist() == [1]
    here.send("end")
    other.join(SECONDS)
    assert other.exitcode == 1
    assert pieces[2].tolist() == [3, 3, 3, 3, 77]
    assert all(piece.data_ptr() % mmap.PAGESIZE == 0 for piece in pieces if len(piece))


@linux
def test_pieces_outlive_the_object_and_its_file_is_closed():
    memory = SharedMemory.create()
    link = Path(f"/proc/self/fd/{memory.address.descriptor}")
    assert os.readlink(link).startswith("/memfd:")
    piece = memory.take(10).fill_(9)
    del memory
    assert not (link.is_symlink() and "/memfd:" in os.readlink(link))
    assert piece.tolist() == [9] * 10


@linux
def test_memory_of_others_is_not_taken_for_it():
    address = SharedMemory.create().address
    memory = SharedMemory.create()
    with pytest.raises(OSError, match="another container"):  # the same process and number there, but not this file
        SharedMemory.open(memory.address._replace(token=address.token))
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="another container"):
            SharedMemory.open(memory.address._replace(descriptor=read_end))
    finally:
        os.close(read_end)
        os.close(write_end)
    with pytest.raises(FileNotFoundError):
        SharedMemory.open(memory.address._replace(descriptor=1_000_000))


@linux
def test_where_memory_is_short_each_takes_its_own_for_the_rest():
    import resource

    memory = SharedMemory.create()
    first = memory.take(10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * mmap.ALLOCATIONGRANULARITY, limits[1]))
    try:
        large = memory.take(10 * mmap.ALLOCATIONGRANULARITY)
        small = memory.take(20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (memory.shared_bytes, memory.own_bytes) == (10, large.nbytes + 20)
    assert large.fill_(1).sum() == large.nbytes and small.fill_(1).sum() == 20

    other = SharedMemory.open(memory.address)  # has the memory, and finds its pieces where they would be
    assert other.take(10).copy_(torch.arange(10)).tolist() == first.tolist()
    assert not other.take(large.nbytes).any() and not other.take(20).any()
    assert (other.shared_bytes, other.own_bytes) == (30 + large.nbytes, 0)


@linux
def test_two_models_hold_one_copy_and_training_never_writes_to_it():
    first = SharedMemory.create()
    second = SharedMemory.open(first.address)
    runs = []
    for memory in (None, first, second):
        transformer = make_transformer()
        settings = SwapSettings(MOST, embedders=True, recomputed=True)
        enable_block_swap(transformer, settings, CPU, SwappedParts(transformer, settings, CPU, memory and memory.take))
        enable_gradient_checkpointing(transformer)
        written = Path(f"/proc/self/fd/{first.address.descriptor}").read_bytes()
        runs.append((train_and_sample(transformer, add_lora(transformer)), transformer))
        assert Path(f"/proc/self/fd/{first.address.descriptor}").read_bytes() == written
    assert same(runs[0][0], runs[1][0]) and same(runs[0][0], runs[2][0])
    assert first.shared_bytes == second.shared_bytes > 0 and first.own_bytes == second.own_bytes == 0
    streamed = [transformer.block_swap._weights for _, transformer in runs[1:]]
    for block, weights in streamed[0].items():
        weights.memory[5] ^= 255
        assert torch.equal(weights.memory, streamed[1][block].memory)


@linux
def test_loading_moves_each_block_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch):
    options = {"device": "cpu", "dtype": torch.float32}
    expected = load_transformer(GOLDENS / "dit.safetensors", **options, runtime=RuntimeSettings(WeightFormat.INT8))
    memory = SharedMemory.create()
    settings = RuntimeSettings(WeightFormat.INT8, blocks_to_swap=3, img_in_txt_in_offloading=True)
    after: list[int] = []
    load_weights = loading.load_weights

    def loads(*arguments: object, **options: object) -> None:
        load_weights(*arguments, **options)
        after.append(memory.shared_bytes)

    monkeypatch.setattr(loading, "load_weights", loads)
    swapped = load_transformer(GOLDENS / "dit.safetensors", **options, runtime=settings, allocate=memory.take)
    assert after == [memory.shared_bytes] and after[0] > 0 and not memory.own_bytes
    assert same([*expected.state_dict().values()], [*swapped.state_dict().values()])
    pieces = {parameter.untyped_storage().data_ptr() for block in blocks_of(swapped) for parameter in block.parameters()}
    assert len(pieces) == len(blocks_of(swapped))  # all take turns


@linux
@pytest.mark.gpu
def test_a_gpu_reads_memory_that_is_page_locked_by_all_who_share_it():
    device = torch.device("cuda")
    first = SharedMemory.create()
    owners = [first, SharedMemory.open(first.address)]
    pieces = [owner.take(1 << 20) for owner in owners]
    pieces[0].random_()
    assert all(page_lock(piece, device, owner) for piece, owner in zip(pieces, owners, strict=True))
    assert all(piece.is_pinned() and torch.equal(piece.to(device, non_blocking=True).cpu(), pieces[0]) for piece in pieces)


class Processes:
    """Stands in for accelerate in one of two processes: what the others say is put beside what this one says."""

    num_processes = 2

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: bool, others: list[list[object]]) -> None:
        self.is_local_main_process = first
        self.said: list[object] = []

        def gather(said: list[object]) -> list[object]:
            self.said += said
            other = others.pop(0)
            return [*said, *other] if first else [*other, *said]

        monkeypatch.setattr("accelerate.utils.gather_object", gather)


@linux
def test_the_others_find_the_memory_of_the_first(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    memory = SharedMemory.create()
    memory.take(10).fill_(7)
    elsewhere = memory.address._replace(token=b"x")
    offers, ended = [(elsewhere, ""), (memory.address, "")], [(memory.address.token, 10, "")]
    with caplog.at_level(logging.INFO), shared_host_memory(Processes(monkeypatch, False, [offers, ended])) as take:
        assert take(10).tolist() == [7] * 10
    assert [record.message for record in caplog.records] == ["swapped weights: 0.0 GB, shared by 2 processes"]


@linux
def test_who_cannot_reach_it_holds_a_copy_and_says_so(monkeypatch, caplog):
    memory = SharedMemory.create()
    offers = [(memory.address._replace(token=b"x"), "")]
    processes = Processes(monkeypatch, False, [offers, [(memory.address.token, 10, "")]])
    with caplog.at_level(logging.INFO), shared_host_memory(processes) as take:
        assert take is None
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("1 of 2 processes hold swapped weights of their own") and "another machine" in line


def test_without_such_memory_every_process_holds_a_copy(monkeypatch, caplog):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    refused = "only Linux has memory for that"
    processes = Processes(monkeypatch, True, [[(None, "")], [(b"", 0, refused)]])
    with caplog.at_level(logging.INFO), shared_host_memory(processes) as take:
        assert take is None
    assert processes.said[0] == (None, refused)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("2 of 2 processes hold swapped weights of their own") and refused in line


def test_auto_goes_by_the_fullest_gpu_of_all_processes(train, monkeypatch, caplog):
    monkeypatch.setattr(
        "networks.training.preflight.gather_object", lambda said: [*said, 2] if isinstance(said[0], int) else said
    )  # as another chose
    with caplog.at_level(logging.INFO):
        ended = train("--blocks_to_swap", "auto", "--max_train_steps", 1)
    assert ended.status == 0
    messages = [record.message for record in caplog.records]
    assert "--blocks_to_swap auto: 2, for the GPU with the least free memory" in messages
    assert any(message.startswith("4 of 6 blocks") for message in messages)
