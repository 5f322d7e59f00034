"""Functions that GPUs compute in one pass, compiled for the CPU: they give the same numbers, and new lengths no new graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from variations import slow_but

from hunyuan_model.quantization import scaled_mm
from hunyuan_model.quantization.formats import cast_to_float8, dequantize, quantize_channels, quantize_groups
from hunyuan_model.runtime.compilation import compiled_graphs
from hunyuan_model.transformer import cpu_kernels, fused, norms
from hunyuan_model.transformer.norms import RMSNorm, modulated_norm, rotated_norms
from hunyuan_model.transformer.rope import rotate_pairs, rotation_table

HIDDEN, HEADS = 48, 3
DIMS = (4, 6, 6)
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    fused.allow(True)
    fused._graphs_allowed.cache_clear()
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def on_the_cpu(request, monkeypatch) -> Callable[[], None]:
    """Compiles on the CPU from when it is called."""

    def begin() -> None:
        functions: dict[object, Callable] = {}
        monkeypatch.setattr(
            fused, "_compiled", lambda function: functions.setdefault(function, fused.compiled(function, request.param))
        )
        for module in (fused, norms):
            monkeypatch.setattr(module, "usable", lambda tensor: not torch.compiler.is_compiling())
        monkeypatch.setattr(fused, "_give_up", _raise)
        monkeypatch.setattr(cpu_kernels, "rotate_pairs", rotate_pairs)

    return begin


def _raise(error: Exception) -> None:
    raise error


def values(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normed(rows: int, rotated: bool) -> list[torch.Tensor]:
    """Norms and gradient of queries and keys that are parts of a larger tensor."""
    norm = RMSNorm(sum(DIMS)).to(DTYPE).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, sum(DIMS)))
    rope = rotation_table((1, rows, 1), DIMS, 256.0, torch.device("cpu"), 1) if rotated else None
    joined = values(1, rows + 1, 3 * HEADS * sum(DIMS)).requires_grad_()
    queries, keys, _ = joined.unflatten(-1, (3, HEADS, -1)).unbind(2)
    outputs = rotated_norms(queries, keys, norm, norm, rope)
    return [*outputs, *torch.autograd.grad(outputs, joined, [values(*out.shape, seed=1) for out in outputs])]


def modulated(rows: int, samples: int = 1, trained: bool = False) -> list[torch.Tensor]:
    x, vectors = values(samples, rows, HIDDEN).requires_grad_(), values(samples, 1, 2 * HIDDEN, seed=2).requires_grad_(trained)
    with torch.autocast("cpu", DTYPE):
        out = modulated_norm(x, *vectors.chunk(2, dim=-1))
    return [out, *torch.autograd.grad(out, (x, vectors) if trained else x, values(*out.shape, seed=1))]


COMPUTATIONS = {
    "norm": lambda rows: normed(rows, rotated=False),
    "norm and rotation": lambda rows: normed(rows, rotated=True),
    "modulated norm": modulated,
    "modulated norm, trained": lambda rows: modulated(rows, trained=True),
    "modulated norms of two samples": lambda rows: modulated(rows, samples=2),
    "int8": lambda rows: [_dequantized(*quantize_groups(values(rows, 128, dtype=torch.float32)))],
    "float8": lambda rows: [_dequantized(*quantize_channels(values(rows, 128, dtype=torch.float32)))],
    "quantized rows": lambda rows: _products(values(rows, 32), per_row=True),
    "quantized with one scale": lambda rows: _products(values(rows, 32), per_row=False),
    "float8, transposed": lambda rows: [_column_major(values(rows, 32))],
}


@torch.no_grad()
def _dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return dequantize(codes, DTYPE, scale)


@torch.no_grad()
def _products(x: torch.Tensor, per_row: bool) -> list[torch.Tensor]:
    codes, scale = scaled_mm.quantize(x, values(1, 32, seed=3, dtype=torch.float32), per_row)
    return [codes.float() * scale]


@torch.no_grad()
def _column_major(weight: torch.Tensor) -> torch.Tensor:
    columns = scaled_mm.column_major(cast_to_float8(weight)[0])
    assert columns.stride(0) == 1
    return columns.float()


@pytest.mark.parametrize("name", slow_but(COMPUTATIONS, "norm and rotation", "modulated norm, trained", "int8", "quantized rows"))
def test_compiled_functions_give_the_same_numbers_and_new_lengths_no_graphs(name, on_the_cpu):
    compute = COMPUTATIONS[name]
    expected = {rows: compute(rows) for rows in (7, 19, 33)}
    on_the_cpu()
    graphs = compiled_graphs()
    for rows, tensors in expected.items():
        for one, other in zip(compute(rows), tensors, strict=True):
            assert one.dtype == other.dtype
            within = {"rtol": 0.15, "atol": 1e-3} if "quantized" in name else {"rtol": 2**-7, "atol": 2**-6}
            torch.testing.assert_close(one, other, **within)
        if rows == 7:
            first = compiled_graphs()
            assert first > graphs
    assert compiled_graphs() == first


def test_more_kinds_of_inputs_than_torch_allows_are_compiled_in_every_thread(on_the_cpu):
    """torch's own limit is 8; each thread has its settings."""
    on_the_cpu()
    graphs, double = compiled_graphs(), fused.fused()(lambda x: x * 2)

    def call(kinds: int) -> None:
        with torch.no_grad():
            for dims in range(1, kinds + 1):
                assert double(torch.ones((2,) * dims)).sum() == 2 * 2**dims

    call(1)
    with ThreadPoolExecutor(1) as backward:
        backward.submit(call, 12).result()
    assert compiled_graphs() == graphs + 12


def test_what_cannot_be_compiled_is_computed_as_it_is_written(monkeypatch, caplog):
    expected = modulated(5)

    def fails(function: Callable) -> Callable:
        def called(*arguments: object) -> None:
            raise RuntimeError("no compiler")

        return called

    monkeypatch.setattr(fused, "_compiled", fails)
    monkeypatch.setattr(fused, "_capability", lambda device: (9, 0))
    for module in (fused, norms):
        monkeypatch.setattr(module, "usable", lambda tensor: fused._allowed)
    with caplog.at_level(logging.WARNING):
        found = modulated(5)
    assert len(caplog.messages) == 1 and "no compiler" in caplog.messages[0] and "--no_fused_kernels" in caplog.messages[0]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [((7, 5), DTYPE, False), ((8, 6), DTYPE, True), ((8, 6), torch.float8_e4m3fn, False), ((8, 9), torch.float8_e4m3fn, True)],
    ids=str,
)
def test_gpus_that_compute_in_the_dtype(capability, dtype, expected, monkeypatch):
    monkeypatch.setattr(fused, "_capability", lambda device: capability)

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 0)

    OnGpu.dtype, OnGpu.is_floating_point = dtype, lambda self: dtype.is_floating_point
    assert fused.usable(OnGpu()) == expected
    fused.allow(False)
    assert not fused.usable(OnGpu())


def test_nothing_is_compiled_on_the_cpu():
    graphs = compiled_graphs()
    modulated(5), normed(5, rotated=True)
    assert compiled_graphs() == graphs
