"""halvings: an image at half its size, at a quarter, ..., and how much its pixels vary within each pixel of those."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch
from icseg_kernels.halvings import native, reference, triton

__all__ = ["halvings"]
_IMPLEMENTATIONS: dict[str, Any] = {"triton": triton, "native": native}


def halvings(
    image: Tensor, count: int, *, deviations: int = 0, backend: str | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Halve an image again and again: each pixel is the mean of the 2 x 2 before it, of those that exist.

    image:      [N, C, h, w] float16, bfloat16, float32 or float64, any strides; h, w > 0.
    count:      of halvings.
    deviations: for how many of them, from the first, the standard deviation is wanted too.
    backend:    None, "triton" (on CUDA devices, not float64, no gradients), "native" (float32 on the CPU, no gradients)
                or "reference"; halvings have the same bits.
    Returns the halvings, the largest first, each [N, C, ceil(h / 2), ceil(w / 2)] of the one before, and for the first
    `deviations` of them the standard deviation, at least 1e-6, of the pixels of `image` inside each pixel, of the same
    shape. Where a row or column is the last and has no partner, a halving counts it twice for the deviation. All
    contiguous, of the dtype of `image`, computed in float32 for the 16-bit types. Differentiable; where a gradient is
    wanted, the reference serves. Autocast changes nothing. Raises TypeError or ValueError for an argument of another
    type, dtype, shape or range, BackendError if the named backend cannot serve.

    ```
    image = torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]])
    halvings(image, 1, deviations=1)                             # [[[[3]]]], [[[[sqrt(5)]]]]
    ```
    """
    checks.floating("image", image)
    shape = image.shape
    if len(shape) != 4 or 0 in shape[2:]:
        raise ValueError(f"image must have shape [N, C, h, w] with h, w > 0, got {list(shape)}")
    count = checks.integer("count", count, 0)
    deviations = checks.integer("deviations", deviations, 0, count)
    name = backends.select("halvings", backend, image)
    if name == "reference":
        found = reference.halvings(image, count, deviations)
    elif backends.unwatched((image,)):
        found = _implementation(image, count, deviations, name)
    else:
        found = _halvings(image, count, deviations, name)
    return found[:count], found[count:]


def _implementation(image: Tensor, count: int, deviations: int, backend: str) -> list[Tensor]:
    found: list[Tensor] = _IMPLEMENTATIONS[backend].halvings(image, count, deviations)
    return found


def _fake(image: Tensor, count: int, deviations: int, backend: str) -> list[Tensor]:
    height, width = image.shape[2:]
    shapes = []
    for _ in range(count):
        height, width = (height + 1) // 2, (width + 1) // 2
        shapes.append((*image.shape[:2], height, width))
    return [image.new_empty(shape) for shape in shapes + shapes[:deviations]]


_halvings = backends.register(
    "halvings(Tensor image, int count, int deviations, str backend) -> Tensor[]", _implementation, _fake
)
backends.declare(
    "halvings",
    {
        "triton": backends.Backend(triton_launch.missing, triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, native.unsupported),
        "reference": backends.Backend(),
    },
)


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


flops.register(_halvings, _no_flops)
