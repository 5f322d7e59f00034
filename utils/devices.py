"""Devices and dtypes as users name them, and running out of their memory."""

from __future__ import annotations

import gc
import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from utils.errors import UserError
from utils.processes.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def parse_dtype(name: str, flag: str) -> torch.dtype:
    """``"bf16"`` or ``"bfloat16"`` and the like -> torch dtype; a UserError names ``flag`` otherwise."""
    try:
        return DTYPES[name.lower().removeprefix("torch.")]
    except KeyError:
        raise UserError(f"{flag} does not know the dtype {name!r}; use float32, float16 or bfloat16.") from None


def choose_dtype(name: str | None, flag: str, device: torch.device, on_cuda: torch.dtype) -> torch.dtype:
    """The dtype called ``name``; without a name ``on_cuda`` on CUDA and float32 on the CPU, where half precision is slow."""
    if name is not None:
        return parse_dtype(name, flag)
    return on_cuda if device.type == "cuda" else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> ``"float16"``, the spelling used in cache files."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """What decides on the bits of results: the name of a GPU, or the instructions and threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def pick_device(name: str | None, ranks: Ranks = ALONE) -> torch.device:
    """The device called ``name``, or CUDA where there is one and the CPU otherwise. Each of several processes has a GPU of its own.

    ``cuda:N`` becomes the current device: some kernels ask for that one, not for the device of their tensors.

    Raises:
        UserError: CUDA was asked for by name and this machine or this torch build has none; one GPU for several processes.
    """
    if ranks.count > 1 and name in (None, "cuda") and torch.cuda.is_available():
        return _own_gpu(ranks)
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device does not know {name!r}; use cpu, cuda or cuda:N.")
    if ranks.count > 1 and device.index is not None and device.type == "cuda":
        raise UserError(f"--device {name} is one GPU for {ranks.count} processes. Leave it out: each takes its own.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"only {count} CUDA devices" if count else "no CUDA device"
        raise UserError(f"--device {name} was asked for, but torch finds {found} here. Use cpu, or install a CUDA build of torch.")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _own_gpu(ranks: Ranks) -> torch.device:
    """That of this process. It is the first one where the launcher shows each process a single GPU."""
    device = torch.device("cuda", ranks.local_index % torch.cuda.device_count())
    torch.cuda.set_device(device)
    gpus = ranks.gather((platform.node(), str(torch.cuda.get_device_properties(device).uuid)))
    if shared := len(gpus) - len(set(gpus)):
        logger.warning("%d of %d processes share a GPU with another: start as many as there are GPUs.", shared, ranks.count)
    return device


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``tensor`` on ``device``, and there as ``dtype``, without waiting for what the device has yet to compute.

    A GPU reads page-locked memory only; a copy from other memory would make the host wait until everything before it is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
    return tensor.to(device=device, dtype=dtype)


def free_memory(device: torch.device) -> None:
    """Give memory of dropped models back before the next one is loaded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def warn_of_cpu(asked: str | None, device: torch.device) -> None:
    """Say that the CPU computes where nobody asked for it: often the torch that is installed has no CUDA."""
    if asked is None and device.type == "cpu":
        logger.warning("torch finds no CUDA device here; computing on the CPU, which the real model makes very slow.")


# Words in the messages of torch, the allocator of the CPU and CUDA's libraries, which raise no error type of their own.
OUT_OF_MEMORY_WORDS = (
    "DefaultCPUAllocator: ",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is how torch, or Python, says that memory does not suffice."""
    by_type = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return by_type or (isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS))


@contextmanager
def explain_out_of_memory(doing: str, advice: str | Callable[[], str], *devices: torch.device) -> Iterator[None]:
    """Turn running out of memory into a UserError: what was being done, what is free, and what to change.

    Args:
        advice: or what makes it, when it is wanted.
        devices: whose memory is reported; the current GPU if there are none.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        memory = []
        for device in devices or (None,):
            if torch.cuda.is_available() and (device is None or device.type == "cuda"):
                free, total = (size / 1e9 for size in torch.cuda.mem_get_info(device))
                peak, gpu = torch.cuda.max_memory_allocated(device) / 1e9, "the GPU" if len(devices) < 2 else device
                memory.append(f"{free:.1f} of {total:.1f} GB are free on {gpu}, and this process used up to {peak:.1f} GB")
        what = advice if isinstance(advice, str) else advice()
        numbers = f" ({'; '.join(memory)})" if memory else ""
        raise UserError(f"out of memory while {doing}{numbers}; {what}.") from error
