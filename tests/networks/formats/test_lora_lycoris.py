"""Files that LyCORIS saves, against what its own layers compute.

Its ``merge_to`` is no reference: in 4.1.3 it multiplies LoHa and LoKr by their scale twice. Its forward passes are what is trained.
"""

from __future__ import annotations

import lycoris.kohya
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.diffusers_twins import diffusers_transformer, to_diffusers
from networks.formats.layouts import TARGETS
from networks.formats.reading import read_lora
from networks.formats.writing import save_lora
from tests.lora_samples import CONFIG, distance, merged, randomise, transformer
from utils.errors import UserError

BLOCKS = (
    "MMDoubleStreamBlock",
    "MMSingleStreamBlock",
    "HunyuanVideoTransformerBlock",
    "HunyuanVideoSingleTransformerBlock",
)
KINDS = {
    "LoRA": {"algo": "lora"},
    "LoRA with a scalar": {"algo": "lora", "use_scalar": True},
    "LoHa": {"algo": "loha"},
    "LoHa with a scalar": {"algo": "loha", "use_scalar": True},
    "LoKr": {"algo": "lokr", "linear_dim": 2},
    "LoKr with a scalar": {"algo": "lokr", "factor": 4, "use_scalar": True},
    "LoKr of whole factors": {"algo": "lokr", "full_matrix": True},
    "LoKr of whole factors for a large rank": {"algo": "lokr", "linear_dim": 1000},
    "LoKr of two low-rank factors": {"algo": "lokr", "linear_dim": 1, "factor": 8, "decompose_both": True},
    "LoKr of unlike factors": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
    "DoRA": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "DoRA for each input": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "DoRA on LoHa": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
    "DoRA on LoKr": {"algo": "lokr", "dora_wd": True, "wd_on_output": True},
    "a whole difference": {"algo": "full"},
}


def trained(model: nn.Module, **options) -> LycorisNetwork:
    LycorisNetwork.apply_preset({"target_module": list(BLOCKS), "target_name": []})
    network = create_lycoris(model, 1.0, **{"linear_dim": 4, "linear_alpha": 2, "preset": "full-lin", **options})
    network.apply_to()
    network.requires_grad_(True).eval()
    randomise(network)
    return network


def computed_weights(model: nn.Module, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights and biases of the layers, as their forward passes show them."""
    weights = {name: weight.clone() for name, weight in model.state_dict().items() if name in names}
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv3d) and f"{path}.weight" in names:
                shape = names[f"{path}.weight"].shape
                units = torch.eye(shape[1:].numel()).reshape(-1, *shape[1:])
                bias = layer(torch.zeros(1, *shape[1:]))
                weights |= {f"{path}.weight": (layer(units) - bias).flatten(1).T.reshape(shape), f"{path}.bias": bias.flatten()}
    return weights


@pytest.mark.parametrize("on_diffusers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_files_give_what_the_layers_of_lycoris_compute(tmp_path, kind, on_diffusers):
    ours = transformer()
    weights = {name: weight.clone() for name, weight in ours.state_dict().items()}
    model = diffusers_transformer(ours) if on_diffusers else ours
    names = to_diffusers(weights, CONFIG.hidden_size) if on_diffusers else weights
    network = trained(model, **KINDS[kind])
    network.save_weights(tmp_path / "file.safetensors", None, None)
    lora = read_lora(tmp_path / "file.safetensors")
    assert len(network.loras) == (40 if on_diffusers else 26) and lora.layout.startswith("lycoris")
    assert kind.startswith(tuple(lora.kinds)) and len(lora.kinds) == 1
    found = merged(lora, weights)
    if kind == "a whole difference":
        network.restore()
        network.merge_to(1.0)
        expected = {name: weight for name, weight in model.state_dict().items() if name in names}
    else:
        expected = computed_weights(model, names)
    assert distance(to_diffusers(found, CONFIG.hidden_size) if on_diffusers else found, expected) < 1e-5


def test_differences_of_norms_are_read(tmp_path):
    ours = transformer()
    weights = {name: weight.clone() for name, weight in ours.state_dict().items()}
    LycorisNetwork.apply_preset({"target_module": ["IndividualTokenRefinerBlock"], "target_name": []})
    network = create_lycoris(ours, 1.0, linear_dim=4, preset="full-lin", train_norm=True)
    network.apply_to()
    network.requires_grad_(True)
    randomise(network)
    network.save_weights(tmp_path / "file.safetensors", None, None)
    norm = "lycoris_txt_in_individual_token_refiner_blocks_0_norm1"
    stored, found = load_file(tmp_path / "file.safetensors"), merged(read_lora(tmp_path / "file.safetensors"), weights)
    for key, parameter in ((f"{norm}.w_norm", "weight"), (f"{norm}.b_norm", "bias")):
        name = f"txt_in.individual_token_refiner.blocks.0.norm1.{parameter}"
        torch.testing.assert_close(found[name], weights[name] + stored[key])


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_networks_of_the_kohya_module_are_the_default_layout(tmp_path, algo):
    ours = transformer()
    weights = {name: weight.clone() for name, weight in ours.state_dict().items()}
    network = lycoris.kohya.create_network(1.0, 4, 2, None, [], ours, algo=algo, preset="full-lin")
    network.apply_to([], ours, False, True)
    network.requires_grad_(True).eval()
    randomise(network)
    network.save_weights(tmp_path / "file.safetensors", None, {})
    lora = read_lora(tmp_path / "file.safetensors")
    assert lora.layout == "default"
    assert distance(merged(lora, weights), computed_weights(ours, weights)) < 1e-5


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_scalar_that_is_kept_apart_multiplies_the_update(tmp_path, kind):
    """As older LyCORIS saved networks with use_scalar; newer versions multiply it in."""
    ours = transformer()
    weights = ours.state_dict()
    trained(ours, algo=kind, full_matrix=True).save_weights(tmp_path / "file.safetensors", None, None)
    tensors = load_file(tmp_path / "file.safetensors")
    scalars = {f"{key.partition('.')[0]}.scalar": torch.tensor(0.25) for key in tensors}
    save_file(tensors | scalars, tmp_path / "apart.safetensors")
    base = {name: weight for name, weight in weights.items() if name in transformer().state_dict()}
    expected = merged(read_lora(tmp_path / "file.safetensors"), base, 0.25)
    assert distance(merged(read_lora(tmp_path / "apart.safetensors"), base), expected) < 1e-6


@pytest.mark.parametrize(("algo", "title"), [("diag-oft", "OFT"), ("glora", "GLoRA"), ("ia3", r"\(IA\)\^3"), ("tlora", "T-LoRA")])
def test_kinds_that_are_not_read_are_named(tmp_path, algo, title):
    trained(transformer(), algo=algo).save_weights(tmp_path / "file.safetensors", None, None)
    for partial in (False, True):
        with pytest.raises(UserError, match=rf"26 of its modules hold {title} .*not supported"):
            read_lora(tmp_path / "file.safetensors", partial=partial)


def test_tucker_decomposition_is_named_and_can_be_left_out(tmp_path, caplog):
    trained(transformer(), algo="loha").save_weights(tmp_path / "file.safetensors", None, None)
    tensors = load_file(tmp_path / "file.safetensors")
    flat = "lycoris_double_blocks_0_img_attn_qkv"
    save_file(tensors | {f"{flat}.hada_t1": torch.ones(4, 4, 1, 1)}, tmp_path / "tucker.safetensors")
    with pytest.raises(UserError, match=r"1 of its modules hold Tucker decomposition"):
        read_lora(tmp_path / "tucker.safetensors")
    lora = read_lora(tmp_path / "tucker.safetensors", partial=True)
    assert len(lora.updates) == 25 and f"{flat}.hada_t1" in lora.left_out and "They are left out" in caplog.text


@pytest.mark.parametrize("target", TARGETS)
def test_lycoris_files_are_written_where_they_have_a_place(tmp_path, target):
    for kind in ("LoHa", "LoKr", "DoRA", "DoRA for each input", "DoRA on LoKr", "a whole difference"):
        ours = transformer()
        weights = {name: weight.clone() for name, weight in ours.state_dict().items()}
        trained(ours, **KINDS[kind]).save_weights(tmp_path / "file.safetensors", None, None)
        lora = read_lora(tmp_path / "file.safetensors")
        if target == "comfy" or (target == "default" and kind != "a whole difference"):
            save_lora(tmp_path / "written.safetensors", lora, target)
            assert distance(merged(read_lora(tmp_path / "written.safetensors"), weights), merged(lora, weights)) == 0
        else:
            with pytest.raises(UserError, match=r"cannot be written in the layout .* has no place there .the layout comfy has one"):
                save_lora(tmp_path / "refused.safetensors", lora, target)
    assert not (tmp_path / "refused.safetensors").exists()
