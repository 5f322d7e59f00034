"""A training that is resumed goes on in its run of TensorBoard and W&B, where every step stands once."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from networks.training.logging.logs import LogSettings, TrainingLogs, open_logs
from networks.training.saving.state import read_state_file

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def first_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files are read in the order of their names, which end in a count: 10 comes before 9."""
    writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", type(writer._global_uid)(0))


def log_steps(logs: TrainingLogs, first: int, last: int, loss: float) -> None:
    with logs:
        for step in range(first, last + 1):
            logs.step(step, loss=loss, average=loss, rates={})


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, as TensorBoard shows the one run under ``folder``."""
    (run,) = {file.parent for file in folder.rglob("events.*")}
    events = accumulator.EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    scalars = events.Scalars("loss/current")
    assert len({event.step for event in scalars}) == len(scalars), "a step stands twice"
    return {event.step: event.value for event in scalars}


@pytest.fixture
def logged(tmp_path) -> tuple[LogSettings, dict[str, str]]:
    """The logs of a training of five steps, and what its states keep of them."""
    settings = LogSettings(str(tmp_path / "logs"))
    logs = open_logs(settings, CPU)
    log_steps(logs, 1, 5, 0.5)
    return settings, logs.runs


def test_steps_that_are_made_again_stand_once_in_the_same_folder(logged, tmp_path):
    settings, runs = logged
    logs = open_logs(settings, CPU, runs=runs, step=3)
    log_steps(logs, 4, 4, 0.25)
    assert losses(tmp_path / "logs") == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.25}
    assert logs.runs == runs
    log_steps(open_logs(settings, CPU, runs=runs, step=4), 5, 6, 0.125)
    assert losses(tmp_path / "logs") == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.25, 5: 0.125, 6: 0.125}


@pytest.mark.parametrize("runs", [{}, {"tensorboard": "../../elsewhere"}, {"wandb": "abc"}])
def test_a_new_folder_where_there_is_no_run_to_continue(logged, monkeypatch, tmp_path, runs):
    settings, earlier = logged
    monkeypatch.setattr("networks.training.logging.trackers.time.strftime", lambda *_: "20010203040506")
    logs = open_logs(settings, CPU, runs=runs, step=3)
    log_steps(logs, 4, 4, 0.25)
    assert logs.runs == runs | {"tensorboard": "20010203040506"}
    assert losses(tmp_path / "logs" / "20010203040506") == {4: 0.25}
    assert losses(tmp_path / "logs" / earlier["tensorboard"]) == dict.fromkeys(range(1, 6), 0.5)


def test_a_folder_and_a_step_of_the_users_own(tmp_path):
    table = f"[tensorboard]\nlog_dir = '{tmp_path / 'mine'}'\n"
    (tmp_path / "t.toml").write_text(table, encoding="utf-8")
    settings = LogSettings(str(tmp_path / "logs"), log_tracker_config=str(tmp_path / "t.toml"))
    logs = open_logs(settings, CPU)
    log_steps(logs, 1, 5, 0.5)
    (tmp_path / "t.toml").write_text(f"{table}purge_step = 2\n", encoding="utf-8")
    log_steps(open_logs(settings, CPU, runs=logs.runs, step=3), 4, 4, 0.125)
    assert losses(tmp_path) == {1: 0.5, 4: 0.125}
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def wandb(monkeypatch) -> list[dict[str, Any]]:
    """In place of the package: the options that each run began with."""
    begun: list[dict[str, Any]] = []

    def init(**options: Any) -> types.SimpleNamespace:
        begun.append(options)
        return types.SimpleNamespace(id=options.get("id", f"made{len(begun)}"))

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


def test_a_run_of_wandb_goes_on_under_its_id(wandb):
    settings = LogSettings(log_with="wandb", wandb_run_name="night")
    logs = open_logs(settings, CPU)
    assert logs.runs == {"wandb": "made1"} and wandb[0] == {"project": "network_train", "name": "night"}
    assert open_logs(settings, CPU, runs=logs.runs, step=3).runs == logs.runs
    assert wandb[1] == {"project": "network_train", "name": "night", "id": "made1", "resume": "allow"}
    assert open_logs(settings, CPU, runs={}, step=3).runs == {"wandb": "made3"}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('id = "mine"', {"id": "mine", "resume": "allow"}),
        ('resume = "must"\nid = "mine"', {"id": "mine", "resume": "must"}),
        ('fork_from = "x?_step=2"', {"fork_from": "x?_step=2"}),
    ],
)
def test_the_users_own_options_of_a_run_of_wandb_count(wandb, tmp_path, table, expected):
    (tmp_path / "t.toml").write_text(f"[wandb]\n{table}\n", encoding="utf-8")
    open_logs(LogSettings(log_with="wandb", log_tracker_config=str(tmp_path / "t.toml")), CPU, runs={"wandb": "a"}, step=3)
    assert {name: value for name, value in wandb[0].items() if name != "project"} == expected


def test_a_training_without_logs_keeps_the_runs_for_the_next_one(wandb):
    runs = {"wandb": "a", "tensorboard": "20010203040506"}
    assert open_logs(LogSettings(), CPU, runs=runs, step=3).runs == runs
    assert not wandb


def test_training_stores_its_run_and_goes_on_in_it(train, tmp_path):
    flags = ("--learning_rate", 1e-2, "--save_state", "--save_every_n_steps", 2, "--logging_dir", tmp_path / "logs")
    assert train("--max_train_steps", 5, *flags).status == 0
    whole = losses(tmp_path / "logs")
    state = tmp_path / "out" / "lora-step00000002-state"
    (folder,) = (tmp_path / "logs").iterdir()
    assert read_state_file(state).progress.log_runs == {"tensorboard": folder.name}
    ended = train("--max_train_steps", 5, *flags, "--resume", state)
    assert ended.status == 0, ended.stderr
    assert losses(tmp_path / "logs") == whole and sorted(whole) == [1, 2, 3, 4, 5]
    # Several trainings may go on from one state: each name has a run of its own.
    assert train("--max_train_steps", 3, *flags, "--resume", state, name="other").status == 0
    other = read_state_file(tmp_path / "out" / "other-state").progress.log_runs
    assert losses(tmp_path / "logs" / folder.name) == whole and other != {"tensorboard": folder.name}
