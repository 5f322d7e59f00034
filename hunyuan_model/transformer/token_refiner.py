"""The token refiner: a small transformer over the text states before they meet the image tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.transformer.attention import Attention, make_attention
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.embedders import MLP, TextProjection, TimestepEmbedder


class IndividualTokenRefinerBlock(nn.Module):
    """Pre-norm block whose two branches are gated, but not shifted or scaled, by the context."""

    def __init__(self, config: TransformerConfig, attention: Attention):
        super().__init__()
        hidden_size = config.hidden_size
        self.heads = config.heads
        self.attention = attention
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.self_attn_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.self_attn_proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = MLP(hidden_size, config.mlp_size, F.silu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, context: Tensor, lengths: Sequence[int] | None) -> Tensor:
        """x (B, L, hidden), context (B, hidden) -> (B, L, hidden)."""
        gate_attention, gate_mlp = self.adaLN_modulation(context)[:, None].chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + gate_attention * self.self_attn_proj(self.attention(q, k, v, lengths))
        return x + gate_mlp * self.mlp(self.norm2(x))


class IndividualTokenRefiner(nn.Module):
    """The refiner's blocks."""

    def __init__(self, config: TransformerConfig, attention: Attention):
        super().__init__()
        self.blocks = nn.ModuleList(IndividualTokenRefinerBlock(config, attention) for _ in range(config.refiner_depth))

    def forward(self, x: Tensor, context: Tensor, lengths: Sequence[int] | None) -> Tensor:
        for block in self.blocks:
            x = block(x, context, lengths)
        return x


class SingleTokenRefiner(nn.Module):
    """Text states (B, L, text_dim) -> text tokens (B, L, hidden). Padding rows come out finite and mean nothing."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.input_embedder = nn.Linear(config.text_dim, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.frequency_dim)
        self.c_embedder = TextProjection(config.text_dim, config.hidden_size)
        # Always torch: some hundred tokens gain nothing from a package, and some packages refuse float32.
        self.individual_token_refiner = IndividualTokenRefiner(config, make_attention("torch"))

    def forward(self, text: Tensor, t: Tensor, lengths: Sequence[int] | None) -> Tensor:
        """text: zero past a sample's length; t: (B,) in 0..1000; lengths: valid rows of each sample, None if all are."""
        context = self.t_embedder(t) + self.c_embedder(_mean_of_valid_rows(text, lengths))
        return self.individual_token_refiner(self.input_embedder(text), context, lengths)


def _mean_of_valid_rows(text: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """(B, L, C) with zero padding rows -> (B, C); a sample without valid rows has mean zero."""
    if lengths is None:
        return text.float().mean(1).to(text.dtype)
    sums = text.float().sum(1)
    return torch.stack([total / max(length, 1) for total, length in zip(sums, lengths)]).to(text.dtype)
