"""The grid of 8 x 8 patches of a level, and what is cut out around each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icseg.sparse.pyramid import Pyramid
from icseg_kernels import gather_patches

PATCH = 8
HALO = 4  # what the stem's four unpadded 3 x 3 convolutions consume
CROP = PATCH + 2 * HALO
CONTEXT = 16  # side of the context crop, at a quarter of the level's resolution
OUTSIDE = -(2**16)  # where an entry that is no patch lies


def grid_size(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of the patches that tile a level; those at the lower and right border may reach beyond."""
    return -(-height // PATCH), -(-width // PATCH)


def coords_of(index: Tensor, columns: int) -> Tensor:
    """(y, x) [B, K, 2] of the top-left corners of grid cells `index` [B, K]; -1 is no cell."""
    coords = torch.stack([index // columns, index % columns], -1) * PATCH
    return torch.where(index.unsqueeze(-1) < 0, OUTSIDE, coords)


def cut(source: Tensor, corner: Tensor, side: int, samples: int | None = None) -> Tensor:
    """[B, C, h, w] -> [B, K, C, samples, samples] from `side` pixels at corner [B, K, 2], borders replicated."""
    return gather_patches(source, corner, side, out_size=samples or side)


@dataclass
class PatchInputs:
    """What is seen of K patches.

    pixels:  [B, K, 2, 16, 16] image and detail, with the halo.
    label:   [B, K, 1, 16, 16] the mask (support) or the coarser prediction (target), in [-1, 1], of any class.
    context: [B, K, 3, 16, 16] image, label and ones (0 outside the image) around each patch, 4 times coarser.
    place:   [B, K, 2] patch centres (y, x) in units of the image's longer side.
    """

    pixels: Tensor
    label: Tensor
    context: Tensor
    place: Tensor


def patch_inputs(pyramid: Pyramid, level: int, coords: Tensor, label: Tensor, label_context: Tensor) -> PatchInputs:
    """label [B, K, 1, 16, 16] and label_context [B, K, 1, 16, 16] are the caller's."""
    image, detail, coarse = pyramid.image(level), pyramid.detail(level), pyramid.context(level)
    corner = coords - HALO
    pixels = cut(image, corner, CROP) * 2 - 1
    details = torch.zeros_like(pixels) if detail is None else cut(detail, corner, CROP) * 2
    corner = context_corner(coords)
    context = [cut(coarse, corner, CONTEXT) * 2 - 1, label_context, _inside(corner, coarse)]
    place = ((coords + PATCH / 2) / max(image.shape[-2:])).clamp(-1, 2).to(image.dtype)
    return PatchInputs(torch.cat([pixels, details], 2), label, torch.cat(context, 2), place)


def context_corner(coords: Tensor) -> Tensor:
    """Top-left corners of the context crops, at a quarter of the level's resolution."""
    return coords // 4 - (CONTEXT - PATCH // 4) // 2


def _inside(corner: Tensor, coarse: Tensor) -> Tensor:
    steps = torch.arange(CONTEXT, device=corner.device)
    y, x = (corner.unsqueeze(-1) + steps).unbind(2)  # [B, K, 16] each
    height, width = coarse.shape[-2:]
    rows, columns = (y >= 0) & (y < height), (x >= 0) & (x < width)
    return (rows.unsqueeze(-1) & columns.unsqueeze(-2)).unsqueeze(2).to(coarse.dtype)
