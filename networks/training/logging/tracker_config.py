"""--log_tracker_config: more arguments of TensorBoard's SummaryWriter and of ``wandb.init``, checked before anything is loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError, shown
from utils.key_values import nearest_name
from utils.toml_files import read_toml

TABLES = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Kind:
    """What an argument takes: ``wanted`` says it, ``fits`` judges a value as TOML has it."""

    wanted: str
    fits: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
SWITCH_OR_TEXT = Kind("true, false or a text", lambda value: isinstance(value, bool | str))
TABLE = Kind("a table", lambda value: isinstance(value, dict))
COUNT = Kind("a whole number, 0 or above", lambda value: type(value) is int and 0 <= value < 2**63)
SECONDS = Kind(
    "a number of seconds above 0",  # and one that a thread can wait for
    lambda value: type(value) in (int, float) and 0 < value <= threading.TIMEOUT_MAX,
)
FOLDER = Kind("the path of a folder", lambda value: isinstance(value, str) and bool(value.strip()) and value.isprintable())
NAME_PART = Kind(
    "a text that a file name may hold",
    lambda value: isinstance(value, str) and value.isprintable() and not set(value) & set('/\\:*?"<>|'),
)

# All that SummaryWriter takes. Its thread, and not the call, would fail on most values of another type.
SUMMARY_WRITER = {
    "log_dir": FOLDER,
    "comment": TEXT,
    "purge_step": COUNT,
    "max_queue": COUNT,
    "flush_secs": SECONDS,
    "filename_suffix": NAME_PART,
}
# Of what wandb.init takes; versions differ, so the names are those of the package that is installed.
WANDB_INIT = {
    **dict.fromkeys(("entity", "project", "dir", "id", "name", "notes", "group", "job_type", "mode"), TEXT),
    **dict.fromkeys(("resume_from", "fork_from"), TEXT),
    **dict.fromkeys(("tags", "config_exclude_keys", "config_include_keys"), TEXTS),
    **dict.fromkeys(("allow_val_change", "force", "save_code", "tensorboard", "sync_tensorboard", "monitor_gym"), SWITCH),
    **dict.fromkeys(("reinit", "resume"), SWITCH_OR_TEXT),
    **dict.fromkeys(("config", "settings"), TABLE),
}


def read_tracker_config(path: str | os.PathLike[str] | None, wandb_names: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The tables of the file by tracker, empty ones where there is none.

    Args:
        wandb_names: what ``wandb.init`` takes; empty for anything.

    Raises:
        UserError: no such file, another table, an argument that the tracker does not take, or a value of another type.
    """
    if path is None:
        return {name: {} for name in TABLES}
    where = f"--log_tracker_config {path}"
    config = read_toml(path, "--log_tracker_config")
    for name, table in config.items():
        if name not in TABLES or not isinstance(table, dict):
            raise UserError(
                f"{where}: {name!r} is no tracker's table; there are {' and '.join(f'[{table}]' for table in TABLES)}."
                f"{nearest_name(name, TABLES)}"
            )
    config = {name: config.get(name, {}) for name in TABLES}
    _check_table(config["tensorboard"], f"{where}: [tensorboard]", SUMMARY_WRITER, SUMMARY_WRITER)
    _check_table(config["wandb"], f"{where}: [wandb]", WANDB_INIT, wandb_names)
    return config


def _check_table(table: Mapping[str, Any], where: str, kinds: Mapping[str, Kind], names: Collection[str]) -> None:
    for name, value in table.items():
        if names and name not in names:
            raise UserError(f"{where} has no argument {name!r}.{nearest_name(name, names)} Known: {', '.join(names)}.")
        if name in kinds and not kinds[name].fits(value):
            raise UserError(f"{where} {name} must be {kinds[name].wanted}, but it is {shown(value)}.")
