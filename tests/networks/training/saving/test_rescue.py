"""A training that fails saves what it made since its last save, replaces nothing, and says how to go on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from networks.training import loop
from networks.training.loss.flow_matching import FlowMatching
from networks.training.report.reading import REPORT_FILE
from networks.training.saving.going_on import command_to_go_on
from utils.hub import HubSettings, HubUploads

FLAGS = ("--max_train_steps", 6, "--network_dim", 2, "--network_dropout", 0.2, "--num_timestep_buckets", 2, "--learning_rate", 1e-2)
FAILS_AFTER = 3  # steps, in the second epoch of two batches


@pytest.fixture(autouse=True)
def every_line_is_kept(caplog) -> None:
    caplog.set_level("INFO")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(REPORT_FILE))


def assert_same(first: Path, second: Path) -> None:
    tensors, others = load_file(first), load_file(second)
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def after_steps(patch: pytest.MonkeyPatch, count: int, then: Callable[[], None]) -> None:
    """Have ``then`` called when ``count`` steps were made, before the next one."""
    step, made = loop.train_step, []

    def counted(training, batches):
        if len(made) == count:
            then()
        made.append(1)
        return step(training, batches)

    patch.setattr(loop, "train_step", counted)


def in_the_step(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    """After the noise and the timesteps of the step were made."""
    loss, made = FlowMatching.loss_at, []

    def fails(*arguments):
        made.append(loss(*arguments))
        if len(made) > FAILS_AFTER:
            raise RuntimeError("a kernel fails")
        return made[-1]

    patch.setattr(FlowMatching, "loss_at", fails)


def no_memory(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    after_steps(patch, FAILS_AFTER, fails)


def in_the_log(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    log, made = loop.log_step, []

    def fails(*arguments):
        log(*arguments)
        made.append(1)
        if len(made) == FAILS_AFTER:
            raise OSError(5, "Input/output error")

    patch.setattr(loop, "log_step", fails)


def caches_vanish(patch: pytest.MonkeyPatch, folder: Path) -> None:
    moved: list[Path] = []

    def vanish() -> None:
        for path in folder.glob("*/*_hv.safetensors"):
            moved.append(path.rename(path.with_name(f"{path.name}.away")))

    after_steps(patch, FAILS_AFTER - 1, vanish)


@pytest.mark.parametrize(("fault", "status"), [(in_the_step, None), (no_memory, 2), (in_the_log, None), (caches_vanish, 2)])
def test_it_goes_on_with_the_same_numbers(train, out: Path, tmp_path: Path, monkeypatch, caplog, fault, status) -> None:
    assert train(*FLAGS, name="whole").status == 0
    with monkeypatch.context() as patch:
        fault(patch, tmp_path)
        if status is None:  # what nobody expects keeps its traceback
            with pytest.raises((RuntimeError, OSError)):
                train(*FLAGS)
        else:
            ended = train(*FLAGS)
            assert ended.status == status and "\nerror: " in ended.stderr, ended.stderr
    assert f"the newest state is {out / 'lora-step00000003-state'}; go on with: python hv_train_network.py --dit" in caplog.text
    assert names(out)[:2] == ["lora-step00000003-state", "lora-step00000003.safetensors"]
    for path in tmp_path.rglob("*.away"):
        path.rename(path.with_suffix(""))
    assert train(*FLAGS, "--resume", "latest").status == 0
    assert_same(out / "lora.safetensors", out / "whole.safetensors")


def test_an_optimizer_that_fails_is_a_sentence_after_saving(train, out: Path, monkeypatch, caplog) -> None:
    step, due = torch.optim.SGD.step, []

    def fails(self, closure=None):
        step(self, closure)
        if due:
            raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(torch.optim.SGD, "step", fails)
    after_steps(monkeypatch, FAILS_AFTER, lambda: due.append(1))
    ended = train(*FLAGS, "--optimizer_type", "SGD")
    assert ended.status == 2 and "SGD fails (ZeroDivisionError: float division by zero)" in ended.stderr
    assert "may be half made" in caplog.text and names(out) == ["lora-step00000003-state", "lora-step00000003.safetensors"]


def test_what_another_training_saved_stays(train, out: Path, tmp_path: Path, monkeypatch) -> None:
    assert train(*FLAGS, "--save_every_n_steps", 3, "--save_state").status == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and not path.name.endswith(REPORT_FILE)}
    caches_vanish(monkeypatch, tmp_path)
    assert train(*FLAGS, "--seed", 5).status == 2
    assert all(path.read_bytes() == content for path, content in before.items())
    state = out / "lora-step00000003-rescued1-state"
    assert json.loads((state / "state.json").read_text("utf-8"))["seed"] == 5
    assert (out / "lora-step00000003-rescued1.safetensors").is_file()


def test_what_is_saved_already_is_not_saved_again(train, out: Path, tmp_path: Path, monkeypatch) -> None:
    caches_vanish(monkeypatch, tmp_path)
    assert train(*FLAGS, "--save_every_n_steps", 1).status == 2
    steps = [f"lora-step{number:08d}.safetensors" for number in (1, 2, 3)]
    assert names(out) == sorted([*steps, "lora-step00000003-state"])


def test_before_the_first_step_there_is_nothing(train, out: Path, monkeypatch, caplog) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "train_step", fails)
    assert train(*FLAGS).status == 2 and names(out) == []
    assert "there is no state of this training to go on from" in caplog.text


def test_weights_that_are_not_finite_are_not_saved(train, out: Path, monkeypatch, caplog) -> None:
    def fails(training, batches):
        step(training, batches)
        next(training.network.parameters()).data.fill_(torch.nan)
        raise RuntimeError("a kernel fails")

    step = loop.train_step
    assert train(*FLAGS, "--max_train_steps", 2, "--save_state").status == 0
    before = names(out)
    after_steps(monkeypatch, 1, lambda: None)
    counted = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda training, group: (counted if training.progress.step < 3 else fails)(training, group)
    )
    with pytest.raises(RuntimeError):
        train(*FLAGS, "--resume", "latest")
    assert "weights that are not finite are not saved" in caplog.text and names(out) == before
    assert f"the newest state is {out / 'lora-state'}" in caplog.text


@pytest.mark.parametrize(("fail", "saved"), [((1, 2, 3, 4, 5, 6), False), ((5, 6), True), ((6,), None)])
def test_losses_that_are_not_finite_at_the_end_are_no_success(train, out: Path, monkeypatch, fail, saved) -> None:
    loss, made = FlowMatching.loss_at, []

    def sometimes(*arguments):
        made.append(1)
        return loss(*arguments) * (torch.nan if len(made) in fail else 1)

    monkeypatch.setattr(FlowMatching, "loss_at", sometimes)
    ended = train(*FLAGS)
    if saved is None:  # one step of many
        assert ended.status == 0
        return
    assert ended.status == 1 and f"{len(fail)} steps in a row were skipped at the end" in ended.stderr
    assert (names(out) == ["lora-step00000006-state", "lora-step00000006.safetensors"]) if saved else names(out) == []
    if saved:
        assert train(*FLAGS, "--resume", "latest").status == 1


def test_a_done_training_says_how_to_train_on(train, out: Path, caplog) -> None:
    assert train(*FLAGS, "--save_state").status == 0
    assert f"the newest state is {out / 'lora-state'}; go on with: python" in caplog.text
    assert "--resume latest, and a higher --max_train_steps" in caplog.text
    caplog.clear()
    assert train(*FLAGS, name="plain").status == 0
    assert "there is no state of this training to go on from" in caplog.text


def test_the_command_to_go_on(tmp_path: Path) -> None:
    words = [
        "hv train.py",
        "--resume",
        "old state",
        "--wandb_api_key",
        "***",
        "--resume_from_huggingface",
        "--resume=x",
        "--seed",
        "3",
    ]
    state = tmp_path / "lora-step00000001-state"
    kept = ["hv train.py", "--wandb_api_key", "***", "--seed", "3", "--resume"]
    assert shlex.split(command_to_go_on(words, state, tmp_path)) == ["python", *kept, "latest"]
    other = command_to_go_on(words, state, tmp_path / "other", ["torchrun", "--standalone"])
    assert shlex.split(other) == ["torchrun", "--standalone", *kept, str(state)]


def test_a_secret_is_in_no_command(train, caplog, monkeypatch) -> None:
    assert train(*FLAGS, "--save_state", "--huggingface_token", "hf_secret").status == 0
    assert "go on with: " in caplog.text and "hf_secret" not in caplog.text


def test_an_upload_that_cannot_begin_is_a_warning(tmp_path: Path, caplog) -> None:
    class Hub:
        def upload_file(self, **_: object) -> None:
            raise RuntimeError("cannot schedule new futures")

    HubUploads(Hub(), HubSettings("owner/name")).upload(tmp_path / "lora.safetensors")
    assert "was not uploaded to owner/name: cannot schedule new futures; training continues" in caplog.text
