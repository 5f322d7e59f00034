"""The state of a training: everything it needs to resume as if it had never stopped.

A state is a folder that appears only when whole:

    state.json            where the training stands, and what it was
    network.safetensors   the network's tensors as they are in memory
    optimizer.pt          states of optimizer, schedule and gradient scaler; tensors and plain values only
    random-{rank}.pt      the random generators of each process
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from networks.training.loss.timestep_sampling import TimestepSampler
from networks.training.saving.files import STATE_SUFFIX, output_names
from utils.errors import UserError, first_line
from utils.files import atomic_folder, explain_failed_writing, final_of_temporary
from utils.safetensors_io import read_tensors, save_tensors

logger = logging.getLogger(__name__)

FORMAT = 2
STATE_FILE, NETWORK_FILE, OPTIMIZER_FILE = "state.json", "network.safetensors", "optimizer.pt"
LATEST = "latest"


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: optimizer steps that were made.
        epoch: the one under way, counted from 1.
        batches: of this epoch that each process has used.
        losses: of the last steps, for their average.
        skipped: how many of the last steps in a row were, because their loss or gradient was not finite.
        started_at: seconds since 1970 when the training first began.
        session_id: of that beginning.
        log_runs: by which names the runs in TensorBoard and W&B are continued.
    """

    step: int = 0
    epoch: int = 1
    batches: int = 0
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
        files: the other files of the state and their sizes in bytes.
    """

    progress: Progress
    seed: int
    optimizer: str
    order: dict[str, Any]
    flags: dict[str, Any]
    saved_at: float
    files: dict[str, int] = field(default_factory=dict)


@dataclass
class Restorable:
    """The parts of a training whose state is saved. Each process has its own ``noise`` and ``timesteps``."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    noise: torch.Generator
    timesteps: TimestepSampler
    accelerator: Accelerator


def random_name(rank: int) -> str:
    """The file with the random generators of a process."""
    return f"random-{rank}.pt"


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_state(folder: Path, parts: Restorable, state: StateFile) -> None:
    """Save a state under ``folder``; all processes must call this together.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; an older state there is untouched.
    """
    accelerator = parts.accelerator
    main = accelerator.is_main_process
    with atomic_folder(folder) if main else explain_failed_writing(folder) as temporary:
        shared = Path(broadcast_object_list([str(temporary)])[0])
        _save_plain(_random_state(parts), shared / random_name(accelerator.process_index))
        accelerator.wait_for_everyone()
        if main:
            _write_parts(shared, parts, state)
    if main:
        logger.info("saved the state %s", folder)
    accelerator.wait_for_everyone()


def _write_parts(folder: Path, parts: Restorable, state: StateFile) -> None:
    save_tensors(folder / NETWORK_FILE, {name: value.clone() for name, value in parts.network.state_dict().items()})
    scaler = parts.accelerator.scaler
    states = {
        "optimizer": plain_state(parts.optimizer.state_dict()),
        "lr_scheduler": plain_state(parts.lr_scheduler.state_dict()),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    _save_plain(states, folder / OPTIMIZER_FILE)
    content = {"format": FORMAT} | asdict(state) | {"files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


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


def _save_plain(value: Any, path: Path) -> None:
    """``torch.save`` by way of memory: on a full disk it would raise no OSError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def _random_state(parts: Restorable) -> dict[str, Any]:
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
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Finding and reading


def find_latest_state(folder: Path, name: str) -> Path | None:
    """The newest whole state of the run ``name`` in ``folder``, or None. A state that is not whole is skipped, with a warning.

    Raises:
        UserError: there are states, but not one that can be used: a training that started over would replace what was trained.
    """
    whole: list[tuple[float, Path]] = []
    unusable: list[UserError] = []
    for path in _states_in(folder, name):
        if final_of_temporary(path) is None:
            try:
                whole.append((read_state_file(path).saved_at, path))
            except UserError as error:
                unusable.append(error)
    if unusable and not whole:
        raise UserError(
            f"no state of {name} in {folder} can be used. Move its states away to start over. The first one: {unusable[0]}"
        )
    for error in unusable:
        logger.warning("%s", error)
    return max(whole)[1] if whole else None


def recover_state(folder: Path, name: str) -> None:
    """Give a state its name again if a kill came while it replaced an older one of that name; the newer of the two wins."""
    whole: list[tuple[float, Path]] = []
    for path in _states_in(folder, name):
        if final_of_temporary(path) is not None:
            with suppress(UserError):  # not whole: its writing was interrupted
                whole.append((read_state_file(path).saved_at, path))
    for _, path in sorted(whole, reverse=True):
        final = folder / final_of_temporary(path)
        if not final.exists():
            os.replace(path, final)
            logger.warning("recovered the state %s, which was being replaced when the training was killed", final)


def _states_in(folder: Path, name: str) -> list[Path]:
    """The states of the run ``name``, under their own and under temporary names."""
    ours = output_names(name)
    return [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.endswith(STATE_SUFFIX) and path.is_dir() and ours.fullmatch(final_of_temporary(path) or path.name)
    ]


def read_state_file(folder: Path) -> StateFile:
    """What the state.json in ``folder`` holds.

    Raises:
        UserError: no state there, or one whose files are missing or cut short.
    """
    remedy = "Give the folder of a state that training saved (its name ends with -state), or leave --resume out to start over."
    if not folder.is_dir():
        raise UserError(f"--resume {folder} is not a folder. {remedy}")
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if (version := content.pop("format", None)) != FORMAT:
            raise ValueError(f"its format is {version!r}, and this version reads {FORMAT}")
        progress = _of_types(Progress, content.pop("progress"))
        state = _of_types(StateFile, content | {"progress": progress})
        if min(progress.step, progress.epoch - 1, progress.batches, progress.skipped) < 0:
            raise ValueError("a number in it is too small")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder} is not a state of this trainer ({reason}). {remedy}") from error
    for name, size in state.files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(f"the state {folder} is damaged: {name} is missing or cut short. {remedy}")
    return state


def _of_types(kind: type, values: dict[str, Any]) -> Any:
    """``kind(**values)``; a TypeError names a value that has not the type of its field."""
    for name, hint in get_type_hints(kind).items():
        wanted = get_origin(hint) or hint
        if name in values and not isinstance(values[name], (int, float) if wanted is float else wanted):
            raise TypeError(f"{name} is {values[name]!r}")
    return kind(**values)


def load_state(folder: Path, parts: Restorable) -> None:
    """Put the network, the optimizer, the schedule and the random generators of this process where ``save_state`` found them.

    Raises:
        UserError: a file cannot be read, or its content does not fit.
    """
    try:
        parts.network.load_state_dict(read_tensors(folder / NETWORK_FILE).tensors)
        states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        parts.optimizer.load_state_dict(states["optimizer"])
        parts.lr_scheduler.load_state_dict(states["lr_scheduler"])
        if parts.accelerator.scaler is not None and states["scaler"] is not None:
            parts.accelerator.scaler.load_state_dict(states["scaler"])
        _load_random_state(folder, parts)
    except UserError:
        raise
    except Exception as error:  # third-party optimizers fail in ways of their own
        raise UserError(f"the state {folder} cannot be loaded ({type(error).__name__}: {first_line(error)}).") from error


def _load_random_state(folder: Path, parts: Restorable) -> None:
    path = folder / random_name(parts.accelerator.process_index)
    if not path.is_file():
        logger.warning("%s has no random state for process %d; its noise starts over.", folder, parts.accelerator.process_index)
        return
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
