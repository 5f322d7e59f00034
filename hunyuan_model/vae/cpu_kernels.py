"""The kernels of convolutions: for float32 on the CPU those of oneDNN, in its layout of memory; else those for pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEWEST_CHANNELS_LAST = 8  # the few channels of pictures are faster in the usual layout


def convolution(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int, int]
) -> torch.Tensor:
    """``F.conv3d`` of a window (B, C, T, H, W) without padding, by the fastest kernel of its device."""
    if window.shape[2] == weight.shape[2] and (window.shape[2] == 1 or not by_onednn(window.device.type, window.dtype)):
        return F.conv2d(window.flatten(1, 2), weight.flatten(1, 2), bias, stride[1:]).unsqueeze(2)  # of the one frame
    if by_onednn(window.device.type, window.dtype):
        # For a few small frames conv3d itself picks a matrix product that takes up to five times as long.
        return torch.mkldnn_convolution(window, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    return F.conv3d(window, weight, bias, stride)


def memory_format(x: torch.Tensor, channels: int) -> torch.memory_format:
    """The layout for a tensor of ``channels`` channels beside ``x``: the one that oneDNN computes in, so that it copies nothing."""
    last = by_onednn(x.device.type, x.dtype) and channels >= FEWEST_CHANNELS_LAST
    return torch.channels_last_3d if last else torch.contiguous_format


def by_onednn(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes, several frames at a time.

    Elsewhere each frame is computed as a picture, whose channels are those of all frames that it is made of: the same sums. In
    half precision torch leaves cuDNN 9.8 to 9.14 for convolutions over time, and what it takes instead is several times slower
    and writes each input 27 times.
    """
    return device_type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
