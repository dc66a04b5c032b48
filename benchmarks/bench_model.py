"""Whole models, one target and three support pairs: latency beside FLOPs and memory, at the field's sizes.

The target is a synthetic lesion that is hard to find; with `--pack PACK.npz`, that of the pack which takes the median
number of patches.
"""

import itertools

import pytest
import torch
from harness import compare
from models import SUPPORT, median_case, peak_megabytes, rivals, synthetic_case
from torch.utils.flop_counter import FlopCounterMode

import icseg
from icseg.sparse.network import expected_foreground
from icseg.sparse.pyramid import Pyramid
from icseg_kernels import upsample_with_patches, use_backend


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
        repeats={name: 10 for name in runs if "sparse" in name},  # one of a series of targets, as in a folder
        tolerance=1e-4,
        same=same,
        flops=flops,
        megabytes=memory,
    )
    record(row, runs["PatchICL, sparse"])


@pytest.mark.parametrize("side", [256, 512, 1024])
@torch.inference_mode()
def bench_whole_image_work(record, request, side):
    """What a target's path does to whole images (resizing, pooling, mean, write-back), beside that path."""
    model = icseg.PatchICL.from_pretrained()
    pack = request.config.getoption("--pack")
    case = synthetic_case(side) if pack is None else median_case(pack, side, model)
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
    case_name = f"{side} px S{SUPPORT}" if pack is None else f"{side} px S{SUPPORT} {pack.stem}"
    record(compare("whole-image work", case_name, runs, tolerance=1e-5, repeats=10), work)
