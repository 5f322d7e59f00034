"""The names that ComfyUI gives to the tensors of the VAE when it saves one: those of latent diffusion's first code."""

from __future__ import annotations

from torch import Tensor

from hunyuan_model.checkpoints.layouts import NameLayout

_BLOCKS = 4
_RESNET = {
    "norm1": "norm1",
    "norm2": "norm2",
    "conv1.conv": "conv1.conv",
    "conv2.conv": "conv2.conv",
    "conv_shortcut.conv": "nin_shortcut.conv",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _coder(blocks: dict[str, str], resampler: tuple[str, str]) -> dict[str, str]:
    """One half of the VAE: official module -> module there. ``blocks`` and ``resampler`` are pairs of the same kind."""
    table = {"conv_in.conv": "conv_in.conv", "conv_norm_out": "norm_out", "conv_out.conv": "conv_out.conv"}
    for official, theirs in blocks.items():
        table |= {f"{official}.resnets.N.{name}": f"{theirs}.block.N.{other}" for name, other in _RESNET.items()}
        table[f"{official}.{resampler[0]}.0.conv.conv"] = f"{theirs}.{resampler[1]}.conv.conv"
    for index in range(2):
        table |= {f"mid_block.resnets.{index}.{name}": f"mid.block_{index + 1}.{other}" for name, other in _RESNET.items()}
    return table | {f"mid_block.attentions.0.{name}": f"mid.attn_1.{other}" for name, other in _ATTENTION.items()}


def _as_matrix(weight: Tensor) -> Tensor:
    """A convolution of one point, (out, in, 1, 1, 1), as the Linear weight (out, in) that it is; a bias as it is."""
    return weight.flatten(1) if weight.ndim > 1 else weight


_ENCODER = _coder({f"down_blocks.{index}": f"down.{index}" for index in range(_BLOCKS)}, ("downsamplers", "downsample"))
_DECODER = _coder({f"up_blocks.{index}": f"up.{_BLOCKS - 1 - index}" for index in range(_BLOCKS)}, ("upsamplers", "upsample"))

LATENT_DIFFUSION = NameLayout(
    "ComfyUI",
    {f"encoder.{official}": f"encoder.{theirs}" for official, theirs in _ENCODER.items()}
    | {f"decoder.{official}": f"decoder.{theirs}" for official, theirs in _DECODER.items()}
    | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"},
    reorder={
        f"{coder}.mid_block.attentions.0.{name}": _as_matrix
        for coder in ("encoder", "decoder")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    },
)

OFFICIAL = NameLayout("official", {module: module for module in LATENT_DIFFUSION.table})

VAE_LAYOUTS = (OFFICIAL, LATENT_DIFFUSION)
