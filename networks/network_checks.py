"""What a training names, looked at before anything is loaded: the transformer, the network and its files."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

import networks.lora
from hunyuan_model.architecture import TransformerConfig
from hunyuan_model.loading import check_transformer_file
from hunyuan_model.transformer import HYVideoDiffusionTransformer
from networks.lora import DEFAULT_RANK
from networks.lora_files import check_lora_file
from networks.lora_options import NetworkOptions
from networks.network_module import import_network_module
from utils.disk_space import NetworkSize
from utils.errors import UserError, first_line
from utils.files import require_file
from utils.key_values import parse_key_values
from utils.safetensors_io import read_header

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedNetwork:
    """What is known of a training before anything is loaded.

    Attributes:
        config: the sizes of the transformer in --dit.
        parameter_groups: how many the network will have.
        size: of the network; None where its module does not show it without the weights of the transformer.
    """

    config: TransformerConfig
    parameter_groups: int
    size: NetworkSize | None


def check_model_and_network(args: argparse.Namespace) -> CheckedNetwork:
    """What the flags name and only other modules can judge.

    Raises:
        UserError: a file, the network or its arguments cannot be used.
    """
    config = check_transformer_file(args.dit, "--dit")
    with torch.device("meta"):
        transformer = HYVideoDiffusionTransformer(config)
    shapes = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    for path in args.base_weights:
        check_lora_file(path, shapes)
    if args.fp8_base and args.network_module.startswith("lycoris"):
        raise UserError("LyCORIS computes in the dtype of the base weights, which float8 does not allow; leave --fp8_base out.")
    network_args = parse_key_values(args.network_args, "--network_args")
    module = import_network_module(args.network_module)
    if module is not networks.lora:
        if args.network_weights:
            require_file(args.network_weights, "--network_weights")
        return CheckedNetwork(config, 1, _size_of_other_network(args, module, transformer, network_args))
    options = NetworkOptions(network_args, args.network_dropout)
    size = _network_size(args, module, transformer, {name: value for name, value in network_args.items() if name != "verbose"})
    if args.network_weights:
        ranks = check_lora_file(args.network_weights, shapes).ranks
        rank = args.network_dim or DEFAULT_RANK
        if not args.dim_from_weights and ranks != {rank}:
            raise UserError(
                f"--network_weights {args.network_weights} has rank {', '.join(map(str, sorted(ranks)))}, not {rank}; "
                "give it as --network_dim, or use --dim_from_weights."
            )
    return CheckedNetwork(config, 1 if options.loraplus_lr_ratio is None else 2, size)


def _size_of_other_network(
    args: argparse.Namespace, module: ModuleType, transformer: HYVideoDiffusionTransformer, network_args: Mapping[str, str]
) -> NetworkSize | None:
    try:
        return _network_size(args, module, transformer, network_args)
    except Exception as error:  # a module may look at weights, which are not there yet; it speaks of its arguments later
        logger.info("not checked: disk space. %s shows its size only later (%s)", args.network_module, first_line(error))
        return None


def _network_size(
    args: argparse.Namespace, module: ModuleType, transformer: HYVideoDiffusionTransformer, network_args: Mapping[str, str]
) -> NetworkSize:
    """How large the network will be. ``transformer``: on the meta device, like the network that is made for it here."""
    if args.dim_from_weights:
        return NetworkSize.of_shapes(read_header(args.network_weights).shapes.values())
    with torch.device("meta"):
        network = module.create_network(1.0, args.network_dim, args.network_alpha, None, None, transformer, **network_args)
    return NetworkSize.of_shapes(tuple(value.shape) for value in network.state_dict().values())
