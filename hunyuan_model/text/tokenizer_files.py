"""Whether the files of a tokenizer can be read, before libraries get them that loop, end the process or take all memory.

Llama's and CLIP's tokenizers, and those made like them, consist of few kinds of parts and patterns. Only these are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from utils.errors import shown
from utils.files import read_text

MOST_BYTES = 32 << 20  # Llama-3's has 9 MB
_MOST_TOKENS, _MOST_ADDED = 1 << 19, 1 << 14  # Llama-3 has 1 << 17
_MOST_NORMALIZERS, _MOST_REPLACES, _MOST_REPLACEMENT = 8, 3, 4
_MODELS = ("BPE",)
_SPLIT_OF_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_NORMALIZERS = frozenset({"Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace", "Prepend", "Strip", "StripAccents"})
_PRE_TOKENIZERS = frozenset({"Sequence", "Split", "ByteLevel", "Metaspace", "Digits", "Whitespace", "WhitespaceSplit"})
_POST_PROCESSORS = frozenset({"Sequence", "ByteLevel", "TemplateProcessing", "RobertaProcessing"})
_DECODERS = frozenset({"Sequence", "ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip", "Replace", "BPEDecoder"})
_TYPES = dict(zip(_SPLIT_OF_PARTS, (_NORMALIZERS, _PRE_TOKENIZERS, _POST_PROCESSORS, _DECODERS)))

# Published patterns: how GPT-2, Llama-3 and Qwen2 cut a text into words.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_PATTERNS = frozenset(
    {_WORDS % "{1,3}", _WORDS % "", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
)
# Alternatives in which nothing stands behind what repeats without end, such as CLIP's: their time grows with the text alone.
_CLASS = r"(?:\[\^?(?:\\[pP]\{\w+\}|\\[^pP]|[^\[\]\\&])+\]|\\[pP]\{\w+\}|\\[^\w]|\\[sSdDwWrnt]|[^\\\[\](){}|?*+^$.])"
_ALTERNATIVE = rf"(?:{_CLASS}(?:\?|\{{\d(?:,\d)?\}})?)*{_CLASS}(?:[*+?]|\{{\d(?:,\d)?\}})?"
_LINEAR_PATTERN = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*", re.ASCII)
_MOST_PATTERN = 1000


def read_tokenizer_json(path: Path) -> str:
    """The text of a tokenizer.json that the library can read. A ValueError says what is wrong; other errors as in ``read_text``."""
    text = read_text(path, "the tokenizer", MOST_BYTES)
    check_tokenizer_json(text)
    return text


def read_entries(path: Path) -> dict:
    """A file of JSON beside it. Errors as above."""
    entries = json.loads(read_text(path, "the file of a tokenizer", MOST_BYTES))
    if not isinstance(entries, dict):
        raise ValueError(f"{path.name} holds {shown(entries)}")
    return entries


def check_tokenizer_json(text: str) -> None:
    """Raise a ValueError that says why a tokenizer.json cannot be read."""
    content = json.loads(text)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    if (kind := model.get("type", "BPE")) not in _MODELS:
        raise ValueError(f"its model is of the type {shown(kind)}, and those of Llama and CLIP are BPE")
    if model.get("dropout"):
        raise ValueError("it drops merges at random")
    added = _added_tokens(content.get("added_tokens") or [])
    vocabulary = check_vocabulary(model.get("vocab"), added)
    unknown = model.get("unk_token")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocabulary):
        raise ValueError(f"its token for what is unknown, {shown(unknown)}, is not in its vocabulary")
    for name, types in _TYPES.items():
        _check_part(content.get(name), types, name)
    normalizers = [part.get("type") for part in _parts(content.get("normalizer"))]
    if len(normalizers) > _MOST_NORMALIZERS or normalizers.count("Replace") + normalizers.count("Prepend") > _MOST_REPLACES:
        raise ValueError(f"it has {len(normalizers)} steps of normalization")


def check_vocabulary(vocabulary: object, added: Mapping[str, int]) -> Mapping[str, int]:
    """The number of each token, in which nothing is amiss: libraries take memory for each number up to the largest.

    Args:
        added: tokens beside it.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError("it has no vocabulary")
    if len(vocabulary) > _MOST_TOKENS:
        raise ValueError(f"it has {len(vocabulary)} tokens, and at most {_MOST_TOKENS} are read")
    most = 2 * (len(vocabulary) + len(added)) + 1024
    for tokens in (vocabulary, added):
        numbers = tokens.values()
        if set(map(type, numbers)) - {int} or (numbers and not 0 <= min(numbers) <= max(numbers) < most):
            token = next(token for token, number in tokens.items() if type(number) is not int or not 0 <= number < most)
            raise ValueError(
                f"the number of its token {shown(token)} is {shown(tokens[token])}, and it has {len(vocabulary)} tokens"
            )
    return vocabulary


def _added_tokens(tokens: object) -> dict[str, int]:
    if not isinstance(tokens, list) or len(tokens) > _MOST_ADDED:
        raise ValueError(f"its added tokens are {shown(tokens)}")
    added = {}
    for token in tokens:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise ValueError(f"an added token is {shown(token)}")
        added[token["content"]] = token.get("id")
    return added


def _parts(part: object) -> Iterator[dict]:
    """The dicts of a part and of what is in it."""
    if isinstance(part, dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _parts(inner)


def _check_part(part: object, types: frozenset[str], name: str) -> None:
    for each in _parts(part):
        if "type" in each and each["type"] not in types:
            raise ValueError(f"its {name} has a part of the type {shown(each['type'])}, which is not read here")
        if "Regex" in each and not _is_quick(each["Regex"]):
            raise ValueError(f"its {name} has the pattern {shown(each['Regex'])}, which may take for ever on some texts")
        if each.get("type") in ("Replace", "Prepend"):
            put = each.get("content", each.get("prepend"))
            if not isinstance(put, str) or len(put) > _MOST_REPLACEMENT:
                raise ValueError(f"its {name} puts in {shown(put)}")


def _is_quick(pattern: object) -> bool:
    """Whether the time that a pattern takes grows with the length of the text, and not with its square or worse."""
    if not isinstance(pattern, str) or len(pattern) > _MOST_PATTERN:
        return False
    return pattern in _KNOWN_PATTERNS or _LINEAR_PATTERN.fullmatch(pattern) is not None
