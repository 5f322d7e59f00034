"""The config.json beside the weights of a text encoder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hunyuan_model.checkpoints.reading import Checkpoint
from utils.errors import UserError, first_line

logger = logging.getLogger(__name__)


def read_model_config(weights: Path, model_type: str, flag: str) -> dict | None:
    """The config.json beside ``weights`` (a file or a folder), or the text part of it; None if there is none.

    A config of another model beside a single file is logged and not used.

    Raises:
        UserError: unreadable, or the config of a folder describes another model than one of ``model_type``.
    """
    path = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        found = config.get("model_type", model_type)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a readable model configuration ({error}). Copy it again.") from error
    if found == model_type:
        return config
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
