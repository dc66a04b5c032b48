"""Pictures of the worst, the best and in-between targets of a class, with what the model made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from scipy import ndimage

from icseg.evaluation.cases import Case
from icseg.evaluation.scoring import ClassScores, TargetScores
from icseg.files import written_whole
from icseg.overlay import PALETTE

SIDE = 256  # pixels of a target's picture; supports have half of it
GAP = 6
LINE = 16
TRUE, PREDICTED = PALETTE[1], PALETTE[0]  # blue and orange


@dataclass(frozen=True)
class Example:
    """A target with its support set and the predicted mask, bool [H, W]."""

    caption: str
    case: Case
    prediction: NDArray[np.bool_]


def picked(scores: ClassScores, count: int) -> list[tuple[int, TargetScores]]:
    """(rank from the worst, target): `count` targets from the worst to the best Dice, evenly by rank."""
    ranked = sorted(scores.targets, key=lambda target: target.dice)
    ranks = np.unique(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).astype(int))
    return [(int(rank) + 1, ranked[rank]) for rank in ranks]


def place_of(rank: int, of: int) -> str:
    """The rank in words, counted from the worst."""
    names = {(of + 1) // 2: "median", of: "best", 1: "worst"}
    return names.get(rank, f"rank {rank}") + f" of {of}"


def save_examples(title: str, examples: Sequence[Example], path: Path) -> None:
    """Write `sheet` as PNG, whole or not at all."""
    with written_whole(path) as temporary:
        sheet(title, examples).save(temporary, format="PNG")


def sheet(title: str, examples: Sequence[Example]) -> Picture.Image:
    """A row an example: the target, the true outline (blue), the predicted one (orange), its supports half as large."""
    rows = [_row(example) for example in examples]
    width = max(row.width for row in rows)
    page = Picture.new("RGB", (width, LINE + sum(LINE + row.height for row in rows)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()

    def write(text: str, top: int) -> None:
        draw.text((GAP, top + 2), text.encode("ascii", "replace").decode(), fill="black", font=font)

    write(f"{title}: target, true outline (blue), predicted outline (orange), supports", 0)
    top = LINE
    for example, row in zip(examples, rows, strict=True):
        write(example.caption, top)
        page.paste(row, (0, top + LINE))
        top += LINE + row.height
    return page


def _row(example: Example) -> Picture.Image:
    case = example.case
    image, truth = case.target[0].numpy(), case.mask[0].numpy() > 0.5
    large = [
        _tile(image, None, SIDE),
        _tile(image, (truth, TRUE), SIDE),
        _tile(image, (example.prediction, PREDICTED), SIDE),
    ]
    small = [
        _tile(support[0].numpy(), (mask[0].numpy() > 0.5, TRUE), SIDE // 2)
        for support, mask in zip(case.support_images, case.support_masks, strict=True)
    ]
    columns = -(-len(small) // 2)
    row = Picture.new("RGB", (3 * (SIDE + GAP) + columns * (SIDE // 2 + GAP) + GAP, SIDE + GAP), "white")
    for i, tile in enumerate(large):
        row.paste(tile, (GAP + i * (SIDE + GAP), 0))
    for i, tile in enumerate(small):
        row.paste(tile, (GAP + 3 * (SIDE + GAP) + i // 2 * (SIDE // 2 + GAP), i % 2 * (SIDE // 2)))
    return row


def _tile(
    image: NDArray[np.float32], outlined: tuple[NDArray[np.bool_], NDArray[np.float32]] | None, side: int
) -> Picture.Image:
    """image [H, W] in [0, 1] as RGB with at most `side` pixels a side, and the outline of a mask in a colour."""
    scale = side / max(image.shape)
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    grey = Picture.fromarray(np.rint(image * 255).astype(np.uint8)).resize(size, Picture.Resampling.BILINEAR)
    pixels = np.array(grey.convert("RGB"))
    if outlined is not None:
        mask, colour = outlined
        region = np.array(Picture.fromarray(mask).resize(size, Picture.Resampling.NEAREST))
        pixels[region & ~ndimage.binary_erosion(region)] = colour
    return Picture.fromarray(pixels)
