"""Several processes on this machine, as ``accelerate launch`` starts them, that compute on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SECONDS = 300


def launch(processes: int, script: Path, *flags: object, home: Path, timeout: float = SECONDS) -> subprocess.CompletedProcess:
    """The ended launcher of so many processes that run a script with these flags; alone, it is started by Python.

    Args:
        home: where accelerate looks for settings; a folder without any.
    """
    launcher: tuple[object, ...] = ()
    if processes > 1:
        places = ("--num_processes", processes, "--num_machines", 1, "--main_process_port", 0)
        launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", *places, "--mixed_precision", "no", "--dynamo_backend", "no")
    # `--cpu` would start one process without MPI, whatever --num_processes says.
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(home)}
    command = [str(word) for word in (sys.executable, *launcher, script, *flags)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=timeout, check=False)
