"""Checkpoint reading: formats, folders, damaged files, and streaming into a module."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hunyuan_model.checkpoints.loading import load_weights
from hunyuan_model.checkpoints.reading import open_checkpoint
from utils.errors import UserError

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"0.weight": torch.randn(8, 4, generator=generator), "0.bias": torch.randn(8, generator=generator)}


def meta_module() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8))


def assert_holds(path: Path, expected: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(path, "model")
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert checkpoint.dtypes == {name: tensor.dtype for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.get(name).float(), tensor.float())


def test_official_pt_and_safetensors_hold_the_same():
    pickled = open_checkpoint(GOLDENS / "dit.pt", "transformer")
    flat = open_checkpoint(GOLDENS / "dit.safetensors", "transformer")
    assert pickled.shapes == flat.shapes
    assert len(flat.shapes) == 128
    assert set(pickled.dtypes.values()) == {torch.bfloat16}
    assert all(torch.equal(pickled.get(name).float(), flat.get(name)) for name in flat.shapes)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {"step": torch.tensor(5), "module": sd},
        lambda sd: {"state_dict": {"model": sd}},
        lambda sd: {"ema": sd},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_checkpoints(tmp_path, wrap, zipped):
    torch.save(wrap(tensors()), tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_holds(tmp_path / "model.pt", tensors())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_dtypes(tmp_path, dtype, suffix):
    content = {"a": torch.arange(-4, 4).to(dtype)}
    path = tmp_path / f"model{suffix}"
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    assert_holds(path, content)


def test_format_is_recognised_by_content_not_suffix(tmp_path):
    save_file(tensors(), tmp_path / "model.ckpt", {"origin": "here"})
    torch.save(tensors(), tmp_path / "weights.safetensors")
    assert_holds(tmp_path / "model.ckpt", tensors())
    assert_holds(tmp_path / "weights.safetensors", tensors())
    assert open_checkpoint(tmp_path / "model.ckpt", "model").metadata == {"origin": "here"}


def save_shards(folder: Path) -> None:
    for index, (name, tensor) in enumerate(tensors().items(), 1):
        save_file({name: tensor}, folder / f"model-{index:05d}-of-00002.safetensors")


def test_folder_with_index(tmp_path):
    save_shards(tmp_path)
    weight_map = {name: f"model-{index:05d}-of-00002.safetensors" for index, name in enumerate(tensors(), 1)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_holds(tmp_path, tensors())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002"):
        open_checkpoint(tmp_path, "model")


def test_folder_with_shards_but_no_index(tmp_path):
    save_shards(tmp_path)
    assert_holds(tmp_path, tensors())


def test_shards_that_hold_the_same_tensor_are_refused(tmp_path):
    save_shards(tmp_path)
    save_file(tensors(), tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="in two of its files"):
        open_checkpoint(tmp_path, "model")


def test_folder_with_one_file_of_any_name(tmp_path):
    torch.save(tensors(), tmp_path / "my vae.pt")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert_holds(tmp_path, tensors())


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', "{}", "[" * 100_000], ids=range(5))
def test_broken_index(tmp_path, content):
    (tmp_path / "pytorch_model.bin.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="index"):
        open_checkpoint(tmp_path, "model")


def test_folders_that_do_not_say_which_file(tmp_path):
    with pytest.raises(UserError, match="folder without weights"):
        open_checkpoint(tmp_path, "model")
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors(), tmp_path / name)
    with pytest.raises(UserError, match=r"several weight files \(a.safetensors, b.safetensors\)"):
        open_checkpoint(tmp_path, "model")


class TouchesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_code_is_refused_and_not_run(tmp_path, zipped):
    victim = tmp_path / "victim"
    torch.save({"a": TouchesAFile(victim)}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    victim.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"evil\.pt holds more than tensors"):
        open_checkpoint(tmp_path / "evil.pt", "model")
    assert not victim.exists()


BROKEN = {
    "empty": (b"", "is empty"),
    "text": (b"this is a text file that somebody renamed to something else", "neither"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 25642\n", "git lfs pull"),
    "page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(64), "it holds no tensors"),
    "pickled list": (pickle.dumps([1, 2, 3], protocol=2), "cut short or damaged"),
    "header": ((60).to_bytes(8, "little") + b"{not json" + bytes(60), "cut short or damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_something_else(tmp_path, case):
    content, message = BROKEN[case]
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(path, "the VAE (--vae)")
    assert str(path) in str(caught.value)
    assert "--vae" in str(caught.value)


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
@pytest.mark.parametrize("share", [0.0001, 0.5, 0.99])
def test_truncated_files(tmp_path, name, share):
    content = (GOLDENS / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="cut short or damaged"):
        open_checkpoint(tmp_path / name, "model")


def test_missing_file_and_no_state_dict(tmp_path):
    with pytest.raises(UserError, match=r"model not found: .*nothing\.pt does not exist"):
        open_checkpoint(tmp_path / "nothing.pt", "model")
    torch.save({"epoch": 3}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="no state dict"):
        open_checkpoint(tmp_path / "state.pt", "model")


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_values(tmp_path, value):
    torch.save({"a": torch.ones(2), "b": value}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt holds no plain values for b"):
        open_checkpoint(tmp_path / "state.pt", "model")


def test_safetensors_dtype_that_torch_lacks(tmp_path):
    header = json.dumps({"a": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="stores a as U16"):
        open_checkpoint(tmp_path / "model.safetensors", "model")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    torch.save(tensors(), tmp_path / "model.pt")
    (tmp_path / "model.pt").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        open_checkpoint(tmp_path / "model.pt", "model")


def test_renamed_views(tmp_path):
    save_file({"model.a": torch.ones(2), "model.b": torch.zeros(3), "other.a": torch.ones(1)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors", "model")
    view = checkpoint.under_prefix("model.")
    assert view.shapes == {"a": (2,), "b": (3,)}
    assert torch.equal(view.get("a"), torch.ones(2))
    assert checkpoint.under_prefix("").shapes == checkpoint.shapes
    assert view.rename(lambda name: None if name == "b" else f"x.{name}").shapes == {"x.a": (2,)}
    with pytest.raises(UserError, match="holds a twice"):
        checkpoint.rename(lambda name: name.rpartition(".")[2])


def test_prefix_of(tmp_path):
    save_file({"x.model.a": torch.ones(1), "model.a": torch.ones(2), "extra_b": torch.ones(3)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors", "model")
    assert checkpoint.prefix_of("a") == "model."
    assert checkpoint.prefix_of("model.a") == ""
    assert checkpoint.prefix_of("b") is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", "_legacy.pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_load_weights(tmp_path, suffix, dtype):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(tensors(), path)
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=suffix == ".pt")
    checkpoint = open_checkpoint(path, "model")
    module = meta_module()
    dtypes = {"0.weight": dtype, "0.bias": torch.float32}
    load_weights(module, checkpoint, device="cpu", dtype_of=dtypes.__getitem__)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == dtypes[name]
        assert parameter.device.type == "cpu"
        assert not parameter.requires_grad
        assert torch.equal(parameter.float(), tensors()[name].to(dtypes[name]).float())
        parameter.data.zero_()  # must not write into the file, nor into what the checkpoint hands out
    assert_holds(path, tensors())
    assert torch.equal(checkpoint.get("0.bias"), tensors()["0.bias"])


def test_views_in_pickles_become_contiguous(tmp_path):
    base = torch.arange(64.0).reshape(8, 8)
    torch.save({"0.weight": base.t()[:, :4], "0.bias": base[:, 3]}, tmp_path / "m.pt")
    module = meta_module()
    load_weights(module, open_checkpoint(tmp_path / "m.pt", "m"), device="cpu", dtype_of=lambda name: torch.float32)
    assert module[0].weight.is_contiguous()
    assert module[0].weight.untyped_storage().nbytes() == 8 * 4 * 4
    assert torch.equal(module[0].weight, base.t()[:, :4])


def test_patch_sees_float32_weights_and_its_answer_is_cast(tmp_path):
    stored = {"0.weight": torch.full((8, 4), 2.0).to(torch.float8_e4m3fn), "0.bias": torch.ones(8, dtype=torch.bfloat16)}
    save_file(stored, tmp_path / "m.safetensors")
    seen = {}

    def patch(name, tensor):
        seen[name] = tensor.dtype
        return tensor + 0.03125 if name == "0.weight" else tensor

    module = meta_module()
    checkpoint = open_checkpoint(tmp_path / "m.safetensors", "m")
    load_weights(module, checkpoint, device="cpu", dtype_of=lambda name: torch.bfloat16, patch=patch)
    assert seen == {"0.weight": torch.float32, "0.bias": torch.bfloat16}
    assert module[0].weight.dtype == torch.bfloat16
    assert torch.equal(module[0].weight.float(), torch.full((8, 4), 2.03125))  # 2.0 again, had it been added in float8
    module[0].bias.data.zero_()
    assert torch.equal(checkpoint.get("0.bias"), stored["0.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop("0.bias"), r"1 tensors are missing, such as 0\.bias"),
        (lambda sd: sd.update(extra=torch.ones(1)), "1 are unknown, such as extra"),
        (lambda sd: sd.update({"0.bias": torch.ones(7)}), r"0\.bias \(7,\) instead of \(8,\)"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, change, message):
    content = tensors()
    change(content)
    save_file(content, tmp_path / "m.safetensors")
    module = meta_module()
    with pytest.raises(UserError, match=message) as caught:
        load_weights(module, open_checkpoint(tmp_path / "m.safetensors", "m"), device="cpu", dtype_of=lambda name: torch.float32)
    assert "m.safetensors" in str(caught.value)
    assert module[0].weight.is_meta


class WithBuffers(nn.Module):
    def __init__(self, table_device: str) -> None:
        super().__init__()
        self.register_buffer("ids", torch.empty(3, dtype=torch.int64, device="meta"))
        self.register_buffer("table", torch.ones(2, device=table_device), persistent=False)


def test_buffers(tmp_path):
    save_file({"ids": torch.tensor([5, 6, 7])}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors", "m")
    module = WithBuffers("cpu")
    load_weights(module, checkpoint, device="cpu", dtype_of=lambda name: torch.float16)
    assert torch.equal(module.ids, torch.tensor([5, 6, 7]))
    assert torch.equal(module.table, torch.ones(2))
    assert list(module.state_dict()) == ["ids"]
    with pytest.raises(RuntimeError, match="buffer table"):
        load_weights(WithBuffers("meta"), checkpoint, device="cpu", dtype_of=lambda name: torch.float16)
