"""What a training names, looked at before anything is loaded: the transformer, the network and its files, and room to save it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import networks.lora
from hunyuan_model.architecture import TransformerConfig
from hunyuan_model.block_swap import check_blocks_to_swap
from hunyuan_model.loading import check_transformer_file
from hunyuan_model.transformer import HYVideoDiffusionTransformer
from networks.lora import DEFAULT_RANK
from networks.lora_files import check_lora_file
from networks.lora_options import NetworkOptions
from networks.network_module import import_network_module
from utils.errors import UserError
from utils.files import require_file
from utils.key_values import parse_key_values
from utils.training_state import require_free_space, state_bytes


@dataclass(frozen=True)
class Planned:
    """What is known of a training before anything is loaded.

    Attributes:
        config: sizes of the transformer in --dit.
        group_rates: the learning rates of the parameter groups that the network will have.
        network: the network, whose values are not those it will have; None for a third party's.
    """

    config: TransformerConfig
    group_rates: list[float]
    network: nn.Module | None = None


def check_model_and_network(args: argparse.Namespace) -> Planned:
    """Look at what the flags name and only other modules can judge.

    Raises:
        UserError: a file, the network or its arguments cannot be used.
    """
    config = check_transformer_file(args.dit, "--dit")
    check_blocks_to_swap(args.blocks_to_swap, config)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in HYVideoDiffusionTransformer(config).state_dict().items()}
    for path in args.base_weights:
        check_lora_file(path, shapes)
    if args.fp8_base and args.network_module.startswith("lycoris"):
        raise UserError("LyCORIS computes in the dtype of the base weights, which float8 does not allow; leave --fp8_base out.")
    network_args = parse_key_values(args.network_args, "--network_args")
    module = import_network_module(args.network_module)
    if module is not networks.lora:
        if args.network_weights:
            require_file(args.network_weights, "--network_weights")
        return Planned(config, [args.learning_rate])
    options = NetworkOptions(network_args, args.network_dropout)
    network = _planned_network(args, config, network_args)
    _require_space_to_save(args, sum(parameter.numel() for parameter in network.parameters()))
    if args.network_weights:
        ranks = check_lora_file(args.network_weights, shapes).ranks
        rank = args.network_dim or DEFAULT_RANK
        if not args.dim_from_weights and ranks != {rank}:
            raise UserError(
                f"--network_weights {args.network_weights} has rank {', '.join(map(str, sorted(ranks)))}, not {rank}; "
                "give it as --network_dim, or use --dim_from_weights."
            )
    factors = [1.0] if options.loraplus_lr_ratio is None else [1.0, options.loraplus_lr_ratio]
    return Planned(config, [args.learning_rate * factor for factor in factors], network)


def _planned_network(args: argparse.Namespace, config: TransformerConfig, network_args: dict[str, str]) -> nn.Module:
    quiet = {name: value for name, value in network_args.items() if name != "verbose"}
    with torch.device("meta"):
        transformer = HYVideoDiffusionTransformer(config)
    if args.dim_from_weights:
        return networks.lora.create_network_from_weights(1.0, args.network_weights, None, None, transformer, **quiet)[0]
    with torch.device("meta"):
        return networks.lora.create_network(1.0, args.network_dim, args.network_alpha, None, None, transformer, **quiet)


def _require_space_to_save(args: argparse.Namespace, parameters: int) -> None:
    """Refuse a disk that has no room for what is saved first.

    Raises:
        UserError: with the sizes.
    """
    with_state = args.save_state or args.save_state_on_train_end
    wanted = 4 * parameters + (state_bytes(parameters) if with_state else 0)
    require_free_space(Path(args.output_dir), wanted, "one model and its state" if with_state else "one model")
