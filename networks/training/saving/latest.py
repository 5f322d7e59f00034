"""Which of the states in a folder is the newest that can be used."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from networks.training.saving.files import STATE_SUFFIX, output_names
from networks.training.saving.state import StateFile, read_state_file, verify_state
from utils.errors import UserError
from utils.files import final_of_temporary

logger = logging.getLogger(__name__)


def find_latest_state(folder: Path, name: str) -> Path | None:
    """The newest whole state of the run ``name`` in ``folder``, or None: of the last training that saved one, the last step.

    A state that is not whole, or not what was saved, is skipped, with a warning.

    Raises:
        UserError: there are states, but not one that can be used: a training that started over would replace what was trained.
    """
    whole: list[tuple[tuple[int, int, float], Path, StateFile]] = []
    unusable: list[UserError] = []
    for path in _states_in(folder, name):
        if final_of_temporary(path) is None:
            try:
                state = read_state_file(path)
                whole.append((_age(state), path, state))
            except UserError as error:
                unusable.append(error)
    found = None
    for _, path, state in sorted(whole, key=lambda entry: entry[0], reverse=True):
        try:
            verify_state(path, state)
        except UserError as error:
            unusable.append(error)
        else:
            found = path
            break
    if unusable and found is None:
        raise UserError(
            f"no state of {name} in {folder} can be used. Move its states away to start over. The first one: {unusable[0]}"
        )
    for error in unusable:
        logger.warning("%s", error)
    return found


def _age(state: StateFile) -> tuple[int, int, float]:
    return state.lineage, state.progress.step, state.saved_at


def next_lineage(folder: Path, name: str) -> int:
    """Of a training that begins, or goes on from a state: above that of every state of this name in ``folder``."""
    lineages = [0]
    for path in _states_in(folder, name):
        with suppress(UserError):
            lineages.append(read_state_file(path).lineage)
    return max(lineages) + 1


def recover_state(folder: Path, name: str) -> None:
    """Give a state its name again if a kill came while it replaced an older one of that name; the newer of the two wins."""
    whole: list[tuple[tuple[int, int, float], Path]] = []
    for path in _states_in(folder, name):
        if final_of_temporary(path) is not None:
            with suppress(UserError):  # not whole: its writing was interrupted
                whole.append((_age(read_state_file(path)), path))
    for _, path in sorted(whole, reverse=True):
        final = folder / final_of_temporary(path)
        if not final.exists():
            os.replace(path, final)
            logger.warning("recovered the state %s, which was being replaced when the training was killed", final)


def _states_in(folder: Path, name: str) -> list[Path]:
    """The states of the run ``name``, under their own and under temporary names."""
    ours = output_names(name)
    return [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.endswith(STATE_SUFFIX) and path.is_dir() and ours.fullmatch(final_of_temporary(path) or path.name)
    ]
