"""Measure warps and stages of the Triton kernels on this GPU: `python -m icseg_kernels.tune --out table.json`.

Without a script, calls of each op at typical sizes are measured; with one, what the script calls:
`python -m icseg_kernels.tune --out table.json train.py --steps 10`. ICSEG_TUNED=table.json then uses the table.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import icseg_kernels
from icseg_kernels import BlockWeights, triton_launch, tuning
from icseg_kernels.transformer_block.shapes import shapes


def seconds(run: Callable[[], None]) -> float:
    """Median time of a launch on the current device."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20, return_mode="median")) / 1e3


def typical_calls(device: torch.device) -> None:
    """Every op whose launches can be tuned, forward and, where Triton has it, backward."""
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 16):
            _calls(batch, device, dtype)


def _calls(batch: int, device: torch.device, dtype: torch.dtype) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    weights = BlockWeights._make([*(random(*shape) for shape in shapes(128, 256)), 1e-5])
    with torch.no_grad():
        icseg_kernels.transformer_block(random(batch, 68, 128), [random(batch, 300, 256)], weights, heads=4)
    index = torch.stack([torch.randperm(1024, device=device)[:512] for _ in range(batch)])
    for width in (32, 64):
        q, k = random(batch, 4, 256, width), random(batch, 4, 1024, width)
        for selected in (None, index):
            icseg_kernels.selected_attention(q, k, k, index=selected).sum().backward()
    images, coords = random(batch, 4, 256, 256), torch.randint(0, 240, (batch, 64, 2), device=device)
    patches = icseg_kernels.gather_patches(images, coords, 16)
    patches.sum().backward()
    icseg_kernels.scatter_patches(random(*patches.shape), coords, (256, 256)).mean.sum().backward()
    icseg_kernels.group_norm_film(random(batch, 64, 64, 64), 8).sum().backward()
    x, support = random(batch, 64, 64, 64), random(batch, 3, 64, 64, 64)
    weight, bias = random(64, 128, 3, 3), random(64)
    icseg_kernels.cross_conv2d_mean(x, support, weight, bias).sum().backward()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m icseg_kernels.tune", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("icseg-tuned.json"), help="the table (default: %(default)s)")
    parser.add_argument("script", nargs="?", type=Path, help="a Python script whose calls are measured")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    given = parser.parse_args(arguments)
    if missing := triton_launch.missing():
        parser.error("; ".join(missing))
    if triton_launch.INTERPRETED or not torch.cuda.is_available():
        parser.error("a CUDA device is needed, got none")
    if given.script is not None and not given.script.is_file():
        parser.error(f"script must be a file, got {given.script}")
    import triton

    with icseg_kernels.use_backend("triton"), tuning.tuning(seconds) as table:
        if given.script is None:
            typical_calls(torch.device("cuda"))
        else:
            sys.argv = [str(given.script), *given.rest]
            runpy.run_path(str(given.script), run_name="__main__")
    tuning.save(given.out, table, torch.cuda.get_device_name(), triton.__version__)
    print(f"{len(table)} kinds of launches measured: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
