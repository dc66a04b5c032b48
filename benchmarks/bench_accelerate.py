"""accelerate: other people's models as their packages compute them, and rewritten; random weights.

The models are the structural copies of the tests, at their published widths.
"""

import contextlib
import copy
import itertools

import pytest
import torch
from harness import compare
from reference_models import multiverseg, neuralizer, neuroverse3d, tyche, universeg
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import icseg_kernels

WIDTHS = (64,) * 4
MODELS = {
    "UniverSeg": lambda: universeg.UniverSeg(WIDTHS),
    "Tyche": lambda: tyche.TysegXC(WIDTHS),
    "MultiverSeg": lambda: multiverseg.MultiverSegNet(WIDTHS),
    "Neuralizer": lambda: neuralizer.PairwiseConvAvgModel(4, 1, 1, 64, 2),
    "Neuroverse3D": lambda: neuroverse3d.Neuroverse3D((32, 64, 128, 256, 512), 3),
}
CASES = [
    *itertools.product(("UniverSeg", "Tyche", "MultiverSeg", "Neuralizer"), (1, 3)),
    ("UniverSeg", 16),
    ("UniverSeg", 64),
    ("Neuroverse3D", 3),
]
SIDE, VOLUME = 128, (32, 32, 32)  # pixels; what Neuroverse3D is given
CANDIDATES = 4  # Tyche's masks of a target
LIMIT = 2**26  # bytes of support features: 16 images
BEFORE, AFTER, AGAIN = "as published", "accelerated", "accelerated, support seen before"
CHUNKS = f"accelerated, max_memory {LIMIT >> 20} MiB"


def inputs(name: str, support: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = VOLUME if name == "Neuroverse3D" else (SIDE, SIDE)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(1, *shape, *size, generator=generator)

    images, masks = random(support, 1), (random(support, 1) > 0.5).float()
    if name in ("Neuralizer", "Neuroverse3D"):
        return {"context_in": images, "context_out": masks, "target_in": random(1)}
    found = {"support_images": images, "support_labels": masks}
    if name == "Tyche":
        return found | {"target_image": random(CANDIDATES, 1), "noise_image": random(CANDIDATES, 1)}
    return found | {"target_image": random(5 if name == "MultiverSeg" else 1)}


@pytest.mark.quick(name="UniverSeg", support=3)
@pytest.mark.parametrize(("name", "support"), CASES)
@torch.inference_mode()
def bench_accelerate(record, name, support):
    torch.manual_seed(0)
    model, given = MODELS[name]().eval(), inputs(name, support)
    faster, bounded = copy.deepcopy(model), copy.deepcopy(model)
    report = icseg_kernels.accelerate(faster)
    icseg_kernels.accelerate(bounded, max_memory=LIMIT, cache_support=False)

    def unseen() -> torch.Tensor:
        report.forget()
        return faster(**given)

    runs = {BEFORE: lambda: model(**given)}
    if support == 64:
        runs[CHUNKS] = lambda: bounded(**given)
    runs |= {AFTER: unseen, AGAIN: lambda: faster(**given)}
    flops = {}
    for rival, run in runs.items():
        # On tensors without values, so in no time, but where values decide what is kept and used again.
        fake = FakeTensorMode(allow_non_fake_inputs=True) if rival in (BEFORE, CHUNKS) else contextlib.nullcontext()
        with FlopCounterMode(display=False) as counter, fake:
            run()
        flops[rival] = float(counter.get_total_flops())
    size = " x ".join(map(str, VOLUME)) if name == "Neuroverse3D" else SIDE
    case, rounds = f"{name} {size} px S{support}", 1 if support == 64 else 3
    row = compare("accelerate", case, runs, tolerance=1e-4, rounds=rounds, flops=flops, warm=True)
    record(row, runs[AGAIN])
