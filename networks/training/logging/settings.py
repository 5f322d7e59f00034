"""The flags of the logs."""

from __future__ import annotations

from dataclasses import dataclass, field

from utils.errors import UserError

TRACKER_NAMES = ("tensorboard", "wandb")


@dataclass(frozen=True)
class LogSettings:
    """The flags of the logs.

    Attributes:
        log_with: a name of ``TRACKER_NAMES``, or ``all``; None for TensorBoard where there is a ``logging_dir``, else no logs.
        loss_log: see ``networks.training.logging.loss_log``.
    """

    logging_dir: str | None = None
    log_with: str | None = None
    log_prefix: str | None = None
    log_tracker_name: str | None = None
    log_tracker_config: str | None = None
    log_config: bool = False
    wandb_run_name: str | None = None
    wandb_api_key: str | None = field(default=None, repr=False)
    loss_log: str | None = None

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of the trackers in use."""
        if self.log_with is None:
            return ("tensorboard",) if self.logging_dir is not None else ()
        return TRACKER_NAMES if self.log_with == "all" else (self.log_with,)

    def __post_init__(self) -> None:
        if "tensorboard" in self.trackers and self.logging_dir is None:
            raise UserError(f"--log_with {self.log_with} needs --logging_dir, the folder for TensorBoard's files.")
        if "wandb" in self.trackers and self.wandb_api_key is not None and not self.wandb_api_key.strip():
            raise UserError("--wandb_api_key is empty; give the key, or leave the flag out after `wandb login`.")

    def without_effect(self) -> list[str]:
        """A sentence on the flags that the chosen trackers do not use."""
        if "wandb" in self.trackers:
            return []
        unused = ["wandb_run_name", "wandb_api_key"]
        if not self.trackers:
            unused = ["log_prefix", "log_tracker_name", "log_tracker_config", *unused, "log_config"]
        given = [f"--{name}" for name in unused if getattr(self, name)]
        needs = "--log_with wandb" if self.trackers else "--log_with or --logging_dir"
        return [f"{', '.join(given)}: no effect without {needs}."] if given else []
