"""GELU alone and beside other values, and its form for CPUs, against the formula in float64 and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hunyuan_model.transformer import cpu_kernels
from hunyuan_model.transformer.gelu import cat_gelu, gelu

ROWS, LEFT, WIDTH = 21, 6, 10


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "SLICE_VALUES", 8 * WIDTH)  # 4 rows of two samples, or 8 of one: the last slice is a short one


def values(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def formula(x: torch.Tensor) -> torch.Tensor:
    exact = x.double()
    return 0.5 * exact * (1 + torch.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)))


def test_values_and_gradients_are_those_of_the_formula():
    x = torch.cat((values(2, ROWS, WIDTH).flatten(), torch.linspace(-12, 12, 2 * ROWS * WIDTH))).view(4, ROWS, WIDTH)
    x.requires_grad_()
    # To the last digits of float32, also where little is left of x and torch's own kernel has lost them.
    torch.testing.assert_close(gelu(x).double(), formula(x), rtol=2e-6, atol=1e-10)
    for one, other in zip(torch.autograd.grad(gelu(x).sum(), x), torch.autograd.grad(formula(x).sum(), x)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_it_survives_the_ends_of_the_range():
    x = torch.tensor([[0.0, 1e-30, -1e-30, 1e6, -1e6, 3e38, -3e38, torch.inf, torch.nan]])
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cat_takes_parts_of_larger_tensors_and_writes_over_nothing(dtype):
    whole, left = values(2, ROWS, LEFT + WIDTH, dtype=dtype).requires_grad_(), values(2, ROWS, LEFT, dtype=dtype).requires_grad_()
    x, before = whole[..., LEFT:], whole.detach().clone()
    found = cat_gelu(left, x)
    with torch.no_grad():
        assert torch.equal(found, cat_gelu(left, x))
    assert found.is_contiguous() and found.dtype == dtype and torch.equal(whole, before)
    assert torch.equal(gelu(x), found[..., LEFT:])
    assert cat_gelu(left[:, :0], x[:, :0]).shape == (2, 0, LEFT + WIDTH)
    expected = torch.cat((left.double(), formula(x)), dim=-1)
    within = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(found.double(), expected, **within)
    above = values(*expected.shape)
    gradients = torch.autograd.grad(found, (whole, left), above.to(dtype))
    for one, other in zip(gradients, torch.autograd.grad(expected, (whole, left), above)):
        torch.testing.assert_close(one, other, **within)
