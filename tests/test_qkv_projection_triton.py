"""qkv_projection by its Triton kernels, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from samples import DEVICE
from test_qkv_projection import CASES, Call, made, normal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from icseg.published import transformer
from icseg.published.config import BackboneConfig
from icseg.published.transformer import Block, RotaryEmbedding, rotated
from icseg_kernels import BackendError, Rotation, backend, flops, qkv_projection, triton_launch

if triton_launch.missing():
    pytest.skip("; ".join(triton_launch.missing()), allow_module_level=True)

from icseg_kernels.qkv_projection import triton_kernels as kernels

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="float64 is for the interpreter")
BFLOAT16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_cuda])
DTYPES = [torch.float32, torch.float16, BFLOAT16]
# Sizes past a block of tokens, of inputs and of outputs, with blocks that span heads.
LARGER: dict[str, dict[str, Any]] = {
    **CASES,
    "several blocks": {"count": 19, "channels": 70, "heads": 3, "width": 14, "pieces": 2, "queries": 17},
    "shared keys": {"count": 33, "channels": 16, "heads": 5, "kv_heads": 2, "width": 10, "rotary": "shared"},
}


@pytest.fixture(params=["few", "many"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those for few tokens, and for as many as fill a device."""
    kernels.project_options.cache_clear()
    if request.param == "many":
        monkeypatch.setattr(kernels, "_ENOUGH", 0)
    yield request.param
    kernels.project_options.cache_clear()


def assert_as_exact(call: Call) -> None:
    """Errors against float64 at most twice the reference's in the same dtype, but for a few roundings."""
    call, eps = call.to(DEVICE), torch.finfo(call.x.dtype).eps
    found, theirs = call.with_gradients("triton"), call.with_gradients()
    exact = call.to(torch.float64).with_gradients()
    assert all(t.is_contiguous() for t in found[:3])
    for ours, reference, oracle in zip(found, theirs, exact, strict=True):
        assert (ours.shape, ours.dtype) == (oracle.shape, reference.dtype)
        if ours.numel():
            usual, scale = (reference.double() - oracle).abs().max().item(), max(1.0, oracle.abs().max().item())
            assert (ours.double() - oracle).abs().max().item() <= 2 * usual + 8 * eps * scale


@pytest.mark.parametrize("name", LARGER)
def test_is_as_exact_as_the_reference(poisoned, name):
    assert_as_exact(made(**LARGER[name], dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["several blocks", "plain"])
def test_dtypes_and_blocks(poisoned, blocks, name, dtype):
    assert_as_exact(made(**LARGER[name], dtype=dtype))


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_is_the_path_of_the_published_block(pieces):
    """Kinds of tokens, norm, two layers, half of the channels turned by x and half by y, queries of the last."""
    torch.manual_seed(0)
    block = Block(BackboneConfig(dim=32, heads=4, dropout=0.0))
    x, positions = torch.randn(2, 9, 32), torch.randint(0, 1024, (2, 9, 2))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rotation = RotaryEmbedding(32)(positions)
    kinds = torch.cat([block.types[:1].expand(5, -1), block.types[1:].expand(4, -1)])
    normed = block.norm1(x) + kinds
    k, v = block.key_value(normed).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (block.query(normed), k, v))
    turn = Rotation(*(t.unflatten(-1, (4, 4)).transpose(1, 2) for t in rotation))
    last = Rotation(*(t[:, :, -4:] for t in turn))
    expected = rotated(q[:, :, -4:], last), rotated(k, turn), v
    weights, biases = [[getattr(m, n) for m in (block.query, block.key_value)] for n in ("weight", "bias")]
    if pieces == 1:
        weights, biases = [torch.cat(weights)], [torch.cat(biases)]
    elif pieces == 3:
        weights, biases = [[first, *second.chunk(2)] for first, second in (weights, biases)]
    norm = block.norm1.weight, block.norm1.bias
    call = Call(x, weights, biases, norm, kinds, (last, turn), {"heads": 4, "queries": 4}).to(DEVICE)
    for name, tolerance in (("reference", 0.0), ("triton", 5e-6)):
        for found, wanted in zip(call.run(name), expected, strict=True):
            torch.testing.assert_close(found.cpu(), wanted.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_a_published_block_that_turns_early(monkeypatch, name, dropout):
    """As on a GPU: the outputs and gradients of one that leaves turning to attention; not where a layer is hooked."""
    torch.manual_seed(0)
    block = Block(BackboneConfig(dim=32, heads=4, dropout=dropout)).to(DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE, requires_grad=True)
    rotation = RotaryEmbedding(32).to(DEVICE)(torch.randint(0, 1024, (2, 9, 2), device=DEVICE))
    bounds, found = [(2, 7), (4, 9)], []
    calls = []
    monkeypatch.setattr(transformer, "qkv_projection", lambda *a, **k: calls.append(1) or qkv_projection(*a, **k))
    for early in (False, True):
        monkeypatch.setattr(transformer, "_turns_early", lambda x, early=early: early)
        torch.manual_seed(1)
        with backend.use_backend(name):
            out = block(x, 5, rotation, bounds)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [x, *block.parameters()])])
        assert len(calls) == early
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    block.query.register_forward_hook(lambda *_: None)
    with backend.use_backend(name):
        block(x, 5, rotation, bounds)
    assert len(calls) == 1


@interpreted
@pytest.mark.parametrize("name", ["two weights", "three weights", "few queries, no bias"])
def test_gradcheck(name):
    call = made(1, 3, **{"channels": 6, "width": 2, **CASES[name]})
    leaves = [t.requires_grad_() for t in call.leaves()]
    assert torch.autograd.gradcheck(lambda *_: call.run("triton"), leaves, nondet_tol=0.0, fast_mode=True)


@interpreted
def test_gradcheck_of_every_element():
    call = made(1, 1, channels=3, width=2, heads=1)
    leaves = [t.requires_grad_() for t in call.leaves()]
    assert torch.autograd.gradcheck(lambda *_: call.run("triton"), leaves, nondet_tol=0.0)


@interpreted
def test_float64_is_the_reference(blocks):
    call = made(**LARGER["several blocks"])
    for ours, theirs in zip(call.with_gradients("triton"), call.with_gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_eps_of_the_norm():
    call = made(dtype=torch.float32)
    call.options["eps"] = 0.5
    assert_as_exact(call)


@pytest.mark.parametrize("missing", [(0,), (1, 2), (0, 2), (0, 1)])
def test_gradients_of_some_outputs(missing):
    call = made(2, 19, queries=3, dtype=torch.float32).to(DEVICE)
    grads = {}
    for name in ("triton", "reference"):
        leaves = call.mapped(lambda t: t.detach().requires_grad_())
        used = [out.sin().sum() for i, out in enumerate(leaves.run(name)) if i not in missing]
        grads[name] = torch.autograd.grad(sum(used), leaves.leaves())
    for ours, theirs in zip(*grads.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["both", "none"])
def test_gradients_of_some_inputs(norm):
    """Of one at a time, the same bits as of all."""
    call = made(pieces=2, norm=norm, dtype=torch.float32).to(DEVICE)
    everything = call.with_gradients("triton")[3:]
    for i, expected in enumerate(everything):
        leaves = call.mapped(lambda t: t.detach().clone())
        leaf = leaves.leaves()[i].requires_grad_()
        out = leaves.run("triton")
        upstream = [normal(*o.shape, seed=90 + j).to(o) for j, o in enumerate(out)]
        assert torch.equal(torch.autograd.grad(out, leaf, upstream)[0], expected)


@pytest.mark.parametrize(("batch", "count"), [(0, 4), (2, 0)])
def test_nothing(poisoned, batch, count):
    call = made(batch, count, pieces=2, dtype=torch.float32).to(DEVICE)
    found, expected = call.with_gradients("triton"), call.with_gradients()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(), (1,), (24,), (7, 1), (1, 7, 24), (2, 1, 24), (2, 7, 24)])
def test_what_is_added_is_broadcast(shape):
    for norm in ("both", "none"):
        call = made(norm=norm, dtype=torch.float32)
        call.added = normal(*shape, seed=3).float()
        assert_as_exact(call)


def _gapped(t: Tensor) -> Tensor:
    """With NaN between and around its rows."""
    apart = torch.full([n + 3 for n in t.shape], math.nan, dtype=t.dtype, device=t.device)
    view = apart[tuple(slice(1, n + 1) for n in t.shape)]
    return view.copy_(t)


def _backwards(t: Tensor) -> Tensor:
    """With its dimensions the other way round in memory."""
    order = tuple(range(t.ndim))[::-1]
    return t.permute(order).contiguous().permute(order)


def _spread(t: Tensor) -> Tensor:
    """Every other element of a tensor of twice as many, NaN between them."""
    return torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0]


@pytest.mark.parametrize("laid", [_gapped, _backwards, _spread])
def test_any_strides(laid):
    call = made(pieces=2, queries=5, dtype=torch.float32).to(DEVICE)
    expected = call.with_gradients("triton")
    leaves = call.mapped(lambda t: laid(t.detach()).requires_grad_())
    leaves.rotary = tuple(Rotation(laid(r.cos), _gapped(r.sin)) for r in call.rotary)
    out = leaves.run("triton")
    upstream = [laid(normal(*o.shape, seed=90 + i).to(o)) for i, o in enumerate(out)]
    found = [*out, *torch.autograd.grad(out, leaves.leaves(), upstream)]
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-5)


def test_expanded_tensors():
    """One sample for all, one gradient for all heads."""
    call = made(dtype=torch.float32).to(DEVICE)
    x = call.x[:1].expand(2, -1, -1)
    call.x, plain = x, call.mapped(lambda t: t.detach().contiguous())
    plain.x = x.contiguous()
    for ours, theirs in zip(call.run("triton"), plain.run("triton"), strict=True):
        assert torch.equal(ours, theirs)
    weight = call.weights[0].requires_grad_()
    q, _, _ = call.run("triton")
    one = normal(2, 1, 7, 1).to(q).expand_as(q)
    first = torch.autograd.grad(q, weight, one, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(q, weight, one.contiguous()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_token(poisoned, bad):
    call = made(2, 19, queries=4, dtype=torch.float32).to(DEVICE)
    clean = call.run("triton")
    for token, last in ((17, 2), (3, None)):
        dirty = call.mapped(lambda t: t.detach().clone())
        dirty.x[1, token, 5] = bad
        for ours, right, at in zip(dirty.run("triton"), clean, (last, token, token), strict=True):
            if at is not None:
                assert not ours[1, :, at].isfinite().any()
                ours[1, :, at] = right[1, :, at]
            assert torch.equal(ours, right)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_an_infinite_value_is_not_turned():
    """An infinite channel of v leaves its neighbour alone."""
    call = made(norm="none", added=False, dtype=torch.float32).to(DEVICE)
    call.biases[0][-1] = math.inf
    v = call.run("triton")[2]
    assert v[..., :-1].isfinite().all()
    assert (v[:, -1, :, -1] == math.inf).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="address space without memory is the CPU's")
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which few pages are touched: samples, tokens and gradients far apart."""
    call = made(2, 3, dtype=torch.float32, queries=2)
    expected = call.with_gradients("triton")
    far = torch.empty(2**31 + 4096)  # not written: no memory
    for strides in ((2**31, 24, 1), (24, 2**30, 1)):
        x = far.as_strided((2, 3, 24), strides).copy_(call.x)
        moved = Call(x, call.weights, call.biases, call.norm, call.added, call.rotary, call.options)
        for ours, wanted in zip(moved.run("triton"), expected, strict=False):
            assert torch.equal(ours, wanted)
    x = call.x.clone().requires_grad_()
    q, _, _ = Call(x, call.weights, call.biases, call.norm, call.added, call.rotary, call.options).run("triton")
    grad = normal(*q.shape).float()
    spread = far.as_strided(q.shape, (64, 2**31, 8, 1)).copy_(grad)
    first = torch.autograd.grad(q, x, spread, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(q, x, grad))


def test_the_same_bits_twice_and_in_any_company():
    call = made(2, 19, dtype=torch.float32).to(DEVICE)
    first, second = call.with_gradients("triton"), call.with_gradients("triton")
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    alone = call.mapped(lambda t: t.detach().clone())
    alone.x, alone.rotary = call.x[1:], tuple(Rotation(*(t[1:] for t in r)) for r in call.rotary)
    for one, both in zip(alone.run("triton"), first, strict=False):
        assert torch.equal(one, both[1:])


def test_autocast():
    """x, norm and what is added in float32, products in the half type; gradients in float32."""
    for norm in ("both", "none"):
        call = made(2, 19, norm=norm, added=norm == "both", pieces=2, dtype=torch.float32).to(DEVICE)
        with torch.autocast(DEVICE, torch.float16):
            found, theirs = call.with_gradients("triton"), call.with_gradients()
        exact = call.to(torch.float64).with_gradients()
        for ours, reference, oracle in zip(found, theirs, exact, strict=True):
            assert ours.dtype == reference.dtype
            usual, scale = (reference.double() - oracle).abs().max(), max(1.0, oracle.abs().max().item())
            assert (ours.double() - oracle).abs().max() <= 2 * usual + 8 * torch.finfo(torch.float16).eps * scale


def operator(call: Call) -> tuple[Any, ...]:
    """Arguments of the operator up to eps."""
    padding = [None] * (3 - len(call.weights))
    biases = call.biases or [None] * len(call.weights)
    angles = [t for r in call.rotary or (None, None) for t in (r or (None, None))]
    (heads, kv_heads, queries) = (call.options[n] for n in ("heads", "kv_heads", "queries"))
    sizes = heads, kv_heads or heads, call.x.shape[1] if queries is None else queries
    return call.x, *(call.norm or (None, None)), call.added, *call.weights, *padding, *biases, *padding, *angles, *sizes


@pytest.mark.parametrize("name", ["all", "plain", "two weights"])
def test_opcheck(name):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    call = made(**CASES[name], dtype=torch.float32).to(DEVICE)
    arguments = operator(call)
    torch.library.opcheck(torch.ops.icseg.qkv_projection.default, (*arguments, 1e-5, "triton"), test_utils=tests)
    *grads, stats = torch.ops.icseg.qkv_projection(*arguments, 1e-5, "triton")
    for wants in ((True, True, True, True), (True, False, False, False))[: 1 if name == "all" else 2]:
        torch.library.opcheck(
            torch.ops.icseg.qkv_projection_backward.default,
            (grads[0], None, grads[2], stats, *arguments, *wants, "triton"),
            test_utils=tests,
        )


def test_compile_fullgraph():
    """Values and gradients; new values do not compile anew, and new sizes at most once."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def project(x, weight, bias, gain, shift, added, cos, sin):
        turn = Rotation(cos, sin)
        return qkv_projection(
            x, weight, bias, heads=2, norm=(gain, shift), added=added, rotary=(turn, turn), backend="triton"
        )

    compiled = torch.compile(project, fullgraph=True, backend=counter)
    for count, factor in ((5, 1.0), (5, -2.0), (7, 1.0), (8, 0.5)):
        call = made(2, count, rotary="shared", dtype=torch.float32).to(DEVICE)
        outputs = []
        for run in (compiled, project):
            leaves = [(factor * t).requires_grad_() for t in call.leaves()]
            out = run(*leaves, *call.rotary[0])
            outputs.append([*out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])])
        for ours, theirs in zip(*outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert counter.frame_count <= (1 if count == 5 else 2)


def test_flops():
    call = made(pieces=2, queries=3, dtype=torch.float32).to(DEVICE)
    with FlopCounterMode(display=False) as counter:
        call.run("triton")
    formula = flops.qkv_projection_flops(2, 7, 24, 2, 8, queries=3)
    assert counter.get_total_flops() == formula
    with FlopCounterMode(display=False) as counter:
        call.with_gradients("triton")
    assert counter.get_total_flops() == 3 * formula


def test_once_differentiable():
    call = made(dtype=torch.float32).to(DEVICE).mapped(lambda t: t.detach().requires_grad_())
    (grad,) = torch.autograd.grad(call.run("triton")[0].square().sum(), call.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    weight = call.weights[0].detach()
    project = lambda x: qkv_projection(x, weight, heads=2, backend="triton")[0]  # noqa: E731
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(project, (call.x.detach(),), (call.x.detach(),))


def test_who_serves():
    x, weight = torch.zeros(2, 3, 4, device=DEVICE), torch.zeros(12, 4, device=DEVICE)
    assert (backend.select("qkv_projection", None, x, weight) == "triton") == (not triton_launch.slower())
    with pytest.raises(BackendError, match="it runs on CUDA devices, and x is on meta"):
        qkv_projection(x.to("meta"), weight.to("meta"), heads=2, backend="triton")


@pytest.mark.gpu
@needs_cuda
def test_float64_is_refused():
    with pytest.raises(BackendError, match=r"it computes in float32, float16 and bfloat16, and x is torch\.float64"):
        made().to(DEVICE).run("triton")


def test_operators_called_directly_check_before_raw_pointers():
    call = made(pieces=2, dtype=torch.float32).to(DEVICE)
    good = operator(call)
    project, backward = torch.ops.icseg.qkv_projection, torch.ops.icseg.qkv_projection_backward
    for position, wrong, message in (
        (4, call.weights[0][:15], "weight must have the same rows for each of 2 and twice 2 heads"),
        (5, call.weights[1][:, 1:], r"weight must have shape \[32, 24\]"),
        (5, call.weights[1].half(), r"weight must have shape .* torch\.float32"),
        (7, call.biases[0][1:], r"bias must have shape \[16\]"),
        (1, call.norm[0][1:], r"norm_weight must have shape \[24\]"),
        (2, call.norm[0][1:], r"norm_bias must have shape \[24\]"),
        (10, call.rotary[0].cos.half(), "a rotation must have shape"),
        (14, 3, "weight must have the same rows"),
        (16, 8, "queries up to N"),
    ):
        bad = [*good]
        bad[position] = wrong
        with pytest.raises(ValueError, match=message):
            project(*bad, 1e-5, "triton")
    odd = [*good]
    odd[4], odd[5], odd[7], odd[8] = (
        t.repeat_interleave(9, 0)[: t.shape[0] // 8 * 9] for t in call.weights + call.biases
    )
    with pytest.raises(ValueError, match="D must be even, got 9"):
        project(*odd, 1e-5, "triton")
    q, k, v, stats = project(*good, 1e-5, "triton")
    wants = True, True, True, True
    for grads in ((q[:1], k, v, stats), (q, k.half(), v, stats), (q, k, v, stats[:, :1])):
        with pytest.raises(ValueError, match=r"(grad_.|stats) must have shape"):
            backward(*grads, *good, *wants, "triton")


def test_compilations_give_every_argument():
    for compilation in kernels.COMPILATIONS:
        assert set(compilation.kernel.arg_names) == set(compilation.signature) | set(compilation.constants)
    names = [compilation.name for compilation in kernels.COMPILATIONS]
    assert len(set(names)) == len(names)


def test_options_suit_products():
    """Sides of products are powers of two of at least 16, and no program has more than the device holds."""
    for dtype in (torch.float32, torch.float16):
        for tf32 in (False, True):
            for rows in (1, 1000, 100_000):
                for channels in (1, 24, 256, 4096):
                    options = kernels.project_options(rows, channels, 3 * channels, dtype, tf32, tf32)
                    for name in ("BLOCK_T", "BLOCK_O", "BLOCK_K"):
                        assert options[name] & (options[name] - 1) == 0 < 16 <= options[name]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_calls_are_captured(dtype):
    call = made(2, 70, channels=64, width=32, pieces=2, queries=20, dtype=dtype).to(DEVICE)
    call = call.mapped(lambda t: t.requires_grad_())
    upstream = [torch.ones_like(o) for o in call.run("triton")]

    def both() -> tuple[Tensor, ...]:
        out = call.run("triton")
        return *out, *torch.autograd.grad(out, call.leaves(), upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        call.x.mul_(-1.5)
    graph.replay()
    for ours, theirs in zip(captured, both(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@needs_cuda
def test_products_of_tf32_only_where_allowed():
    call = made(2, 300, channels=256, width=64, heads=4, dtype=torch.float32).to(DEVICE)
    exact = call.to(torch.float64).run()
    before = torch.get_float32_matmul_precision()
    errors = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            errors.append(max((a - b).abs().max().item() for a, b in zip(call.run("triton"), exact, strict=True)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] < 2e-5 < errors[1] < 2e-2
