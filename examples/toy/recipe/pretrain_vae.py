"""The toy VAE: learns to show the world (and more) through 16 numbers per 8x8 pixels and four frames."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from examples.toy import world
from examples.toy.recipe.training_loop import Losses, Recipe
from examples.toy.world import to_pixels
from hunyuan_model.vae.layers import CausalAttention, CausalConv3d, Downsample, ResnetBlockCausal3D, Upsample
from hunyuan_model.vae.model import AutoencoderKLCausal3D, VAEConfig

CONFIG = VAEConfig(block_out_channels=(8, 16, 32, 64), layers_per_block=1, norm_num_groups=2)
RECIPE = Recipe(steps=2000, learning_rate=1e-3, muon_rate=4e-3, warm_up=40, ema_decay=0.998)
SEED = 1
PICTURE_BATCH = (16, 1)
PICTURE_STEPS = 500  # single frames only: they are computed as 2D kernels and cost a fraction of a clip; see CurrentFrameOnly
BATCHES = ((4, 5), (16, 1), (2, 9), (4, 5))  # (clips, frames) of successive steps after that
SCRIBBLES = 0.25  # at least this share of drawings from outside the world
L1_WEIGHT = 0.1
KL_WEIGHT = 3e-4  # per latent number, beside a mean squared error per pixel value
INITIAL_LOG_VARIANCE = -6.0  # small: noise in the latents would hide the first things that are learned
WHITENING_FLOOR = 0.003  # of the largest variance: directions with less stay small instead of becoming pure noise
OFF_PATH = 0.1  # initial size of what does not belong to the straight path


@torch.no_grad()
def new_vae() -> AutoencoderKLCausal3D:
    """Initial weights, the same every time.

    With the usual ones the signal has to be found again behind a dozen random convolutions, which took thousands of
    steps. These begin with a straight path: residual branches nearly off, resampling by averages and copies, and every
    frame for itself; what the path lacks is small and random.
    """
    random = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKLCausal3D(CONFIG)
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            module.conv.weight[:, :, :-1] = 0.0
            module.conv.weight *= module.conv.kernel_size[0] ** 0.5  # as large as if those taps had never been counted
        if isinstance(module, ResnetBlockCausal3D):
            module.conv2.conv.weight *= OFF_PATH
            module.conv2.conv.bias.zero_()
            if module.conv_shortcut is not None:
                _copy_channels(module.conv_shortcut.conv)
        elif isinstance(module, Upsample):
            _copy_channels(module.conv.conv)
        elif isinstance(module, CausalAttention):
            module.to_out[0].weight.zero_()
        elif isinstance(module, Downsample):
            _average_and_details(module.conv.conv, random)
    _copy_channels(vae.decoder.conv_in.conv)
    weight = vae.encoder.conv_in.conv.weight  # (8, 3, 3, 3, 3): the colours, their negatives, and two of them halved
    weight *= OFF_PATH
    for channel, size in enumerate((1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.5, 0.5)):
        weight[channel, channel % 3, -1, 1, 1] += size
    channels = CONFIG.latent_channels
    vae.quant_conv.weight[channels:] *= OFF_PATH
    vae.quant_conv.bias[channels:] = INITIAL_LOG_VARIANCE
    return vae


def _copy_channels(convolution: nn.Conv3d) -> None:
    """Each output channel begins as a copy of an input channel, in the middle of the kernel, at its last frame."""
    weight, middle = convolution.weight, convolution.kernel_size[-1] // 2
    weight *= OFF_PATH
    convolution.bias.zero_()
    outputs, inputs = weight.shape[:2]
    for channel in range(outputs):
        weight[channel, channel % inputs, -1, middle, middle] += 1.0


def _average_and_details(convolution: nn.Conv3d, random: torch.Generator) -> None:
    """Each output channel begins as the average over 2x2 pixels of an input channel, and a random view of all 2x2 pixels."""
    weight = convolution.weight
    outputs, inputs = weight.shape[:2]
    views, _ = torch.linalg.qr(torch.randn(4 * inputs, outputs, generator=random))
    weight *= OFF_PATH
    weight[:, :, -1, :2, :2] += 0.5 * views.T.reshape(outputs, inputs, 2, 2)
    for channel in range(outputs):
        weight[channel, channel % inputs, -1, :2, :2] += 0.25


class CurrentFrameOnly:
    """While ``active``, keeps kernels from changing at their taps on earlier frames.

    On a single frame all taps in time see the same, so they would all learn the same, and a clip would be smeared by what was
    learned from pictures. Like this the pictures' VAE is one for clips, too: it shows every fourth frame.
    """

    def __init__(self, vae: AutoencoderKLCausal3D):
        self.active = False
        for module in vae.modules():
            if isinstance(module, CausalConv3d) and module.conv.kernel_size[0] > 1:
                module.conv.weight.register_hook(self._last_tap)

    def _last_tap(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self.active:
            return gradient
        return torch.cat([torch.zeros_like(gradient[:, :, :-1]), gradient[:, :, -1:]], dim=2)


def draw(rng: np.random.Generator, count: int, frames: int) -> np.ndarray:
    """Clips to train on: (count, frames, 64, 64, 3) uint8."""
    others = math.ceil(count * SCRIBBLES)
    return np.concatenate([world.draw_batch(rng, count - others, frames, wander=1.0).clips, world.scribbles(rng, others, frames)])


class VAELosses:
    """Reconstruction and the distance of the latents from a normal distribution."""

    def __init__(self, vae: AutoencoderKLCausal3D):
        self.vae, self.current_frame_only = vae, CurrentFrameOnly(vae)

    def __call__(self, step: int) -> Losses:
        device = next(self.vae.parameters()).device
        self.current_frame_only.active = step < PICTURE_STEPS
        count, frames = PICTURE_BATCH if step < PICTURE_STEPS else BATCHES[step % len(BATCHES)]
        x = to_pixels(draw(world.generator(SEED, step), count, frames), device)
        posterior = self.vae.encode(x)
        decoded = self.vae.decode(posterior.sample(torch.Generator().manual_seed(step)))
        squared, absolute = nn.functional.mse_loss(decoded, x), nn.functional.l1_loss(decoded, x)
        kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1.0 - posterior.logvar).mean()
        return {"loss": squared + L1_WEIGHT * absolute + KL_WEIGHT * kl, "psnr": psnr(squared.detach()), "kl": kl.detach()}


def psnr(squared_error: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [-1, 1]."""
    return 10.0 * torch.log10(4.0 / squared_error)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLCausal3D) -> None:
    """Change the outermost 1x1 convolutions so that latents times the scaling factor have mean 0 and white channels.

    The transformer's noise has deviation 1 in every direction, and files of latents carry no scale of their own. Scaling each
    channel alone is not enough: nine tenths of the variance were three directions that say the colour of the background,
    and what says the shape drowned in the noise until the last few steps.

    A picture is decoded as before. The posterior's variance becomes that of its channel on average.
    """
    posteriors = []
    for frames, count in ((1, 96), (9, 64)):
        clips = world.draw_batch(world.generator(SEED, 10**9, frames), count, frames, wander=1.0).clips
        posteriors += [vae.encode(part) for part in to_pixels(clips, next(vae.parameters()).device).split(16)]
    mean, variance = (
        torch.cat([value.transpose(0, 1).flatten(1) for value in values], dim=1)  # (16, numbers)
        for values in zip(*((posterior.mean, posterior.logvar.exp()) for posterior in posteriors))
    )
    sizes, directions = torch.linalg.eigh(torch.cov(mean))
    roots = (sizes + WHITENING_FLOOR * sizes.max()).sqrt() * vae.scaling_factor
    whiten = directions @ torch.diag(1.0 / roots) @ directions.T
    restore = directions @ torch.diag(roots) @ directions.T
    channels, encode, decode = vae.config.latent_channels, vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] = (whiten @ encode.weight[:channels].flatten(1)).view_as(encode.weight[:channels])
    encode.bias[:channels] = whiten @ (encode.bias[:channels] - mean.mean(1))
    encode.weight[channels:] = 0.0
    encode.bias[channels:] = (whiten.square() @ variance.mean(1)).log()
    decode.bias += decode.weight.flatten(1) @ mean.mean(1)
    decode.weight[:] = (decode.weight.flatten(1) @ restore).view_as(decode.weight)
