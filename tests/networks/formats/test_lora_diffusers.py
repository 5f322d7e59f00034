"""LoRA files that we write, loaded by ``HunyuanVideoPipeline.load_lora_weights``, against our transformer with the same LoRA."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from torch import nn

from benchmarks.diffusers_twins import diffusers_model, diffusers_transformer, run_diffusers, to_diffusers
from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.formats.reading import lora_of, read_lora
from networks.formats.writing import save_lora, to_layout
from networks.lora import create_network, create_network_from_weights
from tests.lora_samples import ARGUMENTS, named_inputs, sd_scripts_lora, transformer
from tests.small_transformer import make_inputs

MULTIPLIERS = (0.0, 0.5, 1.0)


@pytest.fixture
def diffusers_log(monkeypatch, caplog):
    """What diffusers logs of keys it does not know or misses."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield caplog


def loaded(model: nn.Module, file) -> HunyuanVideoPipeline:
    others = dict.fromkeys(("text_encoder", "tokenizer", "vae", "scheduler", "text_encoder_2", "tokenizer_2"))
    pipeline = HunyuanVideoPipeline(transformer=model, **others)
    pipeline.load_lora_weights(file, adapter_name="ours")
    return pipeline


def adapted_layers(model: nn.Module) -> int:
    return sum("ours" in getattr(module, "lora_A", ()) for module in model.modules())


def assert_same_outputs(pipeline, ours: nn.Module, network: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    outputs = []
    for multiplier in MULTIPLIERS:
        pipeline.set_adapters(["ours"], [multiplier])
        network.set_multiplier(multiplier)
        with torch.no_grad():
            expected = ours(*[inputs[name] for name in ARGUMENTS])
            found = run_diffusers(pipeline.transformer, inputs)
        assert (found - expected).norm() < 1e-4 * expected.norm()
        outputs.append(expected)
    assert (outputs[2] - outputs[0]).norm() > 2e-3 * outputs[0].norm()  # or the LoRA would not be seen


@pytest.mark.parametrize(
    ("places", "layers"),
    [
        ("double_blocks single_blocks", 40),
        ("txt_in", 12),
        ("final_layer", 2),
        ("final_layer single_blocks.1", 8),
        ("", 60),
    ],
)
def test_diffusers_loads_the_layout_diffusers(tmp_path, diffusers_log, places, layers):
    ours = transformer()
    wanted = places.split() or [""]
    tensors = sd_scripts_lora(ours, lambda path: any(path.startswith(place) for place in wanted), ranks=(4, 2, 3))
    save_lora(tmp_path / "lora.safetensors", lora_of(tensors, {"ss_network_dim": "4"}, "test"), "diffusers")
    pipeline = loaded(diffusers_transformer(ours), tmp_path / "lora.safetensors")
    assert adapted_layers(pipeline.transformer) == layers and not diffusers_log.text
    network, _ = create_network_from_weights(1.0, None, None, None, ours, weights_sd=tensors, for_inference=True)
    network.apply_to(None, ours)
    assert_same_outputs(pipeline, ours, network, named_inputs())


def wide_transformers() -> tuple[nn.Module, nn.Module]:
    """Ours and that of diffusers with the width of HunyuanVideo, one double and one single block, and the same memory."""
    config = TransformerConfig(
        double_depth=1, single_depth=1, refiner_depth=1, text_dim=16, pooled_dim=8, rope_dims=rope_dims_for(128)
    )
    with torch.device("meta"):
        ours, theirs = HYVideoDiffusionTransformer(config), diffusers_model(config)
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # repeated: new numbers for all take long
    weights = {}
    for name, empty in ours.state_dict().items():
        values = noise.repeat(empty.numel() // len(noise) + 1)[: empty.numel()].reshape(empty.shape)
        weights[name] = values.mul_(0.02 if empty.dim() > 1 else 0.1)
    ours.load_state_dict(weights, assign=True)
    theirs.load_state_dict(to_diffusers(weights, config.hidden_size), assign=True)
    return ours.requires_grad_(False).eval(), theirs.requires_grad_(False).eval()


@pytest.mark.slow
def test_diffusers_loads_the_layout_other_at_its_own_width(tmp_path, diffusers_log):
    ours, theirs = wide_transformers()
    torch.manual_seed(0)
    network = create_network(1.0, 2, 1.0, None, None, ours)
    for lora in network.loras():
        nn.init.normal_(lora.lora_up.weight, std=0.3)
    network.save_weights(tmp_path / "default.safetensors", None)
    save_lora(tmp_path / "other.safetensors", read_lora(tmp_path / "default.safetensors"), "other")
    pipeline = loaded(theirs, tmp_path / "other.safetensors")
    assert adapted_layers(theirs) == 17 and not diffusers_log.text
    network.apply_to(None, ours)
    inputs = dict(zip(ARGUMENTS, make_inputs(size=(1, 2, 2), config=ours.config)))
    assert_same_outputs(pipeline, ours, network, inputs | {"text_mask": inputs["text_mask"].long()})


def test_the_log_of_diffusers_is_seen(diffusers_log):
    """Else its silence above would mean nothing."""
    tensors = to_layout(lora_of(sd_scripts_lora(transformer(), lambda path: "img_mlp" in path), {}, "test"), "diffusers")
    tensors["transformer.transformer_blocks.0.ff.net.2.lora_A.unknown"] = torch.ones(1)
    loaded(diffusers_transformer(transformer()), tensors)
    assert diffusers_log.text


@pytest.mark.parametrize(
    ("place", "message"),
    [("final_layer", "reads final_layer.adaLN_modulation.1.weight, final_layer.linear.weight wrongly"), ("linear1", "nothing")],
)
def test_what_diffusers_reads_wrongly_in_the_layout_other_is_warned_of(tmp_path, caplog, place, message):
    tensors = sd_scripts_lora(transformer(), lambda path: place in path)
    save_lora(tmp_path / "other.safetensors", lora_of(tensors, {}, "test"), "other")
    assert message in caplog.text and "use the layout diffusers there" in caplog.text
