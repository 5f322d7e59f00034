"""Reading and converting LoRA files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from hunyuan_model.checkpoints.layouts import OFFICIAL
from networks.formats.layouts import DEFAULT, LAYOUTS, OTHER, LoraLayout
from networks.formats.reading import check_lora_file, lora_of, read_lora
from networks.formats.updates import LowRank
from networks.formats.writing import tensor_hashes, to_layout
from utils.errors import UserError
from utils.safetensors_io import read_header

ROOT = Path(__file__).resolve().parents[3]
GOLDENS = ROOT / "tests" / "goldens"
LORA, LORA_OTHER, LORA_BACK = (GOLDENS / name for name in ("lora.safetensors", "lora_other.safetensors", "lora_back.safetensors"))


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), atol=1e-6, rtol=0, msg=name)


def pair(down=(4, 8), up=(8, 4), module="double_blocks_0_img_attn_qkv") -> dict[str, torch.Tensor]:
    return {
        f"lora_unet_{module}.lora_down.weight": torch.ones(down),
        f"lora_unet_{module}.lora_up.weight": torch.ones(up),
    }


QKV = "double_blocks.0.img_attn_qkv.weight"


def as_layout(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    return to_layout(lora_of(tensors, {}, "file.safetensors"), layout)


def loras(tensors: dict[str, torch.Tensor]) -> dict[str, LowRank]:
    return {placed.parameter: placed.update for placed in lora_of(tensors, {}, "file.safetensors").updates}


def test_conversion_gives_the_reference_values():
    lora = read_lora(LORA)
    assert lora.layout == DEFAULT and lora.metadata["ss_network_dim"] == "4"
    other = to_layout(lora, OTHER)
    assert_same_tensors(other, load_file(LORA_OTHER))
    assert_same_tensors(as_layout(other, DEFAULT), load_file(LORA_BACK))
    assert read_lora(LORA_OTHER).layout == OTHER


def test_conversion_keeps_dtypes_and_updates_in_half_precision():
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(LORA).items()}
    other = as_layout(tensors, OTHER)
    assert {tensor.dtype for tensor in other.values()} == {torch.bfloat16}
    before, after = loras(tensors), loras(other)
    for flat, old in before.items():
        update = old.scale * old.up.float() @ old.down.float()
        new = after[flat].scale * after[flat].up.float() @ after[flat].down.float()
        assert (new - update).abs().max() <= 0.02 * update.abs().max()


def test_a_negative_scale_survives_conversion():
    tensors = pair() | {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(-2.0)}
    found = loras(as_layout(tensors, OTHER))[QKV]
    torch.testing.assert_close(found.scale * found.up @ found.down, torch.full((8, 8), -0.5 * 4))


def test_the_transformer_prefix_and_a_stored_alpha_are_read():
    prefix = "transformer.single_blocks.3.linear2"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(4, 8),
        f"{prefix}.lora_B.weight": torch.ones(6, 4),
        f"{prefix}.alpha": torch.tensor(2),
    }
    found = loras(tensors)
    assert list(found) == ["single_blocks.3.linear2.weight"] and found["single_blocks.3.linear2.weight"].scale == 0.5
    assert "diffusion_model.single_blocks.3.linear2.lora_A.weight" in as_layout(tensors, OTHER)


def test_a_new_entry_of_the_table_is_read_and_written(monkeypatch):
    endings = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
    monkeypatch.setitem(LAYOUTS, "new", LoraLayout("a new program", "new.*", "new.model.", OFFICIAL, True, endings))
    stored = as_layout(load_file(LORA), "new")
    assert "new.model.double_blocks.0.img_mlp.fc1.lora_A.default.weight" in stored
    assert lora_of(stored, {}, "test").layout == "new"
    assert_same_tensors(as_layout(stored, DEFAULT), load_file(LORA))


def test_no_alpha_means_scale_one():
    assert loras(pair())[QKV].scale == 1.0
    assert as_layout(pair(), DEFAULT)["lora_unet_double_blocks_0_img_attn_qkv.alpha"].item() == 4.0


OTHER_KEY = "diffusion_model.single_blocks.0.linear1.lora_A.weight"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "not a LoRA that can be read here: it holds no tensors"),
        (["double_blocks.0.img_attn_qkv.weight"], "not a LoRA that can be read here: none of its 1 keys"),
        (
            ["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.mid_block.x"],
            "looks like a VAE of another model.*not like a LoRA",
        ),
        ([*pair(), "extra.weight"], "only in part: 1 of its 3 keys match nothing in the transformer .extra.weight.*--lora_partial"),
        (list(pair())[:1], "incomplete.*up is missing"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lokr_w1"], "incomplete.*lokr_w2 is missing"),
        (["lora_unet_double_blocks_0_img_attn_qkv.alpha"], "incomplete"),
        (["lora_unet_double_blocks_0_img_attn_qkv.oft_blocks"], "1 of its modules hold OFT .*not supported"),
        ([OTHER_KEY, OTHER_KEY.replace("diffusion_model", "transformer")], "are the same module"),
    ],
)
def test_what_is_no_lora_is_a_user_error(names, message):
    with pytest.raises(UserError, match=message):
        lora_of(dict.fromkeys(names, torch.ones(4, 4)), {}, "file.safetensors")


@pytest.mark.parametrize(("down", "up"), [((4, 8), (8, 5)), ((4, 8, 1, 1), (8, 4, 1, 2))])
def test_factors_that_do_not_fit_are_user_errors(tmp_path, down, up):
    with pytest.raises(UserError, match="not the factors of one update"):
        lora_of(pair(down, up), {}, "file.safetensors")
    save_file(pair(down, up), tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="not the factors of one update"):
        check_lora_file(tmp_path / "bad.safetensors")


def test_check_reads_the_header_and_compares_with_the_model():
    shapes = read_header(GOLDENS / "dit.safetensors").shapes
    assert check_lora_file(LORA, shapes).layout == DEFAULT
    assert check_lora_file(LORA_OTHER, shapes).layout == OTHER
    smaller = {name: shape for name, shape in shapes.items() if not name.startswith("single_blocks.2")}
    absent = "2 of 22 are not in it .single_blocks.2.linear1, single_blocks.2.linear2"
    wider = shapes | {"single_blocks.0.linear1.weight": (400, 48)}
    for other, message in ((smaller, absent), (wider, r"1 of 22 have another size .*\(336, 48\).*\(400, 48\)")):
        with pytest.raises(UserError, match=f"do not match the model: {message}"):
            check_lora_file(LORA, other)


def test_hashes_are_those_that_sd_scripts_wrote():
    stored = read_header(LORA).metadata
    hashes = tensor_hashes(load_file(LORA), stored)
    assert hashes == {name: stored[name] for name in hashes} and len(hashes) == 2


@pytest.mark.parametrize("metadata", [{}, {"ss_network_dim": "4", "ss_comment": 'a "ü" \n', "other": "x"}])
def test_hashes_are_those_of_the_file_that_safetensors_writes(metadata):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64]
    tensors = {f"{number % 3}.{number}": torch.ones(100_001).mul(number).to(dtype) for number, dtype in enumerate(dtypes * 2)}
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = save(tensors, training)
    header = 8 + int.from_bytes(content[:8], "little")
    assert tensor_hashes(tensors, metadata) == {
        "sshs_model_hash": hashlib.sha256(content[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
    small = {"a": torch.ones(2)}
    assert tensor_hashes(small, metadata)["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("alpha", torch.tensor(torch.nan), "one finite number"),
        ("alpha", torch.ones(3), "one finite number"),
        ("lora_up.weight", torch.full((8, 4), torch.inf), "holds NaN or infinity"),
        ("scalar", torch.tensor(1e300, dtype=torch.float64), "one finite number"),
        ("lora_up.weight", torch.ones(8, 4).to(torch.float8_e8m0fnu), "stores .*lora_up.weight as torch.float8_e8m0fnu"),
    ],
)
def test_values_that_are_no_numbers_are_user_errors(part, value, message):
    with pytest.raises(UserError, match=message):
        lora_of(pair() | {f"lora_unet_double_blocks_0_img_attn_qkv.{part}": value}, {}, "file.safetensors")
