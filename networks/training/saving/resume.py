"""--resume: which state a training continues from, whether it fits, and putting everything where it was saved."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from networks.lora import DEFAULT_RANK
from networks.training.saving.files import final_name
from networks.training.saving.latest import find_latest_state
from networks.training.saving.state import DATA, LATEST, Progress, Restorable, StateFile, load_state, read_state_file, verify_state
from utils.errors import UserError, first_line
from utils.hub import download_state
from utils.safetensors_io import read_header

logger = logging.getLogger(__name__)

PLACE_FLAGS = ("resume", "seed")  # those that say where to resume, and the one that is checked by itself
OPTIMIZER_FLAGS = ("learning_rate", "optimizer_args")  # whose values an optimizer continues with


@dataclass(frozen=True)
class ResumeSettings:
    """Which state a training continues from."""

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
        """``flags`` of this training, with those of the state where the optimizer continues with its numbers."""
        return {**flags, **{name: self.state.flags[name] for name in OPTIMIZER_FLAGS if name in self.state.flags}}


def find_resumed(settings: ResumeSettings) -> Resumed | None:
    """The state that --resume names, or None where training starts from the beginning.

    Raises:
        UserError: no such state, one that is damaged, or one with another seed than --seed.
    """
    if settings.resume is None:
        return None
    if settings.latest:
        folder = find_latest_state(Path(settings.output_dir), settings.output_name)
        if folder is None:
            logger.info("no state of %s in %s yet; training starts from the beginning", settings.output_name, settings.output_dir)
            return None
    elif settings.resume_from_huggingface:
        folder = download_state(settings.resume, settings.huggingface_token)
    else:
        folder = Path(settings.resume)
    state = read_state_file(folder)
    if not settings.latest:  # that one was verified
        verify_state(folder, state)
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


def require_fitting(resumed: Resumed, flags: Mapping[str, Any], optimizer: str) -> None:
    """Refuse a state of another network, optimizer or schedule.

    Args:
        flags: of this training.
        optimizer: its class.

    Raises:
        UserError: names what differs, as ``rank 16, now 24``.
    """
    try:
        before = _identity(resumed.state.flags, resumed.state.optimizer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the flags in {resumed.folder} are not those of a training ({reason}); use another state.") from error
    after = _identity(flags, optimizer)
    if differences := [f"{name} {before[name]}, now {now}" for name, now in after.items() if before[name] != now]:
        raise UserError(
            f"the state {resumed.folder} does not fit this training: {'; '.join(differences)}. Use the flags of that run, "
            "or leave --resume out; to start from its weights give its model as --network_weights."
        )


def _identity(flags: Mapping[str, Any], optimizer: str) -> dict[str, str]:
    """What must be the same for a state to fit. The network of a state has its own rank, alpha and arguments."""
    words = sorted(word for word in flags.get("network_args") or () if not word.startswith("verbose="))
    if flags.get("dim_from_weights"):
        rank = alpha = f"as in {Path(flags['network_weights']).name}"
    else:
        rank, alpha = str(flags.get("network_dim") or DEFAULT_RANK), f"{flags['network_alpha']:g}"
    return {
        "--network_module": flags["network_module"],
        "rank": rank,
        "alpha": alpha,
        "--network_args": _text(words),
        "--optimizer_type": optimizer,
        "--lr_scheduler": flags.get("lr_scheduler_type") or flags["lr_scheduler"],
    }


def check_steps_left(settings: ResumeSettings, resumed: Resumed, steps: int) -> None:
    """Refuse a state that is past the last of ``steps``.

    --resume latest ends well where everything is done, and saves the model where a kill came between it and the last state.
    """
    step = resumed.state.progress.step
    done = is_complete(settings, steps, resumed) or (step == steps and not settings.final_model.exists())
    if step >= steps and not (settings.latest and done):
        raise UserError(
            f"the state {resumed.folder} was saved after step {step}, and this training has {steps}; "
            "raise --max_train_steps to continue."
        )


def _differing(then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, value then, value now) of each of the flags whose values differ."""
    values = [(f"--{name}", _text(then.get(name)), _text(now.get(name))) for name in names]
    return [(name, before, after) for name, before, after in values if before != after]


def _text(value: object) -> str:
    if not value:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def restore(resumed: Resumed, parts: Restorable, order: Mapping[str, Any], flags: Mapping[str, Any]) -> Progress:
    """Put everything where the state was saved; returns where that was. The epoch starts over where its batches changed.

    Args:
        order: what the order of the batches depends on now.
        flags: that were given to this training, without secrets.

    Raises:
        UserError: see ``load_state``.
    """
    state = resumed.state
    load_state(resumed.folder, parts)
    progress = state.progress
    if progress.batches_per_step == 0:  # of an earlier version
        progress.batches, progress.batches_per_step = progress.batches * state.order.get("processes", 1), 1
    names = [name for name, value in order.items() if state.order.get(name) != value]
    if DATA in names:
        logger.warning("%s changed since the state was saved: epoch %d starts over", DATA, progress.epoch)
        progress.batches = 0
    elif names:
        changes = ", ".join(f"{name} {state.order.get(name)}, now {order[name]}" for name in names)
        message = "%s: epoch %d goes on with its batch %d, in the order that it had; steps have %s"
        then, now = (math.prod(part for key, part in each.items() if key != DATA) for each in (state.order, order))
        more = "as many batches as before" if then == now else f"{now} batches, not {then}"
        logger.warning(message, changes, progress.epoch, progress.batches + 1, more)
    names = sorted((flags.keys() | state.flags.keys()) - {*PLACE_FLAGS, *OPTIMIZER_FLAGS})
    if differing := _differing(state.flags, flags, names):
        sentences = (f"{name} {before}, now {after}" for name, before, after in differing)
        logger.warning("flags that differ from those of the state: %s", "; ".join(sentences))
    for name, before, after in _differing(state.flags, flags, OPTIMIZER_FLAGS):
        logger.warning("%s %s is not used: the optimizer continues as in the state, with %s", name, after, before)
    logger.info("resumed from %s: step %d, epoch %d", resumed.folder, progress.step, progress.epoch)
    return progress
