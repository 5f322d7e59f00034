"""Compiling the transformer's blocks, so that what lies between their matrix products is computed in a few passes over memory.

One graph serves all blocks of a kind, since weights are inputs of it, and all sizes, since the numbers of tokens are symbols in
it. There are a few such graphs: with and without gradients, for one sample and for several, and for the block whose inputs have
no gradient. What is compiled is the innermost of all that wraps a block: swapping and checkpointing go on outside and are not
seen, while float8 weights and whatever is hooked into Linear layers, before the first pass, are traced with the block.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_model.runtime.offload.block_swap import SwappedForward
from hunyuan_model.transformer.attention import Attention
from hunyuan_model.transformer.fused import allow_graphs
from utils.errors import UserError

logger = logging.getLogger(__name__)

BACKEND = "inductor"
SHOWN_CHARACTERS = 300
TRACEABLE_MODES = ("torch", "sdpa")


@dataclass(frozen=True)
class CompileSettings:
    """How blocks are compiled: mode and backend of torch.compile."""

    mode: str = "default"  # not one with CUDA graphs, which want weights and inputs at the same place in every call
    backend: str = BACKEND  # another one than inductor has no modes

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which is compiled when it is first called."""
        return torch.compile(function, backend=self.backend, mode=self.mode if self.backend == "inductor" else None)


def check_compile(device: torch.device, settings: CompileSettings, flag: str = "--compile") -> None:
    """Find out by compiling a small function whether ``device`` can compute what torch compiles; takes some seconds.

    Raises:
        UserError: names ``flag``, what is missing, and what to do.
    """
    try:
        settings.compiled(_small_function)(torch.ones(8, device=device))
    except Exception as error:  # compilers, drivers and caches fail in many ways
        cause = getattr(error, "inner_exception", None) or error.__cause__ or error  # torch wraps it in advice for developers
        reason = " ".join(str(cause).split())[:SHOWN_CHARACTERS].rstrip(".")
        raise UserError(
            f"{flag}: torch cannot compile for {device} here ({reason}). It needs a C++ compiler on the CPU, and on a GPU the "
            f"package triton (on Windows: pip install triton-windows). Install it, or leave {flag} out."
        ) from error


def _small_function(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * 2 + 1


def enable_compile(transformer: nn.Module, settings: CompileSettings) -> None:
    """Have the blocks of ``transformer`` compiled in their first forward passes, from outside; they keep class and parameters.

    Call it once, after loading (with swapped blocks or without) and before ``enable_gradient_checkpointing``.
    """
    compiled: dict[type, Callable[..., Any]] = {}
    attentions: dict[int, _CompilableAttention] = {}
    for block in (*transformer.double_blocks, *transformer.single_blocks):
        swapped = block.branches if isinstance(block.branches, SwappedForward) else None
        own = swapped.forward if swapped else block.branches
        if getattr(own, "__func__", None) is not type(block).branches:
            raise RuntimeError("something wraps this block already; compile it before that")
        if type(block) not in compiled:
            compiled[type(block)] = settings.compiled(type(block).branches)
        if id(block.attention) not in attentions:
            attentions[id(block.attention)] = _CompilableAttention(block.attention)
        block.attention = attentions[id(block.attention)]
        forward = CompiledForward(block, compiled[type(block)])
        if swapped:
            swapped.forward = forward
        else:
            block.branches = forward


class CompiledForward:
    """In place of a block's ``branches``, or of what ``SwappedForward`` calls: prepares the inputs for the compiled function."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.block = block
        self.forward = forward

    def __call__(self, *inputs: Any) -> Any:
        """``inputs`` as a block takes them: tokens (B, L, hidden), once or twice, vec, rope and lengths."""
        *tokens, vec, rope, lengths = inputs
        allow_graphs()  # each time: torch's settings are those of a thread, and a GPU's backward pass has one of its own
        if not torch.is_grad_enabled():
            # The first block is given a view, the others are not: that would be another graph.
            tokens = [part.clone() if part._is_view() else part for part in tokens]
        for part in tokens:
            _may_change(part, 0, 1)
        _may_change(vec, 0)
        _may_change(rope, 0)
        return self.forward(self.block, *tokens, vec, rope, None if lengths is None else _Lengths(lengths))


def _may_change(tensor: Tensor, *dims: int) -> None:
    """Tell the compiler which sizes differ from call to call. A size of one it computes in another way, in a graph of its own."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


class _Lengths:
    """Numbers of valid rows, where the compiler does not look at them: each caption would make a graph of its own."""

    def __init__(self, values: Sequence[int]) -> None:
        self.values = values


class _CompilableAttention:
    """In place of a block's attention. Only torch's own, over samples of one length, is traced with the block.

    The others end a graph, and the next one begins after them. They are library calls, of which a compiler makes nothing else;
    what is lost is a small part of the gain.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.traceable = attention.mode in TRACEABLE_MODES and not attention.split
        self.untraced = torch.compiler.disable(_attend)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: _Lengths | None) -> Tensor:
        if lengths is None and self.traceable:
            return self.attention(q, k, v)
        return self.untraced(self.attention, q, k, v, lengths)


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, lengths: _Lengths | None) -> Tensor:
    return attention(q, k, v, None if lengths is None else lengths.values)


class CompileWatch:
    """Logs how long something took that included compiling; measures from when it was made or last asked."""

    def __init__(self) -> None:
        self._graphs, self._started = compiled_graphs(), time.monotonic()

    def report(self, what: str) -> None:
        """Log the time that ``what`` took if anything was compiled meanwhile."""
        graphs, now = compiled_graphs(), time.monotonic()
        if graphs > self._graphs:
            logger.info("%s compiles: %.1f s", what, now - self._started)
        self._graphs, self._started = graphs, now


def compiled_graphs() -> int:
    """How many graphs were compiled in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # imported with the first torch.compile
    return dynamo.counters["stats"]["unique_graphs"] if dynamo is not None else 0
