"""Attention that a recomputation does not compute again: what its operators gave in the forward pass is kept through checkpointing.

Kept are the output, in the compute dtype, and the log-sum-exps, float32: with q, k and v, which are recomputed, that is all the
backward pass of attention needs. A dispatch mode sees the operators below autograd, whichever of torch or of a package they are.
It stands around attention alone, because it costs Python time for every operator that passes through it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_model.transformer.attention import OPERATORS, Attention

logger = logging.getLogger(__name__)

Keep = Callable[[Tensor], Callable[[], Tensor]]
"""Keeps a tensor; what it returns gives the tensor back, as often as it is asked."""


def keep_on_device(tensor: Tensor) -> Callable[[], Tensor]:
    """A ``Keep`` that moves nothing. Each time another tensor over the same memory, as autograd marks what it is given."""
    return tensor.detach().detach


class AttentionResults:
    """What the attention operators of one pass through a block gave, in the order of their calls."""

    def __init__(self, keep: Keep = keep_on_device) -> None:
        self._keep = keep
        self._kept: list[list[Callable[[], Any]]] | None = None

    def mode(self) -> TorchDispatchMode:
        """For attention inside: keeps what operators give, the first time it is asked for; later gives that in their place."""
        if self._kept is None:
            self._kept = []
            return _Operators(self._record)
        left = iter(self._kept)
        return _Operators(lambda compute: tuple(again() for again in next(left)))

    @property
    def is_empty(self) -> bool:
        """Whether a pass came by in which no known operator was called."""
        return self._kept == []

    def _record(self, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        results = compute()
        self._kept.append([self._keep(value) if isinstance(value, Tensor) else partial(_same, value) for value in results])
        return results


def _same(value: Any) -> Any:
    return value


class _Operators(TorchDispatchMode):
    """Hands attention operators to ``answer``, which computes them or does not."""

    def __init__(self, answer: Callable[[Callable[[], Sequence[Any]]], Sequence[Any]]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        compute = partial(func, *args, **(kwargs or {}))
        return self._answer(compute) if func.name() in OPERATORS else compute()


class KeptAttention:
    """In place of a block's attention: uses the results of the pass in which the block is."""

    _warned = False  # for all blocks

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self._mode: AbstractContextManager[Any] = nullcontext()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        with self._mode:
            return self.attention(q, k, v, lengths)

    @contextmanager
    def using(self, results: AttentionResults) -> Iterator[None]:
        """For a pass through the block inside: the first one with ``results`` fills them, others compute no attention."""
        self._mode = results.mode()
        try:
            yield
        finally:
            self._mode = nullcontext()
        if results.is_empty and not self._warned:
            KeptAttention._warned = True
            logger.warning("this attention package has no operators that --keep_attention knows: attention is computed twice.")
