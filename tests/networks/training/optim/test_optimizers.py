"""Optimisers by name: what is made, that it learns, and what is refused."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from networks.training.optim.optimizers import (
    check_optimizer,
    describe_optimizer,
    make_optimizer,
    picks_own_learning_rate,
    set_optimizer_mode,
)
from utils.errors import UserError
from utils.key_values import literal_key_values, parse_key_values


def parameter(size: int = 3) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(size, size))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", torch.optim.AdamW),
        ("AdamW", torch.optim.AdamW),
        ("SGD", torch.optim.SGD),
        ("torch.optim.RMSprop", torch.optim.RMSprop),
    ],
)
def test_names_give_their_class(name, expected):
    optimizer = make_optimizer(name, [parameter()], 0.125)
    assert type(optimizer) is expected and optimizer.param_groups[0]["lr"] == 0.125


def test_arguments_and_groups_reach_the_class():
    groups = [{"params": [parameter()], "lr": 1e-3}, {"params": [parameter()]}]
    optimizer = make_optimizer("adamw", groups, 1e-4, ["betas=0.8,0.95", "weight_decay=0.25", "amsgrad=True"])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
    group = optimizer.param_groups[1]
    assert (group["betas"], group["weight_decay"], group["amsgrad"]) == ((0.8, 0.95), 0.25, True)
    assert describe_optimizer(optimizer, ["weight_decay=0.25"]) == "torch.optim.adamw.AdamW(weight_decay=0.25)"


@pytest.mark.parametrize("name", ["adamw", "adafactor", "torch.optim.SGD"])
def test_every_kind_learns(name):
    weight = parameter()
    arguments = ["relative_step=False", "scale_parameter=False"] if name == "adafactor" else []
    optimizer = make_optimizer(name, [weight], 0.05, arguments)
    for _ in range(50):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.abs().max() < 0.5


def test_adafactor_picks_its_own_rate_unless_told_otherwise():
    own = make_optimizer("AdaFactor", [{"params": [parameter()], "lr": 1e-3}], 1e-3)
    assert picks_own_learning_rate(own) and own.param_groups[0]["lr"] is None
    given = make_optimizer("adafactor", [parameter()], 1e-3, ["relative_step=False"])
    assert not picks_own_learning_rate(given) and given.param_groups[0]["lr"] == 1e-3
    groups = [{"params": [parameter()], "lr": 1e-3}, {"params": [parameter()], "lr": 1e-2}]
    with pytest.raises(UserError, match="loraplus_lr_ratio"):
        make_optimizer("adafactor", groups, 1e-3)
    assert not picks_own_learning_rate(make_optimizer("adafactor", groups, 1e-3, ["relative_step=False"]))
    with pytest.raises(UserError, match="takes no lr"):
        make_optimizer("adafactor", [parameter()], 1e-3, ["lr=0.1"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamx", [], "is not known. Did you mean 'adamw'"),
        ("Optimizer8", [], "Use adamw, adamw8bit, adafactor, a class of torch.optim"),
        ("lr_scheduler", [], "is not known"),
        ("no_such_package.Lion", [], "pip install no_such_package"),
        ("torch.optim.AdamV", [], "torch.optim has no class AdamV. Did you mean 'Adam"),
        ("torch.optim.lr_scheduler", [], "has no class lr_scheduler"),
        ("adamw", ["weight_decai=0.1"], "has no argument 'weight_decai'. Did you mean 'weight_decay'"),
        ("adamw", ["weight_decay=-1"], "refuses its arguments .*weight_decay=-1"),
        ("adamw", ["amsgrad=true"], "amsgrad must be a Python literal"),
        ("adamw", ["weight_decay"], "form key=value"),
        ("adamw", ["eps=1e-8", "eps=1e-7"], "the key 'eps' twice"),
    ],
)
def test_mistakes_are_user_errors(name, arguments, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(name, [parameter()], 1e-3, arguments)


def fake_bitsandbytes(monkeypatch, step):
    class AdamW8bit(torch.optim.SGD):
        def step(self, closure=None):
            return step(self)

    optim = types.ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = AdamW8bit
    package = types.ModuleType("bitsandbytes")
    package.optim = optim
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    return AdamW8bit


class OneRate(torch.optim.SGD):
    """As Prodigy, it wants the same rate for all groups, and says so in its first step."""

    def step(self, closure=None):
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("one rate for all")


def test_the_two_rates_of_lora_plus_are_tried_before_training():
    check_optimizer(f"{__name__}.OneRate", 1e-3)
    with pytest.raises(UserError, match="cannot take a plain training step"):
        check_optimizer(f"{__name__}.OneRate", 1e-3, group_rates=[1e-3, 4e-3])
    with pytest.raises(UserError, match="loraplus_lr_ratio"):
        check_optimizer("adafactor", 1e-3, group_rates=[1e-3, 4e-3])


def test_adamw8bit_without_bitsandbytes_names_adamw(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes; or use --optimizer_type adamw"):
        make_optimizer("adamw8bit", [parameter()], 1e-3)


def test_adamw8bit_without_a_kernel_names_adamw(monkeypatch):
    def step(self):
        raise NotImplementedError("no 8-bit kernel for device type cpu")

    fake_bitsandbytes(monkeypatch, step)
    with pytest.raises(UserError, match=r"does not run on cpu .*no 8-bit kernel.* Use --optimizer_type adamw\."):
        make_optimizer("AdamW8bit", [parameter()], 1e-3)


def test_adamw8bit_with_a_kernel_is_used_and_its_parameters_stay(monkeypatch):
    expected = fake_bitsandbytes(monkeypatch, lambda self: None)
    weight = parameter()
    optimizer = make_optimizer("adamw8bit", [weight], 1e-3)
    assert type(optimizer) is expected and weight.grad is None and torch.equal(weight, torch.ones(3, 3))


def test_the_real_adamw8bit_learns_or_is_refused_clearly():
    pytest.importorskip("bitsandbytes")
    weight = parameter(128)
    try:
        optimizer = make_optimizer("adamw8bit", [weight], 0.05)
    except UserError as error:
        assert "--optimizer_type adamw." in str(error)
        return
    for _ in range(30):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.abs().max() < 0.5


def test_mode_is_set_where_an_optimizer_has_modes():
    class ScheduleFree(torch.optim.SGD):
        mode = None

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    optimizer = ScheduleFree([parameter()], lr=0.1)
    set_optimizer_mode(optimizer, training=True)
    assert optimizer.mode == "train"
    set_optimizer_mode(optimizer, training=False)
    assert optimizer.mode == "eval"
    set_optimizer_mode(torch.optim.SGD([parameter()], lr=0.1), training=True)


def test_key_values_keep_text_and_read_literals():
    assert parse_key_values(["a=1", "b=x=y", "c="], "--flag") == {"a": "1", "b": "x=y", "c": ""}
    assert parse_key_values(None, "--flag") == {}
    assert literal_key_values(["a=1e-3", "b=None", "c='x'", "d=(1, 2)"], "--flag") == {"a": 1e-3, "b": None, "c": "x", "d": (1, 2)}
    for word in ("novalue", "=1", " =1"):
        with pytest.raises(UserError, match="--flag takes words of the form key=value"):
            parse_key_values([word], "--flag")
