"""Run a script again and again in processes that are killed, from one process that imported it once.

    python killing.py PLAN.json

The plan: ``script`` (module name); the arguments ``whole`` of a run that is left alone and comes first; the arguments ``killed``
of the runs that follow, which write to the folder ``watched``, one for each of ``kills`` and a last one that is left alone.

A kill says how often a run may call functions of os before it is killed instead of the next call: {"fsync": 3, "unlink": 1};
what comes first counts. ``fsync`` has to be there: it bounds what a killed run can achieve. With {"after": 0.4} it is killed
after that share of the time in which the whole run came to its flush of that number, if it was not killed before. Of the calls
of any of these functions {"inside": 3} counts only those during which something that the run saves is half-written or half-removed.

Prints as JSON, for each run: the exit status, the seconds and those of the processor, the flushes, which temporary files and
folders it left, and what is broken in the folder after it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the scripts; this file's own folder is there already

from wholeness import broken, is_saved, unfinished

CALLS = ("fsync", "replace", "unlink")
USED_LATE = {  # imported by the scripts, or by what they use, only when needed: here, once for all runs, as it takes seconds
    "hv_train_network": ("torch._dynamo", "transformers.optimization"),
    "cache_text_encoder_outputs": ("transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"),
}
MAX_FLUSHES = 8192


class FlushTimes(ctypes.Structure):
    """When a run flushed files, in seconds since its start; in memory that the process that runs shares with this one."""

    _fields_ = (("count", ctypes.c_long), ("times", ctypes.c_double * MAX_FLUSHES))


@dataclass(frozen=True)
class Run:
    """How a run ended."""

    status: int
    seconds: float
    cpu_seconds: float
    flushes: int
    left: list[str]
    broken: list[str]


class Runner:
    """Runs ``main`` in forked processes."""

    def __init__(self, main: Callable[[], int | None], script: str, watched: Path, log: Path) -> None:
        self.main, self.script, self.watched, self.log = main, script, watched, log
        self.flushes = FlushTimes.from_buffer(mmap.mmap(-1, ctypes.sizeof(FlushTimes)))

    def run(self, arguments: list[str], kill: dict[str, int], seconds: float | None = None) -> Run:
        """One run that is killed as ``kill`` says, and after ``seconds`` at the latest."""
        before, started = unfinished(self.watched), time.monotonic()
        self.flushes.count = 0
        process = os.fork()
        if process == 0:
            self.be_the_script(arguments, kill, started, before)
        killer = threading.Timer(seconds or 0.0, os.kill, (process, signal.SIGKILL))
        if seconds is not None:
            killer.start()
        _, status, usage = os.wait4(process, 0)
        killer.cancel()
        return Run(
            os.waitstatus_to_exitcode(status),
            time.monotonic() - started,
            usage.ru_utime + usage.ru_stime,
            self.flushes.count,
            sorted(str(path) for path in unfinished(self.watched) - before),
            broken(self.watched),
        )

    def be_the_script(self, arguments: list[str], kill: dict[str, int], started: float, before: set[Path]) -> None:
        """The forked process; does not return."""
        from utils.errors import run_script

        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        process, inside = os.getpid(), self.calls_inside(kill.get("inside"), before)
        for name in CALLS:
            setattr(os, name, self.counted(name, kill.get(name), process, started, inside))
        sys.argv = [f"{self.script}.py", *arguments]
        try:
            run_script(self.main)
        except SystemExit as ended:
            sys.stdout.flush()
            os._exit(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        os._exit(99)

    def calls_inside(self, last: int | None, before: set[Path]) -> Callable[[], bool]:
        """Says at each call that is counted whether it is the ``last`` one inside a save; ``before``: what earlier runs left."""
        count = 0

        def is_last() -> bool:
            nonlocal count
            if last is None or not any(is_saved(path) for path in unfinished(self.watched) - before):
                return False
            count += 1
            return count >= last

        return is_last

    def counted(self, name: str, last: int | None, process: int, started: float, inside: Callable[[], bool]) -> Callable:
        """The function ``name`` of os; its ``last``-th call, or the last one ``inside``, kills ``process`` instead.

        Calls of other processes, the workers of a training, are not counted.
        """
        plain, count = getattr(os, name), 0

        def call(*arguments: object, **named: object) -> object:
            nonlocal count
            if os.getpid() == process:
                count += 1
                if inside() or count == last:
                    os.kill(process, signal.SIGKILL)
                if name == "fsync":
                    self.flushes.times[self.flushes.count] = time.monotonic() - started
                    self.flushes.count += 1
            return plain(*arguments, **named)

        return call


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    log = Path(sys.argv[1]).with_suffix(".log")
    for name in USED_LATE.get(plan["script"], ()):
        importlib.import_module(name)
    runner = Runner(importlib.import_module(plan["script"]).main, plan["script"], Path(plan["watched"]), log)
    runs = [runner.run(plan["whole"], {})]
    times = list(runner.flushes.times[: runner.flushes.count])
    for kill in plan["kills"]:
        share = kill.pop("after", None)
        runs.append(runner.run(plan["killed"], kill, None if share is None else share * times[kill["fsync"] - 1]))
    runs.append(runner.run(plan["killed"], {}))
    print(json.dumps([asdict(run) for run in runs]))


if __name__ == "__main__":
    main()
