"""The report of a training under way: numbers, samples, and disks that fail."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple

import numpy as np
import pytest

from hunyuan_model.sampling.generation import SamplingSettings
from networks.generation.requests import Request
from networks.training.logging.logs import TrainingLogs
from networks.training.report import writer
from networks.training.report.reading import read_report
from networks.training.report.record import RunRecord, Status
from networks.training.report.writer import TrainingReport
from networks.training.samples.sampling import SavedSample
from utils.media.writing import save_picture


@pytest.fixture
def report(tmp_path) -> TrainingReport:
    return TrainingReport(RunRecord("lora", "1", Status.RUNNING, 0, 9, 1.0, 0.0), tmp_path / "report.html")


@pytest.fixture
def logs(report) -> TrainingLogs:
    logs = TrainingLogs()
    logs.trackers.append(report)
    return logs


def test_numbers_that_are_not_finite_are_noted(report, logs):
    for step, loss in enumerate((0.5, math.nan, 0.25, math.inf), 1):
        logs.step(step, loss=loss, average=0.5, rates={"unet": 1e-3}, gradient_norm=loss, seconds=0.1)
    logs.values(4, {"loss/validation": math.nan})
    logs.values(3, {"update/relative_norm": 0.1})
    logs.values(3, {"update/relative_norm": 0.2})
    report.end(Status.FAILED, "a\x1b[31m reason")
    (run,) = read_report(report.path)
    assert run.steps == 4 and run.not_finite == [2, 4] and run.curves["loss/current"].steps == [1, 2, 3, 4]
    assert run.curves["loss/current"].values[::2] == [0.5, 0.25] and run.curves["loss/average"].values == [0.5] * 4
    assert (run.curves["update/relative_norm"].steps, run.curves["update/relative_norm"].values) == ([3], [np.float32(0.2)])
    assert run.curves["memory/resident_gib"].values[0] > 0 and run.reason == "a<U+001B>[31m reason"


def test_a_sample_and_one_that_is_damaged(report, logs, tmp_path, caplog):
    request = Request("a <fox>", SamplingSettings(seed=7, video_size=(32, 32), video_length=1, infer_steps=2))
    save_picture(tmp_path / "sample" / "a.png", np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "sample" / "b.png").write_bytes(b"no picture")
    logs.samples([SavedSample(tmp_path / "sample" / name, index, request) for index, name in enumerate(("a.png", "b.png"))], 2)
    report.write()
    (run,) = read_report(report.path)
    first, second = run.samples
    assert (first.step, first.index, first.prompt, first.seed, first.file) == (2, 0, "a <fox>", 7, "sample/a.png")
    assert first.uri.startswith("data:image/webp") and first.settings["infer_steps"] == "2" and not second.uri
    assert "the report cannot log" in caplog.text and logs.trackers


def test_it_is_written_only_if_something_is_new(report):
    report.write()
    before = report.path.stat().st_mtime_ns
    report.write()
    assert report.path.stat().st_mtime_ns == before
    report.log({"loss/current": 1.0}, 1)
    report.write()
    assert read_report(report.path)[0].steps == 1


def test_between_saves_it_is_written_now_and_then(report, monkeypatch):
    monkeypatch.setattr(writer, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(writer, "LEAST_WAIT", 0.0)
    report.log({"loss/current": 1.0}, 1)
    assert read_report(report.path)[0].steps == 1


def test_a_folder_that_vanished_is_one_warning_and_the_next_save_tries_again(report, tmp_path, caplog):
    report.path = tmp_path / "gone" / "report.html"
    for step in (1, 2):
        report.log({"loss/current": 1.0}, step)
        report.write()
    assert caplog.text.count("is not written") == 1 and not (tmp_path / "gone").exists()
    (tmp_path / "gone").mkdir()
    report.write()
    assert read_report(report.path)[0].steps == 2


def test_the_last_room_on_a_disk_is_left_to_models(report, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**20, 2**20))
    report.write()
    assert "1 MB are free, and the report leaves 256 MB to models and states" in caplog.text and not report.path.exists()


def test_a_fault_of_the_page_is_a_warning(report, monkeypatch, caplog):
    monkeypatch.setattr(writer, "report_page", lambda runs: json.loads("x"))
    report.end(Status.FINISHED)
    assert "is not written (Expecting value" in caplog.text and not report.path.exists()
