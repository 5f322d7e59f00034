"""What a recomputation may leave out: the product of a block's last linear layer, whose result no gradient depends on.

Checkpointing computes a block a second time for what its backward pass keeps. The last layer only adds to the block's output:
its gradient takes its weight and the gate, not its result. That product is the largest of a single block but one, so it is left
out where nothing is hooked in that may ask for the result. A LoRA on top of the layer needs its own input and no more.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, noop_context_fn

from hunyuan_model.transformer.blocks import MMDoubleStreamBlock, MMSingleStreamBlock, ModulateDiT

# The last layers of a block by its class, and beside each what makes its gate.
LAST_LAYERS = {
    MMDoubleStreamBlock: (("img_mlp.fc2", "img_mod"), ("txt_mlp.fc2", "txt_mod")),
    MMSingleStreamBlock: (("linear2", "modulation"),),
}
PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)

_thread = threading.local()  # backward passes recompute in threads of their own


def result_unneeded() -> bool:
    """Whether the linear layer that computes now, in this thread, may answer with ``stand_in``."""
    return getattr(_thread, "unneeded", False)


def stand_in(x: Tensor, features: int) -> Tensor:
    """(..., in) -> what takes the place of (..., features): zeros that take no memory and must not be written to."""
    return x.new_zeros(()).expand(*x.shape[:-1], features)


class LastLayer:
    """In place of the forward of a block's last linear layer, which nothing wraps yet.

    Args:
        around: the modules between the block and the layer.
        gate: what the layer's result is multiplied with.
    """

    def __init__(self, layer: nn.Linear, around: Sequence[nn.Module], gate: ModulateDiT) -> None:
        self.layer = layer
        self.around = around
        self.gate = gate
        self.base_forward = layer.forward
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); while the block is recomputed, something of that shape and with the same gradient."""
        if not getattr(_thread, "recomputing", False) or not x.is_contiguous():
            return self.base_forward(x)
        _thread.unneeded = True
        try:
            with _WithoutProducts():
                return self.base_forward(x)
        finally:
            _thread.unneeded = False

    def may_be_left_out(self) -> bool:
        """Whether what is hooked into the block now asks for no more than the layer's gradient."""
        # A gate that learns takes the result for its own gradient.
        if any(parameter.requires_grad for parameter in self.gate.parameters()):
            return False
        plain = not any("forward" in vars(module) or _has_hooks(module) for module in (*self.around, self.gate, self.gate.linear))
        return plain and type(self.layer) is nn.Linear and not _has_hooks(self.layer) and self._is_only_added_to()

    def _is_only_added_to(self) -> bool:
        wrapper: Any = self.layer.forward
        while (owner := getattr(wrapper, "__self__", None)) is not self:
            if not getattr(wrapper, "only_adds", False):  # of the function: a class that overrides it is another case
                return False
            wrapper = owner.base_forward
        return True


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _only_multiplies(layer: nn.Linear) -> bool:
    """Whether ``layer`` is computed by what is known to be its product and nothing else."""
    forward = layer.forward
    plain = getattr(forward, "__func__", None) is nn.Linear.forward
    return type(layer) is nn.Linear and (plain or getattr(forward, "only_multiplies", False))


class _WithoutProducts(TorchDispatchMode):
    """Matrix products give zeros. Autograd, which stands above this, notes them as ever."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function not in PRODUCTS:
            return function(*args, **(kwargs or {}))
        left, right = args[-2:]
        return stand_in(left, right.shape[1])


def hook_last_layers(block: nn.Module) -> list[LastLayer]:
    """Have the last layers of ``block`` heed that it is recomputed, beneath whatever wraps their forward later.

    Returns:
        Them; none where something wraps one of them already.
    """
    places = []
    for path, gate in LAST_LAYERS.get(type(block), ()):
        *around, layer = path.split(".")
        parents = list(itertools.accumulate(around, getattr, initial=block))
        places.append((getattr(parents[-1], layer), parents[1:], getattr(block, gate)))
    return [LastLayer(*place) for place in places] if all(_only_multiplies(layer) for layer, _, _ in places) else []


def checkpoint_block(last_layers: Sequence[LastLayer], forward: Callable[..., Any], *inputs: Any) -> Any:
    """``forward(*inputs)``, which is computed again for the backward pass.

    Args:
        last_layers: of the block, from ``hook_last_layers``.
        inputs: those of the block by position, of which vec, rope and lengths are the last three.
    """
    leave_out = last_layers and not inputs[-3].requires_grad and all(layer.may_be_left_out() for layer in last_layers)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=_contexts if leave_out else noop_context_fn)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _Recomputation()


class _Recomputation:
    """A block is computed again inside. A graph that is kept enters it once for each backward pass."""

    def __enter__(self) -> None:
        _thread.recomputing = True

    def __exit__(self, *_: object) -> None:
        _thread.recomputing = False
