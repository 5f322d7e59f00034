"""Activation offload: the same numbers to the bit, few inputs on the device at a time, copies that come ahead, what is refused."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from test_block_swap import CONFIG, DEPTH, MOST, a_life, add_lora, blocks_of, make_inputs, make_transformer, same
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import hunyuan_model
from hunyuan_model.runtime import activation_offload
from hunyuan_model.runtime.activation_offload import ON_DEVICE, ActivationOffloader, HostPool, OffloadedForward, make_offloader
from hunyuan_model.runtime.block_swap import SwapSettings, block_sizes, enable_block_swap, streamed_blocks
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.transfers import DirectTransfers, ThreadTransfers

CPU = torch.device("cpu")
IMAGE, TEXT = 6, 5  # tokens of ``make_inputs``: a grid of 2 x 3, and the longest caption
TOKEN_BYTES = CONFIG.hidden_size * 4
BLOCK_BYTES = 2 * (IMAGE + TEXT) * TOKEN_BYTES  # of the inputs of a block, for two samples


class Pool(HostPool):
    """Knows its memory, so that the rest can be told to be the device's."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.pieces: weakref.WeakSet[activation_offload.HostPiece] = weakref.WeakSet()

    def _make(self, size: int) -> activation_offload.HostPiece:
        piece = super()._make(size)
        self.made.append(size)
        self.pieces.add(piece)
        return piece

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in {piece.memory.untyped_storage().data_ptr() for piece in self.pieces}


@dataclass(eq=False)
class Copy:
    target: Callable[[], torch.Tensor | None]
    source: Callable[[], torch.Tensor | None]


class LateTransfers:
    """The worst that copies may do: spoil the target at once, and begin when one is waited for, the earlier ones before it.

    As a stream does, it holds no memory: what it copies from or to on the device must be held by whoever asked for it.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.waiting: deque[Copy] = deque()
        self.sent: list[torch.Tensor] = []  # targets
        self.brought: list[tuple[StorageWeakRef, int]] = []  # targets and their bytes
        self.marks = 0

    def allocate(self, size: int) -> torch.Tensor:
        raise AssertionError("activations come and go")

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int) -> Copy:
        assert after == self.marks, "the copy may begin before what it copies was computed"
        assert self.pool.holds(target) != self.pool.holds(source) and not source.requires_grad and not target.requires_grad
        if self.pool.holds(target):
            self.sent.append(target)
            copy = Copy(lambda: target, weakref.ref(source))
        else:
            self.brought.append((StorageWeakRef(target.untyped_storage()), target.nbytes))
            copy = Copy(weakref.ref(target), lambda: source)
        target.fill_(torch.nan)
        self.waiting.append(copy)
        return copy

    def wait(self, arrival: Copy) -> None:
        while arrival in self.waiting:
            copy = self.waiting.popleft()
            target, source = copy.target(), copy.source()
            assert target is not None and source is not None, "memory was given up while a copy was under way"
            target.copy_(source)


def offloaded(transformer: nn.Module) -> LateTransfers:
    """Have a transformer checkpoint its blocks and offload what is kept of them."""
    pool = Pool()
    transfers = LateTransfers(pool)
    enable_gradient_checkpointing(transformer, ActivationOffloader(DEPTH, transfers, pool))
    return transfers


def checkpointed_life(fp8: bool = False, **network_args: str) -> list[torch.Tensor]:
    transformer = make_transformer(fp8)
    enable_gradient_checkpointing(transformer)
    network = add_lora(transformer, **network_args)
    torch.manual_seed(3)
    return a_life(transformer, network)


@pytest.mark.parametrize(
    ("swapped", "fp8", "network_args"),
    [
        (0, False, {}),
        (MOST, False, {}),
        (2, True, {}),
        (0, False, {"rank_dropout": "0.5", "dropout": "0.3"}),
        (0, False, {"exclude_patterns": "['.*']", "include_patterns": "['single_blocks.1.linear1', 'single_blocks.3.*']"}),
    ],
    ids=["plain", "swapped", "swapped float8", "dropouts", "late blocks learn"],
)
def test_outputs_and_gradients_are_the_same_to_the_bit(swapped, fp8, network_args):
    transformer = make_transformer(fp8)
    enable_block_swap(transformer, SwapSettings(swapped, recomputed=True), CPU)
    transfers = offloaded(transformer)
    network = add_lora(transformer, **network_args)
    torch.manual_seed(3)
    assert same(a_life(transformer, network), checkpointed_life(fp8, **network_args))
    assert transfers.sent and transfers.brought
    gc.collect()
    assert set(transfers.pool._free) == set(transfers.pool.pieces), "host memory was not given back"


def test_under_autocast_and_in_bfloat16():
    def life(offload: bool) -> list[torch.Tensor]:
        transformer = make_transformer().to(torch.bfloat16)
        offloaded(transformer) if offload else enable_gradient_checkpointing(transformer)
        network = add_lora(transformer)
        found = []
        for seed in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                found.append(transformer(*make_inputs(seed)))
            found[-1].float().square().mean().backward()
        return [*found, *(parameter.grad for parameter in network.parameters())]

    assert same(life(True), life(False))


def test_a_graph_that_is_used_twice():
    def twice(offload: bool) -> list[torch.Tensor]:
        transformer = make_transformer()
        offloaded(transformer) if offload else enable_gradient_checkpointing(transformer)
        network = add_lora(transformer)
        loss = transformer(*make_inputs()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return [parameter.grad for parameter in network.parameters()]

    assert same(twice(True), twice(False))


# What the device holds


class Tracker:
    """Bytes of the inputs of blocks, and of what was brought back of them, that are in the device's memory when a block begins."""

    def __init__(self, transformer: nn.Module) -> None:
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.held: list[int] = []
        self.brought: list[tuple[StorageWeakRef, int]] = []
        for block in transformer.double_blocks:
            block.forward = self._watching(block.forward, 2)
        for block in transformer.single_blocks:
            block.forward = self._watching(block.forward, 1)

    def _watching(self, forward: Callable, count: int) -> Callable:
        def watch(*inputs: torch.Tensor) -> object:
            for tensor in inputs[:count]:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.seen[reference.cdata] = reference, tensor.untyped_storage().nbytes()
            self.held.append(self.alive())
            return forward(*inputs)

        return watch

    def alive(self) -> int:
        self.seen |= {reference.cdata: (reference, size) for reference, size in self.brought}
        self.seen = {key: value for key, value in self.seen.items() if not value[0].expired()}
        return sum(size for _, size in self.seen.values())


def test_the_device_holds_the_inputs_of_two_blocks_at_a_time():
    transformer = make_transformer()
    tracker = Tracker(transformer)
    transfers = offloaded(transformer)
    tracker.brought = transfers.brought
    add_lora(transformer)
    for seed in range(2):
        loss = transformer(*make_inputs(seed)).square().mean()
        assert len(tracker.held) == DEPTH
        assert max(tracker.held) == ON_DEVICE * BLOCK_BYTES
        assert tracker.alive() == ON_DEVICE * BLOCK_BYTES  # the last ones, with which the backward pass begins
        assert not transfers.pool._free
        loss.backward()
        assert len(tracker.held) == 2 * DEPTH
        assert max(tracker.held) <= ON_DEVICE * BLOCK_BYTES
        del loss
        assert tracker.alive() == 0
        tracker.held.clear()


def test_without_offload_it_holds_them_all():
    transformer = make_transformer()
    tracker = Tracker(transformer)
    enable_gradient_checkpointing(transformer)
    add_lora(transformer)
    loss = transformer(*make_inputs()).square().mean()
    assert tracker.held == [(block + 1) * BLOCK_BYTES for block in range(DEPTH)]
    assert tracker.alive() == DEPTH * BLOCK_BYTES  # and each of them once
    loss.backward()


def test_the_single_blocks_do_not_drag_along_what_the_double_blocks_made():
    transformer = make_transformer()
    made, alive = [], []

    def last_double(*_: object) -> None:
        alive.append([not reference.expired() for reference in made])

    transformer.double_blocks[-1].register_forward_hook(
        lambda _block, _inputs, outputs: made.extend(StorageWeakRef(one.untyped_storage()) for one in outputs)
    )
    transformer.single_blocks[1].register_forward_pre_hook(last_double)
    transformer(*make_inputs())
    assert alive == [[False, False]]


# What is copied, and when


def test_the_inputs_of_all_blocks_but_the_last_ones_are_copied_once_and_nothing_else():
    transformer = make_transformer()
    transfers = offloaded(transformer)
    add_lora(transformer)
    transformer(*make_inputs()).square().mean().backward()
    image, text, both = (2, IMAGE, CONFIG.hidden_size), (2, TEXT, CONFIG.hidden_size), (2, IMAGE + TEXT, CONFIG.hidden_size)
    singles = CONFIG.single_depth - ON_DEVICE
    assert [tuple(tensor.shape) for tensor in transfers.sent] == [image, text] * CONFIG.double_depth + [both] * singles
    assert len(transfers.brought) == len(transfers.sent)


def test_samples_and_validation_copy_nothing():
    transformer = make_transformer()
    transfers = offloaded(transformer)
    add_lora(transformer)
    with torch.no_grad():
        transformer(*make_inputs())
    with torch.inference_mode():
        transformer(*make_inputs())
    assert not transfers.sent and not transfers.pool.made


def test_inputs_come_back_while_the_block_behind_theirs_computes():
    transformer = make_transformer()
    diary: list[tuple[str, int]] = []
    for index, block in enumerate(blocks_of(transformer)):

        def noting(*inputs: object, forward: Callable = block.forward, index: int = index) -> object:
            diary.append(("compute", index))
            return forward(*inputs)

        block.forward = noting
    transfers = offloaded(transformer)
    plain_copy = transfers.copy

    def copy(target: torch.Tensor, source: torch.Tensor, after: int) -> Copy:
        diary.append(("leave" if transfers.pool.holds(target) else "come", len(target[0])))
        return plain_copy(target, source, after)

    transfers.copy = copy
    add_lora(transformer)
    loss = transformer(*make_inputs()).square().mean()
    forward = list(diary)
    diary.clear()
    loss.backward()
    image_and_text = lambda what: [(what, IMAGE), (what, TEXT)]  # noqa: E731
    both = lambda what: [(what, IMAGE + TEXT)]  # noqa: E731
    copied = [image_and_text] * CONFIG.double_depth + [both] * (CONFIG.single_depth - ON_DEVICE)
    expected_forward, expected_backward = [], [("compute", DEPTH - 1)]
    for index in range(DEPTH):
        expected_forward += [*(copied[index]("leave") if index < len(copied) else []), ("compute", index)]
    for index in reversed(range(DEPTH - 1)):  # before a block is computed again, the inputs of the one before it are asked for
        expected_backward += [*(copied[index - 1]("come") if 0 < index <= len(copied) else []), ("compute", index)]
    assert forward == expected_forward
    assert diary == expected_backward


# Host memory


def test_every_step_uses_the_same_host_memory():
    transformer = make_transformer()
    pool = offloaded(transformer).pool
    add_lora(transformer)

    def step(seed: int, **sizes: tuple[int, ...]) -> None:
        transformer(*make_inputs(seed, **sizes)).square().mean().backward()

    step(0)
    made, count = list(pool.made), len(pool._free)
    assert count == len(made) == 2 * CONFIG.double_depth + CONFIG.single_depth - ON_DEVICE
    step(1)
    assert pool.made == made
    step(2, size=(2, 4, 6))  # of larger pieces there are as many, in place of the smaller ones
    assert len(pool._free) == count and pool.free_bytes >= 2 * (CONFIG.single_depth + 1) * (2 * IMAGE + TEXT) * TOKEN_BYTES
    made = list(pool.made)
    step(3, size=(2, 4, 6))
    step(4)
    assert pool.made == made and len(pool._free) == count


def test_the_smallest_piece_that_fits_is_taken():
    pool = HostPool()
    pieces = {size: pool.take(size) for size in (100, 300, 200)}
    for piece in pieces.values():
        pool.give_back(piece)
    assert pool.take(150) is pieces[200]
    assert pool.take(300) is pieces[300]
    assert pool.free_bytes == 100
    assert pool.take(101).memory.nbytes == 101 and pool.free_bytes == 0  # in place of the one that is too small


def test_memory_that_cannot_be_page_locked_is_used_as_it_is(monkeypatch, caplog):
    asked: list[object] = []
    monkeypatch.setattr(activation_offload, "page_lock", lambda memory, device, owner: asked.append(owner) and False)
    pool = HostPool(torch.device("cuda"))
    assert [pool.take(10).memory.nbytes, pool.take(20).memory.nbytes] == [10, 20]
    assert len(asked) == 1 and caplog.text.count("does not allow to pin") == 1


def test_transfers_in_a_thread():
    transformer = make_transformer()
    pool = Pool()
    enable_gradient_checkpointing(transformer, ActivationOffloader(DEPTH, ThreadTransfers(DirectTransfers(CPU)), pool))
    network = add_lora(transformer)
    transformer(*make_inputs()).square().mean().backward()
    found = [parameter.grad for parameter in network.parameters()]
    transformer = make_transformer()
    enable_gradient_checkpointing(transformer)
    network = add_lora(transformer)
    transformer(*make_inputs()).square().mean().backward()
    assert same(found, [parameter.grad for parameter in network.parameters()])


# Beside other things


def test_blocks_keep_their_class_and_what_computes_them_can_be_replaced():
    transformer = make_transformer()
    names = list(transformer.state_dict())
    offloaded(transformer)
    entered: list[int] = []
    for block in blocks_of(transformer):
        wrapped = block.forward
        assert isinstance(wrapped, OffloadedForward)

        def replaced(*inputs: object, forward: Callable = wrapped.forward, index: int = wrapped.index) -> object:
            entered.append(index)
            return forward(*inputs)

        wrapped.forward = replaced  # as torch.compile would
    assert {type(block).__name__ for block in blocks_of(transformer)} == {"MMDoubleStreamBlock", "MMSingleStreamBlock"}
    assert list(transformer.state_dict()) == names
    add_lora(transformer)
    transformer(*make_inputs()).square().mean().backward()
    assert entered == [*range(DEPTH), *reversed(range(DEPTH))]


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("swapped", [0, MOST])
def test_on_a_graphics_card(pinned, swapped):
    device = torch.device("cuda")

    def live(offload: bool) -> tuple[list[torch.Tensor], int]:
        transformer = make_transformer()
        streamed = streamed_blocks(block_sizes(CONFIG), swapped)
        for name, child in transformer.named_children():
            if name not in ("double_blocks", "single_blocks"):
                child.to(device)
        for index, block in enumerate(blocks_of(transformer)):
            if index not in streamed:
                block.to(device)
        enable_block_swap(transformer, SwapSettings(swapped, pinned=pinned, recomputed=True), device)
        enable_gradient_checkpointing(transformer, make_offloader(DEPTH, device, pinned=pinned) if offload else None)
        network = add_lora(transformer).to(device)
        found, kept = [], 0
        for seed in range(4):
            size = (4, 64, 64) if seed % 2 else (8, 64, 64)
            inputs = [value if value.dtype == torch.bool else value.to(device) for value in make_inputs(seed, size=size)]
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

    (expected, all_of_them), (found, few) = live(False), live(True)
    assert same(expected, found)
    inputs_of_a_block = 2 * 8 * 32 * 32 * TOKEN_BYTES
    assert all_of_them - few > (DEPTH - ON_DEVICE - 1) * inputs_of_a_block


# Scripts


def test_offload_without_checkpointing_is_refused_before_loading(train, monkeypatch):
    monkeypatch.setattr(hunyuan_model, "load_transformer", lambda *_a, **_k: pytest.fail("the model was loaded"), raising=False)
    ended = train("--gradient_checkpointing_cpu_offload")
    assert ended.status == 2
    assert "give --gradient_checkpointing as well" in ended.stderr


def test_a_training_with_everything_learns_the_same(train, tmp_path):
    flags = (
        "--gradient_checkpointing --max_train_steps 3 --gradient_accumulation_steps 2 --learning_rate 1e-2 --network_dropout 0.2"
    )
    more = "--blocks_to_swap 3 --fp8_base --fp8_scaled --mixed_precision bf16 --validation_split 0.3 --validate_every_n_steps 1"
    assert train(*flags.split(), *more.split(), name="plain").status == 0
    assert train(*flags.split(), *more.split(), "--gradient_checkpointing_cpu_offload", name="offloaded").status == 0
    plain, found = (load_file(tmp_path / f"out/{name}.safetensors") for name in ("plain", "offloaded"))
    assert found.keys() == plain.keys() and same([plain[name] for name in plain], [found[name] for name in plain])
    assert any(value.any() for name, value in found.items() if "lora_up" in name)
