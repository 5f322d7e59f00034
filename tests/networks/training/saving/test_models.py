"""The layouts in which training saves models, and copies beside them."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks.formats.layouts import TARGETS
from networks.formats.reading import LoraFile, read_lora
from networks.training.report.reading import REPORT_FILE
from networks.training.saving import models
from networks.training.saving.files import output_names
from utils.errors import UserError
from utils.safetensors_io import read_header


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(REPORT_FILE))


def rows_of_updates(lora: LoraFile) -> dict[str, torch.Tensor]:
    """The update of each whole weight, from those of its parts too."""
    updates: dict[str, dict[int, torch.Tensor]] = {}
    for placed in lora.updates:
        delta = placed.update.delta(torch.zeros(placed.update.shape))
        updates.setdefault(placed.parameter, {})[placed.part] = delta
    return {name: torch.cat([parts[part] for part in sorted(parts)]) for name, parts in updates.items()}


def assert_same_updates(first: Path, second: Path, within: float = 1e-6) -> None:
    ours, others = (rows_of_updates(read_lora(path)) for path in (first, second))
    assert ours.keys() == others.keys() and ours
    for name in ours:
        assert (ours[name] - others[name]).norm() <= within * ours[name].norm(), name


def test_every_save_is_written_in_each_layout_with_the_same_updates(train, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    flags = ("--save_every_n_steps", 2, "--save_every_n_epochs", 1, "--learning_rate", 1e-2)
    assert train("--max_train_steps", 5, *flags, "--save_format", *TARGETS).status == 0
    out, stems = tmp_path / "out", ["lora-step00000002", "lora-step00000004", "lora-000001", "lora"]
    copies = {stem: [f"{stem}_{layout}.safetensors" for layout in TARGETS[1:]] for stem in stems}
    expected = [f"{stem}.safetensors" for stem in stems] + [name for names in copies.values() for name in names]
    assert saved(out) == sorted([*expected, "lora_comfyui.safetensors"])
    for stem, names in copies.items():
        model = out / f"{stem}.safetensors"
        for name in names:
            assert_same_updates(model, out / name)
            assert read_lora(out / name).layout == name.removesuffix(".safetensors").rpartition("_")[2]
            ours, others = read_header(model).metadata, read_header(out / name).metadata
            assert ours.keys() == others.keys() and {key for key in ours if ours[key] != others[key]} <= {"sshs_model_hash"}
            content = (out / name).read_bytes()  # the hash is that of the bytes after the header
            data = content[8 + int.from_bytes(content[:8], "little") :]
            assert others["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert load_file(out / "lora_comfyui.safetensors").keys() == load_file(out / "lora_other.safetensors").keys()
    for name in saved(out):
        assert f"saved {out / name}, for " in caplog.text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--no_comfyui",), ["lora.safetensors"]),
        (("--save_format", "other"), ["lora.safetensors"]),  # it is what the copy would be
        (("--save_format", "other", "default"), ["lora.safetensors", "lora_default.safetensors"]),
        (("--save_format", "diffusers"), ["lora.safetensors", "lora_comfyui.safetensors"]),
    ],
)
def test_the_first_layout_is_that_of_the_model(train, tmp_path: Path, flags: tuple, expected: list[str]) -> None:
    base = ("--max_train_steps", 1, "--learning_rate", 1e-2, "--network_alpha", 2)
    assert train(*base, *flags).status == 0 and train(*base, "--no_comfyui", name="plain").status == 0
    out = tmp_path / "out"
    assert [name for name in saved(out) if not name.startswith("plain")] == expected
    layout = flags[1] if len(flags) > 1 else "default"
    assert read_lora(out / "lora.safetensors").layout == layout
    assert_same_updates(out / "plain.safetensors", out / "lora.safetensors")
    if "default" in flags:  # not from the model, whose alpha is in its factors
        again, plain = (load_file(out / f"{name}.safetensors") for name in ("lora_default", "plain"))
        assert again.keys() == plain.keys() and all(torch.equal(again[name], plain[name]) for name in plain)


def test_copies_have_the_precision_of_the_model(train, tmp_path: Path) -> None:
    assert train("--max_train_steps", 1, "--save_precision", "bf16", "--learning_rate", 1e-2).status == 0
    copy = load_file(tmp_path / "out" / "lora_comfyui.safetensors")
    assert {value.dtype for value in copy.values()} == {torch.bfloat16}
    assert_same_updates(tmp_path / "out" / "lora.safetensors", tmp_path / "out" / "lora_comfyui.safetensors", within=2**-8)


def test_copies_of_old_models_go_with_them(train, tmp_path: Path) -> None:
    flags = ("--save_every_n_steps", 1, "--save_last_n_steps", 1, "--save_format", "default", "other", "--no_comfyui")
    assert train("--max_train_steps", 5, *flags).status == 0
    names = [f"lora{step}{copy}.safetensors" for step in ("-step00000003", "-step00000004", "") for copy in ("", "_other")]
    assert saved(tmp_path / "out") == sorted(names)


@pytest.mark.parametrize(
    "name", ["lora_other.safetensors", "lora-000002_comfy.safetensors", "lora-step00000001_comfyui.safetensors"]
)
def test_names_of_copies_belong_to_the_run(name: str) -> None:
    assert output_names("lora").fullmatch(name) and not output_names("lor").fullmatch(name)
    assert not output_names("lora").fullmatch(name.replace("_", "_x"))


def test_a_copy_that_fails_leaves_the_model_whole_and_the_training_running(train, tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(path, lora, target):
        raise UserError(f"cannot write {path}: No space left on device.")

    monkeypatch.setattr(models, "save_lora", fail)
    flags = ("--save_every_n_steps", 1, "--save_format", "default", "other", "--learning_rate", 1e-2)
    assert train("--max_train_steps", 2, *flags).status == 0
    assert saved(tmp_path / "out") == ["lora-step00000001.safetensors", "lora.safetensors"]
    assert read_lora(tmp_path / "out" / "lora.safetensors").updates
    assert caplog.text.count("is not saved in the layout other: cannot write") == 3


def test_a_kill_during_the_copy_leaves_the_model_and_the_next_run_makes_the_copy(train, tmp_path: Path, monkeypatch) -> None:
    class Killed(BaseException):
        """Nothing of the program runs after a kill; nothing of it catches this."""

    def kill(path, lora, target):
        raise Killed

    flags = ("--max_train_steps", 2, "--save_format", "default", "comfy", "--resume", "latest", "--learning_rate", 1e-2)
    with monkeypatch.context() as patch:
        patch.setattr(models, "save_lora", kill)
        with pytest.raises(Killed):
            train(*flags)
    model = tmp_path / "out" / "lora.safetensors"
    assert saved(model.parent) == [model.name] and read_lora(model).updates
    before = model.read_bytes()
    assert train(*flags).status == 0
    assert saved(model.parent) == ["lora.safetensors", "lora_comfy.safetensors", "lora_comfyui.safetensors"]
    assert model.read_bytes() == before
    assert_same_updates(model, model.with_name("lora_comfyui.safetensors"))


def test_a_resumed_training_ends_with_the_same_copy(train, tmp_path: Path) -> None:
    flags = ("--save_every_n_steps", 1, "--save_state", "--learning_rate", 1e-2)
    assert train("--max_train_steps", 3, *flags).status == 0
    state = tmp_path / "out" / "lora-step00000001-state"
    assert train("--max_train_steps", 3, *flags, "--resume", state, "--save_format", "default", "other", name="again").status == 0
    first, second = (load_file(tmp_path / "out" / f"{name}_comfyui.safetensors") for name in ("lora", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------------------
# Other networks


@pytest.mark.parametrize(
    ("network_args", "layout"),
    [
        (("algo=lora",), "other"),
        (("algo=loha",), "comfy"),
        (("algo=lokr", "factor=4"), "comfy"),
        (("algo=lora", "dora_wd=True"), "comfy"),
    ],
)
def test_the_copy_of_a_lycoris_network_is_one_that_comfyui_reads(train, tmp_path: Path, network_args: tuple, layout: str) -> None:
    pytest.importorskip("lycoris.kohya")
    flags = ("--network_module", "lycoris.kohya", "--network_dim", 4, "--network_args", *network_args, "--learning_rate", 1e-2)
    ended = train("--max_train_steps", 2, *flags)
    assert ended.status == 0, ended.stderr
    model, copy = (read_lora(tmp_path / "out" / f"lora{end}.safetensors") for end in ("", "_comfyui"))
    assert copy.layout == layout and copy.kinds == model.kinds
    for first, second in zip(*(sorted(lora.updates, key=lambda placed: placed.parameter) for lora in (model, copy))):
        weight = torch.randn(first.update.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(first.update.delta(weight), second.update.delta(weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--network_module", "lycoris.kohya", "--network_args", "algo=loha", "--save_format", "other"), "cannot hold LoHa"),
        (("--network_module", "lycoris.kohya", "--network_args", "dora_wd=True", "--save_format", "default", "diffusers"), "DoRA"),
        (("--save_format", "default", "kohya"), "invalid choice"),
        (("--save_format", "comfy", "default", "comfy"), "names a layout twice"),
        (("--output_name", "x" * 212, "--save_format", "default", "diffusers"), "--output_name is too long"),
    ],
)
def test_layouts_that_cannot_be_written_are_refused_before_loading(train, monkeypatch, tmp_path, flags, says) -> None:
    if "lycoris.kohya" in flags:
        pytest.importorskip("lycoris.kohya")
    monkeypatch.setattr("hunyuan_model.load_transformer", lambda *_a, **_k: pytest.fail("the model was loaded"))
    ended = train(*flags)
    assert ended.status == 2 and says in ended.stderr and not (tmp_path / "out").exists(), ended.stderr


@pytest.mark.parametrize("layout", ["default", "other"])
def test_a_network_that_cannot_be_converted_is_saved_as_its_module_writes_it(train, monkeypatch, tmp_path, caplog, layout) -> None:
    module = types.ModuleType("foreign_network")

    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(3))

        def apply_to(self, *_args, **_kwargs): ...

        def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
            return [{"params": [self.shift], "lr": unet_lr}]

        def save_weights(self, file, dtype, metadata):
            save_file({"shift": self.shift.detach().to(dtype)}, file, metadata)

    module.create_network = lambda *_args, **_kwargs: Foreign()
    monkeypatch.setitem(sys.modules, "foreign_network", module)
    ended = train("--max_train_steps", 2, "--network_module", "foreign_network", "--save_format", layout)
    assert ended.status == 0, ended.stderr
    assert saved(tmp_path / "out") == ["lora.safetensors"] and load_file(tmp_path / "out" / "lora.safetensors").keys() == {"shift"}
    assert caplog.text.count("as its --network_module writes it, without copies for other programs") == 1
    assert "size of the updates" not in caplog.text and "alpha / rank" not in caplog.text
