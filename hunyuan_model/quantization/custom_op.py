"""Functions into which ``torch.compile`` does not look.

A compiler that sees a weight dequantized in the forward and in the backward pass dequantizes it once and keeps the copy in
between. Behind operators of their own it sees only tensors in and a tensor out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.library import custom_op


def opaque(shape_of: Callable[..., torch.Tensor]) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Decorator: the function, for the insides of autograd functions, is one operator for the compiler.

    Args:
        shape_of: an empty tensor like the function's result, from its (annotated) arguments.
    """

    def decorate(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        operator = custom_op(f"musubi_tuner::{function.__name__.strip('_')}", function, mutates_args=())
        operator.register_fake(shape_of)

        @functools.wraps(function)
        def called(*arguments: Any) -> torch.Tensor:
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        return called

    return decorate
