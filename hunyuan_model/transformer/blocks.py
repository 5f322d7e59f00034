"""The two kinds of transformer blocks and the final layer.

Blocks take tensors and a list of lengths, and know nothing of devices, memory or training: checkpointing, weight
swapping, fp8 and LoRA wrap them, or the linear layers in them, from outside. For that reason nothing here looks at the
dtype of a linear layer's weight.

A block is two functions. ``branches`` has all of its layers and is what checkpointing, swapping and compiling wrap. ``forward``
adds the last branch, times its gate, to the tokens. As the addition keeps only the gate where no gate needs a gradient, a
checkpointed block computes its last matmul once: the recomputation stops before it. In a double block that is the image's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.transformer.attention import Attention
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.embedders import MLP
from hunyuan_model.transformer.gelu import cat_gelu
from hunyuan_model.transformer.norms import RMSNorm, modulated_norm, rotated_norms

Branch = tuple[Tensor, Tensor | None, Tensor | None]
"""Tokens, and the gate and the branch that are to be added to them; both None where that was done."""


def add_branch(tokens: Tensor, gate: Tensor | None, branch: Tensor | None) -> Tensor:
    """tokens + gate * branch: (B, L, hidden) each, but the gate (B, 1, hidden)."""
    return tokens if branch is None else torch.addcmul(tokens, gate, branch)


class ModulateDiT(nn.Module):
    """Conditioning vector (B, hidden) -> ``factor`` tensors of (B, 1, hidden): shifts, scales and gates."""

    def __init__(self, hidden_size: int, factor: int):
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(hidden_size, factor * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec))[:, None].chunk(self.factor, dim=-1)


class MMDoubleStreamBlock(nn.Module):
    """Image and text tokens, each with weights of their own, joined only in the attention."""

    def __init__(self, config: TransformerConfig, attention: Attention):
        super().__init__()
        hidden_size, head_dim = config.hidden_size, config.head_dim
        self.heads = config.heads
        self.attention = attention

        self.img_mod = ModulateDiT(hidden_size, factor=6)
        self.img_attn_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.img_attn_q_norm = RMSNorm(head_dim)
        self.img_attn_k_norm = RMSNorm(head_dim)
        self.img_attn_proj = nn.Linear(hidden_size, hidden_size)
        self.img_mlp = MLP(hidden_size, config.mlp_size)

        self.txt_mod = ModulateDiT(hidden_size, factor=6)
        self.txt_attn_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.txt_attn_q_norm = RMSNorm(head_dim)
        self.txt_attn_k_norm = RMSNorm(head_dim)
        self.txt_attn_proj = nn.Linear(hidden_size, hidden_size)
        self.txt_mlp = MLP(hidden_size, config.mlp_size)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            img: (B, image tokens, hidden).
            txt: (B, text tokens, hidden).
            vec: (B, hidden) conditioning.
            rope: (image tokens, head_dim / 2, 2) float32.
            lengths: image tokens plus valid text tokens of each sample; None if all are valid.

        Returns:
            img and txt, updated.
        """
        img, txt = self.branches(img, txt, vec, rope, lengths)
        return add_branch(*img), add_branch(*txt)

    def branches(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor, lengths: Sequence[int] | None) -> tuple[Branch, Branch]:
        """Everything but the last addition: the branches of both MLPs, which belong to the tokens after attention."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_qkv = self.img_attn_qkv(modulated_norm(img, img_shift1, img_scale1))
        img_q, img_k, img_v = img_qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, H, D)
        img_q, img_k = rotated_norms(img_q, img_k, self.img_attn_q_norm, self.img_attn_k_norm, rope)

        txt_qkv = self.txt_attn_qkv(modulated_norm(txt, txt_shift1, txt_scale1))
        txt_q, txt_k, txt_v = txt_qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        txt_q, txt_k = rotated_norms(txt_q, txt_k, self.txt_attn_q_norm, self.txt_attn_k_norm)

        attended = self.attention(
            torch.cat((img_q, txt_q), dim=1), torch.cat((img_k, txt_k), dim=1), torch.cat((img_v, txt_v), dim=1), lengths
        )
        img_attended, txt_attended = attended.split((img.shape[1], txt.shape[1]), dim=1)
        del img_qkv, img_q, img_k, img_v, txt_qkv, txt_q, txt_k, txt_v  # before the MLPs begin

        img = torch.addcmul(img, img_gate1, self.img_attn_proj(img_attended))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn_proj(txt_attended))
        del attended, img_attended, txt_attended
        txt_branch = self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2))
        # The larger of the two comes last, as a recomputation leaves out what comes last.
        img_branch = self.img_mlp(modulated_norm(img, img_shift2, img_scale2))
        return (img, img_gate2, img_branch), (txt, txt_gate2, txt_branch)


class MMSingleStreamBlock(nn.Module):
    """Image and text tokens as one sequence; attention and MLP side by side from one linear layer to another."""

    def __init__(self, config: TransformerConfig, attention: Attention):
        super().__init__()
        hidden_size = config.hidden_size
        self.heads = config.heads
        self.attention = attention
        self.split_sizes = (3 * hidden_size, config.mlp_size)

        self.modulation = ModulateDiT(hidden_size, factor=3)
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + config.mlp_size)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        self.linear2 = nn.Linear(hidden_size + config.mlp_size, hidden_size)

    def forward(self, x: Tensor, vec: Tensor, rope: Tensor, lengths: Sequence[int] | None) -> Tensor:
        """One block.

        Args:
            x: (B, L, hidden), image tokens then text tokens.
            vec: (B, hidden) conditioning.
            rope: (L, head_dim / 2, 2) float32, where the rows of text tokens do not rotate.
            lengths: valid tokens of each sample; None if all are valid.

        Returns:
            x, updated.
        """
        (branch,) = self.branches(x, vec, rope, lengths)
        return add_branch(*branch)

    def branches(self, x: Tensor, vec: Tensor, rope: Tensor, lengths: Sequence[int] | None) -> tuple[Branch]:
        """Everything but the addition: the branch of attention and MLP."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulated_norm(x, shift, scale)).split(self.split_sizes, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, H, D)
        q, k = rotated_norms(q, k, self.q_norm, self.k_norm, rope)
        attended = self.attention(q, k, v, lengths)
        del q, k, v
        joined = cat_gelu(attended, mlp)
        del attended, qkv, mlp  # with them goes what linear1 gave, before linear2 begins
        return ((x, gate, self.linear2(joined)),)


class FinalLayer(nn.Module):
    """Image tokens (B, L, hidden) -> the values of their patches (B, L, C * pt * ph * pw)."""

    def __init__(self, hidden_size: int, patch_values: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))
