"""The config.json beside the weights of a text encoder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hunyuan_model.checkpoints.reading import Checkpoint
from utils.errors import UserError, first_line, shown
from utils.files import read_text

logger = logging.getLogger(__name__)

# What is used of a configuration, by the kind of its values.
_SIZES = frozenset(
    {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"}
    | {"max_position_embeddings"}
)
_NUMBERS = frozenset({"rms_norm_eps", "layer_norm_eps", "rope_theta"})
_SWITCHES = frozenset({"attention_bias", "mlp_bias"})
_ROPES = frozenset({"rope_scaling", "rope_parameters"})
_MOST = 1 << 24


def read_model_config(weights: Path, model_type: str, flag: str) -> dict | None:
    """What counts of the config.json beside ``weights`` (a file or a folder), or of the text part of it; None if there is none.

    All other keys are left out: some make transformers fetch code. A config of another model beside a single file is logged and
    not used.

    Raises:
        UserError: unreadable, or the config of a folder describes another model than one of ``model_type``.
    """
    path = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(read_text(path, "the model configuration"))
        config = config.get("text_config") or config
        found = config.get("model_type", model_type)
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a readable model configuration ({error}). Copy it again.") from error
    if found == model_type:
        return _checked(config, f"{flag} {path}")
    if weights.is_dir():
        raise UserError(f"{path} describes a model of type {found!r}; {flag} needs one of type {model_type!r}.")
    logger.warning("%s describes a model of type %r, not %s: it is not used", path, found, weights.name)
    return None


def matrix_shape(checkpoint: Checkpoint, name: str, flag: str) -> tuple[int, int]:
    """The shape of the weight ``name``, from which the size of a model is read.

    Raises:
        UserError: names ``flag``; there is no such weight, or it is no matrix.
    """
    shape = checkpoint.shapes.get(name, ())
    if len(shape) != 2 or 0 in shape:
        found = f"is no matrix but {shape}" if name in checkpoint.shapes else "is missing"
        raise UserError(f"{flag} {checkpoint.path} is damaged or of another model: {name} {found}. Copy or download it again.")
    return shape


def _checked(config: dict, where: str) -> dict:
    """The values that are used, of the types that they must have; those that are null are left to the default."""
    checks: dict[str, Callable[[object], bool]] = {"hidden_act": lambda value: isinstance(value, str)}
    checks |= dict.fromkeys(_SIZES, lambda value: type(value) is int and 0 < value <= _MOST)
    checks |= dict.fromkeys(_NUMBERS, _is_number)
    checks |= dict.fromkeys(_SWITCHES, lambda value: isinstance(value, bool))
    checks |= dict.fromkeys(_ROPES, lambda value: isinstance(value, dict) and all(map(_is_rope_value, value.items())))
    values = {key: value for key, value in config.items() if key in checks and value is not None}
    if wrong := next((key for key, value in values.items() if not checks[key](value)), None):
        raise UserError(
            f"{where}: its config.json says that {wrong} is {shown(values[wrong])}, which cannot be. Copy that file again."
        )
    return values


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1 << 53


def _is_rope_value(item: tuple[str, object]) -> bool:
    key, value = item
    if key in ("type", "rope_type"):
        return isinstance(value, str)
    return value is None or isinstance(value, bool) or all(map(_is_number, value if isinstance(value, list) else [value]))


def require_sizes_of_weights(sizes: Mapping[str, tuple[int, int]], path: Path, flag: str) -> None:
    """Refuse a configuration whose sizes are not those of the weights, before anything is built by them.

    Args:
        sizes: what the configuration says and what the weights have.

    Raises:
        UserError: names ``flag`` and a size that differs.
    """
    for name, (said, found) in sizes.items():
        if said != found:
            raise UserError(
                f"{flag} {path}: its config.json says that {name} is {said}, but the weights have {found}. Copy that file again, "
                "or give the weights that it belongs to."
            )


@contextmanager
def building_from_config(path: str | os.PathLike[str], flag: str) -> Iterator[None]:
    """Turn whatever transformers raises on an impossible configuration into a UserError that names ``flag`` and ``path``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every version of transformers checks other values, in other ways
        raise UserError(
            f"{flag} {path}: its config.json describes no model that can be built ({first_line(error)}). Copy that file again."
        ) from error
