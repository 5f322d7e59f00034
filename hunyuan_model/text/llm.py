"""Text encoder 1: the hidden states of a Llama that reads the prompt inside the model's template.

The state three from the end is used, before the final norm, so the last two layers, the norm and the language head are
never loaded. Attention is causal and padding stands on the right: a token's state depends on nothing after it. Hence
prompts are padded only to the longest of their batch, no mask is needed, and the template, which every prompt begins
with, is computed once.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from fractions import Fraction

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedTokenizerBase

from hunyuan_model.checkpoints.identify import Kind, open_checkpoint_of
from hunyuan_model.checkpoints.layouts_text import LLAMA, gguf_llama
from hunyuan_model.checkpoints.loading import load_weights, require_same_tensors
from hunyuan_model.checkpoints.official import official_names
from hunyuan_model.checkpoints.reading import Checkpoint
from hunyuan_model.checkpoints.scales import require_scales
from hunyuan_model.quantization.formats import FP8_DTYPE
from hunyuan_model.quantization.linear import enable_quantized_linears
from hunyuan_model.text.model_config import building_from_config, matrix_shape, read_model_config, require_sizes_of_weights
from hunyuan_model.text.template import TEMPLATE_BEFORE_PROMPT, TEMPLATE_SPECIAL_TOKENS, TEXT_LENGTH, apply_prompt_template
from hunyuan_model.text.tokenizers import TokenizerPlace, load_tokenizer, token_ids
from utils.devices import explain_out_of_memory
from utils.errors import UserError

logger = logging.getLogger(__name__)

SKIPPED_LAYERS = 2
FLAG = "--text_encoder1"
TOKENIZER = TokenizerPlace(
    flag="--tokenizer1",
    sibling="tokenizer",
    hub_id="xtuner/llava-llama-3-8b-v1_1-transformers",
    special_tokens=TEMPLATE_SPECIAL_TOKENS,
    begin="<|begin_of_text|>",
    end="<|end_of_text|>",
    kind="LlamaTokenizerFast",
)

# What Llama-3 8B uses and no shape tells.
LLAMA3_HEAD_DIM = 128
LLAMA3_CONSTANTS = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "hidden_act": "silu"}

_EMBEDDING = "embed_tokens.weight"
_FIRST_LAYER = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight", "layers.0.mlp.gate_proj.weight"
_LAYER = re.compile(r"layers\.(\d+)\.")
_COMPUTED = "rotary_emb.inv_freq"  # a buffer of old versions
_LAYER_LINEAR = re.compile(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


class LlamaTextEncoder:
    """A prompt to the text states that the transformer reads.

    Attributes:
        crop: tokens of the template before the prompt, with the begin token; their states are dropped.
    """

    def __init__(self, model: LlamaModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """``model`` ends at the layer whose output is used, and its norm is the identity."""
        self.model = model
        self.tokenizer = tokenizer
        self._template = self._token_ids([TEMPLATE_BEFORE_PROMPT])[0]
        self._template_cache: DynamicCache | None = None
        largest = max(tokenizer.get_vocab().values())
        if largest >= model.config.vocab_size:
            raise UserError(
                f"the tokenizer of text encoder 1 has {largest + 1} tokens, but the model knows {model.config.vocab_size}: "
                f"they do not belong together. Give {TOKENIZER.flag} the folder of the right tokenizer."
            )

    @property
    def crop(self) -> int:
        return len(self._template)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text states of ``prompts``; a prompt beyond the length is cut.

        Returns:
            states (B, 256, D) in the model's dtype, zero in padding rows, and mask (B, 256) int64, 1 for the valid rows,
            which come first; both on the model's device. The empty prompt has the rows of what follows it in the template.
        """
        longest = TEXT_LENGTH + self.crop
        sequences = [ids[:longest] for ids in self._token_ids([apply_prompt_template(prompt) for prompt in prompts])]
        computed = self._states_after_template(sequences)  # (B, longest of the batch, D)
        states = computed.new_zeros(len(prompts), TEXT_LENGTH, computed.shape[-1])
        mask = torch.zeros(len(prompts), TEXT_LENGTH, dtype=torch.int64)
        for row, ids in enumerate(sequences):
            length = len(ids) - self.crop
            states[row, :length] = computed[row, :length]
            mask[row, :length] = 1
        return states, mask.to(states.device)

    @torch.no_grad()
    def hidden_states(self, sequences: list[list[int]], cache: DynamicCache | None = None) -> torch.Tensor:
        """States (B, L, D) of token sequences, L the longest; rows beyond a sequence's own length mean nothing.

        ``cache`` holds what stood before every sequence; it is filled.
        """
        ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
        device = self.model.embed_tokens.weight.device
        output = self.model(input_ids=ids.to(device), past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return [begin + ids for ids in token_ids(self.tokenizer, texts)]

    def _states_after_template(self, sequences: list[list[int]]) -> torch.Tensor:
        if any(ids[: self.crop] != self._template for ids in sequences):
            # A prompt that begins with a line break melts into the one before it: nothing is shared then.
            return self.hidden_states(sequences)[:, self.crop :]
        if self._template_cache is None:
            self._template_cache = DynamicCache()
            self.hidden_states([self._template], self._template_cache)
        cache = copy.deepcopy(self._template_cache)
        cache.batch_repeat_interleave(len(sequences))
        return self.hidden_states([ids[self.crop :] for ids in sequences], cache)


def load_text_encoder_1(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    fp8: bool = False,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
) -> LlamaTextEncoder:
    """Load the Llama from a Hugging Face folder (also of a LLaVA), a single file in the names of transformers or GGUF's, or a
    checkpoint that holds it beside other models.

    Args:
        dtype: of weights and states.
        fp8: store the Linear weights of the layers as float8_e4m3fn and compute in ``dtype``.
        tokenizer: see ``hunyuan_model.text.tokenizers.load_tokenizer``.

    Raises:
        UserError: missing or unreadable files, another kind of model, no tokenizer; memory does not suffice.
    """
    checkpoint = open_checkpoint_of(Kind.LLAMA, path, FLAG)
    model, weights = _model_and_weights(checkpoint)
    tokenizer = load_tokenizer(tokenizer, checkpoint, TOKENIZER)
    advice = "close other programs that use this memory" if fp8 else "use --fp8_llm"
    with explain_out_of_memory("loading text encoder 1", advice, torch.device(device)):
        load_weights(
            model,
            weights,
            device=device,
            dtype_of=lambda name: FP8_DTYPE if fp8 and _LAYER_LINEAR.fullmatch(name) else dtype,
            progress="loading text encoder 1",
        )
    if fp8:
        enable_quantized_linears(model, dtype)
    return LlamaTextEncoder(model.eval(), tokenizer)


def check_text_encoder_1(path: str | os.PathLike[str]) -> None:
    """Refuse a file or folder that is no whole Llama; reads only headers.

    Raises:
        UserError: as ``load_text_encoder_1``.
    """
    require_same_tensors(*_model_and_weights(open_checkpoint_of(Kind.LLAMA, path, FLAG)))


class _EmptyLlama(LlamaModel):
    """Not filled with initial values, which takes longer than building it: all of its weights are loaded."""

    def init_weights(self) -> None:
        pass


def _model_and_weights(checkpoint: Checkpoint) -> tuple[LlamaModel, Checkpoint]:
    """The model on the meta device, and the tensors that are used, under its names."""
    official, _ = official_names(checkpoint, (LLAMA, gguf_llama(_head_dim(checkpoint))), _EMBEDDING)
    require_scales(official, "Use a file that holds its scales, or one in bfloat16.")
    config = _llama_config(official)
    used = (_EMBEDDING, *(f"layers.{index}." for index in range(config.num_hidden_layers)))
    weights = official.rename(lambda name: name if name.startswith(used) and not name.endswith(_COMPUTED) else None)
    # Rotary frequencies are computed, not loaded.
    with building_from_config(checkpoint.path, FLAG), init_empty_weights(include_buffers=False):
        model = _EmptyLlama(config)
    model.norm = nn.Identity()
    return model, weights


def _llama_config(checkpoint: Checkpoint) -> LlamaConfig:
    """Configuration of the layers that are used: from the config.json beside the weights, else from their metadata and shapes."""
    stored = read_model_config(checkpoint.path, "llama", FLAG)
    with building_from_config(checkpoint.path, FLAG):
        values = _config_of_shapes(checkpoint) if stored is None else _with_rope_of_any_version(stored)
        layers = values.get("num_hidden_layers", LlamaConfig().num_hidden_layers)  # what a stored config leaves out is the default
        if layers <= SKIPPED_LAYERS:
            raise UserError(f"{FLAG} {checkpoint.path} has {layers} layers; at least {SKIPPED_LAYERS + 1} are needed.")
        vocabulary, _ = matrix_shape(checkpoint, _EMBEDDING, FLAG)
        values |= {"num_hidden_layers": layers - SKIPPED_LAYERS, "vocab_size": vocabulary, "pad_token_id": None}
        config = LlamaConfig.from_dict(values)
    query, key, mlp = (matrix_shape(checkpoint, name, FLAG)[0] for name in _FIRST_LAYER)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "hidden_size": (config.hidden_size, matrix_shape(checkpoint, _EMBEDDING, FLAG)[1]),
        "intermediate_size": (config.intermediate_size, mlp),
        "num_attention_heads times head_dim": (config.num_attention_heads * head_dim, query),
        "num_key_value_heads times head_dim": ((config.num_key_value_heads or config.num_attention_heads) * head_dim, key),
    }
    if layers - SKIPPED_LAYERS > (found := _count_layers(checkpoint)):
        sizes["num_hidden_layers"] = layers, found
    require_sizes_of_weights(sizes, checkpoint.path, FLAG)
    return config


def _count_layers(checkpoint: Checkpoint) -> int:
    return len({match[1] for match in map(_LAYER.match, checkpoint.shapes) if match})


def _with_rope_of_any_version(config: dict) -> dict:
    """transformers 5 writes ``rope_parameters``; version 4 reads ``rope_theta`` and ``rope_scaling``, as 5 still does."""
    values = dict(config)
    rope = dict(values.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    return values


def _head_dim(checkpoint: Checkpoint) -> int:
    """Of the heads, from a GGUF file's metadata; elsewhere that of Llama-3, since no shape tells it."""
    heads = _metadata_number(checkpoint, "attention.head_count", 0)
    of_width = _metadata_number(checkpoint, "embedding_length", 0) // heads if heads else LLAMA3_HEAD_DIM
    head_dim = int(_metadata_number(checkpoint, "attention.key_length", of_width))
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"{FLAG} {checkpoint.path} has heads of {head_dim} according to its metadata, which is no size for them.")
    return head_dim


def _metadata_number(checkpoint: Checkpoint, key: str, otherwise: float) -> float:
    """A number about a Llama from the metadata of a GGUF file."""
    text = checkpoint.metadata.get(f"llama.{key}", str(otherwise))
    try:
        return float(Fraction(text))  # which is never infinite and never NaN
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{FLAG} {checkpoint.path} says that llama.{key} is {text!r}, which is no number.") from error


def _config_of_shapes(checkpoint: Checkpoint) -> dict:
    head_dim = _head_dim(checkpoint)
    query, key, mlp = (matrix_shape(checkpoint, name, FLAG)[0] for name in _FIRST_LAYER)
    if query % head_dim or key % head_dim:
        raise UserError(
            f"{FLAG} {checkpoint.path} is not of Llama-3's sizes (heads of {head_dim}). Put the model's config.json beside it."
        )
    layers = _count_layers(checkpoint)
    logger.info("no config.json beside %s: taken as a Llama-3 of %d layers", checkpoint.path, layers)
    return LLAMA3_CONSTANTS | {
        "rms_norm_eps": _metadata_number(checkpoint, "attention.layer_norm_rms_epsilon", LLAMA3_CONSTANTS["rms_norm_eps"]),
        "rope_theta": _metadata_number(checkpoint, "rope.freq_base", LLAMA3_CONSTANTS["rope_theta"]),
        "num_hidden_layers": layers,
        "hidden_size": matrix_shape(checkpoint, _EMBEDDING, FLAG)[1],
        "intermediate_size": mlp,
        "num_attention_heads": query // head_dim,
        "num_key_value_heads": key // head_dim,
        "head_dim": head_dim,
    }
