"""What a training names, looked at before anything is loaded: the transformer, the network and its files."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

import networks.lora
from hunyuan_model.runtime.loading import check_transformer_file
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from networks.lora import DEFAULT_RANK
from networks.lora_files import check_lora_file
from networks.lora_options import NetworkOptions
from networks.network_module import import_network_module
from networks.training.optim.optimizers import OptimizerSettings, warn_of_low_learning_rate
from networks.training.saving.disk_space import NetworkSize
from utils.cli.settings import settings_from
from utils.errors import UserError, first_line
from utils.files import require_file
from utils.key_values import parse_key_values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """What is known of a training before anything is loaded.

    Attributes:
        config: the sizes of the transformer in --dit.
        group_rates: the learning rates of the parameter groups that the network will have.
        size: of the network; None where its module does not show it without the weights of the transformer.
        network: the network without its values; None for a third party's.
    """

    config: TransformerConfig
    group_rates: list[float]
    size: NetworkSize | None
    network: nn.Module | None = None


def check_model_and_network(args: argparse.Namespace) -> Planned:
    """Look at what the flags name and only other modules can judge.

    Raises:
        UserError: a file, the network or its arguments cannot be used.
    """
    config = check_transformer_file(args.dit, "--dit")
    with torch.device("meta"):
        transformer = HYVideoDiffusionTransformer(config)
    shapes = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    for path in args.base_weights:
        check_lora_file(path, shapes)
    if (args.fp8_base or args.int8_base) and args.network_module.startswith("lycoris"):
        raise UserError(
            "LyCORIS computes in the dtype of the base weights, which quantized weights do not allow; "
            "leave --fp8_base and --int8_base out."
        )
    network_args = parse_key_values(args.network_args, "--network_args")
    module = import_network_module(args.network_module)
    if module is not networks.lora:
        if args.network_weights:
            require_file(args.network_weights, "--network_weights")
        return Planned(config, [args.learning_rate], _size_of_other_network(args, module, transformer, network_args))
    options = NetworkOptions(network_args, args.network_dropout)
    quiet = {name: value for name, value in network_args.items() if name != "verbose"}
    network = _planned_network(args, module, transformer, quiet)
    if args.network_weights:
        ranks = check_lora_file(args.network_weights, shapes).ranks
        rank = args.network_dim or DEFAULT_RANK
        if not args.dim_from_weights and ranks != {rank}:
            raise UserError(
                f"--network_weights {args.network_weights} has rank {', '.join(map(str, sorted(ranks)))}, not {rank}; "
                "give it as --network_dim, or use --dim_from_weights."
            )
    if not args.dim_from_weights:
        warn_of_low_learning_rate(settings_from(OptimizerSettings, args), args.network_dim or DEFAULT_RANK, args.network_alpha)
    factors = [1.0] if options.loraplus_lr_ratio is None else [1.0, options.loraplus_lr_ratio]
    return Planned(config, [args.learning_rate * factor for factor in factors], _size(network), network)


def _size_of_other_network(
    args: argparse.Namespace, module: ModuleType, transformer: HYVideoDiffusionTransformer, network_args: Mapping[str, str]
) -> NetworkSize | None:
    try:
        return _size(_planned_network(args, module, transformer, network_args))
    except Exception as error:  # a module may look at weights, which are not there yet; it speaks of its arguments later
        logger.info("not checked: disk space. %s shows its size only later (%s)", args.network_module, first_line(error))
        return None


def _planned_network(
    args: argparse.Namespace, module: ModuleType, transformer: HYVideoDiffusionTransformer, network_args: Mapping[str, str]
) -> nn.Module:
    """The network for a transformer on the meta device; its names and sizes are those it will have."""
    if args.dim_from_weights:
        return module.create_network_from_weights(1.0, args.network_weights, None, None, transformer, **network_args)[0]
    with torch.device("meta"):
        return module.create_network(1.0, args.network_dim, args.network_alpha, None, None, transformer, **network_args)


def _size(network: nn.Module) -> NetworkSize:
    return NetworkSize.of_shapes(tuple(value.shape) for value in network.state_dict().values())
