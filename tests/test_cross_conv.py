"""cross_conv2d and cross_conv2d_mean against a convolution of the concatenated pairs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from samples import BACKENDS, needs_native
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import BackendError, cross_conv2d, cross_conv2d_and_mean, cross_conv2d_mean, library
from icseg_kernels.cross_conv import native, reference

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "gelu": F.gelu,
}

B, SX, SY, CX, CY, CO, H, W = 2, 2, 3, 4, 3, 5, 9, 7

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_padding": {"padding": 0},
    "valid": {"padding": "valid"},
    "pair": {"padding": (2, 1), "stride": (2, 1)},
    "strided": {"padding": 1, "stride": 2},
    "dilated": {"dilation": (2, 1)},
    "dilated_strided": {"padding": 2, "dilation": 2, "stride": 2},
    "reflect": {"padding_mode": "reflect"},
    "replicate": {"padding_mode": "replicate", "padding": (2, 3)},
    "circular": {"padding_mode": "circular", "padding": 1, "stride": 2},
}


def arguments(
    *, kernel: tuple[int, int] = (3, 3), dtype: torch.dtype = torch.float64, sy: int = SY, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((B, SX, CX, H, W), (B, sy, CY, H, W), (CO, CX + CY, *kernel), (CO,))
    x, y, w, b = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return x, y, w, b if bias else None


def concatenated(x: Tensor, y: Tensor, w: Tensor, b: Tensor | None, **settings: Any) -> Tensor:
    """torch.nn.Conv2d over every pair, which this op never builds."""
    pairs = torch.cat(
        [
            x[:, :, None].expand(-1, -1, y.shape[1], -1, -1, -1),
            y[:, None].expand(-1, x.shape[1], -1, -1, -1, -1),
        ],
        dim=3,
    )
    conv = torch.nn.Conv2d(
        w.shape[1], w.shape[0], w.shape[2:], bias=b is not None, **{"padding": "same", **settings}
    ).to(w.dtype)
    names = {"weight": w} if b is None else {"weight": w, "bias": b}
    return torch.func.functional_call(conv, names, pairs.flatten(0, 2)).unflatten(0, pairs.shape[:3])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_is_the_concatenated_convolution(settings: str, bias: bool, kernel: tuple[int, int]) -> None:
    tensors, options = arguments(kernel=kernel, bias=bias), SETTINGS[settings]
    expected = concatenated(*tensors, **options)
    close(cross_conv2d(*tensors, **options), expected)
    close(cross_conv2d_mean(*tensors, **options), expected.mean(dim=2))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_same_padding_of_even_kernels(mode: str) -> None:
    tensors = arguments(kernel=(2, 4))
    out = cross_conv2d(*tensors, padding_mode=mode)
    assert out.shape == (B, SX, SY, CO, H, W)
    close(out, concatenated(*tensors, padding_mode=mode))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """The tolerance is a few roundings of outputs of about 10."""
    tensors = arguments(dtype=dtype)
    exact = concatenated(*(t.double() for t in tensors if t is not None))
    for out, expected in (
        (cross_conv2d(*tensors), exact),
        (cross_conv2d_mean(*tensors), exact.mean(dim=2)),
    ):
        assert out.dtype == dtype
        assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_by_hand() -> None:
    x = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1, 1)
    y = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1, 1)
    weight = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    out = cross_conv2d(x, y, weight, torch.tensor([100.0]))
    assert out.flatten(1).tolist() == [[107.0, 112.0, 108.0, 113.0]]
    assert cross_conv2d_mean(x, y, weight, torch.tensor([100.0])).flatten().tolist() == [109.5, 110.5]


@pytest.mark.parametrize("op", [cross_conv2d, cross_conv2d_mean])
@pytest.mark.parametrize("settings", ["default", "pair", "reflect"])
def test_gradients(op: Callable[..., Tensor], settings: str) -> None:
    x, y, w, b = arguments()
    inputs = tuple(t.detach().requires_grad_() for t in (x[:1, :, :2, :5, :4], y[:1, :2, :2, :5, :4], w[:2, :4], b[:2]))
    assert torch.autograd.gradcheck(lambda *t: op(*t, **SETTINGS[settings]), inputs)


@pytest.mark.parametrize("op", [cross_conv2d, cross_conv2d_mean])
def test_strided_views(op: Callable[..., Tensor]) -> None:
    x, y, w, b = arguments()
    apart = (
        x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        y.repeat(1, 1, 1, 1, 2)[..., :W],
        w.mT.contiguous().mT,
    )
    close(op(*apart, b), op(x, y, w, b))


@pytest.mark.parametrize("shape", [(0, SX, SY), (B, 0, SY), (B, SX, 0)])
def test_empty_sets(shape: tuple[int, int, int]) -> None:
    b, sx, sy = shape
    _, _, weight, bias = arguments()
    x = torch.zeros(b, sx, CX, H, W, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(b, sy, CY, H, W, dtype=torch.float64, requires_grad=True)
    out = cross_conv2d(x, y, weight, bias)
    assert out.shape == (b, sx, sy, CO, H, W)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(y.grad, torch.zeros_like(y))


def test_order_of_the_supports_only_permutes_the_output() -> None:
    x, y, w, b = arguments()
    order = torch.tensor([2, 0, 1])
    close(cross_conv2d(x, y[:, order], w, b), cross_conv2d(x, y, w, b)[:, :, order])
    close(cross_conv2d_mean(x, y[:, order], w, b), cross_conv2d_mean(x, y, w, b))


@pytest.mark.parametrize(("cx", "cy"), [(0, CY), (CX, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", ["default", "pair", "reflect"])
def test_one_of_them_without_channels(settings: str, bias: bool, cx: int, cy: int) -> None:
    x, y, w, b = arguments(bias=bias)
    tensors, options = (x[:, :, :cx], y[:, :, :cy], w[:, : cx + cy], b), SETTINGS[settings]
    expected = concatenated(*tensors, **options)
    close(cross_conv2d(*tensors, **options), expected)
    close(cross_conv2d_mean(*tensors, **options), expected.mean(dim=2))


@pytest.mark.parametrize(
    ("op", "settings"), [(cross_conv2d, "default"), (cross_conv2d, "reflect"), (cross_conv2d_mean, "pair")]
)
def test_compile_fullgraph(op: Callable[..., Tensor], settings: str) -> None:
    """Values and gradients; new values do not compile anew, and new sizes at most once."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: op(*t, **SETTINGS[settings]), fullgraph=True, backend=counter)
    for sy, factor in ((3, 1.0), (3, -2.0), (4, 1.0), (5, 0.5)):
        ours, theirs = ([(factor * t).requires_grad_() for t in arguments(sy=sy)] for _ in range(2))
        out, expected = compiled(*ours), op(*theirs, **SETTINGS[settings])
        close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            close(a.grad, b.grad, 1e-11)
        assert counter.frame_count <= (1 if sy == 3 else 2)


@pytest.mark.parametrize("op", [cross_conv2d, cross_conv2d_mean])
def test_autocast_is_the_op_on_narrow_inputs(op: Callable[..., Tensor]) -> None:
    wide = [t.requires_grad_() for t in arguments(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = op(*wide)
        mixed = op(wide[0], wide[1].bfloat16(), *wide[2:])
    assert torch.equal(out, op(*(t.bfloat16() for t in wide)))
    assert torch.equal(mixed, out)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {t.grad.dtype for t in wide} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*arguments()).dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 4, 9, 7)}, ValueError, r"x must have shape \[B, Sx, Cx, H, W\] with H, W > 0, got"),
        ({"y": torch.zeros(3, 3, 3, 9, 7)}, ValueError, r"B, H, W = 2, 9, 7, got \[3, 3, 3, 9, 7\]"),
        ({"y": torch.zeros(2, 3, 3, 9, 6)}, ValueError, r"B, H, W = 2, 9, 7, got \[2, 3, 3, 9, 6\]"),
        ({"weight": torch.zeros(5, 8, 3, 3)}, ValueError, r"\[Co, 7, kh, kw\].*got \[5, 8, 3, 3\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[5\], got \[4\]"),
        ({"x": torch.zeros(2, 2, 4, 0, 7)}, ValueError, r"with H, W > 0, got \[2, 2, 4, 0, 7\]"),
        ({"x": torch.zeros(2, 2, 4, 9, 7).double()}, TypeError, "y must have the dtype of x, torch.float64, got"),
        ({"x": torch.zeros(2, 2, 4, 9, 7).int()}, TypeError, "x must be a floating-point tensor .*, got torch.int32"),
        ({"weight": torch.zeros(5, 7, 3, 3).half()}, TypeError, "weight must have the dtype of x, torch.float32, got"),
        ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias must be on cpu, .* got meta"),
        ({"weight": torch.zeros(0, 7, 3, 3)}, ValueError, r"none of them 0, got \[0, 7, 3, 3\]"),
        ({"weight": torch.zeros(5, 7, 0, 3)}, ValueError, r"none of them 0, got \[5, 7, 0, 3\]"),
        ({"x": torch.zeros(2, 2, 0, 9, 7), "y": torch.zeros(2, 3, 0, 9, 7)}, ValueError, "at least one channel"),
        (
            {"weight": torch.zeros(5, 7, 3, 9), "padding": 0},
            ValueError,
            r"weight must fit the padded images of 9 x 7 pixels, got 3 x 9 \(dilated\)",
        ),
        ({"dilation": 5, "padding": (0, 1)}, ValueError, r"padded images of 9 x 9 pixels, got 11 x 11"),
        (
            {"padding": (9, 2), "padding_mode": "reflect"},
            ValueError,
            'padding must be at most 8 x 6 pixels for padding_mode="reflect" of 9 x 7, got 9 x 2',
        ),
        ({"padding": (9, 8), "padding_mode": "circular"}, ValueError, "padding must be at most 9 x 7 pixels"),
        ({"stride": True}, TypeError, "stride must be an integer of at least 1 or a pair of them, got True"),
        ({"stride": 0}, ValueError, "stride must be an integer of at least 1 or a pair of them, got 0"),
        ({"dilation": (1, 1, 1)}, ValueError, "dilation must be a pair of integers, got 3 of them"),
        ({"padding": -1}, ValueError, "padding must be an integer of at least 0 or a pair of them, got -1"),
        ({"padding": "full"}, ValueError, 'padding must be "same", "valid", an integer or a pair of them, got'),
        ({"stride": 2}, ValueError, 'padding="same" needs stride 1'),
        (
            {"padding_mode": "edge"},
            ValueError,
            "padding_mode must be one of zeros, reflect, replicate, circular",
        ),
        ({"activation": "tanh"}, ValueError, "activation must be one of relu, leaky_relu, gelu or None, got 'tanh'"),
        ({"negative_slope": math.inf}, ValueError, "negative_slope must be a finite number, got inf"),
        ({"backend": "cuda"}, BackendError, "cross_conv2d(_mean|_and_mean)? has no cuda backend"),
    ],
)
@pytest.mark.parametrize("op", [cross_conv2d, cross_conv2d_mean, cross_conv2d_and_mean])
def test_errors(op: Callable[..., Tensor], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = dict(zip(("x", "y", "weight", "bias"), arguments(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        op(**{**call, **changes})


def test_mean_of_no_images_is_refused() -> None:
    for op in (cross_conv2d_mean, cross_conv2d_and_mean):
        with pytest.raises(ValueError, match="y must hold at least one image"):
            op(*arguments(sy=0))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def by_hand(*tensors: Tensor | None, activation: str | None) -> tuple[Tensor, Tensor]:
    """Pairs and their mean, as one writes them."""
    pairs = ACTIVATIONS[activation](cross_conv2d(*tensors, backend="reference"))
    return pairs, pairs.mean(dim=2)


def both(activation: str | None, backend: str | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *t: cross_conv2d_and_mean(*t, activation=activation, negative_slope=0.2, backend=backend)


def values_and_gradients(run: Callable[..., tuple[Tensor, Tensor]], tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """What run(*tensors) gives, and the gradients of a fixed weighted sum of all of it."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    results = run(*leaves)
    weights = (torch.randn(r.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) for r in results)
    total = sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True))
    return [*(r.detach() for r in results), *torch.autograd.grad(total, [t for t in leaves if t is not None])]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_activated_pairs_and_their_mean(backend: str, bias: bool, activation: str | None) -> None:
    tensors = arguments(bias=bias)
    found = values_and_gradients(both(activation, backend), tensors)
    expected = values_and_gradients(lambda *t: by_hand(*t, activation=activation), tensors)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, 1e-11)
    with torch.no_grad():
        settings = {"activation": activation, "negative_slope": 0.2, "backend": backend}
        close(cross_conv2d(*tensors, **settings), found[0])
        close(cross_conv2d_mean(*tensors, **settings), found[1])
        for ours, theirs in zip(both(activation, backend)(*tensors), found[:2], strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 16), (37, 59)])
@pytest.mark.parametrize("sets", [(1, 4), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_tail_is_the_reference(
    isa: str, poisoned: None, dtype: torch.dtype, sets: tuple[int, int], size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, s, 3, *size, generator=generator, dtype=dtype) for s in sets)
    weight = torch.randn(2, 6, 1, 1, generator=generator, dtype=dtype)
    tolerance = 20 * torch.finfo(dtype).eps
    for activation in ACTIVATIONS:
        found, expected = (values_and_gradients(both(activation, b), (x, y, weight)) for b in ("native", "reference"))
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs, tolerance * max(1.0, theirs.abs().max().item()))
        one_by_one = [
            run(x, y, weight, activation=activation, negative_slope=0.2, backend="native")
            for run in (cross_conv2d, cross_conv2d_mean)
        ]
        close(one_by_one[0], found[0], 0.0)
        close(one_by_one[1], found[1], 0.0 if activation else tolerance * 8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activated_narrow_dtypes(backend: str, activation: str | None, dtype: torch.dtype, tolerance: float) -> None:
    tensors = arguments(dtype=dtype)
    exact = by_hand(*(t.double() for t in tensors if t is not None), activation=activation)
    for found, expected in zip(both(activation, backend)(*tensors), exact, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_not_finite_are_torchs(backend: str, activation: str | None) -> None:
    """In float64: in float32, torch's own GELU of infinity depends on the instruction set."""
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1.0]).double().view(1, 1, 1, 1, -1)
    x, y, weight = values, values.new_zeros(1, 2, 0, 1, 7), values.new_ones(1, 1, 1, 1)
    pairs, mean = both(activation, backend)(x, y, weight)
    expected = ACTIVATIONS[activation](values)
    torch.testing.assert_close(pairs, expected[:, :, None].expand(1, 1, 2, 1, 1, 7), equal_nan=True)
    torch.testing.assert_close(mean, expected, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("cx", "cy"), [(0, CY), (CX, 0), (1, 1)])
def test_few_channels(backend: str, cx: int, cy: int, activation: str | None) -> None:
    x, y, w, b = arguments()
    tensors = (x[:, :, :cx], y[:, :, :cy], w[:, : cx + cy], b)
    for ours, theirs in zip(both(activation, backend)(*tensors), by_hand(*tensors, activation=activation), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, SX, SY), (B, 0, SY), (B, SX, 0)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_activated_empty_sets(
    backend: str, poisoned: None, shape: tuple[int, int, int], activation: str | None
) -> None:
    b, sx, sy = shape
    _, _, weight, bias = arguments()
    x = torch.zeros(b, sx, CX, H, W, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(b, sy, CY, H, W, dtype=torch.float64, requires_grad=True)
    out = cross_conv2d(x, y, weight, bias, activation=activation, backend=backend)
    assert out.shape == (b, sx, sy, CO, H, W)
    for grad, leaf in zip(torch.autograd.grad(out.sum(), (x, y)), (x, y), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))
    with torch.no_grad():
        assert cross_conv2d(x, y, weight, bias, activation=activation, backend=backend).shape == out.shape


@pytest.mark.parametrize("sx", [1, 2])
def test_inputs_are_left_as_they_are(backend: str, sx: int) -> None:
    """The native tail overwrites what the convolutions gave, and nothing else."""
    x, y, w, b = arguments()
    before = [t.clone() for t in (x, y, w, b)]
    both(None, backend)(x[:, :sx], y, w, b)
    cross_conv2d(x[:, :sx], y, w[:, :, 1:2, 1:2], backend=backend)
    assert all(torch.equal(t, kept) for t, kept in zip((x, y, w, b), before, strict=True))


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("sx", [1, 2])
def test_channels_last_stays_so(backend: str, sx: int, activation: str | None) -> None:
    x, y, w, b = arguments(dtype=torch.float32)
    x = x[:, :sx]
    expected = values_and_gradients(both(activation, backend), (x, y, w, b))
    last = [t.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, t.shape[:2]) for t in (x, y)]
    for ours, theirs in zip(values_and_gradients(both(activation, backend), (*last, w, b)), expected, strict=True):
        close(ours, theirs, 1e-4)
    with torch.no_grad():
        pairs, mean = both(activation, backend)(*last, w, b)
    assert pairs.movedim(3, -1).is_contiguous()
    assert mean.movedim(2, -1).is_contiguous()
    close(pairs, expected[0], 1e-5)
    close(mean, expected[1], 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_threads_change_no_bit(isa: str, threads: Callable[[int], None], activation: str | None) -> None:
    generator = torch.Generator().manual_seed(1)
    zx, zy = (torch.randn(2, s, 3, 70, 101, generator=generator) for s in (2, 3))
    pairs, mean = torch.randn(2, 2, 3, 3, 70, 101, generator=generator), zx + 1
    results = []
    for count in (1, 2):
        threads(count)
        forward = native.tail(zx, zy, True, True, activation, 0.1)
        results.append((*forward, *native.tail_backward(zx, zy, pairs, mean, activation, 0.1)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("op", "activation"),
    [*((cross_conv2d_and_mean, a) for a in ACTIVATIONS), (cross_conv2d, "gelu"), (cross_conv2d_mean, "gelu")],
)
def test_activated_gradcheck(backend: str, activation: str | None, op: Callable[..., Any]) -> None:
    x, y, w, b = arguments()
    inputs = tuple(t.detach().requires_grad_() for t in (x[:1, :, :2, :4, :3], y[:1, :2, :2, :4, :3], w[:2, :4], b[:2]))
    run = lambda *t: op(*t, activation=activation, negative_slope=0.2, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, nondet_tol=0.0)


def test_sums_are_differentiable_twice_and_forward(backend: str) -> None:
    x, y, w, b = (t.detach().requires_grad_() for t in arguments())
    for op in (cross_conv2d, cross_conv2d_mean):
        (grad,) = torch.autograd.grad(op(x, y, w, b, backend=backend).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.sum(), w)[0].abs().sum() > 0
        torch.func.jvp(lambda x, op=op: op(x, y, w, b, backend=backend), (x.detach(),), (x.detach(),))


def test_activated_twice_and_forward_is_refused(backend: str) -> None:
    x, y, w, b = (t.detach().requires_grad_() for t in arguments())
    for op in (cross_conv2d, cross_conv2d_mean):
        out = op(x, y, w, b, activation="gelu", backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(
                lambda x, op=op: op(x, y, w, b, activation="relu", backend=backend), (x.detach(),), (x.detach(),)
            )


@needs_native
@hypothesis_settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_shapes_of_the_tail(data: st.DataObject) -> None:
    batch, xs, ys = (data.draw(st.integers(0, n)) for n in (3, 3, 4))
    image = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24)))
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    pairs, mean = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    mean = mean and ys > 0
    generator = torch.Generator().manual_seed(1)
    zx, zy = (torch.randn(batch, s, *image, generator=generator, dtype=torch.float64) for s in (xs, ys))
    given = (
        torch.randn(batch, xs, ys, *image, generator=generator, dtype=torch.float64) if pairs else None,
        torch.randn(batch, xs, *image, generator=generator, dtype=torch.float64) if mean else None,
    )
    settings = (activation, 0.2)
    for ours, theirs in zip(
        (*native.tail(zx, zy, pairs, mean, *settings), *native.tail_backward(zx, zy, *given, *settings)),
        (*reference.tail(zx, zy, pairs, mean, *settings), *reference.tail_backward(zx, zy, *given, *settings)),
        strict=True,
    ):
        close(ours, theirs)


def test_opcheck_of_the_tail(backend: str) -> None:
    zx, zy = torch.randn(2, 2, 3, 4, 5), torch.randn(2, 3, 3, 4, 5)
    grads = torch.randn(2, 2, 3, 3, 4, 5), torch.randn(2, 2, 3, 4, 5)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for activation, *wanted in ((None, True, True), ("gelu", True, False), ("relu", False, True)):
        arguments = (zx, zy, *wanted, activation, 0.1, backend)
        torch.library.opcheck(torch.ops.icseg.cross_conv2d_tail.default, arguments, test_utils=tests)
        given = tuple(grad if there else None for grad, there in zip(grads, wanted, strict=True))
        torch.library.opcheck(
            torch.ops.icseg.cross_conv2d_tail_backward.default,
            (zx, zy, *given, activation, 0.1, backend),
            test_utils=tests,
        )


def test_compile_pairs_and_mean(backend: str) -> None:
    run = both("leaky_relu", backend)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for sy, factor in ((3, 1.0), (3, -2.0), (4, 1.0), (5, 1.0)):
        tensors = tuple(factor * t for t in arguments(sy=sy))
        expected = values_and_gradients(run, tensors)
        for ours, theirs in zip(values_and_gradients(compiled, tensors), expected, strict=True):
            close(ours, theirs, 1e-11)
        assert counter.frame_count <= (1 if sy == 3 else 2)


def test_a_watched_tail_is_the_same(backend: str) -> None:
    tensors = arguments()
    expected = both("relu", backend)(*tensors)
    with FlopCounterMode(display=False) as counter:
        found = both("relu", backend)(*tensors)
    assert counter.get_total_flops() > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_native
def test_operators_called_directly_check_before_raw_pointers() -> None:
    zx, zy = torch.zeros(2, 2, 3, 4, 5), torch.zeros(2, 3, 3, 4, 5)
    tail, backward = torch.ops.icseg.cross_conv2d_tail, torch.ops.icseg.cross_conv2d_tail_backward
    for wrong in (zy[:1], zy[:, :, :2], zy[0]):
        with pytest.raises(ValueError, match="zx and zy must have shapes"):
            tail(zx, wrong, True, True, None, 0.1, "native")
    with pytest.raises(ValueError, match="the gradient of pairs must have shape"):
        backward(zx, zy, zx, None, None, 0.1, "native")
    with pytest.raises(ValueError, match="the gradient of mean must have shape"):
        backward(zx, zy, None, zy, None, 0.1, "native")


@needs_native
@pytest.mark.parametrize(
    ("sizes", "activation", "message"),
    [
        ((-1, 1, 1, 1), 0, "must not be negative"),
        ((1, -1, 1, 1), 0, "must not be negative"),
        ((1, 1, -1, 1), 0, "must not be negative"),
        ((1, 1, 1, -1), 0, "must not be negative"),
        ((1, 1, 1, 1), 4, "activation must be from 0 to 3"),
        ((1, 1, 1, 1), -1, "activation must be from 0 to 3"),
        ((1, 1, 1, 2**62), 0, "63 bits"),
        ((1, 2**31, 2**31, 1), 0, "63 bits"),
        ((2**62, 1, 0, 1), 0, "63 bits"),
        ((0, 1, 1, 2**62), 0, "63 bits"),
        ((0, 1, 1, 1), 3, None),
        ((1, 0, 0, 1), 3, None),
    ],
)
def test_impossible_sizes_are_refused_by_every_entry_point(
    sizes: tuple[int, ...], activation: int, message: str | None
) -> None:
    nothing = ctypes.c_void_p(None)
    for entries, pointers in ((native._TAIL, 4), (native._BACKWARD, 6)):
        for entry in entries.values():
            code = entry(*(nothing,) * pointers, *sizes, activation, 0.1)
            if message is None:
                library.check(code)
            else:
                with pytest.raises(RuntimeError, match=message):
                    library.check(code)


@needs_native
def test_the_library_takes_no_mean_of_nothing() -> None:
    images, none = torch.zeros(1, 1, 2, 4, 4), torch.zeros(1, 0, 2, 4, 4)
    with pytest.raises(ValueError, match=r"^zy must hold at least one image to take the mean of, got Sy = 0$"):
        torch.ops.icseg.cross_conv2d_tail(images, none, False, True, None, 0.0, "native")
