"""--resume: which state a training goes on from, whether it fits, and putting everything where it was saved."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from networks.training.optim.optimizers import describe_optimizer
from networks.training.saving.files import final_name
from networks.training.saving.state import (
    LATEST,
    Progress,
    Restorable,
    StateFile,
    find_latest_state,
    load_state,
    read_state_file,
    require_same,
)
from utils.cli.arguments import public_flags
from utils.errors import UserError
from utils.hub import download_state
from utils.safetensors_io import read_header

logger = logging.getLogger(__name__)

PLACE_FLAGS = ("resume", "seed")  # those that say where to go on, and the one that is checked by itself


@dataclass(frozen=True)
class Resumed:
    """The state that --resume names."""

    folder: Path
    state: StateFile


def find_resumed(args: argparse.Namespace) -> Resumed | None:
    """The state that --resume names, or None where training begins anew. Takes over its seed where none is given.

    Raises:
        UserError: no such state, one that is damaged, or one with another seed than --seed.
    """
    if args.resume is None:
        return None
    if args.resume == LATEST:
        folder = find_latest_state(Path(args.output_dir), args.output_name)
        if folder is None:
            logger.info("no state of %s in %s yet; training begins anew", args.output_name, args.output_dir)
            return None
    else:
        folder = download_state(args.resume, args.huggingface_token) if args.resume_from_huggingface else Path(args.resume)
    state = read_state_file(folder)
    if args.seed is None:
        args.seed = state.seed
    if args.seed != state.seed:
        raise UserError(f"--seed {args.seed} is not that of the state {folder}, {state.seed}; leave --seed out or give that one.")
    return Resumed(folder, state)


def is_complete(args: argparse.Namespace, steps: int, resumed: Resumed | None) -> bool:
    """Whether the model of this output name was trained for all the steps already: it says so itself, or the state does."""
    path = Path(args.output_dir) / final_name(args.output_name)
    if not path.is_file():
        return False
    if resumed is not None and resumed.state.progress.step >= steps:
        return True
    try:
        return read_header(path).metadata.get("ss_steps") == str(steps)
    except UserError:
        return False


def state_identity(args: argparse.Namespace, network: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """What must be the same for a state to fit; without a network, all but its sizes."""
    identity: dict[str, object] = {
        "--network_module": args.network_module,
        "--optimizer_type": describe_optimizer(optimizer),
        "--lr_scheduler": args.lr_scheduler_type or args.lr_scheduler,
    }
    if network is not None:
        sizes = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
        identity["a network of sizes"] = hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]
    return identity


def check_resumed(args: argparse.Namespace, resumed: Resumed, identity: Mapping[str, Any], steps: int) -> None:
    """Refuse a state that does not fit this training.

    Args:
        identity: of this training, as far as it is known; see ``state_identity``.
        steps: of the whole training.

    Raises:
        UserError: a state of another network, optimiser or schedule, or one that is past the last step.
    """
    state = resumed.state
    require_same(state, resumed.folder, identity)
    final = Path(args.output_dir) / final_name(args.output_name)
    only_unsaved = args.resume == LATEST and state.progress.step == steps and not final.exists()  # killed after the last state
    complete = args.resume == LATEST and is_complete(args, steps, resumed)
    if state.progress.step >= steps and not (only_unsaved or complete):
        raise UserError(
            f"the state {resumed.folder} was saved after step {state.progress.step}, and this training has {steps}; "
            "raise --max_train_steps to go on."
        )


def restore(args: argparse.Namespace, resumed: Resumed, parts: Restorable, order: Mapping[str, Any], steps: int) -> Progress:
    """Put everything where the state was saved; returns where that was.

    Where the data sets or their division changed, the place inside the epoch means nothing: the epoch begins anew.

    Args:
        order: what the order of the batches depends on now.
        steps: of the whole training.

    Raises:
        UserError: see ``check_resumed``.
    """
    state = resumed.state
    check_resumed(args, resumed, state_identity(args, parts.network, parts.optimizer), steps)
    load_state(resumed.folder, parts)
    progress = state.progress
    if changed := [name for name, value in order.items() if state.order.get(name) != value]:
        logger.warning("%s changed since the state was saved: epoch %d begins anew", " and ".join(changed), progress.epoch)
        progress.batches = 0
    flags = public_flags(args)
    differing = sorted(name for name in flags.keys() | state.flags.keys() if flags.get(name) != state.flags.get(name))
    if differing := [f"--{name}" for name in differing if name not in PLACE_FLAGS]:
        logger.warning(
            "flags that differ from those of the state: %s. The optimiser and the schedule go on with the numbers in the state.",
            ", ".join(differing),
        )
    logger.info("resumed from %s: step %d, epoch %d", resumed.folder, progress.step, progress.epoch)
    return progress
