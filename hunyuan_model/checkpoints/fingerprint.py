"""Short names for the weights in a checkpoint, so that outputs can record which one made them.

Cheap: of a checkpoint of 15 GB, the header and a few bytes of every tensor are read. The path, the file format and the time
do not count: the same weights elsewhere have the same fingerprint.
"""

from __future__ import annotations

import hashlib

import torch

from hunyuan_model.checkpoints.reading import Checkpoint

HASH_BYTES = 16
SAMPLE_BYTES = 256  # of each tensor, from its middle


def fingerprint_weights(checkpoint: Checkpoint) -> str:
    """The fingerprint of a checkpoint in hexadecimal: names, dtypes, shapes and a sample of each tensor."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for name in sorted(checkpoint.shapes):
        digest.update(f"{name} {checkpoint.dtypes[name]} {list(checkpoint.shapes[name])}\n".encode())
        for piece in checkpoint.pieces(name):  # as stored: nothing is dequantized
            digest.update(_sample(piece))
        if name in checkpoint.scales:
            digest.update(_sample(checkpoint.scales[name]))
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    values = tensor.reshape(-1)
    count = min(len(values), max(1, SAMPLE_BYTES // tensor.element_size()))
    start = (len(values) - count) // 2
    return values[start : start + count].contiguous().view(torch.uint8).numpy().tobytes()
