"""The state of a training: everything it needs to resume as if it had never stopped.

A state is a folder that appears only when whole:

    state.json            where the training stands, and what it was
    network.safetensors   the network's tensors as they are in memory
    optimizer.pt          states of optimizer, schedule and gradient scaler; tensors and plain values only
    random-0.pt           the random generators; with several processes dropout is seeded in each step, the rest is the same in all
"""

from __future__ import annotations

import io
import json
import logging
import math
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from hunyuan_model.checkpoints.reading import require_plain_torch_file
from networks.training.loss.timestep_sampling import TimestepSampler
from utils.checksums import content_checksum, file_checksum, is_changed
from utils.errors import UserError, first_line, shown
from utils.files import atomic_folder, read_text
from utils.safetensors_io import read_tensors, save_tensors

logger = logging.getLogger(__name__)

FORMAT = 2
DATA = "data sets"  # in the order of a state: a fingerprint of the items; the name in states that people have
STATE_FILE, NETWORK_FILE, OPTIMIZER_FILE, RANDOM_FILE = "state.json", "network.safetensors", "optimizer.pt", "random-0.pt"
LATEST = "latest"
REMEDY = "Give the folder of a state that training saved (its name ends with -state), or leave --resume out to start over."
MAX_COUNT = 2**53
# What optimizers keep of each number of a parameter.
WHOLE_STATES = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum", "prev", "z"}
)


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: optimizer steps that were made.
        epoch: the one under way, counted from 1.
        batches: of this epoch that all processes have used.
        batches_per_step: for which the batches of this epoch were put in order; 0 in states of earlier versions, where each process
            counted its own batches.
        losses: of the last steps, for their average.
        skipped: how many of the last steps in a row were, because their loss or gradient was not finite.
        started_at: seconds since 1970 when the training first began.
        session_id: of that beginning.
        log_runs: by which names the runs in TensorBoard and W&B are continued.
    """

    step: int = 0
    epoch: int = 1
    batches: int = 0
    batches_per_step: int = 0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    started_at: float = 0.0
    session_id: str = ""
    log_runs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StateFile:
    """What state.json holds.

    Attributes:
        optimizer: its class, which must be the same for the state to fit.
        order: what the order of the batches depends on.
        flags: the flags of the run that saved it.
        saved_at: seconds since 1970.
        lineage: how many trainings of this name began in the folder, or went on from a state, before this one.
        files: the other files of the state and their sizes in bytes.
        checksums: of the files, by ``utils.checksums``; states of earlier versions have none.
    """

    progress: Progress
    seed: int
    optimizer: str
    order: dict[str, Any]
    flags: dict[str, Any]
    saved_at: float
    lineage: int = 0
    files: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass
class Restorable:
    """The parts of a training whose state is saved. ``noise`` and ``timesteps`` stand at the same place in all processes."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    noise: torch.Generator
    timesteps: TimestepSampler
    accelerator: Accelerator


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_state(
    folder: Path, parts: Restorable, state: StateFile, random_state: Mapping[str, Any] | None = None, alone: bool = False
) -> None:
    """Save a state under ``folder``; all processes must call this together.

    Args:
        random_state: from ``random_state_of``, for a state of before now.
        alone: only the main process calls this, as the others may be gone.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; an older state there is untouched.
    """
    accelerator = parts.accelerator
    main = accelerator.is_main_process
    if main:
        with atomic_folder(folder) as temporary:
            (temporary / RANDOM_FILE).write_bytes(_plain_content(random_state or random_state_of(parts)))
            _write_parts(temporary, parts, state)
        logger.info("saved the state %s", folder)
    if not alone:
        accelerator.wait_for_everyone()


def _write_parts(folder: Path, parts: Restorable, state: StateFile) -> None:
    save_tensors(folder / NETWORK_FILE, {name: value.clone() for name, value in parts.network.state_dict().items()})
    scaler = parts.accelerator.scaler
    states = {
        "optimizer": plain_state(parts.optimizer.state_dict()),
        "lr_scheduler": plain_state(parts.lr_scheduler.state_dict()),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    with ThreadPoolExecutor(1) as beside:  # a checksum costs little beside writing
        summed = {NETWORK_FILE: beside.submit(file_checksum, folder / NETWORK_FILE)}
        content = _plain_content(states)
        summed[OPTIMIZER_FILE] = beside.submit(content_checksum, content)
        (folder / OPTIMIZER_FILE).write_bytes(content)
    files = sorted(folder.iterdir())
    sizes = {path.name: path.stat().st_size for path in files}
    checksums = {path.name: summed[path.name].result() if path.name in summed else file_checksum(path) for path in files}
    content = {"format": FORMAT} | asdict(state) | {"files": sizes, "checksums": checksums}
    content["checksum"] = _checksum_of(json.loads(json.dumps(content, default=str)))
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _checksum_of(content: Mapping[str, Any]) -> str:
    """Of what state.json holds besides this checksum itself."""
    return content_checksum(json.dumps(content, sort_keys=True).encode())


def plain_state(value: Any) -> Any:
    """``value`` made of tensors, plain containers and plain values only, so that it can be read without executing anything.

    Raises:
        UserError: something in it is neither.
    """
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype, torch.device)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {plain_state(key): plain_state(item) for key, item in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(plain_state(item) for item in value)
    raise UserError(
        f"the state of the optimizer or the schedule holds a {type(value).__name__}, which cannot be saved safely. "
        "Use another --optimizer_type or --lr_scheduler_type, or train without --save_state."
    )


def check_state_can_be_saved(optimizer: torch.optim.Optimizer, lr_scheduler: Any, wanted: bool) -> None:
    """See whether states of this optimizer and this schedule can be saved, and warn if not.

    Raises:
        UserError: they cannot, but are ``wanted``.
    """
    try:
        plain_state({"optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict()})
    except UserError as error:
        if wanted:
            raise
        logger.warning("%s A training that is stopped will save its model only.", error)


def _plain_content(value: Any) -> memoryview:
    """What ``torch.save`` writes, in memory: on a full disk it would raise no OSError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def random_state_of(parts: Restorable) -> dict[str, Any]:
    """Where the random generators of this process stand."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "noise": parts.noise.get_state(),
        "timesteps": parts.timesteps.state_dict(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
        state["other GPUs"] = [torch.cuda.get_rng_state(device) for device in _other_gpus(parts)]
    return state


def _other_gpus(parts: Restorable) -> list[torch.device]:
    """On which a network also computes whose layers are on several, in their order."""
    used = {parameter.device for parameter in parts.network.parameters() if parameter.device.type == "cuda"}
    return sorted((device for device in used if device.index != torch.cuda.current_device()), key=lambda device: device.index)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_state_file(folder: Path) -> StateFile:
    """What the state.json in ``folder`` holds.

    Raises:
        UserError: no state there, values in it that cannot be, or files that are missing or cut short.
    """
    if not folder.is_dir():
        raise UserError(f"--resume {folder} is not a folder. {REMEDY}")
    try:
        content = json.loads(read_text(folder / STATE_FILE, "the file of a state"))
        saved, found = content.pop("checksum", None), _checksum_of(content)
        if (version := content.pop("format", None)) != FORMAT:
            raise ValueError(f"its format is {version!r}, and this version reads {FORMAT}")
        progress = _of_types(Progress, content.pop("progress"))
        state = _of_types(StateFile, content | {"progress": progress})
        counts = [progress.step, progress.epoch - 1, progress.batches, progress.batches_per_step, progress.skipped]
        counts += [state.lineage, state.seed, *(value for name, value in state.order.items() if name != DATA)]
        if min(counts) < 0 or max(counts) > MAX_COUNT or not all(map(math.isfinite, (state.saved_at, progress.started_at))):
            raise ValueError("a number in it is too small or too large")
        if strange := [name for name in (*state.files, *state.checksums) if Path(name).name != name or name in ("", ".", "..")]:
            raise ValueError(f"{shown(strange[0])} is no name of a file")
        if is_changed(saved, found):
            raise ValueError("it is not what was saved")
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder} is not a state of this trainer ({reason}). {REMEDY}") from error
    for name, size in state.files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(f"the state {folder} is damaged: {name} is missing or cut short. {REMEDY}")
    return state


def verify_state(folder: Path, state: StateFile) -> None:
    """Raise a UserError if a file of the state does not hold the bytes that were saved. States without checksums pass."""
    for name, saved in state.checksums.items():
        try:
            found = file_checksum(folder / name)
        except OSError as error:
            raise UserError(f"cannot read {folder / name}: {error.strerror or error}. {REMEDY}") from error
        if is_changed(saved, found):
            raise UserError(f"the state {folder} is damaged: {name} is not what was saved. {REMEDY}")


def _of_types(kind: type, values: dict[str, Any]) -> Any:
    """``kind(**values)``; a TypeError names a value that has not the type of its field."""
    for name, hint in get_type_hints(kind).items():
        if name in values and not _is(values[name], hint):
            raise TypeError(f"{name} is {shown(values[name])}")
    return kind(**values)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is what a type hint says: a class, or a list or dict of such."""
    kind, of = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not isinstance(value, kind):
        return False
    parts = [value] if kind is list else [value.keys(), value.values()] if kind is dict else []
    return all(_is(each, part_hint) for part, part_hint in zip(parts, of) for each in part)


def load_state(folder: Path, parts: Restorable) -> None:
    """Put the network, the optimizer, the schedule and the random generators of this process where ``save_state`` found them.

    Everything is compared with what is there before anything is changed.

    Raises:
        UserError: a file cannot be read, or its content does not fit.
    """
    try:
        tensors = read_tensors(folder / NETWORK_FILE).tensors
        require_plain_torch_file(folder / OPTIMIZER_FILE, f"the state {folder} cannot be loaded:")
        states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        scaler = parts.accelerator.scaler
        require_alike("network", tensors, dict(parts.network.state_dict()))
        schedule = plain_state(parts.lr_scheduler.state_dict())
        require_alike("lr_scheduler", states["lr_scheduler"], schedule)
        _require_optimizer_state(states["optimizer"], parts.optimizer)
        if scaler is not None and states["scaler"] is not None:
            require_alike("scaler", states["scaler"], scaler.state_dict())
        parts.network.load_state_dict(tensors)
        parts.optimizer.load_state_dict(states["optimizer"])
        # Schedules make attributes of whatever they get.
        parts.lr_scheduler.load_state_dict({key: value for key, value in states["lr_scheduler"].items() if key in schedule})
        if scaler is not None and states["scaler"] is not None:
            scaler.load_state_dict(states["scaler"])
        _load_random_state(folder, parts)
    except UserError:
        raise
    except Exception as error:  # third-party optimizers fail in ways of their own
        raise UserError(f"the state {folder} cannot be loaded ({type(error).__name__}: {first_line(error)}).") from error


def require_alike(where: str, given: Any, own: Any) -> None:
    """Raise a ValueError that names the place where a saved value is of another kind than the one that it replaces.

    Numbers may be of any kind, what is None may be anything plain, and what either side lacks is passed over, as other releases of
    torch have more or fewer values; tensors have the same shapes.
    """
    number = (int, float, torch.Tensor)
    if isinstance(own, torch.Tensor) and not (isinstance(given, number) and own.numel() == 1):
        if not isinstance(given, torch.Tensor) or given.shape != own.shape:
            raise ValueError(f"{where} is {shown(getattr(given, 'shape', given))}, not of the shape {tuple(own.shape)}")
    elif isinstance(own, Mapping):
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} is {shown(given)}")
        for key in own.keys() & given.keys():
            require_alike(f"{where}.{key}", given[key], own[key])
    elif isinstance(own, (list, tuple)):
        if not isinstance(given, (list, tuple)) or len(given) != len(own):
            raise ValueError(f"{where} is {shown(given)}")
        for index, (one, other) in enumerate(zip(given, own)):
            require_alike(f"{where}.{index}", one, other)
    elif own is not None and not isinstance(given, number if isinstance(own, number) else type(own)):
        raise ValueError(f"{where} is {shown(given)}")


def _require_optimizer_state(given: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if what was saved cannot be the state of this optimizer."""
    own = optimizer.state_dict()
    require_alike("optimizer.param_groups", given["param_groups"], own["param_groups"])
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    for number, state in given["state"].items():
        if number not in parameters or not isinstance(state, Mapping):
            raise ValueError(f"optimizer.state.{shown(number)} is of no parameter")
        for key in WHOLE_STATES & state.keys():
            if isinstance(state[key], torch.Tensor):
                require_alike(f"optimizer.state.{number}.{key}", state[key], parameters[number])
        if "step" in state:
            require_alike(f"optimizer.state.{number}.step", state["step"], 0)


def _load_random_state(folder: Path, parts: Restorable) -> None:
    path = folder / RANDOM_FILE
    require_plain_torch_file(path, f"the state {folder} cannot be loaded:")
    state = torch.load(path, map_location="cpu", weights_only=True)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    parts.timesteps.load_state_dict(state["timesteps"])
    if state["noise"].shape == parts.noise.get_state().shape:
        parts.noise.set_state(state["noise"])
    else:
        logger.warning("%s was saved on another kind of device; the noise starts over.", folder)
    if parts.accelerator.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
        for device, one in zip(_other_gpus(parts), state.get("other GPUs", ())):
            torch.cuda.set_rng_state(one, device)
