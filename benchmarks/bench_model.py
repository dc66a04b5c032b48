"""Whole models on one target: latency beside FLOPs and memory, at the field's sizes and numbers of supports.

The target is a synthetic lesion that is hard to find; with `--pack PACK.npz`, that of the pack which takes the median
number of patches. A model that does not fit into memory or takes minutes a call is left out, and the row says why.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import Row, compare
from models import (
    FACTORISED,
    KEPT,
    MOST_SECONDS,
    NAMES,
    SPARSE,
    SUPPORT,
    UNIVERSEG,
    built,
    counted,
    left_out,
    median_case,
    synthetic_case,
)

import icseg
from icseg.evaluation import Case
from icseg.sparse.network import expected_foreground
from icseg.sparse.pyramid import Pyramid
from icseg_kernels import upsample_with_patches

SAME = {FACTORISED: UNIVERSEG, KEPT: SPARSE}


@pytest.fixture
def pack(request) -> Path | None:
    return request.config.getoption("--pack")


def case_of(pack: Path | None, side: int) -> tuple[str, Case]:
    """Its name in the results, and the target with its support set."""
    name = f"{side} px S{SUPPORT}"
    if pack is None:
        return name, synthetic_case(side)
    return f"{name} {pack.stem}", median_case(pack, side, icseg.PatchICL.from_pretrained())


def compared(
    subject: str,
    name: str,
    case: Case,
    names: Sequence[str],
    *,
    rounds: int,
    most_seconds: float = MOST_SECONDS,
) -> Row:
    """The row of these models on a case."""
    runs = {model: built(model, case) for model in names}
    flops = {model: counted(model, run) for model, run in runs.items()}
    reasons = {model: left_out(model, case, flops[model], most_seconds) for model in names}
    out = {model: reason for model, reason in reasons.items() if reason}
    runs = {model: run for model, run in runs.items() if model not in out}
    return compare(
        subject,
        name,
        runs,
        rounds=rounds,
        warm=True,
        tolerance=1e-4,
        same=SAME,
        flops=flops,
        left_out=out,
        limit=120,
        single=10,
    )


@pytest.mark.quick(side=64)
@pytest.mark.quick(side=256)
@pytest.mark.parametrize("side", [64, 128, 256, 512, 1024])
@torch.inference_mode()
def bench_model(record, pack, side):
    name, case = case_of(pack, side)
    row = compared("model", name, case, NAMES, rounds=3)
    record(row, built(KEPT, case))


@pytest.mark.quick(support=1)
@pytest.mark.parametrize("support", [1, 8, 64])  # 3: among the sizes
@torch.inference_mode()
def bench_support_size(record, support):
    """The number of support pairs at 256 px; the published UniverSeg as long as a call takes at most 20 s."""
    case, names = synthetic_case(256, support), (UNIVERSEG, FACTORISED, SPARSE, KEPT)
    row = compared("support size", f"256 px S{support}", case, names, rounds=3, most_seconds=20)
    record(row, built(KEPT, case))


@pytest.mark.quick(side=256)
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
