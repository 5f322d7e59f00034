"""Learning-rate schedules: every name that transformers knows, adafactor's own, or any dotted scheduler class."""

from __future__ import annotations

import argparse
import inspect
import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from networks.training.optim.optimizers import picks_own_learning_rate
from utils.errors import UserError, first_line
from utils.key_values import literal_key_values, nearest_name
from utils.named_classes import construct, import_class

logger = logging.getLogger(__name__)

ADAFACTOR = "adafactor"


@dataclass(frozen=True)
class ScheduleSettings:
    """The schedule flags. ``warmup`` and ``decay`` are as typed: a count, a ratio or a percentage of all steps."""

    name: str = "constant"
    warmup: str | float = 0
    decay: str | float = 0
    num_cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_lr_ratio: float | None = None
    scheduler_class: str | None = None
    scheduler_args: tuple[str, ...] = ()


def step_count(value: str | float, total: int, flag: str) -> int:
    """``"100"`` steps, ``"0.1"`` of the steps, or ``"10%"`` of them, as a number of steps (rounded down).

    A number with a decimal point up to 1.0 is a ratio; values from TOML may be numbers.

    Raises:
        UserError: not such a value, negative, or more than ``total`` steps.
    """
    text = str(value).strip()
    try:
        if text.endswith("%"):
            steps = int(total * float(text[:-1]) / 100 + 1e-9)
        elif any(sign in text for sign in ".eE"):
            number = float(text)
            if number > 1 and number != int(number):
                raise ValueError
            steps = int(total * number + 1e-9) if number <= 1 else int(number)
        else:
            steps = int(text)
    except (ValueError, OverflowError):
        raise UserError(
            f"{flag} takes a number of steps, a ratio such as 0.1 or a percentage such as 10%, but got {value!r}."
        ) from None
    if not 0 <= steps <= total:
        raise UserError(f"{flag} {value} means {steps} steps, but the training has {total}.")
    return steps


def make_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The schedule that the training flags describe, to be stepped ``steps`` times; see ``make_schedule``."""
    settings = ScheduleSettings(
        name=args.lr_scheduler,
        warmup=args.lr_warmup_steps,
        decay=args.lr_decay_steps,
        num_cycles=args.lr_scheduler_num_cycles,
        power=args.lr_scheduler_power,
        timescale=args.lr_scheduler_timescale,
        min_lr_ratio=args.lr_scheduler_min_lr_ratio,
        scheduler_class=args.lr_scheduler_type or None,
        scheduler_args=tuple(args.lr_scheduler_args or ()),
    )
    return make_schedule(settings, optimizer, steps, initial_lr=args.learning_rate)


def make_schedule(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, steps: int, initial_lr: float = 0.0) -> LRScheduler:
    """A schedule for ``optimizer`` over ``steps`` calls of its ``step``.

    Args:
        initial_lr: what Adafactor's schedule reports before the first step.

    Raises:
        UserError: an unknown schedule, arguments that it does not take, a warm-up for a schedule without one, a decay for
            another schedule than warmup_stable_decay, or Adafactor's schedule with another optimiser.
    """
    extra = literal_key_values(settings.scheduler_args, "--lr_scheduler_args")
    if settings.scheduler_class is not None:
        scheduler_class = import_class(settings.scheduler_class, "--lr_scheduler_type", LRScheduler)
        return construct(scheduler_class, optimizer, extra, f"the schedule {settings.scheduler_class}", "--lr_scheduler_args")
    if picks_own_learning_rate(optimizer) or settings.name == ADAFACTOR:
        return _adafactor_schedule(settings, optimizer, initial_lr)
    function = _schedule_function(settings.name)
    known = inspect.signature(function).parameters
    options = _options(settings, steps, list(known)) | extra
    return construct(function, optimizer, options, f"the schedule {settings.name}", "--lr_scheduler_args")


def check_lr_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Make the schedule over an optimiser that nobody needs and step it once: its mistakes show before a model is loaded.

    Returns:
        the schedule after that step.

    Raises:
        UserError: as ``make_schedule`` and ``step_schedule``.
    """
    scheduler = make_lr_scheduler(args, optimizer, steps)
    optimizer.step()  # torch warns of schedules that are stepped before their optimiser
    step_schedule(scheduler, loss=1.0)
    return scheduler


def step_schedule(scheduler: LRScheduler, loss: float, optimizer_stood_still: bool = False) -> None:
    """Advance a schedule; those that watch the training (reduce_lr_on_plateau) get the loss of the step.

    Args:
        optimizer_stood_still: the step is one of the training's although the optimiser made none, as there was nothing to learn
            from. torch takes that for a mistake in the order of the two where it is the first one.

    Raises:
        UserError: the schedule cannot go on, because its own number of steps is over for example.
    """
    inner = getattr(scheduler, "scheduler", scheduler)  # what accelerate wraps
    watching = "metrics" in inspect.signature(inner.step).parameters
    try:
        with warnings.catch_warnings() if optimizer_stood_still else nullcontext():
            if optimizer_stood_still:
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`")
            scheduler.step(*([loss] if watching else []))
    except (ValueError, ArithmeticError, NotImplementedError) as error:
        raise UserError(f"the learning rate schedule cannot go on ({first_line(error)}); look at --lr_scheduler_args.") from error


def _options(settings: ScheduleSettings, steps: int, known: Sequence[str]) -> dict[str, Any]:
    """The arguments of the transformers schedule whose parameters are ``known``."""
    warmup = step_count(settings.warmup, steps, "--lr_warmup_steps")
    decay = step_count(settings.decay, steps, "--lr_decay_steps")
    if warmup and "num_warmup_steps" not in known:
        hint = " Use constant_with_warmup." if settings.name == "constant" else ""
        raise UserError(f"--lr_scheduler {settings.name} has no warm-up, but --lr_warmup_steps is {settings.warmup}.{hint}")
    if decay and "num_decay_steps" not in known:
        raise UserError(
            f"--lr_scheduler {settings.name} has no --lr_decay_steps (given: {settings.decay}); only warmup_stable_decay has."
        )
    if warmup + decay > steps:
        raise UserError(f"--lr_warmup_steps and --lr_decay_steps make {warmup + decay} steps, but the training has {steps}.")
    values: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": steps}
    if settings.name == "warmup_stable_decay":
        # Newer versions of transformers derive one of the lengths from the others; older ones need all but the total.
        values = {"num_warmup_steps": warmup, "num_stable_steps": steps - warmup - decay, "num_decay_steps": decay}
    values |= _shape_options(settings)
    return {name: value for name, value in values.items() if name in known}


def _shape_options(settings: ScheduleSettings) -> dict[str, Any]:
    """Cycles, power, timescale and lowest rate for the schedules that have them; says so for the others."""
    name, options = settings.name, {}
    users = {
        "lr_scheduler_num_cycles": (
            "cosine_with_restarts",
            "cosine_with_min_lr",
            "cosine_warmup_with_min_lr",
            "warmup_stable_decay",
        ),
        "lr_scheduler_power": ("polynomial",),
        "lr_scheduler_timescale": ("inverse_sqrt",),
        "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
    }
    given = {
        "lr_scheduler_num_cycles": settings.num_cycles != 1,
        "lr_scheduler_power": settings.power != 1.0,
        "lr_scheduler_timescale": settings.timescale is not None,
        "lr_scheduler_min_lr_ratio": settings.min_lr_ratio is not None,
    }
    for flag, names in users.items():
        if given[flag] and name not in names:
            logger.warning("--%s has no effect with --lr_scheduler %s; it belongs to %s.", flag, name, ", ".join(names))
    if name == "cosine_with_restarts":
        options["num_cycles"] = settings.num_cycles
    elif name in users["lr_scheduler_num_cycles"]:
        options["num_cycles"] = settings.num_cycles / 2  # these count whole waves: half a wave falls from 1 to the lowest rate
    if name == "polynomial":
        options["power"] = settings.power
    if name == "inverse_sqrt" and settings.timescale is not None:
        options["timescale"] = settings.timescale
    if settings.min_lr_ratio is not None:
        options |= (
            {"min_lr_ratio": settings.min_lr_ratio} if name == "warmup_stable_decay" else {"min_lr_rate": settings.min_lr_ratio}
        )
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        options["min_lr_rate"] = 0.0
    return options


def _schedule_function(name: str) -> Any:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    if name not in functions:
        raise UserError(
            f"--lr_scheduler {name} is not known.{nearest_name(name, (*functions, ADAFACTOR))} "
            f"Known: {', '.join((*functions, ADAFACTOR))}."
        )
    return functions[name]


def _adafactor_schedule(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, initial_lr: float) -> LRScheduler:
    from transformers.optimization import AdafactorSchedule

    if not picks_own_learning_rate(optimizer):
        raise UserError("--lr_scheduler adafactor needs --optimizer_type adafactor with relative_step (its default).")
    if settings.name not in (ADAFACTOR, "constant"):
        raise UserError(
            f"--lr_scheduler {settings.name} has no effect: this Adafactor picks its own learning rate. "
            "Use --lr_scheduler adafactor, or add relative_step=False to --optimizer_args."
        )
    if settings.name == "constant":
        logger.info("Adafactor picks its own learning rate; the schedule adafactor is used")
    return AdafactorSchedule(optimizer, initial_lr)
