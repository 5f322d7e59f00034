"""Training that stops and goes on ends with the very numbers of a training that never stopped."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from networks.training import loop
from networks.training.report.reading import REPORT_FILE
from networks.training.saving import state as training_state
from networks.training.saving.latest import find_latest_state, recover_state
from networks.training.saving.state import plain_state, read_state_file
from utils.checksums import file_checksum
from utils.errors import UserError
from utils.safetensors_io import read_header

# Two datasets, dropout that draws from torch's own generator, a schedule, and epochs of two steps of two batches at most.
FLAGS = (
    *("--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--learning_rate", 1e-2, "--network_dropout", 0.2),
    *("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--max_train_steps", 9),
)
STATES = ("--save_state", "--save_every_n_steps", 1)


def weights(folder: Path, name: str = "lora") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def losses(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(autouse=True)
def every_line_is_kept(caplog) -> None:
    caplog.set_level("INFO")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs it leaves what ``whole`` is a copy of."""
    return tmp_path_factory.mktemp("whole") / "out"


@pytest.fixture
def whole(train, out: Path, trained_once: Path) -> Path:
    """A training that never stopped, with a state after every step."""
    if not trained_once.exists():
        ended = train(*FLAGS, *STATES, "--loss_log", out / "whole.csv")
        assert ended.status == 0, ended.stderr
        shutil.copytree(out, trained_once)
    shutil.copytree(trained_once, out, dirs_exist_ok=True)
    return out


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
def test_it_goes_on_from_any_step_as_if_nothing_had_happened(train, whole: Path, step: int) -> None:
    wanted, state = weights(whole), whole / f"lora-step{step:08d}-state"
    shutil.copy(whole / "whole.csv", whole / "again.csv")  # the log of a training that was killed later
    ended = train(*FLAGS, "--resume", state, "--loss_log", whole / "again.csv", name="again")
    assert ended.status == 0, ended.stderr
    assert_same(weights(whole, "again"), wanted)
    assert losses(whole / "again.csv") == losses(whole / "whole.csv")
    assert len(losses(whole / "again.csv")) == 10


def test_processes_that_read_make_no_difference(train, whole: Path) -> None:
    state = whole / "lora-step00000004-state"
    ended = train(*FLAGS, "--resume", state, "--max_data_loader_n_workers", 2, "--persistent_data_loader_workers", name="again")
    assert ended.status == 0, ended.stderr
    assert_same(weights(whole, "again"), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("adafactor", ["relative_step=False"]),
        ("transformers.optimization.Adafactor", ["relative_step=False"]),
        ("SGD", ["momentum=0.9"]),
        ("prodigyopt.Prodigy", ["d_coef=2.0", "safeguard_warmup=True"]),
        ("schedulefree.AdamWScheduleFree", ["warmup_steps=2"]),
    ],
)
def test_other_optimizers_go_on_too(train, out: Path, optimizer: str, arguments: list[str]) -> None:
    pytest.importorskip(optimizer.split(".")[0] if "." in optimizer else "torch")
    flags = (*FLAGS, "--optimizer_type", optimizer, "--optimizer_args", *arguments)
    assert train(*flags, *STATES).status == 0
    ended = train(*flags, "--resume", out / "lora-step00000004-state", name="again")
    assert ended.status == 0, ended.stderr
    assert_same(weights(out, "again"), weights(out))


def test_saving_states_changes_nothing(train, whole: Path) -> None:
    assert train(*FLAGS, name="plain").status == 0
    assert_same(weights(whole, "plain"), weights(whole))


def test_latest_begins_anew_goes_on_and_ends(train, out: Path, caplog) -> None:
    command = (*FLAGS, *STATES, "--resume", "latest")
    assert train(*command).status == 0 and "starts from the beginning" in caplog.text
    wanted = weights(out)
    (out / "lora.safetensors").unlink()
    for state in (out / "lora-state", *(out / f"lora-step{step:08d}-state" for step in (7, 8))):
        shutil.rmtree(state)
    assert train(*command).status == 0 and "lora-step00000006-state: step 6, epoch" in caplog.text
    assert_same(weights(out), wanted)
    assert train(*command).status == 0 and "is complete" in caplog.text
    metadata = read_header(out / "lora.safetensors").metadata
    assert metadata["ss_session_id"] == read_state_file(out / "lora-step00000001-state").progress.session_id


def test_latest_takes_the_newest_that_is_whole(train, whole: Path, caplog) -> None:
    shutil.rmtree(whole / "lora-state")
    (whole / "lora-step00000008-state" / "optimizer.pt").write_bytes(b"cut")
    assert find_latest_state(whole, "lora") == whole / "lora-step00000007-state"
    assert "lora-step00000008-state is damaged: optimizer.pt" in caplog.text
    assert find_latest_state(whole, "lor") is None and find_latest_state(whole / "none", "lora") is None


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_what_does_not_fit_is_refused_before_anything_is_loaded(train, whole: Path, tmp_path: Path, monkeypatch) -> None:
    state = whole / "lora-step00000004-state"
    monkeypatch.setattr("hunyuan_model.load_transformer", None)  # nothing is loaded before
    monkeypatch.setattr("hv_train_network.load_dataset_config", None)  # nor are the datasets looked at
    cases = [
        (("--network_dim", 8), "does not fit this training: rank 4, now 8."),
        (("--network_alpha", 16), "does not fit this training: alpha 1, now 16."),
        (("--network_args", "rank_dropout=0.1"), "--network_args not given, now rank_dropout=0.1."),
        (("--optimizer_type", "SGD"), "--optimizer_type"),
        (("--lr_scheduler", "linear"), "--lr_scheduler cosine, now linear"),
        (("--seed", 4), "--seed 4 is not that of the state"),
        (("--resume", tmp_path), "is not a state of this trainer"),
        (("--resume", tmp_path / "none"), "is not a folder"),
    ]
    for flags, says in cases:
        ended = train(*FLAGS, "--resume", state, *flags, name="other")
        assert ended.status == 2 and says in ended.stderr, (flags, ended.stderr)
        assert not (whole / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.update(format=1), "its format is 1, and this version reads 2"),
        (lambda state: state.pop("format"), "its format is None"),
        (lambda state: state.pop("order"), "'order'"),
        (lambda state: state.update(saved_at="today"), "saved_at is 'today'"),
        (lambda state: state.update(files=[]), "files is []"),
        (lambda state: state.update(flags=None), "flags is None"),
        (lambda state: state["flags"].pop("network_alpha"), "flags in"),
        (lambda state: state["progress"].update(step="4"), "step is '4'"),
        (lambda state: state["progress"].update(batches=-1), "too small"),
        (lambda state: state["progress"].update(more=1), "'more'"),
    ],
)
def test_a_state_of_another_version_or_edited_by_hand_is_one_sentence(train, whole: Path, change, says: str) -> None:
    state = whole / "lora-step00000004-state"
    path = state / "state.json"
    content = json.loads(path.read_text("utf-8"))
    content.pop("checksum")  # whoever wants to can do that
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    ended = train(*FLAGS, "--resume", state, name="other")
    assert ended.status == 2 and says in ended.stderr and str(state) in ended.stderr


def test_latest_does_not_begin_anew_over_states_that_cannot_be_used(train, whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.glob("lora*.safetensors")}
    for path in whole.glob("lora*-state/state.json"):
        path.write_text(path.read_text("utf-8").replace('"format": 2', '"format": 1'), encoding="utf-8")
    ended = train(*FLAGS, *STATES, "--resume", "latest", "--max_train_steps", 12)
    assert ended.status == 2 and "no state of lora in" in ended.stderr and "its format is 1" in ended.stderr
    assert before == {path: path.read_bytes() for path in whole.glob("lora*.safetensors")}


def test_a_state_that_holds_code_is_refused(train, whole: Path) -> None:
    state = whole / "lora-step00000004-state"

    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(whole / "harm"),))

    torch.save({"optimizer": Harmful()}, state / "optimizer.pt")
    content = json.loads((state / "state.json").read_text("utf-8"))
    content.pop("checksum")
    content["files"]["optimizer.pt"] = (state / "optimizer.pt").stat().st_size
    content["checksums"]["optimizer.pt"] = file_checksum(state / "optimizer.pt")
    (state / "state.json").write_text(json.dumps(content), encoding="utf-8")
    ended = train(*FLAGS, "--resume", state, name="other")
    assert ended.status == 2 and "cannot be loaded" in ended.stderr
    assert not (whole / "harm").exists()


def test_only_plain_values_are_saved() -> None:
    assert plain_state({"a": (1, 2.5), "b": [None, "x", {True}]}) == {"a": (1, 2.5), "b": [None, "x", {True}]}
    with pytest.raises(UserError, match=r"holds a \w*Path"):
        plain_state({"a": [Path("x")]})


def test_changed_data_sets_begin_the_epoch_anew(train, whole: Path, cached: Path, caplog) -> None:
    cached.write_text(cached.read_text("utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    ended = train(*FLAGS, "--resume", whole / "lora-step00000004-state", name="other")
    assert ended.status == 0 and "data sets changed since the state was saved: epoch 2 starts over" in caplog.text


def test_a_state_past_the_last_step_is_refused_before_loading(train, whole: Path, monkeypatch) -> None:
    monkeypatch.setattr("hunyuan_model.load_transformer", None)
    ended = train(*FLAGS, "--resume", whole / "lora-step00000004-state", "--max_train_steps", 4, name="other")
    assert ended.status == 2 and "raise --max_train_steps" in ended.stderr


def test_metadata_and_later_states_hold_what_the_optimizer_goes_on_with(train, whole: Path, caplog) -> None:
    flags = ("--learning_rate", 1e-3, "--optimizer_args", "weight_decay=0.5", "--max_grad_norm", 2)
    ended = train(*FLAGS, *flags, "--resume", whole / "lora-step00000004-state", "--save_state", name="other")
    assert ended.status == 0, ended.stderr
    assert "--learning_rate 0.001 is not used: the optimizer continues as in the state, with 0.01" in caplog.text
    assert "--max_grad_norm 1.0, now 2.0" in caplog.text
    metadata = read_header(whole / "other.safetensors").metadata
    kept = ("ss_learning_rate", "ss_optimizer", "ss_max_grad_norm")
    assert [metadata[name] for name in kept] == ["0.01", "torch.optim.adamw.AdamW", "2.0"]
    assert read_state_file(whole / "other-state").flags["learning_rate"] == 0.01
    plain = train(*FLAGS, "--max_grad_norm", 2, "--resume", whole / "lora-step00000004-state", name="plain")
    assert plain.status == 0, plain.stderr
    assert_same(weights(whole, "other"), weights(whole, "plain"))


# ---------------------------------------------------------------------------------------------------------------------
# Requests from outside


@pytest.fixture
def after_step(monkeypatch):
    """``after_step(3, function)`` calls the function after the third step."""

    def arrange(number: int, function) -> None:
        steps, plain = [], loop.train_step

        def step_and_call(training, batches):
            result = plain(training, batches)
            steps.append(result)
            if len(steps) == number:
                function()
            return result

        monkeypatch.setattr(loop, "train_step", step_and_call)

    return arrange


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_a_signal_saves_model_and_state_after_the_step(train, out: Path, after_step, caplog, name, status) -> None:
    if not hasattr(signal, name):
        pytest.skip("this system has no such signal")
    after_step(4, lambda: signal.raise_signal(getattr(signal, name)))
    ended = train(*FLAGS)
    assert ended.status == status and "stopped after step 4 of 9" in caplog.text, ended.stderr
    assert sorted(path.name for path in out.iterdir()) == ["lora-step00000004-state", "lora-step00000004.safetensors", REPORT_FILE]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no such signal")
def test_below_nohup_a_closed_terminal_changes_nothing(train, out: Path, after_step) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after_step(4, lambda: signal.raise_signal(signal.SIGHUP))
        assert train(*FLAGS).status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_at_a_step_that_is_saved_anyway_saves_once(train, out: Path, after_step, caplog) -> None:
    after_step(4, lambda: signal.raise_signal(signal.SIGTERM))
    assert train(*FLAGS, "--save_every_n_steps", 4).status == 143
    assert caplog.text.count("saved the state") == 1 and (out / "lora-step00000004-state").is_dir()


def test_where_the_state_cannot_be_saved_a_signal_saves_the_model(
    train, out: Path, after_step, tmp_path: Path, monkeypatch, caplog
) -> None:
    (tmp_path / "odd_optimizer.py").write_text(
        "import torch\nclass Odd(torch.optim.SGD):\n"
        "    def state_dict(self):\n        return super().state_dict() | {'rule': object()}\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    odd = (*FLAGS, "--optimizer_type", "odd_optimizer.Odd")
    ended = train(*odd, "--save_state")
    assert ended.status == 2 and "holds a object, which cannot be saved safely" in ended.stderr and not out.exists()
    after_step(4, lambda: signal.raise_signal(signal.SIGTERM))
    ended = train(*odd)
    assert "A training that is stopped will save its model only" in caplog.text
    assert ended.status == 2 and "the model lora-step00000004.safetensors was saved" in ended.stderr, ended.stderr
    assert sorted(path.name for path in out.iterdir()) == ["lora-step00000004.safetensors", REPORT_FILE]


def test_after_a_signal_latest_goes_on(train, whole: Path, after_step) -> None:
    after_step(4, lambda: signal.raise_signal(signal.SIGINT))
    assert train(*FLAGS, name="stopped").status == 130
    ended = train(*FLAGS, "--resume", "latest", name="stopped")
    assert ended.status == 0, ended.stderr
    assert_same(weights(whole, "stopped"), weights(whole))


def test_a_second_signal_ends_at_once(train, out: Path, after_step) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    after_step(2, twice)
    assert train(*FLAGS).status == 130
    assert not list(out.glob("*-state"))
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_files_ask_for_saving_and_stopping(train, out: Path, after_step, caplog) -> None:
    out.mkdir(parents=True)
    after_step(2, (out / "save").touch)
    assert train(*FLAGS).status == 0
    assert (out / "lora-step00000002.safetensors").is_file() and (out / "lora-step00000002-state").is_dir()
    assert not (out / "save").exists()
    after_step(3, (out / "save_and_stop").touch)
    assert train(*FLAGS, name="two").status == 0 and "stopped after step 3 of 9" in caplog.text
    assert (out / "two-step00000003.safetensors").is_file() and (out / "two-step00000003-state").is_dir()
    assert not (out / "two.safetensors").exists() and not (out / "save_and_stop").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A save that fails, or is killed


def test_a_full_disk_leaves_older_states_whole(train, whole: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if not path.name.endswith(REPORT_FILE)}
    monkeypatch.setattr(training_state, "save_tensors", full)
    ended = train(*FLAGS, *STATES, name="other")
    assert ended.status == 2 and "other-step00000001-state" in ended.stderr and "No space left" in ended.stderr
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path != whole)
    assert not [path for path in whole.iterdir() if path.name.startswith(".")]


def test_leftovers_of_a_killed_save_are_removed_by_the_next_run(train, out: Path) -> None:
    out.mkdir(parents=True)
    (out / ".0123abcd.tmp.lora-step00000004-state").mkdir()
    (out / ".0123abcd.tmp.lora.safetensors").touch()
    (out / ".0123abcd.tmp.lora-000002_other.safetensors").touch()
    (out / ".0123abcd.tmp.lora_comfyui.safetensors").touch()
    (out / ".0123abcd.tmp.another.safetensors").touch()
    (out / f".0123abcd.tmp.{REPORT_FILE}").touch()
    assert train("--max_train_steps", 1).status == 0
    assert sorted(path.name for path in out.iterdir()) == [
        ".0123abcd.tmp.another.safetensors",
        "lora.safetensors",
        "lora_comfyui.safetensors",
        REPORT_FILE,
    ]


def test_a_kill_while_a_state_replaces_another_loses_neither(train, out: Path, whole: Path) -> None:
    """Between the two renames both have temporary names; the newer one comes back."""
    newer, older = whole / "lora-step00000006-state", whole / "lora-step00000005-state"
    step = read_state_file(newer).progress.step
    older.rename(out / ".0123abcd.tmp.lora-step00000006-state")
    newer.rename(out / ".4567abcd.tmp.lora-step00000006-state")
    (out / ".89abcdef.tmp.lora-step00000070-state").mkdir()  # hardly begun
    recover_state(out, "lora")
    assert read_state_file(newer).progress.step == step
    assert (out / ".89abcdef.tmp.lora-step00000070-state").is_dir(), "what is not whole stays a leftover"


def test_latest_ends_too_where_only_the_model_says_that_it_is_complete(train, caplog) -> None:
    flags = ("--max_train_steps", 1, "--resume", "latest")
    assert train(*flags).status == 0 and train(*flags).status == 0 and "is complete" in caplog.text


def test_a_kill_between_the_last_state_and_its_model_is_made_good(train, whole: Path) -> None:
    expected = weights(whole)
    (whole / "lora.safetensors").unlink()
    ended = train(*FLAGS, *STATES, "--resume", "latest")
    assert ended.status == 0, ended.stderr
    assert_same(weights(whole), expected)


def test_a_request_that_comes_too_late_does_not_stop_the_next_training(train, out: Path, after_step) -> None:
    out.mkdir(parents=True)
    after_step(9, (out / "save_and_stop").touch)
    assert train(*FLAGS).status == 0 and not (out / "save_and_stop").exists()
