"""hv_train_network.py and its report: what stands in it, however the training ends and whenever it goes on."""

from __future__ import annotations

import csv
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest

from networks.training import loop, run
from networks.training.report.reading import read_report
from networks.training.report.record import RunRecord, Status

FLAGS = ("--max_train_steps", 7, "--learning_rate", 1e-2, "--network_dim", 2)
STATES = ("--save_state", "--save_every_n_steps", 2)


@pytest.fixture
def report(tmp_path):
    """``report(name="report.html")``: the training in the output folder."""
    return lambda name="report.html": read_report(tmp_path / "out" / name)[0]


def losses(record: RunRecord) -> dict[int, float]:
    return dict(zip(record.curves["loss/current"].steps, record.curves["loss/current"].values))


def test_a_finished_training(train, report, tmp_path):
    config = tmp_path / "flags.toml"
    config.write_text("[x]\nnetwork_alpha = 2\ntraining_comment = 'a \"b'\n", encoding="utf-8")
    flags = ("--loss_log", tmp_path / "loss.csv", "--config_file", config, "--validation_split", 0.3, "--wandb_api_key", "s3cret9")
    assert train(*FLAGS, *flags).status == 0
    record = report()
    with open(tmp_path / "loss.csv", encoding="utf-8") as file:
        logged = {int(row["step"]): np.float32(row["loss"]) for row in csv.DictReader(file)}
    assert (record.status, record.steps, record.planned_steps, record.reason) == (Status.FINISHED, 7, 7, "")
    assert losses(record) == logged and len(logged) == 7
    names = {"loss/average", "loss/validation", "grad_norm", "seconds_per_step", "update/relative_norm", "memory/resident_gib"}
    assert names < record.curves.keys() and any(name.startswith("lr/") for name in record.curves)
    assert "32x32" in record.table and len(record.data) == 2 and record.flags["network_alpha"] == 2
    assert record.hardware.keys() >= {"CPU", "RAM", "system"} and record.versions.keys() >= {"torch", "accelerate", "python"}
    files = {written.readers: (written.file, written.checked) for written in record.written}
    count = files["ComfyUI"][1].split()
    assert files["this project"][0] == "lora.safetensors" and files["ComfyUI"][0] == "lora_comfyui.safetensors"
    assert count[1] == "of" and count[0] == count[2] != "0" and "0 of" in files["diffusers"][1], "it is not 3072 wide"
    words = shlex.split(record.command)
    assert words[:2] == ["python", "hv_train_network.py"] and words[words.index("--seed") + 1] == "3"
    assert "--config_file" not in words and words[words.index("--training_comment") + 1] == 'a "b'
    assert "s3cret9" not in (tmp_path / "out" / "report.html").read_text("utf-8") and "--wandb_api_key" not in words


def test_the_command_makes_the_same_training_again(train, call_script, report, monkeypatch, tmp_path):
    from accelerate.state import AcceleratorState

    assert train(*FLAGS, "--network_args", "rank_dropout=0.2").status == 0
    first = report()
    AcceleratorState._reset_state(reset_partial_state=True)
    words = shlex.split(first.command)[2:]
    assert call_script("hv_train_network", *words).status == 0
    assert losses(report()) == losses(first) and losses(report("lora_report.html")) == losses(first)


def test_it_goes_on_where_the_state_is(train, report, tmp_path, monkeypatch):
    """Killed during step 6, it goes on from step 4; every step stands there once, with the values of a run that nobody stopped."""
    assert train(*FLAGS, *STATES, name="whole").status == 0
    whole, made, plain = report(), [], loop.train_step

    def dies(*arguments: object) -> object:
        made.append(1)
        if len(made) == 6:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(loop, "train_step", dies)
    monkeypatch.setattr(run.TrainingReport, "end", lambda *_: None)  # as a kill leaves it
    assert train(*FLAGS, *STATES).status == 130
    killed = report()
    assert (killed.status, killed.steps) == (Status.RUNNING, 4)
    assert report("whole_report.html").steps == 7
    monkeypatch.undo()
    assert train(*FLAGS, *STATES, "--resume", "latest").status == 0
    record = report()
    assert (record.session_id, record.started_at) == (killed.session_id, killed.started_at)
    assert losses(record) == losses(whole) and list(losses(record)) == [1, 2, 3, 4, 5, 6, 7]
    assert record.status == Status.FINISHED and "--resume" not in record.command


def test_how_it_ended(train, report, monkeypatch, tmp_path):
    plain = loop.train_step

    def after(then) -> None:
        monkeypatch.setattr(loop, "train_step", lambda *arguments: (plain(*arguments), then())[0])

    after(lambda: signal.raise_signal(signal.SIGTERM))
    assert train(*FLAGS).status == 143
    assert (report().status, report().steps) == (Status.STOPPED, 1) and report().reason.startswith("SIGTERM or SIGHUP stopped it")
    after((tmp_path / "out" / "save_and_stop").touch)
    assert train(*FLAGS).status == 0
    assert (report().status, report().reason) == (Status.STOPPED, "The file save_and_stop in the output folder stopped it.")

    def fails() -> None:
        raise RuntimeError("the device\nis lost")

    after(fails)
    with pytest.raises(RuntimeError):
        train(*FLAGS)
    assert (report().status, report().reason) == (Status.FAILED, "the device")


def test_a_damaged_report_is_no_reason_not_to_train(train, report, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_bytes(b"\xff" * 1000)
    assert train(*FLAGS).status == 0 and report().steps == 7
    assert Path(tmp_path / "out" / "earlier_report.html").read_bytes() == b"\xff" * 1000
