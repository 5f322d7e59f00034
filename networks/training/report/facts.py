"""What a report says of the machine, of what is installed, and of how a training is made again."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from networks.training.arguments import build_training_parser
from utils.output import is_secret

PROJECT = Path(__file__).resolve().parents[3]
PACKAGES = ["torch", "accelerate", "safetensors", "transformers", "diffusers", "bitsandbytes", "av", "numpy"]


def hardware(device: torch.device, processes: int) -> dict[str, str]:
    """What a training runs on. No name of a machine or of a user."""
    facts = {}
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts["GPU memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB"
    if processes > 1:
        facts["processes"] = str(processes)
    return facts | {
        "CPU": cpu_name(),
        "CPU cores": str(os.cpu_count()),
        "RAM": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
    }


def cpu_name() -> str:
    """As its maker calls it, where the system says so."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of this project, Python, CUDA and packages."""
    found = {"musubi-tuner": _version_of_project(), "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.version.cuda and torch.cuda.is_available():
        found["CUDA"] = torch.version.cuda
    return found


def _version_of_project() -> str:
    """With the commit, where it is a clone of the repository."""
    version = ""
    with suppress(OSError):
        text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
        version = found[1] if (found := re.search(r'^version = "([^"]+)"', text, re.MULTILINE)) else ""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        return f"{version} ({commit})"
    return version or "unknown"


def words_to_repeat(words: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """The command line of a training, to make it again from its beginning, also without its --config_file.

    Args:
        words: ``sys.argv``.
        flags: the value of every flag, without secrets, also of those that are not on the command line; with the seed.
    """
    parser, given = build_training_parser(), {word.partition("=")[0] for word in words if word.startswith("--")}
    kept: list[str] = []
    left_out = False
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            left_out = is_secret(flag) or flag in ("--resume", "--resume_from_huggingface", "--config_file")
        if not left_out:
            kept.append(word)
    for action in parser._actions:
        value = flags.get(action.dest)
        if given.intersection(action.option_strings) or value is None or action.dest in ("resume", "resume_from_huggingface"):
            continue
        if action.nargs == 0:
            kept += action.option_strings[-1:] if value == action.const != action.default else []
        elif value != action.default:
            kept += [action.option_strings[-1], *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return kept
