"""accelerate: exact rewrites of other people's in-context segmentation models, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from icseg_kernels import checks
from icseg_kernels.accelerate import convolutions, cross_network, measure, pairwise
from icseg_kernels.accelerate.report import Change, Comparison, Cost, Report
from icseg_kernels.accelerate.rewrite import Rewritten, Switches

__all__ = ["Change", "Comparison", "Cost", "Report", "accelerate"]


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    split: bool = True,
    commute_mean: bool = True,
    drop_dead_support: bool = True,
    cache_support: bool = True,
    max_memory: int | None = None,
    tolerance: float | None = None,
) -> Report:
    """Rewrite the in-context models found in `model`, in place: the same outputs and gradients for less work.

    Recognised by class name and structure: UniverSeg, TysegXC (Tyche), MultiverSegNet, PairwiseConvAvgModel
    (Neuralizer) and Neuroverse3D; in any other model every CrossConv2d. Only `forward` of module instances is
    replaced: parameters, buffers and state_dict stay as they are, and `Report.undo` takes all of it back.

    Modules are looked up at every call. A call that the rewrites would compute otherwise than the model runs as the
    model's own: with hooks on modules that they leave out, with parts replaced by others than the known ones. In
    training, BatchNorm or dropout on the support path keeps it whole. Copies that nn.DataParallel makes keep nothing
    of a support set.

    model:             any module that is, or holds, such a model.
    example_inputs:    what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
                       The model then runs on them, in evaluation mode and without gradients, before and after: the
                       report compares outputs, FLOPs, peak memory and latency, and a difference above `tolerance`
                       undoes everything.
    split:             convolve targets and supports apart instead of every concatenated pair. The others need it.
    commute_mean:      average what the network averages before its linear maps instead of after.
    drop_dead_support: leave out support features that nothing reads.
    cache_support:     without gradients, keep the part of the first block that depends on the support set alone, and
                       use it again while support set and weights have the same values.
    max_memory:        bytes that the features of the support set may take, without gradients: larger sets go through
                       in chunks, each recomputed for every block, of at least one image. None: no limit.
    tolerance:         of the largest difference over the larger of 1 and the largest output; None: by dtype.

    Raises TypeError or ValueError for an argument of another type or range. A model that nothing is known about comes
    back as it was, and the report says so.

    ```
    report = icseg_kernels.accelerate(model, (target, support_images, support_masks))
    print(report)                           # what was done, what not and why, before and after
    report.undo()
    ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    given = {
        "split": split,
        "commute_mean": commute_mean,
        "drop_dead_support": drop_dead_support,
        "cache_support": cache_support,
    }
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    if max_memory is not None:
        max_memory = checks.integer("max_memory", max_memory, 1, otherwise=" or None")
    if tolerance is not None:
        tolerance = checks.number("tolerance", tolerance)
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0 or None, got {tolerance}")
    arguments = None if example_inputs is None else _arguments(example_inputs)
    switches = Switches(split, commute_mean, drop_dead_support, cache_support, max_memory)
    before, expected = (None, []) if arguments is None else measure.cost(model, *arguments)
    report = _planned(model, switches)
    try:
        for rewritten in report._replaced:
            rewritten.install()
        if arguments is not None and before is not None:
            after, found = measure.cost(model, *arguments, fresh=report.forget)
            again, _ = measure.cost(model, *arguments)
            report.comparison = measure.compare(expected, found, tolerance, before, after, again)
    except BaseException:
        report.undo()
        raise
    if report.comparison is not None and not report.comparison.equal:
        report.undo()
    return report


def _planned(model: nn.Module, switches: Switches) -> Report:
    """What is to be replaced; nothing is yet."""
    changes: list[Change] = []
    replaced: list[Rewritten] = []
    modules = dict(model.named_modules())
    for kind in (cross_network, convolutions, pairwise):
        for name, module in modules.items():
            kind.rewrite(name, module, switches, changes, replaced)
    models = [change.model for change in changes if change.model]
    return Report(tuple(dict.fromkeys(models)), tuple(changes), replaced)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs), {}) if isinstance(example_inputs, list | tuple) else ((example_inputs,), {})
