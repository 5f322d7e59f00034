"""Logs: what goes to TensorBoard and W&B, that secrets do not, and that training outlives its logs."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hunyuan_model.sampling.generation import SamplingSettings
from networks.generation.requests import Request
from networks.training.logging.logs import LogSettings, TrainingLogs, check_logs, open_logs
from networks.training.samples.sampling import SavedSample
from utils.cli.arguments import hide_secrets, public_flags
from utils.errors import UserError
from utils.media.writing import save_picture, save_video
from utils.output import keep_secret, visible

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

CPU = torch.device("cpu")
KEY = "0123456789abcdef0123456789abcdef01234567"
NUMBERS = {
    "loss/current": 0.5,
    "loss/average": 0.6,
    "lr/unet": 1e-3,
    "lr/unet plus": 4e-3,
    "grad_norm": 1.5,
    "seconds_per_step": 2.0,
}


def log_a_step(logs: TrainingLogs, step: int = 3) -> None:
    logs.step(step, loss=0.5, average=0.6, rates={"unet": 1e-3, "unet plus": 4e-3}, gradient_norm=1.5, seconds=2.0)


def events_in(folder: Path):
    """All that TensorBoard shows of the one run under ``folder``, and the run's folder."""
    (run,) = {file.parent for file in folder.rglob("events.*")}
    return accumulator.EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload(), run


class FakeRun:
    id = "run1"

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.finished = False

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> types.ModuleType:
    """In place of the package: it keeps the options of ``init``, the key and the command line of that moment."""
    module = types.ModuleType("wandb")
    module.run, module.options, module.stored = FakeRun(), {}, {}

    def init(*, project: str, name: str = "", entity: str = "", tags: tuple = (), dir: str = "", id: str = "", resume: str = ""):
        given = {"project": project, "name": name, "entity": entity, "tags": tags, "dir": dir, "id": id, "resume": resume}
        module.options = {name: value for name, value in given.items() if value}
        module.key, module.words = os.environ.get("WANDB_API_KEY"), list(sys.argv)
        return module.run

    module.init = init
    module.config = types.SimpleNamespace(update=lambda values, allow_val_change: module.stored.update(values))
    module.Image = lambda path, caption: ("image", path, caption)
    module.Video = lambda path, caption, format: ("video", path, caption, format)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_API_KEY", "another")
    return module


@pytest.fixture
def samples(tmp_path) -> list[SavedSample]:
    """A picture and a clip of five frames, whose brightness rises."""
    frames = np.stack([np.full((64, 704, 3), 40 * index, dtype=np.uint8) for index in range(5)])
    save_picture(tmp_path / "s.png", frames[3])
    save_video(tmp_path / "s.mp4", frames, 24)
    prompt = Request("a ball", SamplingSettings(seed=7))
    return [SavedSample(tmp_path / "s.png", 0, prompt), SavedSample(tmp_path / "s.mp4", 1, prompt)]


def levels_of(gif: bytes) -> list[float]:
    """The mean brightness of each frame."""
    with Image.open(io.BytesIO(gif)) as clip:
        assert clip.format == "GIF"
        found = []
        for index in range(clip.n_frames):
            clip.seek(index)
            found.append(np.asarray(clip.convert("RGB")).mean())
    return found


def test_tensorboard_gets_numbers_pictures_and_clips(samples, tmp_path):
    settings = LogSettings(str(tmp_path / "logs"), log_prefix="mine-", log_tracker_name="zorp")
    check_logs(settings)
    with open_logs(settings, CPU, flags={"steps": 3}) as logs:
        log_a_step(logs)
        logs.samples(samples, 3)
    events, folder = events_in(tmp_path / "logs")
    assert folder.name == "zorp" and folder.parent.name.startswith("mine-20") and folder.parent.parent == tmp_path / "logs"
    tags = events.Tags()
    assert {tag: events.Scalars(tag)[0].value for tag in tags["scalars"]} == pytest.approx(NUMBERS)
    assert not tags["tensors"], "flags are stored with --log_config only"
    picture, clip = (events.Images(f"sample/0{index}")[0] for index in (0, 1))
    assert picture.step == clip.step == 3 and (clip.width, clip.height) == (320, 29)
    assert (np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))) == 120).all()
    assert levels_of(clip.encoded_image_string) == pytest.approx([0, 80, 160], abs=6)


def test_wandb_gets_numbers_pictures_clips_and_its_options(wandb, samples, tmp_path):
    table = '[wandb]\nentity = "team"\ntags = ["a"]\n[tensorboard]\nmax_queue = 1\n'
    (tmp_path / "trackers.toml").write_text(table, encoding="utf-8")
    settings = LogSettings(
        str(tmp_path / "logs"),
        log_with="wandb",
        log_tracker_name="zorp",
        log_tracker_config=str(tmp_path / "trackers.toml"),
        wandb_run_name="night",
    )
    check_logs(settings)
    with open_logs(settings, CPU, flags={"steps": 3}) as logs:
        log_a_step(logs)
        logs.samples(samples, 3)
    assert wandb.options == {"project": "zorp", "name": "night", "entity": "team", "tags": ["a"], "dir": str(tmp_path / "logs")}
    assert wandb.run.logged == [
        (3, NUMBERS),
        (3, {"sample/00": ("image", str(samples[0].path), "a ball (seed 7)")}),
        (3, {"sample/01": ("video", str(samples[1].path), "a ball (seed 7)", "mp4")}),
    ]
    assert wandb.run.finished and not wandb.stored


def test_secrets_are_written_nowhere(wandb, tmp_path, monkeypatch, caplog):
    words = ["--wandb_api_key", KEY, f"--wandb_api_key={KEY}", "--huggingface_token=hf_x", "--output_name", "a"]
    monkeypatch.setattr(sys, "argv", ["hv_train_network.py", *words])
    args = argparse.Namespace(wandb_api_key=KEY, huggingface_token="hf_x", tokenizer1="t", path=Path("p"), steps=3, none=None)
    settings = LogSettings(str(tmp_path / "logs"), log_with="all", log_config=True, wandb_api_key=KEY)
    with caplog.at_level(logging.DEBUG):
        hide_secrets(words)
        check_logs(settings)
        with open_logs(settings, CPU, flags=public_flags(args)) as logs:
            log_a_step(logs)
    assert wandb.key == KEY, "the flag counts for more than the environment"
    assert wandb.words[1:] == ["--wandb_api_key", "***", "--wandb_api_key=***", "--huggingface_token=***", "--output_name", "a"]
    assert wandb.stored == {"path": "p", "steps": 3, "tokenizer1": "t", "none": "None"}
    events, _ = events_in(tmp_path / "logs")
    assert b"| steps | 3 |" in events.Tensors("flags/text_summary")[0].tensor_proto.string_val[0]
    logged = json.dumps([repr(settings), wandb.options, wandb.stored, wandb.run.logged, caplog.text, wandb.words], default=str)
    assert KEY not in logged
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_peak_memory_of_a_cuda_device(wandb, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    logs = open_logs(LogSettings(log_with="wandb"), CPU)
    logs.device = torch.device("cuda")
    logs.step(1, loss=0.1, average=0.1, rates={})
    assert wandb.run.logged == [(1, {"loss/current": 0.1, "loss/average": 0.1, "memory/peak_gib": 3.0})]


def test_a_tracker_that_fails_is_one_warning_and_the_other_goes_on(wandb, tmp_path, monkeypatch, caplog):
    logs = open_logs(LogSettings(str(tmp_path), log_with="all"), CPU)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs.trackers[0].writer, "add_scalar", full)
    with caplog.at_level(logging.WARNING):
        log_a_step(logs, 1)
        log_a_step(logs, 2)
        assert caplog.text.count("No space left on device") == 1 and "tensorboard fails" in caplog.text
        assert [step for step, _ in wandb.run.logged] == [1, 2]
        monkeypatch.setattr(wandb.run, "finish", lambda: 1 / 0)
        logs.close()
        logs.close()
    assert caplog.text.count("division by zero") == 1


def test_a_sample_that_cannot_be_logged_is_a_warning_and_no_more(samples, tmp_path, caplog):
    logs = open_logs(LogSettings(str(tmp_path / "logs")), CPU)
    samples[0].path.unlink()
    samples[1].path.write_bytes(b"no video")
    with caplog.at_level(logging.WARNING):
        logs.samples(samples, 1)
    assert caplog.text.count("training continues") == 2
    log_a_step(logs)
    logs.close()
    assert events_in(tmp_path / "logs")[0].Tags()["scalars"]


def test_nothing_is_opened_without_flags_or_on_other_processes(wandb, tmp_path):
    check_logs(LogSettings())
    for logs in (
        open_logs(LogSettings(), CPU),
        open_logs(LogSettings(str(tmp_path / "logs"), log_with="all"), CPU, main_process=False),
    ):
        log_a_step(logs)
        logs.close()
    assert not wandb.options and not list(tmp_path.iterdir())


def test_opening_leaves_random_state_alone(wandb, monkeypatch):
    state = torch.get_rng_state()
    monkeypatch.setattr(wandb, "init", lambda **_options: torch.rand(3) is None or wandb.run)
    open_logs(LogSettings(log_with="wandb"), CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tracker_that_refuses_to_begin_is_one_sentence_without_the_key(wandb, tmp_path, monkeypatch):
    (tmp_path / "t.toml").write_text('[wandb]\nentitty = "me"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"--log_with wandb cannot begin: .*entitty"):
        open_logs(LogSettings(log_with="wandb", log_tracker_config=str(tmp_path / "t.toml")), CPU)
    (tmp_path / "t.toml").write_text("[tensorboard]\nflush = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--log_with tensorboard cannot begin: .*'flush'"):
        open_logs(LogSettings(str(tmp_path), log_tracker_config=str(tmp_path / "t.toml")), CPU)
    with pytest.raises(UserError, match=r"--logging_dir .*t\.toml"):
        open_logs(LogSettings(str(tmp_path / "t.toml")), CPU)

    def refuses(**_options: Any) -> None:
        raise RuntimeError(f"the key {KEY} is not valid.\nTry again")

    monkeypatch.setattr(wandb, "init", refuses)
    keep_secret(KEY)
    with pytest.raises(UserError) as error:
        open_logs(LogSettings(log_with="wandb", wandb_api_key=KEY), CPU)
    assert "--log_with wandb cannot begin: the key *** is not valid. Solve that" in visible(str(error.value))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"log_with": "all"}, "--log_with all needs --logging_dir"),
        ({"log_with": "wandb", "wandb_api_key": " "}, "--wandb_api_key is empty"),
        ({"log_with": "wandb", "log_tracker_config": "none.toml"}, "none.toml does not exist"),
        ({"log_with": "wandb", "log_tracker_config": "bad.toml"}, "'wandbb' is no tracker's table"),
        (
            {"logging_dir": "logs", "log_tracker_config": "text.toml"},
            "flush_secs must be a number from 0 to",
        ),
    ],
)
def test_flags_that_are_refused(wandb, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("[wandbb]\nentity = 1\n", encoding="utf-8")
    Path("text.toml").write_text("[tensorboard]\nflush_secs = 'x'\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        check_logs(LogSettings(**flags))
    assert says in str(error.value)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch, tmp_path, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        check_logs(LogSettings(str(tmp_path), log_with=name))


def test_flags_without_effect_are_named():
    assert LogSettings(log_prefix="x", log_config=True).without_effect() == [
        "--log_prefix, --log_config: no effect without --log_with or --logging_dir."
    ]
    only_tensorboard = LogSettings("logs", wandb_run_name="x", log_config=True)
    assert only_tensorboard.without_effect() == ["--wandb_run_name: no effect without --log_with wandb."]
    assert LogSettings("logs", log_with="all", wandb_run_name="x").without_effect() == []


def test_the_arguments_of_tensorboard_are_those_of_its_writer(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text('[tensorboard]\npurge_step = 0\nflush_secs = 0.5\nfilename_suffix = ".n"\n', encoding="utf-8")
    open_logs(LogSettings(str(tmp_path / "logs"), log_tracker_config=str(path)), CPU).close()
    assert [file.suffix for file in (tmp_path / "logs").rglob("events.*")] == [".n"]
