"""Optimisers by the names users give: adamw, adamw8bit, adafactor, a class of torch.optim, or any dotted class path."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from utils.errors import UserError, first_line
from utils.key_values import literal_key_values, nearest_name
from utils.named_classes import construct, import_class

NAMED = ("adamw", "adamw8bit", "adafactor")
SCRATCH_SHAPE = (64, 128)  # smaller tensors are kept in 32 bits by 8-bit optimisers


def make_optimizer(
    optimizer_type: str,
    params: Iterable[Any],
    learning_rate: float,
    optimizer_args: Sequence[str] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser called ``optimizer_type``.

    Args:
        optimizer_type: ``adamw``, ``adamw8bit``, ``adafactor`` in any case; a class of torch.optim such as ``SGD``; or a
            dotted class path such as ``prodigyopt.Prodigy``.
        params: parameters or parameter groups; a group may have its own ``lr``.
        optimizer_args: ``key=value`` words whose values are Python literals.

    Raises:
        UserError: unknown, not installed, arguments that the class does not take, or no kernel for the device of the parameters.
    """
    params = list(params)
    options = literal_key_values(optimizer_args, "--optimizer_args")
    kind = optimizer_type.lower()
    optimizer_class = _adamw8bit_class() if kind == "adamw8bit" else _optimizer_class(optimizer_type)
    if kind == "adafactor":
        params, options = _adafactor_options(params, options, learning_rate)
    else:
        options.setdefault("lr", learning_rate)
    optimizer = construct(optimizer_class, params, options, f"the optimiser {optimizer_type}", "--optimizer_args")
    if kind == "adamw8bit":
        _require_kernel(optimizer_class, optimizer.param_groups[0]["params"][0].device)
    return optimizer


def check_optimizer(
    optimizer_type: str,
    learning_rate: float,
    optimizer_args: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    group_rates: Sequence[float] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser over scratch parameters, after one step: what cannot train shows here, before a model is loaded.

    Args:
        device: where training will be.
        group_rates: the learning rates of the parameter groups that training will have, where it has several.

    Raises:
        UserError: as ``make_optimizer``; or an optimiser that wants more of a step than a gradient, such as LBFGS.
    """
    rates = [learning_rate] if group_rates is None else group_rates
    scratch = [torch.nn.Parameter(torch.zeros(SCRATCH_SHAPE, device=device)) for _ in rates]
    params = [{"params": [parameter], "lr": rate} for parameter, rate in zip(scratch, rates)]
    optimizer = make_optimizer(optimizer_type, params, learning_rate, optimizer_args)
    for parameter in scratch:
        parameter.grad = torch.ones_like(parameter)
    set_optimizer_mode(optimizer, training=True)
    try:
        optimizer.step()
    except Exception as error:  # third-party optimisers fail in ways of their own
        raise UserError(
            f"--optimizer_type {optimizer_type} cannot take a plain training step ({first_line(error)}). Use adamw, say."
        ) from error
    return optimizer


def state_bytes_per_value(optimizer: torch.optim.Optimizer) -> float:
    """How many bytes an optimiser that has made a step keeps for each value it trains: 8 for Adam's two averages in float32."""
    values = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return _tensor_bytes(optimizer.state_dict()) / values


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict | list | tuple):
        return sum(map(_tensor_bytes, value.values() if isinstance(value, dict) else value))
    return 0


def describe_optimizer(optimizer: torch.optim.Optimizer, optimizer_args: Sequence[str] | None = None) -> str:
    """Class and arguments as training metadata records them: ``torch.optim.adamw.AdamW(weight_decay=0.1)``."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # what accelerate wraps
    arguments = f"({','.join(optimizer_args)})" if optimizer_args else ""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}{arguments}"


def set_optimizer_mode(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Tell optimisers that keep other weights while training (schedule-free ones) which are wanted; others are left alone.

    Call it with False before saving or sampling and with True before the next step.
    """
    method = getattr(optimizer, "train" if training else "eval", None)
    if callable(method):
        method()


def picks_own_learning_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is Adafactor with relative_step, which needs ``--lr_scheduler adafactor`` and no learning rate."""
    return any(group.get("relative_step", False) for group in optimizer.param_groups)


@torch.no_grad()
def own_learning_rate(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | None:
    """The rate that an Adafactor with relative_step will use in its next step; None for others, whose groups tell it.

    With scale_parameter, its default, each parameter has a rate of its own; this is that of the group's first one, as
    ``transformers.optimization.AdafactorSchedule`` has it.

    Args:
        group: of ``optimizer.param_groups``.
    """
    while hasattr(optimizer, "optimizer"):  # what accelerate wraps
        optimizer = optimizer.optimizer
    if not group.get("relative_step", False) or not hasattr(optimizer, "_get_lr"):
        return None
    parameter = group["params"][0]
    made = optimizer.state.get(parameter, {}).get("step", 0)
    root_mean_square = parameter.float().norm() / parameter.numel() ** 0.5
    return float(optimizer._get_lr(group, {"step": made + 1, "RMS": root_mean_square}))


def _optimizer_class(optimizer_type: str) -> type:
    kind = optimizer_type.lower()
    if kind == "adamw":
        return torch.optim.AdamW
    if kind == "adafactor":
        return import_class("transformers.optimization.Adafactor", "--optimizer_type", torch.optim.Optimizer)
    if "." in optimizer_type:
        return import_class(optimizer_type, "--optimizer_type", torch.optim.Optimizer)
    found = getattr(torch.optim, optimizer_type, None)
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(
            f"--optimizer_type {optimizer_type} is not known.{nearest_name(optimizer_type, (*NAMED, *vars(torch.optim)))} "
            f"Use {', '.join(NAMED)}, a class of torch.optim, or a dotted class path such as prodigyopt.Prodigy."
        )
    return found


def _adamw8bit_class() -> type:
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # a build that does not fit the machine raises many things besides ImportError
        raise UserError(
            f"--optimizer_type adamw8bit needs bitsandbytes, which cannot be imported here ({type(error).__name__}: {error}). "
            "Install it with: pip install bitsandbytes; or use --optimizer_type adamw."
        ) from error
    return AdamW8bit


def _require_kernel(optimizer_class: type, device: torch.device | str) -> None:
    """Take one step on a scratch tensor: whether an 8-bit kernel exists for a device shows only there."""
    scratch = torch.nn.Parameter(torch.zeros(SCRATCH_SHAPE, device=device))
    scratch.grad = torch.ones_like(scratch)
    try:
        optimizer_class([scratch], lr=1e-3).step()
    except Exception as error:
        raise UserError(
            f"--optimizer_type adamw8bit does not run on {torch.device(device).type} with the bitsandbytes installed here "
            f"({first_line(error)}). Use --optimizer_type adamw."
        ) from error


def _adafactor_options(params: list[Any], options: dict[str, Any], learning_rate: float) -> tuple[list[Any], dict[str, Any]]:
    """Adafactor either picks its own rate (relative_step, its default) or uses the given one, never both."""
    options.setdefault("relative_step", True)
    if not options["relative_step"]:
        options.setdefault("lr", learning_rate)
        options.setdefault("warmup_init", False)
        return params, options
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
    if len({group["lr"] for group in groups if "lr" in group}) > 1:
        raise UserError(
            "--optimizer_type adafactor picks its own learning rate, so the groups cannot have different ones (loraplus_lr_ratio). "
            "Add relative_step=False to --optimizer_args to use --learning_rate."
        )
    if options.get("lr") is not None:
        raise UserError("--optimizer_args: adafactor takes no lr unless relative_step=False is given as well.")
    return [{key: value for key, value in group.items() if key != "lr"} for group in groups], options
