"""The gradient of an optimiser step: the mean over its micro-batches, whichever process did them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icseg.losses import TERMS
from icseg.training.distributed import Processes

_MOST_LEVELS = 16
_LOSSES = {
    name: i for i, name in enumerate(["total", *(f"{term}/{level}" for term in TERMS for level in range(_MOST_LEVELS))])
}


class GradientMean:
    """Gradients and losses of micro-batches, summed here and then over the processes.

    Not DistributedDataParallel: one sum a step, of one flat tensor, takes accumulation, parameters that a micro-batch
    does not use, and a loss that is not finite as they come. The sum is in float64, where the order of a few float32
    numbers is lost in the last rounding: one process and several give the same mean.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self._parameters]
        self._sum = torch.zeros(sum(sizes), dtype=torch.float64, device=self._parameters[0].device)
        self._parts = self._sum.split(sizes)
        self._clear()

    def _clear(self) -> None:
        self._sum.zero_()
        self._used = torch.zeros(len(self._parameters), dtype=torch.float64)
        self._losses: list[dict[str, Tensor]] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take the gradients that `backward` has left on the parameters, and the losses as `segmentation_loss` gives
        them, of one micro-batch."""
        for i, (parameter, part) in enumerate(zip(self._parameters, self._parts, strict=True)):
            if parameter.grad is not None:
                part += parameter.grad.flatten()
                self._used[i] = 1
                parameter.grad = None
        self._losses.append({name: value.detach() for name, value in losses.items()})

    def finish(self, processes: Processes, count: int) -> dict[str, float]:
        """Leave the mean over the step's `count` micro-batches on the parameters; the means of the losses.

        A parameter that no micro-batch used has no gradient. A loss is averaged over the micro-batches that have it: a
        small image has fewer levels. What is not finite in one micro-batch is not finite in the means. Starts anew.
        """
        sums = torch.zeros(2, len(_LOSSES), dtype=torch.float64)
        for losses in self._losses:
            columns = [_LOSSES[name] for name in losses]
            sums[0, columns] += torch.stack(list(losses.values())).double().cpu()
            sums[1, columns] += 1
        small = torch.cat([self._used, sums.flatten()])
        processes.add_up(small)
        processes.add_up(self._sum)
        used, total, times = small.split([len(self._used), len(_LOSSES), len(_LOSSES)])
        for parameter, part, uses in zip(self._parameters, self._parts, used.tolist(), strict=True):
            # empty_like: in the parameter's memory layout, as autograd leaves it.
            parameter.grad = torch.empty_like(parameter).copy_((part / count).view_as(parameter)) if uses else None
        means = (total / times).tolist()
        self._clear()
        return {name: means[i] for name, i in _LOSSES.items() if times[i]}
