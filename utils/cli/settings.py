"""From parsed flags to frozen settings, each flag read once."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TypeVar

S = TypeVar("S")


def settings_from(cls: type[S], args: argparse.Namespace, **given: object) -> S:
    """An instance of the dataclass ``cls`` whose fields have the names of flags.

    Args:
        given: values of fields that no flag holds as it stands; they win over the flags.
    """
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    flags = {name: getattr(args, name) for name in names if name not in given and hasattr(args, name)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}, **given)
