"""LoRA on the real transformer, against the reference values and against formulas."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hunyuan_model
from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.quantization.formats import WeightFormat, cast
from hunyuan_model.quantization.linear import enable_quantized_linears
from hunyuan_model.runtime.settings import RuntimeSettings
from networks import lora as lora_module
from networks import lora_options
from networks.block_strengths import BlockStrengths
from networks.formats.reading import lora_of, read_lora
from networks.lora import LoRAModule, create_network, create_network_from_weights
from networks.merging import LoraToMerge, complete_multipliers, merge_lora_into_file, merge_patch, read_lora_files
from utils.errors import UserError
from utils.safetensors_io import read_header

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
DIT, LORA = GOLDENS / "dit.safetensors", GOLDENS / "lora.safetensors"
OUT = {"atol": 3e-5, "rtol": 1e-4}


def load_transformer(patch=None, fp8=False) -> nn.Module:
    return hunyuan_model.load_transformer(
        DIT,
        device="cpu",
        dtype=torch.float32,
        patch=patch,
        runtime=RuntimeSettings(WeightFormat.FP8 if fp8 else WeightFormat.PLAIN),
    )


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    values = load_file(GOLDENS / "dit_io.safetensors")
    return {name.removeprefix("caseB."): value for name, value in values.items() if name.startswith("caseB.")}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "lora_io.safetensors")


@pytest.fixture
def transformer() -> nn.Module:
    return load_transformer()


def run(transformer: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    names = ("x", "t", "text", "text_mask", "text2", "guidance")
    return transformer(*[inputs[name] for name in names])


def injected(transformer: nn.Module, file: Path = LORA, multiplier: float = 1.0, **kwargs) -> nn.Module:
    network, _ = create_network_from_weights(multiplier, file, None, None, transformer, **kwargs)
    network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
    return network


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return network


@pytest.mark.parametrize(("multiplier", "name"), [(1.0, "out_multiplier_1"), (0.5, "out_multiplier_0.5")])
def test_applied_output_is_the_reference(transformer, inputs, expected, multiplier, name):
    network = injected(transformer, multiplier=multiplier, for_inference=True)
    assert len(network.paths) == 22
    with torch.no_grad():
        torch.testing.assert_close(run(transformer, inputs), expected[name], **OUT)
        network.set_multiplier(0.0)
        torch.testing.assert_close(run(transformer, inputs), inputs["out"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("multiplier", "name"), [(1.0, "out_merged_multiplier_1"), (0.5, "out_merged_multiplier_0.5")])
def test_merged_output_and_weights_are_the_reference(inputs, expected, multiplier, name):
    merged = load_transformer(merge_patch(read_lora_files([LORA], [multiplier]), DIT))
    with torch.no_grad():
        torch.testing.assert_close(run(merged, inputs), expected[name], **OUT)
    if multiplier == 1.0:
        weights = {key: value for key, value in expected.items() if key.startswith("merged_weight.")}
        assert len(weights) == 2
        for key, value in weights.items():
            torch.testing.assert_close(merged.get_parameter(key.removeprefix("merged_weight.")), value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("file", ["lora_back.safetensors", "lora_other.safetensors"])
def test_every_layout_of_one_lora_gives_one_result(transformer, inputs, expected, file):
    injected(transformer, GOLDENS / file, for_inference=True)
    with torch.no_grad():
        torch.testing.assert_close(run(transformer, inputs), expected["out_merged_from_lora_back"], **OUT)


def test_merge_to_gives_the_reference(transformer, inputs, expected):
    weights = load_file(LORA)
    network, _ = create_network_from_weights(1.0, None, None, None, transformer, weights_sd=weights, for_inference=True)
    network.merge_to(None, transformer, weights, torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(run(transformer, inputs), expected["out_merged_multiplier_1"], **OUT)


def test_gradients_are_the_reference(transformer, inputs, expected):
    network = injected(transformer)
    network.prepare_grad_etc()
    loss = run(transformer, inputs).square().mean()
    assert loss.item() == pytest.approx(0.789996325969696, abs=1e-5)
    loss.backward()
    names = [name for name in expected if name.startswith("grad.")]
    assert len(names) == 4
    for name in names:
        grad = network.get_parameter(name.removeprefix("grad.")).grad
        torch.testing.assert_close(grad, expected[name], atol=1e-4 * expected[name].abs().max().item(), rtol=0)
    assert all(not parameter.requires_grad for parameter in transformer.parameters())


def test_fresh_network_changes_nothing_and_has_the_published_targets(transformer, inputs):
    torch.manual_seed(0)
    network = create_network(1.0, None, None, None, None, transformer)
    assert sorted(network.state_dict()) == sorted(load_file(LORA))
    names = set(transformer.state_dict())
    with torch.no_grad():
        before = run(transformer, inputs)
        network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
        assert torch.equal(run(transformer, inputs), before)
    assert set(transformer.state_dict()) == names
    lora = next(network.loras())
    assert (lora.rank, lora.alpha.item(), lora.scale) == (4, 1.0, 0.25)
    bound = 1 / 48**0.5  # kaiming uniform with a = sqrt(5) over 48 inputs
    assert bound * 0.8 < lora.lora_down.weight.abs().max().item() <= bound


def test_patterns_exclude_then_include(transformer):
    def paths(**network_args) -> set[str]:
        return set(create_network(1.0, 4, 1, None, None, transformer, **network_args).paths.values())

    every = paths()
    assert paths(exclude_patterns="['.*single_blocks.*']") == {path for path in every if path.startswith("double_blocks")}
    assert paths(include_patterns=r"['double_blocks\.0\.img_mod\.linear']") == every | {"double_blocks.0.img_mod.linear"}
    only = paths(exclude_patterns=["double_blocks.*", "single_blocks.*"], include_patterns=[r".*\.linear1"])
    assert only == {f"single_blocks.{index}.linear1" for index in range(3)}
    # Full match: a pattern that fits only a part of the path excludes nothing.
    assert paths(exclude_patterns="['single_blocks']") == every


@pytest.mark.parametrize("name", ["exclude_patterns", "include_patterns"])
def test_patterns_that_never_end_are_a_sentence(transformer, monkeypatch, name):
    monkeypatch.setattr(lora_options, "MATCHING_SECONDS", 0.5)
    with pytest.raises(
        UserError, match=rf"{name}.* cannot be matched \(it took longer than 0\.5 seconds\): '\(\[a-z\.0-9_\]\+\)\+!'"
    ):
        create_network(1.0, 4, 1, None, None, transformer, **{name: "['([a-z.0-9_]+)+!', '(a+)+']"})


@pytest.mark.parametrize(
    ("network_args", "message"),
    [
        ({"exclude_patern": "[]"}, "Did you mean 'exclude_patterns'"),
        ({"exclude_patterns": "['(']"}, "must be a list of regular expressions"),
        ({"exclude_patterns": "['.*']"}, "no linear layer is left"),
        ({"rank_dropout": "1.0"}, "from 0 to below 1"),
        ({"module_dropout": "much"}, "must be a Python literal"),
        ({"loraplus_lr_ratio": "True"}, "from 0 to below inf"),
    ],
)
def test_malformed_network_args_are_user_errors(transformer, network_args, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        create_network(1.0, 4, 1, None, None, transformer, **network_args)


def test_layers_are_logged_when_the_network_is_applied(transformer, caplog):
    with caplog.at_level(logging.INFO, logger=lora_module.__name__):
        create_network(1.0, 4, 1, None, None, transformer)  # as preflight does, to know its size
        assert not caplog.text
        injected(transformer)
        assert caplog.text.count("LoRA for 22 linear layers") == 1 and "single_blocks.0.linear1" not in caplog.text
        injected(transformer, verbose="True")
    assert "LoRA on single_blocks.0.linear1: rank 4, alpha 2" in caplog.text


def test_loraplus_gives_the_up_factors_their_rate(transformer):
    network = create_network(1.0, 4, 1, None, None, transformer, loraplus_lr_ratio="16")
    groups, names = network.prepare_optimizer_params(None, 1e-4, 1e-3)
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1.6e-3]) and len(names) == 2
    ups = {parameter for name, parameter in network.named_parameters() if "lora_up" in name}
    assert set(groups[1]["params"]) == ups
    assert set(groups[0]["params"]) | ups == set(network.parameters())
    plain, _ = create_network(1.0, 4, 1, None, None, transformer).prepare_optimizer_params(unet_lr=1e-4)
    assert [group["lr"] for group in plain] == [1e-4]
    assert len(plain[0]["params"]) == len(list(network.parameters()))


def make_module(**dropouts) -> tuple[LoRAModule, nn.Linear]:
    torch.manual_seed(1)
    linear = nn.Linear(6, 5)
    module = LoRAModule(6, 5, 4, 4.0, **dropouts)
    nn.init.normal_(module.lora_up.weight)
    module.attach(linear)
    return module, linear


def test_rank_dropout_drops_ranks_per_sample_and_keeps_the_mean():
    module, linear = make_module(rank_dropout=0.25)
    x = torch.ones(4000, 3, 6)
    base = F.linear(x, linear.weight, linear.bias)
    hidden = F.linear(x, module.lora_down.weight)[0, 0]  # (rank,)
    contributions = module.lora_up.weight * hidden / 0.75  # (out, rank)
    delta = linear(x) - base
    torch.testing.assert_close(delta[:, 0], delta[:, 2], atol=1e-5, rtol=0)  # one draw for all tokens of a sample
    torch.testing.assert_close(delta[:, 0].mean(0), 0.75 * contributions.sum(1), atol=0.06, rtol=0)
    kept = torch.linalg.lstsq(contributions, delta[:, 0].T).solution.T
    assert torch.allclose(kept, kept.round(), atol=1e-3) and 0.23 < (kept.round() == 0).float().mean() < 0.27
    assert linear(torch.randn(7, 6)).shape == (7, 5)  # without tokens
    module.eval()
    torch.testing.assert_close(linear(x), base + 0.75 * contributions.sum(1))


def test_module_dropout_leaves_whole_updates_out():
    module, linear = make_module(module_dropout=0.3)
    x = torch.randn(2, 6)
    base = F.linear(x, linear.weight, linear.bias)
    full = base + F.linear(F.linear(x, module.lora_down.weight), module.lora_up.weight)
    outputs = [linear(x) for _ in range(1000)]
    dropped = sum(torch.equal(output, base) for output in outputs)
    assert 240 < dropped < 360
    assert sum(torch.allclose(output, full, atol=1e-6) for output in outputs) == 1000 - dropped
    module.eval()
    assert all(torch.allclose(linear(x), full, atol=1e-6) for _ in range(50))


def test_neuron_dropout_acts_in_training_only():
    module, linear = make_module(neuron_dropout=0.5)
    x = torch.randn(3, 6)
    assert not torch.equal(linear(x), linear(x))
    module.eval()
    assert torch.equal(linear(x), linear(x))


def test_network_dropout_reaches_the_modules(transformer):
    network = create_network(1.0, 4, 1, None, None, transformer, neuron_dropout=0.1, rank_dropout="0.2", module_dropout="0.3")
    assert {(m.neuron_dropout, m.rank_dropout, m.module_dropout) for m in network.loras()} == {(0.1, 0.2, 0.3)}
    same = create_network(1.0, 4, 1, None, None, transformer, dropout="0.1")
    assert {module.neuron_dropout for module in same.loras()} == {0.1}


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_with_float32_factors(autocast):
    module, linear = make_module()
    linear.to(torch.bfloat16)
    x = torch.randn(2, 3, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = linear(x)
    assert output.dtype == torch.bfloat16
    weight = linear.weight.float() + module.lora_up.weight @ module.lora_down.weight
    exact = F.linear(x.float(), weight, linear.bias.float())
    assert (output.float() - exact).abs().max() < 0.02 * exact.abs().max()
    output.float().sum().backward()
    assert module.lora_up.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("needed", ["x and factors", "x", "factors", "up"])
@pytest.mark.parametrize("shape", [(2, 3, 6), (7, 6), (6,)], ids=str)
def test_gradients_are_those_of_the_formula(needed, shape):
    module, linear = make_module()
    module.multiplier = 0.5
    linear.requires_grad_("x" in needed and "factors" in needed)
    module.requires_grad_("factors" in needed)
    module.lora_up.weight.requires_grad_(needed != "x")
    x = torch.randn(shape, requires_grad="x" in needed)
    leaves = [tensor for tensor in (x, *linear.parameters(), *module.parameters()) if tensor.requires_grad]
    expected = F.linear(x, linear.weight + 0.5 * module.lora_up.weight @ module.lora_down.weight, linear.bias)
    weights = torch.randn_like(expected)
    output = linear(x)
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad((output * weights).sum(), leaves, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), leaves))
    again = torch.autograd.grad((output * weights).sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(found, again))


def test_two_networks_on_one_layer_add_up():
    first, linear = make_module()
    second = LoRAModule(6, 5, 4, 4.0)
    nn.init.normal_(second.lora_up.weight)
    second.attach(linear)
    x = torch.randn(2, 3, 6, requires_grad=True)
    leaves = [x, *first.parameters(), *second.parameters()]
    weight = linear.weight + sum(module.lora_up.weight @ module.lora_down.weight for module in (first, second))
    expected = F.linear(x, weight, linear.bias)
    torch.testing.assert_close(linear(x), expected)
    found = torch.autograd.grad(linear(x).square().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), leaves), atol=1e-4, rtol=1e-4)


BASES = {
    "needs its result": lambda x, shift: (x + shift).tanh(),
    "gives what it gets": lambda x, shift: x,
    "gives one gradient twice": lambda x, shift: (x + shift) * 2,
}


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("name", BASES)
def test_what_others_hold_as_well_stays_as_it_is(name, networks):
    """Of a base that is no product: its result, its gradient, and the gradient above, which an addition outside gets too."""
    torch.manual_seed(0)
    shift, x, above = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    layer, modules = nn.Linear(6, 6), [LoRAModule(6, 6, 4, 4.0) for _ in range(networks)]
    layer.forward = lambda x: BASES[name](x, shift)
    for module in modules:
        nn.init.normal_(module.lora_up.weight)
        module.attach(layer)
    delta = sum(module.lora_up.weight @ module.lora_down.weight for module in modules)
    given, given_above = x.detach().clone(), above.clone()
    with torch.no_grad():
        out = layer(x)
    torch.testing.assert_close(out, BASES[name](given, shift) + given @ delta.T)
    leaves = [x] if name == "gives what it gets" else [x, shift]
    expected = torch.autograd.grad(x + BASES[name](x, shift) + x @ delta.T, leaves, above.clone(), retain_graph=True)
    found = torch.autograd.grad(x + layer(x), leaves, above)
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, given) and torch.equal(above, given_above)


class LargeTensors(TorchDispatchMode):
    """Counts tensors of ``rows`` rows and more than ``rank`` columns that operators make."""

    def __init__(self, rows: int, rank: int) -> None:
        super().__init__()
        self.rows, self.rank, self.made = rows, rank, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        large = isinstance(out, torch.Tensor) and out.numel() > self.rows * self.rank and out.untyped_storage().nbytes() > 8
        self.made += large and out.untyped_storage().data_ptr() not in given
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_large_is_made_beside_what_the_layer_makes(dtype):
    linear = nn.Linear(64, 96).to(dtype).requires_grad_(False)
    module = LoRAModule(64, 96, 4, 4.0)
    module.attach(linear)
    x, gradient = torch.randn(2, 50, 64, dtype=dtype, requires_grad=True), torch.randn(2, 50, 96, dtype=dtype)
    with LargeTensors(100, 16) as forward:
        out = linear(x)
    with LargeTensors(100, 16) as backward:
        out.backward(gradient)
    assert (forward.made, backward.made) == (1, 1)


def test_works_over_float8_layers():
    module, linear = make_module()
    module.base_forward = None
    linear.__dict__.pop("forward")
    wide = linear.weight.detach().clone()
    linear.weight = nn.Parameter(cast(wide, torch.float8_e4m3fn), requires_grad=False)
    enable_quantized_linears(nn.Sequential(linear), torch.float32)
    module.attach(linear)
    x = torch.randn(2, 3, 6, requires_grad=True)
    stored = linear.weight.float()
    expected = F.linear(x, stored + module.lora_up.weight @ module.lora_down.weight, linear.bias)
    torch.testing.assert_close(linear(x), expected)
    got = torch.autograd.grad(linear(x).square().sum(), [x, module.lora_down.weight])
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), [x, module.lora_down.weight]))


def test_merging_into_float8_rounds_once_and_saturates():
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = nn.Parameter(torch.full((4, 4), 440.0).to(torch.float8_e4m3fn), requires_grad=False)
    block = type("MMSingleStreamBlock", (nn.Module,), {})()
    block.linear1 = linear
    root = nn.ModuleDict({"single_blocks": nn.ModuleList([block])})
    network = create_network(1.0, 2, 2, None, None, root)
    lora = next(network.loras())
    lora.lora_down.weight.data.fill_(1.0)
    lora.lora_up.weight.data = torch.tensor([[50.0, 50.0], [-8.0, -8.0], [0.0, 0.0], [-100.0, -120.0]])
    stored = linear.weight.float()
    network.merge_to(None, root)
    assert linear.weight.dtype == torch.float8_e4m3fn
    exact = (stored + lora.lora_up.weight @ lora.lora_down.weight).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(linear.weight.float(), exact.float()) and linear.weight.float().isfinite().all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_save_and_load_round_trip(tmp_path, transformer, dtype):
    network = randomised(create_network(1.0, 3, 0.3, None, None, transformer))
    path = tmp_path / "saved.safetensors"
    network.save_weights(path, dtype, {"ss_network_dim": "3"})
    other = create_network(1.0, 3, 1.0, None, None, transformer)
    assert "22 LoRA modules" in other.load_weights(path)
    for name, tensor in network.state_dict().items():
        stored = tensor if dtype is None or name.endswith("alpha") else tensor.to(dtype)
        assert torch.equal(load_file(path)[name], stored) and torch.equal(other.state_dict()[name], stored.float())
    assert [lora.scale for lora in other.loras()] == pytest.approx([0.1] * 22)
    metadata = read_lora(path).metadata
    assert metadata["ss_network_dim"] == "3" and len(metadata["sshs_model_hash"]) == 64
    with pytest.raises(UserError, match=r"\.safetensors"):
        network.save_weights(tmp_path / "saved.pt", None)


@pytest.mark.parametrize(("dim", "network_args"), [(8, {}), (4, {"exclude_patterns": "['single_blocks.*']"})])
def test_load_weights_of_another_network_is_a_user_error(transformer, dim, network_args):
    network = create_network(1.0, dim, 1, None, None, transformer, **network_args)
    with pytest.raises(UserError, match=r"does not match the network.*lora_unet_.*--dim_from_weights"):
        network.load_weights(LORA)


def test_from_weights_takes_mixed_ranks_and_any_linear_of_the_model(transformer, inputs):
    first = create_network(1.0, 2, 3.0, None, None, transformer, exclude_patterns=["double_blocks.*"])
    tensors = randomised(first).state_dict()
    tensors |= {
        "lora_unet_double_blocks_1_img_mod_linear.lora_down.weight": torch.randn(5, 48) * 0.1,
        "lora_unet_double_blocks_1_img_mod_linear.lora_up.weight": torch.randn(288, 5) * 0.1,
        "lora_unet_final_layer_linear.lora_down.weight": torch.randn(1, 48) * 0.1,
        "lora_unet_final_layer_linear.lora_up.weight": torch.randn(64, 1) * 0.1,
    }
    merged = copy.deepcopy(transformer)
    network, weights = create_network_from_weights(1.0, None, None, None, transformer, weights_sd=tensors, for_inference=True)
    ranks = {path: network.get_submodule(name).rank for name, path in network.paths.items()}
    assert (
        ranks["double_blocks.1.img_mod.linear"] == 5 and ranks["final_layer.linear"] == 1 and ranks["single_blocks.0.linear1"] == 2
    )
    network.merge_to(None, merged, weights)
    network.apply_to(None, transformer)
    with torch.no_grad():
        torch.testing.assert_close(run(transformer, inputs), run(merged, inputs), atol=1e-5, rtol=1e-5)


def test_from_weights_for_inference_is_frozen(transformer):
    network = injected(transformer, for_inference=True, module_dropout="0.5")
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(UserError, match="the file says which modules"):
        injected(transformer, include_patterns="['.*']")


def test_applying_twice_is_refused(transformer):
    network = injected(transformer)
    with pytest.raises(RuntimeError, match="attached already"):
        network.apply_to(None, transformer)


def test_two_networks_stack(transformer, inputs):
    files = [GOLDENS / "lora.safetensors", GOLDENS / "lora_other.safetensors"]
    merged = load_transformer(merge_patch(read_lora_files(files, [1.0, -0.25]), DIT))
    for file, multiplier in zip(files, (1.0, -0.25)):
        injected(transformer, file, multiplier, for_inference=True)
    with torch.no_grad():
        torch.testing.assert_close(run(transformer, inputs), run(merged, inputs), **OUT)


def test_max_norm_scales_only_what_is_larger(transformer):
    network = create_network(1.0, 4, 2.0, None, None, transformer)
    assert network.apply_max_norm_regularization(1.0) == (0, 0.0, 0.0)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    randomised(network)

    def updates() -> list[torch.Tensor]:
        return [lora.lora_up.weight.detach() @ lora.lora_down.weight.detach() * lora.scale for lora in network.loras()]

    before = updates()
    norms = torch.stack([update.norm() for update in before])
    limit = norms.median().item()
    scaled, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    assert scaled == int((norms > limit * (1 + 1e-5)).sum()) and 0 < scaled < len(before)
    for old, new, norm in zip(before, updates(), norms):
        torch.testing.assert_close(new, old * min(1.0, limit / norm.item()), rtol=1e-4, atol=1e-6)
    assert mean == pytest.approx(norms.clamp(max=limit).mean().item(), rel=1e-4)
    assert largest == pytest.approx(limit, rel=1e-4)


def test_training_through_checkpointing_replays_the_dropouts(transformer, inputs):
    block = transformer.single_blocks[0]
    network = randomised(create_network(1.0, 4, 4, None, None, transformer, rank_dropout="0.5", module_dropout="0.5"))
    network.apply_to(None, transformer)
    grads = []
    plain = block.forward
    for wrapped in (False, True):
        torch.manual_seed(5)
        network.zero_grad()
        if wrapped:
            block.forward = lambda *args: torch.utils.checkpoint.checkpoint(plain, *args, use_reentrant=False)
        run(transformer, inputs).square().mean().backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in network.parameters()])
    for first, second in zip(*grads):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)


def test_merge_into_file_equals_merge_while_loading(tmp_path, inputs):
    loras = read_lora_files([LORA], [0.5])
    merge_lora_into_file(GOLDENS / "dit.pt", loras, tmp_path / "merged.safetensors")
    merged = open_checkpoint(tmp_path / "merged.safetensors", "merged model")
    stored = open_checkpoint(GOLDENS / "dit.pt", "model")
    assert merged.dtypes == stored.dtypes and merged.shapes == stored.shapes
    patch = merge_patch(loras, GOLDENS / "dit.pt")
    assert len(patch.names) == 22
    for name in stored.shapes:
        assert torch.equal(merged.get(name), patch(name, stored.get(name)).to(stored.dtypes[name]))
        assert torch.equal(merged.get(name), stored.get(name)) == (name not in patch.names)


def test_a_merged_model_names_its_lora_also_those_of_before(tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    merge_lora_into_file(DIT, read_lora_files([LORA], [0.5]), first)
    merge_lora_into_file(first, read_lora_files([LORA], [-1.0], blocks=BlockStrengths((("single", frozenset({1}), 0.0),))), second)
    entries = json.loads(read_header(second).metadata["merged_lora"])
    digest = hashlib.sha256(Path(LORA).read_bytes()).hexdigest()
    assert [(entry["file"], entry["sha256"], entry["multiplier"]) for entry in entries] == [
        (Path(LORA).name, digest, 0.5),
        (Path(LORA).name, digest, -1.0),
    ]
    assert [entry["blocks"] for entry in entries] == [[], [["single", [1], 0.0]]]


def test_merge_into_file_refuses_to_overwrite_what_it_reads(tmp_path):
    stored = tmp_path / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(DIT, stored)
    loras = read_lora_files([LORA])
    for dit in (stored, tmp_path):  # a file, or the folder around it
        with pytest.raises(UserError, match=r"overwrite .*diffusion_pytorch_model"):
            merge_lora_into_file(dit, loras, stored)
    with pytest.raises(UserError, match=r"saved as a \.safetensors file"):
        merge_lora_into_file(DIT, loras, tmp_path / "merged.pt")
    assert stored.read_bytes() == DIT.read_bytes() and len(list(tmp_path.iterdir())) == 1


def test_merge_into_file_refuses_a_model_that_is_not_whole(tmp_path):
    cut = load_file(DIT)
    del cut["double_blocks.0.txt_mlp.fc2.bias"]
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"1 tensors are missing, such as double_blocks\.0\.txt_mlp\.fc2\.bias"):
        merge_lora_into_file(tmp_path / "cut.safetensors", read_lora_files([LORA]), tmp_path / "merged.safetensors")
    assert len(list(tmp_path.iterdir())) == 1


def test_multipliers_fill_up_with_one():
    assert [lora.multiplier for lora in read_lora_files([LORA, LORA], [0.5])] == [0.5, 1.0]
    with pytest.raises(UserError, match=r"--lora_multiplier has more values .2. than --lora_weight"):
        complete_multipliers([LORA], [0.5, 1.0], "--lora_weight", "--lora_multiplier")


def test_merging_twice_is_the_same():
    """No tensor of a file is written to."""
    name = "double_blocks.0.img_attn_proj.weight"
    tensors = {"diffusion_model.double_blocks.0.img_attn_proj.diff": torch.ones(48, 48)}
    patch = merge_patch([LoraToMerge(lora_of(tensors, {}, "difference"), 0.5)], DIT)
    for _ in range(2):
        assert torch.equal(patch(name, torch.zeros(48, 48)), torch.full((48, 48), 0.5))


def test_merge_patch_leaves_its_input_alone():
    patch = merge_patch(read_lora_files([LORA]), DIT)
    weight = load_file(DIT)[patch.names[0]]
    before = weight.clone()
    assert not torch.equal(patch(patch.names[0], weight), before) and torch.equal(weight, before)
    norm = torch.ones(3)
    assert patch("double_blocks.0.img_attn_q_norm.weight", norm) is norm
