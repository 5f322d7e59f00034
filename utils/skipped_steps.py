"""Counting steps from which nothing was learnt, because the loss or the gradient was not finite."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 10


class TrainingBroken(Exception):
    """Training cannot go on; the message says why, and what to do."""


class SkippedSteps:
    """Says each skipped step in one line, and ends a training that skips them all."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, step: int, reason: str | None) -> None:
        """Tell how ``step`` went; ``reason`` is None where something was learnt.

        Raises:
            TrainingBroken: this was the last one of too many in a row.
        """
        if reason is None:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        logger.warning("step %d was skipped: %s", step, reason)
        if self._in_a_row == MAX_IN_A_ROW:
            raise TrainingBroken(
                f"{MAX_IN_A_ROW} steps in a row were skipped, the last because {reason}. The models and states that were saved "
                "before are whole; go on from the last one with a lower --learning_rate or another precision."
            )
