"""A flag, what it does, and the runs of a script with and without it: what the tables of flags are made of."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from watching import HubStandIn, Seen, counting, logged, watched

from utils import hub
from utils.errors import run_script

Effect = Callable[["Run", "Run"], None]
"""Looks at two runs, with a flag and without it; an assertion holds where the flag did what it should."""


@dataclass(frozen=True)
class Row:
    """A flag with a value, its effect, the flags that both runs are given besides, and those in place of the base of the table."""

    given: str
    effect: Effect
    beside: str = ""
    base: str | None = None

    @property
    def flag(self) -> str:
        return self.given.split()[0]


class Refused(Exception):
    """A run that was to be looked at did not succeed."""


class Bench:
    """Runs one script in this process, each command line once, on the CPU.

    Args:
        base: flags of every run; later ones win. ``{data}`` and ``{out}``, the folder of the run, are filled in.
        prepare: what to put into the folder of a run beforehand.
    """

    def __init__(self, script: str, base: str, folder: Path, prepare: Callable[[Path], None] = lambda out: None, **places: Path):
        self.script, self.base, self.folder, self.prepare, self.places = script, base, folder, prepare, places
        self.runs: dict[str, Run] = {}

    def run(self, flags: str, base: str | None = None) -> Run:
        """The run with these flags beside those of all runs, or beside ``base``."""
        flags = " ".join(f"{self.base if base is None else base} {flags}".split())
        if flags not in self.runs:
            self.runs[flags] = Run(self, flags, self.folder / f"{len(self.runs):03d}")
        return self.runs[flags]

    def check(self, row: Row) -> None:
        """The flag does what its row says, and the row would notice if the script ignored it: two runs without it do not pass."""
        without = self.run(row.beside, row.base)
        row.effect(self.run(f"{row.beside} {row.given}", row.base), without)
        with pytest.raises((AssertionError, Refused)):
            row.effect(without, without)


class Run:
    """One command line. It is run when something of it is first asked for that only running tells."""

    def __init__(self, bench: Bench, flags: str, out: Path) -> None:
        self.bench, self.flags, self.out = bench, flags, out

    @cached_property
    def words(self) -> list[str]:
        return [word.format(out=self.out, **self.bench.places) for word in self.flags.split()]

    @cached_property
    def ended(self) -> Ended:
        self.out.mkdir(parents=True)
        self.bench.prepare(self.out)
        script = importlib.import_module(self.bench.script)
        output, errors, told = io.StringIO(), io.StringIO(), io.StringIO()
        with watched() as (seen, patch), logged(told), redirect_stdout(output), redirect_stderr(errors):
            patch.setattr(sys, "argv", [f"{self.bench.script}.py", *self.words])
            patch.setattr(sys, "stdin", io.StringIO("a red ball\n"))
            patch.syspath_prepend(str(self.bench.places["data"]))
            patch.setattr(hub, "hub_api", lambda token: HubStandIn(seen.hub, token, self.bench.places["data"]))
            AcceleratorState._reset_state(reset_partial_state=True)
            with pytest.raises(SystemExit) as left, torch.autograd.graph.saved_tensors_hooks(counting(seen), lambda x: x):
                run_script(script.main)
        return Ended(left.value.code or 0, output.getvalue(), errors.getvalue(), told.getvalue(), seen)

    @property
    def done(self) -> Ended:
        """How it ended, if that was well."""
        assert self.ended.status in (0, 2), self.ended.errors
        if self.ended.status != 0:
            raise Refused(f"{' '.join(self.words)}: {self.ended.errors}")
        return self.ended

    def tensors(self, pattern: str) -> dict[str, torch.Tensor]:
        """Of the one file in the run's folder that is so called."""
        return load_file(self.file(pattern))

    def file(self, pattern: str) -> Path:
        assert self.done
        (path,) = self.out.glob(pattern)
        return path


@dataclass(frozen=True)
class Ended:
    """How a run ended, what it printed and told, and what was seen of it."""

    status: int
    output: str
    errors: str
    log: str
    seen: Seen
