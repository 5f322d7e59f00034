"""Saving a network as a model in the layouts that are asked for, each a whole file or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from networks.formats.layouts import DEFAULT, LAYOUTS, OTHER
from networks.formats.reading import LoraFile, lora_of
from networks.formats.updates import LowRank
from networks.formats.writing import save_lora, to_layout
from networks.training.saving.files import COMFYUI, SaveSettings, copy_name
from utils.errors import UserError, first_line, name_some
from utils.files import atomic_path
from utils.safetensors_io import read_tensors

logger = logging.getLogger(__name__)

READERS = {
    DEFAULT: "this project and musubi-tuner",
    OTHER: "ComfyUI, its wrapper and diffusers",
    "diffusers": "diffusers",
    "comfy": "ComfyUI",
    "framepack": "FramePack",
}
KINDS_OF_LYCORIS = {"lora": LowRank.kind, "locon": LowRank.kind, "loha": "LoHa", "lokr": "LoKr", "full": "a whole difference"}


def planned_lora(network: nn.Module | None) -> LoraFile | None:
    """The LoRA, without its values, that a network on the meta device will be; None for one that cannot be converted.

    Its alphas are the ranks: with them no values are looked at.
    """
    tensors = {} if network is None else network.state_dict()
    try:
        return lora_of({name: value for name, value in tensors.items() if not name.endswith(".alpha")}, {}, "it")
    except UserError:
        return None


def check_formats(settings: SaveSettings, lora: LoraFile | None, network_args: Mapping[str, str], is_lycoris: bool) -> None:
    """Refuse layouts that cannot hold what will be trained, as far as that is known before it is made.

    Args:
        lora: see ``planned_lora``.
        network_args: of the network module, which may be that of LyCORIS.

    Raises:
        UserError: names the layout and the reason.
    """
    kinds = _kinds_of_lycoris(network_args) if is_lycoris else set()
    for layout in settings.save_format[settings.save_format[0] == DEFAULT :]:  # the default as such needs no conversion
        if refused := kinds - {LowRank.kind, *LAYOUTS[layout].kinds}:
            raise UserError(f"--save_format {layout} cannot hold {name_some(refused)}, which --network_args asks for. Use comfy.")
        if lora is not None:
            try:
                to_layout(lora, layout)
            except UserError as error:
                raise UserError(f"--save_format {layout} cannot hold what will be trained: {error}") from error


def copied_values(settings: SaveSettings, lora: LoraFile | None) -> int:
    """Numbers in the copies of the model at the end of the training; ``lora`` as in ``check_formats``."""
    count = 0
    for copy in settings.copies() if lora is not None else ():
        with suppress(UserError):  # a copy that cannot be made
            count += sum(tensor.numel() for tensor in to_layout(lora, _layout_of(copy, lora)).values())
    return count


def _kinds_of_lycoris(network_args: Mapping[str, str]) -> set[str]:
    """Of the updates of a LyCORIS network; empty for kinds that are not read here."""
    kind = KINDS_OF_LYCORIS.get(network_args.get("algo", "lora").lower())
    if kind is not None and network_args.get("dora_wd", "false").lower() != "false":
        kind = "DoRA" if kind == LowRank.kind else f"DoRA on {kind}"
    return set() if kind is None else {kind}


def _layout_of(copy: str, lora: LoraFile) -> str:
    """The layout of a copy; for ComfyUI the one that others read too, if it holds all updates."""
    if copy != COMFYUI:
        return copy
    return OTHER if lora.kinds <= {LowRank.kind, *LAYOUTS[OTHER].kinds} else "comfy"


def save_network(
    network: nn.Module, path: Path, dtype: torch.dtype, metadata: dict[str, str], settings: SaveSettings, at_end: bool
) -> list[Path]:
    """Save ``network`` by its own ``save_weights``, which may write in place, under ``path``, then its copies.

    A network that cannot be converted is saved as its module writes it, and a copy that fails is left out, with a warning each.

    Returns:
        The files.
    """
    layout, copies = settings.save_format[0], settings.copies(at_end)
    lora = None
    with atomic_path(path, keep_name=True) as temporary:
        network.save_weights(str(temporary), dtype, metadata)
        if copies or layout != DEFAULT:
            lora = _read(temporary, path)
        if layout != DEFAULT and (lora is None or not _converted(temporary, path, lora, layout)):
            layout = DEFAULT
    logger.info("saved %s, for %s", path, READERS[layout])
    return [path, *(_save_copies(path, lora, copies) if lora is not None else ())]


def add_missing_copies(model: Path, settings: SaveSettings) -> None:
    """Save what a training that was killed right after its final model did not come to."""
    missing = [copy for copy in settings.copies() if not model.with_name(copy_name(model.name, copy)).exists()]
    if missing and (lora := _read(model, model)) is not None:
        _save_copies(model, lora, missing)


def _read(stored: Path, path: Path) -> LoraFile | None:
    """The LoRA in a file that is to be called ``path``, in memory; None, with a warning, where it is none that can be converted."""
    try:
        file = read_tensors(stored)
        return lora_of({name: tensor.clone() for name, tensor in file.tensors.items()}, file.metadata, str(path))
    except UserError as error:
        logger.warning("%s is saved as its --network_module writes it, without copies for other programs: %s", path, error)
        return None


def _save_copies(path: Path, lora: LoraFile, copies: Sequence[str]) -> list[Path]:
    saved = []
    for copy in copies:
        layout = _layout_of(copy, lora)
        target = path.with_name(copy_name(path.name, copy))
        if _converted(target, target, lora, layout):
            logger.info("saved %s, for %s", target, READERS[layout])
            saved.append(target)
    return saved


def _converted(target: Path, path: Path, lora: LoraFile, layout: str) -> bool:
    """Whether ``lora`` could be saved as ``target``, which is or will be called ``path``, in a layout."""
    try:
        save_lora(target, lora, layout)
    except Exception as error:  # the training is worth more than a copy of what is saved already
        logger.warning("%s is not saved in the layout %s: %s", path, layout, first_line(error))
        return False
    return True
