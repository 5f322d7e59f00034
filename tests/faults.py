"""Let random things go wrong in trainings of the tiny model, go on after each, and see what became of the LoRA.

    python faults.py PLAN.json

The plan: the paths ``dit`` and ``dataset`` (whose caches lie beside it, in folders), an empty ``folder`` to work in, the number of
``faults`` and the ``seed`` that chooses them. Each fault comes when a training makes a step chosen at random, and a random part of
a step later. Prints as JSON what came of each, see ``Outcome``.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the scripts

import torch
from killing import USED_LATE

import hv_train_network
from networks.training import loop
from networks.training.saving.latest import find_latest_state
from utils.errors import run_script

STEPS, EVERY = 9, 2  # of a training; it saves a model and a state after every second one
DISK_BYTES = 6 << 20
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL", "SIGQUIT")
FILES = ("cache deleted", "cache changed", "state changed", "state file deleted", "disk full")
KINDS = (*SIGNALS, *FILES, "worker killed", "reader ends", "clock jumps", "two runs")


@dataclass
class Outcome:
    """Of a fault.

    Attributes:
        statuses: of the training that it came to, and of those that went on, the last of which ended well.
        lost: steps that were made, and were made again.
        refused: what the first training that went on said of the file that was damaged.
        same: whether the LoRA in the end has the very bits of a training to which nothing happened.
    """

    kind: str
    workers: int
    step: int
    statuses: list[int]
    lost: int
    refused: str
    same: bool
    traceback: bool
    seconds: float


class Faults:
    """Trainings in forked processes, all with the same flags."""

    def __init__(self, plan: dict) -> None:
        self.dit, self.dataset, self.folder = plan["dit"], Path(plan["dataset"]), Path(plan["folder"])
        self.choose = random.Random(plan["seed"])
        self.disk = self.folder / "disk"
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.disk)]
        self.has_disk = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def start(self, out: Path, toml: Path, workers: int, fault: Callable[[], None] | None = None, stdout: int | None = None) -> int:
        """Fork a training; ``fault`` is called in it before the first step, and stdout and stderr go to ``stdout`` or a file."""
        log = os.open(out.parent / f"{out.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND) if stdout is None else stdout
        if (process := os.fork()) != 0:
            os.close(log)
            return process
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["hv_train_network.py", "--dit", self.dit, "--dataset_config", str(toml), "--output_dir", str(out)]
        sys.argv += ["--output_name", "lora", "--max_train_steps", str(STEPS), "--save_every_n_steps", str(EVERY), "--save_state"]
        sys.argv += ["--save_last_n_steps", str(2 * EVERY), "--network_dim", "2", "--network_dropout", "0.2", "--seed", "5"]
        sys.argv += ["--learning_rate", "1e-2", "--loss_log", str(out / "loss.csv"), "--resume", "latest"]
        sys.argv += ["--max_data_loader_n_workers", str(workers)]
        try:
            if fault is not None:
                fault()
            run_script(hv_train_network.main)
        except SystemExit as ended:
            sys.stderr.flush()
            multiprocessing.util._exit_function()  # as Python does at its end: the workers go
            os._exit(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        os._exit(99)

    def at(self, step: int, delay: float, then: Callable[[], None]) -> Callable[[], None]:
        """A fault in the training: ``then`` is called in a thread, ``delay`` seconds after ``step`` was begun."""

        def install() -> None:
            plain, made = loop.train_step, []

            def counted(*arguments: object) -> object:
                made.append(1)
                if len(made) == step:
                    threading.Timer(delay, then).start()
                return plain(*arguments)

            loop.train_step = counted

        return install

    def one(self, number: int, kind: str) -> Outcome:
        """Let something go wrong, and go on until the training is done."""
        began, choose = time.monotonic(), self.choose
        data = self.folder / f"data{number}"
        shutil.copytree(self.dataset.parent, data, ignore=shutil.ignore_patterns("out*"))
        toml = data / self.dataset.name
        toml.write_text(toml.read_text("utf-8").replace(str(self.dataset.parent), str(data)), encoding="utf-8")
        out = (self.disk if kind == "disk full" else self.folder) / f"out{number}"
        workers = 2 if kind == "worker killed" else choose.choice((0, 0, 2))
        step, delay = choose.randint(1, STEPS - 1), choose.uniform(0, 0.15)
        caches = sorted(path for path in data.rglob("*_hv*.safetensors"))
        cache, place, free = choose.choice(caches), choose.random(), choose.randint(0, 600_000)
        jump = choose.choice((-1, 1)) * choose.uniform(1, 20 * 365 * 86400)
        whole = {path: path.read_bytes() for path in caches}
        number_of_signal = signal.SIGTERM

        def change(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[int(place * len(content))] ^= 0x10
            path.write_bytes(content)

        def clock() -> None:
            plain = time.time
            time.time = lambda: plain() + jump

        def kill_worker() -> None:
            workers = multiprocessing.active_children()
            if workers:
                os.kill(workers[step % len(workers)].pid, signal.SIGKILL)

        def fill() -> None:
            (self.disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(self.disk).free - free)))

        then: dict[str, Callable[[], None]] = {
            "worker killed": kill_worker,
            "cache deleted": cache.unlink,
            "cache changed": lambda: change(cache),
            "disk full": fill,
            "reader ends": lambda: None,
        }
        if kind in SIGNALS:
            number_of_signal = signal.Signals[kind]

        def by_signal() -> None:
            if kind == "clock jumps":
                clock()
                time.sleep(0.1)
            os.kill(os.getpid(), number_of_signal)

        fault = self.at(step, delay, then.get(kind, by_signal))
        if kind == "reader ends":
            reader, writer = os.pipe()
            process = self.start(out, toml, workers, fault, writer)
            time.sleep(delay * 5)
            os.close(reader)
            statuses = [self.wait(process)]
        else:
            process = self.start(out, toml, workers, fault)
            others = [self.start(out, toml, workers, fault)] if kind == "two runs" else []
            statuses = sorted((self.wait(each) for each in (process, *others)), key=lambda status: status == 0)  # done comes last
        return self.gone_on(Outcome(kind, workers, step, statuses, 0, "", False, False, 0.0), out, toml, change, whole, began)

    def gone_on(self, outcome: Outcome, out: Path, toml: Path, change: Callable, whole: dict[Path, bytes], began: float) -> Outcome:
        """What came of a fault, after trainings that go on."""
        kind, damaged = outcome.kind, None
        (self.disk / "filler").unlink(missing_ok=True)
        for path, content in whole.items():
            path.write_bytes(content)
        made = steps_in(out / "loss.csv")
        states = list(out.glob("lora*-state")) if out.exists() else []
        if kind.startswith("state") and len(states) > 1:  # the newest
            damaged = self.choose.choice(sorted(find_latest_state(out, "lora").iterdir()))
            change(damaged) if kind == "state changed" else damaged.unlink()
        for path in states if kind == "clock jumps" else ():
            os.utime(path, times=(self.choose.uniform(1, 2e9),) * 2)
        log = out.parent / f"{out.name}.log"
        before = log.read_text("utf-8", errors="replace") if log.exists() else ""
        done = 0 in outcome.statuses and damaged is None
        while not done and len(outcome.statuses) < 5:
            outcome.statuses.append(self.wait(self.start(out, toml, outcome.workers)))
            done = outcome.statuses[-1] == 0
        text = log.read_text("utf-8", errors="replace") if log.exists() else ""
        after = text.removeprefix(before)
        if len(outcome.statuses) > (2 if kind == "two runs" else 1):
            resumed = re.search(r"resumed from \S+: step (\d+)", after)
            complete = "is complete" in after
            outcome.lost = 0 if complete else made - int(resumed[1] if resumed else 0)
        if damaged is not None:
            outcome.refused = f"{damaged.parent.name}/{damaged.name} named" if damaged.parent.name in after else "not named"
        outcome.traceback = "Traceback" in text
        final, wanted = out / "lora.safetensors", self.folder / "whole" / "lora.safetensors"
        outcome.same = final.exists() and tensors_of(final) == tensors_of(wanted)
        outcome.seconds = round(time.monotonic() - began, 2)
        if not outcome.same or outcome.traceback:
            shutil.copy(log, self.folder / f"{out.name}-{kind.replace(' ', '-')}.failed")
        shutil.rmtree(out, ignore_errors=True)
        return outcome

    def wait(self, process: int, seconds: float = 120.0) -> int:
        """The exit status; -999 for one that has not ended after so long."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return -999

    def close(self) -> None:
        if self.has_disk:
            subprocess.run(["umount", str(self.disk)], check=False)


def steps_in(path: Path) -> int:
    """The last step in a log of losses."""
    lines = path.read_text("utf-8").splitlines()[1:] if path.exists() else []
    return max((int(line.partition(",")[0]) for line in lines), default=0)


def tensors_of(path: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: tensor.tobytes() for name, tensor in load_file(path).items()}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(1)
    for name in USED_LATE["hv_train_network"]:
        importlib.import_module(name)
    faults = Faults(plan)
    try:
        assert faults.wait(faults.start(faults.folder / "whole", faults.dataset, 0)) == 0
        kinds = [kind for kind in KINDS if kind != "disk full" or faults.has_disk]
        for number in range(plan["faults"]):
            print(json.dumps(asdict(faults.one(number, kinds[number % len(kinds)]))), flush=True)
    finally:
        faults.close()


if __name__ == "__main__":
    main()
