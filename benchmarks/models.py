"""The whole models that are compared, on one task at a size; and, as a program, the peak memory of one of them.

`python benchmarks/models.py NAME SIDE [PACK NUMBER]` prints the most megabytes that one call holds beyond the model and
its inputs (on Linux).
"""

from __future__ import annotations

import ctypes
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
from icseg.evaluation import Case, load_dataset, pack_cases

SUPPORT = 3
TASK = pool_task_seed(EVALUATION_SEED, 0)
FAMILY = "lesions"
NAMES = (
    "UniverSeg, as published",
    "UniverSeg, factorised",
    "PatchICL, published",
    "PatchICL, sparse",
    "PatchICL, sparse, support encoded before",
)


def synthetic_case(side: int) -> Case:
    """A lesion that is hard to find, drawn at `side` pixels."""
    task = generate_task(TASK, SUPPORT + 1, side, FAMILY)
    images, masks = as_tensors(task.images, task.masks)
    return Case(images[0], masks[0], images[1:], masks[1:], 0, 0)


def median_case(pack: Path, side: int, model: icseg.PatchICL) -> Case:
    """The target of a pack's first class, resized to `side` pixels, that takes the median number of patches."""

    def patches(case: Case) -> int:
        output = model(case.target[None], case.support_images[None], case.support_masks[None])
        return sum(level.coords.shape[1] for level in output.levels)

    cases = sorted(_cases(pack, side), key=patches)
    return cases[len(cases) // 2]


def _cases(pack: Path, side: int) -> list[Case]:
    return list(pack_cases(load_dataset(pack, side), 1, support=SUPPORT))


@torch.inference_mode()
def built(name: str, case: Case) -> Callable[[], Tensor]:
    """A model, of random weights where none are bundled, and a call of it on one target and its support set."""
    target, images, masks = case.target[None], case.support_images[None], case.support_masks[None]
    torch.manual_seed(0)
    if name.startswith("UniverSeg"):
        dense = UniverSeg(factorised=name.endswith("factorised")).eval()
        return lambda: dense(target, images, masks)
    if name == "PatchICL, published":
        published = icseg.PatchICL(icseg.PatchICLConfig.published(target.shape[-1])).eval()
        return lambda: published(target, images, masks).logits
    sparse = icseg.PatchICL.from_pretrained()
    if name == "PatchICL, sparse":
        return lambda: sparse(target, images, masks).logits
    memory = sparse.encode_support(images, masks)
    return lambda: sparse(target, memory=memory).logits


def rivals(case: Case) -> dict[str, Callable[[], Tensor]]:
    """All models on a case; ours last."""
    return {name: built(name, case) for name in NAMES}


def peak_megabytes(name: str, side: int, case: Case, pack: Path | None = None) -> float:
    """Of one call, in a process of its own that holds no other model; `case` is of `pack`, or the synthetic one."""
    command = [sys.executable, __file__, name, str(side), *([] if pack is None else [str(pack), str(case.number)])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.inference_mode()
def main(name: str, side: str, pack: str | None = None, number: str = "0") -> None:
    if pack is None:
        case = synthetic_case(int(side))
    else:
        case = next(case for case in _cases(Path(pack), int(side)) if case.number == int(number))
    run = built(name, case)
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before must not hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _kilobytes("VmRSS")
    run()
    print((_kilobytes("VmHWM") - before) / 1024)


def _kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")))


if __name__ == "__main__":
    main(*sys.argv[1:])
