"""--resume: which state a training goes on from, whether it fits, and putting everything where it was saved."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from networks.lora import DEFAULT_RANK
from networks.training.optim.optimizers import describe_optimizer
from networks.training.saving.files import final_name
from networks.training.saving.state import LATEST, Progress, Restorable, StateFile, find_latest_state, load_state, read_state_file
from utils.errors import UserError
from utils.hub import download_state
from utils.safetensors_io import read_header

logger = logging.getLogger(__name__)

PLACE_FLAGS = ("resume", "seed")  # those that say where to go on, and the one that is checked by itself
OPTIMIZER_FLAGS = ("learning_rate", "optimizer_args")  # whose values an optimiser goes on with
NETWORK_SIZES = "a network of sizes"  # the entry of a state's identity that holds their hash


@dataclass(frozen=True)
class ResumeSettings:
    """Which state a training goes on from."""

    output_dir: str
    output_name: str
    resume: str | None = None
    resume_from_huggingface: bool = False
    huggingface_token: str | None = field(default=None, repr=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.resume_from_huggingface and (self.resume is None or self.resume.count("/") < 2):
            raise UserError("--resume_from_huggingface needs --resume OWNER/NAME/FOLDER, the place of the state on the hub.")

    @property
    def latest(self) -> bool:
        return self.resume == LATEST

    @property
    def final_model(self) -> Path:
        return Path(self.output_dir) / final_name(self.output_name)


@dataclass(frozen=True)
class Resumed:
    """The state that --resume names."""

    folder: Path
    state: StateFile

    def flags_used(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """``flags`` of this training, with those of the state where the optimiser goes on with its numbers."""
        return {**flags, **{name: self.state.flags[name] for name in OPTIMIZER_FLAGS if name in self.state.flags}}


def find_resumed(settings: ResumeSettings) -> Resumed | None:
    """The state that --resume names, or None where training begins anew.

    Raises:
        UserError: no such state, one that is damaged, or one with another seed than --seed.
    """
    if settings.resume is None:
        return None
    if settings.latest:
        folder = find_latest_state(Path(settings.output_dir), settings.output_name)
        if folder is None:
            logger.info("no state of %s in %s yet; training begins anew", settings.output_name, settings.output_dir)
            return None
    elif settings.resume_from_huggingface:
        folder = download_state(settings.resume, settings.huggingface_token)
    else:
        folder = Path(settings.resume)
    state = read_state_file(folder)
    if settings.seed not in (None, state.seed):
        raise UserError(
            f"--seed {settings.seed} is not that of the state {folder}, {state.seed}; leave --seed out or give that one."
        )
    return Resumed(folder, state)


def is_complete(settings: ResumeSettings, steps: int, resumed: Resumed | None) -> bool:
    """Whether the model of this output name was trained for all the steps already, by its metadata or by the state."""
    if not settings.final_model.is_file():
        return False
    if resumed is not None and resumed.state.progress.step >= steps:
        return True
    try:
        return read_header(settings.final_model).metadata.get("ss_steps") == str(steps)
    except UserError:
        return False


def state_identity(flags: Mapping[str, Any], network: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What must be the same for a state to fit; without a network, all but its sizes."""
    identity = {
        "--network_module": flags["network_module"],
        "--optimizer_type": describe_optimizer(optimizer),
        "--lr_scheduler": flags.get("lr_scheduler_type") or flags["lr_scheduler"],
    }
    if network is not None:
        sizes = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
        identity[NETWORK_SIZES] = hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]
    return identity


def require_fitting(resumed: Resumed, identity: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Refuse a state of another network, optimiser or schedule.

    Args:
        identity: of this training, as far as it is known; see ``state_identity``.
        flags: of this training.

    Raises:
        UserError: names what differs.
    """
    then = resumed.state
    differences = [
        f"{name} {then.identity.get(name)}, now {now}"
        for name, now in identity.items()
        if name != NETWORK_SIZES and now != then.identity.get(name)
    ]
    differences += _network_differences(then.flags, flags)
    if not differences and identity.get(NETWORK_SIZES) not in (None, then.identity.get(NETWORK_SIZES)):
        differences = ["its network has layers of other sizes"]
    if differences:
        raise UserError(
            f"the state {resumed.folder} does not fit this training: {'; '.join(differences)}. Use the flags of that run, "
            "or leave --resume out; to begin anew from its weights give its model as --network_weights."
        )


def check_steps_left(settings: ResumeSettings, resumed: Resumed, steps: int) -> None:
    """Refuse a state that is past the last of ``steps``.

    --resume latest ends well where everything is done, and saves the model where a kill came between it and the last state.
    """
    step = resumed.state.progress.step
    done = is_complete(settings, steps, resumed) or (step == steps and not settings.final_model.exists())
    if step >= steps and not (settings.latest and done):
        raise UserError(
            f"the state {resumed.folder} was saved after step {step}, and this training has {steps}; "
            "raise --max_train_steps to go on."
        )


def _network_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes another network, as ``rank 16, now 24``. The network of a state has its own rank, alpha and arguments."""

    def described(flags: Mapping[str, Any]) -> dict[str, str]:
        words = sorted(word for word in flags.get("network_args") or () if not word.startswith("verbose="))
        if flags.get("dim_from_weights"):
            rank = alpha = f"as in {Path(flags['network_weights']).name}"
        else:
            rank, alpha = str(flags.get("network_dim") or DEFAULT_RANK), f"{flags['network_alpha']:g}"
        return {"rank": rank, "alpha": alpha, "--network_args": _text(words)}

    before, after = described(then), described(now)
    return [f"{name} {before[name]}, now {after[name]}" for name in before if before[name] != after[name]]


def _differing(then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, value then, value now) of each of the flags whose values differ."""
    values = [(f"--{name}", _text(then.get(name)), _text(now.get(name))) for name in names]
    return [(name, before, after) for name, before, after in values if before != after]


def _text(value: object) -> str:
    if not value:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def restore(resumed: Resumed, parts: Restorable, order: Mapping[str, Any], flags: Mapping[str, Any]) -> Progress:
    """Put everything where the state was saved; returns where that was. The epoch begins anew where its batches changed.

    Args:
        order: what the order of the batches depends on now.
        flags: that were given to this training, without secrets.

    Raises:
        UserError: see ``require_fitting``.
    """
    state = resumed.state
    require_fitting(resumed, state_identity(flags, parts.network, parts.optimizer), flags)
    load_state(resumed.folder, parts)
    progress = state.progress
    if changed := [name for name, value in order.items() if state.order.get(name) != value]:
        logger.warning("%s changed since the state was saved: epoch %d begins anew", " and ".join(changed), progress.epoch)
        progress.batches = 0
    names = sorted((flags.keys() | state.flags.keys()) - {*PLACE_FLAGS, *OPTIMIZER_FLAGS})
    if differing := _differing(state.flags, flags, names):
        sentences = (f"{name} {before}, now {after}" for name, before, after in differing)
        logger.warning("flags that differ from those of the state: %s", "; ".join(sentences))
    for name, before, after in _differing(state.flags, flags, OPTIMIZER_FLAGS):
        logger.warning("%s %s is not used: the optimiser goes on as in the state, with %s", name, after, before)
    logger.info("resumed from %s: step %d, epoch %d", resumed.folder, progress.step, progress.epoch)
    return progress
