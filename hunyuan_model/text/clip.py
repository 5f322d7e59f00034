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

from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.checkpoints.loading import load_weights, require_same_tensors
from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.checkpoints.scales import require_scales
from hunyuan_model.text.model_config import building_from_config, matrix_shape, read_model_config, require_sizes_of_weights
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
    kind="CLIPTokenizer",
)

_EMBEDDING = "embeddings.token_embedding.weight"
_POSITIONS = "embeddings.position_embedding.weight"
_FIRST_MLP = "encoder.layers.0.mlp.fc1.weight"
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
    checkpoint = open_checkpoint_of(Kind.CLIP_TEXT, path, FLAG)
    model, weights = _model_and_weights(checkpoint)
    tokenizer = load_tokenizer(tokenizer, checkpoint, TOKENIZER)
    load_weights(model, weights, device=device, dtype_of=lambda name: dtype, progress="loading text encoder 2")
    return CLIPTextEncoder(model.eval(), tokenizer)


def check_text_encoder_2(path: str | os.PathLike[str]) -> None:
    """Refuse a file or folder that holds no whole CLIP text model; reads only headers.

    Raises:
        UserError: as ``load_text_encoder_2``.
    """
    require_same_tensors(*_model_and_weights(open_checkpoint_of(Kind.CLIP_TEXT, path, FLAG)))


class _EmptyCLIP(CLIPTextModel):
    """Not filled with initial values, which takes longer than building it: all of its weights are loaded."""

    def init_weights(self) -> None:
        pass


def _model_and_weights(checkpoint: Checkpoint) -> tuple[CLIPTextModel, Checkpoint]:
    """The model on the meta device, and the tensors that are used, under its names."""
    text = checkpoint.under_prefix(checkpoint.prefix_of(_EMBEDDING))
    require_scales(text, "Use a file that holds its scales, or one in bfloat16.")
    # Position numbers are computed, not loaded.
    with building_from_config(checkpoint.path, FLAG), init_empty_weights(include_buffers=False):
        model = _EmptyCLIP(_clip_config(text))
    # Names of models have a prefix before transformers 5 and none since.
    prefix = next(name for name in model.state_dict() if name.endswith(_EMBEDDING)).removesuffix(_EMBEDDING)
    return model, text.rename(lambda name: prefix + name if name.startswith(_PARTS) and not name.endswith(_COMPUTED) else None)


def _clip_config(checkpoint: Checkpoint) -> CLIPTextConfig:
    """Configuration from the config.json beside the weights, else from their shapes."""
    values = read_model_config(checkpoint.path, "clip_text_model", FLAG)
    if values is None:
        values = _config_of_shapes(checkpoint)
    vocabulary, hidden = matrix_shape(checkpoint, _EMBEDDING, FLAG)
    config = CLIPTextConfig.from_dict(values | {"vocab_size": vocabulary})
    sizes = {
        "hidden_size": (config.hidden_size, hidden),
        "intermediate_size": (config.intermediate_size, matrix_shape(checkpoint, _FIRST_MLP, FLAG)[0]),
        "num_hidden_layers": (config.num_hidden_layers, _count_layers(checkpoint)),
        "max_position_embeddings": (config.max_position_embeddings, matrix_shape(checkpoint, _POSITIONS, FLAG)[0]),
    }
    require_sizes_of_weights(sizes, checkpoint.path, FLAG)
    return config


def _count_layers(checkpoint: Checkpoint) -> int:
    return len({match[1] for match in map(_LAYER.match, checkpoint.shapes) if match})


def _config_of_shapes(checkpoint: Checkpoint) -> dict:
    hidden = matrix_shape(checkpoint, _EMBEDDING, FLAG)[1]
    if hidden % CLIP_HEAD_DIM:
        raise UserError(
            f"{FLAG} {checkpoint.path} has a width of {hidden}, which is no multiple of its head size, {CLIP_HEAD_DIM}. "
            "Put the model's config.json beside it."
        )
    return {
        "hidden_size": hidden,
        "num_attention_heads": hidden // CLIP_HEAD_DIM,
        "num_hidden_layers": _count_layers(checkpoint),
        "intermediate_size": matrix_shape(checkpoint, _FIRST_MLP, FLAG)[0],
        "max_position_embeddings": matrix_shape(checkpoint, _POSITIONS, FLAG)[0],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
