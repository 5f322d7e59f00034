"""Dequantized weights live no longer than the matmul they were made for."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hunyuan_model.quantization import linear as fp8
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.gradient_checkpointing import enable_gradient_checkpointing
from hunyuan_model.runtime.loading import load_transformer
from hunyuan_model.runtime.settings import RuntimeSettings

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
NAMES = ("x", "t", "text", "text_mask", "text2", "guidance")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["no gradients", "gradients", "checkpointing"])
def test_no_dequantized_weight_is_there_when_the_next_one_is_made(monkeypatch, scaled, checkpointing):
    io = load_file(GOLDENS / "dit_io.safetensors")
    inputs = [io[f"caseB.{name}"] for name in NAMES]
    model = load_transformer(
        GOLDENS / "dit.safetensors",
        device="cpu",
        dtype=torch.bfloat16,
        runtime=RuntimeSettings(WeightFormat.INT8 if scaled else WeightFormat.FP8),
    )
    if checkpointing:
        enable_gradient_checkpointing(model)
    made: list[weakref.ref] = []
    real = fp8.dequantize

    def noted(*arguments, **options) -> torch.Tensor:
        assert not any(reference() is not None for reference in made)
        exact = real(*arguments, **options)
        made.append(weakref.ref(exact))
        return exact

    monkeypatch.setattr(fp8, "dequantize", noted)
    for x in (inputs[0], inputs[2]):  # the tokens of both kinds
        x.requires_grad_(checkpointing is not None)
    with torch.set_grad_enabled(checkpointing is not None):
        out = model(*inputs)
        forwards = len(made)
        if checkpointing is not None:
            out.square().mean().backward()
            assert inputs[0].grad.isfinite().all()
    quantized = sum(isinstance(layer, torch.nn.Linear) and fp8.is_quantized(layer) for layer in model.modules())
    assert forwards == quantized > 10
    last = model.config.double_depth + model.config.single_depth  # layers whose results a recomputation leaves out
    assert len(made) == quantized * {None: 1, False: 2, True: 3}[checkpointing] - (last if checkpointing else 0)
    assert not any(reference() is not None for reference in made)
