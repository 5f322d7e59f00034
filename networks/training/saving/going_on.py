"""How to go on when a training ends, however it does: from which state, and with which command."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from networks.training.saving.latest import find_latest_state
from networks.training.saving.resume import Resumed
from networks.training.saving.state import LATEST, read_state_file, verify_state
from utils.errors import UserError, first_line
from utils.processes.command_line import command_line

logger = logging.getLogger(__name__)


def usable_state(folder: Path, name: str, lineage: int, resumed: Resumed | None) -> Path | None:
    """The newest state that a training can go on from: one that it saved, or one that it goes back to.

    Args:
        folder: where it saves states as ``name``.
        lineage: of its states. A training that was not resumed has nothing to do with older ones.
    """
    try:
        found = find_latest_state(folder, name)
        if found is not None and (resumed is not None or read_state_file(found).lineage == lineage):
            return found
        if resumed is not None:
            verify_state(resumed.folder, read_state_file(resumed.folder))
            return resumed.folder
    except (UserError, OSError) as error:  # the disk may be gone
        logger.warning("%s", first_line(error))
    return None


def command_to_go_on(words: Sequence[str], state: Path, folder: Path, launcher: Sequence[str] = ("python",)) -> str:
    """The command line of a training, with the flag that goes on from ``state``.

    Args:
        words: ``sys.argv``, without secrets.
        folder: where the training saves. From states there --resume latest goes on.
        launcher: the words before the script.
    """
    kept: list[str] = []
    takes_value = False
    for word in words:
        if not takes_value and not word.startswith("--resume=") and word not in ("--resume", "--resume_from_huggingface"):
            kept.append(word)
        takes_value = word == "--resume"
    inside = state.parent.resolve() == folder.resolve()
    return command_line([*launcher, *kept, "--resume", LATEST if inside else str(state)])
