"""The two small products of a LoRA beside its layer, with as little memory traffic as they allow."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_product(hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """``scale * hidden @ up.T``: (..., rank) -> (..., out), in the dtype of ``hidden``."""
    return F.linear(hidden * scale, up.to(hidden.dtype))  # scaled where there are few numbers


def add_low_rank_product(
    base: Callable[[Tensor], Tensor],
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    dropped: Callable[[Tensor], Tensor],
    in_place: bool,
) -> Tensor:
    """``base(x) + scale * dropped(x @ down.T) @ up.T``, with gradients: (..., in) -> (..., out), one dtype.

    What autograd needs is kept before ``base`` computes, so that a recomputation leaves that out where it comes last.

    Args:
        in_place: the forward pass adds its second product to what ``base`` gives, and the backward pass its gradient of x to that
            of ``base``: nothing as large is made. Only for a base that makes both anew, and needs neither, as matmuls do.
    """
    same, hidden = _Down.apply(x, down, in_place)
    hidden = dropped(hidden)
    path = _UpPath.apply(hidden, up, scale)
    return _UpValue.apply(path, base(same if x.requires_grad else x), hidden.detach(), up.detach(), scale, in_place)


class _Down(torch.autograd.Function):
    """x (..., in) and down (rank, in) -> x once more, for the base layer, and x @ down.T.

    Both gradients of x meet here, and not in autograd, which would make each of them and then their sum.
    """

    @staticmethod
    def forward(ctx, x: Tensor, down: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, down)
        ctx.set_materialize_grads(False)
        ctx.in_place = in_place
        return x.view_as(x), F.linear(x, down)

    @staticmethod
    def backward(ctx, of_same: Tensor | None, of_hidden: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x, down = ctx.saved_tensors
        if of_hidden is None:
            return of_same, None, None
        rows = of_hidden.reshape(-1, len(down))
        of_down = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_down, None
        if of_same is None:
            return of_hidden @ down, of_down, None
        return _added(of_same, rows, down, 1.0, ctx.in_place), of_down, None


class _UpPath(torch.autograd.Function):
    """The way of the gradient through scale * hidden @ up.T: (..., rank) -> any values (..., out), which take no memory."""

    @staticmethod
    def forward(ctx, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(hidden, up)
        ctx.scale = scale
        return hidden.new_empty(()).expand(*hidden.shape[:-1], len(up))  # nobody reads it

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, up = ctx.saved_tensors
        rows, of_hidden, of_up = gradient.reshape(-1, len(up)), None, None
        hidden_rows = hidden.reshape(-1, hidden.shape[-1])
        if ctx.needs_input_grad[0]:  # nothing is added where beta is 0
            of_hidden = torch.addmm(hidden_rows, rows, up, beta=0, alpha=ctx.scale).view(hidden.shape)
        if ctx.needs_input_grad[1]:
            of_up = torch.addmm(up, rows.T, hidden_rows, beta=0, alpha=ctx.scale)
        return of_hidden, of_up, None


class _UpValue(torch.autograd.Function):
    """base + scale * hidden @ up.T, whose gradient goes along ``path`` as well as to ``base``.

    ``base`` is not marked as dirty: of a layer with a bias it is a view, and autograd copies gradients of views that were written
    to. Autograd sees what is overwritten by its version all the same.
    """

    @staticmethod
    def forward(ctx, path: Tensor, base: Tensor, hidden: Tensor, up: Tensor, scale: float, in_place: bool) -> Tensor:
        hidden, up = hidden.to(base.dtype), up.to(base.dtype)
        return _added(base, hidden.reshape(-1, hidden.shape[-1]), up.T, scale, in_place)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        return gradient, gradient, None, None, None, None


def _added(to: Tensor, rows: Tensor, factor: Tensor, scale: float, in_place: bool) -> Tensor:
    """``to + scale * rows @ factor``: (..., out), (rows, rank) and (rank, out) -> (..., out)."""
    flat = to.reshape(-1, to.shape[-1])
    return (flat.addmm_ if in_place else flat.addmm)(rows, factor, alpha=scale).view(to.shape)
