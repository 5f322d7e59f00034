"""The text encoders in every layout that circulates: the weights are those of the plain folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf_writing import as_stored, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from examples.toy.recipe.make_tokenizers import write_clip_tokenizer, write_llama_tokenizer
from hunyuan_model import check_text_encoder_files, load_text_encoder_1, load_text_encoder_2
from hunyuan_model.quantization.formats import FP8_DTYPE
from utils.errors import UserError

# Llama-3's size of heads and its constants, so that files without config.json can be read as well.
LLAMA = {
    "vocab_size": 520,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 1}
VISION = CLIP | {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it, with a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    return write_llama_tokenizer(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text model and its projection."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPTextConfig(**CLIP, vocab_size=768, projection_dim=32)
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return write_clip_tokenizer(folder)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def load_llama(path: Path, tokenizer: Path, **options: object) -> dict[str, Tensor]:
    options = {"dtype": torch.float32} | options
    return load_text_encoder_1(path, device="cpu", tokenizer=tokenizer, **options).model.state_dict()


def load_clip(path: Path, tokenizer: Path) -> dict[str, Tensor]:
    return load_text_encoder_2(path, device="cpu", dtype=torch.float32, tokenizer=tokenizer).model.state_dict()


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


FULL_CHECKPOINT = {  # what else stands in one
    "model.diffusion_model.double_blocks.0.img_attn_qkv.weight": torch.ones(1),
    "model.diffusion_model.img_in.proj.weight": torch.ones(1),
    "vae.decoder.conv_in.conv.weight": torch.ones(1),
}


@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_llava_folder_of_transformers(llama, tmp_path, shards):
    """The language model inside, without the vision tower."""
    config = LlavaConfig(text_config=LlamaConfig(**LLAMA), vision_config=CLIPVisionConfig(**VISION))
    theirs = LlavaForConditionalGeneration(config)
    theirs.get_decoder().load_state_dict(LlamaForCausalLM.from_pretrained(llama).model.state_dict())
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shards == "100KB")
    require_same(load_llama(tmp_path, llama), load_llama(llama, llama))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_llava_keys_of_either_transformers(llama, tmp_path, prefix):
    names = {name: name.replace("model.", prefix, 1) if name.startswith("model.") else name for name in weights_of(llama)}
    vision = {"vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    write(tmp_path / "model.safetensors", {names[name]: tensor for name, tensor in weights_of(llama).items()} | vision)
    config = {"model_type": "llava", "text_config": json.loads((llama / "config.json").read_text(encoding="utf-8"))}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    require_same(load_llama(tmp_path, llama), load_llama(llama, llama))


@pytest.mark.parametrize("prefix", ["", "text_encoders.llama.transformer."])
def test_llama_single_file_in_float16_alone_or_beside_other_models(llama, clip, tmp_path, prefix):
    half = {name: tensor.half() for name, tensor in weights_of(llama).items()}
    others = FULL_CHECKPOINT | with_prefix("text_encoders.clip_l.transformer.", weights_of(clip)) if prefix else {}
    path = write(tmp_path / "llava_llama3_fp16.safetensors", with_prefix(prefix, half) | others)
    expected = {name: tensor.half().float() for name, tensor in load_llama(llama, llama).items()}
    require_same(load_llama(path, llama), expected)


def test_pipeline_folder_of_diffusers(llama, clip, tmp_path):
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    shutil.copytree(llama, tmp_path / "text_encoder")
    shutil.copytree(clip, tmp_path / "text_encoder_2")
    check_text_encoder_files(tmp_path, tmp_path)
    require_same(load_llama(tmp_path, None), load_llama(llama, None))
    require_same(load_clip(tmp_path, None), load_clip(clip, None))


def scaled(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As ComfyUI stores scaled float8: codes and one scale for each Linear layer, and a marker; and the values that they mean."""
    stored, values = {"scaled_fp8": torch.ones(2, dtype=FP8_DTYPE)}, {}
    for name, weight in tensors.items():
        if weight.ndim != 2 or "embed" in name:
            stored[name] = values[name] = weight
            continue
        scale = weight.abs().max() / 448
        stored[name] = (weight / scale).to(FP8_DTYPE)
        stored[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
        values[name] = stored[name].float() * scale
    return stored, values


@pytest.mark.parametrize("prefix", ["", "text_encoders.llama.transformer."])
def test_llama_single_file_in_scaled_float8(llama, tmp_path, prefix):
    stored, values = scaled(weights_of(llama))
    path = write(tmp_path / "llava_llama3_fp8_scaled.safetensors", with_prefix(prefix, stored))
    plain = load_llama(llama, llama)
    require_same(load_llama(path, llama), {name: values[f"model.{name}"] for name in plain})
    kept = load_llama(path, llama, fp8=True)  # the codes of the file, with its scales
    for name in plain:
        code = stored[f"model.{name}"]
        assert torch.equal(kept[name].view(torch.uint8), code.view(torch.uint8))
        if code.dtype == FP8_DTYPE:
            scale = stored[f"model.{name.removesuffix('weight')}scale_weight"]
            torch.testing.assert_close(kept[f"{name}_scale"].flatten(), scale, rtol=0, atol=0)


def test_scaled_float8_computes_with_the_values(llama, tmp_path):
    stored, values = scaled(weights_of(llama))
    path = write(tmp_path / "scaled.safetensors", stored)
    write(tmp_path / "values.safetensors", values)
    options = {"device": "cpu", "dtype": torch.float32, "tokenizer": llama}
    expected, _ = load_text_encoder_1(tmp_path / "values.safetensors", **options).encode(["A cat"])
    states, _ = load_text_encoder_1(path, **options).encode(["A cat"])
    assert torch.equal(states, expected)
    states, _ = load_text_encoder_1(path, **options, fp8=True).encode(["A cat"])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_scaled_float8_without_its_scales_is_refused(llama, clip, tmp_path):
    for name, folder, load in (("llama", llama, load_llama), ("clip", clip, load_clip)):
        stored = {key: tensor for key, tensor in scaled(weights_of(folder))[0].items() if not key.endswith("scale_weight")}
        path = write(tmp_path / f"{name}.safetensors", stored)
        with pytest.raises(UserError, match="mean something only with scales"):
            load(path, folder)


def test_whole_clip_of_transformers(clip, tmp_path):
    text, vision = CLIPTextConfig(**CLIP, vocab_size=768), CLIPVisionConfig(**VISION)
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    missing = theirs.load_state_dict(weights_of(clip), strict=False).missing_keys
    assert missing and not any(name.startswith("text") for name in missing)
    theirs.save_pretrained(tmp_path / "clip")
    require_same(load_clip(tmp_path / "clip", clip), load_clip(clip, clip))
    single = write(tmp_path / "whole.safetensors", weights_of(tmp_path / "clip"))  # without config.json
    require_same(load_clip(single, clip), load_clip(clip, clip))


@pytest.mark.parametrize("prefix", ["", "text_model.", "text_encoders.clip_l.transformer.text_model."])
def test_clip_single_files(llama, clip, tmp_path, prefix):
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in weights_of(clip).items()}
    beside = {"text_projection.weight": tensors.pop("text_projection.weight"), "logit_scale": torch.ones(1)}
    if prefix.startswith("text_encoders."):
        llama_weights = with_prefix("text_encoders.llama.transformer.", weights_of(llama))
        beside = with_prefix("text_encoders.clip_l.transformer.", beside) | FULL_CHECKPOINT | llama_weights
    path = write(tmp_path / "clip_l.safetensors", with_prefix(prefix, tensors) | beside)
    require_same(load_clip(path, clip), load_clip(clip, clip))


def test_clip_single_file_in_scaled_float8(clip, tmp_path):
    stored, values = scaled(weights_of(clip))
    path = write(tmp_path / "clip_l_fp8_scaled.safetensors", stored)
    write(tmp_path / "values.safetensors", values)
    require_same(load_clip(path, clip), load_clip(tmp_path / "values.safetensors", clip))


def test_incomplete_text_encoders_are_refused_from_their_headers(llama, clip, tmp_path):
    tensors = weights_of(llama)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    path = write(tmp_path / "llama.safetensors", tensors)
    with pytest.raises(UserError, match=r"missing, such as layers\.1\.mlp\.up_proj\.weight"):
        check_text_encoder_files(path, clip)
    tensors = weights_of(clip)
    tensors["text_model.final_layer_norm.bias"] = torch.ones(3)
    path = write(tmp_path / "clip.safetensors", tensors)
    with pytest.raises(UserError, match=r"another shape, such as .*final_layer_norm\.bias \(3,\)"):
        check_text_encoder_files(llama, path)


# llama.cpp's names of a layer's tensors.
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def to_llama_cpp(tensors: dict[str, Tensor], heads: dict[str, int]) -> dict[str, Tensor]:
    """Names, and rows of queries and keys, as llama.cpp's converter writes them; ``heads``: of attn_q and attn_k."""
    names = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    converted = {}
    for name, tensor in tensors.items():
        theirs = names.get(name)
        if theirs is None:
            _, _, index, module = name.removesuffix(".weight").split(".", 3)
            theirs = f"blk.{index}.{GGUF_NAMES[module]}"
        count = heads.get(theirs.rpartition(".")[2])
        if count:
            tensor = tensor.reshape(count, 2, len(tensor) // count // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        converted[f"{theirs}.weight"] = tensor
    return converted | {"rope_freqs.weight": torch.ones(4)}


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("head_dim, heads", [(128, 2), (16, 4), (32, 2)])
def test_gguf_llama(llama, tmp_path, kind, head_dim, heads):
    """Its rows are in the order of transformers again, whatever its heads, which its metadata tells."""
    torch.manual_seed(2)
    sizes = LLAMA | {"head_dim": head_dim, "num_attention_heads": heads, "rope_theta": 20000.0, "rms_norm_eps": 2**-13}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    stored = to_llama_cpp(model.state_dict(), {"attn_q": heads, "attn_k": 1})
    metadata = {"embedding_length": 64, "attention__head_count": heads, "attention__head_count_kv": 1}
    metadata |= {"attention__layer_norm_rms_epsilon": 2**-13, "rope__freq_base": 20000.0}
    if head_dim * heads != 64:  # llama.cpp writes it only where the width does not tell it
        metadata["attention__key_length"] = head_dim
    matrices = [name for name, tensor in stored.items() if tensor.ndim == 2]
    write_gguf(tmp_path / "m.gguf", "llama", stored, matrices, kind, **metadata)
    values = {name: as_stored(tensor, kind) if tensor.ndim == 2 else tensor for name, tensor in model.state_dict().items()}
    encoder = load_text_encoder_1(tmp_path / "m.gguf", device="cpu", dtype=torch.float32, tokenizer=llama)
    assert all(torch.equal(tensor, values[f"model.{name}"]) for name, tensor in encoder.model.state_dict().items())
    model.load_state_dict(values)
    model.save_pretrained(tmp_path / "plain")
    plain = load_text_encoder_1(tmp_path / "plain", device="cpu", dtype=torch.float32, tokenizer=llama)
    assert torch.equal(encoder.encode(["A cat"])[0], plain.encode(["A cat"])[0])


def test_gguf_llama_with_impossible_heads(llama, tmp_path):
    stored = to_llama_cpp(weights_of(llama), {})
    write_gguf(tmp_path / "m.gguf", "llama", stored, (), "F16", attention__key_length=7)
    with pytest.raises(UserError, match=r"--text_encoder1 .*m\.gguf has heads of 7 according to its metadata"):
        load_llama(tmp_path / "m.gguf", llama)
