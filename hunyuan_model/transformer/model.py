"""The HunyuanVideo transformer (arXiv 2412.03603): the network alone, with the official parameter names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hunyuan_model.transformer.attention import Attention, make_attention
from hunyuan_model.transformer.blocks import FinalLayer, MMDoubleStreamBlock, MMSingleStreamBlock
from hunyuan_model.transformer.config import TransformerConfig
from hunyuan_model.transformer.embedders import PatchEmbed, TimestepEmbedder, VectorEmbedder
from hunyuan_model.transformer.rope import rotation_table
from hunyuan_model.transformer.token_refiner import SingleTokenRefiner
from utils.errors import UserError


class HYVideoDiffusionTransformer(nn.Module):
    """Predicts the velocity (noise minus latents) of noisy video latents.

    Args:
        config: the size.
        attention: how the blocks attend; plain torch if None.
    """

    def __init__(self, config: TransformerConfig, attention: Attention | None = None):
        super().__init__()
        self.config = config
        attention = attention or make_attention("torch")
        hidden_size = config.hidden_size

        self.img_in = PatchEmbed(config.patch_size, config.in_channels, hidden_size)
        self.txt_in = SingleTokenRefiner(config)
        self.time_in = TimestepEmbedder(hidden_size, config.frequency_dim)
        self.vector_in = VectorEmbedder(config.pooled_dim, hidden_size)
        self.guidance_in = TimestepEmbedder(hidden_size, config.frequency_dim) if config.guidance else None
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(config, attention) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(config, attention) for _ in range(config.single_depth))
        self.final_layer = FinalLayer(hidden_size, config.out_channels * math.prod(config.patch_size))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedders; the blocks may hold another one, such as float8."""
        return self.img_in.proj.weight.dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        text_states_2: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity at x.

        Args:
            x: noisy latents (B, C, F, H, W), multiplied by the VAE's scaling factor; H and W divisible by the patch.
            t: timesteps (B,) in 0..1000.
            text_states: (B, L, text_dim). Rows that text_mask calls padding may hold anything, NaN too.
            text_mask: (B, L), 1 for valid rows, which come first. Keep it on the CPU to avoid waiting for the device.
            text_states_2: pooled text (B, pooled_dim).
            guidance: embedded guidance scale times 1000, (B,); None for a model without guidance embedding.

        Returns:
            (B, C, F, H, W) in the dtype of x.

        Raises:
            UserError: a latent size the patches do not divide, or a mask whose valid rows do not come first.
        """
        pt, ph, pw = self.config.patch_size
        frames, height, width = x.shape[2:]
        if frames % pt or height % ph or width % pw:
            raise UserError(
                f"latents of {frames} frames of {height}x{width} cannot be cut into patches of {pt}x{ph}x{pw}. "
                f"Use videos and images whose height and width are divisible by {8 * ph} and {8 * pw} pixels."
            )
        size = frames // pt, height // ph, width // pw
        text, text_lengths = _valid_text(text_states, text_mask)

        vec = self.conditioning(t, text_states_2, guidance)
        img = self.img_in(x.to(self.dtype))
        txt = self.txt_in(text.to(self.dtype), t, text_lengths)
        image_tokens, text_tokens = img.shape[1], txt.shape[1]
        rope = rotation_table(size, self.config.rope_dims, self.config.rope_theta, x.device, text_tokens)
        image_rope = rope[:image_tokens]
        lengths = None if text_lengths is None else [image_tokens + length for length in text_lengths]

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, image_rope, lengths)
        tokens = torch.cat((img, txt), dim=1)
        del img, txt  # or they stay in memory while the single blocks compute
        for block in self.single_blocks:
            tokens = block(tokens, vec, rope, lengths)
        patches = self.final_layer(tokens[:, :image_tokens], vec)
        t, h, w = size
        latents = rearrange(patches, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
        return latents.to(x.dtype)

    def conditioning(self, t: Tensor, text_states_2: Tensor, guidance: Tensor | None) -> Tensor:
        """What modulates every block: (B, hidden). Arguments as ``forward`` takes them."""
        vec = self.time_in(t) + self.vector_in(text_states_2.to(self.dtype))
        if self.guidance_in is None:
            return vec
        if guidance is None:
            raise ValueError("this transformer has a guidance embedding: guidance must be given")
        return vec + self.guidance_in(guidance)


def _valid_text(text: Tensor, mask: Tensor) -> tuple[Tensor, Sequence[int] | None]:
    """Text cut to the longest valid length (at least 1), with zeros for the padding, and the lengths; None if all are the same."""
    valid = mask.detach().to("cpu", torch.bool)
    lengths = valid.sum(1).tolist()
    longest = max(1, *lengths)
    if any(not row[:length].all() for row, length in zip(valid, lengths)):
        raise UserError("the text mask has padding before valid rows; text states must be padded on the right.")
    if min(lengths) == longest:
        return text[:, :longest], None
    # Copies the valid rows rather than masking the others: NaN in them must reach neither the output nor a gradient.
    rows = [F.pad(sample[:length], (0, 0, 0, longest - length)) for sample, length in zip(text, lengths)]
    return torch.stack(rows), lengths
