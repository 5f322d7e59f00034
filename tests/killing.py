"""Run a script again and again in processes that are killed, from one process that imported it once.

    python killing.py PLAN.json

The plan: ``script`` (module name); the arguments ``whole`` of a run that is left alone and comes first; the arguments ``killed``
of the runs that follow, which write to the folder ``watched``: one for each number in ``kills`` and a last one that is left
alone. A run with the number n is killed in place of its n-th call of one of ``CALLS``, with which everything is saved.

Prints as JSON, for each run: the exit status, which temporary files and folders it left, and what is broken in the folder after it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the scripts; this file's own folder is there already

from wholeness import broken, unfinished

CALLS = ("mkdir", "fsync", "replace", "unlink", "rmdir")
USED_LATE = {  # imported by the scripts, or by what they use, only when needed: here, once for all runs, as it takes seconds
    "hv_train_network": ("torch._dynamo", "transformers.optimization"),
    "cache_text_encoder_outputs": ("transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"),
}


@dataclass(frozen=True)
class Run:
    """How a run ended."""

    status: int
    left: list[str]
    broken: list[str]


def run(script: str, arguments: list[str], kill: int | None, watched: Path, log: Path) -> Run:
    """One run in a forked process."""
    before = unfinished(watched)
    process = os.fork()
    if process == 0:
        be_the_script(script, arguments, kill, log)
    _, status = os.waitpid(process, 0)
    left = sorted(str(path) for path in unfinished(watched) - before)
    return Run(os.waitstatus_to_exitcode(status), left, broken(watched))


def be_the_script(script: str, arguments: list[str], kill: int | None, log: Path) -> None:
    """The forked process; does not return."""
    from utils.errors import run_script

    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    main, process, count = importlib.import_module(script).main, os.getpid(), 0

    def counted(plain: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            nonlocal count
            if os.getpid() == process:  # not in the workers of a training
                count += 1
                if count == kill:
                    os.kill(process, signal.SIGKILL)
            return plain(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    sys.argv = [f"{script}.py", *arguments]
    try:
        run_script(main)
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    script, places = plan["script"], (Path(plan["watched"]), Path(sys.argv[1]).with_suffix(".log"))
    for name in (*USED_LATE.get(script, ()), script):
        importlib.import_module(name)
    runs = [run(script, plan["whole"], None, *places)]
    runs += [run(script, plan["killed"], kill, *places) for kill in (*plan["kills"], None)]
    print(json.dumps([asdict(one) for one in runs]))


if __name__ == "__main__":
    main()
