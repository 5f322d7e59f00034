"""Bad nights: whatever goes wrong, going on ends with the LoRA of a training to which nothing happened, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).resolve().parents[3] / "faults.py"
COUNT = 28
SECONDS = 290
EVERY = 2  # steps between saves

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, kills, and mounts a small disk"),
]


def test_two_faults_of_every_kind_change_no_bit_of_a_training(tiny_model, cached: Path, tmp_path_factory) -> None:
    plan, folder = tmp_path_factory.mktemp("plan") / "plan.json", tmp_path_factory.mktemp("faults")
    words = {"dit": str(tiny_model.dit), "dataset": str(cached), "folder": str(folder), "faults": COUNT, "seed": "first"}
    plan.write_text(json.dumps(words), encoding="utf-8")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, FAULTS, plan], env=one_thread, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stderr
    outcomes = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(outcomes) == COUNT
    for outcome in outcomes:
        assert outcome["same"] and not outcome["traceback"] and outcome["statuses"][-1] == 0, outcome
        before_the_damaged = EVERY if outcome["refused"] else 0
        assert outcome["lost"] <= EVERY + 1 + before_the_damaged and outcome["refused"] != "not named", outcome
