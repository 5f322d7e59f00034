"""Runtime settings: what flags make of them, what is refused, and which kernels torch may use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch

from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.arguments import add_weight_format_arguments, weight_format
from hunyuan_model.runtime.compilation import CompileSettings
from hunyuan_model.runtime.loading import check_transformer_file, load_transformer
from hunyuan_model.runtime.settings import KernelSettings, RuntimeSettings
from utils.errors import UserError

GPU, CPU = torch.device("cuda"), torch.device("cpu")
TRAINING, GENERATION = ("--fp8_base", "--int8_base"), ("--fp8", "--int8")


def format_of(script: tuple[str, str], flags: str) -> WeightFormat:
    parser = argparse.ArgumentParser()
    add_weight_format_arguments(parser.add_argument_group(), *script)
    return weight_format(parser.parse_args(flags.split()))


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (TRAINING, "", WeightFormat.PLAIN),
        (TRAINING, "--fp8_base", WeightFormat.FP8),
        (TRAINING, "--fp8_base --fp8_scaled --fp8_fast", WeightFormat.FP8_SCALED),
        (TRAINING, "--int8_base", WeightFormat.INT8),
        (GENERATION, "--fp8", WeightFormat.FP8),
        (GENERATION, "--fp8 --fp8_scaled", WeightFormat.FP8_SCALED),
        (GENERATION, "--fp8_scaled", WeightFormat.FP8_SCALED),
        (GENERATION, "--int8", WeightFormat.INT8),
    ],
)
def test_flags_say_how_weights_are_stored(script, flags, expected):
    assert format_of(script, flags) is expected


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        (TRAINING, "--fp8_scaled", "--fp8_scaled says how --fp8_base is done"),
        (TRAINING, "--int8_base --fp8_fast", "--fp8_fast says how --fp8_base is done"),
        (TRAINING, "--int8_base --fp8_base", "--int8_base and --fp8_base exclude each other"),
        (GENERATION, "--int8 --fp8_scaled", "--int8 and --fp8 exclude each other"),
    ],
)
def test_flags_that_miss_or_exclude_each_other(script, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        format_of(script, flags)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fp8_fast": True}, "stored in float8"),
        ({"fp8_fast": True, "weights": WeightFormat.INT8}, "stored in float8"),
        ({"gradient_checkpointing_cpu_offload": True}, "give --gradient_checkpointing as well"),
        ({"keep_attention": True}, "give --gradient_checkpointing as well"),
        ({"keep_attention": True, "gradient_checkpointing": True, "compile": CompileSettings()}, "--compile exclude each other"),
    ],
)
def test_wrong_combinations_are_refused_while_settings_are_made(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        RuntimeSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"attn_mode": "flash"}, "flash needs a CUDA device"),
        ({"attn_mode": "fast"}, "no attention mode 'fast'"),
        ({"fp8_fast": True, "weights": WeightFormat.FP8}, "--fp8_fast multiplies in float8"),
        ({"blocks_to_swap": 5}, "--blocks_to_swap 5 is more than this transformer allows"),
        ({"compile": CompileSettings(backend="none")}, "--compile: torch cannot compile"),
    ],
)
def test_what_cannot_work_here_is_refused_before_and_while_loading(tiny_model, settings, sentence):
    runtime, options = RuntimeSettings(**settings), {"device": "cpu", "dtype": torch.float32}
    with pytest.raises(UserError, match=sentence):
        runtime.check(CPU, torch.float32, check_transformer_file(tiny_model.dit))
    with pytest.raises(UserError, match=sentence):
        load_transformer(tiny_model.dit, runtime=runtime, **options)


@pytest.mark.parametrize(
    "settings", [{"blocks_to_swap": "auto"}, {"keep_attention": "auto", "gradient_checkpointing": True}], ids=str
)
def test_what_is_not_known_yet_passes_the_check_and_is_refused_while_loading(tiny_model, settings):
    runtime = RuntimeSettings(**settings)
    runtime.check(CPU, torch.float32, check_transformer_file(tiny_model.dit))
    with pytest.raises(UserError, match='still "auto"'):
        load_transformer(tiny_model.dit, device="cpu", dtype=torch.float32, runtime=runtime)


@pytest.mark.parametrize("short", [{"attn_mode": "sdpa"}, {"split_attn": True}], ids=str)
def test_attention_is_set_once(tiny_model, short):
    with pytest.raises(UserError, match="set them in the runtime"):
        load_transformer(tiny_model.dit, device="cpu", dtype=torch.float32, runtime=RuntimeSettings(), **short)


@pytest.fixture(autouse=True)
def backends() -> Iterator[None]:
    """As torch begins, inside and afterwards."""
    before = kernels()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def kernels() -> tuple[bool, bool, bool]:
    """TF32 in matmuls and in convolutions, and whether cuDNN tries its convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("cudnn_benchmark", [True, False])
def test_a_gpu_may_use_what_is_asked_for(tf32, cudnn_benchmark, caplog, monkeypatch):
    limits = []
    monkeypatch.setattr("hunyuan_model.runtime.settings.limit_device_memory", lambda *limit: limits.append(limit))
    torch.backends.cudnn.allow_tf32 = False
    allowed = []
    monkeypatch.setattr("hunyuan_model.transformer.fused.allow", allowed.append)
    KernelSettings(tf32, cudnn_benchmark, 0.5, no_fused_kernels=tf32).apply(GPU)
    assert allowed == [not tf32]
    assert kernels() == (tf32, tf32, cudnn_benchmark) and not caplog.messages
    assert limits == [(GPU, 0.5)]


def test_on_the_cpu_nothing_changes_and_that_is_said(caplog):
    before = kernels()
    KernelSettings(tf32=True, cudnn_benchmark=True, gpu_memory_fraction=0.5).apply(CPU)
    assert kernels() == before
    assert caplog.messages == ["--tf32, --cudnn_benchmark, --gpu_memory_fraction: no effect on cpu, only on CUDA devices."]
