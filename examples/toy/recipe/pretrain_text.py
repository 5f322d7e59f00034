"""The toy text encoders: a Llama and a CLIP text model that learn to read captions, before anything is drawn.

Linear readers on top of them must tell from the Llama's last state and from CLIP's pooled output which shape, colour,
background and motion a caption names, or that it names none. Afterwards the readers are thrown away and the encoders
stay as they are, as those of the real model did.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
)

from examples.toy import world
from examples.toy.model_files import write_text_encoder
from examples.toy.recipe.make_tokenizers import write_clip_tokenizer, write_llama_tokenizer
from examples.toy.recipe.training_loop import Losses, Recipe
from hunyuan_model.text.llm import SKIPPED_LAYERS
from hunyuan_model.text.template import TEMPLATE_AFTER_PROMPT, TEMPLATE_BEFORE_PROMPT

RECIPE = Recipe(steps=500, learning_rate=1e-3, warm_up=50, weight_decay=0.05, ema_decay=0.99)
SEED = 2
BATCH_SIZE = 48
LLAMA_WIDTH, LLAMA_LAYERS = 128, 3  # those that are used
CLIP_WIDTH, CLIP_LAYERS = 128, 2
LLAMA_VOCABULARY = 896
INVENTED_SHARE = 0.15  # of captions whose shape is a word that means nothing; so unknown words are read as unknown
COLOUR_UNSAID_SHARE = 0.5  # of those
STATE_SIZE_WEIGHT = 0.01  # keeps the states near unit size

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "background": tuple(world.COLOURS),
    "motion": world.MOTIONS,
}


def random_caption(rng: np.random.Generator, attributes: world.Attributes, invented_share: float) -> tuple[str, list[int]]:
    """A caption of ``attributes`` and its answer to each question; the number after the last answer means "not said"."""
    answers = [
        words.index(word) if (word := getattr(attributes, question)) else len(words) for question, words in _QUESTIONS.items()
    ]
    if rng.random() >= invented_share:
        return world.caption(attributes, rng), answers
    answers[0] = len(world.SHAPES)
    say_colour = bool(rng.random() >= COLOUR_UNSAID_SHARE)
    if not say_colour:
        answers[1] = len(world.COLOURS)
    return world.caption(attributes, rng, world.invented_word(rng), say_colour), answers


def write_tokenizers(llama_folder: Path, clip_folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Tokenizers in which every word of the world is one token."""
    sentences = world.vocabulary_sentences()
    folders = write_llama_tokenizer(llama_folder, sentences, LLAMA_VOCABULARY), write_clip_tokenizer(clip_folder, sentences)
    llama, clip = (AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False) for folder in folders)
    return llama, clip


class Readers(nn.Module):
    """Both encoders with a linear reader for each question."""

    def __init__(self, llama_tokenizer: PreTrainedTokenizerBase, clip_tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.llama = LlamaModel(
                LlamaConfig(
                    vocab_size=LLAMA_VOCABULARY,
                    hidden_size=LLAMA_WIDTH,
                    intermediate_size=3 * LLAMA_WIDTH,
                    num_hidden_layers=LLAMA_LAYERS,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=2048,
                    initializer_range=0.06,
                    bos_token_id=llama_tokenizer.bos_token_id,
                    eos_token_id=llama_tokenizer.eos_token_id,
                    pad_token_id=llama_tokenizer.pad_token_id,
                )
            )
            self.llama.norm = nn.Identity()  # the states that are used are those before it
            self.clip = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(clip_tokenizer),
                    hidden_size=CLIP_WIDTH,
                    intermediate_size=2 * CLIP_WIDTH,
                    num_hidden_layers=CLIP_LAYERS,
                    num_attention_heads=4,
                    max_position_embeddings=77,
                    bos_token_id=clip_tokenizer.bos_token_id,
                    eos_token_id=clip_tokenizer.eos_token_id,
                    pad_token_id=clip_tokenizer.pad_token_id,
                )
            )
            self.heads = nn.ModuleList(
                nn.ModuleList(nn.Linear(width, len(words) + 1) for words in _QUESTIONS.values())
                for width in (LLAMA_WIDTH, CLIP_WIDTH)
            )

    def answers(self, states: torch.Tensor, encoder: int) -> list[torch.Tensor]:
        """Logits per question of states (B, D) of encoder 0 (Llama) or 1 (CLIP)."""
        return [head(states) for head in self.heads[encoder]]


class ReadingLosses:
    """How wrong the answers are that can be read from the states."""

    def __init__(self, readers: Readers, llama_tokenizer: PreTrainedTokenizerBase, clip_tokenizer: PreTrainedTokenizerBase):
        self.readers, self.tokenizers = readers, (llama_tokenizer, clip_tokenizer)

    def __call__(self, step: int) -> Losses:
        rng = world.generator(SEED, step)
        drawn = [world.random_attributes(rng, moving=bool(rng.random() < 0.6)) for _ in range(BATCH_SIZE)]
        captions, answers = zip(*(random_caption(rng, attributes, INVENTED_SHARE) for attributes in drawn))
        wanted = torch.tensor(answers, device=self.readers.clip.device)  # (B, questions)
        states = self._llama_states(list(captions))
        size = (states.square().mean() - 1.0).square()
        read = [self.readers.answers(states, 0), self.readers.answers(self._clip_pooled(list(captions)), 1)]
        errors = [[nn.functional.cross_entropy(logits, wanted[:, i]) for i, logits in enumerate(one)] for one in read]
        right = [torch.stack([logits.argmax(1) == wanted[:, i] for i, logits in enumerate(one)]).all(0) for one in read]
        llama, clip = (torch.stack(one).sum() for one in errors)
        return {
            "loss": llama + clip + STATE_SIZE_WEIGHT * size,
            "llama_right": right[0].float().mean(),
            "clip_right": right[1].float().mean(),
        }

    def _llama_states(self, captions: list[str]) -> torch.Tensor:
        """State (B, D) of each caption's last token, inside the template, which is computed once for all."""
        tokenizer, llama = self.tokenizers[0], self.readers.llama
        template = tokenizer(TEMPLATE_BEFORE_PROMPT, return_tensors="pt").input_ids.to(llama.device)
        rest = [caption + TEMPLATE_AFTER_PROMPT for caption in captions]
        tokens = tokenizer(rest, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False).to(llama.device)
        cache = DynamicCache()
        llama(template, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(captions))
        states = llama(tokens.input_ids, past_key_values=cache, use_cache=True).last_hidden_state
        return states[torch.arange(len(captions)), tokens.attention_mask.sum(1) - 1]

    def _clip_pooled(self, captions: list[str]) -> torch.Tensor:
        tokens = self.tokenizers[1](captions, return_tensors="pt", padding=True).to(self.readers.clip.device)
        states = self.readers.clip(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        ends = (tokens.input_ids == self.tokenizers[1].eos_token_id).int().argmax(1)
        return states[torch.arange(len(captions)), ends]


def write_encoders(readers: Readers, llama_folder: Path, clip_folder: Path) -> None:
    """The encoders without their readers, in the layouts of the real ones.

    The real Llama has layers after the state that is used, so this one's file has them too; they were never trained.
    """
    config = copy.deepcopy(readers.llama.config)
    config.num_hidden_layers += SKIPPED_LAYERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        llama = LlamaModel(config)
    kept = llama.load_state_dict(readers.llama.state_dict(), strict=False)
    untrained = tuple(f"layers.{readers.llama.config.num_hidden_layers + layer}." for layer in range(SKIPPED_LAYERS))
    assert not kept.unexpected_keys and all(name.startswith((*untrained, "norm.")) for name in kept.missing_keys)
    write_text_encoder(llama, llama_folder, prefix="")
    write_text_encoder(readers.clip, clip_folder, prefix="text_model.")
