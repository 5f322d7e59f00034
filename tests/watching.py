"""Looking on while a script runs in this process: what it computes in, reads, starts and tells others, without a graphics card."""

from __future__ import annotations

import io
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hunyuan_model.runtime import compilation, loading
from hunyuan_model.runtime.offload.activation_offload import HostPool
from hunyuan_model.text.clip import CLIPTextEncoder
from hunyuan_model.text.llm import LlamaTextEncoder
from hunyuan_model.transformer.attention import Attention
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from hunyuan_model.vae import convolution as vae_convolution
from hunyuan_model.vae.model import AutoencoderKLCausal3D
from networks.training.loss.timestep_sampling import TimestepSampler


@dataclass
class Seen:
    """What a run did inside."""

    timesteps: list[float] = field(default_factory=list)  # that the transformer was given
    samples: set[int] = field(default_factory=set)  # sizes of the batches that it was given
    guidance: set[float] = field(default_factory=set)
    weights: dict[str, set[torch.dtype]] = field(default_factory=dict)  # of each part of the model when it computed
    scaled: set[str] = field(default_factory=set)  # parts of the model with scales beside some weights
    in_one_piece: set[str] = field(default_factory=set)  # blocks and embedders whose weights lie in one piece of memory: swapped
    injected: bool = False  # whether Linear layers of the transformer compute something beside their weights
    pinned: set[bool] = field(default_factory=set)  # whether swapped weights were to be page-locked
    kept_attention: set[bool] = field(default_factory=set)  # whether checkpointing was to keep the results of attention
    compiled: set[str] = field(default_factory=set)  # modes in which something was compiled
    attended: int = 0  # rows, of all samples, in the largest attention call
    split: set[bool] = field(default_factory=set)  # whether attention was to be sample by sample
    sampler: Any = None  # of timesteps
    handlers: list[Any] = field(default_factory=list)  # settings that accelerate was given
    saved_bytes: int = 0  # kept for backward passes, or as inputs of what is computed again in them
    offloaded: int = 0  # bytes of activations that went to host memory
    encoded: list[int] = field(default_factory=list)  # sizes of the batches that the VAE encoded
    captions: list[int] = field(default_factory=list)  # sizes of the batches that text encoder 1 read
    widest: int = 0  # columns that a convolution of the VAE saw at once
    threads: list[int] = field(default_factory=list)  # sizes of the thread pools
    processes: int = 0  # that were started
    writers: list[Writer] = field(default_factory=list)  # of TensorBoard
    wandb: dict[str, Any] = field(default_factory=dict)
    hub: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # calls and their arguments


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
        seen.scaled |= {part for name, _ in module.named_parameters() if name.endswith("weight_scale")}

    def hear(transformer: torch.nn.Module, _x: Any, t: torch.Tensor, *texts_and_guidance: torch.Tensor) -> None:
        look_at("transformer", transformer)
        seen.in_one_piece |= set(in_one_piece(transformer))
        seen.injected |= any(isinstance(layer, torch.nn.Linear) and "forward" in vars(layer) for layer in transformer.modules())
        seen.timesteps += t.tolist()
        seen.samples.add(len(t))
        seen.guidance |= set(texts_and_guidance[-1].tolist())

    def encode(vae: torch.nn.Module, x: torch.Tensor) -> None:
        look_at("vae", vae)
        seen.encoded.append(len(x))

    def read(encoder: LlamaTextEncoder, prompts: list[str]) -> None:
        look_at("text encoder 1", encoder.model)
        seen.captions.append(len(prompts))

    def make_sampler(sampler: TimestepSampler, *_: Any, **__: Any) -> None:
        seen.sampler = sampler

    def accelerate(_: Accelerator, kwargs_handlers: Sequence[Any] = (), **__: Any) -> None:
        seen.handlers += kwargs_handlers

    def attend(q: torch.Tensor, *_: Any, **__: Any) -> None:
        seen.attended = max(seen.attended, q.shape[0] * q.shape[2])  # (B, H, L, D)

    def convolve(window: torch.Tensor, *_: Any) -> None:
        seen.widest = max(seen.widest, window.shape[4])

    def start(_: BaseProcess) -> None:
        seen.processes += 1

    def offload(_: HostPool, size: int) -> None:
        seen.offloaded += size

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
        spy(patch, loading, "enable_gradient_checkpointing", lambda *_, keep_attention: seen.kept_attention.add(keep_attention))
        spy(patch, loading, "enable_block_swap", lambda _transformer, settings, *_: seen.pinned.add(settings.pinned))
        spy(patch, Attention, "__init__", lambda _self, _mode, _dense, _packed, split=False: seen.split.add(split))
        spy(patch, TimestepSampler, "__init__", make_sampler)
        spy(patch, Accelerator, "__init__", accelerate)
        spy(patch, HostPool, "take", offload)
        patch.setattr(compilation, "BACKEND", "eager")  # which needs no compiler
        spy(patch, compilation.CompileSettings, "compiled", lambda settings, _function: seen.compiled.add(settings.mode))
        spy(patch, torch.nn.functional, "scaled_dot_product_attention", attend)
        spy(patch, vae_convolution, "convolution", convolve)
        spy(patch, AutoencoderKLCausal3D, "encode", encode)
        spy(patch, AutoencoderKLCausal3D, "decode", lambda vae, _: look_at("vae", vae))
        spy(patch, LlamaTextEncoder, "encode", read)
        spy(patch, CLIPTextEncoder, "encode", lambda encoder, _: look_at("text encoder 2", encoder.model))
        spy(patch, ThreadPoolExecutor, "__init__", lambda _, workers=None, **__: seen.threads.append(workers))
        spy(patch, BaseProcess, "start", start)
        tensorboard = types.ModuleType("torch.utils.tensorboard")
        tensorboard.SummaryWriter = open_writer
        patch.setattr(torch.utils, "tensorboard", tensorboard, raising=False)  # what accelerate imports
        patch.setitem(sys.modules, tensorboard.__name__, tensorboard)
        patch.setitem(sys.modules, "wandb", wandb_stand_in(seen.wandb))
        yield seen, patch


def in_one_piece(transformer: torch.nn.Module) -> Iterator[str]:
    lists = ("double_blocks", "single_blocks")
    parts = {f"{name}.{index}": block for name in lists for index, block in enumerate(getattr(transformer, name))}
    for name, part in {**parts, "img_in": transformer.img_in, "txt_in": transformer.txt_in}.items():
        if len({weight.untyped_storage().data_ptr() for weight in part.parameters()}) == 1:
            yield name


def counting(seen: Seen) -> Callable[[torch.Tensor], torch.Tensor]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.saved_bytes += tensor.nbytes
        return tensor.detach()

    return pack


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

    def add_scalar(self, name: str, value: float, global_step: int) -> None:
        self.scalars.append((name, value, global_step))

    def add_text(self, name: str, text: str, global_step: int) -> None:
        self.texts[name] = text

    def flush(self) -> None: ...

    def close(self) -> None: ...


def wandb_stand_in(noted: dict[str, Any]) -> types.ModuleType:
    """In place of the package wandb; ``noted`` gets the settings, the key, and the steps that were logged."""
    module, run = types.ModuleType("wandb"), types.SimpleNamespace(id="run1")
    run.log = lambda values, step: noted["steps"].append(step)
    run.finish = lambda: None

    def init(**settings: Any) -> types.SimpleNamespace:
        noted.update(settings, key=os.environ.get("WANDB_API_KEY"), argv=list(sys.argv), steps=[])
        return run

    module.init = init
    module.config = types.SimpleNamespace(update=lambda values, allow_val_change: noted.update(config=values))
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
