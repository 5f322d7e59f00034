"""What a training names, looked at before anything is loaded: the transformer, the network and its files, and room to save it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import networks.lora
from hunyuan_model.architecture import TransformerConfig
from hunyuan_model.loading import check_transformer_file
from hunyuan_model.transformer import HYVideoDiffusionTransformer
from networks.lora import DEFAULT_RANK
from networks.lora_files import check_lora_file
from networks.lora_options import NetworkOptions
from networks.network_module import import_network_module
from utils.errors import UserError
from utils.files import require_file
from utils.key_values import parse_key_values
from utils.safetensors_io import read_header
from utils.training_state import require_free_space, state_bytes


def check_model_and_network(args: argparse.Namespace) -> tuple[TransformerConfig, int]:
    """What the flags name and only other modules can judge.

    Returns:
        The sizes of the transformer in --dit, and how many parameter groups the network will have.

    Raises:
        UserError: a file, the network or its arguments cannot be used.
    """
    config = check_transformer_file(args.dit, "--dit")
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
        return config, 1
    options = NetworkOptions(network_args, args.network_dropout)
    _require_space_to_save(args, config, network_args)
    if args.network_weights:
        ranks = check_lora_file(args.network_weights, shapes).ranks
        rank = args.network_dim or DEFAULT_RANK
        if not args.dim_from_weights and ranks != {rank}:
            raise UserError(
                f"--network_weights {args.network_weights} has rank {', '.join(map(str, sorted(ranks)))}, not {rank}; "
                "give it as --network_dim, or use --dim_from_weights."
            )
    return config, 1 if options.loraplus_lr_ratio is None else 2


def _require_space_to_save(args: argparse.Namespace, config: TransformerConfig, network_args: dict[str, str]) -> None:
    """Refuse a disk that has no room for what is saved first.

    Raises:
        UserError: with the sizes.
    """
    if args.dim_from_weights:
        parameters = sum(torch.Size(shape).numel() for shape in read_header(args.network_weights).shapes.values())
    else:
        with torch.device("meta"):  # sizes only
            transformer = HYVideoDiffusionTransformer(config)
            quiet = {name: value for name, value in network_args.items() if name != "verbose"}
            network = networks.lora.create_network(1.0, args.network_dim, args.network_alpha, None, None, transformer, **quiet)
        parameters = sum(parameter.numel() for parameter in network.parameters())
    with_state = args.save_state or args.save_state_on_train_end
    wanted = 4 * parameters + (state_bytes(parameters) if with_state else 0)
    require_free_space(Path(args.output_dir), wanted, "one model and its state" if with_state else "one model")
