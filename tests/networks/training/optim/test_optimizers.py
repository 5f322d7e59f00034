"""Optimizers by name: what is made, that it learns, what is refused, and the rates that are logged."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from accelerate import Accelerator

from networks.lora import LoRAModule
from networks.training.optim import optimizers
from networks.training.optim.lr_schedules import ScheduleSettings, make_lr_scheduler
from networks.training.optim.optimizers import (
    NAMED,
    OptimizerSettings,
    check_optimizer,
    describe_optimizer,
    learning_rates,
    make_optimizer,
    picks_own_learning_rate,
    state_bytes_per_value,
    warn_of_low_learning_rate,
)
from utils.errors import UserError


def parameter(size: int = 3) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(size, size))


def made(name: str, params: list | None = None, words: tuple[str, ...] = (), rate: float = 1e-3) -> torch.optim.Optimizer:
    return make_optimizer(OptimizerSettings(name, words, rate), [parameter()] if params is None else params)


def test_arguments_and_groups_reach_the_class():
    groups = [{"params": [parameter()], "lr": 1e-3}, {"params": [parameter()]}]
    optimizer = made("adamw", groups, ("betas=0.8,0.95", "weight_decay=0.25", "amsgrad=True"), rate=1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
    group = optimizer.param_groups[1]
    assert (group["betas"], group["weight_decay"], group["amsgrad"]) == ((0.8, 0.95), 0.25, True)
    assert describe_optimizer(optimizer, ["weight_decay=0.25"]) == "torch.optim.adamw.AdamW(weight_decay=0.25)"


def trained(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, steps: int) -> torch.Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - torch.linspace(-1, 1, weight.numel()).view_as(weight)).square().sum().backward()
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize("before", [(), ("cpu",)], ids=["one by one", "fused"])
@pytest.mark.parametrize("after", [(), ("cpu",)], ids=["one by one", "fused"])
def test_fused_adamw_trains_the_same_and_goes_on_from_any_state(before, after, monkeypatch):
    monkeypatch.setattr(optimizers, "FUSED_DEVICES", ())
    weight = parameter()
    expected = trained(made("adamw", [weight]), weight, steps=6)

    def one(devices: tuple[str, ...], weight: torch.nn.Parameter) -> torch.optim.Optimizer:
        monkeypatch.setattr(optimizers, "FUSED_DEVICES", devices)
        optimizer = made("adamw", [{"params": [weight]}])
        assert bool(optimizer.param_groups[0]["fused"]) == bool(devices)
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        return optimizer

    weight = parameter()
    first = one(before, weight)
    trained(first, weight, steps=3)
    second = one(after, weight)
    second.load_state_dict(first.state_dict())
    assert bool(second.param_groups[0]["fused"]) == bool(after)
    torch.testing.assert_close(trained(second, weight, steps=3), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("word", ["foreach=True", "fused=False"])
def test_what_the_user_says_of_the_kernel_wins(word, monkeypatch):
    monkeypatch.setattr(optimizers, "FUSED_DEVICES", ("cpu",))
    assert not made("adamw", words=(word,)).param_groups[0]["fused"]
    assert made("adamw").param_groups[0]["fused"]


def test_a_state_of_other_groups_is_refused():
    two = made("adamw", [{"params": [parameter()]}, {"params": [parameter()]}])
    with pytest.raises(ValueError, match="parameter groups"):
        made("adamw").load_state_dict(two.state_dict())


@pytest.mark.parametrize("name", [*NAMED, "AdamW", "torch.optim.SGD"])
def test_every_kind_learns_or_is_refused_clearly(name):
    words = ("relative_step=False", "scale_parameter=False") if name == "adafactor" else ()
    weight = parameter(128)
    try:
        check_optimizer(OptimizerSettings(name, words, 0.05))
    except UserError as error:
        assert name == "adamw8bit" and ("pip install bitsandbytes" in str(error) or "--optimizer_type adamw." in str(error))
        return
    optimizer = made(name, [weight], words, rate=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.abs().max() < 0.5


def test_adafactor_picks_its_own_rate_unless_relative_step_is_off():
    own = made("AdaFactor", [{"params": [parameter()], "lr": 1e-3}])
    assert picks_own_learning_rate(own)
    given = made("adafactor", words=("relative_step=False",))
    assert not picks_own_learning_rate(given) and given.param_groups[0]["lr"] == 1e-3
    groups = [{"params": [parameter()], "lr": 1e-3}, {"params": [parameter()], "lr": 1e-2}]
    with pytest.raises(UserError, match="loraplus_lr_ratio"):
        made("adafactor", groups)
    assert not picks_own_learning_rate(made("adafactor", groups, ("relative_step=False",)))
    with pytest.raises(UserError, match="refuses its arguments"):
        made("adafactor", words=("lr=0.1",))


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("adamx", (), "is not known. Did you mean 'adamw'"),
        ("lr_scheduler", (), "Use adamw, adamw8bit, adafactor, a class of torch.optim"),
        ("no_such_package.Lion", (), "pip install no_such_package"),
        ("torch.optim.AdamV", (), "torch.optim has no class AdamV. Did you mean 'Adam"),
        ("adamw", ("weight_decai=0.1",), "has no argument 'weight_decai'. Did you mean 'weight_decay'"),
        ("adamw", ("weight_decay=-1",), "refuses its arguments .*weight_decay=-1"),
        ("adamw", ("amsgrad=true",), "amsgrad must be a Python literal"),
        ("adamw", ("weight_decay",), "form key=value"),
        ("adamw", ("eps=1e-8", "eps=1e-7"), "the key 'eps' twice"),
    ],
)
def test_mistakes_are_user_errors(name, words, message):
    with pytest.raises(UserError, match=message):
        made(name, words=words)


class OneRate(torch.optim.SGD):
    """As Prodigy, it wants the same rate for all groups, and says so in its first step."""

    def step(self, closure=None):
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("one rate for all")


def test_adamw8bit_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        made("adamw8bit")


def test_a_step_is_tried_with_the_rates_of_all_groups():
    one_rate = OptimizerSettings(f"{__name__}.OneRate")
    check_optimizer(one_rate)
    with pytest.raises(UserError, match=r"cannot make a training step on cpu \(one rate for all\)\. Use --optimizer_type adamw\."):
        check_optimizer(one_rate, group_rates=[1e-3, 4e-3])
    with pytest.raises(UserError, match="loraplus_lr_ratio"):
        check_optimizer(OptimizerSettings("adafactor"), group_rates=[1e-3, 4e-3])
    with pytest.raises(UserError, match="LBFGS cannot make a training step"):
        check_optimizer(OptimizerSettings("LBFGS"))


@pytest.mark.parametrize(("name", "bytes_each"), [("adamw", 8), ("SGD", 0), ("adafactor", 0.1)])
def test_what_an_optimizer_keeps_for_each_value(name, bytes_each):
    optimizer = check_optimizer(OptimizerSettings(name), group_rates=[1e-3, 1e-3])
    assert state_bytes_per_value(optimizer) == pytest.approx(bytes_each, abs=0.02)


def test_rates_are_named_by_group():
    groups = [{"params": [parameter()], "lr": rate} for rate in (1.0, 2.0, 3.0, 4.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert learning_rates(optimizer, ["unet", "unet plus"]) == {"unet": 1, "unet plus": 2, "group 3": 3, "group 4": 4}
    assert learning_rates(optimizer, ["unet"] * 4) == {"unet": 1, "unet 2": 2, "unet 3": 3, "unet 4": 4}
    optimizer.param_groups[0]["d"] = 0.25  # as Prodigy keeps its estimate
    optimizer.param_groups[1]["lr"] = None
    optimizer.param_groups[2]["lr"] = torch.tensor(5.0)
    assert learning_rates(optimizer, ["a", "b", "c", "d"]) == {"a": 1.0, "d*lr a": 0.25, "c": 5.0, "d": 4.0}


def test_adafactor_with_its_own_schedule_is_logged_with_the_rate_it_uses(monkeypatch):
    torch.manual_seed(0)
    groups = [{"params": [torch.nn.Parameter(scale * torch.randn(4, 3)) for _ in range(2)]} for scale in (1e-6, 1.0)]
    optimizer = made("adafactor", groups)
    schedule = make_lr_scheduler(ScheduleSettings("adafactor"), optimizer, 3)
    used: list[float] = []
    get = type(optimizer)._get_lr
    monkeypatch.setattr(type(optimizer), "_get_lr", staticmethod(lambda *values: used.append(float(get(*values))) or get(*values)))
    for _ in range(3):
        logged = learning_rates(Accelerator(cpu=True).prepare(optimizer), ["a", "b"])
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.randn(4, 3)
        used.clear()
        optimizer.step()
        assert logged == pytest.approx({"a": used[0], "b": used[2]}, rel=1e-6)
        assert used[2] > used[0] > 0
        schedule.step()


@pytest.mark.parametrize(
    ("rate", "steps", "rank", "alpha", "warned"),
    [
        (2e-6, 1600, 32, 1, True),  # every default but the rank
        (2e-6, 1600, 4, 1, True),
        (2e-6, 1600, 4, 4, False),
        (2e-6, 1600, 16, 16, False),
        (1e-4, 1600, 32, 1, False),
        (1e-4, 20, 32, 1, True),
        (2e-5, 1600, 64, 1, True),
    ],
)
def test_a_learning_rate_too_low_for_a_lora_is_warned_of(caplog, rate, steps: int, rank: int, alpha: float, warned: bool) -> None:
    warn_of_low_learning_rate(OptimizerSettings(learning_rate=rate), rate, steps, rank, alpha)
    assert ("hardly changes a LoRA" in caplog.text) == warned


def test_what_a_training_can_change_at_most_is_what_adam_changes_where_all_gradients_agree(caplog) -> None:
    """The warning's number, for a LoRA that learns one direction, beside a weight as a layer begins with."""
    rate, steps, rank, size = 1e-5, 40, 16, 512
    torch.manual_seed(0)
    lora, weight = LoRAModule(size, size, rank, alpha=4.0), torch.randn(size, size) / size**0.5
    optimizer = torch.optim.AdamW(lora.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        lora.lora_up.weight.grad = -torch.linalg.svd(lora.lora_down.weight, full_matrices=False)[0][:, 0].sign().expand(size, -1)
        optimizer.step()
    change = (lora.scale * lora.lora_up.weight @ lora.lora_down.weight).norm() / weight.norm()
    warn_of_low_learning_rate(OptimizerSettings(learning_rate=rate), rate, steps, rank, 4.0)
    promised = float(re.search(r"change the weights by (\S+) of", caplog.text)[1])
    assert 0.5 * promised < change < 1.5 * promised
