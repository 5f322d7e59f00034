"""For the tables of flags: a row, and the runs of a script with and without its flag."""

from __future__ import annotations

import argparse
import importlib
import io
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from watching import HubStandIn, Seen, counting, logged, watched

import hunyuan_model
from examples.toy.model_files import ModelFiles
from examples.toy.recipe.make_tokenizers import write_clip_tokenizer, write_llama_tokenizer
from networks.lora import create_network
from utils import hub
from utils.cli.config_files import parse_with_config
from utils.errors import run_script
from utils.safetensors_io import read_header


@dataclass(frozen=True)
class Row:
    """A flag with a value, and its effect.

    Attributes:
        given: the flag, its value, and what else only the run with the flag is given.
        beside: flags of both runs.
    """

    given: str
    effect: Callable[[Run, Run], None]
    beside: str = ""

    @property
    def flag(self) -> str:
        return self.given.split()[0]


def rows_as_parameters(rows: tuple[Row, ...]) -> list:
    """For ``pytest.mark.parametrize``; every row is called by its flag."""
    return [pytest.param(row, id=row.flag.lstrip("-")) for row in rows]


def check_rows(script: str, rows: tuple[Row, ...]) -> None:
    """Every flag of the script has a row, and every row a flag."""
    parser = importlib.import_module(script).build_parser()
    flags = {action.option_strings[-1] for action in parser._actions if action.dest != "help"}
    rowed = {row.flag for row in rows}
    assert flags - rowed == set(), "flags without a row"
    assert rowed - flags == set(), "rows of flags that are gone"


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

    def run(self, flags: str) -> Run:
        flags = " ".join(flags.split())
        if flags not in self.runs:
            self.runs[flags] = Run(self, flags, self.folder / f"{len(self.runs):03d}")
        return self.runs[flags]

    def check(self, row: Row) -> None:
        row.effect(self.run(f"{row.beside} {row.given}"), self.run(row.beside))


class Run:
    """One command line. It is run when something of it is first asked for that only running tells."""

    def __init__(self, bench: Bench, flags: str, out: Path) -> None:
        self.bench, self.flags, self.out = bench, flags, out

    @cached_property
    def words(self) -> list[str]:
        text = f"{self.bench.base} {self.flags}"
        return [word.format(out=self.out, **self.bench.places) for word in text.split()]

    @cached_property
    def args(self) -> argparse.Namespace:
        """The flags as the script reads them; runs nothing."""
        return parse_with_config(importlib.import_module(self.bench.script).build_parser(), self.words)

    @cached_property
    def ended(self) -> Ended:
        self.out.mkdir(parents=True)
        self.bench.prepare(self.out)
        script = importlib.import_module(self.bench.script)
        output, errors, told = io.StringIO(), io.StringIO(), io.StringIO()
        with watched() as (seen, patch), logged(told), redirect_stdout(output), redirect_stderr(errors):
            patch.setattr(sys, "argv", [f"{self.bench.script}.py", *self.words])
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


# What rows name


def write_other_models(model: ModelFiles, data: Path) -> None:
    """Every part of the model with other weights, as ``other.safetensors`` and ``other_vae`` ..., and other tokenizers."""
    _write_altered(model.dit, data / "other.safetensors")
    for folder in (model.vae, model.text_encoder1, model.text_encoder2):
        (weights,) = folder.glob("*.safetensors")
        shutil.copytree(folder, data / f"other_{folder.name}", ignore=shutil.ignore_patterns(weights.name))
        _write_altered(weights, data / f"other_{folder.name}" / weights.name)
    write_llama_tokenizer(data / "tokenizer1", ["Nothing is as before."], vocabulary=300)
    write_clip_tokenizer(data / "tokenizer2", ["Nothing is as before."])


def _write_altered(source: Path, target: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: value * (1 + 0.2 * torch.randn(value.shape, generator=generator)) for name, value in load_file(source).items()}
    save_file(tensors, target, read_header(source).metadata or None)


def write_lora(dit: Path, path: Path, **network_args: str) -> None:
    """A LoRA of rank 3 and alpha 3 that changes much."""
    transformer = hunyuan_model.load_transformer(dit, device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    tensors = create_network(1.0, 3, 3.0, None, None, transformer, **network_args).state_dict()
    save_file({name: torch.randn_like(value) * 0.1 if "lora_up" in name else value for name, value in tensors.items()}, path)
