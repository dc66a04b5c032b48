"""A forward pass of fixed shapes as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icseg.config import check_int
from icseg.memory import SupportMemory
from icseg.output import SegmentationOutput
from icseg.sparse.static import static_shapes

if TYPE_CHECKING:
    from icseg.model import PatchICL

WARM_UPS = 3  # passes before the capture, which compile kernels and fill caches


class CapturedForward:
    """What `PatchICL.graph` returns: `captured(target)` or `captured(target, support_images, support_masks)`.

    The tensors of its SegmentationOutput belong to the graph: the next call writes over them. Clone what you keep.
    """

    def __init__(
        self, model: PatchICL, inputs: dict[str, Tensor], memory: SupportMemory | None, options: dict[str, Any]
    ) -> None:
        """inputs: of the shapes to be captured, of any values; the graph reads these very tensors."""
        self._inputs, self._memory = inputs, memory
        if memory is not None:
            options = options | {"memory": memory}

        @torch.no_grad()
        def run() -> SegmentationOutput:
            return model(**inputs, **options)

        with static_shapes():
            self._replay, self._output = _captured(run)

    def __call__(
        self, target: Tensor, support_images: Tensor | None = None, support_masks: Tensor | None = None
    ) -> SegmentationOutput:
        """Segment inputs of the captured shapes; support_images and support_masks are None if a memory was given.

        target: [B, 1, H, W], support_images: [B, S, 1, h, w], support_masks: [B, S, C, h, w]; floating-point. Raises
        ValueError or TypeError for others.
        """
        given = {"target": target, "support_images": support_images, "support_masks": support_masks}
        for name, tensor in given.items():
            _check(name, tensor, self._inputs.get(name))
        for name, captured in self._inputs.items():
            tensor = given[name]
            assert tensor is not None
            captured.copy_(tensor, non_blocking=True)
        self._replay()
        return self._output

    def set_memory(self, memory: SupportMemory) -> None:
        """Use another support set, whose tensors have the shapes of the captured one's; theirs are copied."""
        own = self._memory
        if own is None:
            raise ValueError("memory must not be set: this pass was captured with support images")
        memory.check_model(own.fingerprint, own.weights)
        own_shapes = {name: tuple(tensor.shape) for name, tensor in own.tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in memory.tensors.items()}
        if shapes != own_shapes:
            wrong = sorted(n for n in {*shapes, *own_shapes} if shapes.get(n) != own_shapes.get(n))[0]
            raise ValueError(
                f"memory must have the shapes of the captured one, {wrong} {own_shapes.get(wrong)}, "
                f"got {shapes.get(wrong)}"
            )
        for name, tensor in own.tensors.items():
            tensor.copy_(memory.tensors[name], non_blocking=True)


def capture(
    model: PatchICL,
    batch: int,
    size: tuple[int, int],
    memory: SupportMemory | None,
    support: int | None,
    support_size: tuple[int, int] | None,
    classes: int,
    options: dict[str, Any],
) -> CapturedForward:
    """`PatchICL.graph`; options: further arguments of the forward pass."""
    parameter = next(model.parameters())
    check_int("batch", batch, 1)
    inputs = {"target": parameter.new_zeros(batch, 1, *_sides("size", size))}
    if (memory is None) == (support is None):
        raise ValueError(f"one of memory and support must be given, got {'neither' if memory is None else 'both'}")
    if support is not None:
        check_int("support", support, 1)
        check_int("classes", classes, 1)
        sides = _sides("support_size", size if support_size is None else support_size)
        inputs["support_images"] = parameter.new_zeros(batch, support, 1, *sides)
        inputs["support_masks"] = parameter.new_zeros(batch, support, classes, *sides)
    elif support_size is not None or classes != 1:
        raise ValueError("support_size and classes must not be given with a memory, which has its own")
    if memory is not None:
        memory.check_target(inputs["target"])
        tensors = {name: tensor.clone() for name, tensor in memory.tensors.items()}
        memory = SupportMemory(memory.fingerprint, memory.batch, tensors, memory.classes, memory.weights)
    if model.training:
        raise ValueError("the model must be in evaluation mode (model.eval()), got one in training mode")
    if parameter.device.type != "cuda":
        raise ValueError(
            f"the model must be on a CUDA device, of which a graph can be captured, got {parameter.device}"
        )
    with torch.cuda.device(parameter.device):
        return CapturedForward(model, inputs, memory, options)


def _sides(name: str, size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"{name} must be a pair (height, width), got {size!r}")
    height, width = size
    check_int(name, height, 1)
    check_int(name, width, 1)
    return height, width


def _check(name: str, tensor: Tensor | None, captured: Tensor | None) -> None:
    if captured is None:
        if tensor is not None:
            raise ValueError(f"{name} must be None, since this pass was captured with a memory")
        return
    shape = list(captured.shape)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(tensor).__name__}")
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have the captured shape {shape}, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating-point, in [0, 1], got {tensor.dtype}")


def _captured(run: Callable[[], SegmentationOutput]) -> tuple[Callable[[], None], SegmentationOutput]:
    """A replay of `run`, and the output whose tensors it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output
