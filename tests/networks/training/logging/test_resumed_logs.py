"""A training that goes on from a state goes on in its run of TensorBoard and W&B, where every step is drawn once."""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from networks.training.arguments import build_training_parser
from networks.training.logging.logs import TrainingLogs, open_logs
from networks.training.saving.resume import Resumed
from networks.training.saving.state import Progress, StateFile, read_state_file

CPU = torch.device("cpu")


def parsed(*flags: object, name: str = "lora") -> argparse.Namespace:
    return build_training_parser().parse_args(["--output_name", name, *(str(flag) for flag in flags)])


def state_after(step: int, runs: dict[str, str], name: str = "lora") -> Resumed:
    """The state of a training called ``name``, with the runs it logged to."""
    progress = Progress(step=step, log_runs=dict(runs))
    return Resumed(Path("state"), StateFile(progress, seed=1, identity={}, order={}, flags={"output_name": name}, saved_at=0.0))


def log_steps(logs: TrainingLogs, first: int, last: int, loss: float) -> None:
    for step in range(first, last + 1):
        logs.step(step, loss=loss, average=loss, rates={})


def drawn(folder: Path) -> dict[int, float]:
    """Step -> loss, as TensorBoard draws the one run under ``folder``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = {file.parent for file in folder.rglob("events.*")}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    scalars = events.Scalars("loss/current")
    assert len({event.step for event in scalars}) == len(scalars), "a step is drawn twice"
    return {event.step: event.value for event in scalars}


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboard")


@pytest.fixture
def logged(tensorboard, tmp_path) -> tuple[Path, dict[str, str]]:
    """The folder of a training that logged five steps, and what its states keep."""
    with open_logs(parsed("--logging_dir", tmp_path / "logs"), CPU) as logs:
        log_steps(logs, 1, 5, 0.5)
    return tmp_path / "logs", logs.runs


def test_steps_that_are_made_again_are_drawn_once_in_the_same_folder(logged):
    folder, runs = logged
    with open_logs(parsed("--logging_dir", folder, "--log_config"), CPU, resumed=state_after(3, runs)) as logs:
        log_steps(logs, 4, 4, 0.25)
    assert drawn(folder) == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.25}
    assert logs.runs == runs
    with open_logs(parsed("--logging_dir", folder), CPU, resumed=state_after(4, runs)) as logs:
        log_steps(logs, 5, 6, 0.125)
    assert drawn(folder) == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.25, 5: 0.125, 6: 0.125}


def test_nothing_is_hidden_by_a_training_that_fails_before_its_first_step(logged):
    folder, runs = logged
    with open_logs(parsed("--logging_dir", folder, "--log_config"), CPU, resumed=state_after(2, runs)):
        pass
    assert drawn(folder) == dict.fromkeys(range(1, 6), 0.5)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("other", None), ("lora", {}), ("lora", {"tensorboard": "../../elsewhere"}), ("lora", {"wandb": "abc"})],
    ids=["another name", "an old state", "no time", "logged elsewhere"],
)
def test_a_new_folder_where_there_is_no_run_to_continue(logged, monkeypatch, name, kept):
    folder, runs = logged
    monkeypatch.setattr("networks.training.logging.tensorboard.time.strftime", lambda _format: "20010203040506")
    resumed = state_after(3, runs if kept is None else kept)
    with open_logs(parsed("--logging_dir", folder, name=name), CPU, resumed=resumed) as logs:
        log_steps(logs, 4, 4, 0.25)
    assert logs.runs["tensorboard"] == "20010203040506"
    assert drawn(folder / "20010203040506") == {4: 0.25}
    assert drawn(folder / runs["tensorboard"]) == dict.fromkeys(range(1, 6), 0.5)


def test_the_prefix_and_the_name_are_those_of_the_flags(logged):
    folder, runs = logged
    flags = ("--logging_dir", folder / "second", "--log_prefix", "mine-", "--log_tracker_name", "zorp")
    open_logs(parsed(*flags), CPU, resumed=state_after(3, runs)).close()
    assert (folder / "second" / f"mine-{runs['tensorboard']}" / "zorp").is_dir()


def test_a_folder_and_a_step_of_the_users_own(tensorboard, tmp_path):
    table = f"[tensorboard]\nlog_dir = '{tmp_path / 'mine'}'\n"
    (tmp_path / "t.toml").write_text(table, encoding="utf-8")
    args = parsed("--logging_dir", tmp_path / "logs", "--log_tracker_config", tmp_path / "t.toml")
    with open_logs(args, CPU) as logs:
        log_steps(logs, 1, 5, 0.5)
    with open_logs(args, CPU, resumed=state_after(3, logs.runs)) as logs:
        log_steps(logs, 4, 4, 0.25)
    assert drawn(tmp_path) == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.25}
    (tmp_path / "t.toml").write_text(f"{table}purge_step = 2\n", encoding="utf-8")
    with open_logs(args, CPU, resumed=state_after(3, logs.runs)) as logs:
        log_steps(logs, 4, 4, 0.125)
    assert drawn(tmp_path) == {1: 0.5, 4: 0.125}
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def wandb(monkeypatch) -> list[dict[str, Any]]:
    """In place of the package: the settings that each run began with."""
    begun: list[dict[str, Any]] = []

    def init(**settings: Any) -> types.SimpleNamespace:
        begun.append(settings)
        run = types.SimpleNamespace(id=settings.get("id", f"made{len(begun)}"))
        run.log, run.finish = lambda _values, step: None, lambda: None
        return run

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


WANDB = ("--log_with", "wandb")


def test_a_run_of_wandb_goes_on_under_its_id(wandb):
    logs = open_logs(parsed(*WANDB, "--wandb_run_name", "night"), CPU)
    assert logs.runs == {"wandb": "made1"} and wandb[0] == {"project": "network_train", "name": "night"}
    logs = open_logs(parsed(*WANDB, "--wandb_run_name", "night"), CPU, resumed=state_after(3, logs.runs))
    assert wandb[1] == {"project": "network_train", "name": "night", "id": "made1", "resume": "allow"}
    assert logs.runs == {"wandb": "made1"}


def test_a_run_of_wandb_begins_anew_under_another_name_and_from_an_old_state(wandb):
    assert open_logs(parsed(*WANDB, name="other"), CPU, resumed=state_after(3, {"wandb": "a"})).runs == {"wandb": "made1"}
    assert open_logs(parsed(*WANDB), CPU, resumed=state_after(3, {})).runs == {"wandb": "made2"}
    assert all("id" not in settings and "resume" not in settings for settings in wandb)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('id = "mine"', {"id": "mine", "resume": "allow"}),
        ('resume = "must"\nid = "mine"', {"id": "mine", "resume": "must"}),
        ('fork_from = "x?_step=2"', {"fork_from": "x?_step=2"}),
    ],
)
def test_what_the_user_says_of_a_run_of_wandb_counts(wandb, tmp_path, table, expected):
    (tmp_path / "t.toml").write_text(f"[wandb]\n{table}\n", encoding="utf-8")
    args = parsed(*WANDB, "--log_tracker_config", tmp_path / "t.toml")
    open_logs(args, CPU, resumed=state_after(3, {"wandb": "a"}))
    assert {name: value for name, value in wandb[0].items() if name != "project"} == expected


def test_a_training_without_logs_keeps_the_runs_for_the_next_one(wandb):
    runs = {"wandb": "a", "tensorboard": "20010203040506"}
    assert open_logs(parsed(), CPU, resumed=state_after(3, runs)).runs == runs
    assert open_logs(parsed(name="other"), CPU, resumed=state_after(3, runs)).runs == {}
    assert not wandb


def test_training_stores_its_run_and_goes_on_in_it(train, tensorboard, tmp_path):
    flags = ("--learning_rate", 1e-2, "--save_state", "--save_every_n_steps", 2, "--logging_dir", tmp_path / "logs")
    assert train("--max_train_steps", 5, *flags).status == 0
    whole = drawn(tmp_path / "logs")
    state = tmp_path / "out" / "lora-step00000002-state"
    runs = read_state_file(state).progress.log_runs
    (folder,) = (tmp_path / "logs").iterdir()
    assert runs == {"tensorboard": folder.name}
    ended = train("--max_train_steps", 5, *flags, "--resume", state)
    assert ended.status == 0, ended.stderr
    assert drawn(tmp_path / "logs") == whole and sorted(whole) == [1, 2, 3, 4, 5]
    assert len(list(folder.rglob("events.*"))) == 2
    assert read_state_file(tmp_path / "out" / "lora-state").progress.log_runs == runs


def test_a_state_without_runs_is_read_and_one_with_nonsense_is_told(train, tmp_path):
    flags = ("--max_train_steps", 2, "--save_state", "--save_every_n_steps", 1)
    assert train(*flags).status == 0
    state = tmp_path / "out" / "lora-step00000001-state"
    content = json.loads((state / "state.json").read_text(encoding="utf-8"))
    assert content.pop("log_runs") == {}
    (state / "state.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_state_file(state).progress.log_runs == {}
    for nonsense in ([], {"wandb": 3}):
        (state / "state.json").write_text(json.dumps({**content, "log_runs": nonsense}), encoding="utf-8")
        ended = train(*flags, "--resume", state)
        assert ended.status == 2 and "is not a state of this trainer" in ended.stderr.splitlines()[-1]
