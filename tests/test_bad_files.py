"""Files and places that cannot be used, met by the scripts as a user runs them: one sentence that names the culprit, status 2."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import wave
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save, save_file

from dataset.media import IMAGE_EXTENSIONS
from utils.media_writing import save_video

GOLDENS = Path(__file__).parent / "goldens"
LORA = GOLDENS / "lora.safetensors"


class Bench:
    """A folder to spoil files in, and the scripts to show them to."""

    def __init__(self, call: Callable, model, cached: Path, folder: Path) -> None:
        self._call, self.model, self.cached, self.folder = call, model, cached, folder

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def media(self, kind: str, **files: bytes) -> Path:
        """A dataset TOML over a folder with these files; ``a_png=b"..."`` is the file a.png, and each has a caption."""
        for name, content in files.items():
            stem, _, ending = name.rpartition("_")
            self.write(f"media/{stem}.{ending}", content)
            self.write(f"media/{stem}.txt", "a caption")
        source = f"{kind}_directory = '{self.folder / 'media'}'\ncache_directory = '{self.folder / 'cache'}'\n"
        (self.folder / "media").mkdir(exist_ok=True)
        return self.write("media.toml", f"[general]\nresolution = 32\n[[datasets]]\n{source}")

    def jsonl(self, content: bytes | str) -> Path:
        lines = self.write("items.jsonl", content)
        return self.write(
            "items.toml", f"[[datasets]]\nimage_jsonl_file = '{lines}'\ncache_directory = '{self.folder / 'cache'}'\n"
        )

    def latents(self, toml: Path, *flags: object):
        return self._call("cache_latents", "--dataset_config", toml, "--vae", self.model.vae, "--num_workers", 1, *flags)

    def texts(self, toml: Path):
        encoders = ["--text_encoder1", self.model.text_encoder1, "--text_encoder2", self.model.text_encoder2]
        return self._call("cache_text_encoder_outputs", "--dataset_config", toml, *encoders)

    def train(self, *flags: object):
        AcceleratorState._reset_state(reset_partial_state=True)
        base = ["--dataset_config", self.cached, "--dit", self.model.dit, "--output_dir", self.folder / "out", "--output_name", "x"]
        return self._call("hv_train_network", *base, "--max_data_loader_n_workers", 0, "--max_train_epochs", 1, *flags)

    def generate(self, *flags: object):
        encoders = ["--text_encoder1", self.model.text_encoder1, "--text_encoder2", self.model.text_encoder2]
        size = ["--video_size", 32, 32, "--video_length", 1, "--infer_steps", 1, "--prompt", "x"]
        base = ["--dit", self.model.dit, "--vae", self.model.vae, *encoders, "--save_path", self.folder / "out", *size]
        return self._call("hv_generate_video", *base, *flags)

    def decode(self, latent: Path):
        return self._call("hv_generate_video", "--latent_path", latent, "--vae", self.model.vae, "--save_path", self.folder / "out")

    def convert(self, lora: Path, output: Path | None = None):
        return self._call(
            "convert_lora", "--input", lora, "--output", output or self.folder / "out.safetensors", "--target", "other"
        )

    def spoil(self, name: str, change: Callable[[dict], None]) -> None:
        """Change the tensors of the cache called ``name`` in place."""
        path = self.folder / "pictures" / name
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def changed(self, source: Path, change: Callable[[dict], None], name: str = "changed.safetensors") -> Path:
        """A copy of a safetensors file with its tensors changed."""
        tensors = load_file(source)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name)
        return self.folder / name


@pytest.fixture
def bench(call_script, tiny_model, cached, tmp_path) -> Bench:
    return Bench(call_script, tiny_model, cached, tmp_path)


def refused(ended, *says: object) -> None:
    """The script ended with status 2 and a last line that holds all of ``says``."""
    assert ended.status == 2, ended.stderr
    answer = ended.stderr.splitlines()[-1]
    assert answer.startswith("error: ") and "Traceback" not in ended.stderr
    assert all(str(part) in answer for part in says), answer


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
    "cut in its length": (b"\x10\0\0", "cut short"),
    "cut in its header": (LORA.read_bytes()[:200], "cut short"),
    "cut in its data": (LORA.read_bytes()[:-1], "cut short"),
    "longer than its header says": (LORA.read_bytes() + b"\0", "not a readable"),
    "length of the header lies": (header({"x": tensor()}, length=7), "not a readable"),
    "huge length of the header": (header({"x": tensor()}, length=2**62), "not a readable"),
    "header not JSON": (header(b"{not json}"), "not a readable"),
    "header not UTF-8": (header(b'{"\xff": 1}'), "not a readable"),
    "header a list": (header([1, 2]), "not a readable"),
    "header of depth": (header(b"[" * 100_000), "not a readable"),
    "dtype unknown": (header({"x": tensor("Q7")}), "not a readable"),
    "shape and bytes differ": (header({"x": tensor(shape=[3])}), "not a readable"),
    "shape beyond all bytes": (header({"x": tensor(shape=[2**40, 2**40])}), "not a readable"),
    "negative shape": (header({"x": tensor(shape=[-2])}), "not a readable"),
    "tensors overlap": (header({"x": tensor(), "y": tensor()}), "not a readable"),
    "data beyond the end": (header({"x": tensor(offsets=[64, 72])}), "not a readable"),
    "metadata not text": (header({"__metadata__": {"a": 1}, "x": tensor()}), "not a readable"),
    "no tensors": (header({}, b""), "holds no tensors"),
    "torch file": (torch_file(), "Save it as safetensors"),
    "pickle of code": (pickle.dumps(Opens()), "Save it as safetensors"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
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
    "norm a matrix": (lambda t: t.update({NORM: torch.ones(4, 8)}), [NORM, "(4, 8)", "1 dimension"]),
    "norm empty": (lambda t: t.update({NORM: torch.ones(0)}), [NORM, "(0,)"]),
    "patch a matrix": (lambda t: t.update({PATCH: torch.ones(128, 64)}), [PATCH, "(128, 64)", "5 dimension"]),
    "text a vector": (lambda t: t.update({"txt_in.input_embedder.weight": torch.ones(64)}), ["txt_in.input_embedder.weight"]),
    "final a number": (lambda t: t.update({"final_layer.linear.weight": torch.tensor(1.0)}), ["final_layer.linear.weight", "()"]),
    "a layer missing": (lambda t: t.pop("single_blocks.3.linear2.weight"), ["single_blocks.3.linear2.weight", "missing"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_with_impossible_tensors(bench, name):
    change, says = MODELS[name]
    refused(bench.train("--dit", bench.changed(bench.model.dit, change)), "changed.safetensors", *says)


def test_a_vae_that_is_not_whole_is_told_before_hours_of_sampling(bench, monkeypatch):
    monkeypatch.setattr("hv_generate_video.sample", None)
    source = next(Path(bench.model.vae).glob("*.safetensors"))
    name = "decoder.conv_out.conv.bias"
    refused(bench.generate("--vae", bench.changed(source, lambda t: t.pop(name))), "--vae", name, "missing")
    flat = bench.changed(source, lambda t: t.update({"post_quant_conv.weight": torch.ones(4)}))
    refused(bench.generate("--vae", flat), "--vae", "post_quant_conv.weight", "(4,)")


CONFIGS = {
    "layers as text": ("text_encoder1", {"num_hidden_layers": "many"}),
    "no heads": ("text_encoder1", {"num_attention_heads": 0}),
    "rope a number": ("text_encoder1", {"rope_parameters": 5}),
    "negative width": ("text_encoder1", {"hidden_size": -64}),
    "no heads of CLIP": ("text_encoder2", {"num_attention_heads": 0}),
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


MODULE = "lora_unet_double_blocks_0_img_attn_qkv"
DOWN, UP, ALPHA = f"{MODULE}.lora_down.weight", f"{MODULE}.lora_up.weight", f"{MODULE}.alpha"
LORAS = {
    "ranks differ": (lambda t: t.update({DOWN: torch.ones(3, 128)}), [DOWN, "not the factors of one update"]),
    "down missing": (lambda t: t.pop(DOWN), ["a factor is missing", "double_blocks_0_img_attn_qkv"]),
    "up missing": (lambda t: t.pop(UP), ["a factor is missing"]),
    "alpha alone": (lambda t: (t.pop(UP), t.pop(DOWN)), ["a factor is missing"]),
    "foreign keys": (lambda t: t.update({"text_model.weight": torch.ones(1)}), ["keys are unknown", "text_model.weight"]),
    "LyCORIS": (lambda t: t.update({f"{MODULE}.hada_w1_a": torch.ones(1)}), ["not a plain LoRA", "hada_w1_a", "lycoris"]),
    "NaN": (lambda t: t[UP].view(-1)[0:1].fill_(torch.nan), ["NaN or infinity", UP, "earlier save"]),
    "infinity": (lambda t: t[DOWN].view(-1)[0:1].fill_(torch.inf), ["NaN or infinity", DOWN]),
    "alpha NaN": (lambda t: t.update({ALPHA: torch.tensor(torch.nan)}), ["alpha of double_blocks_0_img_attn_qkv", "finite"]),
    "whole numbers": (lambda t: t.update({UP: t[UP].to(torch.int8)}), ["int8", "floating point"]),
    "size of another model": (lambda t: t.update({DOWN: torch.ones(4, 99)}), ["do not match the model", "another size"]),
}


@pytest.fixture
def lora(bench) -> Path:
    """A LoRA of one module that fits the tiny model."""
    path = bench.folder / "good.safetensors"
    save_file({DOWN: torch.ones(4, 128), UP: torch.ones(384, 4), ALPHA: torch.tensor(4.0)}, path)
    return path


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_that_cannot_be_used(bench, lora, name):
    change, says = LORAS[name]
    path = bench.changed(lora, change)
    refused(bench.generate("--lora_weight", path), path.name, *says)
    refused(bench.train("--network_weights", path, "--dim_from_weights"), path.name, *says)


def text_cache(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "llm_float32": torch.ones(32, 64),
        "llm_mask": torch.ones(32, dtype=torch.int64),
        "clipL_float32": torch.ones(48),
    } | tensors


LATENTS, TEXT = "a_0032x0032_hv.safetensors", "a_hv_te.safetensors"
KEY = "latents_1x4x4_float32"
CACHES = {
    "latents of nothing": (LATENTS, lambda t: (t.clear(), t.update(x=torch.ones(1))), ["0 tensors called latents_"]),
    "latents flat": (LATENTS, lambda t: t.update({KEY: torch.ones(16, 4, 4)}), ["(16, 4, 4)", "cache_latents.py"]),
    "latents empty": (LATENTS, lambda t: t.update({KEY: torch.ones(16, 0, 4, 4)}), ["(16, 0, 4, 4)"]),
    "latents infinite": (LATENTS, lambda t: t[KEY].view(-1)[3:4].fill_(-torch.inf), ["NaN or infinity", "cache_latents.py"]),
    "latents whole numbers": (LATENTS, lambda t: t.update({KEY: t[KEY].long()}), ["int64", "cache_latents.py"]),
    "latents float8": (LATENTS, lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}), ["float8_e4m3fn"]),
    "text without mask": (TEXT, lambda t: t.pop("llm_mask"), ["no llm_mask", "cache_text_encoder_outputs.py"]),
    "text without states": (TEXT, lambda t: t.pop("llm_float32"), ["0 tensors called llm_"]),
    "text without pooled": (TEXT, lambda t: t.pop("clipL_float32"), ["0 tensors called clipL_"]),
    "text in a batch": (TEXT, lambda t: t.update(text_cache(llm_float32=torch.ones(1, 32, 64))), ["(1, 32, 64)", "(L, D)"]),
    "text a number": (TEXT, lambda t: t.update(text_cache(llm_float32=torch.tensor(1.0))), ["shapes ()", "(L, D)"]),
    "mask a number": (TEXT, lambda t: t.update(text_cache(llm_mask=torch.tensor(1))), ["no entries for 32 rows"]),
    "mask short": (TEXT, lambda t: t.update(text_cache(llm_mask=torch.ones(31))), ["31 entries for 32 rows"]),
    "text NaN": (TEXT, lambda t: t.update(text_cache(llm_float32=torch.full((32, 64), torch.nan))), ["NaN or infinity"]),
    "pooled NaN": (TEXT, lambda t: t.update(text_cache(clipL_float32=torch.full((48,), torch.nan))), ["NaN or infinity"]),
    "text whole numbers": (TEXT, lambda t: t.update(text_cache(llm_float32=torch.ones(32, 64).int())), ["int32"]),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_cannot_be_trained_on(bench, name):
    file, change, says = CACHES[name]
    bench.spoil(file, change)
    refused(bench.train(), file, *says)


@pytest.mark.parametrize("damage", ["cut", "folder", "lost link"])
@pytest.mark.parametrize("file", [LATENTS, TEXT])
def test_a_cache_that_is_no_file(bench, file, damage):
    path = bench.folder / "pictures" / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "folder":
        path.mkdir()
    elif sys.platform == "win32":
        pytest.skip("making links needs rights there")
    else:
        path.symlink_to(bench.folder / "moved away")
    refused(bench.train(), file, {"cut": "cut short", "folder": "is a folder", "lost link": "does not exist"}[damage])


def picture(format: str = "PNG", size: tuple[int, int] = (32, 32), **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return buffer.getvalue()


def clip(folder: Path) -> bytes:
    save_video(folder / "clip.mp4", np.zeros((5, 32, 32, 3), np.uint8), 24)
    return (folder / "clip.mp4").read_bytes()


def huge_png() -> bytes:
    """A PNG whose header says 60000 x 60000."""
    whole = picture()
    chunk = b"IHDR" + (60000).to_bytes(4, "big") * 2 + whole[24:29]
    return whole[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[33:]


MEDIA = {
    "picture empty": ("image", "a_png", lambda folder: b"", "a.png cannot be decoded"),
    "picture cut": ("image", "a_png", lambda folder: picture()[:500], "a.png cannot be decoded"),
    "JPEG cut": ("image", "a_jpg", lambda folder: picture("JPEG")[:300], "a.jpg cannot be decoded"),
    "picture too large": ("image", "a_png", lambda folder: huge_png(), "a.png is too large to open safely"),
    "text called a picture": ("image", "a_webp", lambda folder: b"hello", "a.webp cannot be decoded"),
    "web page called a picture": ("image", "a_jpg", lambda folder: b"<!DOCTYPE html>", "a.jpg cannot be decoded"),
    "drawing called a picture": ("image", "a_png", lambda folder: b"<svg xmlns='x'/>", "a.png cannot be decoded"),
    "clip called a picture": ("image", "a_png", clip, "a.png cannot be decoded"),
    "video empty": ("video", "a_mp4", lambda folder: b"", "a.mp4 cannot be decoded"),
    "video cut": ("video", "a_mp4", lambda folder: clip(folder)[:-200], "a.mp4 is cut short"),
    "video of one byte": ("video", "a_mkv", lambda folder: b"\x1a", "a.mkv cannot be decoded"),
    "sound called a video": ("video", "a_mp4", lambda folder: sound(), "a.mp4 holds no video stream"),
    "text called a video": ("video", "a_mov", lambda folder: b"hello" * 50, "a.mov cannot be decoded"),
}


@pytest.mark.parametrize("name", MEDIA)
def test_media_that_cannot_be_read(bench, name):
    kind, file, content, says = MEDIA[name]
    ended = bench.latents(bench.media(kind, **{file: content(bench.folder)}))
    assert "1 failure(s):" in ended.stderr and says in ended.stderr
    refused(ended, "nothing to train on", "1 of 1 file(s) could not be cached")
    assert not list((bench.folder / "cache").glob("*")) if (bench.folder / "cache").exists() else True


def test_the_first_picture_of_an_animation_is_taken(bench):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:])
    assert bench.latents(bench.media("image", a_webp=buffer.getvalue())).status == 0
    assert len(list((bench.folder / "cache").glob("a_0032x0032_hv.safetensors"))) == 1


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


LISTS = {
    "empty": ("", ["holds no lines"]),
    "UTF-16": ('{"image_path": "a.png"}'.encode("utf-16"), ["items.jsonl is not UTF-8"]),
    "a picture": (picture(), ["items.jsonl is not UTF-8"]),
    "one JSON list": ('[\n{"image_path": "a.png", "caption": "x"}\n]', ["items.jsonl:1", "one object a line"]),
    "two objects on a line": ('{"image_path": "a.png"}{"image_path": "b.png"}', ["items.jsonl:1", "not valid JSON"]),
    "Windows path": ('{"image_path": "C:\\train\\new.png", "caption": "x"}', ["items.jsonl:1", "control characters", "C:/folder"]),
    "path is a folder": ('{"image_path": "/", "caption": "x"}', ["items.jsonl:1", "path of a file"]),
    "path is another folder": ('{"image_path": ".", "caption": "x"}', ["items.jsonl:1", "path of a file"]),
    "path of blanks": ('{"image_path": "  ", "caption": "x"}', ["items.jsonl:1", "path of a file"]),
    "caption a number": ('{"image_path": "a.png", "caption": 5}', ["items.jsonl:1", "'caption' must be text"]),
    "no caption": ('{"image_path": "a.png"}', ["1 item(s) have no caption", "a.png"]),
    "huge number": ('{"image_path": ' + "9" * 5000 + "}", ["items.jsonl:1"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_pictures_that_cannot_be_read(bench, name):
    content, says = LISTS[name]
    refused(bench.texts(bench.jsonl(content)), *says)


def test_a_line_that_names_a_folder(bench):
    line = json.dumps({"image_path": str(bench.folder / "pictures"), "caption": "x"})
    refused(bench.texts(bench.jsonl(line)), "items.jsonl:1", "pictures is a folder")


CAPTIONS = {
    "UTF-16": ("a caption".encode("utf-16"), "a.txt is not UTF-8 text (byte 0)"),
    "Latin-1": (b"caf\xe9", "a.txt is not UTF-8 text (byte 3)"),
    "a picture": (picture(), "a.txt is not UTF-8"),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_that_is_no_text(bench, name):
    toml = bench.media("image", a_png=picture())
    bench.write("media/a.txt", CAPTIONS[name][0])
    for script in (bench.texts, bench.latents):
        refused(script(toml), CAPTIONS[name][1], "save it as UTF-8")


def test_a_caption_that_is_a_folder_is_none(bench):
    toml = bench.media("image", a_png=picture())
    (bench.folder / "media" / "a.txt").unlink()
    (bench.folder / "media" / "a.txt").mkdir()
    refused(bench.texts(toml), "1 item(s) have no caption", "a.png")


DATASETS = {
    "UTF-16": ("[general]".encode("utf-16"), ["not UTF-8"]),
    "character zero": ("[general]\nx = '\0'", ["not valid TOML", "line 2"]),
    "nested without end": ("x = " + "[" * 50_000, ["not valid TOML"]),
    "sections as numbers": ("general = 1\n[[datasets]]\nimage_directory = '.'", ["[general]", "single brackets"]),
    "a list of numbers": ("datasets = [1, 2]", ["[[datasets]]", "double brackets"]),
    "a date": ("[[datasets]]\nimage_directory = '.'\nbatch_size = 2025-01-01", ["batch_size", "whole number"]),
    "not a number": ("[[datasets]]\nimage_directory = '.'\nresolution = nan", ["resolution", "[width, height]"]),
    "several folders": ("[[datasets]]\nimage_directory = ['.', 'x']", ["image_directory", "path in quotes"]),
    "extension a number": ("[[datasets]]\nimage_directory = '.'\ncaption_extension = 1", ["caption_extension", '".txt"']),
    "training flags": ("[optimizer]\nlearning_rate = 1", ["unknown section 'optimizer'", "[[datasets]]"]),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_config_that_cannot_be_read(bench, name):
    content, says = DATASETS[name]
    path = bench.write("bad.toml", content)
    refused(bench.train("--dataset_config", path), "bad.toml", *says)
    refused(bench.latents(path), "bad.toml", *says)


@pytest.mark.skipif(sys.platform == "win32", reason="making links needs rights there")
def test_a_cache_directory_of_links_in_a_circle(bench):
    (bench.folder / "cache").symlink_to("cache")
    refused(bench.latents(bench.media("image", a_png=picture())), "cache_directory", "cannot be")


LATENT_FILES = {
    "another name": ({"latents": torch.ones(16, 1, 4, 4)}, "no tensor named latent"),
    "another shape": ({"latent": torch.ones(1, 16, 1, 4, 4)}, "(16, frames, height, width)"),
    "no frames": ({"latent": torch.ones(16, 0, 4, 4)}, "(16, 0, 4, 4)"),
    "NaN": ({"latent": torch.full((16, 1, 4, 4), torch.nan)}, "NaN or infinity"),
}


@pytest.mark.parametrize("name", LATENT_FILES)
def test_a_latent_that_cannot_be_decoded(bench, name):
    tensors, says = LATENT_FILES[name]
    refused(bench.decode(bench.write("l.safetensors", save(tensors))), "--latent_path", "l.safetensors", says)
    assert not (bench.folder / "out").exists()


LONG = "x" * 300
PLACES = {
    "convert: a folder": (lambda b: b.convert(LORA, b.folder), [".safetensors"]),
    "convert: a folder with the ending": (lambda b: b.convert(LORA, b.folder / "f.safetensors"), ["--output", "is a folder"]),
    "convert: a name too long": (lambda b: b.convert(LORA, b.folder / f"{LONG}.safetensors"), ["--output", "shorter"]),
    "convert: below a file": (lambda b: b.convert(LORA, b.folder / "file" / "x.safetensors"), ["--output", "cannot be written"]),
    "convert: nobody may write": (lambda b: b.convert(LORA, Path("/proc/x/y.safetensors")), ["--output", "cannot be written"]),
    "generate: a file": (lambda b: b.generate("--save_path", b.folder / "file"), ["--save_path", "is a file"]),
    "generate: below a file": (lambda b: b.generate("--save_path", b.folder / "file" / "x"), ["--save_path", "cannot be written"]),
    "generate: a name too long": (lambda b: b.generate("--save_path", b.folder / LONG), ["--save_path", "cannot be a folder"]),
    "merge: a folder": (lambda b: b.merge(b.folder / "f.safetensors"), ["merged model", "is a folder"]),
    "merge: a name too long": (lambda b: b.merge(b.folder / f"{LONG}.safetensors"), ["merged model", "shorter"]),
    "merge: below a file": (lambda b: b.merge(b.folder / "file" / "x.safetensors"), ["merged model", "cannot be written"]),
    "merge: over the transformer": (lambda b: b.merge(b.model.dit), ["would overwrite", "dit.safetensors"]),
    "merge: over the LoRA": (lambda b: b.merge(b.folder / "good.safetensors"), ["would overwrite", "good.safetensors"]),
    "train: a name too long": (lambda b: b.train("--output_dir", b.folder / LONG), ["--output_dir", "cannot be a folder"]),
    "train: a folder called like the LoRA": (
        lambda b: b.train("--output_dir", b.folder, "--output_name", "f"),
        ["folder called f.safetensors", "--output_name"],
    ),
    "timesteps: a file": (
        lambda b: b.train("--show_timesteps", "image", "--output_dir", b.folder / "file"),
        ["--output_dir", "is a file"],
    ),
    "sheets: a file in the way": (
        lambda b: b.latents(b.media("image", a_png=picture()), "--debug_mode", "image"),
        ["cannot write", "debug"],
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_where_nothing_can_be_written(bench, lora, monkeypatch, name):
    if "nobody" in name and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    act, says = PLACES[name]
    monkeypatch.setattr("networks.lora_merging.save_tensor_stream", None)
    monkeypatch.setattr("convert_lora.read_lora", None)
    monkeypatch.setattr("hv_train_network.train", None)
    monkeypatch.setattr("hv_generate_video.sample", None)
    bench.merge = lambda output: bench.generate("--lora_weight", lora, "--save_merged_model", output)
    bench.write("file", "in the way")
    (bench.folder / "f.safetensors").mkdir()
    bench.write("cache/debug", "in the way")
    before = {path: path.read_bytes() for path in (lora, Path(bench.model.dit))}
    refused(act(bench), *says)
    assert before == {path: path.read_bytes() for path in before}


def test_every_known_picture_ending_gives_a_sentence(bench):
    """No reader of any format lets an error of its own through."""
    toml = bench.media(
        "image", **{f"p{number}_{ending[1:]}": b"no picture" for number, ending in enumerate(sorted(IMAGE_EXTENSIONS))}
    )
    ended = bench.latents(toml)
    assert f"{len(IMAGE_EXTENSIONS)} failure(s):" in ended.stderr
    refused(ended, "nothing to train on")
