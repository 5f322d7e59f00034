"""Room for what training and caching will write: how much that is, and what is said where it is too little."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import hv_train_network
from dataset.cache.sizes import HEADER_BYTES, missing_latents_bytes
from dataset.config import load_dataset_config
from dataset.items import list_items
from networks.training.saving import disk_space
from networks.training.saving.disk_space import check_room_to_save, free_bytes, readable, require_room
from networks.training.saving.files import SaveRules, epoch_name, final_name, remove_outdated, state_name, step_name
from utils.errors import UserError

MODEL, STATE = 100, 1000


@pytest.fixture
def free(monkeypatch):
    """``free(n)`` lets every disk have n bytes free."""

    def leave(size: int) -> None:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**12, 10**12 - size, size))

    return leave


def most_seen(folder: Path, rules: SaveRules, steps: int, steps_per_epoch: int, start: int) -> tuple[int, int]:
    """What ``most_at_once`` foretells, found by saving and removing as training does."""
    seen = []

    def save(name: str, with_state: bool) -> None:
        if with_state:
            (folder / state_name(name)).mkdir()
        (folder / name).touch()
        found = [path.is_dir() for path in folder.iterdir()]
        seen.append((found.count(False), found.count(True)))

    for step in range(start + 1, steps):
        if rules.due_after_step(step):
            save(step_name("x", step), rules.states)
            remove_outdated(folder, "x", rules, step=step)
        if step % steps_per_epoch == 0 and rules.due_after_epoch(epoch := step // steps_per_epoch):
            save(epoch_name("x", epoch), rules.states)
            remove_outdated(folder, "x", rules, epoch=epoch)
    save(final_name("x"), rules.state_at_end)
    return max(models for models, _ in seen), max(states for _, states in seen)


@pytest.mark.parametrize(
    "rules",
    [
        SaveRules(),
        SaveRules(state_at_end=True),
        SaveRules(every_n_steps=2),
        SaveRules(every_n_steps=2, keep_steps=3, keep_step_states=3),
        SaveRules(every_n_steps=2, keep_steps=1, keep_step_states=7, states=True, state_at_end=True),
        SaveRules(every_n_steps=3, states=True, state_at_end=True),
        SaveRules(every_n_steps=50),
        SaveRules(every_n_epochs=1, keep_epochs=2, keep_epoch_states=1, states=True, state_at_end=True),
        SaveRules(every_n_epochs=2),
        SaveRules(every_n_steps=1, keep_steps=2, every_n_epochs=1, keep_epochs=3, state_at_end=True),
    ],
    ids=str,
)
@pytest.mark.parametrize(("steps", "steps_per_epoch", "start"), [(20, 4, 0), (21, 4, 0), (20, 4, 9), (3, 4, 0), (20, 4, 19)])
def test_the_most_that_lies_on_the_disk_at_once(tmp_path, rules, steps, steps_per_epoch, start):
    assert rules.most_at_once(steps, steps_per_epoch, start) == most_seen(tmp_path, rules, steps, steps_per_epoch, start)


def test_a_state_after_the_last_step_leaves_the_last_save_to_do():
    assert SaveRules(every_n_steps=2).most_at_once(6, 4, start=6) == (1, 0)


EVERY_2 = {"every_n_steps": 2}
STATES = {"states": True, "state_at_end": True}


@pytest.mark.parametrize(
    ("rules", "size", "says"),
    [
        ({}, 99, "one model takes about 0.1 kB"),
        ({}, 100, None),
        ({"state_at_end": True}, 1099, "one model with its state takes about 1.1 kB"),
        ({"state_at_end": True}, 1100, None),
        (EVERY_2, 399, "room for 3 of 10 models (0.1 kB each)"),
        (EVERY_2, 1000, None),
        (EVERY_2 | {"keep_steps": 2, "keep_step_states": 2}, 300, None),
        (EVERY_2 | {"keep_steps": 2, "keep_step_states": 2}, 299, "room for 2 of 3 models"),
        (EVERY_2 | STATES, 1099, "one model with its state takes"),
        (EVERY_2 | STATES, 5500, "room for 5 of 10 models with their states (1.1 kB each)"),
        (EVERY_2 | STATES | {"keep_step_states": 2}, 1000 + 3 * STATE, None),
        (EVERY_2 | STATES | {"keep_step_states": 2}, 800 + 3 * STATE, "room for 8 of 10 models"),
        (EVERY_2 | {"state_at_end": True}, 1999, "room for 9 of 10 models (0.1 kB each)"),
        (EVERY_2 | {"state_at_end": True}, 2000, None),
    ],
)
def test_an_error_without_room_for_one_and_a_warning_without_room_for_all(tmp_path, caplog, free, rules, size, says):
    free(size)
    error = None
    try:
        sizes = {"model_bytes": MODEL, "state_bytes": STATE}
        check_room_to_save(tmp_path / "out", "x", SaveRules(**rules), **sizes, steps=20, steps_per_epoch=4)
    except UserError as raised:
        error = str(raised)
    if says is None:
        assert error is None and not caplog.messages
    elif says.startswith("one"):
        assert says in error and str(tmp_path / "out") in error and f"{readable(size)} free" in error
    else:
        assert error is None
        [line] = caplog.messages
        assert says in line and "--save_last_n_steps," in line and f"{readable(size)} free" in line


@pytest.mark.parametrize(
    ("start", "limit", "there", "enough"),
    [
        (0, None, range(2, 29, 2), 1),  # the old ones are replaced one after the other
        (20, None, range(2, 21, 2), 5),  # four more and the last; the old ones stay
        (20, 6, (18, 20), 3),  # the old ones are removed as new ones come
    ],
)
def test_what_will_be_replaced_or_removed_counts_as_room(tmp_path, caplog, free, start, limit, there, enough):
    for step in there:
        (tmp_path / step_name("x", step)).write_bytes(bytes(MODEL))
    (tmp_path / "other-step00000022.safetensors").write_bytes(bytes(10 * MODEL))
    rules = SaveRules(every_n_steps=2, keep_steps=limit)

    def check(size: int) -> None:
        free(size)
        sizes = {"model_bytes": MODEL, "state_bytes": STATE}
        check_room_to_save(tmp_path, "x", rules, **sizes, steps=30, steps_per_epoch=100, start=start)

    check(enough * MODEL)
    assert not caplog.messages
    if enough == 1:
        with pytest.raises(UserError):
            check(enough * MODEL - 1)
    else:
        check(enough * MODEL - 1)
        assert "room for" in caplog.text


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


@pytest.fixture
def foretold(monkeypatch):
    """The arguments of the training's check."""
    seen = {}

    def look(*_args, **sizes) -> None:
        seen.update(sizes)

    monkeypatch.setattr(hv_train_network, "check_room_to_save", look)
    return seen


@pytest.mark.parametrize(
    "flags", [(), ("--save_precision", "bf16"), ("--optimizer_type", "SGD"), ("--network_args", "loraplus_lr_ratio=4")], ids=str
)
def test_training_knows_how_large_its_files_will_be(train, tmp_path, foretold, flags):
    assert train("--max_train_steps", 1, "--save_state", "--network_dim", 64, *flags).status == 0
    model = (tmp_path / "out" / "lora.safetensors").stat().st_size
    state = sum(path.stat().st_size for path in (tmp_path / "out" / "lora-state").iterdir())
    assert foretold["model_bytes"] == pytest.approx(model, rel=0.05)
    assert foretold["state_bytes"] == pytest.approx(state, rel=0.05)
    assert (foretold["steps"], foretold["start"]) == (1, 0)


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


def test_a_module_that_needs_the_weights_is_not_judged(train, monkeypatch, free, caplog):
    def create(_multiplier, _dim, _alpha, _vae, _text, unet, **_options):
        return next(unet.parameters()).sum().item()

    free(0)
    caplog.set_level("INFO")
    monkeypatch.setattr(hv_train_network, "prepare", lambda *_a, **_k: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        train("--network_module", network_module(monkeypatch, create))
    assert "third_party shows its size only later" in caplog.text


def caches(folder: Path, pattern: str) -> list[int]:
    return [path.stat().st_size for path in folder.rglob(pattern)]


def test_caching_knows_how_large_the_caches_will_be(call_script, tiny_model, tiny_dataset, monkeypatch):
    group = load_dataset_config(tiny_dataset)

    def missing() -> int:
        return sum(missing_latents_bytes(dataset, list_items(dataset), torch.float32, 2) for dataset in group.datasets)

    before, told = missing(), []
    monkeypatch.setattr("cache_text_encoder_outputs.require_room", lambda wanted, *_: told.append(sum(wanted.values())))
    common = ("--dataset_config", tiny_dataset, "--device", "cpu")
    encoders = ("--text_encoder1", tiny_model.text_encoder1, "--text_encoder2", tiny_model.text_encoder2)
    assert call_script("cache_latents", *common, "--vae", tiny_model.vae).status == 0
    assert call_script("cache_text_encoder_outputs", *common, *encoders).status == 0
    assert call_script("cache_text_encoder_outputs", *common, *encoders).status == 0
    latents, texts = caches(tiny_dataset.parent, "*_hv.safetensors"), caches(tiny_dataset.parent, "*_hv_te.safetensors")
    assert (len(latents), len(texts)) == (10, 8)
    assert 0.85 * sum(latents) < before <= sum(latents) and missing() == 0
    assert 0.9 * sum(texts) < told[0] <= sum(texts) and told[1] == 0


@pytest.mark.parametrize(
    ("settings", "clips"),
    [
        ('frame_extraction = "head"\ntarget_fps = 0', [9, 1]),
        ('frame_extraction = "slide"\nframe_stride = 4\ntarget_fps = 0', [9] * 5 + [1] * 7),
        ('frame_extraction = "full"\ntarget_fps = 12\nsource_fps = 24', [9]),
        ('frame_extraction = "full"\nmax_frames = 5', [5]),
    ],
)
def test_clips_count_by_their_windows(tiny_dataset, settings, clips):
    text = tiny_dataset.read_text("utf-8").replace('frame_extraction = "head"', settings)
    tiny_dataset.write_text(text, encoding="utf-8")
    dataset = load_dataset_config(tiny_dataset).datasets[1]  # of 25 frames
    item = next(item for item in list_items(dataset) if item.stem == "red_circle_moving")
    assert missing_latents_bytes(dataset, [item], torch.float16, 1) == expected_bytes(clips)


def expected_bytes(clips: list[int]) -> int:
    """Of clips of 80x48 pixels in half precision."""
    return sum(16 * ((frames - 1) // 4 + 1) * 6 * 10 * 2 + HEADER_BYTES for frames in clips)


def test_a_broken_file_counts_for_nothing(tiny_dataset):
    dataset = load_dataset_config(tiny_dataset).datasets[0]
    items = list_items(dataset)
    whole = missing_latents_bytes(dataset, items, torch.float16, 2)
    items[0].path.write_bytes(b"cut")
    assert 0 < missing_latents_bytes(dataset, items, torch.float16, 2) < whole


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
    assert ended.status == 2 and "1.0 kB free" in ended.stderr and "still to be cached take about" in ended.stderr
    assert "image_cache" in ended.stderr and not list(tiny_dataset.parent.rglob("*.safetensors"))
