"""Locks of runs: of processes that live, that have ended, that are elsewhere, and on mounts that lack exclusive files."""

from __future__ import annotations

import builtins
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from variations import slow_but

from utils.errors import UserError
from utils.processes import locks
from utils.processes.locks import Holder, sole_run, start_of

HOLDS = """
import sys, time
from pathlib import Path
from utils.errors import run_script
from utils.processes.locks import sole_run

def main():
    with sole_run(Path(sys.argv[1]), "trains a", "give another"):
        print("holds", flush=True)
        {work}

run_script(main)
"""


@pytest.fixture
def other_process():
    """``start(path, work)``: a process that holds the lock by now."""
    started = []

    def start(path: Path, work: str = "time.sleep(60)") -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLDS.format(work=work), path], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "holds\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def take(path: Path) -> None:
    with sole_run(path, "trains a", "give another --output_name"):
        assert path.is_file()


def write(path: Path, holder: Holder, age: float = 0) -> None:
    path.write_text(json.dumps(asdict(holder)), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)


def test_a_lock_and_the_folders_that_were_made_for_it_go_at_the_end(tmp_path):
    take(tmp_path / "new" / "below" / ".a.lock")
    with suppress(ZeroDivisionError), sole_run(tmp_path / ".a.lock", "trains a", "give another"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    with sole_run(tmp_path / "new" / ".a.lock", "trains a", "give another"):
        (tmp_path / "new" / "lora.safetensors").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["lora.safetensors"]


def test_another_process_is_refused_in_one_sentence_until_it_has_ended(tmp_path, other_process):
    path = tmp_path / ".a.lock"
    process = other_process(path)
    with pytest.raises(UserError) as refused:
        take(path)
    says = f"another run trains a (process {process.pid}). Wait for its end, or give another --output_name."
    assert str(refused.value) == says
    take(tmp_path / ".b.lock")
    process.kill()
    while start_of(process.pid) is not None:  # it is a zombie until it is waited for, which is no run
        time.sleep(0.01)
    assert path.exists()
    take(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("work", "number", "status"),
    [
        ("time.sleep(60)", "SIGTERM", 143),
        ("time.sleep(60)", "SIGHUP", 129),
        ("time.sleep(60)", "SIGINT", 130),
        ("sys.exit(3)", None, 3),
        ("1 / 0", None, 1),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_every_kind_of_exit_removes_the_lock(tmp_path, other_process, work, number, status):
    process = other_process(tmp_path / ".a.lock", work)
    if number is not None:
        process.send_signal(getattr(signal, number))
    assert process.wait(20) == status
    assert not list(tmp_path.iterdir())


def test_a_process_number_that_was_given_again_is_another_process(tmp_path):
    path, here = tmp_path / ".a.lock", Holder.this_process()
    write(path, here)
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        take(path)
    write(path, replace(here, started="at another time"))
    take(path)


@pytest.mark.parametrize("other", [{"host": "gpu-7\x1b[2J"}, {"numbers": "pid:[1]"}])
def test_a_run_elsewhere_is_named_with_its_age_and_lost_after_some_silence(tmp_path, other):
    """In a container, processes have other numbers, which may be those of others here."""
    path, holder = tmp_path / ".a.lock", replace(Holder.this_process(), **other)
    write(path, holder, age=40)
    with pytest.raises(UserError) as refused:
        take(path)
    assert f"(process {os.getpid()} on {holder.host}, which wrote to .a.lock 4" in str(refused.value)
    assert str(refused.value).endswith(f"If it has ended, delete {path}.")
    write(path, holder, age=locks.LOST_SECONDS + 5)
    take(path)
    write(path, holder, age=-3600)  # a clock that is wrong
    with pytest.raises(UserError, match=" 0 seconds ago"):
        take(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', '{"host": "a", "numbers": "", "pid": 1e999, "started": 0}'])
def test_a_damaged_lock_counts_while_it_is_new(tmp_path, monkeypatch, content):
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.01)
    path = tmp_path / ".a.lock"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"an unknown process, which wrote to .* 0 seconds ago"):
        take(path)
    os.utime(path, (0, 0))
    take(path)


@pytest.mark.parametrize("make", ["mkfifo", "mkdir"])
def test_what_is_no_file_is_not_read(tmp_path, make):
    if not hasattr(os, make):
        pytest.skip("needs named pipes")
    getattr(os, make)(tmp_path / ".a.lock")
    with pytest.raises(UserError, match="is no regular file"):
        take(tmp_path / ".a.lock")


def test_a_run_shows_that_it_lives_and_leaves_the_lock_of_another_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    path = tmp_path / ".a.lock"
    with sole_run(path, "trains a", "give another"):
        os.utime(path, (0, 0))
        ends = time.monotonic() + 5
        while path.stat().st_mtime < 1 and time.monotonic() < ends:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1
        path.write_text("another's")
        time.sleep(0.1)
    assert path.read_text() == "another's"


def test_a_mount_without_exclusive_files_is_said_once(tmp_path, monkeypatch, caplog):
    plain = builtins.open

    def lacking(file, mode="r", *arguments, **named):
        if "x" in mode:
            raise OSError(errno.ENOTSUP, "not supported")
        return plain(file, mode, *arguments, **named)

    caplog.set_level("INFO")
    monkeypatch.setattr(builtins, "open", lacking)
    path = tmp_path / ".a.lock"
    with sole_run(path, "trains a", "give another"), pytest.raises(UserError, match="another run trains a"):
        take(path)
    assert not path.exists()
    assert caplog.text.count("its content decides") == 1


@pytest.mark.parametrize("stale", slow_but([False, True], True))
def test_of_many_at_once_one_gets_the_lock(tmp_path, monkeypatch, stale):
    """Each thread stands for a process of its own."""
    path, inside, most, refused = tmp_path / ".a.lock", [], [], []
    if stale:
        write(path, replace(Holder.this_process(), started="long ago"))
    monkeypatch.setattr(Holder, "this_process", lambda: Holder("here", "", threading.get_ident() % 10**6 + 1, "now"))
    monkeypatch.setattr(locks, "start_of", lambda pid: "now")
    if stale:
        write(path, Holder("here", "", 5, "long ago"))

    def run() -> None:
        try:
            with sole_run(path, "trains a", "give another"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(1.5)
                inside.pop()
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and len(refused) == 7
