"""Noise fields and blur, against what they are meant to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from icseg.data.synthetic.fields import MOST_COARSE, banded_noise, blur, pixel_axis, smooth_curves, smooth_noise
from icseg.data.synthetic.random import Draws


def draws(tasks: int) -> Draws:
    return Draws(torch.arange(tasks))


def white(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def gaussian(image: Tensor, sigma: float, radius: int) -> np.ndarray:
    """Of [H, W], cut off at `radius`, renormalised at the border."""
    values, ones = image.double().numpy(), np.ones(image.shape)
    numerator, norm = (ndimage.gaussian_filter(x, sigma, mode="constant", radius=radius) for x in (values, ones))
    return numerator / norm


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.1, 1.9])
def test_a_narrow_blur_is_the_gaussian(sigma: float) -> None:
    image = white(1, 2, 40, 40)
    found = blur(image, torch.tensor([sigma]))
    for before, after in zip(image[0], found[0], strict=True):
        np.testing.assert_allclose(after.numpy(), gaussian(before, sigma, math.floor(3 * sigma)), atol=1e-5)


@pytest.mark.parametrize("sigma", [2.0, 3.3, 7.0, 15.0])
def test_a_wide_blur_is_close_to_the_gaussian(sigma: float) -> None:
    square = torch.zeros(1, 1, 128, 128)
    square[..., 30:90, 50:100] = 1
    difference = blur(square, torch.tensor([sigma]))[0, 0].numpy() - gaussian(square[0, 0], sigma, round(4 * sigma))
    inside = difference[8:-8, 8:-8]
    assert np.abs(inside).max() < 0.05
    assert np.sqrt((inside**2).mean()) < 0.012


def test_blur_keeps_constants_and_treats_every_task_on_its_own() -> None:
    sigma = torch.tensor([0.05, 0.5, 1.99, 2.0, 5.0, 30.0])
    flat = torch.full((6, 2, 48, 48), 0.7)
    torch.testing.assert_close(blur(flat, sigma), flat, rtol=1e-5, atol=0)
    image = white(6, 2, 48, 48)
    together = blur(image, sigma)
    for task in range(6):
        assert torch.equal(blur(image[task : task + 1], sigma[task : task + 1])[0], together[task])
    torch.testing.assert_close(together[0], image[0])
    deviations = together.std((1, 2, 3))
    assert (deviations[1:] < deviations[:-1]).all()


@pytest.mark.parametrize("resolution", [2, 5, 14, 40])
def test_smooth_noise_has_unit_deviation_and_its_coarseness(resolution: int) -> None:
    size = 96
    noise = smooth_noise(draws(8), 3, torch.full((8,), resolution), size, most=MOST_COARSE)
    assert noise.shape == (8, 3, size, size)
    assert noise.std((1, 2, 3)) == pytest.approx(torch.ones(8), abs=0.05)
    step = noise.diff(dim=-1).abs().mean()
    assert 0.4 * resolution / size < step < 1.6 * resolution / size


def test_smooth_noise_of_a_task_does_not_depend_on_the_others_resolutions() -> None:
    mixed = smooth_noise(draws(3), 2, torch.tensor([3, 7, 16]), 40)
    assert torch.equal(smooth_noise(draws(3), 2, torch.tensor([3, 3, 3]), 40)[0], mixed[0])


def test_smooth_noise_finer_than_the_image_is_as_fine_as_it() -> None:
    noise = smooth_noise(draws(2), 1, torch.tensor([50, 50]), 32, most=50)
    assert noise.isfinite().all()
    assert noise.std((1, 2, 3)) == pytest.approx(torch.ones(2), abs=0.1)


def test_smooth_curves() -> None:
    curves = smooth_curves(draws(200), 2, torch.full((200,), 6), 64)
    assert curves.shape == (200, 2, 64)
    assert 0.7 < curves.std() < 1.1
    assert curves.diff(dim=-1).abs().mean() < 0.2


def power(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(share of the energy, cycles an image, direction) of each frequency of [count, H, H]."""
    energy = torch.fft.fft2(noise.double()).abs().square().sum(0)
    y, x = torch.meshgrid(*[torch.fft.fftfreq(len(energy), 1 / len(energy))] * 2, indexing="ij")
    return energy / energy.sum(), (x * x + y * y).sqrt(), torch.atan2(y, x)


def noise_of(frequency: float, octaves: float, angle: float, alignment: float, size: int = 96) -> Tensor:
    """[count, H, H] of one task"""
    parameters = (torch.tensor([value]) for value in (frequency, octaves, angle, alignment))
    return banded_noise(draws(1), 24, size, *parameters)[0]


@pytest.mark.parametrize("frequency", [6.0, 12.0, 20.0])
@pytest.mark.parametrize("octaves", [0.2, 0.4])
def test_banded_noise_keeps_to_its_band(frequency: float, octaves: float) -> None:
    noise = noise_of(frequency, octaves, 0.0, 0.0)
    share, radius, angle = power(noise)
    # Its logarithm is normal: the squared gain's deviation is octaves / sqrt(2), the area of a ring shifts the mean.
    middle = math.log2(frequency) + octaves**2 * math.log(2)
    deviation = octaves / math.sqrt(2)
    octave = radius.clamp_min(1e-3).log2()
    assert share[(octave - middle).abs() < 3 * deviation].sum() > 0.98
    assert (share * octave).sum() == pytest.approx(middle, abs=0.1)
    spread = math.sqrt(2 * (share * share).sum().item() / len(noise))  # of the variance, for waves of random strength
    assert noise.var().item() == pytest.approx(1, abs=4.5 * spread)
    assert abs((share * torch.exp(2j * angle)).sum()) < 0.1


@pytest.mark.parametrize("angle", [0.0, 0.6, 1.5, 2.7])
def test_banded_noise_keeps_to_its_direction(angle: float) -> None:
    share, _, direction = power(noise_of(14.0, 0.3, angle, 20.0))
    mean = (share * torch.exp(2j * direction)).sum()
    assert abs(mean) > 0.95
    assert abs(torch.angle(mean * torch.exp(torch.tensor(-2j * angle)))) < 0.1


def test_banded_noise_of_many_tasks_has_unit_deviation() -> None:
    tasks = 60
    stream = draws(tasks)
    parameters = (
        stream.log_uniform(8, 30),
        stream.uniform(0.3, 0.9),
        stream.uniform(0, math.pi),
        stream.uniform(0, 5),
    )
    noise = banded_noise(stream, 2, 64, *parameters)
    deviation = noise.std((1, 2, 3))
    assert deviation.mean().item() == pytest.approx(1, abs=0.03)
    assert (deviation - 1).abs().max() < 0.3


def test_pixel_axis_is_symmetric() -> None:
    axis = pixel_axis(5, torch.device("cpu"))
    torch.testing.assert_close(axis, torch.tensor([-0.4, -0.2, 0, 0.2, 0.4]))


@pytest.mark.parametrize("size", [33, 64, 65])
def test_banded_noise_has_unit_deviation_at_odd_sizes_too(size: int) -> None:
    ones = torch.ones(1)
    noise = banded_noise(draws(1), 64, size, 9 * ones, 0.8 * ones, 0 * ones, 0 * ones)
    assert abs(noise.std().item() - 1) < 0.012  # 64 fields of some hundred waves
