"""Activation offload: the same numbers to the bit, few inputs on the device at a time, copies in time, what is refused."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from small_transformer import (
    CONFIG,
    CPU,
    DEPTH,
    MOST,
    add_lora,
    blocks_of,
    make_inputs,
    make_transformer,
    move_around_blocks,
    same,
    train_and_sample,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.offload import activation_offload, transfers
from hunyuan_model.runtime.offload.activation_offload import ON_DEVICE, ActivationOffloader, HostPool, make_offloader
from hunyuan_model.runtime.offload.block_swap import SwapSettings, block_sizes, enable_block_swap, streamed_blocks
from hunyuan_model.runtime.offload.transfers import DirectTransfers, ThreadTransfers

IMAGE, TEXT = 6, 5  # tokens of ``make_inputs``: a grid of 2 x 3, and the longest caption
TOKEN_BYTES = CONFIG.hidden_size * 4
BLOCK_BYTES = 2 * (IMAGE + TEXT) * TOKEN_BYTES  # of the inputs of a block, for two samples


class Pool(HostPool):
    """Knows its memory, so that every other counts as the device's."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[int] = []
        self.memories: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def _allocate(self, size: int) -> torch.Tensor:
        memory = super()._allocate(size)
        self.allocated.append(size)
        self.memories.add(memory)
        return memory

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in {memory.untyped_storage().data_ptr() for memory in self.memories}

    @property
    def free_pieces(self) -> int:
        return len(self._free)

    @property
    def free_bytes(self) -> int:
        return sum(memory.nbytes for memory in self._free)


@dataclass(eq=False)
class Copy:
    target: Callable[[], torch.Tensor | None]
    source: Callable[[], torch.Tensor | None]


class LateTransfers:
    """The worst that copies may do: overwrite the target with NaN at once, and start when one is waited for, in their order.

    As a stream does, it holds no memory: what it copies from or to on the device must be held by whoever asked for it.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.waiting: deque[Copy] = deque()
        self.to_host: list[torch.Tensor] = []  # targets
        self.to_device: list[tuple[StorageWeakRef, int]] = []  # targets and their bytes
        self.marks = 0

    def allocate(self, size: int) -> torch.Tensor:
        raise AssertionError("nothing of activations stays on the device")

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int) -> Copy:
        assert after == self.marks, "the copy may begin before what it copies was computed"
        assert self.pool.holds(target) != self.pool.holds(source) and not source.requires_grad and not target.requires_grad
        if self.pool.holds(target):
            self.to_host.append(target)
            copy = Copy(lambda: target, weakref.ref(source))
        else:
            self.to_device.append((StorageWeakRef(target.untyped_storage()), target.nbytes))
            copy = Copy(weakref.ref(target), lambda: source)
        target.fill_(torch.nan)
        self.waiting.append(copy)
        return copy

    def wait(self, arrival: Copy) -> None:
        while arrival in self.waiting:
            copy = self.waiting.popleft()
            target, source = copy.target(), copy.source()
            assert target is not None and source is not None, "memory was freed while it was copied"
            target.copy_(source)


def offloaded(transformer: nn.Module, *, keep_attention: bool = False) -> LateTransfers:
    """Have a transformer checkpoint its blocks and offload what is kept of them."""
    pool = Pool()
    transfers = LateTransfers(pool)
    enable_gradient_checkpointing(transformer, ActivationOffloader(DEPTH, transfers, pool), keep_attention=keep_attention)
    return transfers


def offloaded_with_attention(transformer: nn.Module) -> LateTransfers:
    return offloaded(transformer, keep_attention=True)


def step(transformer: nn.Module, seed: int = 0, **sizes: tuple[int, ...]) -> None:
    transformer(*make_inputs(seed, **sizes)).square().mean().backward()


@pytest.mark.parametrize(
    ("swapped", "fp8", "network_args"),
    [
        (0, False, {}),
        (MOST, True, {}),
        pytest.param(2, False, {"rank_dropout": "0.5", "dropout": "0.3"}, marks=pytest.mark.slow),
        pytest.param(
            0,
            False,
            {"exclude_patterns": "['.*']", "include_patterns": "['single_blocks.1.linear1', 'single_blocks.3.*']"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "swapped float8", "dropouts", "late blocks learn"],
)
@pytest.mark.parametrize("offload", [offloaded, offloaded_with_attention])
def test_outputs_and_gradients_are_the_same_to_the_bit(offload, swapped, fp8, network_args):
    def run(prepare: Callable[[nn.Module], object], swapped: int) -> list[torch.Tensor]:
        transformer = make_transformer(fp8)
        enable_block_swap(transformer, SwapSettings(swapped, recomputed=True), CPU)
        transfers.append(prepare(transformer))
        network = add_lora(transformer, **network_args)
        torch.manual_seed(3)
        return train_and_sample(transformer, network)

    transfers: list = []
    assert same(run(offload, swapped), run(enable_gradient_checkpointing, 0))
    assert transfers[0].to_host and transfers[0].to_device
    gc.collect()
    assert transfers[0].pool.free_pieces == len(transfers[0].pool.memories), "host memory was not given back"


def gradients(offload: Callable[[nn.Module], object], run: Callable[[nn.Module], None]) -> list[torch.Tensor]:
    transformer = make_transformer()
    offload(transformer)
    network = add_lora(transformer)
    run(transformer)
    return [parameter.grad for parameter in network.parameters()]


def under_autocast(transformer: nn.Module) -> None:
    transformer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = transformer(*make_inputs())
    out.float().square().mean().backward()


def graph_used_twice(transformer: nn.Module) -> None:
    loss = transformer(*make_inputs()).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def in_a_thread(transformer: nn.Module) -> None:
    enable_gradient_checkpointing(transformer, ActivationOffloader(DEPTH, ThreadTransfers(DirectTransfers(CPU)), HostPool()))


@pytest.mark.parametrize(
    ("offload", "run"),
    [
        (offloaded, under_autocast),
        (offloaded, graph_used_twice),
        (in_a_thread, step),
        (offloaded_with_attention, under_autocast),
        (offloaded_with_attention, graph_used_twice),
    ],
    ids=lambda f: f.__name__,
)
def test_gradients_are_the_same_to_the_bit(offload, run):
    assert same(gradients(offload, run), gradients(enable_gradient_checkpointing, run))


# What the device holds


class Tracker:
    """Bytes of the inputs of blocks, and of their copies that came back, that are in the device's memory when a block begins."""

    def __init__(self, transformer: nn.Module) -> None:
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.held: list[int] = []
        self.to_device: list[tuple[StorageWeakRef, int]] = []
        for block in transformer.double_blocks:
            block.branches = self._watching(block.branches, 2)
        for block in transformer.single_blocks:
            block.branches = self._watching(block.branches, 1)

    def _watching(self, forward: Callable, count: int) -> Callable:
        def watch(*inputs: torch.Tensor) -> object:
            for tensor in inputs[:count]:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.seen[reference.cdata] = reference, tensor.untyped_storage().nbytes()
            self.held.append(self.alive())
            return forward(*inputs)

        return watch

    def alive(self) -> int:
        self.seen |= {reference.cdata: (reference, size) for reference, size in self.to_device}
        self.seen = {key: value for key, value in self.seen.items() if not value[0].expired()}
        return sum(size for _, size in self.seen.values())


@pytest.mark.parametrize("offload", [True, False], ids=["offloaded", "on the device"])
def test_the_device_holds_the_inputs_of_two_blocks_at_a_time(offload):
    transformer = make_transformer()
    tracker = Tracker(transformer)
    if offload:
        tracker.to_device = offloaded(transformer).to_device
    else:
        enable_gradient_checkpointing(transformer)
    add_lora(transformer)
    most = ON_DEVICE if offload else DEPTH
    for seed in range(2):
        loss = transformer(*make_inputs(seed)).square().mean()
        assert tracker.held == [min(block + 1, most) * BLOCK_BYTES for block in range(DEPTH)]
        assert tracker.alive() == most * BLOCK_BYTES  # the last ones, with which the backward pass begins
        loss.backward()
        assert len(tracker.held) == 2 * DEPTH and max(tracker.held) <= most * BLOCK_BYTES
        del loss
        assert tracker.alive() == 0
        tracker.held.clear()


def test_results_of_attention_leave_the_device_like_the_inputs():
    def device_bytes(**options: bool) -> tuple[int, int]:
        """Of all that is alive after a forward pass, but not of the pool; and of the pool."""
        transformer = make_transformer()
        pool = offloaded(transformer, **options).pool
        add_lora(transformer)
        out = transformer(*make_inputs())
        assert out.requires_grad
        gc.collect()
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor}
        on_host = {memory.untyped_storage().data_ptr() for memory in pool.memories}
        return sum(size for address, size in found.items() if address not in on_host), sum(pool.allocated)

    (inputs, inputs_on_host), (both, both_on_host) = device_bytes(), device_bytes(keep_attention=True)
    log_sum_exps = 2 * CONFIG.heads * 4
    # Padded rows are no part of attention, but of its output here, which is that of one sample after the other.
    rows, padded = 2 * IMAGE + TEXT + 2, 2 * (IMAGE + TEXT)
    assert rows < padded
    results = rows * (TOKEN_BYTES + log_sum_exps // 2)
    assert both_on_host - inputs_on_host == (DEPTH - ON_DEVICE) * results
    assert ON_DEVICE * results <= both - inputs <= ON_DEVICE * results + 64 * 8 * DEPTH  # with seeds and the like


# What is copied, and when


def test_inputs_of_all_blocks_but_the_last_are_copied_once_and_come_back_while_the_next_block_computes():
    transformer = make_transformer()
    events: list[tuple[str, int]] = []
    for index, block in enumerate(blocks_of(transformer)):

        def noting(*inputs: object, forward: Callable = block.branches, index: int = index) -> object:
            events.append(("compute", index))
            return forward(*inputs)

        block.branches = noting
    transfers = offloaded(transformer)
    plain_copy = transfers.copy

    def copy(target: torch.Tensor, source: torch.Tensor, after: int) -> Copy:
        events.append(("to host" if transfers.pool.holds(target) else "to device", len(target[0])))
        return plain_copy(target, source, after)

    transfers.copy = copy
    add_lora(transformer)
    loss = transformer(*make_inputs()).square().mean()
    forward = list(events)
    events.clear()
    loss.backward()
    tokens = [(IMAGE, TEXT)] * CONFIG.double_depth + [(IMAGE + TEXT,)] * (CONFIG.single_depth - ON_DEVICE)
    expected_forward, expected_backward = [], [("compute", DEPTH - 1)]
    for index in range(DEPTH):
        copied = tokens[index] if index < len(tokens) else ()
        expected_forward += [*(("to host", count) for count in copied), ("compute", index)]
    for index in reversed(range(DEPTH - 1)):
        copied = tokens[index - 1] if 0 < index <= len(tokens) else ()
        expected_backward += [*(("to device", count) for count in copied), ("compute", index)]
    assert forward == expected_forward
    assert events == expected_backward


def test_samples_and_validation_copy_nothing():
    transformer = make_transformer()
    transfers = offloaded(transformer)
    add_lora(transformer)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            transformer(*make_inputs())
    assert not transfers.to_host and not transfers.pool.allocated


# Host memory


def test_every_step_uses_the_same_host_memory():
    transformer = make_transformer()
    pool = offloaded(transformer).pool
    add_lora(transformer)
    step(transformer, 0)
    allocated, count = list(pool.allocated), pool.free_pieces
    assert count == len(allocated) == 2 * CONFIG.double_depth + CONFIG.single_depth - ON_DEVICE
    step(transformer, 1)
    assert pool.allocated == allocated
    step(transformer, 2, size=(2, 4, 6))  # larger memory takes the place of the smaller
    assert pool.free_pieces == count
    allocated = list(pool.allocated)
    step(transformer, 3, size=(2, 4, 6))
    step(transformer, 4)
    assert pool.allocated == allocated and pool.free_pieces == count


def test_log_sum_exps_do_not_use_up_the_memory_of_larger_tokens():
    pool = Pool()
    for tokens in (20, 40, 60, 90, 60, 20, 90):
        sizes = [64 * tokens, 64 * tokens, tokens] * 10  # the input of a block, and what is kept of its attention
        for memory in [pool.take(size) for size in sizes]:
            pool.give_back(memory)
    assert sum(sizes) <= pool.free_bytes < 1.05 * sum(sizes)


def test_memory_that_cannot_be_page_locked_is_used_as_it_is(monkeypatch, caplog):
    asked: list[object] = []
    monkeypatch.setattr(activation_offload, "page_lock", lambda memory, device, owner: asked.append(owner) and False)
    pool = HostPool(torch.device("cuda"))
    assert [pool.take(10).nbytes, pool.take(20).nbytes] == [10, 20]
    assert len(asked) == 1 and caplog.text.count("does not allow to pin") == 1


def test_where_pinning_fails_half_way_a_thread_waits_for_the_copies(monkeypatch, caplog):
    locked, refused, copied = [], [], []

    def page_lock(memory: torch.Tensor, device: torch.device, owner: object) -> bool:
        (locked if len(locked) < 3 else refused).append(memory.data_ptr())
        return not refused

    class Stream(DirectTransfers):
        def copy(self, target: torch.Tensor, source: torch.Tensor, after: None) -> None:
            addresses = {tensor.untyped_storage().data_ptr() for tensor in (target, source)}
            copied.append((bool(addresses & {*locked}), bool(addresses & {*refused}), threading.current_thread().name))
            super().copy(target, source, after)

    monkeypatch.setattr(activation_offload, "page_lock", page_lock)
    monkeypatch.setattr(transfers, "StreamTransfers", lambda device: Stream(CPU))
    given = make_offloader(DEPTH, torch.device("cuda"), pinned=True)
    assert same(
        gradients(lambda one: enable_gradient_checkpointing(one, given), step), gradients(enable_gradient_checkpointing, step)
    )
    assert len(locked) == 3 and len(refused) == 1 and caplog.text.count("does not allow to pin") == 1
    names = [name for *_, name in copied]
    assert names[:3] == ["MainThread"] * 3 and all(name.startswith("transfers") for name in names[3:]), names
    assert all(is_locked for is_locked, *_ in copied[:3]) and any(is_refused for _, is_refused, _ in copied)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("swapped", [0, MOST])
def test_on_a_gpu(pinned, swapped):
    device = torch.device("cuda")

    def run(offload: bool) -> tuple[list[torch.Tensor], int]:
        transformer = make_transformer()
        move_around_blocks(transformer, device, but=streamed_blocks(block_sizes(CONFIG), swapped))
        enable_block_swap(transformer, SwapSettings(swapped, pinned=pinned, recomputed=True), device)
        enable_gradient_checkpointing(transformer, make_offloader(DEPTH, device, pinned=pinned) if offload else None)
        network = add_lora(transformer).to(device)
        found, kept = [], 0
        for seed in range(4):
            inputs = make_inputs(seed, size=(4, 64, 64) if seed % 2 else (8, 64, 64), device=device)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            found.append(transformer(*inputs))
            torch.cuda.synchronize()
            if seed == 2:  # when nothing is allocated for the first time
                kept = torch.cuda.memory_allocated() - before
            found[-1].square().mean().backward()
            found[-1] = found[-1].detach()
            with torch.no_grad():
                found.append(transformer(*inputs))
        return [*found, *(parameter.grad for parameter in network.parameters())], kept

    (expected, all_of_them), (found, few) = run(False), run(True)
    assert same(expected, found)
    inputs_of_a_block = 2 * 8 * 32 * 32 * TOKEN_BYTES
    assert all_of_them - few > (DEPTH - ON_DEVICE - 1) * inputs_of_a_block
