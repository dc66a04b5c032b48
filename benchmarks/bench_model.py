"""Whole models, one target and three support pairs: latency beside FLOPs, for the sizes the field compares."""

import pytest
import torch
from harness import compare
from torch.utils.flop_counter import FlopCounterMode

import icseg
from icseg.baselines.universeg import UniverSeg

SUPPORT = 3


def counted(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("side", [128, 256, 512, 1024])
@torch.inference_mode()
def bench_model(record, side):
    torch.manual_seed(0)
    target = torch.rand(1, 1, side, side)
    images = torch.rand(1, SUPPORT, 1, side, side)
    masks = (torch.rand_like(images) > 0.7).float()
    sparse = icseg.PatchICL.from_pretrained()
    published = icseg.PatchICL(icseg.PatchICLConfig.published(side)).eval()
    dense, unfactorised = (UniverSeg(factorised=f).eval() for f in (True, False))
    unfactorised.load_state_dict(dense.state_dict())
    memory = sparse.encode_support(images, masks)
    rivals = {
        "UniverSeg, as published": lambda: unfactorised(target, images, masks),
        "UniverSeg, factorised": lambda: dense(target, images, masks),
        "PatchICL, published": lambda: published(target, images, masks).logits,
        "PatchICL, sparse": lambda: sparse(target, images, masks).logits,
        "PatchICL, sparse, support encoded before": lambda: sparse(target, memory=memory).logits,
    }
    same = {
        "UniverSeg, factorised": "UniverSeg, as published",
        "PatchICL, sparse, support encoded before": "PatchICL, sparse",
    }
    flops = {name: counted(run) for name, run in rivals.items()}
    rounds = 5 if side < 1024 else 3
    row = compare("model", f"{side} px S{SUPPORT}", rivals, rounds=rounds, tolerance=1e-4, same=same, flops=flops)
    record(row, rivals["PatchICL, sparse"])
