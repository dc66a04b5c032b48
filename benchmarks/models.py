"""The whole models that are compared, on one focal task at a size; and, as a program, the peak memory of one of them.

`python benchmarks/models.py SIDE NAME` prints the most megabytes that one call holds beyond the model and its inputs
(on Linux).
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

SUPPORT = 3
TASK = pool_task_seed(EVALUATION_SEED, 0)
FAMILY = "lesion"


def rivals(side: int) -> dict[str, Callable[[], Tensor]]:
    """One target and its support set, drawn at `side` pixels, through each model; ours last."""
    task = generate_task(TASK, SUPPORT + 1, side, FAMILY)
    pictures, labels = as_tensors(task.images, task.masks)
    target, images, masks = pictures[:1], pictures[None, 1:], labels[None, 1:]
    torch.manual_seed(0)
    sparse = icseg.PatchICL.from_pretrained()
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


def peak_megabytes(side: int, name: str) -> float:
    """Of one call, in a process of its own."""
    command = [sys.executable, __file__, str(side), name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.inference_mode()
def main(side: str, name: str) -> None:
    run = rivals(int(side))[name]
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
