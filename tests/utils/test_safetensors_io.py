"""utils.safetensors_io: headers, atomic saving, streamed saving."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.errors import UserError
from utils.safetensors_io import read_header, read_tensors, save_tensor_stream, save_tensors


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c.weight": torch.randn(2, 2, generator=generator).to(torch.float8_e4m3fn),
        "d.steps": torch.tensor(7),
        "e.empty": torch.zeros(0, 4),
    }


def test_streamed_file_is_read_back_by_the_library(tmp_path, tensors):
    path = tmp_path / "streamed.safetensors"
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_tensor_stream(path, layout, tensors.items(), {"made by": "ünïcode"})
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].float(), tensor.float())
    assert read_header(path).metadata == {"made by": "ünïcode"} and read_header(path).shapes["a.weight"] == (3, 5)


def test_stream_that_breaks_off_leaves_the_earlier_file(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(2)}, path)

    def broken():
        yield "a.weight", tensors["a.weight"]
        raise RuntimeError("the source went away")

    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with pytest.raises(RuntimeError, match="went away"):
        save_tensor_stream(path, layout, broken())
    assert list(load_file(path)) == ["x"]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_stream_refuses_a_tensor_that_differs_from_the_layout(tmp_path):
    with pytest.raises(ValueError, match="the layout expects"):
        save_tensor_stream(tmp_path / "m.safetensors", {"x": (torch.float32, (2,))}, [("x", torch.ones(3))])


def test_file_cut_short_is_refused(tmp_path, tensors):
    path = tmp_path / "whole.safetensors"
    save_tensors(path, tensors)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut short"):
        read_tensors(cut)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_header(tmp_path / "none.safetensors", "the LoRA")
    with pytest.raises(UserError, match="is a folder"):
        read_header(tmp_path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        save_tensors(tmp_path / "file" / "sub" / "x.safetensors", {"x": torch.ones(1)})
