"""Learning-rate schedules: every name that transformers knows, adafactor's own, or any dotted scheduler class."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from networks.training.optim.optimizers import picks_own_learning_rate
from utils.errors import UserError, first_line
from utils.key_values import construct, import_class, literal_key_values, nearest_name

ADAFACTOR = "adafactor"
WITH_MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
# Flag -> (default, the schedules that use it).
SHAPE_FLAGS = {
    "lr_scheduler_num_cycles": (1, ("cosine_with_restarts", *WITH_MIN_LR, "warmup_stable_decay")),
    "lr_scheduler_power": (1.0, ("polynomial",)),
    "lr_scheduler_timescale": (None, ("inverse_sqrt",)),
    "lr_scheduler_min_lr_ratio": (None, (*WITH_MIN_LR, "warmup_stable_decay")),
}


@dataclass(frozen=True)
class ScheduleSettings:
    """The schedule flags.

    Attributes:
        lr_warmup_steps, lr_decay_steps: as typed, see ``step_count``.
        lr_scheduler_type: dotted path of a class to use instead of ``lr_scheduler``.
        lr_scheduler_args: ``key=value`` words whose values are Python literals.
    """

    lr_scheduler: str = "constant"
    lr_warmup_steps: str | float = 0
    lr_decay_steps: str | float = 0
    lr_scheduler_num_cycles: int = 1
    lr_scheduler_power: float = 1.0
    lr_scheduler_timescale: int | None = None
    lr_scheduler_min_lr_ratio: float | None = None
    lr_scheduler_type: str = ""
    lr_scheduler_args: Sequence[str] = ()

    def without_effect(self) -> list[str]:
        """A sentence for each flag that the chosen schedule does not use."""
        return [
            f"--{flag} has no effect with --lr_scheduler {self.lr_scheduler}; it belongs to {', '.join(users)}."
            for flag, (default, users) in SHAPE_FLAGS.items()
            if getattr(self, flag) != default and self.lr_scheduler not in users and not self.lr_scheduler_type
        ]


def step_count(value: str | float, total: int, flag: str) -> int:
    """``"100"`` steps, ``"0.1"`` of the steps, or ``"10%"`` of them, as a number of steps (rounded down).

    A number with a decimal point up to 1.0 is a ratio; values from TOML may be numbers.
    """
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
        if text.endswith("%"):
            number *= total / 100
        elif number <= 1 and any(sign in text for sign in ".eE"):
            number *= total
        elif number != int(number):
            raise ValueError
        steps = math.floor(number + 1e-9)
    except (ValueError, OverflowError):
        raise UserError(
            f"{flag} takes a number of steps, a ratio such as 0.1 or a percentage such as 10%, but got {value!r}."
        ) from None
    if not 0 <= steps <= total:
        raise UserError(f"{flag} {value} means {steps} steps, but the training has {total}.")
    return steps


def make_lr_scheduler(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """A schedule for ``optimizer`` over ``steps`` calls of its ``step``; a UserError where the settings make none."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, AdafactorSchedule

    name = settings.lr_scheduler
    # What transformers.get_scheduler calls for a name. That itself would drop arguments that a schedule does not take.
    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    extra = literal_key_values(settings.lr_scheduler_args, "--lr_scheduler_args")
    if settings.lr_scheduler_type:
        name = settings.lr_scheduler_type
        factory = import_class(name, "--lr_scheduler_type", LRScheduler)
    elif picks_own_learning_rate(optimizer):
        if name not in (ADAFACTOR, "constant"):
            raise UserError(
                f"--lr_scheduler {name} has no effect: this Adafactor picks its own learning rate. "
                "Use --lr_scheduler adafactor, or add relative_step=False to --optimizer_args."
            )
        return AdafactorSchedule(optimizer)
    elif name == ADAFACTOR:
        raise UserError("--lr_scheduler adafactor needs --optimizer_type adafactor with relative_step (its default).")
    elif name not in functions:
        known = (*functions, ADAFACTOR)
        raise UserError(f"--lr_scheduler {name} is not known.{nearest_name(name, known)} Known: {', '.join(known)}.")
    else:
        factory = functions[name]
        extra = _options(settings, steps, inspect.signature(factory).parameters) | extra
    return construct(factory, optimizer, extra, f"the schedule {name}", "--lr_scheduler_args")


def check_lr_scheduler(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Make the schedule over a scratch optimizer and step it once: its mistakes show before a model is loaded."""
    scheduler = make_lr_scheduler(settings, optimizer, steps)
    optimizer.step()  # torch warns of schedules that are stepped before their optimizer
    step_schedule(scheduler, loss=1.0)
    return scheduler


def step_schedule(scheduler: LRScheduler, loss: float) -> None:
    """Advance a schedule; those that watch the training (reduce_lr_on_plateau) get the loss of the step.

    A UserError says why one cannot continue, because its own number of steps is over for example.
    """
    try:
        scheduler.step(*([loss] if "metrics" in inspect.signature(scheduler.step).parameters else []))
    except (ValueError, ArithmeticError, NotImplementedError) as error:
        raise UserError(f"the learning rate schedule fails ({first_line(error)}); look at --lr_scheduler_args.") from error


def _options(settings: ScheduleSettings, steps: int, known: Collection[str]) -> dict[str, Any]:
    """The arguments of a schedule of transformers whose parameters are ``known``."""
    name = settings.lr_scheduler
    warmup = step_count(settings.lr_warmup_steps, steps, "--lr_warmup_steps")
    decay = step_count(settings.lr_decay_steps, steps, "--lr_decay_steps")
    if warmup and "num_warmup_steps" not in known:
        raise UserError(f"--lr_scheduler {name} has no --lr_warmup_steps (given: {warmup}); constant_with_warmup has, for example.")
    if decay and "num_decay_steps" not in known:
        raise UserError(f"--lr_scheduler {name} has no --lr_decay_steps (given: {decay}); only warmup_stable_decay has.")
    if warmup + decay > steps:
        raise UserError(f"--lr_warmup_steps and --lr_decay_steps make {warmup + decay} steps, but the training has {steps}.")
    cycles, lowest = settings.lr_scheduler_num_cycles, settings.lr_scheduler_min_lr_ratio
    # All but restarts count whole waves: half a wave falls from 1 to the lowest rate.
    waves = {"num_cycles": cycles if name == "cosine_with_restarts" else cycles / 2}
    if name == "warmup_stable_decay":
        # Newer versions of transformers derive one of the lengths from the others; older ones need all but the total.
        lengths = {"num_warmup_steps": warmup, "num_stable_steps": steps - warmup - decay, "num_decay_steps": decay}
        return lengths | waves | ({} if lowest is None else {"min_lr_ratio": lowest})
    options = {"num_warmup_steps": warmup, "num_training_steps": steps, "power": settings.lr_scheduler_power}
    options |= {"timescale": settings.lr_scheduler_timescale, "min_lr_rate": lowest or 0.0}
    options |= {} if name == "cosine" else waves
    return {option: value for option, value in options.items() if option in known}
