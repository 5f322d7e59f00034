"""networks.training.logging.tracker_config: what the tables of --log_tracker_config may say, and that all else is one sentence."""

from __future__ import annotations

import inspect

import pytest

import hv_train_network
from networks.training.logging.tracker_config import SUMMARY_WRITER, read_tracker_config
from utils.errors import UserError


@pytest.fixture
def config(tmp_path):
    """``config(text)`` -> a file of that content."""

    def write(text: str):
        path = tmp_path / "trackers.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


GOOD = """
[tensorboard]
log_dir = "runs/zörp"
purge_step = 0
max_queue = 0
flush_secs = 0.5
filename_suffix = ".night"
[wandb]
tags = ["a", "b"]
resume = "must"
reinit = true
config = { rate = 1 }
settings = { quiet = true }
something_newer = 3
"""


def test_what_the_packages_take_is_read_as_it_is(config):
    tables = read_tracker_config(config(GOOD))
    assert tables["tensorboard"].items() >= {"flush_secs": 0.5, "purge_step": 0, "log_dir": "runs/zörp"}.items()
    assert tables["wandb"]["tags"] == ["a", "b"] and tables["wandb"]["something_newer"] == 3
    assert read_tracker_config(None) == read_tracker_config(config("")) == {"tensorboard": {}, "wandb": {}}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('flush_secs = "x"', "flush_secs must be a number of seconds above 0, but it is 'x'"),
        ("flush_secs = 0", "a number of seconds above 0, but it is 0"),
        ("flush_secs = inf", "but it is inf"),
        ("flush_secs = nan", "but it is nan"),
        ("flush_secs = true", "but it is True"),
        ("flush_secs = 1e12", "but it is 1000000000000.0"),
        ('max_queue = "a"', "max_queue must be a whole number, 0 or above, but it is 'a'"),
        ("max_queue = 1.5", "but it is 1.5"),
        ("max_queue = -1", "but it is -1"),
        ("max_queue = false", "but it is False"),
        ("purge_step = [3]", "purge_step must be a whole number, 0 or above, but it is [3]"),
        ("purge_step = 9223372036854775808", "purge_step must be"),
        ("filename_suffix = 3", "filename_suffix must be a text that a file name may hold, but it is 3"),
        ('filename_suffix = "a/b"', "but it is 'a/b'"),
        ('filename_suffix = "\\u0000"', "filename_suffix must be"),
        ('log_dir = ""', "log_dir must be the path of a folder, but it is ''"),
        ('log_dir = "C:\\train"', "log_dir must be the path of a folder"),
        ("comment = 1", "comment must be a text, but it is 1"),
        ("flush_seconds = 3", "has no argument 'flush_seconds'. Did you mean 'flush_secs'? Known: log_dir, "),
    ],
)
def test_other_values_of_tensorboard_are_one_sentence(config, line, says):
    with pytest.raises(UserError) as error:
        read_tracker_config(config(f"[tensorboard]\n{line}\n"))
    assert says in str(error.value) and "trackers.toml: [tensorboard]" in str(error.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("project = 3", "project must be a text, but it is 3"),
        ('tags = "a"', "tags must be a list of texts, but it is 'a'"),
        ("tags = [1]", "tags must be a list of texts, but it is [1]"),
        ('config = "file.yaml"', "config must be a table"),
        ('save_code = "yes"', "save_code must be true or false, but it is 'yes'"),
        ("resume = 1", "resume must be true, false or a text, but it is 1"),
        ('entitty = "me"', "has no argument 'entitty'. Did you mean 'entity'? Known: entity, tags"),
    ],
)
def test_other_values_of_wandb_are_one_sentence(config, line, says):
    with pytest.raises(UserError) as error:
        read_tracker_config(config(f"[wandb]\n{line}\n"), ["entity", "tags", "project", "config", "save_code", "resume"])
    assert says in str(error.value) and "trackers.toml: [wandb]" in str(error.value)


@pytest.mark.parametrize("text", ["flush_secs = 3\n", "[tensorbord]\nflush_secs = 3\n", "tensorboard = 3\n"])
def test_other_tables_are_one_sentence(config, text):
    with pytest.raises(UserError, match=r"is no tracker's table; there are \[tensorboard\] and \[wandb\]"):
        read_tracker_config(config(text))


def test_the_arguments_of_the_writer_are_those_of_the_package():
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    assert list(inspect.signature(SummaryWriter.__init__).parameters)[1:] == list(SUMMARY_WRITER)


def test_the_writer_takes_what_passes(config, tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(**{**read_tracker_config(config(GOOD))["tensorboard"], "log_dir": str(tmp_path / "runs")}) as writer:
        writer.add_scalar("a", 1.0, 1)
    (file,) = (tmp_path / "runs").iterdir()
    assert file.name.endswith(".night")


@pytest.mark.parametrize("line", ['flush_secs = "x"', 'max_queue = "a"', "log_dir = 3"])
def test_training_ends_with_status_2_before_anything_is_loaded(train, config, tmp_path, monkeypatch, line):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(hv_train_network, "check_model_and_network", lambda *_: pytest.fail("a header was read"))
    path = config(f"[tensorboard]\n{line}\n")
    ended = train("--logging_dir", tmp_path / "logs", "--log_tracker_config", path)
    assert ended.status == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"error: --log_tracker_config {path}: [tensorboard] {line.split()[0]} must be")
    assert not (tmp_path / "logs").exists()
