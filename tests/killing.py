"""Run a script again and again in processes that are killed, from one process that imported it once.

    python killing.py PLAN.json

The plan: ``script`` (module name); the arguments ``whole`` of a run that is left alone and comes first; the arguments ``killed``
of the runs that follow, which write to the folder ``watched``: as many as ``kills``, and a last one that is left alone.

A run is killed in place of one of its calls of ``CALLS``, with which everything is saved. The first run shows how many there are,
and how many of them come inside a save: while the run has something half-written or half-removed. Every second kill comes inside
a save, the others anywhere, each in place of one of the first ``share`` of these calls, by the random generator of ``seed``.

Prints as JSON, for each run: whether it was to be killed inside a save, the exit status, which temporary files and folders it left,
and what is broken in the folder after it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os.path import exists
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the scripts; this file's own folder is there already

from wholeness import broken, is_saved, unfinished

SECONDS = 900  # for a plan
KILLED = -signal.SIGKILL
CALLS = ("mkdir", "fsync", "replace", "unlink", "rmdir")
USED_LATE = {  # imported by the scripts, or by what they use, only when needed: here, once for all runs, as it takes seconds
    "hv_train_network": ("torch._dynamo", "transformers.optimization"),
    "cache_text_encoder_outputs": ("transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"),
    "hv_generate_video": ("transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"),
}


@dataclass(frozen=True)
class Kill:
    """In place of which call: the ``number``-th, or the ``number``-th that comes inside a save."""

    inside: bool
    number: int


@dataclass(frozen=True)
class Run:
    """How a run ended; ``inside``: whether it was to be killed inside a save."""

    inside: bool
    status: int
    left: list[str]
    broken: list[str]


class Runner:
    """Runs a script in forked processes, which write to ``watched`` and print into ``log``."""

    def __init__(self, script: str, watched: Path, log: Path) -> None:
        self.script, self.watched, self.log, self.counts = script, watched, log, log.with_suffix(".counts")

    def run(self, arguments: list[str], folder: Path, kill: Kill | None = None) -> Run:
        """One run that saves into ``folder``."""
        before = unfinished(self.watched)
        process = os.fork()
        if process == 0:
            self._be_the_script(arguments, folder, kill)
        _, status = os.waitpid(process, 0)
        left = sorted(str(path) for path in unfinished(self.watched) - before)
        return Run(kill is not None and kill.inside, os.waitstatus_to_exitcode(status), left, broken(self.watched))

    def _be_the_script(self, arguments: list[str], folder: Path, kill: Kill | None) -> None:
        """The forked process; does not return. One that is not killed writes down how many calls it made, and how many inside."""
        from utils.errors import run_script

        for stream in (1, 2):
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        main, process, before, counts = importlib.import_module(self.script).main, os.getpid(), unfinished(folder), [0, 0]

        def counted(plain: Callable) -> Callable:
            def call(*arguments: object, **named: object) -> object:
                if os.getpid() == process:  # not in the workers of a training
                    saves = [path for path in unfinished(folder) - before if is_saved(path)]
                    counts[0] += 1
                    counts[1] += bool(saves)
                    # Another thread may have ended its save while this one looked at the folder.
                    if kill is not None and counts[kill.inside] >= kill.number and (not kill.inside or any(map(exists, saves))):
                        os.kill(process, signal.SIGKILL)
                return plain(*arguments, **named)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        sys.argv = [f"{self.script}.py", *arguments]
        try:
            run_script(main)
        except SystemExit as ended:
            self.counts.write_text(json.dumps(counts), encoding="utf-8")
            sys.stdout.flush()
            os._exit(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        os._exit(99)


def planned_kills(plan: dict[str, Any], counts: list[int]) -> list[Kill]:
    """``counts``: how many calls the whole run made, and how many of them inside a save."""
    choose = random.Random(plan["seed"])
    return [
        Kill(inside, choose.randint(1, int(counts[inside] * plan["share"])))
        for inside in (number % 2 == 0 for number in range(plan["kills"]))
    ]


def run_plan(
    tmp_path: Path, script: str, whole: list[object], killed: list[object], folders: tuple[Path, Path], kills: int, share: float
) -> None:
    """A whole run and a killed one, which write to ``folders``: it was killed as planned, and everything was whole each time.

    Each run that is killed makes at most ``share`` of what the whole one makes.
    """
    plan = tmp_path / f"{script}.json"
    words = {"whole": [str(word) for word in whole], "killed": [str(word) for word in killed]}
    places = {"whole_folder": str(folders[0]), "watched": str(folders[1])}
    numbers = {"kills": kills, "share": share, "seed": f"{script} {kills}"}
    plan.write_text(json.dumps({"script": script, **words, **places, **numbers}), encoding="utf-8")
    command, one_thread = [sys.executable, __file__, plan], os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    first, *others, last = runs = [Run(**run) for run in json.loads(ended.stdout)]
    said = plan.with_suffix(".log").read_text("utf-8", errors="replace")[-5000:]
    assert (first.status, last.status) == (0, 0), said
    assert {run.status for run in others} == {KILLED}, said
    assert not [run for run in runs if run.broken]
    inside = [run for run in others if run.inside]
    assert len(inside) == kills // 2 and all(any(map(is_saved, run.left)) for run in inside)


def main() -> None:
    path = Path(sys.argv[1])
    plan = json.loads(path.read_text(encoding="utf-8"))
    for name in (*USED_LATE.get(plan["script"], ()), plan["script"]):
        importlib.import_module(name)
    runner, watched = Runner(plan["script"], Path(plan["watched"]), path.with_suffix(".log")), Path(plan["watched"])
    runs = [runner.run(plan["whole"], Path(plan["whole_folder"]))]
    kills = planned_kills(plan, json.loads(runner.counts.read_text(encoding="utf-8")))
    runs += [runner.run(plan["killed"], watched, kill) for kill in (*kills, None)]
    print(json.dumps([asdict(run) for run in runs]))


if __name__ == "__main__":
    main()
