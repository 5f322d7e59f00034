"""Run a script again and again in processes that are killed, from one process that imported it once.

    python killing.py PLAN.json

The plan: script (module name), arguments, kills (a list of {"after": seconds} or {"at_flush": number}; the number counts calls of
os.fsync, most of which happen while something is saved). A last run is left alone. Prints the exit status and the seconds of
each run as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def run_once(main, run_script, arguments: list[str], kill: dict | None) -> int:
    """The exit status of a forked process that runs the script; -9 where it was killed."""
    process = os.fork()
    if process == 0:
        sys.argv = arguments
        if kill is not None and "at_flush" in kill:
            kill_at_flush(kill["at_flush"])
        try:
            run_script(main)
        except SystemExit as ended:
            sys.stdout.flush()
            os._exit(ended.code or 0)
        os._exit(99)
    if kill is not None and "after" in kill:
        timer = threading.Timer(kill["after"], os.kill, (process, signal.SIGKILL))
        timer.start()
        status = os.waitpid(process, 0)[1]
        timer.cancel()
    else:
        status = os.waitpid(process, 0)[1]
    return os.waitstatus_to_exitcode(status)


def kill_at_flush(number: int) -> None:
    """Let this process kill itself instead of flushing a file for the ``number``-th time."""
    plain, calls = os.fsync, iter(range(1, 1_000_000))

    def flush(descriptor: int) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(descriptor)

    os.fsync = flush


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    script = importlib.import_module(plan["script"])
    from utils.errors import run_script

    arguments = [f"{plan['script']}.py", *plan["arguments"]]
    ends = []
    for kill in [*plan["kills"], None]:
        started = time.monotonic()
        ends.append([run_once(script.main, run_script, arguments, kill), time.monotonic() - started])
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
