"""The whole models that are compared, on one task at a size; and, as a program, the peak memory of one of them.

`python benchmarks/models.py SIDE NAME [PACK]` prints the most megabytes that one call holds beyond the model and its
inputs (on Linux).
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import icseg
from icseg.baselines.universeg import UniverSeg
from icseg.data.synthetic import EVALUATION_SEED, generate_task, pool_task_seed
from icseg.data.tensors import as_tensors
from icseg.evaluation import Case, Pack, pack_cases

SUPPORT = 3
TASK = pool_task_seed(EVALUATION_SEED, 0)
FAMILY = "lesion"


def synthetic_case(side: int) -> Case:
    """A lesion that is hard to find, drawn at `side` pixels."""
    task = generate_task(TASK, SUPPORT + 1, side, FAMILY)
    images, masks = as_tensors(task.images, task.masks)
    return Case(images[0], masks[0], images[1:], masks[1:], 0, 0)


def median_case(pack: Path, side: int, model: icseg.PatchICL) -> Case:
    """The target of a pack's first class, resized to `side` pixels, that takes the median number of patches."""
    cases = list(pack_cases(Pack.load(pack), 1, support=SUPPORT, size=side)[1])

    def patches(case: Case) -> int:
        output = model(case.target[None], case.support_images[None], case.support_masks[None])
        return sum(level.coords.shape[1] for level in output.levels)

    return sorted(cases, key=patches)[len(cases) // 2]


@torch.inference_mode()
def rivals(side: int, pack: Path | None = None) -> dict[str, Callable[[], Tensor]]:
    """One target and its support set of `side` pixels through each model; ours last."""
    sparse = icseg.PatchICL.from_pretrained()
    case = synthetic_case(side) if pack is None else median_case(pack, side, sparse)
    target, images, masks = case.target[None], case.support_images[None], case.support_masks[None]
    torch.manual_seed(0)
    published = icseg.PatchICL(icseg.PatchICLConfig.published(side)).eval()
    dense, unfactorised = (UniverSeg(factorised=f).eval() for f in (True, False))
    unfactorised.load_state_dict(dense.state_dict())
    memory = sparse.encode_support(images, masks)
    return {
        "UniverSeg, as published": lambda: unfactorised(target, images, masks),
        "UniverSeg, factorised": lambda: dense(target, images, masks),
        "PatchICL, published": lambda: published(target, images, masks).logits,
        "PatchICL, sparse": lambda: sparse(target, images, masks).logits,
        "PatchICL, sparse, support encoded before": lambda: sparse(target, memory=memory).logits,
    }


def peak_megabytes(side: int, name: str, pack: Path | None = None) -> float:
    """Of one call, in a process of its own."""
    command = [sys.executable, __file__, str(side), name, *([] if pack is None else [str(pack)])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.inference_mode()
def main(side: str, name: str, pack: str | None = None) -> None:
    run = rivals(int(side), None if pack is None else Path(pack))[name]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _kilobytes("VmRSS")
    run()
    print((_kilobytes("VmHWM") - before) / 1024)


def _kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")))


if __name__ == "__main__":
    main(*sys.argv[1:])
