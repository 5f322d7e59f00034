"""Places where nothing can be written: told before hours of work, one sentence, status 2, and nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import picture, refused

LORA = Path(__file__).resolve().parents[1] / "goldens" / "lora.safetensors"

LONG = "x" * 300
PLACES = {
    "convert: a folder with the ending": (lambda b: b.convert(LORA, b.folder / "f.safetensors"), ["--output", "is a folder"]),
    "convert: a name too long": (lambda b: b.convert(LORA, b.folder / f"{LONG}.safetensors"), ["--output", "shorter"]),
    "convert: nobody may write": (lambda b: b.convert(LORA, Path("/proc/x/y.safetensors")), ["--output", "cannot be written"]),
    "generate: a file": (lambda b: b.generate("--save_path", b.folder / "file"), ["--save_path", "is a file"]),
    "generate: a name too long": (lambda b: b.generate("--save_path", b.folder / LONG), ["--save_path", "cannot be a folder"]),
    "merge: a name too long": (lambda b: b.merge(b.folder / f"{LONG}.safetensors"), ["merged model", "shorter"]),
    "merge: over the transformer": (lambda b: b.merge(b.model.dit), ["would overwrite", "dit.safetensors"]),
    "merge: over the LoRA": (lambda b: b.merge(b.folder / "good.safetensors"), ["would overwrite", "good.safetensors"]),
    "train: a name too long": (lambda b: b.train("--output_dir", b.folder / LONG), ["--output_dir", "cannot be a folder"]),
    "train: a folder called as the LoRA": (lambda b: b.train("--output_dir", b.folder / "taken"), ["x.safetensors", "is a folder"]),
    "train: a file called as the state": (
        lambda b: b.train("--output_dir", b.folder / "taken", "--output_name", "y"),
        ["y-state is a file", "move it away"],
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
def test_a_place_where_nothing_can_be_written(bench, monkeypatch, name):
    if "nobody" in name and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    act, says = PLACES[name]
    lora = bench.lora()
    monkeypatch.setattr("networks.merging.save_tensor_stream", None)
    monkeypatch.setattr("convert_lora.read_lora", None)
    monkeypatch.setattr("networks.training.loop.train", None)
    monkeypatch.setattr("hv_generate_video.Batch", None)
    bench.merge = lambda output: bench.generate("--lora_weight", lora, "--save_merged_model", output)
    bench.write("file", "in the way")
    (bench.folder / "f.safetensors").mkdir()
    (bench.folder / "taken/x.safetensors").mkdir(parents=True)
    bench.write("taken/y-state", "in the way")
    bench.write("cache/debug", "in the way")
    before = {path: path.read_bytes() for path in (lora, Path(bench.model.dit))}
    refused(act(bench), *says)
    assert before == {path: path.read_bytes() for path in before}
