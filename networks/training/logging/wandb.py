"""Logs in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from networks.training.logging.trackers import DEFAULT_NAME, RunStart
from utils.errors import UserError, first_line

if TYPE_CHECKING:
    from networks.training.samples.sampling import DrawnSample


class WandbTracker:
    """A run in the project ``log_tracker_name``. The key is handed over in the environment, which W&B does not store.

    The options are those of ``wandb.init``. A run is known by its id; W&B itself leaves out steps that a continued one has.
    """

    name = "wandb"

    def __init__(self, start: RunStart) -> None:
        args = start.args
        self.wandb = import_wandb()
        if args.wandb_api_key is not None:
            os.environ["WANDB_API_KEY"] = args.wandb_api_key
        settings: dict[str, Any] = {"project": args.log_tracker_name or DEFAULT_NAME, **start.options}
        if args.logging_dir is not None:
            Path(args.logging_dir).mkdir(parents=True, exist_ok=True)
            settings.setdefault("dir", args.logging_dir)
        if args.wandb_run_name is not None:
            settings["name"] = args.wandb_run_name
        if start.flags:
            settings["config"] = {**settings.get("config", {}), **start.flags}
        if start.earlier is not None and not settings.keys() & {"resume", "resume_from", "fork_from"}:
            settings = {"id": start.earlier, **settings, "resume": "allow"}
        self._session = self.wandb.init(**settings)
        self.run = str(self._session.id)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._session.log(dict(values), step=step)

    def sample(self, sample: DrawnSample, step: int) -> None:
        caption = f"{sample.prompt.prompt} (seed {sample.seed})"
        if sample.path.suffix == ".png":
            media = self.wandb.Image(str(sample.path), caption=caption)
        else:
            media = self.wandb.Video(str(sample.path), caption=caption, format="mp4")
        self._session.log({f"sample/{sample.index:02d}": media}, step=step)

    def close(self) -> None:
        self._session.finish()


def import_wandb() -> Any:
    """The package wandb. A UserError says what to install where it cannot be imported."""
    try:
        import wandb
    except Exception as error:
        raise UserError(
            f"--log_with wandb needs wandb, which cannot be imported here ({first_line(error)}). "
            "Install it with: pip install wandb; or leave it out."
        ) from error
    if not hasattr(wandb, "init"):  # a folder called wandb, which W&B itself makes, imports as an empty package
        raise UserError(
            "--log_with wandb finds a folder called wandb but not the package. Install it with: pip install wandb; or leave it out."
        )
    return wandb
