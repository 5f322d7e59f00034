"""LoRA of every kind beside the weights: the same as merged, and with quantized weights as ``LoRAModule`` computes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_transformer import CONFIG, CPU, make_inputs, make_transformer
from torch import nn

import hunyuan_model
from hunyuan_model.quantization.formats import WeightFormat
from hunyuan_model.runtime.compilation import CompileSettings, compiled_graphs
from hunyuan_model.runtime.settings import RuntimeSettings
from networks.formats.reading import lora_of
from networks.injection import InjectedLoras, injected_bytes
from networks.lora import create_network_from_weights
from networks.merging import LoraToMerge, MergePatch

HIDDEN, MLP, HEAD = CONFIG.hidden_size, CONFIG.mlp_size, CONFIG.head_dim
SHAPES = {
    "double_blocks.0.img_attn_qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks.1.txt_mlp.fc2": (HIDDEN, MLP),
    "single_blocks.0.linear1": (3 * HIDDEN + MLP, HIDDEN),
    "single_blocks.1.modulation.linear": (3 * HIDDEN, HIDDEN),
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (3 * HIDDEN, HIDDEN),
    "final_layer.linear": (64, HIDDEN),
}
SPLIT = {
    "transformer_blocks.0.attn.to_q": (HIDDEN, HIDDEN),
    "transformer_blocks.0.attn.add_v_proj": (HIDDEN, HIDDEN),
    "single_transformer_blocks.0.attn.to_k": (HIDDEN, HIDDEN),
    "single_transformer_blocks.0.proj_mlp": (MLP, HIDDEN),
    "single_transformer_blocks.1.proj_out": (HIDDEN, HIDDEN + MLP),
    "norm_out.linear": (2 * HIDDEN, HIDDEN),
}


def lora_keys(out: int, inputs: int) -> dict[str, torch.Tensor]:
    return {"lora_down.weight": torch.randn(3, inputs), "lora_up.weight": torch.randn(out, 3) * 0.05, "alpha": torch.tensor(2.0)}


def loha_keys(out: int, inputs: int) -> dict[str, torch.Tensor]:
    factors = {f"hada_w{number}_{part}": shape for number in (1, 2) for part, shape in (("a", (out, 2)), ("b", (2, inputs)))}
    return {name: torch.randn(shape) * 0.4 for name, shape in factors.items()} | {"alpha": torch.tensor(1.0)}


def lokr_keys(out: int, inputs: int) -> dict[str, torch.Tensor]:
    second = {"lokr_w2_a": torch.randn(out // 4, 2) * 0.2, "lokr_w2_b": torch.randn(2, inputs // 4) * 0.2}
    return {"lokr_w1": torch.randn(4, 4) * 0.2, **second, "alpha": torch.tensor(1.0)}


KINDS = {
    "LoRA": lora_keys,
    "LoHa": loha_keys,
    "LoKr": lokr_keys,
    "DoRA of rows": lambda out, inputs: {**lora_keys(out, inputs), "dora_scale": torch.rand(out, 1) + 0.2},
    "DoRA of columns": lambda out, inputs: {**lora_keys(out, inputs), "dora_scale": torch.rand(1, inputs) + 0.2},
    "DoRA on LoHa": lambda out, inputs: {**loha_keys(out, inputs), "dora_scale": torch.rand(out, 1) + 0.2},
    "difference": lambda out, inputs: {"diff": torch.randn(out, inputs) * 0.05, "diff_b": torch.randn(out) * 0.05},
    "replacement": lambda out, inputs: {"set_weight": torch.randn(out, inputs) * 0.1},
}
OTHERS = {
    "diffusion_model.double_blocks.0.img_attn_q_norm.diff": (HEAD,),
    "diffusion_model.single_blocks.2.k_norm.diff": (HEAD,),
    "diffusion_model.txt_in.individual_token_refiner.blocks.0.norm1.w_norm": (HIDDEN,),
    "diffusion_model.txt_in.individual_token_refiner.blocks.0.norm1.b_norm": (HIDDEN,),
    "diffusion_model.img_in.proj.diff": (HIDDEN, 16, 1, 2, 2),
    "diffusion_model.img_in.proj.diff_b": (HIDDEN,),
    "diffusion_model.single_blocks.1.linear2.diff_b": (HIDDEN,),
}


def make_lora(kind: str, split: bool = False, seed: int = 0, multiplier: float = 1.0) -> LoraToMerge:
    torch.manual_seed(seed)
    prefix, modules = ("transformer.", SPLIT) if split else ("diffusion_model.", SHAPES)
    if kind == "norms and biases":
        tensors = {key: torch.randn(shape) * 0.2 for key, shape in OTHERS.items()}
        down, up = torch.randn(2, 16, 1, 2, 2), torch.randn(HIDDEN, 2, 1, 1, 1)
        tensors |= {"diffusion_model.img_in.proj.lora_down.weight": down, "diffusion_model.img_in.proj.lora_up.weight": up * 0.1}
    else:
        tensors = {f"{prefix}{name}.{key}": value for name, size in modules.items() for key, value in KINDS[kind](*size).items()}
    return LoraToMerge(lora_of(tensors, {}, kind), multiplier)


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "dit.safetensors"
    save_file(make_transformer().state_dict(), path)
    return path


def load(dit: Path, weights: WeightFormat = WeightFormat.PLAIN, patch=None, **settings) -> nn.Module:
    runtime = RuntimeSettings(weights, **settings)
    return hunyuan_model.load_transformer(dit, device="cpu", dtype=torch.float32, runtime=runtime, patch=patch)


@torch.no_grad()
def outputs(transformer: nn.Module, seed: int = 0) -> torch.Tensor:
    return transformer(*make_inputs(seed))


def merged(dit: Path, loras: list[LoraToMerge]) -> torch.Tensor:
    shapes = {name: tuple(weight.shape) for name, weight in make_transformer().named_parameters()}
    return outputs(load(dit, patch=MergePatch(loras, shapes)))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        *(pytest.param(kind, split, marks=() if split else pytest.mark.slow) for kind in KINDS for split in (False, True)),
        ("norms and biases", False),
    ],
)
def test_injected_is_merged_at_every_multiplier(dit, kind, split):
    transformer = load(dit)
    base, names = outputs(transformer), set(transformer.state_dict())
    lora = make_lora(kind, split)
    injected = InjectedLoras(transformer, [lora], CPU)
    assert set(transformer.state_dict()) == names
    for multiplier in (1.0, 0.5, -1.0, 0.0):
        injected.set_multipliers([multiplier])
        found = outputs(transformer)
        if multiplier:
            assert error(found, base) > 1e-3
            assert error(found, merged(dit, [LoraToMerge(lora.file, multiplier)])) < 1e-5
        else:
            assert torch.equal(found, base)


def test_two_loras_are_both_of_the_base(dit):
    loras = [make_lora("DoRA of rows", multiplier=0.5), make_lora("LoRA", split=True, seed=1, multiplier=-1.0)]
    transformer = load(dit)
    injected = InjectedLoras(transformer, loras, CPU)
    assert error(outputs(transformer), merged(dit, loras)) < 1e-5
    injected.set_multipliers([0.5, 0.0])
    assert error(outputs(transformer), merged(dit, loras[:1])) < 1e-5
    with pytest.raises(ValueError, match="1 multipliers for 2 LoRAs"):
        injected.set_multipliers([1.0])


@pytest.mark.parametrize("weights", [WeightFormat.FP8, WeightFormat.FP8_SCALED, WeightFormat.INT8])
def test_beside_quantized_weights_it_is_what_the_network_gives(dit, weights):
    transformer, other = load(dit, weights), load(dit, weights)
    lora = make_lora("LoRA")
    InjectedLoras(transformer, [lora], CPU)
    torch.manual_seed(0)
    tensors = {f"diffusion_model.{name}.{key}": value for name, size in SHAPES.items() for key, value in lora_keys(*size).items()}
    network, _ = create_network_from_weights(1.0, None, None, None, other, weights_sd=tensors, for_inference=True)
    network.apply_to(None, other)
    torch.testing.assert_close(outputs(transformer), outputs(other), rtol=1e-5, atol=1e-6)  # which adds in another order


@pytest.mark.parametrize("kind", ["LoRA", "DoRA of rows", "norms and biases"])
def test_swapped_blocks_change_nothing(dit, kind):
    loras = [make_lora(kind)]
    found = []
    for settings in ({}, {"blocks_to_swap": 5, "img_in_txt_in_offloading": True}):
        transformer = load(dit, WeightFormat.INT8, **settings)
        base = outputs(transformer)
        injected = InjectedLoras(transformer, loras, CPU)
        found += [outputs(transformer), outputs(transformer, seed=1)]
        injected.set_multipliers([0.0])
        assert torch.equal(outputs(transformer), base)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.slow
def test_compiled_blocks_are_the_same_and_share_a_graph(dit):
    torch._dynamo.reset()
    names = [*(f"double_blocks.{block}" for block in range(3)), *(f"single_blocks.{block}" for block in range(4))]
    torch.manual_seed(0)
    tensors = {f"diffusion_model.{name}.{norm}.diff": torch.randn(HEAD) for name in names for norm in norms_of(name)}
    for name in names:
        linear, size = ("img_attn_proj", (HIDDEN, HIDDEN)) if name.startswith("double") else ("linear2", (HIDDEN, HIDDEN + MLP))
        tensors |= {f"diffusion_model.{name}.{linear}.{key}": value for key, value in lora_keys(*size).items()}
    lora, found, graphs = LoraToMerge(lora_of(tensors, {}, "lora"), 1.0), [], []
    for compile_settings, loras in (
        (None, [lora]),
        (CompileSettings(backend="aot_eager"), []),
        (CompileSettings(backend="aot_eager"), [lora]),
    ):
        torch._dynamo.reset()
        transformer, before = load(dit, compile=compile_settings), compiled_graphs()
        InjectedLoras(transformer, loras, CPU)
        found.append(outputs(transformer))
        graphs.append(compiled_graphs() - before)
    assert error(found[2], found[0]) < 1e-5 < error(found[1], found[0])
    assert graphs[0] == 0 < graphs[1] and graphs[2] <= graphs[1] + 1, graphs


def norms_of(block: str) -> tuple[str, ...]:
    return ("img_attn_q_norm", "txt_attn_k_norm") if block.startswith("double") else ("q_norm",)


def test_bytes_of_a_lora():
    lora = make_lora("LoRA")
    sizes = [4 * 3 * (out + inputs) for out, inputs in SHAPES.values()]
    assert injected_bytes([lora, lora]) == 2 * sum(sizes)
    difference = make_lora("replacement")
    values = [out * inputs for out, inputs in SHAPES.values()]
    assert injected_bytes([difference]) == 4 * (sum(values) + 3 * max(values))
