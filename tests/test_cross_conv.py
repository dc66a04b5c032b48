"""cross_conv2d and cross_conv2d_mean against a convolution of the concatenated pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from icseg_kernels import BackendError, cross_conv2d, cross_conv2d_mean

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


@pytest.mark.parametrize("op", [cross_conv2d, cross_conv2d_mean])
@pytest.mark.parametrize("settings", ["default", "pair", "reflect"])
def test_compile_fullgraph(op: Callable[..., Tensor], settings: str) -> None:
    """Values and gradients; new values do not compile anew, and new sizes at most once."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: op(*t, **SETTINGS[settings]), fullgraph=True, backend=counter)
    for sy, factor in ((3, 1.0), (3, -2.0), (4, 1.0), (5, 1.0), (6, 0.5)):
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
        ({"backend": "triton"}, BackendError, "cross_conv2d(_mean)? has no triton backend"),
    ],
)
@pytest.mark.parametrize("op", [cross_conv2d, cross_conv2d_mean])
def test_errors(op: Callable[..., Tensor], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = dict(zip(("x", "y", "weight", "bias"), arguments(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        op(**{**call, **changes})


def test_mean_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="y must hold at least one image"):
        cross_conv2d_mean(*arguments(sy=0))
