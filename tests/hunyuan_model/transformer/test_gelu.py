"""GELU by sigmoids in slices, in place and beside other values, against the formula in float64 and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hunyuan_model.transformer import gelu as gelu_module
from hunyuan_model.transformer.blocks import MLP
from hunyuan_model.transformer.gelu import gelu, join_gelu

ROWS, LEFT, WIDTH = 21, 6, 10


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(gelu_module, "SLICE_VALUES", 8 * WIDTH)  # 4 rows of two samples, or 8 of one: the last slice is a short one


def values(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def formula(x: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))


@torch.no_grad()
def test_values_are_those_of_the_formula():
    x = torch.cat((values(2, ROWS, WIDTH).flatten(), torch.linspace(-12, 12, 2 * ROWS * WIDTH))).view(4, ROWS, WIDTH)
    found = gelu(x.clone())
    # To the last digits of float32, also where little is left of x and torch's own kernel has lost them.
    torch.testing.assert_close(found.double(), formula(x), rtol=2e-6, atol=1e-10)


@torch.no_grad()
def test_it_survives_the_ends_of_the_range():
    x = torch.tensor([[0.0, 1e-30, -1e-30, 1e6, -1e6, 3e38, -3e38, torch.inf, torch.nan]])
    found, expected = gelu(x.clone()), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_join_is_a_cat_for_parts_of_wider_tensors(dtype):
    wide = values(2, ROWS, 3 * LEFT + WIDTH, dtype=dtype)
    x, left = wide[..., 3 * LEFT :], values(2, ROWS, LEFT, dtype=dtype)
    before = wide.clone()
    found = join_gelu(left, x)
    assert found.is_contiguous() and found.dtype == dtype
    assert torch.equal(wide, before)
    torch.testing.assert_close(found, torch.cat((left, F.gelu(x, approximate="tanh")), dim=-1), rtol=1e-6, atol=1e-6)
    assert join_gelu(left[:, :0], x[:, :0]).shape == (2, 0, LEFT + WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_gradients_the_values_are_the_same_and_nothing_is_written_over(dtype):
    wide, left = values(2, ROWS, LEFT + WIDTH, dtype=dtype).requires_grad_(), values(2, ROWS, LEFT, dtype=dtype).requires_grad_()
    x, before = wide[..., LEFT:], wide.detach().clone()
    found = join_gelu(left, x)
    with torch.no_grad():
        assert torch.equal(found, join_gelu(left, x))
    assert torch.equal(gelu(x), found[..., LEFT:]) and torch.equal(wide, before)
    expected = torch.cat((left.double(), formula(x)), dim=-1)
    above = values(*expected.shape)
    within = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    gradients = torch.autograd.grad(found, (wide, left), above.to(dtype))
    for one, other in zip(gradients, torch.autograd.grad(expected, (wide, left), above)):
        torch.testing.assert_close(one, other, **within)


def test_gradients_are_those_of_the_formula_in_the_tails_too():
    x = torch.linspace(-8, 8, 2 * ROWS * WIDTH).view(-1, WIDTH).requires_grad_()
    (found,) = torch.autograd.grad(gelu(x).sum(), x)
    (expected,) = torch.autograd.grad(formula(x).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_mlp_leaves_its_input_as_it_is():
    mlp, x = MLP(WIDTH, 4 * WIDTH), values(1, ROWS, WIDTH)
    before = x.clone()
    expected = mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before)
