"""Small tokenizers in the layouts of the real ones: a byte-level BPE with Llama-3's special tokens, and CLIP's word BPE.

Made from sentences that are given, or from a few in this file; offline, and the same every time. They read any text, as the
real ones do, and need a few hundred rows of embedding instead of 128 000.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hunyuan_model.text.template import TEMPLATE_BEFORE_PROMPT

LLAMA_VOCABULARY = 512
CLIP_VOCABULARY = 768

LLAMA_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
CLIP_BEGIN = "<|startoftext|>"
CLIP_END = "<|endoftext|>"
_CLIP_WORD_END = "</w>"

# How Llama-3 cuts text before the merges; the published pattern, which keeps line breaks apart from the words after them.
_LLAMA_CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SENTENCES = (
    "A red ball rolls over green grass while the camera follows it slowly.",
    "Two people walk along the beach at sunset, and small waves reach their feet.",
    "A close picture of a cat with yellow eyes, sitting in front of a blue wall.",
    "The bicycle stands on a street in the rain; light falls from the windows.",
    "An old boat on a lake, mountains in the background, soft morning light.",
)


def write_llama_tokenizer(
    folder: str | os.PathLike[str], sentences: Sequence[str] = SENTENCES, vocabulary: int = LLAMA_VOCABULARY
) -> Path:
    """Write a byte-level BPE tokenizer with Llama-3's special tokens into ``folder``; returns the folder.

    Frequent words of ``sentences`` become single tokens, as far as ``vocabulary`` entries go. It puts
    ``<|begin_of_text|>`` first, as the real one does.
    """
    folder = _made(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = llama_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(LLAMA_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEMPLATE_BEFORE_PROMPT, *sentences], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIAL_TOKENS])
    begin = LLAMA_SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": LLAMA_SPECIAL_TOKENS[1],
            "pad_token": LLAMA_SPECIAL_TOKENS[-1],
            "model_max_length": 131072,
            "clean_up_tokenization_spaces": False,
        },
    )
    return folder


def llama_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Llama-3's way from text to the pieces within which tokens are merged."""
    cut = pre_tokenizers.Split(Regex(_LLAMA_CUTS), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write_clip_tokenizer(folder: str | os.PathLike[str], sentences: Sequence[str] = SENTENCES) -> Path:
    """Write a CLIP tokenizer (vocab.json and merges.txt) into ``folder``; returns the folder.

    Every word of ``sentences`` is a single token; begin and end token are the last ones, as in the real one. For the
    sentences of this file that makes at most ``CLIP_VOCABULARY`` entries.
    """
    folder = _made(folder)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _word_merges({word.strip(".,;").lower() for sentence in sentences for word in sentence.split()})
    tokens = [*characters, *(character + _CLIP_WORD_END for character in characters)]
    tokens += [first + second for first, second in merges]
    tokens += [CLIP_BEGIN, CLIP_END]
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(dict.fromkeys(tokens))})
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": CLIP_BEGIN,
            "eos_token": CLIP_END,
            "pad_token": CLIP_END,
            "unk_token": CLIP_END,
            "model_max_length": 77,
            "do_lower_case": True,
        },
    )
    return folder


def _word_merges(words: set[str]) -> list[tuple[str, str]]:
    """Merges that make each word a single token: byte pair encoding to the end.

    The trainer of tokenizers breaks ties between equally frequent pairs at random, and among single words nearly all are.
    """
    pieces = [[*word[:-1], word[-1] + _CLIP_WORD_END] for word in sorted(words)]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        if not counts:
            return merges
        pair = max(sorted(counts), key=counts.__getitem__)
        merges.append(pair)
        pieces = [_merged(word, pair) for word in pieces]


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """``word`` with every occurrence of ``pair`` as one piece."""
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _made(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
