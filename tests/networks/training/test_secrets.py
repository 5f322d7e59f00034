"""Keys and tokens of a training are in nothing that it writes or says, whichever way they come and however it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from networks.training import loop
from utils import startup

KEYS = {"wandb_api_key": "0123-no-real-key-of-wandb", "huggingface_token": "hf_no-real-token-of-the-hub"}


@pytest.fixture(params=["flags", "file", "environment"])
def secret_flags(request, monkeypatch, tmp_path) -> list[object]:
    """The keys as flags, in --config_file, or in the environment."""
    if request.param == "flags":
        return [word for name, key in KEYS.items() for word in (f"--{name}", key)]
    if request.param == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEYS["wandb_api_key"])
        monkeypatch.setenv("HF_TOKEN", KEYS["huggingface_token"])
        return []
    path = tmp_path / "flags.toml"
    path.write_text("".join(f"{name} = {key!r}\n" for name, key in KEYS.items()), encoding="utf-8")
    return ["--config_file", path]


def require_none(folder: Path, *texts: str) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file() and path.name != "flags.toml"):
        assert not any(key.encode() in path.read_bytes() for key in KEYS.values()), path
    assert not any(key in text for key in KEYS.values() for text in texts)


def test_a_training_writes_and_says_none(train, secret_flags, tmp_path):
    pytest.importorskip("tensorboard")
    logs = ("--logging_dir", tmp_path / "logs", "--log_config", "--loss_log", tmp_path / "loss.csv")
    ended = train("--max_train_steps", 2, "--save_every_n_steps", 1, "--save_state", *logs, *secret_flags)
    assert ended.status == 0 and len(list(tmp_path.rglob("*-state"))) == 2 and list(tmp_path.rglob("events.*"))
    require_none(tmp_path, ended.stdout, ended.stderr)


def test_an_error_and_a_traceback_hold_none(train, secret_flags, monkeypatch, tmp_path, capsys):
    def fails(*_: object) -> None:
        raise ValueError(f"the library says {' and '.join(KEYS.values())}")

    monkeypatch.setattr(loop, "train_step", fails)
    with pytest.raises(ValueError) as error:
        train("--max_train_steps", 1, *secret_flags)
    startup.sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr()
    assert "the library says *** and ***" in said.err and "Traceback" in said.err
    require_none(tmp_path, said.out, said.err)
