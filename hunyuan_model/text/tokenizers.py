"""Finding and reading the tokenizer of a text encoder: from a folder, from beside the weights, from inside them, or by hub id."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.text.tokenizer_files import MOST_BYTES, check_tokenizer_json, check_vocabulary, read_entries, read_tokenizer_json
from utils.errors import UserError, first_line, shown
from utils.files import read_text

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # tokenizer.model would need packages that read anything in this process
# What the hub is asked for; nothing else is needed, and the weights beside these files are large.
HUB_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
]
# Classes of transformers for tokenizers without tokenizer.json, and the settings that they may have.
KINDS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"})
SETTINGS = frozenset({"bos_token", "eos_token", "unk_token", "pad_token", "do_lower_case", "add_prefix_space", "legacy"})
EMBEDDED_ENTRY = "tokenizer"
FINGERPRINT_BYTES = 16
PROBES = ["", "A photo of a cat, 猫, sitting on a red chair.\nDon't move: 12345!", "  two  spaces, ÄÖÜ and an emoji 🙂"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class TokenizerPlace:
    """Where the tokenizer of one text encoder may come from.

    Attributes:
        flag: the command-line flag that names it.
        sibling: folder beside the model folder where diffusers' layout keeps it.
        hub_id: the published tokenizer, for weights that come without one.
        special_tokens: tokens it must know to be of the right kind.
        begin, end: its begin and end token, where its files do not say.
        kind: the class of transformers that reads it where there is no tokenizer.json, and its files do not say.
    """

    flag: str
    sibling: str
    hub_id: str
    special_tokens: tuple[str, ...]
    begin: str
    end: str
    kind: str


def load_tokenizer(
    explicit: str | os.PathLike[str] | PreTrainedTokenizerBase | None, checkpoint: Checkpoint, place: TokenizerPlace
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the weights of ``checkpoint``.

    ``explicit`` is a folder, a hub id, or a tokenizer that is returned as it is. Without it these are tried in order: the
    folder of the weights (for a single file, its folder if there is a config.json in it too), the sibling folder of
    diffusers' layout, a tokenizer inside the weights, ``place.hub_id`` (the local cache before the network).

    Raises:
        UserError: nothing there, or unreadable; says which flag to give which folder.
    """
    if isinstance(explicit, PreTrainedTokenizerBase):
        return explicit
    if explicit is not None:
        tokenizer = _from_user(explicit, place)
    else:
        tokenizer = _from_beside(checkpoint.path, place) or _from_inside(checkpoint, place) or _from_hub(place.hub_id, place)
    if unknown := [token for token in place.special_tokens if token not in tokenizer.get_vocab()]:
        message = "the tokenizer (%s) does not know %s, which the text encoder was trained with: is it the right one?"
        logger.warning(message, place.flag, ", ".join(unknown))
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without begin and end token, neither padded nor cut.

    Raises:
        UserError: the tokenizer fails on one of them.
    """
    with _failing_with("a tokenizer cannot read the texts ({reason}). Copy its files again."):
        encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


@contextmanager
def _failing_with(sentence: str) -> Iterator[None]:
    """Turn whatever the libraries raise into a UserError of this ``sentence``. A panic of theirs is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        raise UserError(sentence.replace("{reason}", first_line(error))) from error


def _from_user(source: str | os.PathLike[str], place: TokenizerPlace) -> PreTrainedTokenizerBase:
    path = Path(source)
    if os.path.isfile(path):  # where a method of Path would raise on a name too long, this says no
        path = path.parent
    if os.path.isdir(path):
        if not _holds_tokenizer(path):
            raise UserError(f"{place.flag} {path} is a folder without a tokenizer ({' or '.join(TOKENIZER_FILES)}).")
        return _from_folder(path, place)
    if not _HUB_ID.fullmatch(str(source)):
        raise UserError(f"{place.flag} {source} does not exist. Give a folder with tokenizer.json, or a hub id.")
    return _from_hub(str(source), place)


def _from_beside(weights: Path, place: TokenizerPlace) -> PreTrainedTokenizerBase | None:
    if weights.is_dir():
        folders = [weights, weights.resolve().parent / place.sibling]  # resolved, because "." and ".." have no useful parent
    else:
        folders = [weights.parent] if (weights.parent / "config.json").is_file() else []
    return next((_from_folder(folder, place) for folder in folders if _holds_tokenizer(folder)), None)


def _from_inside(checkpoint: Checkpoint, place: TokenizerPlace) -> PreTrainedTokenizerBase | None:
    """A tokenizer.json stored as bytes in the weights file. Anything else under that name cannot be read safely."""
    if checkpoint.dtypes.get(EMBEDDED_ENTRY) not in (torch.uint8, torch.int8):
        return None
    content = bytes(checkpoint.get(EMBEDDED_ENTRY).flatten().view(torch.uint8).numpy())
    try:
        with _failing_with(f"the tokenizer inside {checkpoint.path} is not a readable tokenizer.json and is not used: {{reason}}"):
            text = content.decode("utf-8")
            check_tokenizer_json(text)
            return _fast_tokenizer(Tokenizer.from_str(text), {}, place)
    except UserError as error:
        logger.warning("%s", error)
        return None


def _from_hub(hub_id: str, place: TokenizerPlace) -> PreTrainedTokenizerBase:
    import huggingface_hub  # here, because most runs need no hub and the import takes a while

    reason = None
    for local in (True, False):
        try:
            folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=HUB_FILES, local_files_only=local))
        except Exception as error:  # the client passes on the errors of its HTTP library, which differ between releases
            reason = first_line(error)
            continue
        if _holds_tokenizer(folder):
            return _from_folder(folder, place)
        reason = "it holds no tokenizer files"
    raise UserError(
        f"no tokenizer: the weights come without one, and {hub_id} is neither in the local Hugging Face cache nor could it be "
        f"downloaded ({reason}). Give {place.flag} a folder that holds tokenizer.json and tokenizer_config.json, "
        f"copied from {hub_id} on the Hugging Face hub."
    )


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _from_folder(folder: Path, place: TokenizerPlace) -> PreTrainedTokenizerBase:
    """Read tokenizer.json as it stands; transformers rebuilds some tokenizers by class name and changes them on the way."""
    sentence = f"the tokenizer in {folder} cannot be read ({{reason}}). Copy its files again, or give {place.flag} another folder."
    with _failing_with(sentence):
        stored = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                stored |= read_entries(folder / name)
        if (folder / "tokenizer.json").is_file():
            return _fast_tokenizer(Tokenizer.from_str(read_tokenizer_json(folder / "tokenizer.json")), stored, place)
        return _of_class(folder, stored, place)


def _of_class(folder: Path, stored: Mapping[str, object], place: TokenizerPlace) -> PreTrainedTokenizerBase:
    """A tokenizer without tokenizer.json, from a folder that holds nothing but its checked files: no code, no other settings."""
    kind = stored.get("tokenizer_class") or place.kind
    if kind not in KINDS:
        raise ValueError(f"it is of the class {shown(kind)}, which would need Python code in that folder, which is never executed")
    files = [name for name in ("vocab.json", "added_tokens.json") if (folder / name).is_file()]
    entries = {name: read_entries(folder / name) for name in files}
    check_vocabulary(entries["vocab.json"], entries.get("added_tokens.json", {}))
    with TemporaryDirectory() as temporary:
        for name in files:
            Path(temporary, name).write_text(json.dumps(entries[name]), encoding="utf-8")
        if (folder / "merges.txt").is_file():
            merges = read_text(folder / "merges.txt", "the file of a tokenizer", MOST_BYTES)
            Path(temporary, "merges.txt").write_text(merges, encoding="utf-8", newline="")
        settings = {key: value for key, value in stored.items() if key in SETTINGS} | {"tokenizer_class": kind}
        Path(temporary, "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(temporary, local_files_only=True, trust_remote_code=False)
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        check_tokenizer_json(backend.to_str())
    return tokenizer


def _fast_tokenizer(tokenizer: Tokenizer, stored: dict, place: TokenizerPlace) -> PreTrainedTokenizerFast:
    """With begin and end token as the tokenizer's files name them (a string, or a mapping with its text), else the usual ones."""
    ends = {}
    for key, usual in (("bos_token", place.begin), ("eos_token", place.end)):
        token = stored.get(key)
        token = (token.get("content") if isinstance(token, dict) else token) or usual
        if tokenizer.token_to_id(token) is not None:
            ends[key] = token
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of a tokenizer, in hexadecimal: its vocabulary, merges, begin and end token, and its tokens of a few texts.

    Not of its files, which libraries write differently from release to release.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    content = [sorted(tokenizer.get_vocab().items()), merges, ends, token_ids(tokenizer, PROBES)]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=FINGERPRINT_BYTES).hexdigest()
