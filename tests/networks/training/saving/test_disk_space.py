"""Room for what training and caching will write: how much that is, and what is said where it is too little."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import torch

from networks.training.saving import files
from utils import disk_space
from utils.disk_space import require_room
from utils.errors import UserError


@pytest.fixture
def free(monkeypatch):
    """``free(n)`` lets every disk have n bytes free."""

    def leave(size: int) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**12, 10**12 - size, size))

    return leave


def test_a_disk_without_room_is_named(tmp_path, free):
    free(1000)
    require_room(tmp_path / "a", 1000, "they take", "stop")
    with pytest.raises(UserError, match=r"a has 1\.0 kB free, but they take about 1\.1 kB\. Free some space, or stop\."):
        require_room(tmp_path / "a", 1100, "they take", "stop")


def test_a_disk_that_does_not_say_is_not_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(0, 0, 0))
    require_room(tmp_path, 10**18, "it takes", "stop")


# ---------------------------------------------------------------------------------------------------------------------
# In the scripts


def test_training_knows_how_large_its_files_will_be(train, tmp_path, monkeypatch):
    expected = []
    monkeypatch.setattr(files, "require_room", lambda folder, size, *_: expected.append(size))
    flags = ("--max_train_steps", 1, "--network_dim", 256, "--save_precision", "bf16")
    assert train(*flags).status == 0 and train(*flags, "--save_state").status == 0
    models = sum(path.stat().st_size for path in (tmp_path / "out").glob("lora*.safetensors"))
    state = sum(path.stat().st_size for path in (tmp_path / "out" / "lora-state").iterdir())
    assert expected == pytest.approx([models, models + state], rel=0.05)


def test_copies_in_layouts_with_more_numbers_are_counted(train, tmp_path, monkeypatch):
    """diffusers has the down factor of q, k and v three times."""
    expected = []
    monkeypatch.setattr(files, "require_room", lambda folder, size, *_: expected.append(size))
    assert train("--max_train_steps", 1, "--network_dim", 64, "--save_format", "default", "diffusers").status == 0
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / "out").glob("lora*.safetensors")}
    assert sizes["lora_diffusers"] > 1.1 * sizes["lora"] and expected == pytest.approx([sum(sizes.values())], rel=0.05)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (("--no_comfyui",), "one model takes"),
        ((), "one model in 2 layouts takes"),
        (("--save_state",), "one model in 2 layouts with its state takes"),
    ],
)
def test_a_disk_without_room_is_refused_before_anything_loads(train, monkeypatch, tmp_path, free, state, what):
    free(5000)
    monkeypatch.setattr("hunyuan_model.load_transformer", lambda *_a, **_k: pytest.fail("the model was loaded"))
    ended = train(*state, "--network_dim", 16)
    assert ended.status == 2 and f"{tmp_path / 'out'} has 5.0 kB free, but {what}" in ended.stderr


def network_module(monkeypatch, create) -> str:
    module = types.ModuleType("third_party")
    module.create_network = create
    monkeypatch.setitem(sys.modules, "third_party", module)
    return "third_party"


def test_the_size_of_another_module_is_known_without_the_transformer(train, monkeypatch, free):
    def create(_multiplier, dim, _alpha, _vae, _text, unet, **_options):
        assert next(unet.parameters()).is_meta
        return torch.nn.Linear(dim, 1_000_000_000)

    free(10**9)
    ended = train("--network_module", network_module(monkeypatch, create), "--network_dim", 7)
    assert ended.status == 2 and "one model takes about 32.0 GB" in ended.stderr


@pytest.mark.parametrize("script", ["cache_latents", "cache_text_encoder_outputs"])
def test_caching_is_refused_before_anything_loads(call_script, tiny_model, tiny_dataset, monkeypatch, free, script):
    flags = {
        "cache_latents": ("--vae", tiny_model.vae),
        "cache_text_encoder_outputs": ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2),
    }[script]
    free(1000)
    for load in ("load_vae", "load_text_encoder_2"):
        monkeypatch.setattr(f"hunyuan_model.{load}", lambda *_a, **_k: pytest.fail("the model was loaded"), raising=False)
    ended = call_script(script, "--dataset_config", tiny_dataset, "--device", "cpu", *flags)
    assert ended.status == 2 and "1.0 kB free" in ended.stderr and "a cache file takes about" in ended.stderr
    assert "image_cache" in ended.stderr and not list(tiny_dataset.parent.rglob("*.safetensors"))
