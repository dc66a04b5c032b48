"""Whole models, one target and three support pairs: latency beside FLOPs and memory, at the field's sizes.

The target is a synthetic lesion that is hard to find; with `--pack PACK.npz`, that of the pack which takes the median
number of patches.
"""

import itertools
from pathlib import Path

import pytest
import torch
from harness import compare
from models import SUPPORT, median_case, peak_megabytes, rivals, synthetic_case
from torch.utils.flop_counter import FlopCounterMode

import icseg
from icseg.evaluation import Case
from icseg.sparse.network import expected_foreground
from icseg.sparse.pyramid import Pyramid
from icseg_kernels import upsample_with_patches, use_backend


def counted(run) -> float:
    """FLOPs by torch's counter; the reference backend hides none."""
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@pytest.fixture
def pack(request) -> Path | None:
    return request.config.getoption("--pack")


def case_of(pack: Path | None, side: int) -> tuple[str, Case]:
    """Its name in the results, and the target with its support set."""
    name = f"{side} px S{SUPPORT}"
    if pack is None:
        return name, synthetic_case(side)
    return f"{name} {pack.stem}", median_case(pack, side, icseg.PatchICL.from_pretrained())


@pytest.mark.parametrize("side", [128, 256, 512, 1024])
@torch.inference_mode()
def bench_model(record, pack, side):
    name, case = case_of(pack, side)
    runs = rivals(case)
    same = {
        "UniverSeg, factorised": "UniverSeg, as published",
        "PatchICL, sparse, support encoded before": "PatchICL, sparse",
    }
    flops = {name: counted(run) for name, run in runs.items()}
    memory = {name: peak_megabytes(name, side, case, pack) for name in runs}
    row = compare(
        "model",
        name,
        runs,
        rounds=5 if side < 1024 else 3,
        warm=True,
        tolerance=1e-4,
        same=same,
        flops=flops,
        megabytes=memory,
    )
    record(row, runs["PatchICL, sparse"])


@pytest.mark.parametrize("side", [256, 512, 1024])
@torch.inference_mode()
def bench_whole_image_work(record, pack, side):
    """The work on whole images of a target's path (pyramid, expected foreground, write-back, final map), beside it."""
    name, case = case_of(pack, side)
    model = icseg.PatchICL.from_pretrained()
    target = case.target[None]
    memory = model.encode_support(case.support_images[None], case.support_masks[None])
    levels = model(target, memory=memory).levels

    def work() -> torch.Tensor:
        Pyramid.of(target, len(levels))
        for coarser, finer in itertools.pairwise(levels):
            expected_foreground(coarser.logits)
            map_ = upsample_with_patches(coarser.logits, finer.patch_logits, finer.coords, finer.resolution)
        return map_ / model.network.temperature

    runs = {"a target": lambda: model(target, memory=memory).logits, "its work on whole images": work}
    record(compare("whole-image work", name, runs, tolerance=1e-5, repeats=10), work)
