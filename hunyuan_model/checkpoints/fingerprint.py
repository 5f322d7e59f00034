"""Short names for what a checkpoint or tokenizer does, so that outputs can say which one made them.

Cheap: a checkpoint of 15 GB is told by its header and a few bytes of every tensor. The path, the file format and the time
do not count: the same weights elsewhere have the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os

import torch
from transformers import PreTrainedTokenizerBase

from hunyuan_model.checkpoints.reading import open_checkpoint
from hunyuan_model.text.tokenizers import token_ids

HASH_BYTES = 16
SAMPLE_BYTES = 256  # of each tensor, from its middle
PROBES = ["", "A photo of a cat, 猫, sitting on a red chair.\nDon't move: 12345!", "  two  spaces, ÄÖÜ and an emoji 🙂"]


def fingerprint_weights(path: str | os.PathLike[str], what: str) -> str:
    """The fingerprint of a checkpoint (a file or a folder), in hexadecimal: names, dtypes, shapes and a sample of each tensor.

    Raises:
        UserError: as ``open_checkpoint``, to which ``what`` goes.
    """
    checkpoint = open_checkpoint(path, what)
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for name in sorted(checkpoint.shapes):
        digest.update(f"{name} {checkpoint.dtypes[name]} {list(checkpoint.shapes[name])}\n".encode())
        digest.update(_sample(checkpoint.get(name)))
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    values = tensor.reshape(-1)
    count = min(len(values), max(1, SAMPLE_BYTES // tensor.element_size()))
    start = (len(values) - count) // 2
    return values[start : start + count].contiguous().view(torch.uint8).numpy().tobytes()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of a tokenizer, in hexadecimal: its vocabulary, merges, begin and end token, and how it cuts a few texts.

    Not of its files, which libraries write differently from release to release.
    """
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    told = [sorted(tokenizer.get_vocab().items()), _merges(tokenizer), ends, token_ids(tokenizer, PROBES)]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=HASH_BYTES).hexdigest()


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
