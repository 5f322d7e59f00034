"""Swapped weights that processes share: each loads a part, all have the same memory; and what is done without such memory."""

from __future__ import annotations

import json
import logging
import mmap
import multiprocessing
import os
import threading
from collections import Counter
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launching import launch
from safetensors.torch import save_file
from several_processes import in_each
from small_transformer import CONFIG, CPU, GOLDENS, add_lora, blocks_of, make_inputs, same
from torch import nn

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.offload.block_swap import max_blocks_to_swap, on_host
from hunyuan_model.runtime.offload.host_weights import page_lock
from hunyuan_model.runtime.offload.shared_weights import Address, SharedMemory
from hunyuan_model.runtime.settings import RuntimeSettings
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.merging import merge_patch, read_lora_files
from utils.errors import UserError
from utils.processes.ranks import Ranks

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory that is found through a process")
SIZES = (100_000, 0, 5)  # of pieces, in bytes
SECONDS = 120
FILE = GOLDENS / "dit.safetensors"
SWAP = {"blocks_to_swap": 3, "img_in_txt_in_offloading": True}


def read_and_write(address: Address, starts: list[int], pipe: Connection) -> None:
    """Another process: say what the pieces hold, write to each, and end when asked."""
    memory = SharedMemory.open(address)
    pieces = [memory.piece(start, size) for start, size in zip(starts, SIZES, strict=True)]
    pipe.send([piece.unique().tolist() for piece in pieces])
    for piece in pieces:
        piece[-1:] = 77
    pipe.send("written")
    pipe.recv()
    os._exit(1)  # nothing is tidied up


@linux
def test_a_piece_is_the_same_memory_in_two_processes():
    memory = SharedMemory.create()
    starts, pieces = zip(*(memory.take(size) for size in SIZES), strict=True)
    for value, piece in enumerate(pieces, start=1):
        piece.fill_(value)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    other = context.Process(target=read_and_write, args=(memory.address, [*starts], there), daemon=True)
    other.start()
    there.close()  # so that its end is noticed
    assert here.poll(SECONDS)
    assert here.recv() == [[1], [], [3]]
    assert here.recv() == "written"
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
    _, piece = memory.take(10)
    piece.fill_(9)
    del memory
    assert not (link.is_symlink() and "/memfd:" in os.readlink(link))
    assert piece.tolist() == [9] * 10


@linux
def test_memory_of_others_is_not_taken_for_it():
    address = SharedMemory.create().address
    memory = SharedMemory.create()
    with pytest.raises(OSError, match="different containers"):  # the same process and number there, but not this file
        SharedMemory.open(memory.address._replace(token=address.token))
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="different containers"):
            SharedMemory.open(memory.address._replace(descriptor=read_end))
    finally:
        os.close(read_end)
        os.close(write_end)
    with pytest.raises(FileNotFoundError):
        SharedMemory.open(memory.address._replace(descriptor=1_000_000))


@linux
def test_memory_that_is_short_is_an_error_in_one_sentence():
    import resource

    memory = SharedMemory.create()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * mmap.ALLOCATIONGRANULARITY, limits[1]))
    try:
        with pytest.raises(UserError, match=r"no memory left for the swapped weights .*blocks_to_swap"):
            memory.take(10 * mmap.ALLOCATIONGRANULARITY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def load(ranks: Ranks, weights: WeightFormat = WeightFormat.PLAIN, patch=None, device: torch.device = CPU, **flags) -> nn.Module:
    runtime = RuntimeSettings(weights, **(SWAP | flags))
    return load_transformer(FILE, device=device, dtype=torch.float32, runtime=runtime, ranks=ranks, patch=patch)


def is_swapped(transformer: nn.Module, name: str) -> bool:
    return on_host(RuntimeSettings(**SWAP).swap, transformer.config)(name)


def gradients(transformer: nn.Module, device: torch.device = CPU) -> list[torch.Tensor]:
    """Of a LoRA on it after two steps, and the outputs."""
    network, found = add_lora(transformer).to(device), []
    for seed in range(2):
        found.append(transformer(*make_inputs(seed, config=transformer.config, device=device)))
        found[-1].square().mean().backward()
    return [*found, *(parameter.grad for parameter in network.parameters())]


@linux
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize("weights", WeightFormat)
def test_each_loads_a_part_and_all_have_the_bits_of_one_process(weights, merged, caplog):
    update = merge_patch(read_lora_files([GOLDENS / "lora.safetensors"]), FILE) if merged else lambda _, tensor: tensor
    loaded: Counter[str] = Counter()

    def load_here(ranks: Ranks) -> nn.Module:
        def patch(name: str, tensor: torch.Tensor) -> torch.Tensor:
            loaded[name] += 1
            return update(name, tensor)

        return load(ranks, weights, patch)

    expected = load_transformer(FILE, device=CPU, dtype=torch.float32, runtime=RuntimeSettings(weights), patch=update)
    with caplog.at_level(logging.INFO):
        transformers = in_each(3, load_here)
    assert caplog.text.count("shared by 3 processes") == 3 and "copies" not in caplog.text
    names = dict(expected.named_parameters())
    for transformer in transformers:
        assert [*names] == [name for name, _ in transformer.named_parameters()]
        assert same([*expected.state_dict().values()], [*transformer.state_dict().values()])
        assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert loaded == {name: 1 if is_swapped(expected, name) else 3 for name in expected.state_dict() if not name.endswith("_scale")}
    assert same(gradients(transformers[0]), gradients(transformers[1]))


@linux
def test_two_models_hold_one_copy_and_training_never_writes_to_it():
    first, second = in_each(2, load)
    alone = load(Ranks())
    pieces = [model.block_swap._weights for model in (first, second)]
    before = [weights.memory.clone() for weights in pieces[0].values()]
    runs = [gradients(model) for model in (alone, first, second)]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    assert same(before, [weights.memory for weights in pieces[0].values()])
    assert len({weights.memory.untyped_storage().data_ptr() for weights in pieces[0].values()}) == len(blocks_of(first))
    for block, weights in pieces[0].items():
        weights.memory[5] ^= 255
        assert torch.equal(weights.memory, pieces[1][block].memory)


@linux
def test_more_processes_than_parts():
    transformers = in_each(9, load)
    assert all(same([*transformers[0].state_dict().values()], [*one.state_dict().values()]) for one in transformers[1:])


@linux
@pytest.mark.parametrize("machines", [1, 2], ids=["containers", "machines"])
def test_who_cannot_reach_others_shares_with_whom_it_reaches(machines, caplog, monkeypatch):
    here, rooms = threading.local(), {}  # two processes in each room
    create, reach = SharedMemory.create, SharedMemory.open

    def create_here() -> SharedMemory:
        memory = create()
        rooms[memory.address.token] = here.room
        return memory

    def open_here(address: Address) -> SharedMemory:
        return reach(address if rooms[address.token] == here.room else address._replace(token=b""))

    def load_here(ranks: Ranks) -> nn.Module:
        here.room = ranks.index // 2
        return load(replace(ranks, local_index=ranks.index % (4 // machines)))

    monkeypatch.setattr(SharedMemory, "create", create_here)
    monkeypatch.setattr(SharedMemory, "open", open_here)
    with caplog.at_level(logging.INFO):
        transformers = in_each(4, load_here)
    assert caplog.text.count("shared by 2 processes") == 4
    said = caplog.text.count("4 processes hold 2 copies of the swapped weights in RAM: they are in different containers")
    assert said == (4 if machines == 1 else 0)
    for block in transformers[0].block_swap._weights:
        pieces = [model.block_swap._weights[block].memory for model in transformers]
        assert all(torch.equal(piece, pieces[0]) for piece in pieces)
        pieces[0][5] ^= 255
        assert [torch.equal(piece, pieces[0]) for piece in pieces] == [True, True, False, False]


def test_without_such_memory_every_process_holds_a_copy(monkeypatch, caplog):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with caplog.at_level(logging.INFO):
        first, second = in_each(2, load)
    assert same([*first.state_dict().values()], [*second.state_dict().values()])
    assert len({parameter.untyped_storage().data_ptr() for model in (first, second) for parameter in model.parameters()}) > 40
    (line,) = {record.message for record in caplog.records if "copies" in record.message}
    assert line == "2 processes hold 2 copies of the swapped weights in RAM: only Linux has memory for that."
    assert "shared by" not in caplog.text


MEASURED = """
import json, sys
from pathlib import Path

sys.path.insert(0, {root!r})

import torch

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings
from utils.output import show
from utils.processes.ranks import join_ranks, leave_ranks


def measured(name, line):
    lines = Path("/proc/self", name).read_text(encoding="ascii").splitlines()
    return next(int(text.split()[1]) for text in lines if text.startswith(line + ":"))


def load(path, ranks, blocks):
    runtime = RuntimeSettings(WeightFormat.INT8, blocks_to_swap=blocks)
    return load_transformer(path, device="cpu", dtype=torch.bfloat16, runtime=runtime, ranks=ranks)


ranks = join_ranks("cpu")
load({small!r}, ranks, 3)  # what only a first load takes
ranks.wait()
before = measured("smaps_rollup", "Pss"), measured("io", "read_bytes")
transformer = load({file!r}, ranks, {blocks})
ranks.wait()
memory, read = measured("smaps_rollup", "Pss") - before[0], measured("io", "read_bytes") - before[1]
found = ranks.gather((memory * 1024, read))
if ranks.is_main:
    show(json.dumps([sum(values) for values in zip(*found)]))
leave_ranks(ranks)
"""


@linux
@pytest.mark.slow
def test_two_processes_take_the_memory_of_one_copy_and_read_the_file_once(tmp_path):
    config = replace(CONFIG, hidden_size=512, heads=16, mlp_size=2048, double_depth=2, single_depth=8)
    with torch.device("meta"):
        tensors = HYVideoDiffusionTransformer(config).state_dict()
    file, script = tmp_path / "dit.safetensors", tmp_path / "measured.py"
    save_file({name: torch.full(tensor.shape, 0.01, dtype=torch.bfloat16) for name, tensor in tensors.items()}, file)
    options = {"root": str(ROOT), "small": str(FILE), "file": str(file), "blocks": max_blocks_to_swap(config)}
    script.write_text(MEASURED.format(**options), encoding="utf-8")
    memory, read = {}, {}
    for processes in (1, 2):
        with open(file, "rb+") as opened:  # what is not on disk yet stays in memory
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        ended = launch(processes, script, home=tmp_path / "no_settings")
        assert ended.returncode == 0, ended.stderr
        memory[processes], read[processes] = json.loads(ended.stdout)
    size = file.stat().st_size
    print(f"{size / 1e6:.0f} MB; memory of 1 and 2 processes: {memory}; read from disk: {read}")
    assert memory[2] < memory[1] + 0.3 * size, "a second copy takes half the size of the file"
    assert read[2] <= 1.02 * size
    if read[1] < size:
        pytest.skip("what is read of this disk is not counted, or stays in memory")
    assert read[2] >= 0.98 * size


@linux
@pytest.mark.gpu
def test_a_gpu_reads_memory_that_is_page_locked_by_all_who_share_it():
    device = torch.device("cuda")
    first = SharedMemory.create()
    start, piece = first.take(1 << 20)
    owners = [first, SharedMemory.open(first.address)]
    pieces = [piece.random_(), owners[1].piece(start, 1 << 20)]
    assert all(page_lock(piece, device, owner) for piece, owner in zip(pieces, owners, strict=True))
    assert all(piece.is_pinned() and torch.equal(piece.to(device, non_blocking=True).cpu(), pieces[0]) for piece in pieces)


@linux
@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_on_a_gpu():
    device = torch.device("cuda")
    alone = gradients(load(Ranks(), device=device), device)
    for model in in_each(2, lambda ranks: load(ranks, device=device)):
        assert same(gradients(model, device), alone)
