"""selected_attention by Triton kernels: on a GPU, or in Triton's interpreter, where small calls take long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import DEVICE
from torch import Tensor
from torch.library import opcheck

from icseg_kernels import Rotation, attention, selected_attention, triton_launch
from icseg_kernels.attention import KeyBounds, reference, triton

if triton_launch.missing():
    pytest.skip("; ".join(triton_launch.missing()), allow_module_level=True)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_float64 = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="float64 is for the interpreter")
# Where equality with the reference is tested: roundings hide nothing in float64.
WIDE = torch.float64 if triton_launch.INTERPRETED else torch.float32
B, H, NK = 2, 2, 9
INT64 = torch.iinfo(torch.int64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = WIDE) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(DEVICE, dtype)


def tokens(
    nq: int, nk: int = NK, d: int = 8, dv: int = 5, *, b: int = B, h: int = H, dtype: torch.dtype = WIDE
) -> list[Tensor]:
    return [normal(b, h, n, c, seed=i, dtype=dtype) for i, (n, c) in enumerate(((nq, d), (nk, d), (nk, dv)))]


def strided(t: Tensor) -> Tensor:
    """The same values in a larger, transposed buffer of NaN."""
    b, h, n, d = t.shape
    view = torch.full((b, n + 1, h, 2 * d + 1), torch.nan, dtype=t.dtype, device=t.device)[:, 1:, :, 1::2]
    view = view.transpose(1, 2)
    view.copy_(t)
    return view


def hostile(groups: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """[2, groups, 8]: duplicates and every kind of invalid entry; rows 2, 5 and 8 are never named."""
    info = torch.iinfo(dtype)
    lists = [[0, 1, 1, -1, NK, 7, 6, info.max], [info.min, 4, 3, -123456, 4, 4, NK + 1, 0]]
    index = torch.tensor(lists, dtype=dtype, device=DEVICE)
    return torch.stack([index.roll(3 * g, 1) for g in range(groups)], dim=1)


def rotation(n: int, half: int, *, h: int = H, dtype: torch.dtype = WIDE, seed: int = 7) -> Rotation:
    """Of heads with angles of their own, split from [B, n, h * D / 2] without a copy."""
    angles = normal(B, n, h * half, seed=seed, dtype=torch.float64)
    return Rotation(*(t.to(dtype).view(B, n, h, half).transpose(1, 2) for t in (angles.cos(), angles.sin())))


def outputs_and_gradients(inputs: list[Tensor], name: str, **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = selected_attention(*leaves, **options, return_lse=True, backend=name)
    upstream = [normal(*t.shape, seed=3 + i, dtype=t.dtype) for i, t in enumerate((out, lse))]
    upstream[1].masked_fill_(lse.isinf(), 0)
    return [t.detach() for t in (out, lse, *torch.autograd.grad([out, lse], leaves, upstream))]


def agree(found: list[Tensor], expected: list[Tensor], roundings: int = 30) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        tolerance = roundings * torch.finfo(a.dtype).eps
        largest = b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + largest), equal_nan=True)


def check(inputs: list[Tensor], **options: Any) -> None:
    agree(outputs_and_gradients(inputs, "triton", **options), outputs_and_gradients(inputs, "reference", **options))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("lists", "rotary", "sink"),
    [
        ("all", False, False),
        ("all", True, True),
        ("list", False, True),
        ("list", True, False),
        ("groups", False, False),
        ("groups", True, True),
    ],
)
def test_equals_reference(lists: str, rotary: bool, sink: bool) -> None:
    options: dict[str, Any] = {"sink": sink, "scale": 0.3 if sink else None}
    options["kv_end"] = [(3, 3), (3, 8)] if rotary else [(0, 1), (3, 8), (3, 5)]
    if lists != "all":
        options["index"] = hostile(1 if lists == "list" else 2, torch.int32 if rotary else torch.int64)
    if rotary:
        options["rotary"] = (rotation(6, 4), rotation(NK, 4, seed=8))
    inputs = tokens(6)
    check([strided(t) for t in inputs] if sink else inputs, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("nq", "nk", "d", "dv", "options"),
    [
        (1, 1, 1, 1, {}),
        (17, 40, 34, 20, {"kv_end": [(1, 40), (1, 3), (13, 35), (2, 17)]}),  # several tiles, bounds not in order
        (3, 300, 2, 17, {"kv_end": 280}),  # divided over keys
        (3, 300, 2, 17, {"sink": True, "kv_end": [(1, 0), (2, 300)]}),
        (5, 3, 0, 4, {"sink": True}),  # tokens without features
        (5, 3, 4, 0, {}),
    ],
)
def test_sizes_that_are_no_multiple_of_a_tile(nq: int, nk: int, d: int, dv: int, options: dict[str, Any]) -> None:
    check(tokens(nq, nk, d, dv, b=1, h=1), **options)


@pytest.mark.parametrize("sizes", [(0, NK, 4), (6, 0, 4), (6, NK, 0), (0, 0, 0), (6, 0, None), (0, NK, None)])
def test_empty_sizes(sizes: tuple[int, int, int | None]) -> None:
    nq, nk, m = sizes
    index = None if m is None else torch.zeros(B, m, dtype=torch.int64, device=DEVICE)
    check(tokens(nq, nk), index=index)
    empty = [t[:0] for t in tokens(6)]
    assert selected_attention(*empty, index=hostile(1)[:0], backend="triton").shape == (0, H, 6, 5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [5, 40])
def test_rows_named_often(rows: int) -> None:
    """By several groups, fewer and many more than the lists have entries."""
    index = torch.tensor([[[0, 3, 3, -1], [4, 3, 0, 0], [3, 3, rows, 1]]], device=DEVICE)
    check(tokens(6, rows, b=1, h=3), index=index)


def test_rotation_of_one_side_and_broadcast() -> None:
    inputs = tokens(3)
    angle = torch.linspace(0, 3, 4, dtype=WIDE, device=DEVICE)
    check(inputs, rotary=(Rotation(angle.cos(), angle.sin()), None))
    turn = rotation(NK, 1)
    check(inputs, rotary=(None, Rotation(turn.cos, turn.sin.contiguous())))


def test_keys_shared_by_heads_and_expanded_gradients() -> None:
    q, k, v = tokens(3)
    leaves = [t.requires_grad_() for t in (q, k[:1, :1].clone(), v[:1, :1].clone())]

    def run(name: str) -> list[Tensor]:
        k, v = (t.expand(B, H, -1, -1) for t in leaves[1:])
        out = selected_attention(q, k, v, index=hostile(1), backend=name)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    agree(run("triton"), run("reference"))


@needs_float64
@pytest.mark.parametrize("lists", ["all", "groups"])
def test_gradients(lists: str) -> None:
    index = None if lists == "all" else torch.tensor([[[0, 1, 1, -1], [1, 0, 2, 2]]])
    inputs = [t.requires_grad_() for t in tokens(2, 2, 2, 1, b=1, h=1)]
    turns = tuple(Rotation(*(t[:1] for t in rotation(2, 1, h=1, seed=seed))) for seed in (7, 8))

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return selected_attention(
            *qkv, index=index, sink=True, rotary=turns, kv_end=2, return_lse=True, backend="triton"
        )

    assert torch.autograd.gradcheck(attend, inputs, nondet_tol=0)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_cuda])],
)
def test_error_is_at_most_that_of_products_in_the_same_dtype(dtype: torch.dtype) -> None:
    """Output and gradients against float64, of SDPA of the listed rows: twice its error, and one rounding."""
    index = torch.tensor([[0, 3, 3, 8, 6], [7, 1, 2, 2, 2]], device=DEVICE)
    inputs = tokens(6, d=16, dv=16, dtype=dtype)

    def run(backend: str | None, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = leaves = [t.to(dtype).requires_grad_() for t in inputs]
        if backend is None:
            k, v = (torch.stack([t[b, :, index[b]] for b in range(B)]) for t in (k, v))
            p = (q @ k.mT * 0.25).softmax(-1)
            out = p @ v
        else:
            out = selected_attention(q, k, v, index=index, backend=backend)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=dtype, device=DEVICE).view_as(out)
        return [t.detach().double() for t in (out, *torch.autograd.grad(out, leaves, upstream))]

    for a, b, e in zip(run("triton", dtype), run(None, dtype), run(None, torch.float64), strict=True):
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + rounding


def test_half_types_are_turned_in_float32() -> None:
    q, k, v = tokens(6, dtype=torch.float16)
    turns = (rotation(6, 4, dtype=torch.float32), rotation(NK, 4, dtype=torch.float32))
    out, lse = selected_attention(q, k, v, index=hostile(1), rotary=turns, return_lse=True, backend="triton")
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    exact = [t.double() for t in (q, k, v)]
    wide = tuple(Rotation(*(t.double() for t in turn)) for turn in turns)
    expected = selected_attention(*exact, index=hostile(1), rotary=wide, backend="reference")
    tolerance = 4 * torch.finfo(torch.float16).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_what_is_not_seen_may_be_nan() -> None:
    """Rows that no list names, and keys beyond a bound, for the queries and the keys of other runs."""
    q, k, v = tokens(6, h=1)
    index = hostile(1)
    unnamed = torch.ones(B, NK, dtype=torch.bool, device=DEVICE)
    for b in range(B):
        unnamed[b, [row for row in index[b, 0].tolist() if 0 <= row < NK]] = False
    assert unnamed.any(1).all()
    hidden = [t.masked_fill(unnamed[:, None, :, None], torch.nan) for t in (k, v)]
    plain = outputs_and_gradients([q, k, v], "triton", index=index)
    for a, b in zip(outputs_and_gradients([q, *hidden], "triton", index=index), plain, strict=True):
        assert torch.equal(a, b)

    bounds = [(2, 4), (4, NK)]
    k[:, :, 4:], v[:, :, 4:] = torch.nan, torch.inf
    q[:, :, 3] = torch.nan
    inputs = [q, k, v]
    found, expected = (outputs_and_gradients(inputs, name, kv_end=bounds) for name in ("triton", "reference"))
    for a, b in zip((found[0], found[2]), (expected[0], expected[2]), strict=True):
        assert a[:, :, :2].isfinite().all()
        agree([a[:, :, :2]], [b[:, :, :2]])
    q[:, :, :2], q[:, :, 3] = torch.nan, 0  # now queries that see four keys only
    q, k, v = q, *tokens(6, h=1)[1:]
    found, expected = (outputs_and_gradients([q, k, v], name, kv_end=bounds) for name in ("triton", "reference"))
    agree(found, expected)
    assert found[3][:, :, 4:].isfinite().all()


@pytest.mark.parametrize("sink", [False, True])
def test_no_key_gives_zero_even_for_a_query_of_nan(sink: bool) -> None:
    index = torch.tensor([[-1, NK, INT64.max], [INT64.min, -1, -7]], device=DEVICE)
    q, k, v = tokens(6)
    q[:, :, 1] = torch.nan
    for options in ({"index": index}, {"kv_end": 0}):
        out, lse, *grads = outputs_and_gradients([q, k, v], "triton", sink=sink, **options)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, torch.full_like(lse, 0.0 if sink else -torch.inf))
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_infinite_and_large_scores() -> None:
    q, k, v = tokens(6)
    q[:, :, 1, 0], q[:, :, 2], q[:, :, 3] = torch.inf, torch.nan, 0
    q[:, :, 4] *= 1e4
    found, expected = (selected_attention(q, k, v, return_lse=True, backend=name) for name in ("triton", "reference"))
    agree(list(found), list(expected), 10**4)
    nothing = torch.full_like(k, -torch.inf)
    out, lse = selected_attention(q[:, :, :1].abs() + 1, nothing, v, return_lse=True, backend="triton")
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_scale_is_a_number_or_read_by_the_kernel() -> None:
    q, k, v = tokens(3)
    options: tuple[Any, ...] = (None,) * 5 + ([], [], False)
    expected = reference.forward(q, k, v, *options, 0.3)
    for scale in (0.3, torch.tensor(0.3, dtype=torch.float64, device=DEVICE)):
        agree(list(triton.forward(q, k, v, *options, scale)), list(expected))


def test_same_bits_twice() -> None:
    index = torch.tensor([[[0, 3, 3, 3], [4, 3, 0, 0]]], device=DEVICE).expand(B, 2, 4)
    inputs = tokens(34, 6, h=1, dtype=torch.float32)
    for a, b in zip(*(outputs_and_gradients(inputs, "triton", index=index) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_output_joins_heads_without_a_copy() -> None:
    assert selected_attention(*tokens(3), backend="triton").transpose(1, 2).is_contiguous()


def test_opcheck() -> None:
    q, k, v = (strided(t) for t in tokens(2, b=1, h=1, dtype=torch.float32))
    angles = (*(t[:1] for t in rotation(2, 4, h=1, dtype=torch.float32)), None, None)
    scale = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    call = (q, k, v, hostile(1)[:1, :, :4], *angles, [], [], True, scale, "triton")
    opcheck(attention._forward_op, call)
    out, lse = attention._forward_op(*call)
    opcheck(attention._backward_op, (out, lse, out, lse, *call))


@pytest.mark.parametrize("kv_end", [None, ((1, 3), (1, 8))])
def test_compile_fullgraph(kv_end: KeyBounds | None) -> None:
    torch.compiler.reset()
    index = hostile(2)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        named = {"scale": scale, "kv_end": kv_end, "backend": "triton"}
        out, lse = selected_attention(q, k, v, index=index, sink=True, return_lse=True, **named)
        return out * lse[..., None]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        leaves = [t.requires_grad_() for t in tokens(2)]
        out = function(*leaves, 0.3)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    agree(*results)


def test_limits_are_named() -> None:
    q, k, v = tokens(5)
    wide = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"it serves D up to 256, got 257; it serves Dv up to 256, got 257"):
        selected_attention(wide, wide, wide, backend="triton")
    turn = Rotation(*torch.ones(2, 1, device=DEVICE))
    with pytest.raises(NotImplementedError, match="it turns D up to 128, got 130"):
        selected_attention(*(t[..., :130] for t in (wide, wide, wide)), rotary=(turn, None), backend="triton")
    runs = [(1, n) for n in range(5)]
    with pytest.raises(NotImplementedError, match="it serves up to 4 runs of kv_end, got 5"):
        selected_attention(q, k, v, kv_end=runs, backend="triton")
    if not triton_launch.INTERPRETED:
        with pytest.raises(NotImplementedError, match="it computes in float32, float16 and bfloat16"):
            selected_attention(q.double(), k.double(), v.double(), backend="triton")


def test_op_refuses_what_the_shapes_do_not_promise() -> None:
    q, k, v = tokens(6)
    options: tuple[Any, ...] = (None,) * 4
    last: tuple[Any, ...] = (False, None)
    with pytest.raises(ValueError, match="k must have shape"):
        triton.forward(q, k[:, :1], v, None, *options, [], [], *last)
    with pytest.raises(ValueError, match="index must have shape"):
        triton.forward(q, k, v, hostile(1)[:1], *options, [], [], *last)
    turned = torch.ones(4, dtype=torch.int8, device=DEVICE)
    with pytest.raises(ValueError, match="a rotation must have shape"):
        triton.forward(q, k, v, None, turned, turned, None, None, [], [], *last)
    for runs in (([2, 3], [1, 1]), ([2, 4], [1, 10]), ([7, -1], [1, 2]), ([1] * 5 + [1], [1, 2] * 3)):
        with pytest.raises(ValueError, match="runs must be up to 4"):
            triton.forward(q, k, v, None, *options, *runs, *last)
    out, lse = triton.forward(q, k, v, None, *options, [], [], *last)
    with pytest.raises(ValueError, match="grad_out must have shape"):
        triton.backward(out[:, :, 1:], None, out, lse, q, k, v, None, *options, [], [], *last)


def test_torch_serves_where_it_is_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.empty(1, 4, 256, 64, device=DEVICE) for _ in range(3))
    if triton_launch.INTERPRETED:
        assert triton.slower(q, k, v, None, False)
        monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(triton_launch, "PREFERRED", True)
    assert triton.slower(q, k, v, None, True)
    assert not triton.slower(q, k, v, None, False)
    assert not triton.slower(q, k, v, None, True, 0, True)
    many = q.expand(1024, -1, -1, -1)
    assert triton.slower(many, many, many, None, True, 0, True)


def test_compilations_give_every_argument() -> None:
    from icseg_kernels.attention import triton_kernels

    names = [c.name for c in triton_kernels.COMPILATIONS]
    assert len(set(names)) == len(names)
    for c in triton_kernels.COMPILATIONS:
        assert set(c.signature) | set(c.constants) == set(c.kernel.arg_names)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lists", ["all", "groups"])
def test_calls_are_captured(lists: str, dtype: torch.dtype) -> None:
    """No host synchronisation: a CUDA graph has none."""
    index = None if lists == "all" else torch.randint(-1, 700, (2, 4, 300), device=DEVICE)
    inputs = tokens(256, 700, 64, 64, dtype=dtype)
    options = {"index": index, "sink": True, "kv_end": [(64, 100), (192, 300)]}
    expected = outputs_and_gradients(inputs, "triton", **options)
    agree(expected, outputs_and_gradients(inputs, "reference", **options))
    leaves = [t.detach().requires_grad_() for t in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = selected_attention(*leaves, **options, backend="triton")
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    graph.replay()
    assert torch.equal(out, expected[0])
    assert all(grad.isfinite().all() for grad in grads)
