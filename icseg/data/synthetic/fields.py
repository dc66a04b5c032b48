"""Random fields on the pixel grid, and Gaussian blur: batches of tasks, one set of parameters a task."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.data.synthetic.random import Draws

TURN = 2 * math.pi
MOST_COARSE = 64
USUALLY_COARSE = 16
_WIDE = 2.0


@lru_cache(maxsize=256)
def _cubic_upsampling(resolution: int, size: int) -> Tensor:
    """[size, MOST_COARSE] matrix of cubic convolution (Keys 1981, a = -0.75) from `resolution` points, ends clamped."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * resolution / size - 0.5
    first = position.floor() - 1
    matrix = torch.zeros(size, MOST_COARSE, dtype=torch.float64)
    for tap in range(4):
        x = (position - (first + tap)).abs()
        near = 1.25 * x**3 - 2.25 * x**2 + 1
        far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        column = (first + tap).clamp(0, resolution - 1).long().unsqueeze(1)
        matrix.scatter_add_(1, column, torch.where(x <= 1, near, far).unsqueeze(1))
    return matrix.float()


@lru_cache(maxsize=64)
def _upsamplings(size: int, most: int, device: torch.device) -> Tensor:
    """[most + 1, size, most]: the matrix for every resolution up to `most`."""
    return torch.stack([_cubic_upsampling(min(max(r, 1), size), size)[:, :most] for r in range(most + 1)]).to(device)


def smooth_noise(draws: Draws, count: int, resolution: Tensor, size: int, most: int = USUALLY_COARSE) -> Tensor:
    """[T, count, size, size] noise of unit deviation that varies over about size / resolution pixels.

    resolution: int64 [T], at most `most`, which is at most MOST_COARSE.
    """
    up = _upsamplings(size, most, draws.device)[resolution].unsqueeze(1)
    coarse = draws.normal(1.0, count, most, most)
    noise = up @ coarse @ up.mT
    return noise / (noise.std((1, 2, 3), keepdim=True) + 1e-6)


def smooth_curves(draws: Draws, count: int, resolution: Tensor, size: int) -> Tensor:
    """[T, count, size] one-dimensional noise of about unit deviation; resolution: int64 [T]."""
    up = _upsamplings(size, USUALLY_COARSE, draws.device)[resolution]
    return draws.normal(1.0, count, USUALLY_COARSE) @ up.mT


def banded_noise(
    draws: Draws, count: int, size: int, frequency: Tensor, octaves: Tensor, angle: Tensor, alignment: Tensor
) -> Tensor:
    """[T, count, size, size] noise of unit deviation in a band of spatial frequencies.

    frequency: [T] cycles an image; octaves: [T] deviation of its logarithm; angle: [T] of the waves; alignment: [T],
    how closely they keep it: 0 is any direction.
    """
    y = torch.fft.fftfreq(size, 1 / size, device=draws.device).unsqueeze(1)
    x = torch.fft.rfftfreq(size, 1 / size, device=draws.device)
    frequency, octaves, angle, alignment = (t.view(-1, 1, 1) for t in (frequency, octaves, angle, alignment))
    radius = (y * y + x * x).sqrt().clamp_min(0.25)
    gain = torch.exp(-(((radius / frequency).log2() / octaves) ** 2) / 2)
    gain = gain * torch.exp(alignment * ((2 * (torch.atan2(y, x) - angle)).cos() - 1))
    gain[:, 0, 0] = 0
    energy = 2 * gain.square().sum((1, 2)) - gain[..., 0].square().sum(1)  # the first column has no twin,
    if size % 2 == 0:
        energy = energy - gain[..., -1].square().sum(1)  # nor has the last
    gain = gain / (energy.sqrt() / size + 1e-6).view(-1, 1, 1)
    spectrum = torch.fft.rfft2(draws.white(count, size, size))
    return torch.fft.irfft2(spectrum * gain.unsqueeze(1), (size, size))


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of [T, N, H, H] images, sigma [T] in pixels, cut off at three sigma, renormalised at the border.

    A wide one (from _WIDE on) is made of a narrow one of the image at a coarser resolution.
    """
    blurred = torch.empty_like(image)
    octave = (sigma / _WIDE).log2().floor().add(1).clamp_min(0)
    for steps in octave.unique().tolist():
        chosen = (octave == steps).nonzero().squeeze(1)
        some, factor = image[chosen], 2 ** int(steps)
        if factor > 1:
            some = F.adaptive_avg_pool2d(some, max(1, image.shape[-1] // factor))
        some = _convolved(_convolved(some, sigma[chosen] / factor).mT, sigma[chosen] / factor).mT
        blurred[chosen] = F.interpolate(some, image.shape[-2:], mode="bilinear") if factor > 1 else some
    return blurred


def _convolved(image: Tensor, sigma: Tensor) -> Tensor:
    """[T, N, H, W] blurred along H; sigma [T], below _WIDE."""
    reach, height = math.ceil(3 * _WIDE), image.shape[2]
    offset = torch.arange(-reach, reach + 1, device=image.device)
    sigma = sigma.clamp_min(0.1).unsqueeze(1)
    weight = torch.exp(-((offset / sigma) ** 2) / 2) * (offset.abs() <= 3 * sigma)
    padded, total = F.pad(image, (0, 0, reach, reach)), torch.zeros_like(image)
    inside = F.pad(torch.ones(height, device=image.device), (reach, reach))
    norm = torch.zeros(len(image), height, device=image.device)
    for tap in range(2 * reach + 1):
        share = weight[:, tap, None]
        norm += share * inside[tap : tap + height]
        total.addcmul_(padded[:, :, tap : tap + height], share.view(-1, 1, 1, 1))
    return total / norm.view(-1, 1, height, 1)


def edges(labels: Tensor) -> Tensor:
    """1 where a pixel of [..., H, W] differs from that to its left or above it, else 0: float32."""
    edge = torch.zeros(labels.shape, device=labels.device)
    edge[..., 1:] = (labels[..., 1:] != labels[..., :-1]).float()
    edge[..., 1:, :] = torch.maximum(edge[..., 1:, :], (labels[..., 1:, :] != labels[..., :-1, :]).float())
    return edge


def pixel_axis(size: int, device: torch.device) -> Tensor:
    """[size] pixel centres, from -1/2 to 1/2 of the image's side."""
    return (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size - 0.5
