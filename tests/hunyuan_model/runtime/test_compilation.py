"""Compiled blocks: the same numbers, a few graphs for all blocks and sizes, and what is said where nothing can be compiled.

Most of it is traced only, as generating code takes minutes on a slow machine; one slow test has torch generate it.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from safetensors.torch import load_file
from small_transformer import CONFIG, CPU, add_lora, make_inputs, make_transformer, same
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import hunyuan_model
from hunyuan_model.quantization.formats import FP8_DTYPE
from hunyuan_model.runtime import compilation
from hunyuan_model.runtime.compilation import (
    CompileSettings,
    check_compile,
    compiled_graphs,
    enable_compile,
)
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.offload.activation_offload import make_offloader
from hunyuan_model.runtime.offload.block_swap import SwapSettings, enable_block_swap
from hunyuan_model.transformer.fused import MAX_GRAPHS
from networks.network_module import network_off
from utils.errors import UserError

# A LoRA for a part of the layers, as tracing it takes most of the time: two in each kind of block.
FEW = {"exclude_patterns": "['.*']", "include_patterns": "['.*(img_attn_qkv|txt_mlp.fc2|linear1|linear2)']"}
TRACED = CompileSettings(backend="eager")  # the graphs as they are found, run as they are
LOWERED = CompileSettings(backend="aot_eager")  # with a graph for the backward pass, and no code generated


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make(double: int = 2, single: int = 2, fp8: bool = False) -> nn.Module:
    return make_transformer(fp8, replace(CONFIG, double_depth=double, single_depth=single))


def train_and_sample(transformer: nn.Module, network: nn.Module) -> list[torch.Tensor]:
    """Outputs and gradients of training steps in several sizes, with samples in between."""
    found = []
    for seed, lengths, size in ((0, (5,), (1, 4, 6)), (1, (3,), (2, 2, 4))):
        found.append(transformer(*make_inputs(seed, lengths, size)))
        found[-1].square().mean().backward()
        found += [parameter.grad for parameter in network.parameters()]
        network.zero_grad(set_to_none=True)
        network.eval()
        with torch.no_grad():
            found.append(transformer(*make_inputs(seed + 5, (4 + seed,), (1 + seed, 4, 4))))
        network.train()
    return found


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor], within: float = 1e-5) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one - other).norm() <= within * (1 + other.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


@pytest.mark.slow
def test_a_few_graphs_serve_all_blocks_and_sizes() -> None:
    transformer, plain = make(3, 4), make(3, 4)
    enable_compile(transformer, TRACED)
    network = add_lora(transformer, **FEW)
    add_lora(plain, **FEW)

    def graphs_of(lengths: tuple[int, ...], size: tuple[int, int, int] = (1, 4, 6), seed: int = 0) -> int:
        before = compiled_graphs()
        found, expected = (model(*make_inputs(seed, lengths, size)) for model in (transformer, plain))
        assert_close([found], [expected])
        return compiled_graphs() - before

    for lengths in ((6,), (6, 6), (6, 2)):  # one sample, several, and several of different lengths: each has its graphs
        assert 0 < graphs_of(lengths) < 7, "blocks share graphs"
    network.eval()
    with torch.no_grad():
        assert graphs_of((6,)) > 0
        assert graphs_of((4,), (2, 4, 4)) == 0
    network.train()
    graphs_of((3, 5), (2, 4, 4))  # captions of different lengths end a graph at the attention: sizes are fixed there at first
    graphs_of((1, 0, 4, 2), (1, 4, 8))
    for lengths in ((5,), (4, 4, 4), (4, 2, 3), (2, 6)):
        assert graphs_of(lengths, (1, 6, 6)) == 0, "a new size needs no new graph"
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.parametrize(
    ("swapped", "checkpointing", "fp8"),
    [
        pytest.param(2, True, True, id="swap, checkpointing, float8", marks=pytest.mark.slow),
        pytest.param(2, False, False, id="swap", marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_those_of_eager_blocks(swapped: int, checkpointing: bool, fp8: bool) -> None:
    def run(settings: CompileSettings | None, swap: int) -> list[torch.Tensor]:
        transformer = make(fp8=fp8)
        enable_block_swap(transformer, SwapSettings(swap, recomputed=checkpointing), CPU)
        if settings is not None:
            enable_compile(transformer, settings)
        if checkpointing:
            enable_gradient_checkpointing(transformer)
        return train_and_sample(transformer, add_lora(transformer, **FEW))

    expected = run(None, 0)
    graphs = compiled_graphs()
    found = run(LOWERED, 0)
    made = compiled_graphs() - graphs
    assert all(value.isfinite().all() for value in found) and any(value.norm() > 0.01 for value in found)
    assert_close(found, expected)
    if swapped:
        assert same(run(LOWERED, swapped), found)
        assert compiled_graphs() == graphs + made, "it is not seen by the compiler"


def test_recomputations_in_the_thread_of_a_gpu_may_have_as_many_graphs() -> None:
    """Autograd computes backward passes of a GPU in a thread of its own."""
    seen: list[int] = []
    forward = compilation.CompiledForward(nn.Identity(), lambda *_: seen.append(torch._dynamo.config.recompile_limit))
    thread = threading.Thread(target=forward, args=(torch.ones(1, 2, 3), torch.ones(1, 3), torch.ones(2, 2), None))
    thread.start()
    thread.join()
    assert seen == [MAX_GRAPHS]


@pytest.mark.slow
def test_offloaded_activations_and_a_network_that_is_off_go_together_with_it() -> None:
    def run(settings: CompileSettings | None, swap: int, offload: bool) -> list[torch.Tensor]:
        transformer = make(1, 2)
        enable_block_swap(transformer, SwapSettings(swap, recomputed=True), CPU)
        if settings is not None:
            enable_compile(transformer, settings)
        enable_gradient_checkpointing(transformer, make_offloader(3, CPU, pinned=False) if offload else None)
        network = add_lora(transformer, exclude_patterns="['.*']", include_patterns="['.*(img_attn_qkv|linear1)']")
        found = []
        for seed, size in ((0, (1, 4, 6)), (1, (2, 2, 4))):
            inputs = make_inputs(seed, (5 - seed,), size)
            with torch.no_grad(), network_off(network):  # as prior preservation asks for its target
                found.append(transformer(*inputs))
            found.append(transformer(*inputs))
            (found[-1] - found[-2]).square().mean().backward()
            found += [parameter.grad for parameter in network.parameters()]
            network.zero_grad(set_to_none=True)
        assert not torch.equal(found[0], found[1])
        return found

    expected = run(None, 0, offload=False)
    graphs = compiled_graphs()
    found = run(TRACED, 1, offload=True)
    assert_close(found, expected)
    made = compiled_graphs() - graphs
    assert same(run(TRACED, 0, offload=False), found)
    assert compiled_graphs() == graphs + made, "offloading is not seen by the compiler"


def test_what_is_wrapped_already_is_refused() -> None:
    transformer = make()
    enable_gradient_checkpointing(transformer)
    with pytest.raises(RuntimeError, match="compile it before"):
        enable_compile(transformer, TRACED)


# ---------------------------------------------------------------------------------------------------------------------
# Where nothing can be compiled


def failing(graph: object, inputs: object) -> None:
    raise OSError("no room\nin the cache")


def test_what_fails_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"--compile: torch cannot compile for cpu here \(.*no room in the cache\)\. It needs a"):
        check_compile(CPU, CompileSettings(backend=failing))


def test_it_is_found_out_before_anything_is_loaded(train, call_script, tiny_model, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "BACKEND", failing)
    monkeypatch.setattr(hunyuan_model, "load_transformer", lambda *_a, **_k: pytest.fail("the model was loaded"), raising=False)
    ended = train("--compile")
    assert ended.status == 2 and "C++ compiler" in ended.stderr and "Traceback" not in ended.stderr
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    sampled = ("--dit", tiny_model.dit, *encoders, "--prompt", "ball", "--save_path", tmp_path, "--output_type", "latent")
    ended = call_script("hv_generate_video", *sampled, "--compile")
    assert ended.status == 2 and "C++ compiler" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_a_mode_without_compiling_is_refused(train, mode: str) -> None:
    ended = train("--compile_mode", mode)
    assert ended.status == 2 and "give --compile as well" in ended.stderr


@pytest.mark.slow
def test_no_dequantized_weight_is_kept_for_the_backward_pass() -> None:
    """As inductor splits the graphs, which may compute in either pass what depends on weights alone."""
    split = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition)
    settings = CompileSettings(backend=split)
    transformer, plain = make(1, 1, fp8=True), make(1, 1, fp8=True)
    enable_compile(transformer, settings)
    kept: list[torch.Tensor] = []
    networks = [add_lora(model, **FEW) for model in (transformer, plain)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = transformer(*make_inputs(lengths=(5,)))
    expected = plain(*make_inputs(lengths=(5,)))
    for out in (found, expected):
        out.square().mean().backward()
    gradients = [[parameter.grad for parameter in network.parameters()] for network in networks]
    assert_close([found, *gradients[0]], [expected, *gradients[1]])
    blocks = (transformer.double_blocks, transformer.single_blocks)
    kept_float32 = [value for value in kept if value.dtype == torch.float32]
    for weight in (parameter for part in blocks for parameter in part.parameters() if parameter.dtype == FP8_DTYPE):
        shapes = (weight.shape, weight.t().shape)
        assert not any(value.shape in shapes and torch.equal(value, weight.float()) for value in kept_float32)
    assert sum(value.dtype == FP8_DTYPE for value in kept) == 8  # the first two layers' inputs have no gradient


# ---------------------------------------------------------------------------------------------------------------------
# Scripts


@pytest.mark.slow
def test_the_time_of_steps_that_compile_is_logged(train, monkeypatch, caplog) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    caplog.set_level(logging.INFO)
    few = [f"{name}={value}" for name, value in FEW.items()]
    assert train("--max_train_epochs", 1, "--compile", "--dry_step", "always", "--network_args", *few).status == 0
    lines = [message for message in caplog.messages if " compiles: " in message]
    assert lines[0].startswith("the dry step compiles: ") and float(lines[0].split()[4]) > 0
    assert any(line.startswith("step ") for line in lines[1:]) and len(lines) < 5, "batches of the same kind find their graphs"


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None,
    reason="torch generates code for the CPU with a C++ compiler, g++ by default",
)
def test_generated_code_trains_the_same_lora(train, cached: Path, tmp_path: Path) -> None:
    """Pictures of two sizes and a clip, one by one."""
    single = cached.with_name("one_by_one.toml")
    single.write_text(cached.read_text("utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    flags = ("--max_train_epochs", 1, "--learning_rate", 1e-2, "--optimizer_type", "SGD", "--gradient_checkpointing")
    flags += ("--network_args", *(f"{name}={value}" for name, value in FEW.items()))
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        assert train(*flags, *more, name=name, dataset=single).status == 0
    eager, compiled = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    assert max(eager[name].abs().max() for name in eager if name.endswith("lora_up.weight")) > 1e-5
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=1e-6, rtol=1e-3)
