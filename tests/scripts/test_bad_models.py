"""Models, LoRA and latents that cannot be used, met by the scripts: one sentence that names the culprit, status 2."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from bench import ALPHA, DOWN, MODULE, UP, refused
from safetensors.torch import save

LORA = Path(__file__).resolve().parents[1] / "goldens" / "lora.safetensors"


def header(content: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever it is."""
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class Opens:
    """A pickle of this would make a file."""

    def __reduce__(self):
        return (open, ("made_by_a_pickle", "w"))


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(2)}, buffer)
    return buffer.getvalue()


SAFETENSORS = {
    "empty": (b"", "it is empty"),
    "cut in its data": (LORA.read_bytes()[:-1], "cut short"),
    "longer than its header says": (LORA.read_bytes() + b"\0", "not a readable"),
    "huge length of the header": (header({"x": tensor()}, length=2**62), "not a readable"),
    "header not JSON": (header(b"{not json}"), "not a readable"),
    "header of depth": (header(b"[" * 100_000), "not a readable"),
    "shape beyond all bytes": (header({"x": tensor(shape=[2**40, 2**40])}), "not a readable"),
    "no tensors": (header({}, b""), "not a LoRA"),
    "torch file": (torch_file(), "Save it as safetensors"),
    "pickle of code": (pickle.dumps(Opens()), "Save it as safetensors"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "GGUF": (b"GGUF" + bytes(32), "it is a GGUF file. Use a .safetensors file."),
    "text": (b"a LoRA, surely", "not a readable"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_damaged_safetensors_file(bench, monkeypatch, name):
    content, says = SAFETENSORS[name]
    monkeypatch.chdir(bench.folder)
    path = bench.write("lora.safetensors", content)
    refused(bench.convert(path), path, says)
    refused(bench.train("--base_weights", path), path, says)
    assert not (bench.folder / "made_by_a_pickle").exists() and not (bench.folder / "out.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in SAFETENSORS if name not in ("torch file", "no tensors")])
def test_a_damaged_transformer(bench, monkeypatch, name):
    monkeypatch.chdir(bench.folder)
    path = bench.write("dit.safetensors", SAFETENSORS[name][0])
    refused(bench.train("--dit", path), "--dit", path)
    assert not (bench.folder / "made_by_a_pickle").exists()


NORM, PATCH = "double_blocks.0.img_attn_q_norm.weight", "img_in.proj.weight"
MODELS = {
    "norm a matrix": (lambda t: t.update({NORM: torch.ones(4, 8)}), [NORM, "(4, 8)"]),
    "patch a matrix": (lambda t: t.update({PATCH: torch.ones(128, 64)}), [PATCH, "(128, 64)"]),
    "whole numbers": (
        lambda t: t.update({"single_blocks.3.linear2.weight": t["single_blocks.3.linear2.weight"].to(torch.int8)}),
        ["whole numbers", "single_blocks.3.linear2.weight (int8)"],
    ),
    "a layer missing": (lambda t: t.pop("single_blocks.3.linear2.weight"), ["single_blocks.3.linear2.weight", "missing"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_with_impossible_tensors(bench, name):
    change, says = MODELS[name]
    refused(bench.train("--dit", bench.changed(bench.model.dit, change)), "changed.safetensors", *says)


def test_a_vae_that_is_not_whole_is_told_before_hours_of_sampling(bench, monkeypatch):
    monkeypatch.setattr("hv_generate_video.Batch", None)
    source = next(Path(bench.model.vae).glob("*.safetensors"))
    name = "decoder.conv_out.conv.bias"
    refused(bench.generate("--vae", bench.changed(source, lambda t: t.pop(name))), "--vae", name, "missing")
    flat = bench.changed(source, lambda t: t.update({"post_quant_conv.weight": torch.ones(4)}))
    refused(bench.generate("--vae", flat), "--vae", "post_quant_conv.weight", "(4,)")


CONFIGS = {
    "layers as text": ("text_encoder1", {"num_hidden_layers": "many"}),
    "no heads": ("text_encoder1", {"num_attention_heads": 0}),
    "unknown activation": ("text_encoder2", {"hidden_act": "nothing"}),
    "width of another model": ("text_encoder2", {"hidden_size": 96}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_encoder_with_an_impossible_config(bench, name):
    flag, entries = CONFIGS[name]
    folder = bench.folder / "encoder"
    shutil.copytree(getattr(bench.model, flag), folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(stored | entries), encoding="utf-8")
    refused(bench.generate(f"--{flag}", folder), f"--{flag} {folder}")


LORAS = {
    "ranks differ": (lambda t: t.update({DOWN: torch.ones(3, 128)}), [DOWN, "not the factors of one update"]),
    "down missing": (lambda t: t.pop(DOWN), ["incomplete", "down is missing", UP]),
    "foreign keys": (
        lambda t: t.update({"text_model.weight": torch.ones(1)}),
        ["only in part: 1 of its 4 keys", "text_model.weight", "--lora_partial"],
    ),
    "two kinds": (lambda t: t.update({f"{MODULE}.hada_w1_a": torch.ones(1)}), ["hada_w1_a", "factors of one kind are expected"]),
    "NaN": (lambda t: t[UP].view(-1)[0:1].fill_(torch.nan), ["NaN or infinity", UP, "earlier save"]),
    "alpha NaN": (lambda t: t.update({ALPHA: torch.tensor(torch.nan)}), [ALPHA, "one finite number"]),
    "whole numbers": (lambda t: t.update({UP: t[UP].to(torch.int8)}), ["int8", "floating point"]),
    "size of another model": (lambda t: t.update({DOWN: torch.ones(4, 99)}), ["do not match the model", "another size"]),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_that_cannot_be_used(bench, name):
    change, says = LORAS[name]
    path = bench.changed(bench.lora(), change)
    refused(bench.generate("--lora_weight", path), path.name, *says)
    refused(bench.train("--network_weights", path, "--dim_from_weights"), path.name, *says)


LATENT_FILES = {
    "another name": ({"latents": torch.ones(16, 1, 4, 4)}, "no tensor named latent"),
    "no frames": ({"latent": torch.ones(16, 0, 4, 4)}, "(16, frames, height, width)"),
    "NaN": ({"latent": torch.full((16, 1, 4, 4), torch.nan)}, "NaN or infinity"),
}


@pytest.mark.parametrize("name", LATENT_FILES)
def test_a_latent_that_cannot_be_decoded(bench, name):
    tensors, says = LATENT_FILES[name]
    refused(bench.decode(bench.write("l.safetensors", save(tensors))), "--latent_path", "l.safetensors", says)
    assert not (bench.folder / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
@pytest.mark.parametrize("what", ["picture", "--dit", "--vae", "--lora_weight", "--latent_path"])
def test_a_pipe_does_not_make_a_script_wait(bench, what):
    pipe = bench.folder / "pipe.png"
    os.mkfifo(pipe)
    if what == "picture":
        ended = bench.latents(bench.jsonl(json.dumps({"image_path": str(pipe), "caption": "x"})))
        assert "pipe.png is a folder or a device" in ended.stderr
        return refused(ended, "nothing to train on")
    if what == "--latent_path":
        return refused(bench.decode(pipe), what, "not a regular file")
    refused(bench.generate(what, pipe), "pipe.png", "not a regular file")
