"""hv_train_network.py --loss_log: what it writes and what it refuses."""

from __future__ import annotations

import csv
import logging
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import hv_train_network
from networks.training import loop
from networks.training.logging.loss_log import COLUMNS, LossLog, check_loss_log
from utils.errors import UserError


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_line_for_each_step_with_what_the_progress_bar_shows(train, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(loop.ProgressBar, "set_postfix", lambda _self, **values: shown.append(values))
    path = tmp_path / "logs" / "loss.csv"
    schedule = ("--learning_rate", 4e-3, "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 4)
    # Four batches an epoch make two steps of two; the average goes over an epoch.
    ended = train("--max_train_epochs", 3, "--gradient_accumulation_steps", 2, "--loss_log", path, *schedule)
    assert ended.status == 0, ended.stderr
    rows = rows_of(path)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["step"], row["epoch"]) for row in rows] == [(str(i), str((i + 1) // 2)) for i in range(1, 7)]
    losses = [float(row["loss"]) for row in rows]
    averages = [losses[0], *((first + second) / 2 for first, second in pairwise(losses))]
    assert [float(row["average_loss"]) for row in rows] == pytest.approx(averages, rel=1e-4)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0, 1e-3, 2e-3, 3e-3, 4e-3, 4e-3])
    logged = [{"loss": f"{float(row['loss']):.4f}", "average": f"{float(row['average_loss']):.4f}"} for row in rows]
    assert logged == shown


def test_a_training_that_stops_leaves_the_steps_it_made(train, tmp_path, monkeypatch, caplog):
    path, step = tmp_path / "loss.csv", loop.train_step
    seen = []

    def third_fails(training, batches):
        if len(seen) == 2:
            assert len(rows_of(path)) == 2, "lines are not held back until the file is closed"
            raise UserError("the third step fails.")
        seen.append(step(training, batches))
        return seen[-1]

    monkeypatch.setattr(loop, "train_step", third_fails)
    path.write_text("what an earlier training left\n" * 9, encoding="utf-8")
    with caplog.at_level(logging.INFO):
        assert train("--max_train_steps", 4, "--loss_log", path).status == 2
    assert [float(row["loss"]) for row in rows_of(path)] == pytest.approx([one.loss for one in seen], rel=1e-8)
    for once in ("LoRA for", "hardly changes a LoRA"):
        assert caplog.text.count(once) == 1


def test_only_the_main_process_writes(train, tmp_path, monkeypatch):
    monkeypatch.setattr(hv_train_network.Accelerator, "is_main_process", False)
    monkeypatch.setattr(logging, "disable", lambda _level: None)  # what silences the others would silence all tests after this
    assert train("--max_train_steps", 1, "--loss_log", tmp_path / "loss.csv").status == 0
    assert not (tmp_path / "loss.csv").exists()


def test_losses_are_exact_in_float32(tmp_path):
    values = np.random.default_rng(0).lognormal(size=1000).astype(np.float32)
    with LossLog(tmp_path / "loss.csv") as log:
        for value in values.tolist():
            log.write(1, 1, value, value, None, value)  # a rate that nobody knows
    rows = rows_of(tmp_path / "loss.csv")
    for name in ("loss", "average_loss", "validation_loss"):
        assert (np.array([float(row[name]) for row in rows], dtype=np.float32) == values).all()
    assert {row["learning_rate"] for row in rows} == {""}


@pytest.mark.parametrize(
    ("name", "says"),
    [(".", r" \. is a folder"), ("file/below/loss.csv", "cannot be written"), ("x" * 300, "shorter one"), ("loss.csv", None)],
)
def test_a_place_for_the_log_is_checked_and_left_as_it_is(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way", encoding="utf-8")
    with nullcontext() if says is None else pytest.raises(UserError, match=f"--loss_log.*{says}"):
        check_loss_log(name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_log_that_is_write_protected_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "loss.csv").touch()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # to whoever runs the tests as root nothing is write-protected
    with pytest.raises(UserError, match="exists and cannot be written to"):
        check_loss_log(tmp_path / "loss.csv")


def test_a_full_disk_ends_the_log_and_not_the_training(tmp_path, caplog):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with caplog.at_level(logging.WARNING), LossLog("/dev/full") as log:
        log.write(1, 1, 0.5, 0.5, 1e-3)
    assert caplog.text.count("training continues without it") == 1
