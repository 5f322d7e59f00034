"""Telling by its first bytes that a file is not what its name says. Imports nothing of ours."""

from __future__ import annotations

SIGNATURE_BYTES = 64  # how many of the first bytes are enough


def foreign_content(start: bytes) -> str | None:
    """What a file that should hold tensors holds instead, and what to do about it, to complete "the file ...".

    Args:
        start: its first ``SIGNATURE_BYTES`` bytes.

    Returns:
        None where the bytes do not tell.
    """
    if not start:
        return "is empty. Copy or download it again."
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
    if start.startswith(b"GGUF"):
        return "is a GGUF file, which is not supported. Use a .safetensors or .pt file."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not weights: the download went wrong. Download it again."
    return None


def is_torch_file(start: bytes) -> bool:
    """Whether these are the first bytes of a file that ``torch.save`` wrote: a zip archive, or a bare pickle."""
    return start.startswith(b"PK") or start[:1] == b"\x80"
