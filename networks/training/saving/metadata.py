"""Metadata of a trained file: the ss_* keys of sd-scripts and the keys of ModelSpec (github.com/Stability-AI/ModelSpec).

All values are text, as safetensors headers hold nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

BASE_MODEL_VERSION = "hunyuan_video"
ARCHITECTURE = "hunyuan-video/lora"
IMPLEMENTATION = "https://github.com/Tencent/HunyuanVideo"

# Metadata key -> training flag. A flag that the training script does not have is left out.
_FROM_FLAGS = {
    "ss_output_name": "output_name",
    "ss_learning_rate": "learning_rate",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_network_module": "network_module",
    "ss_network_dim": "network_dim",
    "ss_network_alpha": "network_alpha",
    "ss_network_dropout": "network_dropout",
    "ss_mixed_precision": "mixed_precision",
    "ss_seed": "seed",
    "ss_training_comment": "training_comment",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_fp8_base": "fp8_base",
    "ss_int8_base": "int8_base",
    "ss_fp8_scaled": "fp8_scaled",
    "ss_fp8_fast": "fp8_fast",
    "ss_fp8_llm": "fp8_llm",
    "ss_weighting_scheme": "weighting_scheme",
    "ss_logit_mean": "logit_mean",
    "ss_logit_std": "logit_std",
    "ss_mode_scale": "mode_scale",
    "ss_guidance_scale": "guidance_scale",
    "ss_timestep_sampling": "timestep_sampling",
    "ss_sigmoid_scale": "sigmoid_scale",
    "ss_discrete_flow_shift": "discrete_flow_shift",
}
_FILE_NAMES = {"ss_sd_model_name": "dit", "ss_vae_name": "vae"}
_KEPT_WITHOUT_METADATA = ("ss_base_model_version", "ss_network_")


class DataFacts(Protocol):
    """What the metadata needs to know about the data; ``dataset.batches.report.DataFacts`` is one.

    Attributes:
        items: in all data sets, repeats included.
        resolution: (width, height) of the largest data set, for ModelSpec.
        datasets: one JSON-ready description for each.
    """

    items: int
    resolution: tuple[int, int]
    datasets: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TrainingFacts:
    """What a run knows beyond its flags.

    Attributes:
        optimizer: class and arguments, see ``networks.training.optim.optimizers.describe_optimizer``.
        started_at: seconds since 1970.
        network_dim, network_alpha: "Dynamic" where they differ from layer to layer; None leaves what the flags say.
    """

    data: DataFacts
    batches_per_epoch: int
    epochs: int
    steps: int
    optimizer: str
    started_at: float
    network_dim: int | str | None = None
    network_alpha: float | str | None = None
    mixed_precision: str | None = None
    session_id: str = ""


def new_session_id() -> str:
    """A number for ss_session_id. It does not come from the generators of the training: an identifier must not move them."""
    return str(random.SystemRandom().randint(0, 2**32))


def training_metadata(
    flags: Mapping[str, Any], facts: TrainingFacts, network_args: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Everything that is known when training starts; ``finished_metadata`` adds the rest at each save.

    With --no_metadata only the keys that loaders need are kept: ss_base_model_version and ss_network_*.

    Args:
        flags: the value of every flag, also of those that were not given.
        network_args: --network_args as given.
    """
    values: dict[str, Any] = {key: flags[flag] for key, flag in _FROM_FLAGS.items() if flag in flags}
    values["ss_lr_scheduler"] = flags.get("lr_scheduler_type") or values.get("ss_lr_scheduler")
    values |= {
        "ss_session_id": facts.session_id or new_session_id(),
        "ss_training_started_at": facts.started_at,
        "ss_num_train_items": facts.data.items,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.epochs,
        "ss_max_train_steps": facts.steps,
        "ss_base_model_version": BASE_MODEL_VERSION,
        "ss_optimizer": facts.optimizer,
        "ss_datasets": json.dumps(list(facts.data.datasets), ensure_ascii=False, default=str),
        "ss_network_args": json.dumps(dict(network_args or {}), ensure_ascii=False, default=str),
    }
    known_later = {
        "ss_network_dim": facts.network_dim,
        "ss_network_alpha": facts.network_alpha,
        "ss_mixed_precision": facts.mixed_precision,
    }
    values |= {key: value for key, value in known_later.items() if value is not None}
    values |= {key: Path(flags[flag]).name for key, flag in _FILE_NAMES.items() if flags.get(flag)}
    metadata = {key: str(value) for key, value in values.items()}
    if flags.get("no_metadata"):
        return {key: value for key, value in metadata.items() if key.startswith(_KEPT_WITHOUT_METADATA)}
    return metadata | _modelspec(flags, facts)


def _modelspec(flags: Mapping[str, Any], facts: TrainingFacts) -> dict[str, str]:
    """The modelspec.* keys; author, description, license and tags only where given. ``date`` is added at each save."""
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": ARCHITECTURE,
        "implementation": IMPLEMENTATION,
        "title": flags.get("metadata_title") or flags["output_name"],
        "resolution": "{}x{}".format(*facts.data.resolution),
    }
    given = {name: flags.get(f"metadata_{name}") for name in ("author", "description", "license", "tags")}
    spec |= {name: value for name, value in given.items() if value}
    low, high = flags.get("min_timestep"), flags.get("max_timestep")
    if low is not None or high is not None:
        spec["timestep_range"] = f"{0 if low is None else low:g},{1000 if high is None else high:g}"
    return {f"modelspec.{name}": value for name, value in spec.items()}


def finished_metadata(metadata: Mapping[str, str], *, steps: int, epoch: int, now: float) -> dict[str, str]:
    """``metadata`` for a file saved after ``steps`` optimiser steps in ``epoch``, at ``now`` (seconds since 1970).

    Metadata cut down by --no_metadata stays as it is.
    """
    if "ss_training_started_at" not in metadata:
        return dict(metadata)
    date = datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="seconds")
    return {
        **metadata,
        "ss_training_finished_at": str(now),
        "ss_steps": str(steps),
        "ss_epoch": str(epoch),
        "modelspec.date": date,
    }
