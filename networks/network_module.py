"""Driving any network module of the sd-scripts contract: ours (``networks.lora``) or a third party's (``lycoris.kohya``)."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hunyuan_model.runtime.device_split import device_of, devices_of
from networks.formats.layouts import flat_name
from utils.errors import UserError


def import_network_module(name: str) -> ModuleType:
    """The module called ``name``; a UserError where it cannot be imported, or creates no networks."""
    try:
        module = importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:  # the last two for what is no module name at all
        lycoris = name.startswith("lycoris")
        hint = "Install it with: pip install lycoris-lora" if lycoris else "Check its name, and that it is installed."
        raise UserError(f"--network_module {name} cannot be imported ({error}). {hint}") from error
    if not hasattr(module, "create_network"):
        raise UserError(f"--network_module {name} is no network module: it has no create_network.")
    return module


def create_network(
    module: ModuleType,
    transformer: nn.Module,
    *,
    dim: int | None,
    alpha: float,
    dropout: float | None,
    network_args: Mapping[str, Any],
    weights: str | os.PathLike[str] | None = None,
    dim_from_weights: bool = False,
    device: torch.device | None = None,
) -> nn.Module:
    """Create a network, hook it into ``transformer``, and load ``weights`` into it if given; float32 and trainable.

    Args:
        dim, alpha: with ``dim_from_weights`` the file decides them.
        network_args: further arguments of the module, as text.
        device: of the computation; that of the transformer's weights if None, some of which may live in host memory. Of a split
            transformer the first: each module goes to the device of its layer.
    """
    if dim_from_weights:
        options = {"neuron_dropout": dropout, **network_args}
        network, _ = module.create_network_from_weights(1.0, weights, None, None, transformer, **options)
    else:
        network = module.create_network(1.0, dim, alpha, None, None, transformer, neuron_dropout=dropout, **network_args)
    network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
    if weights:  # also after create_network_from_weights, which in some modules takes only the sizes from the file
        network.load_weights(weights)
    device = device or next(transformer.parameters()).device
    if len(devices_of(transformer, device)) > 1:
        _place_by_layers(network.to(torch.float32), transformer, device)
    else:
        network.to(device, torch.float32)
    network.requires_grad_(True)
    call_if_there(network, "prepare_grad_etc", None, transformer)
    return network


def _place_by_layers(network: nn.Module, transformer: nn.Module, device: torch.device) -> None:
    """Move each module of ``network`` to the device of the layer that its name ends with, as the contract has it."""
    layers = {flat_name(path): path for path, _ in transformer.named_modules()}
    for name, module in network.named_children():
        words = name.split("_")
        ends = ("_".join(words[start:]) for start in range(len(words)))
        path = next((layers[end] for end in ends if end in layers), None)
        if path is None:
            raise UserError(
                f"--split_blocks puts each module of the network beside its layer, but {name} has the name of none; "
                "leave --split_blocks out, or use networks.lora."
            )
        module.to(device_of(transformer, path, device))


def require_switch(network: nn.Module, name: str) -> None:
    """Refuse a network that ``network_off`` cannot switch off; ``name``: of its module."""
    if not hasattr(network, "set_multiplier"):
        raise UserError(
            f"the networks of --network_module {name} have no set_multiplier, without which the model cannot be run "
            "without them; take prior_preservation out of the datasets, or use networks.lora."
        )


@contextmanager
def network_off(network: nn.Module) -> Iterator[None]:
    """The model computes inside as if ``network`` were not hooked into it. The network has multiplier 1 before and after."""
    network.set_multiplier(0.0)
    try:
        yield
    finally:
        network.set_multiplier(1.0)


def parameter_groups(network: nn.Module, learning_rate: float) -> tuple[list[Any], list[str]]:
    """Parameter groups with their learning rates, and a name for each.

    Depending on the age of the module, ``prepare_optimizer_params`` takes (text encoder rate, network rate) or a default rate
    as well, and returns groups, or groups and names.
    """
    count = len(inspect.signature(network.prepare_optimizer_params).parameters)
    prepared = network.prepare_optimizer_params(None, *[learning_rate] * (2 if count > 2 else 1))
    groups, names = prepared if isinstance(prepared, tuple) else (prepared, None)
    groups = list(groups)
    return groups, list(names or [f"group {index}" for index in range(1, len(groups) + 1)])


def call_if_there(network: object, method: str, *arguments: object) -> object:
    """What a method of the contract returns; None where a third-party network lacks it."""
    function = getattr(network, method, None)
    return None if function is None else function(*arguments)
