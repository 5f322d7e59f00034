"""What a process knows of its launcher, what it leaves to others to say, and that it ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from utils.errors import UserError, run_script
from utils.processes.launcher import launcher_words, says_that_another_ended, words_before_script
from utils.processes.locks import start_of


def test_the_words_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--nproc_per_node", "2"]
    lines = {
        ("python3", "/some/bin/accelerate", "launch", *flags, "train.py", "--a"): ["accelerate", "launch", *flags],
        ("/some/torchrun", *flags, "train.py", "train.py"): ["torchrun", *flags],
        ("python3", "-m", "torch.distributed.run", *flags, "train.py"): ["python3", "-m", "torch.distributed.run", *flags],
        ("C:\\some\\accelerate.exe", "launch", "train.py"): ["accelerate", "launch"],
        ("sh",): [],
    }
    monkeypatch.setattr(sys, "argv", ["train.py", "--a"])
    for line, words in lines.items():
        monkeypatch.setattr("psutil.Process.cmdline", lambda _, line=line: [*line])
        assert launcher_words() == words
        assert words_before_script(2) == (words or ["accelerate", "launch"]) and words_before_script(1) == ["python"]


def test_a_mistake_that_all_processes_find_is_said_by_the_first(monkeypatch, capsys) -> None:
    class Ended(BaseException):
        pass

    def ended_by_launcher(_: float) -> None:
        raise Ended

    def refuse() -> None:
        raise UserError("no such file.")

    monkeypatch.setattr("utils.processes.launcher.time.sleep", ended_by_launcher)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, ending, said in (("0", SystemExit, "error: no such file.\n"), ("1", Ended, "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ending):
            run_script(refuse)
        assert capsys.readouterr().err == said


STARTS = """
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(process.pid, process.stdout.readline().decode(), flush=True)
time.sleep(60)
"""
WAITS = """
import time
from utils.errors import run_script

def wait():
    print("ready", flush=True)
    time.sleep(60)

run_script(wait)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent has ended")
def test_a_process_ends_when_its_launcher_is_killed() -> None:
    own = os.environ | {"TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", STARTS, WAITS], env=own, stdout=subprocess.PIPE, text=True) as launcher:
        pid = int(launcher.stdout.readline().split()[0])
        launcher.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while start_of(pid) is not None and time.monotonic() < end:
        time.sleep(0.05)
    assert start_of(pid) is None


def test_errors_that_another_process_explains() -> None:
    gone = RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer.")
    assert says_that_another_ended(gone)
    assert not says_that_another_ended(RuntimeError("shapes cannot be multiplied"))
    assert not says_that_another_ended(ConnectionResetError("gloo: connection reset"))
