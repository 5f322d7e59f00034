"""Names of what training writes, when it is written, and which of it is removed again."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from networks.formats.layouts import DEFAULT, OTHER, TARGETS
from utils.disk_space import require_room
from utils.errors import UserError
from utils.files import final_of_temporary, remove_folder

logger = logging.getLogger(__name__)

STATE_SUFFIX = "-state"
MODEL_SUFFIX = ".safetensors"
RESCUED = "-rescued"
COMFYUI = "comfyui"  # the copy that ends a training
COPIES = (*TARGETS, COMFYUI)


def lock_file(folder: Path, name: str) -> Path:
    """The lock of the training that saves as ``name``."""
    return folder / f".{name}.lock"


def final_name(name: str) -> str:
    """The file of the finished training."""
    return f"{name}{MODEL_SUFFIX}"


def epoch_name(name: str, epoch: int) -> str:
    """The file of the model after ``epoch`` epochs."""
    return f"{name}-{epoch:06d}{MODEL_SUFFIX}"


def step_name(name: str, step: int) -> str:
    """The file of the model after ``step`` optimizer steps."""
    return f"{name}-step{step:08d}{MODEL_SUFFIX}"


def unused_step_name(folder: Path, name: str, step: int, ours: bool) -> str:
    """Like ``step_name``, for what is saved because a training fails: with a word more where another training saved that step.

    Args:
        ours: whether a model of that step is this training's own.
    """
    model, number = step_name(name, step), itertools.count(1)
    while (folder / state_name(model)).exists() or ((folder / model).exists() and not ours):
        model, ours = f"{step_name(name, step).removesuffix(MODEL_SUFFIX)}{RESCUED}{next(number)}{MODEL_SUFFIX}", False
    return model


def state_name(model_name: str) -> str:
    """The folder of the training state that belongs to a model file."""
    return model_name.removesuffix(MODEL_SUFFIX) + STATE_SUFFIX


def copy_name(model_name: str, copy: str) -> str:
    """The file beside a model with the same LoRA in another layout; ``copy``: one of ``COPIES``."""
    return f"{model_name.removesuffix(MODEL_SUFFIX)}_{copy}{MODEL_SUFFIX}"


def output_names(name: str) -> re.Pattern[str]:
    """Matches all names of models, their copies and states of the run ``name``; its groups are the step and the epoch, of
    those that are not rescued."""
    step, copy = rf"(?:-step(\d{{8,}})|-(\d{{6,}})|-step\d{{8,}}{RESCUED}\d+)?", rf"(?:_(?:{'|'.join(COPIES)}))?"
    return re.compile(rf"{re.escape(name)}{step}(?:{STATE_SUFFIX}|{copy}{re.escape(MODEL_SUFFIX)})")


@dataclass(frozen=True)
class SaveSettings:
    """Where models and states are saved, when, and which older ones are kept. Fields have the names of their flags.

    Attributes:
        save_format: layouts, of ``TARGETS``; the first is that of the model, the others those of copies beside it.

    Raises:
        UserError: a limit for what is never saved; a layout named twice.
    """

    output_dir: str
    output_name: str
    save_every_n_epochs: int | None = None
    save_every_n_steps: int | None = None
    save_last_n_epochs: int | None = None
    save_last_n_epochs_state: int | None = None
    save_last_n_steps: int | None = None
    save_last_n_steps_state: int | None = None
    save_state: bool = False
    save_state_on_train_end: bool = False
    save_format: tuple[str, ...] = (DEFAULT,)
    no_comfyui: bool = False

    def __post_init__(self) -> None:
        if len(set(self.save_format)) < len(self.save_format):
            raise UserError(f"--save_format {' '.join(self.save_format)} names a layout twice; name each once.")
        for unit in ("steps", "epochs"):
            limit, limit_of_states, every = f"save_last_n_{unit}", f"save_last_n_{unit}_state", f"save_every_n_{unit}"
            for flag, needed in ((limit, every), (limit_of_states, every), (limit_of_states, "save_state")):
                if getattr(self, flag) and not getattr(self, needed):
                    raise UserError(f"--{flag} limits what --{needed} writes; give --{needed} as well.")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def state_at_end(self) -> bool:
        return self.save_state or self.save_state_on_train_end

    def copies(self, at_end: bool = True) -> tuple[str, ...]:
        """Of ``COPIES``, those that are saved beside a model."""
        first, *others = self.save_format
        return (*others, COMFYUI) if at_end and not self.no_comfyui and first != OTHER else tuple(others)

    def due_after_step(self, step: int) -> bool:
        return self.save_every_n_steps is not None and step % self.save_every_n_steps == 0

    def due_after_epoch(self, epoch: int) -> bool:
        return self.save_every_n_epochs is not None and epoch % self.save_every_n_epochs == 0


def remove_outdated(
    settings: SaveSettings,
    *,
    step: int | None = None,
    epoch: int | None = None,
    before_removal: Callable[[Path], None] | None = None,
) -> None:
    """Remove what the settings no longer keep, now that the model (and the state) of ``step`` or ``epoch`` is whole.

    Only names that the settings themselves gave are touched: models of other runs, and those saved on request, stay. States
    without a limit of their own have that of the models.

    Args:
        before_removal: called with each file or folder that goes; returns when nobody needs it any more.
    """
    if step is not None:  # the models of the last n steps stay
        group, every, models = 1, settings.save_every_n_steps, settings.save_last_n_steps
        first_model, first_state = (n and step - n for n in (models, settings.save_last_n_steps_state or models))
    else:  # the last n models stay
        group, every, models = 2, settings.save_every_n_epochs, settings.save_last_n_epochs
        first_model, first_state = (n and epoch - (n - 1) * every for n in (models, settings.save_last_n_epochs_state or models))
    ours = output_names(settings.output_name)
    for path in sorted(settings.folder.iterdir()):
        match = ours.fullmatch(path.name)
        if match is None or match[group] is None:
            continue
        number, first = int(match[group]), first_state if path.name.endswith(STATE_SUFFIX) else first_model
        if first is None or number >= first or number % every:
            continue
        if before_removal is not None:
            before_removal(path)
        try:
            remove_folder(path) if path.is_dir() else path.unlink()
            logger.info("removed the old %s", path)
        except OSError as error:  # a file that another program holds open must not end a training
            logger.warning("cannot remove the old %s: %s", path, error.strerror or error)


def require_room_for_save(settings: SaveSettings, values: int, copied: int, dtype: torch.dtype, optimizer_bytes: float) -> None:
    """Refuse a disk without room for one save, before a model is loaded.

    Args:
        values: numbers in the network.
        copied: numbers in the copies of the model.
        dtype: of the saved model. A state holds the network in float32.
        optimizer_bytes: what a state holds of the optimizer for each value.

    Raises:
        UserError: with the sizes.
    """
    size, what = (values + copied) * dtype.itemsize, "one model"
    if copied:
        what = f"{what} in {1 + len(settings.copies())} layouts"
    if settings.state_at_end:
        size, what = size + round(values * (4 + optimizer_bytes)), f"{what} with its state"
    require_room(settings.folder, size, f"{what} takes", "give another --output_dir")


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a killed run of the same name was writing: files and folders that never got their final names."""
    ours = output_names(name)
    for path in folder.iterdir() if folder.is_dir() else ():
        if ours.fullmatch(final_of_temporary(path) or ""):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
