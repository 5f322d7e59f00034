"""Metadata of a trained file: the ss_* keys of sd-scripts and the keys of ModelSpec (github.com/Stability-AI/ModelSpec).

All values are text, as safetensors headers hold nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

# Flags that are stored as ss_NAME, if the training has them.
_FLAGS = """
output_name learning_rate gradient_checkpointing gradient_accumulation_steps lr_warmup_steps lr_scheduler network_module
network_dim network_alpha network_dropout mixed_precision seed training_comment max_grad_norm fp8_base int8_base fp8_scaled
fp8_fast fp8_llm weighting_scheme logit_mean logit_std mode_scale guidance_scale timestep_sampling sigmoid_scale
discrete_flow_shift
"""
_FILES = {"sd_model_name": "dit", "vae_name": "vae"}
_KEPT_WITHOUT_METADATA = ("ss_base_model_version", "ss_network_")


class DataFacts(Protocol):
    """What the metadata needs to know about the data; ``dataset.batches.report.DataFacts`` is one.

    Attributes:
        items: in all datasets, repeats included.
        resolution: (width, height) of the largest dataset, for ModelSpec.
        datasets: one JSON-ready description for each.
    """

    items: int
    resolution: tuple[int, int]
    datasets: Sequence[Mapping[str, Any]]


def new_session_id() -> str:
    """A number for ss_session_id. It does not come from the generators of the training: an identifier must not move them."""
    return str(random.SystemRandom().randint(0, 2**32))


def training_metadata(
    flags: Mapping[str, Any], data: DataFacts, known: Mapping[str, Any], network_args: Mapping[str, Any]
) -> dict[str, str]:
    """Everything that is known when training starts; ``finished_metadata`` adds the rest at each save.

    With --no_metadata only the keys that loaders need are kept: ss_base_model_version and ss_network_*.

    Args:
        flags: the value of every flag, also of those that were not given.
        known: what the run knows beyond its flags, or better; keys without ss_.
        network_args: --network_args as given.
    """
    values = {flag: flags[flag] for flag in _FLAGS.split() if flag in flags}
    values |= {key: Path(flags[flag]).name for key, flag in _FILES.items() if flags.get(flag)}
    values |= {
        "lr_scheduler": flags.get("lr_scheduler_type") or flags["lr_scheduler"],
        "base_model_version": "hunyuan_video",
        "num_train_items": data.items,
        "datasets": json.dumps(list(data.datasets), ensure_ascii=False, default=str),
        "network_args": json.dumps(dict(network_args), ensure_ascii=False, default=str),
    }
    metadata = {f"ss_{key}": str(value) for key, value in {**values, **known}.items()}
    if flags.get("no_metadata"):
        return {key: value for key, value in metadata.items() if key.startswith(_KEPT_WITHOUT_METADATA)}
    return metadata | _modelspec(flags, data.resolution)


def _modelspec(flags: Mapping[str, Any], resolution: tuple[int, int]) -> dict[str, str]:
    """The modelspec.* keys; author, description, license and tags only where given. ``date`` is added at each save."""
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": "hunyuan-video/lora",
        "implementation": "https://github.com/Tencent/HunyuanVideo",
        "title": flags.get("metadata_title") or flags["output_name"],
        "resolution": "{}x{}".format(*resolution),
    }
    given = {name: flags.get(f"metadata_{name}") for name in ("author", "description", "license", "tags")}
    spec |= {name: value for name, value in given.items() if value}
    low, high = flags.get("min_timestep"), flags.get("max_timestep")
    if low is not None or high is not None:
        spec["timestep_range"] = f"{0 if low is None else low:g},{1000 if high is None else high:g}"
    return {f"modelspec.{name}": value for name, value in spec.items()}


def finished_metadata(metadata: Mapping[str, str], *, steps: int, epoch: int, now: float) -> dict[str, str]:
    """``metadata`` for a file saved after ``steps`` optimizer steps in ``epoch``, at ``now`` (seconds since 1970).

    Metadata cut down by --no_metadata stays as it is.
    """
    if "ss_training_started_at" not in metadata:
        return dict(metadata)
    date = datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="seconds")
    finished = {"ss_training_finished_at": str(now), "ss_steps": str(steps), "ss_epoch": str(epoch)}
    return {**metadata, **finished, "modelspec.date": date}
