"""Reading and converting LoRA files, and convert_lora.py as a user runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import convert_lora
import hunyuan_model
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.lora import create_network
from networks.lora_files import check_lora_file, group_keys, lora_pairs, read_lora, tensor_hashes, to_layout
from networks.lora_layouts import DEFAULT, OTHER, flat_name, module_path
from utils.errors import UserError, run_script
from utils.safetensors_io import read_header

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
LORA, LORA_OTHER, LORA_BACK = (GOLDENS / name for name in ("lora.safetensors", "lora_other.safetensors", "lora_back.safetensors"))


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the script in this process, as ``python convert_lora.py`` would; returns (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert_lora.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            run_script(convert_lora.main)
        return (exit_info.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(convert):
    """Run the script, see it refuse its arguments, and return what it says."""

    def run(*arguments: object) -> str:
        status, stdout, stderr = convert(*arguments)
        assert status == 2 and not stdout and stderr.startswith("error: ") and stderr.count("\n") == 1
        return stderr

    return run


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), atol=1e-6, rtol=0, msg=name)


def pair(down=(4, 8), up=(8, 4), module="double_blocks_0_img_attn_qkv") -> dict[str, torch.Tensor]:
    return {
        f"lora_unet_{module}.lora_down.weight": torch.ones(down),
        f"lora_unet_{module}.lora_up.weight": torch.ones(up),
    }


def test_every_linear_of_the_transformer_has_a_name_both_ways():
    transformer = hunyuan_model.load_transformer(GOLDENS / "dit.safetensors", device="cpu", dtype=torch.float32)
    paths = [path for path, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    assert len(paths) > 40
    assert [module_path(flat_name(path)) for path in paths] == paths
    assert module_path("double_blocks_17_img_mlp_fc2") == "double_blocks.17.img_mlp.fc2"
    assert module_path("single_blocks_39_linear1") == "single_blocks.39.linear1"


@pytest.mark.parametrize("flat", ["double_blocks_0_attn_to_q", "single_blocks_x_linear1", "single_blocks_0_linear1_extra", ""])
def test_unknown_flat_names_are_user_errors(flat):
    with pytest.raises(UserError, match="names no linear layer"):
        module_path(flat)


def test_conversion_gives_the_reference_values():
    lora = read_lora(LORA)
    assert lora.layout == DEFAULT and lora.metadata["ss_network_dim"] == "4"
    other = to_layout(lora.tensors, OTHER, "test")
    assert_same_tensors(other, load_file(LORA_OTHER))
    assert_same_tensors(to_layout(other, DEFAULT, "test"), load_file(LORA_BACK))
    back = read_lora(LORA_OTHER)
    assert back.layout == OTHER
    assert_same_tensors(back.tensors, load_file(LORA_BACK))


def test_conversion_keeps_dtypes_and_updates_in_half_precision():
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(LORA).items()}
    other = to_layout(tensors, OTHER, "test")
    assert {tensor.dtype for tensor in other.values()} == {torch.bfloat16}
    before, after = lora_pairs(tensors, "test"), lora_pairs(other, "test")
    for flat, old in before.items():
        update = old.scale * old.up.float() @ old.down.float()
        new = after[flat].scale * after[flat].up.float() @ after[flat].down.float()
        assert (new - update).abs().max() <= 0.02 * update.abs().max()


def test_a_negative_scale_survives_conversion():
    tensors = pair() | {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(-2.0)}
    found = lora_pairs(to_layout(tensors, OTHER, "test"), "test")["double_blocks_0_img_attn_qkv"]
    torch.testing.assert_close(found.scale * found.up @ found.down, torch.full((8, 8), -0.5 * 4))


def test_the_transformer_prefix_and_a_stored_alpha_are_read():
    prefix = "transformer.single_blocks.3.linear2"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(4, 8),
        f"{prefix}.lora_B.weight": torch.ones(6, 4),
        f"{prefix}.alpha": torch.tensor(2),
    }
    found = lora_pairs(tensors, "test")
    assert list(found) == ["single_blocks_3_linear2"] and found["single_blocks_3_linear2"].scale == 0.5
    assert "diffusion_model.single_blocks.3.linear2.lora_A.weight" in to_layout(tensors, OTHER, "test")


def test_no_alpha_means_scale_one():
    assert lora_pairs(pair(), "test")["double_blocks_0_img_attn_qkv"].scale == 1.0
    assert to_layout(pair(), DEFAULT, "test")["lora_unet_double_blocks_0_img_attn_qkv.alpha"].item() == 4.0


OTHER_KEY = "diffusion_model.single_blocks.0.linear1.lora_A.weight"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no tensors"),
        (["double_blocks.0.img_attn_qkv.weight"], "not a LoRA that can be read here: 1 of its 1 keys"),
        ([*pair(), "extra.weight"], "1 of its 3 keys are unknown .extra.weight"),
        ([*pair(), OTHER_KEY, OTHER_KEY.replace("_A", "_B")], "mixes the layouts"),
        (list(pair())[:1], "a factor is missing for double_blocks_0_img_attn_qkv"),
        (["lora_unet_double_blocks_0_img_attn_qkv.alpha"], "a factor is missing"),
        (["lora_unet_a.lokr_w1"], "not a plain LoRA.*lokr_w1.*lycoris"),
        ([*pair(), "lora_unet_double_blocks_0_img_attn_qkv.dora_scale"], "not a plain LoRA.*dora_scale"),
        ([OTHER_KEY, OTHER_KEY.replace("diffusion_model", "transformer")], "are the same module"),
        (["lora_te_text_model.lora_down.weight"], "keys are unknown"),
    ],
)
def test_what_is_no_lora_is_a_user_error(names, message):
    with pytest.raises(UserError, match=message):
        group_keys(names, "file.safetensors")


@pytest.mark.parametrize(("down", "up"), [((4, 8), (8, 5)), ((4, 8, 1, 1), (8, 4, 1, 1)), ((0, 8), (8, 0)), ((8,), (8,))])
def test_factors_that_do_not_fit_are_user_errors(tmp_path, down, up):
    with pytest.raises(UserError, match="not the factors of one update"):
        lora_pairs(pair(down, up), "file.safetensors")
    save_file(pair(down, up), tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="not the factors of one update"):
        check_lora_file(tmp_path / "bad.safetensors")


def test_check_reads_the_header_and_compares_with_the_model():
    shapes = read_header(GOLDENS / "dit.safetensors").shapes
    assert check_lora_file(LORA, shapes).layout == DEFAULT
    assert check_lora_file(LORA_OTHER, shapes).layout == OTHER
    smaller = {name: shape for name, shape in shapes.items() if not name.startswith("single_blocks.2")}
    with pytest.raises(
        UserError, match=r"do not match the model: 2 of 22 are not in it .single_blocks_2_linear1, single_blocks_2_linear2"
    ):
        check_lora_file(LORA, smaller)


def test_hashes_are_those_that_sd_scripts_wrote():
    stored = read_header(LORA).metadata
    hashes = tensor_hashes(load_file(LORA), stored)
    assert hashes == {name: stored[name] for name in hashes} and len(hashes) == 2


def test_script_converts_there_and_back(tmp_path, convert):
    other, back = tmp_path / "new folder" / "other.safetensors", tmp_path / "back.safetensors"
    command = [sys.executable, str(ROOT / "convert_lora.py"), "--input", str(LORA), "--output", str(other), "--target", "other"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, str(other)), done.stderr
    assert_same_tensors(load_file(other), load_file(LORA_OTHER))
    status, stdout, stderr = convert("--input", other, "--output", back, "--target", "default")
    assert (status, stdout.strip()) == (0, str(back)), stderr
    assert_same_tensors(load_file(back), load_file(LORA_BACK))
    metadata, source = read_header(back).metadata, read_header(LORA).metadata
    assert metadata.keys() == source.keys() and metadata["ss_network_module"] == "networks.lora"
    assert metadata["sshs_model_hash"] == tensor_hashes(load_file(back), metadata)["sshs_model_hash"] != source["sshs_model_hash"]
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == ["back.safetensors", "other.safetensors"]


def test_script_refuses_the_wrong_target(tmp_path, refused):
    output = tmp_path / "out.safetensors"
    assert "has the layout default already" in refused("--input", LORA, "--output", output, "--target", "default")
    assert "convert it to --target default" in refused("--input", LORA_OTHER, "--output", output, "--target", "other")
    assert not list(tmp_path.iterdir())


def test_script_refuses_to_overwrite_its_input(tmp_path, refused):
    copy = Path(shutil.copy(LORA, tmp_path / "lora.safetensors"))
    before = copy.read_bytes()
    assert "are the same file" in refused("--input", copy, "--output", tmp_path / "." / "lora.safetensors", "--target", "other")
    assert copy.read_bytes() == before


def test_script_refuses_what_it_cannot_read(tmp_path, refused):
    output = tmp_path / "out.safetensors"
    assert "does not exist" in refused("--input", tmp_path / "absent.safetensors", "--output", output, "--target", "other")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(LORA.read_bytes()[:-100])
    assert "not a readable safetensors file" in refused("--input", cut, "--output", output, "--target", "other")
    assert "not a LoRA" in refused("--input", GOLDENS / "dit.safetensors", "--output", output, "--target", "other")
    save_file(pair(module="middle_block_attn"), cut)
    assert "names no linear layer" in refused("--input", cut, "--output", output, "--target", "other")
    assert "must end in .safetensors" in refused("--input", LORA, "--output", tmp_path / "out.pt", "--target", "other")
    assert not output.exists()


@pytest.mark.parametrize("value", ["nan alpha", "long alpha", "nan factor"])
@pytest.mark.parametrize("target", ["other", "default"])
def test_values_that_are_no_numbers_are_refused(convert, tmp_path, value, target):
    tensors = load_file(LORA if target == "other" else LORA_OTHER)
    name = next(name for name in tensors if name.endswith(("lora_up.weight", "lora_B.weight")))
    alpha = name.replace("lora_up.weight", "alpha").replace("lora_B.weight", "alpha")
    if value == "nan factor":
        tensors[name][0, 0] = torch.nan
    else:
        tensors[alpha] = torch.tensor(torch.nan) if value == "nan alpha" else torch.ones(3)
    save_file(tensors, tmp_path / "bad.safetensors")
    status, _, stderr = convert(
        "--input", tmp_path / "bad.safetensors", "--output", tmp_path / "out.safetensors", "--target", target
    )
    assert status == 2 and ("NaN" in stderr or "one finite number" in stderr)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_other_layout_holds_every_trained_module_under_its_dotted_name():
    """Readers that know only part of the sd-scripts keys apply a LoRA in part; in this layout nothing is left out."""
    with torch.device("meta"):
        transformer = HYVideoDiffusionTransformer(TransformerConfig())
        network = create_network(1.0, 4, 4.0, None, None, transformer)
    trained = {path for path, module in transformer.named_modules() if path in set(network.paths.values())}
    assert len(trained) == 20 * 8 + 40 * 2
    # One by one matrices stand in for the full-size factors.
    weights = {name: torch.ones((1, 1) if tensor.ndim else ()) for name, tensor in network.state_dict().items()}
    converted = to_layout(weights, OTHER, "test")
    assert {key.removeprefix("diffusion_model.").rpartition(".lora_")[0] for key in converted} == trained
