"""The tail of cross_conv2d by its Triton kernels, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from samples import DEVICE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from icseg_kernels import (
    BackendError,
    backend,
    cross_conv2d,
    cross_conv2d_and_mean,
    cross_conv2d_mean,
    triton_launch,
)
from icseg_kernels.cross_conv import _CrossTail, reference, triton

pytestmark = pytest.mark.skipif(bool(triton_launch.missing()), reason="Triton kernels cannot run here")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="float64 is for the interpreter")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_cuda])]
ACTIVATIONS = [None, "relu", "leaky_relu", "gelu"]
SLOPE = 0.25  # float32 holds it
SETS = [(1, 3), (2, 3), (3, 1)]  # Sx, Sy


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(xs: int, ys: int, dtype: torch.dtype, image: tuple[int, ...] = (3, 5, 19)) -> tuple[Tensor, Tensor]:
    """More elements than a program has, and no multiple of it."""
    return tuple(normal(2, s, *image, seed=s).to(DEVICE, dtype) for s in (xs, ys))


def gradients_of(zx: Tensor, zy: Tensor) -> tuple[Tensor, Tensor]:
    pairs = normal(*zx.shape[:2], *zy.shape[1:], seed=7)
    return pairs.to(zx), normal(*zx.shape, seed=8).to(zx)


def all_of(tail, zx: Tensor, zy: Tensor, pairs: bool, mean: bool, activation: str | None) -> list[Tensor]:
    """Outputs and gradients by one implementation."""
    grads = gradients_of(zx, zy)
    wanted = grads[0] if pairs else None, grads[1] if mean else None
    out = tail.tail(zx, zy, pairs, mean, activation, SLOPE)
    return [*out, *tail.tail_backward(zx, zy, *wanted, activation, SLOPE)]


def assert_as_exact(zx: Tensor, zy: Tensor, pairs: bool, mean: bool, activation: str | None) -> None:
    """Errors against float64 no larger than the reference's in the same dtype, but for a few roundings."""
    found, theirs = (all_of(t, zx, zy, pairs, mean, activation) for t in (triton, reference))
    exact = all_of(reference, zx.double(), zy.double(), pairs, mean, activation)
    for ours, references, oracle in zip(found, theirs, exact, strict=True):
        assert (ours.shape, ours.dtype) == (references.shape, zx.dtype)
        if oracle.numel():
            scale = max(1.0, oracle.abs().max().item())
            allowed = 1.5 * (references.double() - oracle).abs().max().item() + 4 * torch.finfo(zx.dtype).eps * scale
            assert (ours.double() - oracle).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("xs", "ys"), SETS)
def test_is_as_exact_as_the_reference(poisoned, xs, ys, activation, dtype):
    assert_as_exact(*images(xs, ys, dtype), True, True, activation)


@pytest.mark.parametrize(("pairs", "mean"), [(True, False), (False, True)])
@pytest.mark.parametrize(("xs", "ys"), [(1, 3), (2, 3), (0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize("image", [(3, 5, 19), (1, 1, 1)])
def test_either_and_empty_sets(poisoned, image, xs, ys, pairs, mean):
    if ys or not mean:
        assert_as_exact(*images(xs, ys, torch.float32, image), pairs, mean, "leaky_relu")


def test_large_images(monkeypatch):
    """Programs of many elements; and programs of several images of y, the last of fewer."""
    monkeypatch.setattr(triton, "_ENOUGH", 1)
    assert_as_exact(*images(1, 3, torch.float32, (2, 20, 31)), True, False, "relu")
    monkeypatch.setattr(triton, "_ENOUGH", 24)
    assert_as_exact(*images(2, 3, torch.float32, (2, 20, 31)), True, False, "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_not_finite_are_the_references(activation):
    """In float64: in float32, torch's own GELU of infinity depends on the machine."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1.0], device=DEVICE).view(1, 1, 1, 1, -1)
    zeros = values.new_zeros(1, 2, 1, 1, 7)
    found = all_of(triton, values, zeros, True, True, activation)
    expected = all_of(reference, values.double(), zeros.double(), True, True, activation)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), equal_nan=True)


def test_strided_views():
    """Read where they lie, or copied where an image's elements are not evenly spaced."""
    zx, zy = images(2, 3, torch.float32)
    expected = all_of(triton, zx, zy, True, True, "gelu")
    apart = (
        zx.permute(2, 3, 4, 1, 0).contiguous().permute(4, 3, 0, 1, 2),
        torch.stack([zy, zy], dim=-1)[..., 0],
        zy.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, zy.shape[:2]),
    )
    for x, y in ((apart[0], apart[1]), (zx, apart[2])):
        for found, wanted in zip(all_of(triton, x, y, True, True, "gelu"), expected, strict=True):
            assert torch.equal(found, wanted)
    same = zx[:, :1, :, :1, :1].expand(2, 3, 3, 5, 19)
    for found, wanted in zip(
        all_of(triton, zx, same, True, True, "gelu"),
        all_of(triton, zx, same.contiguous(), True, True, "gelu"),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    pairs, mean = gradients_of(zx, zy)
    slanted = pairs.mT.contiguous().mT, mean.mT.contiguous().mT
    for found, wanted in zip(triton.tail_backward(zx, zy, *slanted, "gelu", SLOPE), expected[2:], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.skipif(DEVICE != "cpu", reason="address space without memory is the CPU's")
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which few pages are touched: images far apart."""
    zx, zy = images(1, 2, torch.float32)
    far = torch.empty(2**31 + 4096).as_strided(zy.shape, (2**30, 2**30, 95, 19, 1))  # not written: no memory
    far[0].copy_(zy[0])
    far[1].copy_(zy[1])
    assert torch.equal(
        triton.tail(zx, far, True, False, None, SLOPE)[0], triton.tail(zx, far.clone(), True, False, None, SLOPE)[0]
    )


def arguments(xs: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = (2, xs, 2, 5, 4), (2, 3, 2, 5, 4), (3, 4, 3, 3), (3,)
    return tuple(normal(*shape, seed=i).to(DEVICE, dtype) for i, shape in enumerate(shapes))


def by(name: str, activation: str | None, op: Callable[..., object] = cross_conv2d_and_mean):
    return lambda *t: op(*t, activation=activation, negative_slope=SLOPE, backend=name)


def with_gradients(run, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """What run(*tensors) gives, and the gradients of a fixed weighted sum of all of it."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = run(*leaves)
    total = sum((r * normal(*r.shape, seed=5).to(r)).sum() for r in results)
    return [*(r.detach() for r in results), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("xs", [1, 2])
def test_the_whole_op(xs, last):
    """Of images with channels last, outputs have them last; arguments are left as they are."""
    x, y, *rest = arguments(xs, torch.float32)
    if last:
        x, y = (t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, t.shape[:2]) for t in (x, y))
    before = x.clone(), y.clone()
    found, expected = (with_gradients(by(name, "gelu"), (x, y, *rest)) for name in ("triton", "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        pairs, mean = by("triton", "gelu")(x, y, *rest)
        for op, wanted in ((cross_conv2d, pairs), (cross_conv2d_mean, mean)):
            torch.testing.assert_close(by("triton", "gelu", op)(x, y, *rest), wanted)
    torch.testing.assert_close(pairs, found[0])
    torch.testing.assert_close(mean, found[1])
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    if last:
        assert pairs.movedim(3, -1).is_contiguous()
        assert mean.movedim(2, -1).is_contiguous()


@pytest.mark.parametrize(("cx", "cy"), [(0, 2), (2, 0)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_one_of_them_without_channels(activation, cx, cy):
    x, y, w, b = arguments(1, torch.float32)
    tensors = x[:, :, :cx], y[:, :, :cy], w[:, : cx + cy], b
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            found, expected = (by(name, activation)(*tensors) for name in ("triton", "reference"))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize(("xs", "activation"), [(1, "leaky_relu"), (2, "gelu")])
def test_gradcheck(xs, activation):
    zx, zy = (normal(1, s, 1, 1, 2, seed=s).requires_grad_() for s in (xs, 3))
    run = lambda zx, zy: _CrossTail.apply(zx, zy, True, True, activation, SLOPE, "triton")  # noqa: E731
    assert torch.autograd.gradcheck(run, (zx, zy), nondet_tol=0.0)


def test_the_same_bits_twice():
    zx, zy = images(2, 3, torch.float32)
    first, second = (all_of(triton, zx, zy, True, True, "gelu") for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_opcheck():
    zx, zy = images(2, 3, torch.float32, (1, 2, 3))
    grads = gradients_of(zx, zy)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for activation, *wanted in ((None, True, True), ("relu", False, True)):
        options = (activation, SLOPE, "triton")
        torch.library.opcheck(torch.ops.icseg.cross_conv2d_tail.default, (zx, zy, *wanted, *options), test_utils=tests)
        given = tuple(grad if there else None for grad, there in zip(grads, wanted, strict=True))
        torch.library.opcheck(
            torch.ops.icseg.cross_conv2d_tail_backward.default, (zx, zy, *given, *options), test_utils=tests
        )


def test_compile_fullgraph():
    """Values and gradients; new values do not compile anew, and new sizes at most once."""
    run = by("triton", "gelu")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for sy, factor in ((3, 1.0), (3, -2.0), (2, 1.0)):
        x, y, *rest = (factor * t for t in arguments(1, torch.float32))
        tensors = x, y[:, :sy], *rest
        for ours, theirs in zip(with_gradients(compiled, tensors), with_gradients(run, tensors), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert counter.frame_count <= (1 if sy == 3 else 2)


@pytest.mark.gpu
@needs_cuda
def test_cuda_graph():
    zx, zy = images(2, 3, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_of(triton, zx, zy, True, True, "gelu")
        pairs, mean = gradients_of(zx, zy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [
            *triton.tail(zx, zy, True, True, "gelu", SLOPE),
            *triton.tail_backward(zx, zy, pairs, mean, "gelu", SLOPE),
        ]
    zx.mul_(-1.5)
    graph.replay()
    for ours, theirs in zip(captured, all_of(triton, zx, zy, True, True, "gelu"), strict=True):
        assert torch.equal(ours, theirs)


def test_who_serves():
    x = torch.zeros(1, 1, 1, 2, 2, device=DEVICE)
    for op in (cross_conv2d, cross_conv2d_mean, cross_conv2d_and_mean):
        chosen = backend.select(op.__name__, None, x)
        assert (chosen == "triton") == (not triton_launch.slower())
        weight = torch.zeros(1, 2, 1, 1, device="meta")
        with pytest.raises(BackendError, match="it runs on CUDA devices, and x is on meta"):
            by("triton", "relu", op)(x.to("meta"), x.to("meta"), weight)


def test_operators_called_directly_check_sizes():
    zx, zy = torch.zeros(2, 2, 3, 4, 5, device=DEVICE), torch.zeros(2, 3, 3, 4, 5, device=DEVICE)
    tail, backward = torch.ops.icseg.cross_conv2d_tail, torch.ops.icseg.cross_conv2d_tail_backward
    for wrong in (zy[:1], zy[:, :, :2], zy[0], zy.double()):
        with pytest.raises(ValueError, match="zx and zy must have shapes"):
            tail(zx, wrong, True, True, None, 0.1, "triton")
    with pytest.raises(ValueError, match="the gradient of pairs must have shape"):
        backward(zx, zy, zx, None, None, 0.1, "triton")
    with pytest.raises(ValueError, match="the gradient of mean must have shape"):
        backward(zx, zy, None, zy, None, 0.1, "triton")
    with pytest.raises(ValueError, match="zy must hold at least one image to take the mean of, got Sy = 0"):
        tail(zx, zy[:, :0], False, True, None, 0.1, "triton")
