"""Host memory that a GPU copies from and to: what forked processes see of it, and systems that lock no pages."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from small_transformer import CPU, MOST, make_transformer

from hunyuan_model.runtime.offload import block_swap, host_weights
from hunyuan_model.runtime.offload.activation_offload import HostPool
from hunyuan_model.runtime.offload.block_swap import SwapSettings, enable_block_swap
from hunyuan_model.runtime.offload.host_weights import HostWeights, host_memory, page_lock
from hunyuan_model.runtime.offload.transfers import DirectTransfers

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and forks")


def flags_of(address: int) -> set[str]:
    """What the kernel knows of the mapping that holds ``address``: ``VmFlags`` of proc(5)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError(f"nothing is mapped at {address:x}")


@linux
def test_a_fork_neither_copies_nor_maps_the_memory():
    swapped, offloaded = HostWeights.moved(torch.nn.Linear(64, 64).requires_grad_(False), CPU).memory, HostPool().take(2**22)
    for memory in (swapped, offloaded):
        assert "dc" in flags_of(memory.data_ptr())  # do not copy on fork
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags_of(offloaded.data_ptr())

    offloaded.fill_(7)
    if (child := os.fork()) == 0:
        try:
            flags_of(offloaded.data_ptr())
        except AssertionError:
            os._exit(torch.ones(1000).sum().item() == 1000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, "the child has it, or does not live without it"
    assert offloaded.eq(7).all()


@linux
@pytest.mark.gpu
def test_a_fork_does_not_copy_page_locked_memory():
    memory, owner = host_memory(2**30).fill_(1), torch.nn.Module()
    assert page_lock(memory, torch.device("cuda"), owner)
    if (child := os.fork()) == 0:
        kilobytes = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:])
        os._exit(int(kilobytes["Private_Dirty"].split()[0]) * 1024 < memory.nbytes // 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_systems_without_such_advice_have_the_memory_all_the_same(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert host_memory(10).fill_(1).sum() == 10
    for name in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        monkeypatch.delattr(mmap, name, raising=False)
    assert host_memory(10).fill_(1).sum() == 10


class Refusing:
    """CUDA's runtime where pages are locked ``limit`` times: Windows and containers allow a part of the RAM only."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.asked = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked += 1
        self.left -= 1
        return 0 if self.left >= 0 else 2  # cudaErrorMemoryAllocation

    def cudaHostUnregister(self, address: int) -> int:
        return 0


@pytest.mark.parametrize("limit", [0, 2])
def test_block_swap_without_enough_page_locked_memory_says_so_once(monkeypatch, caplog, limit):
    def make_transfers(device: torch.device, pinned: bool) -> DirectTransfers:
        asked.append(pinned)
        return DirectTransfers(CPU)

    runtime, asked = Refusing(limit), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(host_weights, "_forget_cuda_error", lambda device: None)
    monkeypatch.setattr(block_swap, "make_transfers", make_transfers)
    enable_block_swap(make_transformer(), SwapSettings(MOST), torch.device("cuda"))
    assert asked == [False] and runtime.asked == limit + 1
    assert caplog.text.count("does not allow to pin") == 1
    gc.collect()  # what unlocks the pages finds the same stand-ins
