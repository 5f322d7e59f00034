"""networks.training.logging.logs: what goes to TensorBoard and W&B, that secrets do not, and that training outlives its logs."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from networks.training.arguments import build_training_parser
from networks.training.logging.logs import (
    TrainingLogs,
    check_logs,
    chosen_trackers,
    hide_secret,
    open_logs,
    stored_flags,
)
from networks.training.logging.tensorboard import animation
from networks.training.samples.prompts import SamplePrompt
from networks.training.samples.sampling import DrawnSample
from utils.errors import UserError
from utils.media_writing import save_picture, save_video

CPU = torch.device("cpu")
KEY = "0123456789abcdef0123456789abcdef01234567"


def parsed(*flags: object) -> argparse.Namespace:
    return build_training_parser().parse_args([str(flag) for flag in flags])


class FakeWriter:
    """What is used of torch.utils.tensorboard.SummaryWriter."""

    opened: ClassVar[list[FakeWriter]] = []

    def __init__(self, log_dir: str, flush_secs: int = 120, max_queue: int = 10):
        self.log_dir, self.flush_secs, self.max_queue = log_dir, flush_secs, max_queue
        self.scalars: list[tuple] = []
        self.images: dict[str, Any] = {}
        self.summaries: list[Any] = []
        self.texts: dict[str, str] = {}
        self.closed = False
        self.file_writer = self
        self.opened.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_image(self, tag: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.images[tag] = (picture, step)

    def add_summary(self, summary: Any, step: int) -> None:
        self.summaries.append((summary, step))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts[tag] = text

    def close(self) -> None:
        self.closed = True


class FakeSummary:
    """The message of TensorBoard's protocol, as far as it is filled in."""

    def __init__(self, value: list[Any]):
        self.value = value

    class Value(types.SimpleNamespace):
        pass

    class Image(types.SimpleNamespace):
        pass


@pytest.fixture
def tensorboard(monkeypatch) -> list[FakeWriter]:
    """The writers that were opened."""
    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    for name in ("tensorboard", "tensorboard.compat", "tensorboard.compat.proto"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    protocol = types.ModuleType("tensorboard.compat.proto.summary_pb2")
    protocol.Summary = FakeSummary
    monkeypatch.setitem(sys.modules, protocol.__name__, protocol)
    monkeypatch.setattr(FakeWriter, "opened", [])
    return FakeWriter.opened


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
    """A package that remembers what it was asked for."""
    module = types.ModuleType("wandb")
    module.run, module.settings, module.words = FakeRun(), {}, []

    def init(**settings: Any) -> FakeRun:
        module.settings = settings
        module.key, module.words = os.environ.get("WANDB_API_KEY"), list(sys.argv)
        return module.run

    module.init = init
    module.Image = lambda path, caption: ("image", path, caption)
    module.Video = lambda path, caption, format: ("video", path, caption, format)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_API_KEY", "")  # so that what a test leaves there goes
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setattr(sys, "argv", ["hv_train_network.py"])
    return module


@pytest.fixture
def samples(tmp_path) -> list[DrawnSample]:
    """A picture and a clip of five frames, whose brightness rises."""
    frames = np.stack([np.full((32, 48, 3), 40 * index, dtype=np.uint8) for index in range(5)])
    save_picture(tmp_path / "s.png", frames[3])
    save_video(tmp_path / "s.mp4", frames, 24)
    prompt = SamplePrompt("a ball", "here")
    return [DrawnSample(tmp_path / "s.png", 0, prompt, 7), DrawnSample(tmp_path / "s.mp4", 1, prompt, 8)]


def log_a_step(logs: TrainingLogs, step: int = 3) -> None:
    logs.step(step, loss=0.5, average=0.6, rates={"unet": 1e-3, "unet plus": 4e-3}, gradient_norm=1.5, seconds=2.0)


NUMBERS = {
    "loss/current": 0.5,
    "loss/average": 0.6,
    "lr/unet": 1e-3,
    "lr/unet plus": 4e-3,
    "grad_norm": 1.5,
    "seconds_per_step": 2.0,
}


def test_tensorboard_gets_numbers_pictures_and_clips(tensorboard, samples, tmp_path):
    args = parsed("--logging_dir", tmp_path / "logs", "--log_prefix", "mine-", "--log_tracker_name", "zorp")
    check_logs(args)
    with open_logs(args, CPU) as logs:
        log_a_step(logs)
        logs.samples(samples, 3)
    (writer,) = tensorboard
    folder = Path(writer.log_dir)
    assert folder.name == "zorp" and folder.parent.name.startswith("mine-20") and folder.parent.parent == tmp_path / "logs"
    assert {tag: value for tag, value, step in writer.scalars if step == 3} == NUMBERS
    picture, step = writer.images["sample/00"]
    assert step == 3 and picture.shape == (32, 48, 3) and (picture == 120).all()
    ((summary, step),) = writer.summaries
    (value,) = summary.value
    assert step == 3 and value.tag == "sample/01" and (value.image.width, value.image.height, value.image.colorspace) == (48, 32, 3)
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as clip:
        assert clip.format == "GIF" and clip.n_frames == 3
        levels = []
        for index in range(3):
            clip.seek(index)
            levels.append(np.asarray(clip.convert("RGB")).mean())
    assert levels == pytest.approx([0, 80, 160], abs=6)
    assert writer.closed


def test_large_clips_become_small_animations(tmp_path):
    save_video(tmp_path / "c.mp4", np.zeros((9, 64, 704, 3), dtype=np.uint8), 24)
    data, width, height = animation(tmp_path / "c.mp4")
    assert (width, height) == (320, 29) and data[:3] == b"GIF"


def test_wandb_gets_numbers_pictures_clips_and_its_settings(wandb, samples, tmp_path):
    (tmp_path / "trackers.toml").write_text(
        '[wandb]\nentity = "team"\ntags = ["a"]\n[tensorboard]\nmax_queue = 1\n', encoding="utf-8"
    )
    flags = ("--log_with", "wandb", "--logging_dir", tmp_path / "logs", "--log_tracker_name", "zorp", "--wandb_run_name", "night")
    args = parsed(*flags, "--log_tracker_config", tmp_path / "trackers.toml")
    check_logs(args)
    with open_logs(args, CPU) as logs:
        log_a_step(logs)
        logs.samples(samples, 3)
    expected = {"project": "zorp", "name": "night", "entity": "team", "tags": ["a"], "dir": str(tmp_path / "logs")}
    assert wandb.settings == expected and (tmp_path / "logs").is_dir()
    assert wandb.run.logged == [
        (3, NUMBERS),
        (3, {"sample/00": ("image", str(samples[0].path), "a ball (seed 7)")}),
        (3, {"sample/01": ("video", str(samples[1].path), "a ball (seed 8)", "mp4")}),
    ]
    assert wandb.run.finished


def test_all_logs_to_both(tensorboard, wandb, tmp_path):
    args = parsed("--log_with", "all", "--logging_dir", tmp_path)
    check_logs(args)
    with open_logs(args, CPU) as logs:
        logs.numbers({"validation/loss": 0.25, "unknown": None}, 4)
    assert tensorboard[0].scalars == [("validation/loss", 0.25, 4)]
    assert wandb.run.logged == [(4, {"validation/loss": 0.25})]
    assert Path(tensorboard[0].log_dir).name == wandb.settings["project"] == "network_train"


def test_the_key_is_handed_over_and_written_nowhere(tensorboard, wandb, tmp_path, monkeypatch, caplog):
    words = ["--log_with", "all", "--logging_dir", str(tmp_path / "logs"), "--log_config", "--wandb_api_key", KEY]
    monkeypatch.setattr(sys, "argv", ["hv_train_network.py", *words, f"--wandb_api_key={KEY}"])
    monkeypatch.setenv("WANDB_API_KEY", "another")
    args = parsed(*words)
    with caplog.at_level(logging.DEBUG):
        check_logs(args)
        with open_logs(args, CPU) as logs:
            log_a_step(logs)
    assert wandb.key == KEY, "the flag counts for more than the environment"
    assert wandb.words[-2:] == ["***", "--wandb_api_key=***"]
    assert wandb.settings["config"]["log_with"] == "all" and wandb.settings["config"]["learning_rate"] == 2e-6
    assert "| learning_rate | 2e-06 |" in tensorboard[0].texts["flags"]
    told = json.dumps([wandb.settings, tensorboard[0].texts, wandb.run.logged, caplog.text, wandb.words], default=str)
    assert KEY not in told
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_flags_are_stored_only_when_asked_for(tensorboard, wandb, tmp_path):
    open_logs(parsed("--log_with", "all", "--logging_dir", tmp_path), CPU).close()
    assert "config" not in wandb.settings and not tensorboard[0].texts


def test_secrets_are_left_out_of_flags():
    args = argparse.Namespace(wandb_api_key=KEY, huggingface_token="hf_x", tokenizer1="t", path=Path("p"), steps=3, none=None)
    assert stored_flags(args) == {"path": "p", "steps": 3, "tokenizer1": "t"}


def test_hiding_without_a_secret_changes_nothing():
    words = ["a", "--b=c"]
    hide_secret(words, None)
    hide_secret(words, "")
    assert words == ["a", "--b=c"]


def test_peak_memory_of_a_cuda_device(tensorboard, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    logs = TrainingLogs(open_logs(parsed("--logging_dir", tmp_path), CPU).trackers, torch.device("cuda"))
    logs.step(1, loss=0.1, average=0.1, rates={})
    assert tensorboard[0].scalars == [("loss/current", 0.1, 1), ("loss/average", 0.1, 1), ("memory/peak_gib", 3.0, 1)]


def test_a_tracker_that_fails_is_one_warning_and_the_other_goes_on(tensorboard, wandb, tmp_path, monkeypatch, caplog):
    logs = open_logs(parsed("--log_with", "all", "--logging_dir", tmp_path), CPU)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard[0], "add_scalar", full)
    with caplog.at_level(logging.WARNING):
        log_a_step(logs, 1)
        log_a_step(logs, 2)
    assert caplog.text.count("No space left on device") == 1 and "tensorboard fails" in caplog.text
    assert [step for step, _ in wandb.run.logged] == [1, 2]
    logs.close()
    assert wandb.run.finished


def test_a_sample_that_cannot_be_logged_is_a_warning_and_no_more(tensorboard, samples, tmp_path, caplog):
    logs = open_logs(parsed("--logging_dir", tmp_path), CPU)
    samples[0].path.unlink()
    samples[1].path.write_bytes(b"no video")
    with caplog.at_level(logging.WARNING):
        logs.samples(samples, 1)
    assert caplog.text.count("training goes on") == 2
    log_a_step(logs)
    assert tensorboard[0].scalars


def test_closing_that_fails_is_a_warning(wandb, monkeypatch, caplog):
    logs = open_logs(parsed("--log_with", "wandb"), CPU)
    monkeypatch.setattr(wandb.run, "finish", lambda: 1 / 0)
    with caplog.at_level(logging.WARNING):
        logs.close()
    assert "division by zero" in caplog.text
    logs.close()


def test_nothing_is_opened_without_flags_or_on_other_processes(tensorboard, wandb, tmp_path):
    args = parsed()
    check_logs(args)
    for logs in (
        open_logs(args, CPU),
        open_logs(parsed("--log_with", "all", "--logging_dir", tmp_path / "logs"), CPU, main_process=False),
    ):
        log_a_step(logs)
        logs.samples([], 1)
        logs.close()
    assert not tensorboard and not wandb.settings and not list(tmp_path.iterdir())


def test_opening_leaves_random_state_alone(wandb, monkeypatch):
    torch.manual_seed(4)
    expected = torch.rand(1).item()
    torch.manual_seed(4)
    monkeypatch.setattr(wandb, "init", lambda **_settings: torch.rand(3) is None or wandb.run)
    open_logs(parsed("--log_with", "wandb"), CPU)
    assert torch.rand(1).item() == expected


def test_a_tracker_that_refuses_to_begin_is_told_without_the_key(wandb, tmp_path, monkeypatch):
    def refuses(**_settings: Any) -> None:
        raise RuntimeError(f"the key {KEY} is not valid.\nTry again")

    monkeypatch.setattr(wandb, "init", refuses)
    with pytest.raises(UserError, match=r"--log_with wandb cannot begin: the key \*\*\* is not valid\. Mend that") as error:
        open_logs(parsed("--log_with", "wandb", "--wandb_api_key", KEY), CPU)
    assert KEY not in str(error.value)


def test_an_unknown_option_of_a_tracker_is_told(tensorboard, tmp_path):
    (tmp_path / "t.toml").write_text("[tensorboard]\nflush_seconds = 3\n", encoding="utf-8")
    with pytest.raises(UserError, match="flush_seconds"):
        open_logs(parsed("--logging_dir", tmp_path / "logs", "--log_tracker_config", tmp_path / "t.toml"), CPU)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--log_with", "tensorboard"), "--log_with tensorboard needs --logging_dir"),
        (("--log_with", "all"), "--log_with all needs --logging_dir"),
        (("--log_with", "wandb", "--wandb_api_key", " "), "--wandb_api_key is empty"),
        (("--log_with", "wandb", "--logging_dir", "file/below"), "--logging_dir"),
        (("--log_with", "wandb", "--log_tracker_config", "none.toml"), "none.toml does not exist"),
        (("--log_with", "wandb", "--log_tracker_config", "bad.toml"), "'wandbb' is no tracker's table"),
    ],
)
def test_flags_that_are_refused(tensorboard, wandb, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way", encoding="utf-8")
    Path("bad.toml").write_text("[wandbb]\nentity = 1\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        check_logs(parsed(*flags))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("flags", "missing", "says"),
    [
        (("--logging_dir", "logs"), "torch.utils.tensorboard", "pip install tensorboard"),
        (("--log_with", "wandb"), "wandb", "pip install wandb"),
    ],
)
def test_a_package_that_is_missing_is_told_with_what_to_install(monkeypatch, tmp_path, flags, missing, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)  # what makes an import fail
    with pytest.raises(UserError, match=says):
        check_logs(parsed(*flags))


def test_the_folder_that_wandb_leaves_is_not_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(UserError, match="a folder called wandb"):
        check_logs(parsed("--log_with", "wandb"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--log_prefix", "x", "--log_config"), "--log_prefix, --log_config: no effect without --log_with or --logging_dir"),
        (
            ("--logging_dir", "logs", "--wandb_run_name", "x", "--log_config"),
            "--wandb_run_name: no effect without --log_with wandb",
        ),
    ],
)
def test_flags_without_effect_are_a_warning(tensorboard, tmp_path, monkeypatch, caplog, flags, says):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        check_logs(parsed(*flags))
    assert says in caplog.text


def test_which_trackers_are_chosen():
    assert chosen_trackers(parsed()) == ()
    assert chosen_trackers(parsed("--logging_dir", "x")) == ("tensorboard",)
    assert chosen_trackers(parsed("--log_with", "wandb")) == ("wandb",)
    assert chosen_trackers(parsed("--log_with", "all")) == ("tensorboard", "wandb")


def test_real_tensorboard_files_hold_numbers_pictures_and_clips(samples, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = parsed("--logging_dir", tmp_path / "logs", "--log_config")
    check_logs(args)
    with open_logs(args, CPU) as logs:
        log_a_step(logs)
        logs.samples(samples, 3)
    (file,) = (tmp_path / "logs").rglob("events.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == pytest.approx(NUMBERS)
    assert set(events.Tags()["images"]) == {"sample/00", "sample/01"}
    assert events.Images("sample/01")[0].encoded_image_string[:3] == b"GIF"
