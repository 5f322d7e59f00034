"""What only the CPU needs for fast convolutions: oneDNN, and its layout of memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEWEST_CHANNELS_LAST = 8  # the few channels of pictures are faster in the usual layout


def convolution(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int, int]
) -> torch.Tensor:
    """``F.conv3d`` of a window (B, C, T, H, W) without padding, by the fastest kernel of its device."""
    if window.shape[2] == 1 and weight.shape[2] == 1:
        return F.conv2d(window[:, :, 0], weight[:, :, 0], bias, stride[1:]).unsqueeze(2)
    if _by_onednn(window):
        # For a few small frames conv3d itself picks a matrix product that takes up to five times as long.
        return torch.mkldnn_convolution(window, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(window, weight, bias, stride)


def memory_format(x: torch.Tensor, channels: int) -> torch.memory_format:
    """The layout for a tensor of ``channels`` channels beside ``x``: the one that oneDNN computes in, so that it copies nothing."""
    return torch.channels_last_3d if _by_onednn(x) and channels >= FEWEST_CHANNELS_LAST else torch.contiguous_format


def _by_onednn(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
