"""Counting steps from which nothing was learnt, because the loss or the gradient was not finite."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 10


class TrainingBroken(Exception):
    """Training cannot go on; the message says why, and what to do."""


def count_skipped(in_a_row: int, step: int, reason: str | None) -> int:
    """Say in one line why ``step`` was skipped; returns how many in a row are.

    Args:
        in_a_row: those that were skipped just before it.
        reason: None where something was learnt.

    Raises:
        TrainingBroken: this was the last one of too many.
    """
    if reason is None:
        return 0
    logger.warning("step %d was skipped: %s", step, reason)
    if in_a_row + 1 >= MAX_IN_A_ROW:
        raise TrainingBroken(
            f"{MAX_IN_A_ROW} steps in a row were skipped, the last because {reason}. The models and states that were saved "
            "before are whole; start from the last model with --network_weights, and a lower --learning_rate or another precision."
        )
    return in_a_row + 1
