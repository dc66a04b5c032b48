"""One small call of every op, forward and backward, and of the cascade, on a GPU: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python scripts/sanitize_ops.py triton
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from samples import SAMPLES

import icseg
import icseg_kernels
from icseg_kernels import backend as backends


def cascade_gap(device: str) -> float:
    """Of a forward pass of fixed shapes by Triton, with its support set, to the reference's."""
    model = icseg.PatchICL.from_pretrained(device=device)
    inputs = torch.rand(2, 1, 64, 64), torch.rand(2, 2, 1, 64, 64), (torch.rand(2, 2, 1, 64, 64) > 0.5).float()
    found = []
    for name in ("triton", "reference"):
        with torch.no_grad(), icseg_kernels.use_backend(name):
            found.append(model(*inputs, budget=32).logits)
    return float((found[0] - found[1]).abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["triton", "cuda"])
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--device", default="cuda", help="cpu: in Triton's interpreter")
    given = parser.parse_args()
    torch.set_default_device(given.device)
    served = 0
    for name, prepare in SAMPLES.items():
        if given.only not in name or given.backend not in backends.status()[name.split(" ")[0]]:
            continue
        run = prepare(False)
        found, expected = run(given.backend), run("reference")
        gap = max((float((a - b).abs().nan_to_num().max()) for a, b in zip(found, expected, strict=True) if a.numel()))
        print(f"{name}: largest difference {gap:.1e}", flush=True)
        served += 1
    if given.backend == "triton" and given.only in "cascade":
        print(f"cascade: largest difference {cascade_gap(given.device):.1e}", flush=True)
        served += 1
    if not served:
        parser.error(f"backend must serve at least one op, {given.backend} serves none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
