"""Text encoder 2: the pooled output of CLIP-L's text model, one vector per prompt.

The pooled output is the last state, after the final norm, at the first end token, without projection. Attention is
causal: what stands behind the end token does not matter, so prompts are padded only to the longest of their batch.
"""

from __future__ import annotations

import os
import re

import torch
from accelerate import init_empty_weights
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from hunyuan_model.checkpoints.identify import Kind, check_is
from hunyuan_model.checkpoints.loading import load_weights
from hunyuan_model.checkpoints.reading import Checkpoint, open_checkpoint
from hunyuan_model.text.model_config import building_from_config, read_model_config
from hunyuan_model.text.tokenizers import TokenizerPlace, load_tokenizer, token_ids
from utils.errors import UserError

CLIP_HEAD_DIM = 64  # of every published CLIP text model
FLAG = "--text_encoder2"
TOKENIZER = TokenizerPlace(
    flag="--tokenizer2",
    sibling="tokenizer_2",
    hub_id="openai/clip-vit-large-patch14",
    special_tokens=("<|startoftext|>", "<|endoftext|>"),
    begin="<|startoftext|>",
    end="<|endoftext|>",
)

_EMBEDDING = "embeddings.token_embedding.weight"
_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")
_COMPUTED = "position_ids"  # a buffer of old versions
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


class CLIPTextEncoder:
    """A prompt to the one vector that conditions the whole picture."""

    def __init__(self, model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.begin, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        largest = max(tokenizer.get_vocab().values())
        if self.begin is None or self.end is None or largest >= model.config.vocab_size:
            raise UserError(
                f"the tokenizer of text encoder 2 ({largest + 1} tokens) is not that of this CLIP model "
                f"({model.config.vocab_size} tokens with begin and end). Give {TOKENIZER.flag} the folder of the right one."
            )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Pooled output (B, D) of ``prompts`` in the model's dtype, on its device; a prompt beyond 77 tokens is cut."""
        room = self.model.config.max_position_embeddings - 2
        return self.pooled([[self.begin, *ids[:room], self.end] for ids in token_ids(self.tokenizer, prompts)], self.end)

    @torch.no_grad()
    def pooled(self, sequences: list[list[int]], end: int) -> torch.Tensor:
        """States (B, D) at the first ``end`` token of each token sequence."""
        ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=end)
        device = next(self.model.parameters()).device
        states = self.model(input_ids=ids.to(device)).last_hidden_state  # (B, L, D)
        ends = (ids == end).int().argmax(dim=1).to(device)
        return states[torch.arange(len(sequences), device=device), ends]


def load_text_encoder_2(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
) -> CLIPTextEncoder:
    """Load CLIP's text model from a Hugging Face folder or from a single file (a whole CLIP will do: its text part is read).

    Raises:
        UserError: missing or unreadable files, another kind of model, no tokenizer.
    """
    checkpoint = open_checkpoint(path, FLAG)
    config = clip_config(checkpoint)
    tokenizer = load_tokenizer(tokenizer, checkpoint, TOKENIZER)
    with building_from_config(path, FLAG), init_empty_weights(include_buffers=False):  # position numbers are computed, not loaded
        model = CLIPTextModel(config)
    # Names of models have a prefix before transformers 5 and none since.
    prefix = next(name for name in model.state_dict() if name.endswith(_EMBEDDING)).removesuffix(_EMBEDDING)
    weights = checkpoint.under_prefix(checkpoint.prefix_of(_EMBEDDING)).rename(
        lambda name: prefix + name if name.startswith(_PARTS) and not name.endswith(_COMPUTED) else None
    )
    load_weights(model, weights, device=device, dtype_of=lambda name: dtype, progress="loading text encoder 2")
    return CLIPTextEncoder(model.eval(), tokenizer)


def clip_config(checkpoint: Checkpoint) -> CLIPTextConfig:
    """Configuration from the config.json beside the weights, else from their shapes.

    Raises:
        UserError: not a CLIP text model, or shapes that CLIP's head size does not explain.
    """
    check_is(checkpoint.shapes, Kind.CLIP_TEXT, checkpoint.path, FLAG)
    prefix = checkpoint.prefix_of(_EMBEDDING)
    shapes = checkpoint.under_prefix(prefix).shapes
    values = read_model_config(checkpoint.path, "clip_text_model", FLAG)
    with building_from_config(checkpoint.path, FLAG):
        if values is None:
            values = _config_of_shapes(shapes, checkpoint)
        return CLIPTextConfig.from_dict(values | {"vocab_size": shapes[_EMBEDDING][0]})


def _config_of_shapes(shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict:
    hidden = shapes[_EMBEDDING][1]
    if hidden % CLIP_HEAD_DIM:
        raise UserError(
            f"{FLAG} {checkpoint.path} is {hidden} wide, which heads of {CLIP_HEAD_DIM} do not divide. "
            "Put the model's config.json beside it."
        )
    layers = [int(match[1]) for match in map(_LAYER.match, shapes) if match]
    return {
        "hidden_size": hidden,
        "num_attention_heads": hidden // CLIP_HEAD_DIM,
        "num_hidden_layers": 1 + max(layers, default=0),
        "intermediate_size": shapes.get("encoder.layers.0.mlp.fc1.weight", (4 * hidden,))[0],
        "max_position_embeddings": shapes.get("embeddings.position_embedding.weight", (77,))[0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
