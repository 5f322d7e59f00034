"""Learning-rate schedules against closed formulas, and step counts as users write them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from networks.training.optim.lr_schedules import ScheduleSettings, make_lr_scheduler, step_count, step_schedule
from networks.training.optim.optimizers import OptimizerSettings, make_optimizer
from utils.errors import UserError

STEPS, RATE = 100, 0.5


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=RATE)


def rates(**settings) -> list[float]:
    """Rate of every step, as a share of the base rate."""
    sgd = optimizer()
    scheduler = make_lr_scheduler(ScheduleSettings(**settings), sgd, STEPS)
    found = []
    for _ in range(STEPS):
        found.append(sgd.param_groups[0]["lr"] / RATE)
        sgd.step()
        step_schedule(scheduler, loss=1.0)
    return found


def warmed(after, warmup: int = 10):
    return lambda step: step / warmup if step < warmup else after((step - warmup) / (STEPS - warmup), step)


def decayed(step: int, low: float = 0.0) -> float:
    """warmup_stable_decay: 10 steps up, then flat, then half a cosine over the last 20."""
    share = step / 10 if step < 10 else 1.0 if step < 80 else (1 + math.cos(math.pi * (step - 80) / 20)) / 2
    return low + (1 - low) * share


WARM = {"lr_warmup_steps": 10}
FORMULAS = [
    ("constant", {}, lambda step: 1.0),
    ("constant_with_warmup", WARM, warmed(lambda progress, step: 1.0)),
    ("linear", {"lr_warmup_steps": "0.1"}, warmed(lambda progress, step: 1 - progress)),
    ("cosine", {"lr_warmup_steps": "10%"}, warmed(lambda progress, step: (1 + math.cos(math.pi * progress)) / 2)),
    (
        "cosine_with_restarts",
        WARM | {"lr_scheduler_num_cycles": 3},
        warmed(lambda progress, step: (1 + math.cos(math.pi * ((3 * progress) % 1))) / 2),
    ),
    ("polynomial", WARM | {"lr_scheduler_power": 2.0}, warmed(lambda progress, step: (1 - progress) ** 2)),
    ("inverse_sqrt", WARM | {"lr_scheduler_timescale": 25}, warmed(lambda progress, step: (25 / (step + 15)) ** 0.5)),
    (
        "cosine_with_min_lr",
        WARM | {"lr_scheduler_min_lr_ratio": 0.2},
        warmed(lambda progress, step: 0.2 + 0.8 * (1 + math.cos(math.pi * progress)) / 2),
    ),
    ("warmup_stable_decay", WARM | {"lr_decay_steps": 20}, decayed),
    (
        "warmup_stable_decay",
        WARM | {"lr_decay_steps": 20, "lr_scheduler_min_lr_ratio": 0.1},
        lambda step: decayed(step, 0.1),
    ),
]


@pytest.mark.parametrize(("name", "settings", "formula"), FORMULAS)
def test_schedule_follows_its_formula(name, settings, formula):
    assert rates(lr_scheduler=name, **settings) == pytest.approx([formula(step) for step in range(STEPS)], abs=2e-6)


@pytest.mark.parametrize("name", sorted(kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION))
def test_every_schedule_of_transformers_runs(name):
    found = rates(lr_scheduler=name)
    assert all(0 <= rate <= 1.0001 for rate in found) and found[0] == pytest.approx(1.0, abs=1e-3)


def test_plateau_watches_the_loss():
    sgd = optimizer()
    settings = ScheduleSettings(lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=("patience=2", "factor=0.5"))
    scheduler = make_lr_scheduler(settings, sgd, STEPS)
    for loss in (1.0, 0.9, 0.8, 0.9, 0.9):
        step_schedule(scheduler, loss)
    assert sgd.param_groups[0]["lr"] == RATE
    step_schedule(scheduler, 0.9)
    assert sgd.param_groups[0]["lr"] == RATE / 2


def test_a_dotted_class_is_used_with_its_arguments():
    sgd = optimizer()
    settings = ScheduleSettings(lr_scheduler_type="torch.optim.lr_scheduler.StepLR", lr_scheduler_args=("step_size=3", "gamma=0.1"))
    scheduler = make_lr_scheduler(settings, sgd, STEPS)
    for _ in range(3):
        sgd.step()
        step_schedule(scheduler, 1.0)
    assert sgd.param_groups[0]["lr"] == pytest.approx(RATE / 10)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        *[("0", 0), (100, 100), ("100.0", 100), ("1e2", 100)],
        *[("0.1", 25), (0.1, 25), ("0.29", 72), ("1.0", 250), ("10%", 25), ("12.5 %", 31), ("100%", 250)],
    ],
)
def test_step_counts(value, steps):
    assert step_count(value, 250, "--lr_warmup_steps") == steps


@pytest.mark.parametrize("value", ["ten", "1.5", "-1", "-0.1", "251", "101%", "%", "nan", "inf"])
def test_impossible_step_counts_are_user_errors(value):
    with pytest.raises(UserError, match="--lr_warmup_steps"):
        step_count(value, 250, "--lr_warmup_steps")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler": "cosin"}, "is not known. Did you mean 'cosine'"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "has no --lr_warmup_steps .*constant_with_warmup"),
        ({"lr_scheduler": "cosine", "lr_decay_steps": 5}, "only warmup_stable_decay has"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 60, "lr_decay_steps": 50},
            "make 110 steps, but the training has 100",
        ),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("cycles=2",)}, "has no argument 'cycles'. Did you mean 'num_cycles'"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=0.6",)}, "refuses its arguments .*lr_end=0.6"),
        ({"lr_scheduler": "adafactor"}, "needs --optimizer_type adafactor"),
        ({"lr_scheduler_type": "torch.optim.lr_scheduler.StepLR"}, "refuses its arguments .none.: .*step_size"),
    ],
)
def test_mistakes_are_user_errors(settings, message):
    with pytest.raises(UserError, match=message):
        make_lr_scheduler(ScheduleSettings(**settings), optimizer(), STEPS)


def test_flags_without_effect_are_named():
    shape = {"lr_scheduler_power": 2.0, "lr_scheduler_num_cycles": 4, "lr_scheduler_min_lr_ratio": 0.1}
    sentences = ScheduleSettings("cosine", **shape).without_effect()
    assert sorted(sentence.partition(" ")[0] for sentence in sentences) == sorted(f"--{flag}" for flag in shape)
    assert "--lr_scheduler_power has no effect with --lr_scheduler cosine; it belongs to polynomial." in sentences
    assert rates(lr_scheduler="cosine", **shape) == rates(lr_scheduler="cosine")
    assert not ScheduleSettings("polynomial", lr_scheduler_power=2.0).without_effect()


def test_adafactor_has_its_own_schedule():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    own = make_optimizer(OptimizerSettings("adafactor"), [weight])
    scheduler = make_lr_scheduler(ScheduleSettings(lr_scheduler="adafactor"), own, STEPS)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        own.step()
        step_schedule(scheduler, 1.0)
    assert 0 < scheduler.get_lr()[0] <= 1e-2
    with pytest.raises(UserError, match="picks its own learning rate"):
        make_lr_scheduler(ScheduleSettings(lr_scheduler="cosine"), own, STEPS)
