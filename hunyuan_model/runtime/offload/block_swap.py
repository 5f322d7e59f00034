"""Block swap: the frozen weights of some blocks are in host memory and are copied to the device when the block computes.

Nothing is ever copied back, as frozen weights do not change: host memory holds each block, and a few slots on the device hold
one block each. While one computes, the next is copied. A backward pass needs the blocks in reverse order, and finds those with
which the forward pass ended still there.

When a slot may be overwritten follows from one fact: blocks begin one after the other, in forward passes, when checkpointing
recomputes them, and in backward passes (autograd runs later nodes first). So once a block begins, everything that reads the
weights of another one has been queued on the device, and a copy can wait for the mark at the end of that queue.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hunyuan_model.runtime.device_split import DeviceSplit, block_number, make_split, shares
from hunyuan_model.runtime.offload.host_weights import HostWeights, host_copy
from hunyuan_model.runtime.offload.shared_weights import SharedWeights
from hunyuan_model.runtime.offload.transfers import Transfers, make_transfers
from hunyuan_model.transformer.config import TransformerConfig
from utils.errors import UserError

logger = logging.getLogger(__name__)

SLOTS = 2  # blocks that the device holds in turn: one computes while the next is copied
EMBEDDERS = ("img_in", "txt_in")


@dataclass(frozen=True)
class SwapSettings:
    """What is kept in host memory.

    Attributes:
        blocks: how many blocks fewer the device holds; of a split transformer all devices together.
        embedders: img_in and txt_in too.
        pinned: page-lock the host memory where the system allows; matters for CUDA only.
        recomputed: gradient checkpointing wraps every block, so that autograd saves no weights. Else the backward pass fetches
            the weights that autograd asks for.
        split: how many blocks each device has where there are several.
    """

    blocks: int = 0
    embedders: bool = False
    pinned: bool = True
    recomputed: bool = False
    split: tuple[int, ...] = ()


def max_blocks_to_swap(config: TransformerConfig, split: Sequence[int] = ()) -> int:
    """Of the blocks of each device, double and single ones, all but the slots."""
    return sum(max(0, count - SLOTS) for count in split or (config.double_depth + config.single_depth,))


def check_blocks_to_swap(count: int, config: TransformerConfig, flag: str = "--blocks_to_swap", split: Sequence[int] = ()) -> None:
    """Raise a UserError, with the maximum, for more blocks than there are to swap."""
    limit = max_blocks_to_swap(config, split)
    if not 0 <= count <= limit:
        raise UserError(
            f"{flag} {count} is more than this transformer allows: of its {config.double_depth} double and {config.single_depth} "
            f"single blocks {'each' if split else 'the'} device holds two at a time. Use at most {limit}."
        )


def block_sizes(config: TransformerConfig) -> list[int]:
    """Number of weights in each block's Linear layers, in the order of a forward pass; the rest is negligible."""
    hidden, mlp = config.hidden_size, config.mlp_size
    double, single = 2 * hidden * (10 * hidden + 2 * mlp), hidden * (7 * hidden + 2 * mlp)
    return [double] * config.double_depth + [single] * config.single_depth


def streamed_blocks(sizes: Sequence[int], swapped: int) -> tuple[int, ...]:
    """Which blocks share the slots, so that the device holds ``swapped`` blocks fewer; ``sizes`` are those of all blocks.

    The slots take room too, so these are ``SLOTS`` more. They are spread over the depth so that the bytes to copy are the same
    everywhere: a copy runs while the blocks compute that stay, and a large block, which computes hardly longer than a small one
    but takes longer to copy, has more of these before it. A few blocks are of the smallest kind alone, as one large block among
    them would make the slots large.
    """
    if not swapped:
        return ()
    count, small = swapped + SLOTS, [block for block, size in enumerate(sizes) if size == min(sizes)]

    def saved(streamed: Sequence[int]) -> int:
        return sum(sizes[block] for block in streamed) - SLOTS * max(sizes[block] for block in streamed)

    of_all = _spread(sizes, count)
    of_small = tuple(small[place] for place in _spread([1] * len(small), count)) if count <= len(small) else of_all
    return max(of_small, of_all, key=saved)


def _spread(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` blocks so that their sizes add up to about the same everywhere."""
    # Each has a share in inverse proportion to its size, at most 1, and the shares' sum is the count.
    whole: set[int] = set()
    while True:
        others = sum(Fraction(1, size) for block, size in enumerate(sizes) if block not in whole)
        factor = (count - len(whole)) / others if others else Fraction(0)
        more = {block for block, size in enumerate(sizes) if factor > size} - whole
        if not more:
            break
        whole |= more
    chosen, due = [], Fraction(1, 2)
    for block, size in enumerate(sizes):
        due += 1 if block in whole else factor / size
        if due >= 1:
            chosen.append(block)
            due -= 1
    return tuple(chosen)


def streamed_by_device(settings: SwapSettings, config: TransformerConfig) -> list[tuple[int, ...]]:
    """The numbers of the blocks that share the slots of each device. Raises as ``check_blocks_to_swap``.

    Every device keeps the same part of its blocks in host memory.
    """
    check_blocks_to_swap(settings.blocks, config, split=settings.split)
    sizes, whole, before, found = block_sizes(config), max(1, max_blocks_to_swap(config, settings.split)), 0, []
    for share in shares(settings.split, config):
        end = before + max(0, len(share.blocks) - SLOTS)
        upto_end, upto_before = ((2 * settings.blocks * place + whole) // (2 * whole) for place in (end, before))  # rounded
        own = streamed_blocks([sizes[block] for block in share.blocks], upto_end - upto_before)
        found.append(tuple(share.blocks.start + block for block in own))
        before = end
    return found


def on_host(settings: SwapSettings, config: TransformerConfig) -> Callable[[str], bool]:
    """Whether the weight of a name is kept in host memory. Raises as ``check_blocks_to_swap``."""
    streamed = set(itertools.chain(*streamed_by_device(settings, config)))

    def answer(name: str) -> bool:
        if (number := block_number(name, config)) is not None:
            return number in streamed
        return settings.embedders and name.startswith(tuple(f"{embedder}." for embedder in EMBEDDERS))

    return answer


class SwappedParts:
    """The blocks and embedders of a transformer that are kept in host memory, each moved there as soon as it is loaded.

    ``load_weights`` takes it as the placement of weights in host memory. Only the part that is loading exists twice.
    With ``shared``, other processes load some of the parts: ``complete`` fetches them.
    """

    def __init__(
        self,
        transformer: nn.Module,
        settings: SwapSettings,
        device: torch.device | DeviceSplit,
        shared: SharedWeights | None = None,
    ) -> None:
        self.weights: dict[str, HostWeights] = {}  # by the names of modules
        self.wants = on_host(settings, transformer.config)
        self._missing: Counter[str] = Counter()  # weights of the parts that this process loads
        self._transformer = transformer
        self._shared = shared
        self._split = _split(device, transformer.config)
        sizes: Counter[str] = Counter()
        for name, tensor in transformer.state_dict().items():
            if self.wants(name):
                self._missing[_part_of(name)] += 1
                sizes[_part_of(name)] += tensor.numel()
        if shared is not None:
            parts = list(sizes)
            mine = [parts[index] for index in shared.share([*sizes.values()])]
            self._missing = Counter({part: self._missing[part] for part in mine})

    def loads(self, name: str) -> bool:
        """Whether this process loads the weight ``name``, be it swapped or not."""
        return not self.wants(name) or _part_of(name) in self._missing

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` in host memory, until its part is moved."""
        return host_copy(tensor)

    def loaded(self, name: str) -> None:
        """Count the weight ``name`` as loaded, and move its part if that was the last one."""
        if self.wants(name):
            part = _part_of(name)
            self._missing[part] -= 1
            if not self._missing[part]:
                self.move(part)

    def move(self, part: str) -> HostWeights:
        """The weights of the module ``part``, in host memory from now on."""
        if part not in self.weights:
            allocate = None if self._shared is None else partial(self._shared.take, part)
            self.weights[part] = HostWeights.moved(self._transformer.get_submodule(part), self._split.device_of(part), allocate)
        return self.weights[part]

    def complete(self) -> None:
        """Have the parts that other processes load; waits for these."""
        if self._shared is not None:
            loaded = {part: weights.places for part, weights in self.weights.items()}
            for part, (memory, places) in self._shared.exchange(loaded).items():
                module = self._transformer.get_submodule(part)
                self.weights[part] = HostWeights.found(module, self._split.device_of(part), memory, places)


def _part_of(name: str) -> str:
    kind, number, *_ = name.split(".")
    return f"{kind}.{number}" if kind.endswith("_blocks") else kind


def _split(device: torch.device | DeviceSplit, config: TransformerConfig) -> DeviceSplit:
    return device if isinstance(device, DeviceSplit) else make_split((), (device,), config)


def enable_block_swap(
    transformer: nn.Module, settings: SwapSettings, device: torch.device | DeviceSplit, parts: SwappedParts | None = None
) -> None:
    """Keep blocks and embedders of ``transformer`` in host memory and compute them on ``device``, from outside.

    Classes, names and parameter objects stay; only the parameters' values are elsewhere, and must not be written to from then
    on. Parameters that are trainable now, and buffers, stay on the device. Call it once, after ``enable_quantized_linears`` and
    before ``enable_gradient_checkpointing``. Each block's ``branches`` becomes a ``SwappedForward``; ``transformer.block_swap``
    is the ``BlockSwapper``, if there is one; of the last device where there are several. Raises as ``check_blocks_to_swap``.

    Args:
        transformer: its weights may be on any device: blocks that are in host memory never fill the device.
        parts: those of ``transformer`` that were moved to host memory already, with these settings.
    """
    split = _split(device, transformer.config)
    blocks = [*transformer.double_blocks, *transformer.single_blocks]
    by_device = streamed_by_device(settings, transformer.config)
    parts = parts or SwappedParts(transformer, settings, split)
    names = [f"double_blocks.{index}" for index in range(transformer.config.double_depth)]
    names += [f"single_blocks.{index}" for index in range(transformer.config.single_depth)]
    weights = [{number: parts.move(names[number]) for number in streamed} for streamed in by_device]
    embedders = {name: parts.move(name) for name in EMBEDDERS if settings.embedders}

    every = [*(one for own in weights for one in own.values()), *embedders.values()]
    first, on_gpu = split.devices[0], split.devices[0].type == "cuda"
    pinned = on_gpu and settings.pinned and all(one.pin(first) for one in every)
    if on_gpu and settings.pinned and not pinned:
        logger.warning("the system does not allow to pin the memory of all swapped weights; copying them takes longer.")
    if every and not on_gpu:
        logger.warning("swapped weights save no memory where the CPU itself computes.")

    for name, embedder_weights in embedders.items():
        embedder = getattr(transformer, name)
        embedder.forward = partial(_forward_with_copy, embedder_weights, first, embedder.forward)
    for own_device, share, own in zip(split.devices, split.shares, weights):
        if not own:
            continue
        numbered = {number - share.blocks.start: one for number, one in own.items()}  # as in a transformer of these blocks alone
        swapper = BlockSwapper(numbered, make_transfers(own_device, pinned), recomputed=settings.recomputed)
        for index, number in enumerate(share.blocks):
            blocks[number].branches = SwappedForward(swapper, index, blocks[number].branches)
        transformer.block_swap = swapper
        logger.info(
            "%d of %d blocks share %d places on %s; %.1f GiB of weights are in host memory",
            len(own),
            len(share.blocks),
            SLOTS,
            "the device" if len(split.devices) == 1 else own_device,
            sum(one.memory.nbytes for one in (every if len(split.devices) == 1 else own.values())) / 2**30,
        )


@dataclass(eq=False)
class _Slot:
    """Room for one block on the device."""

    memory: Tensor
    released: Any  # the mark after the last computation that reads what it held before
    block: int | None = None  # whose weights it holds, once the copy ``arrival`` is done
    arrival: Any = None


@dataclass(frozen=True)
class _SavedWeight:
    """In place of a tensor in a slot that autograd saves: which part it is of a block's weights."""

    block: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class BlockSwapper:
    """Has the weights of a block on the device when the block begins, and copies ahead those that are needed next.

    ``weights`` are those of the streamed blocks, by their place in the order of a forward pass. All blocks must begin through
    ``begin``, also those that stay on the device.
    """

    def __init__(self, weights: Mapping[int, HostWeights], transfers: Transfers, *, recomputed: bool) -> None:
        self.recomputed = recomputed
        self._weights = dict(sorted(weights.items()))
        self._transfers = transfers
        size = max(one.memory.nbytes for one in weights.values())
        size = -(-size // 16) * 16  # a whole number of elements of any dtype
        self._slots = [_Slot(transfers.allocate(size), transfers.mark()) for _ in range(min(SLOTS, len(weights)))]
        self._slot_at = {slot.memory.untyped_storage().data_ptr(): slot for slot in self._slots}
        self._views = {(block, id(slot)): one.views(slot.memory) for block, one in self._weights.items() for slot in self._slots}
        self._current: int | None = None
        self._forwards = True

    def begin(self, block: int) -> None:
        """Have the weights of ``block`` on the device for what is computed from now on; no other block computes any more."""
        if block == self._current and (block not in self._weights or self._slot_of(block) is not None):
            return
        self._release_current()
        if self._current is not None and block != self._current:
            self._forwards = block == 0 or block > self._current
        self._current = block
        wanted = list(itertools.islice(self._next_needed(block), len(self._slots)))
        for one in wanted:
            self._fetch(one, wanted)
        slot = self._slot_of(block)
        if slot is not None and block in self._weights:
            self._transfers.wait(slot.arrival)
            self._weights[block].point_at(self._views[block, id(slot)])

    def kept_for_backward(self) -> AbstractContextManager[Any]:
        """Inside, autograd saves where weights are instead of memory of the slots, and has them copied for the backward pass."""
        return nullcontext() if self.recomputed else saved_tensors_hooks(self._pack, self._unpack)

    def _release_current(self) -> None:
        slot = self._slot_of(self._current)
        if slot is not None:
            slot.released = self._transfers.mark()
            self._slots.remove(slot)
            self._slots.append(slot)  # the slot that was released first is filled first

    def _next_needed(self, block: int) -> Iterator[int]:
        """The streamed blocks from ``block`` on, in the order in which they will probably begin, each once."""
        ahead = [one for one in self._weights if one >= block]
        back = list(reversed(self._weights))
        if not self._forwards:
            order: Iterable[int] = itertools.chain([block], [one for one in back if one < block], self._weights)
        elif torch.is_grad_enabled():
            order = itertools.chain(ahead, back, self._weights)
        else:
            order = itertools.chain(ahead, self._weights)
        return iter(dict.fromkeys(one for one in order if one in self._weights))

    def _fetch(self, block: int, wanted: Collection[int]) -> None:
        if self._slot_of(block) is not None:
            return
        slot = next(slot for slot in self._slots if slot.block not in wanted)
        self._empty(slot)
        memory = self._weights[block].memory
        slot.arrival = self._transfers.copy(slot.memory[: memory.nbytes], memory, slot.released)
        slot.block = block

    def _empty(self, slot: _Slot) -> None:
        if slot.block is not None:
            self._weights[slot.block].point_at_host()
            slot.block = None

    def _slot_of(self, block: int | None) -> _Slot | None:
        return next((slot for slot in self._slots if block is not None and slot.block == block), None)

    def _pack(self, tensor: Tensor) -> Tensor | _SavedWeight:
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        if slot is None or slot.block is None:
            return tensor
        return _SavedWeight(slot.block, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, saved: Tensor | _SavedWeight) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.begin(saved.block)
        return self._slot_of(saved.block).memory.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)


class SwappedForward:
    """In place of a block's ``branches``: fetches its weights, then calls ``forward``, which a compiler may replace."""

    def __init__(self, swapper: BlockSwapper, index: int, forward: Callable[..., Any]) -> None:
        self.swapper = swapper
        self.index = index
        self.forward = forward

    def __call__(self, *inputs: Any) -> Any:
        self.swapper.begin(self.index)
        with self.swapper.kept_for_backward():
            return self.forward(*inputs)


def _forward_with_copy(weights: HostWeights, device: torch.device, forward: Callable[..., Any], *inputs: Any) -> Any:
    """Forward of a module whose weights are on the device only for this; what autograd saves of them stays there."""
    memory = weights.memory.to(device, non_blocking=True, copy=True)
    weights.point_at(weights.views(memory))
    try:
        # Hooks that change nothing: autograd then saves the memory that the parameters show now, and not the parameters.
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return forward(*inputs)
    finally:
        weights.point_at_host()
