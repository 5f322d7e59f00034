"""What a package for logs has to do, and what it is told when a training begins."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from networks.training.samples.sampling import DrawnSample

DEFAULT_NAME = "network_train"  # of --log_tracker_name


@dataclass(frozen=True)
class RunStart:
    """What a tracker is made from.

    Attributes:
        args: the flags of the training.
        options: of the package, from --log_tracker_config.
        flags: to be stored; none where empty.
        earlier: the ``run`` of a tracker that is continued, if any.
        step: after which it is continued.
    """

    args: argparse.Namespace
    options: Mapping[str, Any]
    flags: Mapping[str, Any]
    earlier: str | None = None
    step: int = 0


class Tracker(Protocol):
    """What a logging package has to do.

    Attributes:
        run: what a state keeps of it, so that the run can be continued.
    """

    name: str
    run: str

    def numbers(self, values: Mapping[str, float], step: int) -> None: ...

    def sample(self, sample: DrawnSample, step: int) -> None: ...

    def close(self) -> None: ...
