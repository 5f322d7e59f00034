"""For the tables of flags: a row, the runs of a script with and without its flag, and what can be measured of a run.

An effect is a function of two runs, with the flag and without it. Most hold for the first and not for the second.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import logging
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

import hunyuan_model
from examples.toy.make_tokenizers import write_clip_tokenizer, write_llama_tokenizer
from examples.toy.model_files import ModelFiles
from hunyuan_model import vae_layers
from hunyuan_model.text_encoder_clip import CLIPTextEncoder
from hunyuan_model.text_encoder_llm import LlamaTextEncoder
from hunyuan_model.transformer import HYVideoDiffusionTransformer
from hunyuan_model.vae import AutoencoderKLCausal3D
from networks.lora import create_network
from utils import hub
from utils.config_files import parse_with_config
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


@dataclass
class Seen:
    """What a run did inside.

    Attributes:
        timesteps, guidance: that the transformer was told.
        weights: dtypes of the weights of each part of the model when it computed.
        attended: rows, of all samples, in its largest attention call.
        saved_bytes: kept for backward passes, or as inputs of what is computed again in them.
        encoded: sizes of the batches that the VAE encoded.
        captions: sizes of the batches that text encoder 1 read.
        widest: columns that a convolution of the VAE saw at once.
        threads: sizes of the thread pools.
        processes: that were started.
        writers, wandb: of TensorBoard and W&B.
        hub: calls and their arguments.
    """

    timesteps: list[float] = field(default_factory=list)
    guidance: set[float] = field(default_factory=set)
    weights: dict[str, set[torch.dtype]] = field(default_factory=dict)
    attended: int = 0
    saved_bytes: int = 0
    encoded: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    widest: int = 0
    threads: list[int] = field(default_factory=list)
    processes: int = 0
    writers: list[Writer] = field(default_factory=list)
    wandb: dict[str, Any] = field(default_factory=dict)
    hub: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


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
        with watched() as (seen, patch), little_garbage(), logged(told), redirect_stdout(output), redirect_stderr(errors):
            patch.setattr(sys, "argv", [f"{self.bench.script}.py", *self.words])
            patch.syspath_prepend(str(self.bench.places["data"]))
            patch.setattr(hub, "_hub_api", lambda token: HubStandIn(seen.hub, token, self.bench.places["data"]))
            AcceleratorState._reset_state(reset_partial_state=True)
            with pytest.raises(SystemExit) as left, torch.autograd.graph.saved_tensors_hooks(counting(seen), lambda x: x):
                run_script(script.main)
        return Ended(left.value.code or 0, output.getvalue(), errors.getvalue(), told.getvalue(), seen)

    @property
    def done(self) -> Ended:
        """How it ended, if that was well."""
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


# Effects


def becomes(read: Callable[[Run], Any], expected: Any) -> Callable[[Run, Run], None]:
    """``read`` gives ``expected`` with the flag, and something else (or a refusal) without it."""

    def effect(run: Run, without: Run) -> None:
        found = read(run)
        assert found == expected, f"{found!r} is not {expected!r}"
        try:
            found_without = read(without)
        except Refused:
            return
        assert found_without != expected, f"it is {expected!r} without the flag as well"

    return effect


def refused(says: str) -> Callable[[Run, Run], None]:
    """Status 2 with a sentence that holds ``says``; without the flag the script works."""

    def effect(run: Run, without: Run) -> None:
        assert run.ended.status == 2 and without.done
        answer = run.ended.errors.strip().splitlines()[-1]
        assert says in answer and "Traceback" not in run.ended.errors, answer

    return effect


def writes(pattern: str) -> Callable[[Run, Run], None]:
    """A file or folder in the run's folder is there with the flag only."""
    return becomes(lambda run: bool(run.done and any(run.out.glob(pattern))), True)


def removes(pattern: str) -> Callable[[Run, Run], None]:
    """A file or folder in the run's folder is there without the flag only."""
    return becomes(lambda run: bool(run.done and any(run.out.glob(pattern))), False)


def prints(text: str) -> Callable[[Run, Run], None]:
    """On stdout, with the flag only."""
    return becomes(lambda run: text in run.done.output, True)


def both(*effects: Callable[[Run, Run], None]) -> Callable[[Run, Run], None]:
    def effect(run: Run, without: Run) -> None:
        for one in effects:
            one(run, without)

    return effect


Values = Callable[[Run], dict[str, Any]]


def differs(read: Values, *, by_at_most: float | None = None) -> Callable[[Run, Run], None]:
    """The same tensors with other values; ``by_at_most`` as a share of their norm."""

    def effect(run: Run, without: Run) -> None:
        changed, plain = flat(read(run)), flat(read(without))
        assert changed.shape == plain.shape and torch.isfinite(changed).all()
        share = ((changed - plain).norm() / plain.norm()).item()
        assert share > 1e-6, "nothing changes"
        assert by_at_most is None or share <= by_at_most, f"the difference is {share:g} of the norm"

    return effect


def stays(read: Values, *, within: float = 0.0) -> Callable[[Run, Run], None]:
    """The same tensors to the bit, or with differences up to ``within``."""

    def effect(run: Run, without: Run) -> None:
        changed, plain = read(run), read(without)
        assert plain and changed.keys() == plain.keys()
        assert all(torch.as_tensor(changed[name]).shape == torch.as_tensor(plain[name]).shape for name in plain)
        difference = (flat(changed) - flat(plain)).abs().max().item()
        assert difference <= within, f"values differ by up to {difference:g}"

    return effect


def flat(values: dict[str, Any]) -> torch.Tensor:
    return torch.cat([torch.as_tensor(values[name]).double().flatten() for name in sorted(values)])


# What several scripts have


def seen(name: str) -> Callable[[Run], Any]:
    """A field of what was seen."""
    return lambda run: getattr(run.done.seen, name)


def computes_in(dtype: torch.dtype, *parts: str) -> Callable[[Run, Run], None]:
    """All weights of these parts of the model."""
    return both(*(becomes(lambda run, part=part: run.done.seen.weights[part], {dtype}) for part in parts))


def keeps_float8(part: str) -> Callable[[Run, Run], None]:
    """Some weights of a part of the model."""
    return becomes(lambda run: torch.float8_e4m3fn in run.done.seen.weights[part], True)


def metadata(key: str, pattern: str) -> Callable[[Run], str | None]:
    """A key of the metadata of a safetensors file."""
    return lambda run: read_header(run.file(pattern)).metadata.get(key)


def picture(run: Run, pattern: str) -> dict[str, np.ndarray]:
    with Image.open(run.file(pattern)) as image:
        return {"pixels": np.asarray(image.convert("RGB")).astype(int)}


def narrower(run: Run, without: Run) -> None:
    """The VAE's convolutions see what 8 columns depend on at once, twice as many columns where they halve them."""
    assert run.done.seen.widest <= 18 < without.done.seen.widest


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


# Looking on


def spy(patch: pytest.MonkeyPatch, owner: object, name: str, note: Callable[..., None]) -> None:
    """Have ``note`` called with the arguments of a function before the function itself."""
    plain = getattr(owner, name)

    def noting(*arguments: Any, **options: Any) -> Any:
        note(*arguments, **options)
        return plain(*arguments, **options)

    patch.setattr(owner, name, noting)


@contextmanager
def watched() -> Iterator[tuple[Seen, pytest.MonkeyPatch]]:
    """Note what is done inside, without a graphics card and with stand-ins for TensorBoard and W&B."""
    seen = Seen()

    def look_at(part: str, module: torch.nn.Module) -> None:
        seen.weights[part] = {weight.dtype for weight in module.parameters()}

    def hear(transformer: torch.nn.Module, _x: Any, t: torch.Tensor, *texts_and_guidance: torch.Tensor) -> None:
        look_at("transformer", transformer)
        seen.timesteps += t.tolist()
        seen.guidance |= set(texts_and_guidance[-1].tolist())

    def encode(vae: torch.nn.Module, x: torch.Tensor) -> None:
        look_at("vae", vae)
        seen.encoded.append(len(x))

    def read(encoder: LlamaTextEncoder, prompts: list[str]) -> None:
        look_at("text encoder 1", encoder.model)
        seen.captions.append(len(prompts))

    def attend(q: torch.Tensor, *_: Any, **__: Any) -> None:
        seen.attended = max(seen.attended, q.shape[0] * q.shape[2])  # (B, H, L, D)

    def convolve(window: torch.Tensor, *_: Any) -> None:
        seen.widest = max(seen.widest, window.shape[4])

    def start(_: BaseProcess) -> None:
        seen.processes += 1

    def open_writer(folder: str, **options: Any) -> Writer:
        Path(folder).mkdir(parents=True)
        seen.writers.append(Writer(Path(folder), options))
        return seen.writers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("WANDB_API_KEY", "")  # so that what a run leaves there goes
        patch.delenv("WANDB_API_KEY")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        spy(patch, HYVideoDiffusionTransformer, "forward", hear)
        spy(patch, torch.nn.functional, "scaled_dot_product_attention", attend)
        spy(patch, vae_layers, "_convolve_window", convolve)
        spy(patch, AutoencoderKLCausal3D, "encode", encode)
        spy(patch, AutoencoderKLCausal3D, "decode", lambda vae, _: look_at("vae", vae))
        spy(patch, LlamaTextEncoder, "encode", read)
        spy(patch, CLIPTextEncoder, "encode", lambda encoder, _: look_at("text encoder 2", encoder.model))
        spy(patch, ThreadPoolExecutor, "__init__", lambda _, workers=None, **__: seen.threads.append(workers))
        spy(patch, BaseProcess, "start", start)
        tensorboard = types.ModuleType("torch.utils.tensorboard")
        tensorboard.SummaryWriter = open_writer
        patch.setitem(sys.modules, tensorboard.__name__, tensorboard)
        patch.setitem(sys.modules, "wandb", wandb_stand_in(seen.wandb))
        yield seen, patch


def counting(seen: Seen) -> Callable[[torch.Tensor], torch.Tensor]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.saved_bytes += tensor.nbytes
        return tensor.detach()

    return pack


@contextmanager
def little_garbage() -> Iterator[None]:
    """Keep what the scripts look through between two models to what they made: pytest and the libraries hold much more."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def logged(told: io.StringIO) -> Iterator[None]:
    """Everything that is logged inside, as the scripts have it on stderr."""
    handler, root = logging.StreamHandler(told), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


@dataclass
class Writer:
    """In place of torch.utils.tensorboard.SummaryWriter."""

    folder: Path
    options: dict[str, Any]
    scalars: list[tuple[str, float, int]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts[name] = text

    def close(self) -> None: ...


def wandb_stand_in(noted: dict[str, Any]) -> types.ModuleType:
    """In place of the package wandb; ``noted`` gets the settings, the key, and the steps that were logged."""
    module, run = types.ModuleType("wandb"), types.SimpleNamespace()
    run.log = lambda values, step: noted["steps"].append(step)
    run.finish = lambda: None

    def init(**settings: Any) -> types.SimpleNamespace:
        noted.update(settings, key=os.environ.get("WANDB_API_KEY"), argv=list(sys.argv), steps=[])
        return run

    module.init = init
    return module


class HubStandIn:
    """In place of the hub: notes every call, and has ``copy`` for those who download."""

    def __init__(self, calls: list[tuple[str, dict[str, Any]]], token: str | None, copy: Path) -> None:
        self._calls, self._copy = calls, copy
        calls.append(("log in", {"token": token}))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(repo_id: str, **options: Any) -> Any:
            self._calls.append((method, {"repo_id": repo_id, **options}))
            done: Future = Future()
            done.set_result(str(self._copy))
            return done if options.get("run_as_future") else str(self._copy)

        return call
