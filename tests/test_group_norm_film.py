"""group_norm_film against torch's group_norm and gelu in float64, and its own reference, on every backend here."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BACKENDS, needs_native
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import BackendError, flops, group_norm_film, library
from icseg_kernels.group_norm_film import native

# N, C, spatial, groups: lengths below, at and past a vector, more than a tile, more than a block, none at all
SHAPES = [
    (3, 16, (8, 8), 4),
    (70, 32, (2, 2), 8),
    (5, 24, (4, 4), 8),
    (2, 24, (7, 7), 3),
    (2, 6, (5,), 3),
    (5, 4, (), 2),
    (2, 4, (3, 5, 41), 4),
    (1, 8, (50, 67), 1),
    (1, 3000, (1,), 1),
]
EMPTY = [(0, 4, (3, 3), 2), (2, 4, (0, 3), 2), (2, 0, (3,), 1)]
FILMS = [("none", "none"), ("channel", "sample"), ("sample", "channel"), ("none", "channel"), ("sample", "none")]


def film(kind: str, samples: int, channels: int, seed: int) -> Tensor | None:
    shape = {"none": None, "channel": (channels,), "sample": (samples, channels)}[kind]
    return None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def arguments(
    samples: int, channels: int, spatial: tuple[int, ...], kinds: tuple[str, str], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(samples, channels, *spatial, generator=generator, dtype=torch.float64) + 1
    gain, bias = (film(kind, samples, channels, seed) for seed, kind in enumerate(kinds, 1))
    x, gain, bias = (None if t is None else t.to(dtype).requires_grad_() for t in (x, gain, bias))
    return x, gain, bias


def plain(x: Tensor, groups: int, gain: Tensor | None, bias: Tensor | None, activation: str | None) -> Tensor:
    """What one writes without the op."""
    trailing = (1,) * (x.ndim - 2)
    out = F.group_norm(x, groups)
    if gain is not None:
        out = out * gain.view(*gain.shape, *trailing)
    if bias is not None:
        out = out + bias.view(*bias.shape, *trailing)
    return F.gelu(out) if activation == "gelu" else out


def with_gradients(run, inputs: tuple[Tensor | None, ...], double: bool = False) -> list[Tensor]:
    """The output of run(*inputs) and the gradients of a fixed weighted sum of it."""
    leaves = [None if t is None else (t.double() if double else t).detach().requires_grad_() for t in inputs]
    out = run(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, weight.to(out.dtype))]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def check_against_torch(shape, kinds, activation, dtype, backend: str) -> None:
    """Errors against float64 no larger than torch's own in the same dtype, but for a few roundings."""
    samples, channels, spatial, groups = shape
    inputs = arguments(samples, channels, spatial, kinds, dtype)
    found = with_gradients(
        lambda x, g, b: group_norm_film(x, groups, g, b, activation=activation, backend=backend), inputs
    )
    exact = with_gradients(lambda x, g, b: plain(x, groups, g, b, activation), inputs, double=True)
    theirs = with_gradients(lambda x, g, b: plain(x, groups, g, b, activation), inputs)
    assert found[0].dtype == dtype
    assert found[0].is_contiguous()
    for ours, torchs, oracle, leaf in zip(found, theirs, exact, (inputs[0], *filter(_is_tensor, inputs)), strict=True):
        assert ours.shape == oracle.shape
        assert ours.dtype == leaf.dtype
        scale = max(1.0, oracle.abs().max().item())
        allowed = 1.5 * (torchs.double() - oracle).abs().max().item() + 8 * torch.finfo(dtype).eps * scale
        assert (ours.double() - oracle).abs().max().item() <= allowed


def _is_tensor(value: Tensor | None) -> bool:
    return value is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_as_exact_as_torch(isa, poisoned, shape, activation, dtype):
    for kinds in FILMS[:3]:
        check_against_torch(shape, kinds, activation, dtype, "native")


@pytest.mark.parametrize("kinds", FILMS)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_is_as_exact_as_torch(backend, kinds, activation, dtype):
    for shape in SHAPES[:4]:
        check_against_torch(shape, kinds, activation, dtype, backend)


def test_by_hand(backend):
    """Two groups of two channels: of mean 1 and 4, standard deviation 1 and 2."""
    x = torch.tensor([[0.0, 2.0, 2.0, 6.0]])
    gain, bias = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 10.0, 0.0])
    out = group_norm_film(x, 2, gain, bias, eps=0.0, backend=backend)
    torch.testing.assert_close(out, torch.tensor([[-1.0, 1.0, 8.0, 2.0]]))
    assert group_norm_film(x, 4, None, bias, backend=backend).tolist() == [[0.0, 0.0, 10.0, 0.0]]


def gelu_through(values: Tensor, slope: bool) -> Tensor:
    """GELU, or its derivative, of `values` by the native kernel: as biases of what normalises to 0."""
    zeros, bias = torch.zeros(len(values), 1, 1, dtype=values.dtype), values[:, None].clone().requires_grad_()
    out = group_norm_film(zeros, 1, None, bias, activation="gelu", backend="native")
    return torch.autograd.grad(out.sum(), bias)[0].flatten() if slope else out.detach().flatten()


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 13.5), (torch.float64, 40.0)])
def test_gelu_and_its_slope(isa, dtype, least):
    """Over all magnitudes; the tail of the negative ones to a few roundings of its own size."""
    values = torch.cat([torch.linspace(0, least, 20_001, dtype=torch.float64), torch.logspace(-30, 2, 999).double()])
    values = torch.cat([values, -values]).to(dtype)
    v, eps = values.double(), torch.finfo(dtype).eps
    below = 0.5 * torch.erfc(v * -math.sqrt(0.5))
    bell = torch.exp(-0.5 * v * v) * math.sqrt(0.5 / math.pi)
    error = (gelu_through(values, slope=False).double() - v * below).abs()
    assert (error <= 2.5 * eps * v.abs() + 1e-300).all()
    tail = (v < -1) & (v > -5)
    assert (error[tail] <= 30 * eps * (v * below).abs()[tail]).all()
    assert ((gelu_through(values, slope=True).double() - (below + v * bell)).abs() <= 4 * eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_at_the_ends(isa, dtype):
    """-inf is NaN, as torch has it; so are slopes at infinity."""
    largest, small = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, largest, -largest, 4 * small], dtype=dtype)
    expected = torch.tensor([math.inf, math.nan, math.nan, 0.0, largest, 0.0, 2 * small], dtype=dtype)
    torch.testing.assert_close(gelu_through(values, False), expected, equal_nan=True, rtol=1e-6, atol=0)
    slopes = torch.tensor([0.5, 1.0, 0.0, 0.5], dtype=dtype)
    torch.testing.assert_close(gelu_through(values[3:], True), slopes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_large_means_lose_about_as_much_as_torchs(backend, offset):
    x = torch.randn(4, 8, 40, 40, generator=torch.Generator().manual_seed(0)) + offset
    exact = F.group_norm(x.double(), 2)
    ours = (group_norm_film(x, 2, backend=backend).double() - exact).abs().max()
    assert ours <= (3 if backend == "reference" else 1.25) * (F.group_norm(x, 2).double() - exact).abs().max()


def test_constant_groups_are_their_bias(backend):
    x, bias = torch.full((2, 4, 3, 3), 1e4), torch.randn(2, 4)
    out = group_norm_film(x, 2, torch.full((4,), 1e3), bias, backend=backend)
    assert torch.equal(out, bias[:, :, None, None].expand_as(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(backend, bad):
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    clean = group_norm_film(x, 4, activation="gelu", backend=backend)
    x[1, 3, 2, 2] = bad
    out = group_norm_film(x, 4, activation="gelu", backend=backend)
    assert out[1, 2:4].isnan().all()
    out[1, 2:4] = clean[1, 2:4]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("shape", EMPTY)
def test_empty(backend, poisoned, shape):
    samples, channels, spatial, groups = shape
    inputs = arguments(samples, channels, spatial, ("channel", "sample"), torch.float32)
    out, *grads = with_gradients(
        lambda x, g, b: group_norm_film(x, groups, g, b, activation="gelu", backend=backend), inputs
    )
    assert out.shape == inputs[0].shape
    for grad, leaf in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_strided_views(backend):
    x, gain, bias = (t.detach() for t in arguments(3, 8, (6, 5), ("channel", "sample"), torch.float64))

    def run(x: Tensor, gain: Tensor, bias: Tensor) -> list[Tensor]:
        return with_gradients(
            lambda x, g, b: group_norm_film(x, 4, g, b, activation="gelu", backend=backend), (x, gain, bias)
        )

    expected = run(x, gain, bias)
    apart = (
        torch.empty(4, 6, 5, 8, dtype=x.dtype).copy_(F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)).permute(0, 2, 3, 1)),
        torch.stack([gain, gain], dim=1).flatten(),
        torch.stack([bias, bias], dim=1).transpose(1, 2).contiguous(),
    )
    views = apart[0].permute(0, 3, 1, 2)[1:], apart[1][::2], apart[2][..., 0]
    for found, wanted in zip(run(*views), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    wide = x[:, :1, :, :1].expand(3, 8, 6, 5)
    assert torch.equal(
        group_norm_film(wide, 4, gain, backend=backend), group_norm_film(wide.contiguous(), 4, gain, backend=backend)
    )
    same = bias[:1].expand(3, 8)
    assert torch.equal(
        group_norm_film(x, 4, None, same, backend=backend), group_norm_film(x, 4, None, bias[0], backend=backend)
    )


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_strided_gradient(backend, activation):
    x = torch.randn(3, 8, 6, 5, requires_grad=True)
    slanted = torch.randn(1, 5, 8, 6).expand(3, 5, 8, 6).permute(0, 2, 3, 1)
    out = group_norm_film(x, 4, activation=activation, backend=backend)
    (found,) = torch.autograd.grad(out, x, slanted, retain_graph=True)
    (expected,) = torch.autograd.grad(out, x, slanted.contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gain_far_away_in_memory(backend):
    """A stride that takes 32-bit offsets past 2^31; only what is read exists."""
    far = torch.randn(2, 4).as_strided((2, 4), (0, 1)).expand(2, 4)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        group_norm_film(x, 2, far, backend=backend), group_norm_film(x, 2, far.contiguous(), backend=backend)
    )


@needs_native
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which two pages are touched: the gains of two samples far apart."""
    storage = torch.empty(2**31 + 64)  # not written: no memory
    gain = storage.as_strided((2, 4), (2**31, 1))
    gain.copy_(torch.arange(8.0).view(2, 4))
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    found = group_norm_film(x, 2, gain, backend="native")
    assert torch.equal(found, group_norm_film(x, 2, gain.clone(), backend="native"))


def test_gain_and_bias_of_other_dtypes(backend):
    x, gain, bias = arguments(2, 4, (3, 3), ("channel", "sample"), torch.float32)
    x, bias = x.detach().bfloat16().requires_grad_(), bias.detach().double().requires_grad_()
    out = group_norm_film(x, 2, gain, bias, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(x.float(), 2, gain, bias.float(), None), rtol=1e-2, atol=1e-2)
    out.sum().backward()
    assert (x.grad.dtype, gain.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float64)


def test_only_what_needs_a_gradient_gets_one(backend):
    x, gain, bias = (t.detach() for t in arguments(2, 4, (3, 3), ("channel", "sample"), torch.float32))
    for wanted in (x, gain, bias):
        wanted.requires_grad_()
        (grad,) = torch.autograd.grad(group_norm_film(x, 2, gain, bias, backend=backend).square().sum(), wanted)
        assert grad.shape == wanted.shape
        wanted.requires_grad_(False)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("kinds", FILMS)
def test_gradcheck(backend, kinds, activation):
    inputs = [t for t in arguments(2, 6, (2, 2), kinds, torch.float64) if t is not None]
    given = [kind != "none" for kind in kinds]

    def run(x: Tensor, *films: Tensor) -> Tensor:
        rest = iter(films)
        gain, bias = (next(rest) if there else None for there in given)
        return group_norm_film(x, 3, gain, bias, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(run, inputs, nondet_tol=0.0)


def test_gradcheck_of_long_rows(isa):
    x = torch.randn(1, 2, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gain = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    run = lambda x, g: group_norm_film(x, 1, g, activation="gelu", backend="native")  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, gain), nondet_tol=0.0)


@pytest.mark.parametrize(("samples", "length"), [(1, 70_000), (300, 16), (700, 4)])
def test_threads_change_no_bit(isa, threads, samples, length):
    inputs = arguments(samples, 32, (length,), ("channel", "sample"), torch.float32)
    results = []
    for count in (1, 2):
        threads(count)
        run = lambda x, g, b: group_norm_film(x, 8, g, b, activation="gelu", backend="native")  # noqa: E731
        results.append(with_gradients(run, inputs))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@needs_native
def test_random_shapes(data):
    samples, groups, each = (data.draw(st.integers(1, n)) for n in (40, 5, 9))
    length = data.draw(st.one_of(st.integers(0, 70), st.integers(1000, 1100)))
    channels = groups * each
    kinds = data.draw(st.sampled_from(FILMS))
    activation = data.draw(st.sampled_from([None, "gelu"]))
    inputs = arguments(samples, channels, (length,), kinds, torch.float64)

    def run(backend: str) -> list[Tensor]:
        return with_gradients(
            lambda x, g, b: group_norm_film(x, groups, g, b, activation=activation, backend=backend), inputs
        )

    for ours, theirs in zip(run("native"), run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_opcheck(backend):
    x, gain, bias = (t.detach() for t in arguments(3, 8, (4, 4), ("channel", "sample"), torch.float32))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    stats = torch.rand(2, 3, 4)
    for *films, activation in ((gain, bias, "gelu"), (None, bias, None), (None, None, "gelu")):
        torch.library.opcheck(
            torch.ops.icseg.group_norm_film.default, (x, 4, *films, activation, 1e-5, backend), test_utils=tests
        )
        torch.library.opcheck(
            torch.ops.icseg.group_norm_film_backward.default,
            (x, x, stats, 4, *films, activation, backend),
            test_utils=tests,
        )


def test_compile_fullgraph(backend):
    """Values and gradients; new values do not compile anew, and new sizes at most once."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = lambda x, g, b: group_norm_film(x, 4, g, b, activation="gelu", backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for samples, factor in ((3, 1.0), (3, -2.0), (4, 1.0), (5, 1.0), (6, 0.5)):
        inputs = [factor * t.detach() for t in arguments(samples, 8, (4, 4), ("channel", "sample"), torch.float32)]
        for ours, theirs in zip(with_gradients(compiled, inputs), with_gradients(run, inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert counter.frame_count <= (1 if samples == 3 else 2)


def test_double_backward_and_forward_mode_are_refused(backend):
    x = torch.randn(2, 4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(
        group_norm_film(x, 2, activation="gelu", backend=backend).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: group_norm_film(x, 2, backend=backend), (x.detach(),), (x.detach(),))


def test_autocast_changes_nothing(backend):
    x, gain, bias = (t.detach() for t in arguments(3, 8, (4, 4), ("channel", "sample"), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = group_norm_film(x, 4, gain, bias, activation="gelu", backend=backend)
    assert torch.equal(out, group_norm_film(x, 4, gain, bias, activation="gelu", backend=backend))


def test_flops_and_bytes():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        group_norm_film(x, 4, activation="gelu").sum().backward()
    assert counter.get_total_flops() == flops.group_norm_film_flops() == 0
    assert flops.group_norm_film_bytes(2, 8, 16, film=16) == (2 * x.numel() + 16) * 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"x must have shape \[N, C, \*spatial\], got \[4\]"),
        ({"x": torch.zeros(2, 8, 3).int()}, TypeError, "x must be a floating-point tensor"),
        ({"groups": 3}, ValueError, "groups must divide the 8 channels of x, got 3"),
        ({"groups": 0}, ValueError, "groups must be an integer of at least 1, got 0"),
        ({"groups": 2.0}, TypeError, "groups must be an integer of at least 1, got 2.0"),
        ({"gain": torch.zeros(7)}, ValueError, r"gain must have shape \[8\] or \[2, 8\], got \[7\]"),
        ({"gain": torch.zeros(3, 8)}, ValueError, r"gain must have shape \[8\] or \[2, 8\], got \[3, 8\]"),
        ({"bias": torch.zeros(2, 8, 1)}, ValueError, r"bias must have shape \[8\] or \[2, 8\], got \[2, 8, 1\]"),
        ({"bias": torch.zeros(())}, ValueError, r"bias must have shape \[8\] or \[2, 8\], got \[\]"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, TypeError, "bias must be a floating-point tensor"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"gain": torch.zeros(8, device="meta")}, ValueError, "gain must be on cpu, .* got meta"),
        ({"activation": "relu"}, ValueError, "activation must be \"gelu\" or None, got 'relu'"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number of at least 0, got -1.0"),
        ({"eps": math.nan}, ValueError, "eps must be a finite number of at least 0, got nan"),
        ({"eps": "small"}, TypeError, "eps must be a finite number of at least 0, got 'small'"),
        ({"backend": "cuda"}, BackendError, "group_norm_film has no cuda backend"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        group_norm_film(**{"x": torch.zeros(2, 8, 3), "groups": 4, **changes})


@needs_native
def test_native_refuses_what_is_not_on_the_cpu():
    with pytest.raises(BackendError, match="it runs on the CPU, and x is on meta"):
        group_norm_film(torch.zeros(2, 8, 3, device="meta"), 4, backend="native")


@needs_native
def test_operators_called_directly_check_before_raw_pointers():
    x, stats = torch.zeros(2, 8, 3), torch.zeros(2, 2, 4)
    op, backward = torch.ops.icseg.group_norm_film, torch.ops.icseg.group_norm_film_backward
    with pytest.raises(ValueError, match="gain must be on the CPU"):
        op(x, 4, torch.zeros(7), None, None, 1e-5, "native")
    with pytest.raises(RuntimeError, match="groups must be at least 1 and divide the channels"):
        op(x, 3, None, None, None, 1e-5, "native")
    for grad, saved in ((x[:1], stats), (x, stats[:, :1])):
        with pytest.raises(ValueError, match="grad and stats must be those of x"):
            backward(grad, x, saved, 4, None, None, None, "native")


HUGE = 2**62


@needs_native
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 4, 4, 2), "must not be negative"),
        ((1, -4, 4, 2), "must not be negative"),
        ((1, 4, -1, 2), "must not be negative"),
        ((1, 4, 4, 0), "groups must be at least 1"),
        ((1, 4, 4, -2), "groups must be at least 1"),
        ((1, 4, 4, 3), "groups must be at least 1 and divide"),
        ((1, 4, HUGE, 2), "63 bits"),
        ((HUGE, 4, 0, 2), "63 bits"),
        ((1, HUGE, 0, 1), "63 bits"),
        ((2**31, 2**31, 1, 1), "63 bits"),
        ((HUGE, 0, 1, HUGE), "63 bits"),
        ((0, 4, 4, 2), None),
    ],
)
def test_impossible_sizes_are_refused_by_every_entry_point(sizes, message):
    nothing = ctypes.c_void_p(None)
    for entries, pointers, last in ((native._FORWARD, 5, (1e-5,)), (native._BACKWARD, 7, ())):
        for entry in entries.values():
            code = entry(*(nothing,) * pointers, *sizes, 0, 0, 0, 0, 1, *last)
            if message is None:
                library.check(code)
            else:
                with pytest.raises(RuntimeError, match=message):
                    library.check(code)
