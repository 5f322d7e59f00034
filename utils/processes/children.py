"""Work that may never end, or take all memory, in a process that is ended then."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def call_in_child(code: str, argument: Any, seconds: float) -> Any:
    """What a small program of the standard library alone makes of ``argument``; both are what JSON holds.

    Args:
        code: Python, which finds ``argument`` and leaves ``result``.

    Raises:
        TimeoutError: it took longer than ``seconds``.
        RuntimeError: it failed; with the last line that it wrote.
    """
    program = f"import json, sys\nargument = json.load(sys.stdin)\n{code}\njson.dump(result, sys.stdout)"
    try:
        # Isolated, and without the packages of the environment: it begins within 0.1 s.
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program], input=json.dumps(argument).encode(), capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it took longer than {seconds:g} seconds") from None
    if ended.returncode:
        raise RuntimeError((ended.stderr.decode(errors="replace").strip().splitlines() or ["it was ended"])[-1])
    return json.loads(ended.stdout)
