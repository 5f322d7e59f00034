"""LoRA files that PEFT and diffusers save, against the weights that PEFT merges itself."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from benchmarks.diffusers_twins import diffusers_transformer, to_diffusers
from networks.formats import peft_config as peft_config_module
from networks.formats.peft_config import PeftConfig, peft_config
from networks.formats.reading import read_lora
from networks.formats.writing import save_lora
from tests.lora_samples import CONFIG, distance, merged, randomise, transformer
from utils.errors import UserError

OURS = ["img_attn_qkv", "linear1", "fc1"]
DIFFUSERS = ["to_q", "to_k", "to_v", "proj_mlp", "ff.net.2"]


def by_patterns(config, targets: list[str]):
    """Ranks and alphas of their own for the first and the last of the targets."""
    config.target_modules = targets
    config.rank_pattern = {targets[0]: 2, rf"^(single_blocks|single_transformer_blocks)\.1\..*{targets[-2]}": 3}
    config.alpha_pattern = {rf"\w+_blocks\.\d\..*{targets[-1]}": 3}
    return config


KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8),
    "rsLoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=8),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=8),
    "LoKr of whole factors": lambda: peft.LoKrConfig(r=64, alpha=8),
    "LoKr of two low-rank factors": lambda: peft.LoKrConfig(r=2, alpha=8, decompose_both=True),
}


@pytest.mark.parametrize("on_diffusers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_peft_give_the_weights_that_peft_merges(tmp_path, kind, on_diffusers):
    ours = transformer()
    weights = {name: weight.clone() for name, weight in ours.state_dict().items()}
    model = diffusers_transformer(ours) if on_diffusers else ours
    adapted = peft.get_peft_model(model, by_patterns(KINDS[kind](), DIFFUSERS if on_diffusers else OURS))
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    found = merged(lora, weights)
    assert lora.kinds == {"LoRA" if kind == "rsLoRA" else kind.split()[0]} and not lora.left_out
    assert lora.layout == ("peft-diffusers" if on_diffusers else "peft")
    expected = adapted.merge_and_unload().state_dict()
    assert distance(to_diffusers(found, CONFIG.hidden_size) if on_diffusers else found, expected) < 1e-5


@pytest.mark.parametrize("saved_by", ["transformer", "pipeline"])
def test_files_of_diffusers_have_their_alphas_in_the_header(tmp_path, saved_by):
    ours = transformer()
    weights = {name: weight.clone() for name, weight in ours.state_dict().items()}
    model = diffusers_transformer(ours)
    config = by_patterns(peft.LoraConfig(r=4, lora_alpha=8), DIFFUSERS)
    model.add_adapter(config)
    randomise(model)
    if saved_by == "transformer":
        model.save_lora_adapter(tmp_path)
    else:
        layers, metadata = get_peft_model_state_dict(model, adapter_name="default"), model.peft_config["default"].to_dict()
        HunyuanVideoPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    lora = read_lora(tmp_path)
    assert lora.layout == ("diffusers" if saved_by == "pipeline" else "diffusers-model")
    found = merged(lora, weights)
    model.fuse_lora()
    model.unload_lora()
    assert distance(to_diffusers(found, CONFIG.hidden_size), model.state_dict()) < 1e-5

    # In a layout with alphas of its own they are not also in the header, where they would count twice.
    for layout in ("default", "other", "diffusers"):
        save_lora(tmp_path / "converted.safetensors", lora, layout)
        assert distance(merged(read_lora(tmp_path / "converted.safetensors"), weights), found) < 1e-5


def test_bias_of_lora_is_named(tmp_path):
    adapted = peft.get_peft_model(transformer(), peft.LoraConfig(lora_bias=True, target_modules=OURS))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"hold LoRA with a bias .*not supported"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ({"r": "4"}, "'4' is no rank"),
        ({"r": 0}, "0 is no rank"),
        ({"r": 10**400}, "is no rank"),
        ({"lora_alpha": "8"}, "'8' is no alpha"),
        ({"lora_alpha": float("nan")}, "nan is no alpha"),
        ({"lora_alpha": 10**400}, "cannot be read"),
        ({"alpha_pattern": {"to_q": [1]}}, r"\[1\] is no alpha"),
        ({"alpha_pattern": ["to_q"]}, "cannot be read"),
        ({"rank_pattern": {"to_q": -1}}, "-1 is no rank"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
        ({"alpha_pattern": {"(.|.)*x": 1}}, "may take forever"),
        ({"rank_pattern": {".*.*.*.*x": 1}}, "may take forever"),
        ({"alpha_pattern": {"(?i)to_q": 1}}, "is no regular expression"),
        ({"alpha_pattern": {r"(?x:(\w|.) +)z": 1}}, "has flags"),
        ({"r": 4, "lora_alpha": 1e308, "use_rslora": True}, "beyond what float32 holds"),
    ],
)
def test_unusable_configurations_are_user_errors(tmp_path, stored, message):
    text = stored if isinstance(stored, str) else json.dumps(stored)
    key = "base_model.model.double_blocks.0.img_attn_qkv.lora_{}.weight"
    save_file({key.format("A"): torch.ones(4, 8), key.format("B"): torch.ones(24, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path, values=False)
    save_file(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "a.safetensors", values=False)


def test_without_a_configuration_an_update_counts_as_it_is(tmp_path):
    assert peft_config(tmp_path / "adapter_model.safetensors", {}).alpha_of("double_blocks.0.linear1", 3) == 3
    assert PeftConfig().scale_without_rank("double_blocks.0.linear1") == 1


@pytest.mark.parametrize(
    ("module", "seconds", "message"), [("a." * 101, 10, "is too long"), ("a." * 50, 0, "longer than 0 seconds")]
)
def test_patterns_that_take_for_ever_over_long_names_and_many_modules_are_refused(monkeypatch, module, seconds, message):
    monkeypatch.setattr(peft_config_module, "MATCHING_SECONDS", seconds)
    config = PeftConfig("a.json", alpha_patterns={".*.*.*x": 1})
    with pytest.raises(UserError, match=f"a\\.json cannot be used: .*{message}"):
        config.alpha_of(module, 4)
    assert PeftConfig("a.json").alpha_of(module, 4) == 4


def test_each_layer_may_have_a_pattern_of_its_own():
    names = [f"single_blocks.{number}.linear1" for number in range(1000)]
    config = PeftConfig("a.json", rank_patterns={name: number + 1 for number, name in enumerate(names)}, rank=4, alpha=8.0)
    assert [8.0 / config.scale_without_rank(name) for name in names] == pytest.approx(range(1, 1001))
