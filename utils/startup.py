"""Imported first by every script: what has to be so before libraries are imported.

From then on Ctrl-C ends in a word, not in a traceback, and tracebacks show no secrets. The GPU's allocator, which torch sets up
once, leaves no gaps.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from traceback import format_exception
from types import TracebackType

from utils.errors import STATUS_INTERRUPTED
from utils.output import show

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""What users set up torch's allocator with. Every torch that is supported reads the first one."""


def _say_interrupted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        show("".join(format_exception(kind, error, traceback)).rstrip(), error=True)
        return
    print("interrupted", file=sys.stderr)
    raise SystemExit(STATUS_INTERRUPTED)


def set_up_allocator() -> None:
    """Have torch join the GPU memory that it frees, so that buckets of other sizes leave no gaps that nothing fits into.

    Not over what the user has set, and only where torch can: on Linux, with NVIDIA's GPUs.
    """
    if sys.platform != "linux" or any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return
    if "rocm" not in version:
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


sys.excepthook = _say_interrupted
set_up_allocator()
