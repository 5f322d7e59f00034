"""Several processes on this machine, as ``accelerate launch`` starts them, that compute on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SECONDS = 300


def environment(home: Path) -> dict[str, str]:
    """One thread, no GPU; ``home``: where accelerate looks for settings, a folder without any."""
    # `--cpu` would start one process without MPI, whatever --num_processes says.
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(home)}


def launcher(processes: int, *places: object) -> list[str]:
    """The beginning of a command for so many processes, on this machine or in the given places."""
    places = places or ("--num_machines", 1, "--main_process_port", 0)
    flags = ("--multi_gpu", "--num_processes", processes, *places, "--mixed_precision", "no", "--dynamo_backend", "no")
    return [str(word) for word in (sys.executable, "-m", "accelerate.commands.launch", *flags)]


def launch(processes: int, script: Path, *flags: object, home: Path, timeout: float = SECONDS) -> subprocess.CompletedProcess:
    """The ended launcher of so many processes that run a script with these flags; one is started by Python itself."""
    begin = launcher(processes) if processes > 1 else [sys.executable]
    command = [*begin, str(script), *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=timeout, check=False)
