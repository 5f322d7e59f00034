"""Uploads to the Hugging Face hub and states from there; the hub itself is a stand-in, nothing is sent."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from utils import hub


class StandIn:
    """Notes what it is asked; ``broken`` methods fail."""

    def __init__(self, copy: Path | None = None, broken: tuple[str, ...] = ()) -> None:
        self.copy, self.broken, self.calls = copy, broken, []

    def _note(self, method: str, result: object, *arguments: object, **options: object):
        self.calls.append((method, arguments, options))
        error = ConnectionError("no network here") if method in self.broken else None
        if options.get("run_as_future"):
            future: Future = Future()
            future.set_result(result) if error is None else future.set_exception(error)
            return future
        if error is not None:
            raise error
        return result

    def create_repo(self, *arguments, **options):
        return self._note("create_repo", None, *arguments, **options)

    def upload_file(self, **options):
        assert Path(options["path_or_fileobj"]).is_file()
        return self._note("upload_file", None, **options)

    def upload_folder(self, **options):
        assert Path(options["folder_path"]).is_dir()
        return self._note("upload_folder", None, **options)

    def snapshot_download(self, *arguments, **options):
        return self._note("snapshot_download", str(self.copy), *arguments, **options)

    def uploaded(self) -> list[str]:
        return [options["path_in_repo"] for method, _, options in self.calls if method.startswith("upload")]


@pytest.fixture
def stand_in(monkeypatch, tmp_path: Path):
    """``stand_in(broken=...)`` takes the place of the hub; the token it is asked with is noted."""

    def arrange(**options) -> StandIn:
        api = StandIn(**options)
        monkeypatch.setattr(hub, "hub_api", lambda token: setattr(api, "token", token) or api)
        return api

    return arrange


REPO = ("--huggingface_repo_id", "me/loras", "--huggingface_token", "hf_secret")


@pytest.mark.parametrize("background", [(), ("--async_upload",)])
def test_every_model_and_state_is_uploaded(train, stand_in, tmp_path: Path, background: tuple) -> None:
    api = stand_in()
    flags = ("--max_train_steps", 3, "--save_every_n_steps", 2, "--save_state", "--save_state_to_huggingface")
    ended = train(*flags, *REPO, "--huggingface_path_in_repo", "faces/", *background)
    assert ended.status == 0, ended.stderr
    # At the end the state comes first: the model says that everything is done.
    during, end = (
        ["lora-step00000002.safetensors", "lora-step00000002-state"],
        ["lora-state", "lora.safetensors", "lora_comfyui.safetensors"],
    )
    assert api.uploaded() == [f"faces/{name}" for name in (*during, *end)]
    assert api.calls[0] == ("create_repo", ("me/loras",), {"repo_type": "model", "private": True, "exist_ok": True})
    assert api.token == "hf_secret"
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written and not any(b"hf_secret" in path.read_bytes() for path in written)


def test_what_is_being_uploaded_is_removed_afterwards(train, stand_in, tmp_path: Path) -> None:
    class Slow(Future):
        """An upload that reads its file only when somebody waits for it."""

        def __init__(self, place: str) -> None:
            super().__init__()
            self.place = place

        def result(self, timeout: float | None = None) -> None:
            read.append((self.place, Path(self.place).exists()))

    api, read = stand_in(), []
    api.upload_file = lambda *, path_or_fileobj, **_: Slow(path_or_fileobj)
    api.upload_folder = lambda *, folder_path, **_: Slow(folder_path)
    flags = ("--save_every_n_steps", 1, "--save_last_n_steps", 1, "--save_state", "--save_state_to_huggingface")
    ended = train("--max_train_steps", 5, *flags, *REPO, "--async_upload")
    assert ended.status == 0, ended.stderr
    assert len(read) == 11  # five models with their states, and the copy for ComfyUI
    assert all(there for _, there in read)
    assert not (tmp_path / "out" / "lora-step00000001.safetensors").exists()


@pytest.mark.parametrize("background", [(), ("--async_upload",)])
def test_a_failed_upload_does_not_end_the_training(train, stand_in, tmp_path: Path, caplog, background) -> None:
    stand_in(broken=("upload_file",))
    ended = train("--max_train_steps", 2, *REPO, *background)
    assert ended.status == 0 and "was not uploaded to me/loras" in caplog.text
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_a_repository_that_cannot_be_used_is_refused_before_anything_loads(train, stand_in, monkeypatch) -> None:
    stand_in(broken=("create_repo",))
    monkeypatch.setattr("hunyuan_model.load_transformer", lambda *_a, **_k: pytest.fail("the model was loaded"))
    ended = train("--max_train_steps", 2, *REPO)
    assert ended.status == 2 and "me/loras cannot be used (ConnectionError: no network here)" in ended.stderr


def test_a_state_on_the_hub_is_resumed(train, stand_in, tmp_path: Path) -> None:
    flags = ("--max_train_steps", 4, "--learning_rate", 1e-2, "--network_dropout", 0.2)
    assert train(*flags, "--save_every_n_steps", 2, "--save_state").status == 0
    api = stand_in(copy=tmp_path)
    place = "me/loras/out/lora-step00000002-state:v1:dataset"
    ended = train(*flags, "--resume", place, "--resume_from_huggingface", name="again")
    assert ended.status == 0, ended.stderr
    (call,) = [call for call in api.calls if call[0] == "snapshot_download"]
    assert call[1:] == (
        ("me/loras",),
        {"revision": "v1", "repo_type": "dataset", "allow_patterns": "out/lora-step00000002-state/*"},
    )
    first, second = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("lora", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_that_is_not_there_is_refused(train, stand_in) -> None:
    stand_in(broken=("snapshot_download",))
    ended = train("--resume", "me/loras/x-state", "--resume_from_huggingface")
    assert ended.status == 2 and "cannot be fetched from the hub" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--async_upload",), "--huggingface_repo_id"),
        (("--huggingface_repo_visibility", "public"), "--huggingface_repo_id"),
        ((*REPO, "--save_state_to_huggingface"), "--save_state"),
        (("--resume_from_huggingface",), "--resume OWNER/NAME/FOLDER"),
        (("--resume_from_huggingface", "--resume", "latest"), "--resume OWNER/NAME/FOLDER"),
    ],
)
def test_flags_without_their_partners_are_refused(train, flags: tuple, says: str) -> None:
    ended = train(*flags)
    assert ended.status == 2 and says in ended.stderr
