"""The config.json beside the weights of a text encoder: what is wrong in it is told as such."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from utils.errors import UserError, first_line


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
