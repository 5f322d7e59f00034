"""Where the text encoders compute while other networks stay in the device's memory."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.text.arguments import TextEncoderSettings
from hunyuan_model.text.llm import FLAG
from utils.disk_space import readable
from utils.errors import UserError
from utils.free_memory import free_device_memory, free_host_memory

logger = logging.getLogger(__name__)

MARGIN = 1.1  # for what is computed beside the weights
CPU_DTYPES = (torch.float32, torch.bfloat16)  # by preference; float16 is slow there


def place_beside_others(settings: TextEncoderSettings, device: torch.device) -> tuple[TextEncoderSettings, torch.device]:
    """``settings`` and ``device`` where the free memory of ``device`` holds text encoder 1, the larger one; else the CPU, with a
    dtype that suits it and its memory.

    Raises:
        UserError: neither has that much memory.
    """
    if device.type == "cpu":
        return settings, device
    numbers = sum(math.prod(shape) for shape in open_checkpoint_of(Kind.LLAMA, settings.text_encoder1, FLAG).shapes.values())

    def needed(dtype: torch.dtype) -> int:
        return int(MARGIN * numbers * (1 if settings.fp8_llm else dtype.itemsize))

    free = free_device_memory(device)
    if free is None or needed(settings.text_encoder_dtype) <= free:
        return settings, device
    free_host = free_host_memory()
    for dtype in CPU_DTYPES:
        if needed(dtype) <= free_host:
            logger.info("text encoder 1 does not fit beside the transformer: the prompt is encoded on the CPU, in %s", dtype)
            return replace(settings, text_encoder_dtype=dtype), torch.device("cpu")
    takes, use = readable(needed(CPU_DTYPES[-1])), "close other programs" if settings.fp8_llm else "use --fp8_llm"
    raise UserError(
        f"text encoder 1 takes {takes}, but {readable(free_host)} of RAM and {readable(free)} of the GPU are free; {use}."
    )
