"""What one call of a model costs, and whether two calls agree."""

from __future__ import annotations

import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels.accelerate.report import Comparison, Cost

REPEATS = 3
# Of the largest output. TF32, which torch lets convolutions use on a GPU, has the mantissa of float16.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def cost(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, fresh: Callable[[], None] | None = None
) -> tuple[Cost, list[Tensor]]:
    """Cost and output tensors of one call in evaluation mode without gradients.

    fresh: called before every call.
    """
    modes = {module: module.training for module in model.modules()}
    cuda = any(t.is_cuda for t in (*model.parameters(), *model.buffers()))

    def call() -> Any:
        torch.default_generator.manual_seed(0)
        if cuda:
            torch.cuda.manual_seed_all(0)
        return model(*args, **kwargs)

    def prepare() -> None:
        if fresh is not None:
            fresh()
        if cuda:
            torch.cuda.synchronize()

    devices = list(range(torch.cuda.device_count())) if cuda else []
    drawn = random.getstate()
    with torch.no_grad(), torch.random.fork_rng(devices):
        try:
            model.eval()
            prepare()
            with FlopCounterMode(display=False) as counter:
                call()
            prepare()
            with LiveTensors() as live:
                outputs = call()
            seconds = []
            for _ in range(REPEATS):
                prepare()
                start = time.perf_counter()
                call()
                if cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        finally:
            for module, training in modes.items():
                module.training = training
            random.setstate(drawn)
    found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return Cost(counter.get_total_flops(), live.peak, statistics.median(seconds)), found


def compare(
    expected: list[Tensor], found: list[Tensor], tolerance: float | None, before: Cost, after: Cost, again: Cost
) -> Comparison:
    """NaN and infinities must be in the same places; outputs of other number or shape differ infinitely."""
    difference, scale = 0.0, 1.0
    if [t.shape for t in expected] != [t.shape for t in found]:
        difference = math.inf
    else:
        for a, b in zip(expected, found, strict=True):
            if a.numel() == 0:
                continue
            x, y = a.double(), b.double()
            same = (x == y) | (x.isnan() & y.isnan())
            gap = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=math.inf, posinf=math.inf).max().item()
            largest = x[x.isfinite()].abs()
            difference = max(difference, gap)
            scale = max(scale, largest.max().item() if largest.numel() else 0.0)
    if tolerance is None:
        tolerance = max((_tolerance(t) for t in expected), default=0.0)
    return Comparison(difference, scale, tolerance, difference <= tolerance * scale, before, after, again)


def _tolerance(output: Tensor) -> float:
    if output.dtype == torch.float32 and output.is_cuda and torch.backends.cudnn.allow_tf32:
        return _TOLERANCES[torch.float16]
    return _TOLERANCES.get(output.dtype, 0.0)


class LiveTensors(TorchDispatchMode):
    """Counts bytes of storages that ops make, while they live; peak: the most at any time.

    What an op allocates and frees within itself does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in known and storage not in self._seen:
                self._seen.add(storage)
                size = storage.nbytes()
                self._now += size
                weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self._now)
        return out

    def _freed(self, size: int) -> None:
        self._now -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
