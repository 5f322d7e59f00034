"""Optimizers by the names users give: one of ``NAMED``, a class of torch.optim, or any dotted class path."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from utils.errors import UserError, first_line
from utils.key_values import construct, import_class, literal_key_values, nearest_name

logger = logging.getLogger(__name__)

# A name here, in lower case, is a name for --optimizer_type.
NAMED = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
}
LOW_CHANGE = 3e-3  # of weights, if all steps go the same way; a LoRA that works changes them by about 1e-2
FUSED_DEVICES = ("cuda",)  # where AdamW has one kernel for all parameters; on CPUs it is no faster and some torch has none
SCRATCH_SHAPE = (64, 128)  # smaller tensors are kept in 32 bits by 8-bit optimizers


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer flags.

    Attributes:
        optimizer_type: one of ``NAMED`` in any case; a class of torch.optim such as ``SGD``; or a dotted class path such as
            ``prodigyopt.Prodigy``.
        optimizer_args: ``key=value`` words whose values are Python literals.
        max_grad_norm: 0 for no clipping.
    """

    optimizer_type: str = "adamw"
    optimizer_args: Sequence[str] = ()
    learning_rate: float = 2e-6
    max_grad_norm: float = 1.0


def warn_of_low_learning_rate(settings: OptimizerSettings, rate: float, steps: int, rank: int, alpha: float) -> None:
    """Warn of a LoRA that will hardly learn: its update is scaled by alpha / rank, which comes on top of the learning rate.

    Optimizers like Adam move a value by ``rate`` in a step at most. The up factor begins at 0, so its norm stays below
    steps * rate * sqrt(out * rank); the down factor begins with singular values of about 1 / sqrt(3). A weight (out, in) has the
    norm sqrt(out) or so.

    Args:
        rate: the highest learning rate of the network.
    """
    scale = alpha / rank
    change = scale * steps * rate * math.sqrt(rank / 3)
    if change < LOW_CHANGE and not settings.optimizer_type.lower().endswith("adafactor"):
        logger.warning(
            "--learning_rate %g hardly changes a LoRA of rank %d with alpha %g: its update is scaled by alpha / rank, which is "
            "%.3g, so that %d steps change the weights by %.1g of their size at most. Most LoRA are trained for 1000 steps or more "
            "with --learning_rate between 1e-4 and 1e-3; --network_alpha %d makes the scale 1.",
            *(settings.learning_rate, rank, alpha, scale, steps, change, rank),
        )


def make_optimizer(settings: OptimizerSettings, params: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer of the settings over parameters, or parameter groups that may have an ``lr`` of their own."""
    name, params = settings.optimizer_type, list(params)
    path = NAMED.get(name.lower(), name)
    if "." not in path:
        if not isinstance(getattr(torch.optim, name, None), type):
            raise UserError(
                f"--optimizer_type {name} is not known.{nearest_name(name, (*NAMED, *vars(torch.optim)))} "
                f"Use {', '.join(NAMED)}, a class of torch.optim, or a dotted class path such as prodigyopt.Prodigy."
            )
        path = f"torch.optim.{name}"
    options = literal_key_values(settings.optimizer_args, "--optimizer_args")
    if name.lower() != "adafactor" or options.get("relative_step") is False:
        options.setdefault("lr", settings.learning_rate)
    elif len({group.get("lr") for group in params if isinstance(group, dict)}) > 1:
        raise UserError(
            "--optimizer_type adafactor picks its own learning rate, so the groups cannot have different ones "
            "(--network_args loraplus_lr_ratio). "
            "Add relative_step=False to --optimizer_args to use --learning_rate."
        )
    optimizer_class = import_class(path, "--optimizer_type", torch.optim.Optimizer)
    own_way = options.keys() & {"fused", "foreach", "capturable", "differentiable"}
    fuse = path == NAMED["adamw"] and not own_way and all(value.device.type in FUSED_DEVICES for value in _parameters(params))
    options |= {"fused": True} if fuse else {}
    optimizer = construct(optimizer_class, params, options, f"the optimizer {name}", "--optimizer_args")
    if path == NAMED["adamw"]:
        optimizer.register_load_state_dict_pre_hook(_with_own_kernel)
    if fuse:
        optimizer._step_supports_amp_scaling = False  # a step that fp16 skips must not be made, or it counts as made
    return optimizer


def _parameters(params: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in params:
        yield from value["params"] if isinstance(value, dict) else (value,)


def _with_own_kernel(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """``state`` as this optimizer goes on with it, which may be on another device than the one that saved it."""
    if len(state["param_groups"]) != len(optimizer.param_groups):
        return None  # which torch refuses
    groups = zip(state["param_groups"], optimizer.param_groups)
    return state | {"param_groups": [group | {"fused": own.get("fused")} for group, own in groups]}


def check_optimizer(
    settings: OptimizerSettings, group_rates: Sequence[float] | None = None, *devices: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over scratch parameters, after one step: what cannot train shows here, before a model is loaded.

    A step may fail because there is no kernel for one of ``devices`` (the CPU if there are none), because an optimizer does not
    go with several, or because more is needed than a gradient (LBFGS).

    Args:
        group_rates: the learning rates of the parameter groups that training will have, where it has several.
    """
    rates = [settings.learning_rate] if group_rates is None else group_rates
    devices = devices or (torch.device("cpu"),)
    groups = [[torch.nn.Parameter(torch.zeros(SCRATCH_SHAPE, device=device)) for device in devices] for _ in rates]
    optimizer = make_optimizer(settings, [{"params": group, "lr": rate} for group, rate in zip(groups, rates)])
    for parameter in (parameter for group in groups for parameter in group):
        parameter.grad = torch.ones_like(parameter)
    set_optimizer_mode(optimizer, training=True)
    try:
        optimizer.step()
    except Exception as error:  # third-party optimizers fail in ways of their own
        raise UserError(
            f"--optimizer_type {settings.optimizer_type} cannot make a training step on {' and '.join(map(str, devices))} "
            f"({first_line(error)}). Use --optimizer_type adamw."
        ) from error
    return optimizer


def state_bytes_per_value(optimizer: torch.optim.Optimizer) -> float:
    """How many bytes an optimizer that has made a step keeps for each value it trains: 8 for Adam's two averages in float32."""
    values = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in kept) / values


def describe_optimizer(optimizer: torch.optim.Optimizer, optimizer_args: Sequence[str] | None = None) -> str:
    """Class and arguments as training metadata records them: ``torch.optim.adamw.AdamW(weight_decay=0.1)``."""
    kind = type(without_wrapper(optimizer))
    arguments = f"({','.join(optimizer_args)})" if optimizer_args else ""
    return f"{kind.__module__}.{kind.__qualname__}{arguments}"


def without_wrapper(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def set_optimizer_mode(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Call ``train`` or ``eval`` of optimizers that have them: schedule-free ones keep other weights while they train."""
    method = getattr(optimizer, "train" if training else "eval", None)
    if callable(method):
        method()


def picks_own_learning_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is Adafactor with relative_step, which needs ``--lr_scheduler adafactor`` and no learning rate."""
    return any(group.get("relative_step", False) for group in optimizer.param_groups)


@torch.no_grad()
def learning_rates(optimizer: torch.optim.Optimizer, names: Sequence[str] = ()) -> dict[str, float]:
    """The learning rate of each parameter group that has one, by its name.

    For optimizers that scale the rate by an estimate of their own (Prodigy, D-Adaptation) ``d*lr NAME`` is what they use;
    for Adafactor with relative_step it is the rate of the group's first parameter in the next step.

    Args:
        names: of the groups, as ``networks.network_module.parameter_groups`` returns them; missing and equal ones get a number.
    """
    inner = without_wrapper(optimizer)
    rates: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups, 1):
        name = names[number - 1] if number <= len(names) else f"group {number}"
        name = name if name not in rates else f"{name} {number}"
        rate = group.get("lr")
        if group.get("relative_step") and hasattr(inner, "_get_lr"):
            parameter = group["params"][0]
            steps = inner.state.get(parameter, {}).get("step", 0)
            rate = inner._get_lr(group, {"step": steps + 1, "RMS": parameter.float().norm() / parameter.numel() ** 0.5})
        if rate is not None:
            rates[name] = float(rate)
            if group.get("d") is not None:
                rates[f"d*lr {name}"] = float(group["d"]) * rates[name]
    return rates
