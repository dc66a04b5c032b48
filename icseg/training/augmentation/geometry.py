"""Changes of geometry: flips and turns, exact, and all others by one resampling.

Matrices act on points (x, y, 1) of the result and give those of the image, in units of half of its longer side from its
centre.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from icseg.training.augmentation.config import AugmentationConfig, OperationsConfig
from icseg.training.augmentation.draws import ParameterDraws, change

Matrices = NDArray[np.float64]


def flip_and_turn(z: Tensor, config: OperationsConfig, draws: ParameterDraws) -> Tensor:
    """[N, C, H, W] flipped along either axis, and turned."""
    across, down = draws.happens(config.flip), draws.happens(config.flip)
    turns = draws.happens(config.turn) * draws.spread(draws.rng.integers(1, 4, draws.count))
    if z.shape[-2] != z.shape[-1]:
        turns = np.where(turns == 2, turns, 0)
    # A quarter turn is a flip, then a transposition.
    across, down, transposed = across ^ np.isin(turns, (1, 2)), down ^ np.isin(turns, (2, 3)), turns % 2 == 1
    for place in itertools.product((False, True), repeat=3):
        chosen = (across == place[0]) & (down == place[1]) & (transposed == place[2])
        if any(place):
            z = change(z, chosen, partial(_placed, place))
    return z


def _placed(place: Sequence[bool], images: Tensor) -> Tensor:
    """Flipped across, flipped down, then transposed."""
    flipped = images.flip([axis for axis, on in zip((-1, -2), place[:2], strict=True) if on])
    return flipped.transpose(-1, -2) if place[2] else flipped


def resample(
    z: Tensor, config: AugmentationConfig, levels: Sequence[tuple[OperationsConfig, ParameterDraws]]
) -> Tensor:
    """[N, 1 + C, H, W], images and their masks, cropped, mapped and warped at once.

    A mask holds the pixels that it fills by half. An image that would lose the last pixel of a class stays.
    """
    height, width = z.shape[-2:]
    sides = np.array([width, height]) / max(height, width)
    matrices = _crop(z[:, 1:], config, levels[0][1], sides)
    warp = torch.zeros(len(z), 2, 1, 1)
    warped = np.zeros(len(z), bool)
    for operations, draws in levels:
        matrices = matrices @ _affine(operations, draws)
        if (on := draws.happens(operations.elastic)).any():
            warp, warped = warp + _elastic(operations, draws, on, (height, width)), warped | on

    def move(images: Tensor) -> Tensor:
        grid = _grid(matrices[moving], warp[torch.from_numpy(moving)], sides, images)
        moved = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
        moved[:, 1:] = moved[:, 1:] >= 0.5
        lost = ((_marked(images) > 0) & (_marked(moved) == 0)).any(1)
        return torch.where(lost.view(-1, 1, 1, 1), images, moved) if bool(lost.any()) else moved

    moving = warped | (matrices != np.eye(3)).any((1, 2))
    return change(z, moving, move)


def _marked(z: Tensor) -> Tensor:
    """[N, C]: the largest value of each mask."""
    return z[:, 1:].amax((2, 3))


def _affine(config: OperationsConfig, draws: ParameterDraws) -> Matrices:
    """[N, 3, 3]; the unit matrix where nothing happens."""
    on = draws.happens(config.affine)
    angle = on * draws.uniform(math.radians(config.rotation))
    shear = on * draws.uniform(config.shear)
    scale = on * draws.uniform(config.scale)
    scale = 2 ** -(scale + draws.happens(config.zoom) * draws.uniform(math.log2(config.zoom_factor)))
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    matrices = np.tile(np.eye(3), (draws.images, 1, 1))
    matrices[:, 0, 0], matrices[:, 0, 1] = cos, shear * cos - sin
    matrices[:, 1, 0], matrices[:, 1, 1] = sin, shear * sin + cos
    for axis in (0, 1):
        matrices[:, axis, 2] = on * draws.uniform(2 * config.shift)
    return matrices


def _crop(y: Tensor, config: AugmentationConfig, draws: ParameterDraws, sides: NDArray[np.float64]) -> Matrices:
    """[N, 3, 3] for boxes of one size, at one place or about a pixel of each image's foreground."""
    matrices = np.tile(np.eye(3), (len(y), 1, 1))
    if not draws.happens(config.crop).all():
        return matrices
    share = float(draws.rng.uniform(config.crop_side, 1.0))
    place = draws.rng.uniform(-1.0, 1.0, 2)  # of the box, or of the pixel in it
    centres = (1 - share) * place * sides
    if draws.happens(config.crop_foreground).all():
        around = _foreground_points(y, draws.rng) * sides + 0.5 * share * place * sides
        centres = np.clip(around, -(1 - share) * sides, (1 - share) * sides)
    matrices[:, :2, :2] *= share
    matrices[:, :2, 2] = centres
    return matrices


def _foreground_points(y: Tensor, rng: np.random.Generator) -> NDArray[np.float64]:
    """[N, 2] in [-1, 1]: (x, y) of a random pixel of a random class of each image; its centre where it has none."""
    height, width = y.shape[-2:]
    points = np.zeros((len(y), 2))
    for point, masks in zip(points, y.flatten(2), strict=True):
        at, choice = rng.integers(len(masks)), rng.random()
        pixels = torch.nonzero(masks[at]).flatten()
        if len(pixels):
            row, column = divmod(int(pixels[int(choice * len(pixels))]), width)
            point[:] = (2 * column + 1) / width - 1, (2 * row + 1) / height - 1
    return points


def _elastic(config: OperationsConfig, draws: ParameterDraws, on: NDArray[np.bool_], size: tuple[int, int]) -> Tensor:
    """[N, 2, H, W] displacements of the images that are `on`."""
    points = config.elastic_cells + 1
    limit = 2 * config.elastic_shift
    shifts = draws.rng.uniform(-limit, limit, (draws.count, 2, points, points)) * on[: draws.count, None, None, None]
    down, across = (_smooth(side, points) for side in size)
    warp = down @ torch.from_numpy(shifts.astype(np.float32)) @ across.T
    return warp.expand(draws.images, -1, -1, -1)


def _smooth(side: int, points: int) -> Tensor:
    """[side, points]: weights of the control points in each pixel, by smoothstep between neighbours."""
    place = torch.linspace(0, points - 1, side)
    distance = (place[:, None] - torch.arange(points)).abs().clamp(max=1)
    return 1 - distance**2 * (3 - 2 * distance)


def _grid(matrices: Matrices, warp: Tensor, sides: NDArray[np.float64], z: Tensor) -> Tensor:
    """[N, H, W, 2] where grid_sample reads each pixel, in its own units: half of the width and of the height."""
    units = np.diag([*sides, 1.0])
    theta = torch.tensor((np.linalg.inv(units) @ matrices @ units)[:, :2], dtype=torch.float32, device=z.device)
    down, across = ((2 * torch.arange(n, device=z.device) + 1) / n - 1 for n in z.shape[-2:])
    by_column, by_row, by_place = theta[..., None, None].unbind(2)  # [N, 2, 1, 1]
    grid = by_column * across + (by_row * down[:, None] + by_place)
    if warp.shape[-1] > 1:  # else none of these images is warped
        grid.add_((warp / torch.tensor(sides, dtype=torch.float32).view(2, 1, 1)).to(z.device))
    return grid.permute(0, 2, 3, 1)
