"""How hard the synthetic tasks are without a model, and how fast they are made: a table of all families.

```
python benchmarks/synthetic_tasks.py --tasks 64 --sheet docs/images/synthetic_tasks.jpg
```

Seeds are those of the evaluation's tasks. The rate is of the process's own time, on one thread. `--sheet` draws two
tasks of each family, with the outlines of their classes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from icseg.baselines.floors import copy_support, intensity_band, otsu
from icseg.data.synthetic import (
    EVALUATION_SEED,
    FAMILIES,
    GENERATOR_VERSION,
    SyntheticTask,
    TaskBatch,
    generate_task,
    generate_tasks,
    pool_task_seed,
)
from icseg.files import check_file, written_whole
from icseg.metrics import dice
from icseg.overlay import PALETTE

SUPPORTS = 3
RESULTS = Path(__file__).parent / "results" / "synthetic-tasks.json"
COLUMNS = {
    "copy": "copied mask",
    "otsu": "Otsu",
    "band": "intensity band",
    "foreground": "foreground",
    "tasks_per_second": "tasks a second",
}
TILE, GAP, LINE = 112, 2, 15  # pixels of the contact sheet
EXAMPLES = 2  # tasks of a family on it


def floors(tasks: TaskBatch) -> dict[str, float]:
    """Mean Dice of each floor on the last subject, with the others as supports, and the mean share of class 1."""
    images, masks = tasks.images.unsqueeze(2).float() / 255, tasks.masks.unsqueeze(2) == 1
    supports, target = (images[:, :-1], masks[:, :-1].float()), images[:, -1]
    found = {
        "copy": copy_support(supports[1]),
        "otsu": otsu(target, masks[:, -1]),
        "band": intensity_band(target, *supports),
    }
    scores = {name: dice(mask, masks[:, -1]).mean().item() for name, mask in found.items()}
    return scores | {"foreground": masks.float().mean().item()}


def measure(family: str, seeds: Tensor, size: int) -> dict[str, Any]:
    """One row of the results."""
    generate_tasks(seeds[:1], SUPPORTS + 1, size, family=family)  # what is made once and kept is no part of the rate
    start = time.process_time()
    tasks = generate_tasks(seeds, SUPPORTS + 1, size, family=family)
    seconds = time.process_time() - start
    return {
        "family": family,
        "generator": GENERATOR_VERSION,
        "tasks": len(seeds),
        "size": size,
        "supports": SUPPORTS,
        **floors(tasks),
        "tasks_per_second": len(seeds) / seconds,
        "machine": machine(),
        "torch": torch.__version__,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| family | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        scores = [f"{row[name]:.3f}" for name in ("copy", "otsu", "band", "foreground")]
        lines.append(" | ".join([f"| {row['family']}", *scores, f"{row['tasks_per_second']:.1f} |"]))
    return "\n".join(lines)


def contact_sheet(size: int) -> Image.Image:
    """A row a family: EXAMPLES tasks of four subjects each, a colour a class."""
    width = EXAMPLES * (SUPPORTS + 1) * (TILE + GAP) + (EXAMPLES - 1) * 4 * GAP
    page = Image.new("RGB", (width, len(FAMILIES) * (LINE + TILE + GAP)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for row, family in enumerate(FAMILIES):
        top = row * (LINE + TILE + GAP)
        draw.text((GAP, top + 1), family, fill="black", font=font)
        for example in range(EXAMPLES):
            seed = pool_task_seed(EVALUATION_SEED, EXAMPLES * row + example)
            task = generate_task(seed, SUPPORTS + 1, size, family)
            left = example * ((SUPPORTS + 1) * (TILE + GAP) + 4 * GAP)
            for number, tile in enumerate(_tiles(task)):
                page.paste(tile, (left + number * (TILE + GAP), top + LINE))
    return page


def _tiles(task: SyntheticTask) -> list[Image.Image]:
    return [_tile(image, mask) for image, mask in zip(task.images, task.masks, strict=True)]


def _tile(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> Image.Image:
    grey = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.BOX)
    classes = np.array(Image.fromarray(mask).resize((TILE, TILE), Image.Resampling.NEAREST))
    pixels = np.array(grey.convert("RGB"))
    for number in range(1, classes.max() + 1):
        region = classes == number
        pixels[region & ~ndimage.binary_erosion(region)] = PALETTE[number - 1]
    return Image.fromarray(pixels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=64, help="of each family")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file of the rows")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet: a JPEG file")
    given = parser.parse_args(arguments)
    check_file(given.out)
    if given.sheet:
        check_file(given.sheet)
    torch.set_num_threads(1)
    seeds = torch.tensor([pool_task_seed(EVALUATION_SEED, index) for index in range(given.tasks)])
    rows = [measure(family, seeds, given.size) for family in FAMILIES]
    with written_whole(given.out) as path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if given.sheet:
        with written_whole(given.sheet) as path:
            contact_sheet(given.size).save(path, format="JPEG", quality=82, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
