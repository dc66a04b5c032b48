"""Whole models, one target and three support pairs: latency beside FLOPs and memory, at the field's sizes.

The target is a synthetic lesion that is hard to find; with `--pack PACK.npz`, that of the pack which takes the median
number of patches.
"""

import pytest
import torch
from harness import compare
from models import SUPPORT, peak_megabytes, rivals
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import use_backend


def counted(run) -> float:
    """FLOPs by torch's counter; the reference backend hides none."""
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("side", [128, 256, 512, 1024])
@torch.inference_mode()
def bench_model(record, request, side):
    pack = request.config.getoption("--pack")
    runs = rivals(side, pack)
    same = {
        "UniverSeg, factorised": "UniverSeg, as published",
        "PatchICL, sparse, support encoded before": "PatchICL, sparse",
    }
    flops = {name: counted(run) for name, run in runs.items()}
    memory = {name: peak_megabytes(side, name, pack) for name in runs}
    row = compare(
        "model",
        f"{side} px S{SUPPORT}" if pack is None else f"{side} px S{SUPPORT} {pack.stem}",
        runs,
        rounds=5 if side < 1024 else 3,
        tolerance=1e-4,
        same=same,
        flops=flops,
        megabytes=memory,
    )
    record(row, runs["PatchICL, sparse"])
