"""Small functions of element-wise operators that a GPU computes in one pass over memory: torch compiles them at their first call.

Whole blocks need not be compiled for that. Where there is no Triton the functions run as they are written.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CAPABILITY = (8, 0)  # from which on Triton computes in bfloat16
FLOAT8_CAPABILITY = (8, 9)
SHOWN_CHARACTERS = 300
MAX_GRAPHS = 64  # of one function: for one sample and for several, rotated or not, in views of any kind; torch gives up after 8

_allowed = True


def allow(value: bool) -> None:
    """Whether functions may be compiled, for the whole process; they are unless this forbids it."""
    global _allowed
    _allowed = value


def usable(tensor: Tensor) -> bool:
    """Whether a ``fused`` function of ``tensor`` is computed in one pass."""
    if not tensor.is_cuda or not _allowed or torch.compiler.is_compiling():
        return False
    return _capability(tensor.device) >= (
        FLOAT8_CAPABILITY if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else CAPABILITY
    )


def fused(*changing: Sequence[int]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a function whose first argument is a tensor: compiled where that is ``usable`` and gradients are off.

    That they are off is so in the forward and in the backward pass of autograd functions, which is where these belong.

    Args:
        changing: for each of the first arguments, the dimensions whose sizes differ from call to call: one graph serves them all.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any) -> Any:
            if torch.is_grad_enabled() or not usable(arguments[0]):
                return function(*arguments)
            try:
                _graphs_allowed(threading.get_ident())
                return _compiled(function)(*_prepared(arguments, changing))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers, drivers and caches fail in many ways
                _give_up(error)
                return function(*arguments)

        return called

    return decorate


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """``function`` as torch compiles it, which takes place in its first call."""
    return torch.compile(function, backend=backend)


def allow_graphs() -> None:
    """Have torch compile any function for ``MAX_GRAPHS`` kinds of inputs, before it computes others as they are written."""
    import torch._dynamo  # here, as it takes a second

    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(MAX_GRAPHS, getattr(torch._dynamo.config, limit)))


@functools.cache
def _graphs_allowed(thread: int) -> None:
    """``allow_graphs`` once in each thread: they have settings of their own, and a GPU's backward pass has its own thread."""
    allow_graphs()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU for which Triton is there; (0, 0) elsewhere."""
    if not torch.cuda.is_available() or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return (0, 0)
    logger.info("norms, rotations and dequantization are compiled for %s at their first use", torch.cuda.get_device_name(device))
    return torch.cuda.get_device_capability(device)


def _prepared(arguments: Sequence[Any], changing: Sequence[Sequence[int]]) -> list[Any]:
    """The arguments without what the compiler would make graphs of its own for: gradients, and what a view belongs to."""
    prepared = [value.data if isinstance(value, Tensor) else value for value in arguments]
    for value, dims in zip(prepared, changing):
        for dim in dims if isinstance(value, Tensor) else ():
            if value.shape[dim] > 1:  # a size of one is computed in another way
                torch._dynamo.maybe_mark_dynamic(value, dim)
    return prepared


def _give_up(error: Exception) -> None:
    allow(False)
    cause = getattr(error, "inner_exception", None) or error.__cause__ or error  # torch wraps it in advice for developers
    reason = " ".join(str(cause).split())[:SHOWN_CHARACTERS].rstrip(".")
    logger.warning(
        "torch cannot compile for this GPU (%s): norms, rotations and dequantization go on uncompiled, which is slower. "
        "--no_fused_kernels leaves the attempt out.",
        reason,
    )
