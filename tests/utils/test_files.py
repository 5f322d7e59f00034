"""What is said of paths that are not the files or folders they should be."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from pathlib import Path

import pytest

from utils import files
from utils.errors import UserError
from utils.files import (
    atomic_folder,
    atomic_path,
    final_of_temporary,
    is_temporary,
    remove_folder,
    require_file,
    require_writable_folder,
)
from utils.toml_files import read_toml


def test_a_file_a_folder_and_nothing(tmp_path):
    file = tmp_path / "a.txt"
    file.touch()
    assert require_file(file, "the list") == file
    with pytest.raises(UserError, match=r"the list must be a file, but .* is a folder"):
        require_file(tmp_path, "the list")
    with pytest.raises(UserError, match="the list not found"):
        require_file(tmp_path / "none", "the list")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_no_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match=r"the list must be a file, but .* is not a regular file"):
            require_file(path, "the list")


def test_a_writable_folder_need_not_exist_and_is_not_made(tmp_path):
    assert require_writable_folder(tmp_path / "a" / "b", "--output_dir") == tmp_path / "a" / "b"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .*below cannot be written to .*is a file"):
        require_writable_folder(tmp_path / "file" / "below", "--output_dir")


@pytest.mark.parametrize(
    ("operation", "number", "what"),
    [("chmod", errno.EPERM, "permissions"), ("fsync", errno.EINVAL, "flushing"), ("replace", errno.EPERM, "renaming")],
)
def test_mounts_that_lack_an_operation_are_written_with_one_warning(tmp_path, monkeypatch, caplog, operation, number, what):
    def lacking(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setattr(os, operation, lacking)
    require_writable_folder(tmp_path, "--output_dir")
    assert what in caplog.text, "it is known before anything is saved"
    for content in ("first", "second"):
        with atomic_path(tmp_path / "lora.safetensors") as temporary:
            temporary.write_text(content)
        assert (tmp_path / "lora.safetensors").read_text() == content
        with atomic_folder(tmp_path / "state") as folder:
            (folder / content).touch()
        assert [path.name for path in (tmp_path / "state").iterdir()] == [content]
    remove_folder(tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if is_temporary(path)] == []
    assert len(caplog.records) == 1


def test_a_full_disk_is_no_missing_operation(tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written to"):
        require_writable_folder(tmp_path, "--output_dir")
    assert not list(tmp_path.iterdir())


def test_temporary_names_are_told_from_hidden_files(tmp_path):
    for name in ("a.safetensors", "no_suffix"):
        with atomic_path(tmp_path / name) as temporary:
            assert is_temporary(temporary)
    for name in (".hidden.safetensors", ".tmp", "a.01234567.tmp", ".0123456.tmp", ".01234567.tmpfile"):
        assert not is_temporary(Path(name))


def test_what_is_written_by_way_of_another_temporary_file_keeps_the_final_name(tmp_path):
    """A network that writes its file whole by itself leaves, when it is killed, nothing that nobody knows."""
    with atomic_path(tmp_path / "lora.safetensors", keep_name=True) as outer, atomic_path(outer) as inner:
        assert final_of_temporary(inner) == final_of_temporary(outer) == "lora.safetensors"
        assert inner.name != outer.name
        inner.write_bytes(b"all of it")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    assert (tmp_path / "lora.safetensors").read_bytes() == b"all of it"


def test_a_folder_whose_removal_is_interrupted_is_gone_under_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "lora-state"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).touch()

    def interrupted(path: Path) -> None:
        (path / "a").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", interrupted)
        remove_folder(folder)
    assert [final_of_temporary(path) for path in tmp_path.iterdir()] == ["lora-state"]
    folder.mkdir()
    remove_folder(folder)
    assert not folder.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_what_is_being_written_is_private_until_it_is_whole(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "lora.safetensors") as temporary:
            temporary.write_bytes(b"some of it")
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        with atomic_folder(tmp_path / "state") as temporary:
            (temporary / "state.json").touch()
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"lora.safetensors": 0o640, "state": 0o750}


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.uuid, "uuid4", lambda: uuid.UUID(int=0))
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".00000000.tmp.txt").symlink_to(tmp_path / "new")
    with pytest.raises(UserError, match="cannot write"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert not (tmp_path / "new").exists() and (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("key", ["a" + ".a" * 50_000, '"a"' + '."a b"' * 50_000, "a " + ". 'b' " * 50_000])
def test_keys_without_end_do_not_keep_the_parser_busy(tmp_path, key):
    (tmp_path / "a.toml").write_text(f"{key} = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.toml is not valid TOML: it has a key of more than 99 parts"):
        read_toml(tmp_path / "a.toml")


def test_texts_of_great_size_are_refused(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"#" * ((4 << 20) + 1))
    with pytest.raises(UserError, match=r"TOML file .*a\.toml is larger than 4096 KB"):
        read_toml(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('a.b = "' + "word. " * 100_000 + '"\n', encoding="utf-8")
    assert read_toml(tmp_path / "a.toml")["a"]["b"].startswith("word. word.")
