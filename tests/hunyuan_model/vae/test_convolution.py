"""Convolutions over clips by kernels for pictures, which every device but the CPU takes, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hunyuan_model.vae import cpu_kernels
from hunyuan_model.vae.layers import CausalConv3d, Upsample

KERNELS = [(1, 1, 1), (3, 3, 3), (2, 3, 3), (2, 2, 2), (3, 2, 2), (1, 3, 3)]  # of the layers, and of the phases of Upsample
STRIDES = [(1, 1, 1), (1, 2, 2), (2, 2, 2)]


@pytest.fixture
def on_gpu(monkeypatch):
    """As it is computed where oneDNN is not."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(F, "conv3d", lambda *_: pytest.fail("a convolution over time was asked for"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_one_frame_of_a_convolution_is_that_of_a_picture(kernel, stride, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    window = torch.randn(2, 5, kernel[0], 9, 8, generator=generator, dtype=dtype)
    weight, bias = torch.randn(7, 5, *kernel, generator=generator, dtype=dtype), torch.randn(7, generator=generator, dtype=dtype)
    expected = F.conv3d(window, weight, bias, stride)
    monkeypatch.setattr(cpu_kernels, "by_onednn", lambda *_: False)
    found = cpu_kernels.convolution(window, weight, bias, stride)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_clips_are_computed_without_a_convolution_over_time(on_gpu, frames, stride, reuse):
    torch.manual_seed(0)
    layer, x = CausalConv3d(4, 6, stride=stride).double(), torch.randn(2, 4, frames, 8, 10, dtype=torch.float64)
    layer.reuse_buffers = reuse
    padded = F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
    expected = torch.conv3d(padded, layer.conv.weight, layer.conv.bias, stride)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2])
def test_so_are_clips_that_are_enlarged(on_gpu, factor):
    torch.manual_seed(0)
    layer, x = Upsample(4, factor).double(), torch.randn(1, 4, 3, 5, 6, dtype=torch.float64)
    large = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    if factor == 2:
        large = torch.cat((large[:, :, :1], large[:, :, 1:].repeat_interleave(2, dim=2)), dim=2)
    padded = F.pad(large, (1, 1, 1, 1, 2, 0), mode="replicate")
    with torch.no_grad():
        expected = torch.conv3d(padded, layer.conv.conv.weight, layer.conv.conv.bias)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_a_full_size_frame_on_a_gpu_takes_no_copy_for_each_tap():
    window = torch.randn(1, 128, 3, 546, 962, device="cuda", dtype=torch.float16)
    weight, bias = torch.randn(128, 128, 3, 3, 3, device="cuda", dtype=torch.float16), window.new_zeros(128)
    cpu_kernels.convolution(window, weight, bias, (1, 1, 1))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        cpu_kernels.convolution(window, weight, bias, (1, 1, 1))
        torch.cuda.synchronize()
    copy_for_each_tap = 27 * window[:, :, 0].nbytes
    assert torch.cuda.max_memory_allocated() - before < copy_for_each_tap / 2
    assert not [event.key for event in profile.key_averages() if "vol2col" in event.key]
