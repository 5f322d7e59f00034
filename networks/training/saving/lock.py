"""Two trainings do not write the same models and states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from networks.training.saving.files import SaveSettings, lock_file
from utils.errors import UserError
from utils.processes.locks import sole_run


@contextmanager
def sole_training(settings: SaveSettings, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of --output_name in --output_dir; the main process does it for all of a launch.

    Raises:
        UserError: another training of that name is under way; in all processes.
    """
    with ExitStack() as stack:
        refusal = None
        if accelerator.is_main_process:
            name, folder = settings.output_name, settings.folder
            try:
                remedy = "give another --output_name or --output_dir"
                stack.enter_context(sole_run(lock_file(folder, name), f"trains {name} in {folder}", remedy))
            except UserError as error:
                refusal = str(error)
        if (refusal := broadcast_object_list([refusal])[0]) is not None:
            raise UserError(refusal)
        yield
