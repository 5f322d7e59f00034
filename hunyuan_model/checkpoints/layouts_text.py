"""The names of a Llama's tensors: those of transformers, which count as official here, and those of llama.cpp's GGUF files."""

from __future__ import annotations

from torch import Tensor

from hunyuan_model.checkpoints.layouts import NameLayout

_GGUF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF = {"embed_tokens": "token_embd", "norm": "output_norm"} | {
    f"layers.N.{official}": f"blk.N.{theirs}" for official, theirs in _GGUF_BLOCK.items()
}

LLAMA = NameLayout("transformers", {module: module for module in _GGUF})


def gguf_llama(head_dim: int) -> NameLayout:
    """The layout of GGUF. A rotation turns two rows of a head: they are neighbours there, half a head apart in transformers."""

    def halves_from_pairs(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    return NameLayout(
        "GGUF", _GGUF, reorder=dict.fromkeys(("layers.N.self_attn.q_proj", "layers.N.self_attn.k_proj"), halves_from_pairs)
    )
