"""Room for what training and caching will write: how much that is, and what is said where it is too little."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import torch

from networks.training import preflight
from networks.training.saving.disk_space import require_room_for_save
from utils import disk_space
from utils.disk_space import free_bytes, readable, require_room
from utils.errors import UserError


@pytest.fixture
def free(monkeypatch):
    """``free(n)`` lets every disk have n bytes free."""

    def leave(size: int) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**12, 10**12 - size, size))

    return leave


@pytest.mark.parametrize(
    ("size", "state", "says"),
    [
        (99, 0, "one model takes about 0.1 kB"),
        (100, 0, None),
        (1099, 1000, "one model with its state takes about 1.1 kB"),
        (1100, 1000, None),
    ],
)
def test_room_for_one_save_is_needed(tmp_path, free, size, state, says):
    free(size)
    if says is None:
        require_room_for_save(tmp_path / "out", 100, state)
        return
    with pytest.raises(UserError) as error:
        require_room_for_save(tmp_path / "out", 100, state)
    assert says in str(error.value) and f"{tmp_path / 'out'} has {readable(size)} free" in str(error.value)


def test_folders_of_one_disk_share_its_room(tmp_path, free):
    free(1000)
    require_room({tmp_path / "a": 500, tmp_path / "b": 500}, "they take", "stop")
    with pytest.raises(UserError, match=r"a, .*b has 1\.0 kB free, but they take about 1\.1 kB\. Free some space, or stop\."):
        require_room({tmp_path / "a": 600, tmp_path / "b": 500}, "they take", "stop")


def test_a_disk_that_does_not_say_is_not_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(0, 0, 0))
    require_room({tmp_path: 10**18}, "it takes", "stop")
    monkeypatch.undo()
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)


def test_sizes_that_people_read():
    assert [readable(size) for size in (0, 1234, 9_876_543, 12_345_678_901)] == ["0.0 kB", "1.2 kB", "9.9 MB", "12.3 GB"]


# ---------------------------------------------------------------------------------------------------------------------
# In the scripts


def test_training_knows_how_large_its_files_will_be(train, tmp_path, monkeypatch):
    expected = []
    monkeypatch.setattr(preflight, "require_room_for_save", lambda _folder, *sizes: expected.extend(sizes))
    assert train("--max_train_steps", 1, "--save_state", "--network_dim", 64, "--save_precision", "bf16").status == 0
    model = (tmp_path / "out" / "lora.safetensors").stat().st_size
    state = sum(path.stat().st_size for path in (tmp_path / "out" / "lora-state").iterdir())
    assert expected == pytest.approx([model, state], rel=0.1)


@pytest.mark.parametrize(("state", "what"), [((), "one model takes"), (("--save_state",), "one model with its state takes")])
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
