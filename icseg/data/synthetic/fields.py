"""Random fields on the pixel grid: smooth noise of a chosen coarseness, and Gaussian blur."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@lru_cache(maxsize=1024)
def _cubic_upsampling(resolution: int, size: int) -> Array:
    """[size, resolution] matrix of cubic convolution (Keys 1981, a = -0.75) with clamped edges."""
    position = (np.arange(size) + 0.5) * resolution / size - 0.5
    first = np.floor(position).astype(int) - 1
    matrix = np.zeros((size, resolution))
    for tap in range(4):
        x = np.abs(position - (first + tap))
        near = 1.25 * x**3 - 2.25 * x**2 + 1
        far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        column = np.clip(first + tap, 0, resolution - 1)
        np.add.at(matrix, (np.arange(size), column), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


def smooth_noise(rng: np.random.Generator, count: int, resolution: int, size: int) -> Array:
    """[count, size, size] noise of unit deviation that varies over about size / resolution pixels."""
    if resolution >= size:
        return rng.standard_normal((count, size, size), dtype=np.float32)
    up = _cubic_upsampling(resolution, size)
    coarse: Array = rng.standard_normal((count, resolution, resolution), dtype=np.float32)
    noise: Array = np.matmul(up @ coarse, up.T)
    noise /= noise[:, ::3, ::3].std() + 1e-6
    return noise


def fractal_noise(rng: np.random.Generator, count: int, resolution: int, octaves: int, size: int) -> Array:
    """Sum of `octaves` smooth noises, each twice as fine as the one before and 0.6 times as strong."""
    total = smooth_noise(rng, count, resolution, size)
    for octave in range(1, octaves):
        total += np.float32(0.6**octave) * smooth_noise(rng, count, resolution * 2**octave, size)
    total /= total[:, ::3, ::3].std() + 1e-6
    return total


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur of [N, H, H] images, `sigma` in pixels; weights are renormalised at the border.

    Two matrix products cost the same for every sigma.
    """
    if sigma < 0.2:
        return image
    offset = np.arange(image.shape[-1], dtype=np.float32)
    kernel = np.exp(-((offset[:, None] - offset[None]) ** 2) / np.float32(2 * sigma * sigma))
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ image @ kernel.T
