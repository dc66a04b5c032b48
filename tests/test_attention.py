"""selected_attention against a loop over queries in float64, and against torch's own attention."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from ctypes import byref, c_int64
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies
from samples import BACKENDS, needs_native
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from icseg_kernels import Rotation, attention, library, selected_attention, use_backend
from icseg_kernels.attention import KeyBounds, native

B, H, NQ, NK, D, DV = 2, 3, 6, 9, 8, 5
INT64 = torch.iinfo(torch.int64)
SCALE = torch.tensor(0.3, dtype=torch.float64)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every call without backend= is served by this one."""
    with use_backend(request.param):
        yield request.param


on_every_backend = pytest.mark.usefixtures("backend")


def tokens(
    *,
    nq: int = NQ,
    nk: int = NK,
    dv: int = DV,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, nq, D), (B, H, nk, D), (B, H, nk, dv))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return tuple(t.requires_grad_(grad) for t in (q, k, v))  # type: ignore[return-value]


def hostile_index(dtype: torch.dtype = torch.int64) -> Tensor:
    """[2, 8]: duplicates and every kind of invalid entry; rows 2, 5 and 8 are never named."""
    info = torch.iinfo(dtype)
    lists = [[0, 1, 1, -1, NK, 7, 6, info.max], [info.min, 4, 3, -123456, 4, 4, NK + 1, 0]]
    return torch.tensor(lists, dtype=dtype)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None = None,
    kv_end: KeyBounds | None = None,
    sink: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one query at a time, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    (b, h, nq, d), nk = q.shape, k.shape[2]
    scale = d**-0.5 if scale is None else scale
    lists = torch.arange(nk).expand(b, nk) if index is None else index
    lists = lists[:, None] if lists.ndim == 2 else lists
    kv_end = lists.shape[2] if kv_end is None else kv_end
    runs = [(nq, kv_end)] if isinstance(kv_end, int) else kv_end
    ends = list(itertools.chain.from_iterable([keys] * queries for queries, keys in runs))
    out = torch.zeros(b, h, nq, v.shape[3], dtype=torch.float64)
    lse = torch.full((b, h, nq), -torch.inf, dtype=torch.float64)
    for i, j, n in itertools.product(range(b), range(h), range(nq)):
        group = n // (nq // lists.shape[1])
        rows = [row for row in lists[i, group, : ends[n]].tolist() if 0 <= row < nk]
        keys, values = k[i, j, rows], v[i, j, rows]
        if sink:
            keys, values = (torch.cat([t, torch.zeros(1, t.shape[1], dtype=t.dtype)]) for t in (keys, values))
        if len(keys):
            scores = keys @ q[i, j, n] * scale
            out[i, j, n] = scores.softmax(0) @ values
            lse[i, j, n] = scores.logsumexp(0)
    return out, lse


def rotation(n: int, dtype: torch.dtype = torch.float64, *, seed: int = 7) -> Rotation:
    """Of heads with angles of their own, split from [B, n, h * D / 2] without a copy."""
    angles = torch.randn(B, n, H * D // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Rotation(*(t.to(dtype).view(B, n, H, D // 2).transpose(1, 2) for t in (angles.cos(), angles.sin())))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


LISTS: dict[str, Callable[[], Tensor | None]] = {
    "all": lambda: None,
    "hostile": hostile_index,
    "hostile_int32": lambda: hostile_index(torch.int32),
    "groups": lambda: torch.stack([hostile_index(), hostile_index().flip(1), hostile_index().roll(3, 1)], dim=1),
    "empty": lambda: torch.zeros(B, 0, dtype=torch.int64),
    "long": lambda: torch.arange(40).remainder(NK + 2).expand(B, 40),
}
BOUNDS: dict[str, KeyBounds | None] = {"none": None, "int": 4, "zero": 0, "runs": [(2, 3), (0, 0), (4, 7)]}


@on_every_backend
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("lists", LISTS)
def test_matches_oracle(lists: str, bounds: str, sink: bool) -> None:
    index, kv_end = LISTS[lists](), BOUNDS[bounds]
    if lists == "empty":
        kv_end = None
    q, k, v = tokens()
    out, lse = oracle(q, k, v, index, kv_end, sink)
    close(selected_attention(q, k, v, index=index, kv_end=kv_end, sink=sink), out)
    both = selected_attention(q, k, v, index=index, kv_end=kv_end, sink=sink, return_lse=True)
    close(both[0], out)
    close(both[1], lse)


@on_every_backend
def test_worked_example_by_hand() -> None:
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [float(torch.log(torch.tensor(3.0)))]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    out, lse = selected_attention(q, k, v, index=torch.tensor([[0, 1, 1]]), kv_end=[(1, 2), (1, 3)], return_lse=True)
    close(out.flatten(), torch.tensor([(4 + 3 * 8) / 4, (4 + 6 * 8) / 7]), 1e-6)  # weights 1 : 3 and 1 : 3 : 3
    close(lse.flatten().exp(), torch.tensor([4.0, 7.0]), 1e-6)


@on_every_backend
@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
@pytest.mark.parametrize("indexed", [False, True])
def test_scale(scale: float, indexed: bool) -> None:
    q, k, v = tokens()
    index = hostile_index() if indexed else None
    close(selected_attention(q, k, v, index=index, scale=scale), oracle(q, k, v, index, scale=scale)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dv", [D, DV])
def test_without_index_is_sdpa(dtype: torch.dtype, dv: int) -> None:
    q, k, v = tokens(dtype=dtype, dv=dv)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(selected_attention(q, k, v, backend="reference"), expected)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(selected_attention(q, k, v), expected, rtol=tolerance, atol=tolerance)


@on_every_backend
def test_asymmetric_layout_is_masked_attention() -> None:
    support, registers, target = 3, 2, 4
    n = support + registers + target
    q, k, v = tokens(nq=n, nk=n)
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[:support, support + registers :] = False
    out = selected_attention(q, k, v, kv_end=[(support, support + registers), (registers + target, n)])
    close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@on_every_backend
@pytest.mark.parametrize("return_lse", [False, True])
def test_sink_is_add_zero_attn(return_lse: bool) -> None:
    """Against torch.nn.MultiheadAttention with identity projections."""
    q, k, v = tokens(dv=D)
    module = torch.nn.MultiheadAttention(H * D, H, bias=False, add_zero_attn=True, batch_first=True).double()
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(H * D).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(H * D))
    joined = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    expected = module(*joined, need_weights=False)[0].unflatten(2, (H, D)).transpose(1, 2)
    out = selected_attention(q, k, v, sink=True, return_lse=return_lse)
    close(out[0] if return_lse else out, expected)


@on_every_backend
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_sink_scales_the_output_by_sigmoid_of_lse(indexed: bool, return_lse: bool) -> None:
    q, k, v = tokens()
    index = hostile_index() if indexed else None
    out, lse = selected_attention(q, k, v, index=index, return_lse=True)
    sunk = selected_attention(q, k, v, index=index, sink=True, return_lse=return_lse)
    close(sunk[0] if return_lse else sunk, out * lse.sigmoid()[..., None])


@on_every_backend
def test_rows_that_no_list_names_may_be_nan() -> None:
    q, k, v = tokens()
    index = hostile_index()
    expected = selected_attention(q, k, v, index=index)
    unnamed = torch.ones(B, NK, dtype=torch.bool)
    for b in range(B):
        unnamed[b, [row for row in index[b].tolist() if 0 <= row < NK]] = False
    assert unnamed.any(1).all()
    assert unnamed[1, 1]
    assert not unnamed[0, 1]
    q, k, v = (t.requires_grad_() for t in (q, *(t.masked_fill(unnamed[:, None, :, None], torch.nan) for t in (k, v))))
    out = selected_attention(q, k, v, index=index)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert q.grad.isfinite().all()
    for grad in (k.grad, v.grad):
        assert torch.equal(grad == 0, unnamed[:, None, :, None].expand_as(grad))


@on_every_backend
@pytest.mark.parametrize("sink", [False, True])
def test_no_valid_key_gives_zero(sink: bool) -> None:
    q, k, v = tokens(grad=True)
    index = torch.tensor([[-1, NK, INT64.max], [INT64.min, -1, -7]])
    out, lse = selected_attention(q, k, v, index=index, sink=sink, return_lse=True)
    assert torch.equal(out, torch.zeros(B, H, NQ, DV, dtype=torch.float64))
    assert torch.equal(lse, torch.full((B, H, NQ), 0.0 if sink else -torch.inf, dtype=torch.float64))
    out.sum().backward()
    for t in (q, k, v):
        assert torch.equal(t.grad, torch.zeros_like(t))


@on_every_backend
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dv", [D, DV])
@pytest.mark.parametrize("sizes", [(0, NK, 4), (NQ, 0, 4), (NQ, NK, 0), (0, 0, 0), (NQ, 0, None), (0, NK, None)])
def test_empty_sizes(sizes: tuple[int, int, int | None], dv: int, sink: bool, return_lse: bool) -> None:
    nq, nk, m = sizes
    q, k, v = tokens(nq=nq, nk=nk, dv=dv, grad=True)
    index = None if m is None else torch.zeros(B, m, dtype=torch.int64)
    result = selected_attention(q, k, v, index=index, sink=sink, return_lse=return_lse)
    out = result[0] if return_lse else result
    assert torch.equal(out, torch.zeros(B, H, nq, dv, dtype=torch.float64))
    out.sum().backward()
    for t in (q, k, v):
        assert torch.equal(t.grad, torch.zeros_like(t))


@on_every_backend
@pytest.mark.parametrize("dv", [D, DV])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("bounds", ["no_rows", "zero", "run"])
def test_no_key_gives_zero_even_for_a_query_of_nan(bounds: str, return_lse: bool, dv: int) -> None:
    q, k, v = tokens(dv=dv, nk=0 if bounds == "no_rows" else NK)
    q[:, :, :2] = torch.nan
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    kv_end: dict[str, KeyBounds | None] = {"no_rows": None, "zero": 0, "run": [(2, 0), (4, NK)]}
    result = selected_attention(q, k, v, kv_end=kv_end[bounds], return_lse=return_lse)
    out = result[0] if return_lse else result
    assert torch.equal(out[:, :, :2], torch.zeros(B, H, 2, dv, dtype=torch.float64))
    if bounds == "run":
        close(out[:, :, 2:], F.scaled_dot_product_attention(q[:, :, 2:], k, v))
    out.sum().backward()
    assert torch.equal(q.grad[:, :, :2], torch.zeros(B, H, 2, D, dtype=torch.float64))
    for grad in (q.grad, k.grad, v.grad):
        assert grad.isfinite().all()


@on_every_backend
@pytest.mark.parametrize("options", [{}, {"sink": True}, {"kv_end": 4}, {"return_lse": True}])
@pytest.mark.parametrize("indexed", [False, True])
def test_tokens_without_features_are_averaged(indexed: bool, options: dict[str, Any]) -> None:
    q, k, v = tokens()
    q, k = q[..., :0], k[..., :0]
    index = hostile_index() if indexed else None
    result = selected_attention(q, k, v, index=index, **options)
    kv_end, sink = options.get("kv_end"), options.get("sink", False)
    expected, lse = oracle(q, k, v, index, kv_end, sink, scale=1.0)
    if options.get("return_lse"):
        close(result[1], lse)
    close(result[0] if options.get("return_lse") else result, expected)


@on_every_backend
def test_empty_batch_and_groups_without_queries() -> None:
    q, k, v = tokens()
    assert selected_attention(q[:0], k[:0], v[:0], index=hostile_index()[:0]).shape == (0, H, NQ, DV)
    index = hostile_index()[:, None].expand(B, 4, 8)
    assert selected_attention(q[:, :, :0], k, v, index=index, kv_end=[]).shape == (B, H, 0, DV)


def few_channels(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Two heads of at most four channels, as leaves: numerical differentiation calls twice for each element."""
    return tuple(t[:, :2, :, :4].detach().requires_grad_() for t in tensors)


@on_every_backend
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bounds", ["none", "runs"])
@pytest.mark.parametrize("lists", ["all", "hostile", "groups"])
def test_gradients(lists: str, bounds: str, sink: bool) -> None:
    """With logsumexp, so that every call but the last goes through the registered op."""
    index, kv_end = LISTS[lists](), BOUNDS[bounds]
    inputs = few_channels(*tokens())

    def both(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return selected_attention(*qkv, index=index, kv_end=kv_end, sink=sink, return_lse=True)

    assert torch.autograd.gradcheck(both, inputs, nondet_tol=0.0)
    if index is None:
        assert torch.autograd.gradcheck(lambda *qkv: selected_attention(*qkv, kv_end=kv_end, sink=sink), inputs)


def test_gradients_of_both_paths_agree() -> None:
    plain, written = tokens(grad=True), tokens(grad=True)
    bounds, options = [(2, 3), (4, 9)], {"sink": True, "backend": "reference"}
    selected_attention(*plain, kv_end=bounds, **options).square().sum().backward()
    out, _ = selected_attention(*written, kv_end=bounds, return_lse=True, **options)
    out.square().sum().backward()
    for a, b in zip(plain, written, strict=True):
        close(a.grad, b.grad)


@on_every_backend
def test_second_derivative_of_a_list_is_refused() -> None:
    q, k, v = tokens(grad=True)
    out = selected_attention(q, k, v, index=hostile_index())
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("options", [{}, {"index": hostile_index()}, {"return_lse": True}])
def test_functional_transforms(options: dict[str, Any]) -> None:
    """Reverse mode is that of autograd; forward mode is refused rather than taken for zero."""
    q, k, v = tokens(grad=True)

    def loss(q: Tensor) -> Tensor:
        result = selected_attention(q, k.detach(), v.detach(), **options)
        return (result[0] if isinstance(result, tuple) else result).square().sum()

    (expected,) = torch.autograd.grad(loss(q), q)
    close(torch.func.grad(loss)(q.detach()), expected)
    if options:  # without, it is SDPA, which differentiates in float64
        for grad_mode in (torch.enable_grad(), torch.no_grad()):  # forward mode heeds neither
            with grad_mode, pytest.raises(NotImplementedError, match="forward"):
                torch.func.jvp(loss, (q.detach(),), (torch.ones_like(q),))


@on_every_backend
def test_logsumexp_merges_disjoint_keys() -> None:
    q, k, v = tokens()
    parts = [selected_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 4), slice(4, NK))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    close(merged, selected_attention(q, k, v))


@on_every_backend
def test_order_of_the_list_does_not_matter() -> None:
    q, k, v = tokens()
    index = hostile_index()
    shuffled = index[:, torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])]
    close(selected_attention(q, k, v, index=shuffled), selected_attention(q, k, v, index=index))


@on_every_backend
def test_one_list_is_the_same_list_for_every_group() -> None:
    q, k, v = tokens()
    index = hostile_index()
    out = selected_attention(q, k, v, index=index[:, None].expand(B, NQ, 8))
    close(out, selected_attention(q, k, v, index=index))


@on_every_backend
def test_batch_rows_are_independent() -> None:
    q, k, v = tokens()
    index = hostile_index()
    out = selected_attention(q, k, v, index=index)
    alone = selected_attention(q[1:], k[1:], v[1:], index=index[1:])
    close(out[1:], alone)


def strided(t: Tensor) -> Tensor:
    """The same values in a larger, transposed buffer of NaN."""
    b, h, n, d = t.shape
    buffer = torch.full((b, n + 1, h, 2 * d + 1), torch.nan, dtype=t.dtype)
    view = buffer[:, 1:, :, 1::2].transpose(1, 2)
    view.copy_(t)
    return view


@on_every_backend
@pytest.mark.parametrize("indexed", [False, True])
def test_strided_views(indexed: bool) -> None:
    q, k, v = tokens()
    index = hostile_index() if indexed else None
    expected = selected_attention(q, k, v, index=index)
    apart = None if index is None else torch.stack([index, index + 1], dim=-1)[..., 0]
    views = [strided(t).requires_grad_() for t in (q, k, v)]
    out = selected_attention(*views, index=apart)
    close(out, expected)
    out.sum().backward()
    plain = [t.requires_grad_() for t in (q, k, v)]
    selected_attention(*plain, index=index).sum().backward()
    for a, b in zip(views, plain, strict=True):
        close(a.grad, b.grad)


@on_every_backend
def test_keys_shared_by_heads_and_batch() -> None:
    q, k, v = tokens()
    k, v = k[:1, :1].clone().requires_grad_(), v[:1, :1].clone().requires_grad_()
    shared = [t.expand(B, H, -1, -1) for t in (k, v)]
    close(selected_attention(q, *shared, index=hostile_index()), oracle(q, *shared, hostile_index())[0])
    assert torch.autograd.gradcheck(
        lambda k, v: selected_attention(q, k.expand(B, H, -1, -1), v.expand(B, H, -1, -1), index=hostile_index()),
        (k, v),
    )


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_no_larger_than_that_of_sdpa(dtype: torch.dtype) -> None:
    """Output and gradients against float64, with the rows that the list names gathered for SDPA."""
    index = torch.tensor([[0, 3, 3, 8, 6], [7, 1, 2, 2, 2]])

    def run(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (t.to(dtype).requires_grad_() for t in tokens(dtype=half, seed=5))
        out = attend(q, k, v)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out))
        return [t.detach().double() for t in (out, q.grad, k.grad, v.grad)]

    def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.stack([t[b, :, index[b]] for b in range(B)]) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    half = dtype
    exact = run(gathered, torch.float64)
    ours = run(lambda q, k, v: selected_attention(q, k, v, index=index), dtype)
    theirs = run(gathered, dtype)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert (a - e).abs().max() <= (b - e).abs().max() + rounding


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_keep_dtype_and_return_float32_lse(dtype: torch.dtype) -> None:
    q, k, v = tokens(dtype=dtype)
    out, lse = selected_attention(q, k, v, index=hostile_index(), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    close(lse, oracle(q, k, v, hostile_index())[1], 1e-5)


@on_every_backend
def test_large_scores_do_not_overflow() -> None:
    q, k, v = tokens(dtype=torch.float32)
    q, k = (200 * (3 * t).round() for t in (q, k))  # scores of up to 1e7, all exact in float32
    out = selected_attention(q, k, v, index=hostile_index(), scale=1.0)
    close(out, oracle(q, k, v, hostile_index(), scale=1.0)[0], 1e-6)


@on_every_backend
@pytest.mark.parametrize("indexed", [False, True])
def test_autocast_computes_as_sdpa_does(indexed: bool) -> None:
    q, k, v = tokens(dtype=torch.float32, grad=True)
    index = hostile_index() if indexed else None
    with torch.autocast("cpu", torch.bfloat16):
        out = selected_attention(q, k.bfloat16(), v, index=index)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        out.float().sum().backward()
    low = (t.detach().bfloat16() for t in (q, k, v))
    assert torch.equal(out, selected_attention(*low, index=index))
    assert q.grad.dtype == torch.float32


@on_every_backend
def test_same_bits_twice_and_for_any_thread_count() -> None:
    index = torch.arange(400).remainder(7).expand(B, 400)

    def run() -> list[Tensor]:
        q, k, v = tokens(nq=64, dtype=torch.float32, grad=True)
        out = selected_attention(q, k, v, index=index)
        out.square().sum().backward()
        return [out, q.grad, k.grad, v.grad]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [run(), run()]
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*one, two, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(
    ("indexed", "turned", "scale", "runs"),
    [(False, True, SCALE, ([], [])), (True, False, None, ([2, 4], [3, 8]))],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(
    name: str, indexed: bool, turned: bool, scale: Tensor | None, runs: tuple[list[int], list[int]]
) -> None:
    for dtype in (torch.float32, torch.bfloat16)[: 1 + indexed]:
        q, k, v = (strided(t) for t in tokens(dtype=dtype))
        index = hostile_index()[:, None] if indexed else None
        angles = (*rotation(NQ, torch.float32), *rotation(NK, torch.float32)) if turned else (None,) * 4
        call = (q, k, v, index, *angles, *runs, True, scale, name)
        opcheck(attention._forward_op, call)
        out, lse = attention._forward_op(*call)
        opcheck(attention._backward_op, (out, None if turned else lse, out, lse, *call))


@on_every_backend
@pytest.mark.parametrize(
    ("lists", "kv_end"),
    [("all", None), ("all", ((2, 3), (4, 8))), ("hostile", 5), ("groups", None), ("groups", ((2, 3), (4, 8)))],
)
def test_compile_fullgraph(lists: str, kv_end: KeyBounds | None) -> None:
    index = LISTS[lists]()
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = selected_attention(q, k, v, index=index, kv_end=kv_end, sink=True, return_lse=True)
        return selected_attention(q, k, v, index=index, kv_end=kv_end) + out * lse[..., None]

    eager, compiled = tokens(grad=True), tokens(grad=True)
    expected = attend(*eager)
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*compiled)
    close(out, expected)
    expected.sum().backward()
    out.sum().backward()
    for a, b in zip(eager, compiled, strict=True):
        close(a.grad, b.grad)


@on_every_backend
def test_compile_serves_new_values_and_sizes_without_recompiling() -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v, index: selected_attention(q, k, v, index=index, sink=True),
        fullgraph=True,
        dynamic=True,
        backend=counting,
    )
    for n in (4, 5, 9):
        q, k, v = tokens(nq=n, nk=n + 2, seed=n)
        index = torch.randint(-1, n + 3, (B, 2 * n + 3))
        close(compiled(q, k, v, index), oracle(q, k, v, index, sink=True)[0])
    assert graphs == 1


@on_every_backend
@pytest.mark.parametrize("options", [{}, {"index": hostile_index()}, {"return_lse": True}])
def test_compile_serves_new_scales_without_recompiling(options: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        result = selected_attention(q, k, v, scale=scale, **options)
        return result[0] if isinstance(result, tuple) else result

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for i in range(4):
        q, k, v = tokens(seed=i, grad=True)
        out = compiled(q, k, v, 0.1 + 0.2 * i)
        close(out, attend(q, k, v, 0.1 + 0.2 * i))
        out.sum().backward()
    assert counter.frame_count <= 2


def bad(**changes: object) -> dict[str, object]:
    q, k, v = tokens(dtype=torch.float32)
    return {"q": q, "k": k, "v": v, **changes}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bad(q=torch.zeros(2, 3, 4)),
            ValueError,
            r"q must have shape \[B, h, Nq, D\], got \[2, 3, 4\]",
        ),
        (lambda: bad(k=torch.zeros(2, 3, 9, 7)), ValueError, "k must have shape .* D = 2, 3, 8, got"),
        (lambda: bad(v=torch.zeros(2, 3, 8, 5)), ValueError, "v must have shape .* Nk = 2, 3, 9, got"),
        (lambda: bad(v=torch.zeros(2, 3, 9, 5).half()), TypeError, "must have one floating dtype"),
        (lambda: bad(index=torch.zeros(2, 4)), TypeError, "index must be int32 or int64, got torch.float32"),
        (lambda: bad(index=torch.zeros(3, 4).long()), ValueError, r"with B = 2, got \[3, 4\]"),
        (lambda: bad(index=torch.zeros(2, 4, 3).long()), ValueError, "G groups that divide Nq = 6"),
        (lambda: bad(index=torch.zeros(2, 0, 3).long()), ValueError, "G groups that divide Nq = 6"),
        (lambda: bad(kv_end=10), ValueError, "from 0 to 9 .*, got 10"),
        (lambda: bad(kv_end=-1), ValueError, "from 0 to 9 .*, got -1"),
        (lambda: bad(kv_end=5, index=torch.zeros(2, 4).long()), ValueError, "from 0 to 4 .*, got 5"),
        (lambda: bad(kv_end=[(3, 1), (2, 4)]), ValueError, r"add up to Nq = 6, got \[3, 2\]"),
        (lambda: bad(kv_end=[(7, 1), (-1, 4)]), ValueError, r"add up to Nq = 6, got \[7, -1\]"),
        (lambda: bad(kv_end=[(3, 1), (3, 10)]), ValueError, r"from 0 to 9, got \[1, 10\]"),
        (lambda: bad(kv_end=[3, 3]), TypeError, r"kv_end\[0\] must be a pair of integers, got 3"),
        (lambda: bad(kv_end=[(3, 3, 3)]), ValueError, r"kv_end\[0\] must be a pair of integers, got 3 of them"),
        (lambda: bad(index=torch.zeros(2, 4, device="meta").long()), ValueError, "index must be on cpu, .* got meta"),
        (lambda: bad(k=torch.zeros(2, 3, 9, 8, device="meta")), ValueError, "k must be on cpu, .* got meta"),
        (lambda: bad(v=torch.zeros(2, 3, 9, 5, device="meta")), ValueError, "v must be on cpu, .* got meta"),
        (lambda: bad(scale=torch.inf), ValueError, "scale must be a finite number, got inf"),
        (
            lambda: bad(kv_end=torch.tensor([[6, 9]])),
            TypeError,
            "an integer from 0 to 9 or a sequence of .queries, keys. pairs",
        ),
        (
            lambda: bad(kv_end=[(3, 1), (3, 2)], index=torch.zeros(2, 3, 4).long()),
            ValueError,
            "whole groups of 2 queries",
        ),
        (lambda: bad(rotary=rotation(NQ)[0]), TypeError, "rotary must be a pair of rotations, .* got Tensor"),
        (lambda: bad(rotary=(None, 1.0)), TypeError, r"rotary\[1\] must be a Rotation or None, got 1.0"),
        (
            lambda: bad(rotary=(rotation(NQ), None)),
            TypeError,
            r"rotary\[0\].cos must be torch.float32 .*, got torch.float64",
        ),
        (
            lambda: bad(rotary=(None, rotation(NQ, torch.float32))),
            ValueError,
            r"rotary\[1\].cos must be broadcastable to \[2, 3, 9, 4\], got shape \[2, 3, 6, 4\]",
        ),
        (
            lambda: bad(q=torch.zeros(2, 3, 6, 5), k=torch.zeros(2, 3, 9, 5), rotary=(rotation(NQ), None)),
            ValueError,
            "D must be even, got 5",
        ),
        (lambda: bad(backend="cuda"), NotImplementedError, "selected_attention has no cuda backend"),
        (lambda: bad(backend="fast"), ValueError, "backend must be one of"),
    ],
)
def test_errors(call: Callable[[], dict[str, object]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        selected_attention(**call())  # type: ignore[call-overload]


# --- rotary -----------------------------------------------------------------------------------------


def turned_by_loop(x: Tensor, turn: Rotation) -> Tensor:
    """x [B, h, N, D] as complex numbers times e^(i angle)."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(turn.cos.double(), turn.sin.double())).flatten(-2)


@on_every_backend
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("lists", LISTS)
def test_rotary_turns_pairs_of_channels(lists: str, return_lse: bool) -> None:
    q, k, v = tokens()
    index, turns = LISTS[lists](), (rotation(NQ), rotation(NK, seed=8))
    expected, lse = oracle(turned_by_loop(q, turns[0]), turned_by_loop(k, turns[1]), v, index, sink=True)
    result = selected_attention(q, k, v, index=index, sink=True, rotary=turns, return_lse=return_lse)
    close(result[0] if return_lse else result, expected)
    if return_lse:
        close(result[1], lse)
    alone = selected_attention(q, k, v, index=index, rotary=(None, turns[1]), return_lse=True)[0]
    close(alone, oracle(q, turned_by_loop(k, turns[1]), v, index)[0])


@on_every_backend
@pytest.mark.parametrize("shape", [(NQ, D // 2), (1, NQ, 1), (B, 1, 1, D // 2), ()])
def test_rotary_is_broadcast(shape: tuple[int, ...]) -> None:
    q, k, v = tokens()
    angle = torch.linspace(0, 3, max(1, torch.Size(shape).numel()), dtype=torch.float64).view(shape)
    turn = Rotation(angle.cos(), angle.sin())
    whole = Rotation(*(t.expand(B, H, NQ, D // 2) for t in turn))
    out = selected_attention(q, k, v, index=hostile_index(), rotary=(turn, None))
    close(out, oracle(turned_by_loop(q, whole), k, v, hostile_index())[0])


@on_every_backend
@pytest.mark.parametrize("indexed", [False, True])
def test_gradients_are_turned_back(indexed: bool) -> None:
    index = hostile_index() if indexed else None
    turns = tuple(Rotation(*(t[:, :2, :, :2] for t in turn)) for turn in (rotation(NQ), rotation(NK, seed=8)))
    inputs = few_channels(*tokens())

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return selected_attention(*qkv, index=index, sink=True, rotary=turns, return_lse=True)

    assert torch.autograd.gradcheck(attend, inputs, nondet_tol=0)
    if not indexed:
        assert torch.autograd.gradcheck(lambda *qkv: selected_attention(*qkv, rotary=turns), inputs)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_turned_in_float32(dtype: torch.dtype) -> None:
    q, k, v = tokens(dtype=dtype)
    turns = (rotation(NQ, torch.float32), rotation(NK, torch.float32))
    out = selected_attention(q, k, v, index=hostile_index(), rotary=turns)
    assert out.dtype == dtype
    expected = oracle(turned_by_loop(q, turns[0]), turned_by_loop(k, turns[1]), v, hostile_index())[0]
    close(out, expected, 2 * torch.finfo(dtype).eps)


@on_every_backend
def test_rotation_gets_no_gradient() -> None:
    q, k, v = tokens(grad=True)
    turn = Rotation(*(t.requires_grad_() for t in rotation(NQ)))
    for options in ({}, {"index": hostile_index()}):
        selected_attention(q, k, v, rotary=(turn, None), **options).sum().backward()
    assert turn.cos.grad is None
    assert turn.sin.grad is None


# --- native against reference -----------------------------------------------------------------------


def random_case(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Tokens and options of any kind, sizes about those of tiles, panels and blocks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    b, h, per, groups = draw(1, 2), draw(1, 3), draw(1, 5, 12, 13, 49), draw(1, 1, 3)
    nq, nk, d, dv = per * groups, draw(1, 31, 33, 97, 500), draw(2, 8, 16, 34), draw(1, 16, 17, 40)
    q, k, v = (
        torch.randn(b, h, n, width, generator=generator, dtype=torch.float64).to(dtype)
        for n, width in ((nq, d), (nk, d), (nk, dv))
    )
    options: dict[str, Any] = {"sink": draw(False, True), "scale": draw(None, 0.3)}
    listed = nk
    if draw(True, True, False) or groups > 1:
        listed = draw(0, 1, 33, 96, 200, 1000)
        kind = draw(torch.int32, torch.int64)
        options["index"] = torch.randint(-2, nk + 2, (b, groups, listed), generator=generator).to(kind)
    if draw(True, False):
        first = per if groups > 1 else draw(1, nq // 2 + 1)
        options["kv_end"] = [(first, listed // 2), (nq - first, listed)] if nq > first else listed // 3
    if draw(True, False):
        angles = torch.randn(b, h, nk, d // 2, generator=generator, dtype=torch.float64)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        turn = Rotation(angles.cos().to(wide), angles.sin().to(wide))
        options["rotary"] = (Rotation(turn.cos[:, :, :1], turn.sin[:, :, :1]), turn)
    return [strided(t) if draw(True, False) else t for t in (q, k, v)], options


def outputs_and_gradients(call: tuple[list[Tensor], dict[str, Any]], name: str) -> list[Tensor]:
    tensors, options = call
    inputs = [t.detach().requires_grad_() for t in tensors]
    out, lse = selected_attention(*inputs, **options, return_lse=True, backend=name)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    grads[1].masked_fill_(lse.isinf(), 0)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], inputs, grads)]


def agree(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, roundings: int = 30) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        tolerance = roundings * torch.finfo(dtype).eps
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * (1 + b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0)
        )


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_native_equals_reference(isa: str, dtype: torch.dtype) -> None:
    for seed in range(25):
        case = random_case(seed, dtype)
        agree(outputs_and_gradients(case, "native"), outputs_and_gradients(case, "reference"), dtype)


@needs_native
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=strategies.integers(100, 10**9))
def test_native_equals_reference_on_any_case(seed: int) -> None:
    tokens, options = case = random_case(seed, torch.float64)
    # The same key listed again and again gives equal terms, whose roundings all go the same way.
    terms = options["index"].shape[2] if "index" in options else tokens[1].shape[2]
    agree(outputs_and_gradients(case, "native"), outputs_and_gradients(case, "reference"), torch.float64, 30 + terms)


@needs_native
@pytest.mark.parametrize("sizes", [(1, 2, 250, 700, 32), (3, 1, 70, 600, 48), (1, 1, 600, 600, 64), (5, 5, 70, 90, 16)])
def test_native_bits_do_not_depend_on_threads(sizes: tuple[int, ...]) -> None:
    """Units that divide among the threads and that do not, with few keys and many."""
    b, h, nq, nk, d = sizes
    generator = torch.Generator().manual_seed(0)
    case = ([torch.randn(b, h, n, d, generator=generator) for n in (nq, nk, nk)], {"sink": True})
    lists = torch.randint(-1, nk + 1, (b, nk), generator=generator)
    threads = torch.get_num_threads()
    for options in ({}, {"index": lists}, {"index": lists, "kv_end": [(nq // 3, 50), (nq - nq // 3, nk)]}):
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(outputs_and_gradients((case[0], case[1] | options), "native"))
        finally:
            torch.set_num_threads(threads)
        for a, b, c in zip(*results, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_special_values(isa: str, dtype: torch.dtype) -> None:
    """Infinite and NaN scores do as they do in the reference, in their own rows only."""
    q, k, v = (t.to(dtype) for t in tokens(nq=30, nk=40))
    q[:, :, 3, 0], q[:, :, 5], q[:, :, 7] = torch.inf, torch.nan, 0
    q[:, :, 9] *= 1e4
    for index in (None, hostile_index().remainder(40)):
        found, expected = (
            selected_attention(q, k, v, index=index, return_lse=True, backend=name) for name in ("native", "reference")
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    nothing = torch.full((B, H, 40, D), -torch.inf, dtype=dtype)
    out, lse = selected_attention(q[:, :, :2].abs() + 1, nothing, v, return_lse=True, backend="native")
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@needs_native
def test_native_exponential(isa: str) -> None:
    """softmax of two keys, one of score 0 and value 0: v e^s / (1 + e^s)."""
    s = torch.linspace(-120, 0, 4001)
    one = torch.ones(1, 1, 1, 1)
    out = selected_attention(s.view(1, 1, -1, 1), one, one, sink=True, scale=1.0, backend="native")
    exact = s.double().sigmoid().view_as(out)
    assert ((out - exact).abs() <= 3 * torch.finfo(torch.float32).eps * exact + 2e-38).all()


@needs_native
def test_native_reads_beyond_2_to_the_31_elements() -> None:
    """Rows far apart, in memory that is reserved and never touched but for them."""
    q, k, v = tokens(nq=2, nk=3, dv=D, dtype=torch.float32)
    far = 2**30 + 5
    storage = torch.empty(3 * far + B * H * D, dtype=torch.float32)
    apart = storage.as_strided(k.shape, (H * D, D, far, 1)).copy_(k)
    index = torch.tensor([[2, 0], [1, 2]])
    found = selected_attention(q, apart, v, index=index, backend="native")
    assert torch.equal(found, selected_attention(q, k, v, index=index, backend="native"))


@needs_native
def test_native_output_joins_heads_without_a_copy() -> None:
    out = selected_attention(*tokens(), index=hostile_index(), backend="native")
    assert out.transpose(1, 2).is_contiguous()


@needs_native
def test_none_takes_native_where_torch_is_not_faster() -> None:
    q, k, v = (torch.empty(1, 4, 256, 64) for _ in range(3))

    def chosen(*call: Any, by_sdpa: bool = True) -> str:
        return attention.backends.select("selected_attention", None, *call, by_sdpa)

    assert chosen(q, k, v, None) == "native"
    assert chosen(q[:, :, :40], k[:, :, :40], v[:, :, :40], None) == "reference"
    assert chosen(q[:, :, :40], k[:, :, :40], v[:, :, :40], None, by_sdpa=False) == "native"
    assert chosen(q.half(), k.half(), v.half(), None) == "reference"
    assert chosen(q.half(), k.half(), v.half(), hostile_index(), by_sdpa=False) == "native"
    q.requires_grad_()
    assert chosen(q, k, v, None) == "reference"
    with torch.no_grad():
        assert chosen(q, k, v, None) == "native"


def expect(message: str | None, code: int) -> None:
    """The library's answer is an error of this message, or none."""
    if message is None:
        library.check(code)
        return
    with pytest.raises(RuntimeError, match=message):
        library.check(code)


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"batch": -1}, "must not be negative"),
        ({"queries": 2**62}, "63 bits"),
        ({"batch": 2**40, "heads": 2**40}, "63 bits"),
        ({"dim": 2**40, "listed": 2**40}, "63 bits"),
        ({"element_bytes": 2}, "element_bytes must be"),
        ({"groups": 4}, "runs must add up"),
        ({"slots": 0}, "runs must add up"),
        ({"indexed": 0, "groups": 2}, "runs must add up"),
    ],
)
@pytest.mark.parametrize("backward", [0, 1])
def test_native_codes_of_impossible_sizes(changes: dict[str, int], message: str | None, backward: int) -> None:
    sizes = {"batch": 1, "heads": 2, "queries": 6, "dim": 8, "value_dim": 8, "groups": 1, "listed": 9, "indexed": 1}
    sizes |= {"runs": 0, "slots": 2, "element_bytes": 4}
    expect(message, native._workspace(*(sizes | changes).values(), backward, byref(c_int64())))


@needs_native
def test_native_codes_of_impossible_calls() -> None:
    q, k, v = tokens(dtype=torch.float32)
    index, none = hostile_index()[:, None], (None,) * 4
    out, lse = torch.zeros(B, NQ, H, DV), torch.zeros(B, H, NQ)

    def code(index: Tensor | None = index, runs: list[int] | None = None, workspace: int | None = None) -> int:
        _workspace, call = native._call(q, k, v, index, *none, len(runs or []) // 2, False, None, False)
        if workspace is not None:
            call = call[:-16] + workspace.to_bytes(8, "little") + call[-8:]
        given = None if runs is None else struct.pack(f"{len(runs)}q", *runs)
        count = 0 if runs is None else len(runs) // 2
        return native._FORWARD[q.dtype](call, given, count, out.data_ptr(), lse.data_ptr())

    expect(None, code())
    expect(None, code(runs=[2, 3, 4, 8]))
    for runs in ([2, 3], [2, 3, 5, 8], [2, 3, 4, 9], [0, 3, 6, 8], [-2, 3, 8, 8], [2, -1, 4, 8]):
        expect("runs must add up", code(runs=runs))
    expect("runs must add up", code(index=index.expand(B, 3, 8), runs=[3, 1, 3, 8]))
    expect("workspace must be larger", code(workspace=100))


@needs_native
def test_native_op_refuses_what_the_shapes_do_not_promise() -> None:
    q, k, v = tokens(dtype=torch.float32)
    options: tuple[Any, ...] = (None, None, None, None, [], [], False, None)
    with pytest.raises(ValueError, match="k must have shape"):
        native.forward(q, k[:, :2], v, None, *options)
    with pytest.raises(ValueError, match="index must have shape"):
        native.forward(q, k, v, hostile_index()[:1, None], *options)
    with pytest.raises(TypeError, match="index must be int32 or int64"):
        native.forward(q, k, v, hostile_index()[:, None].double(), *options)
    with pytest.raises(ValueError, match="a rotation must be broadcastable"):
        native.forward(q, k, v, None, torch.ones(7, 4), torch.ones(7, 4), *options[2:])
    out, lse = native.forward(q, k, v, None, *options)
    with pytest.raises(ValueError, match="grad_out must have shape"):
        native.backward(out[:, :, 1:], None, out, lse, q, k, v, None, *options)


@needs_native
def test_native_op_takes_half_a_rotation_for_none_as_the_reference_does() -> None:
    q, k, v = tokens()
    cos = rotation(NQ).cos
    options: tuple[Any, ...] = ([], [], False, None)
    halves = native.forward(q, k, v, None, cos, None, None, cos[:, :, :1], *options)
    for found, plain in zip(halves, native.forward(q, k, v, *(None,) * 5, *options), strict=True):
        assert torch.equal(found, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lists", ["all", "hostile", "groups"])
def test_cuda_agrees_repeats_and_captures(lists: str) -> None:
    """Values of the CPU, the same gradient bits twice, and no host synchronisation: a CUDA graph has none."""
    index = LISTS[lists]()
    index = None if index is None else index.cuda()

    def run() -> list[Tensor]:
        q, k, v = (t.detach().cuda().requires_grad_() for t in tokens())
        out, lse = selected_attention(q, k, v, index=index, kv_end=[(2, 3), (4, 8)], sink=True, return_lse=True)
        (out.square().sum() + lse.sum()).backward()
        return [out.detach(), q.grad, k.grad, v.grad]

    once = run()
    for a, b in zip(once, run(), strict=True):
        assert torch.equal(a, b)
    q, k, v = tokens()
    close(once[0].cpu(), oracle(q, k, v, LISTS[lists](), [(2, 3), (4, 8)], sink=True)[0])

    low = [t.cuda().half() for t in (q, k, v)]
    expected = selected_attention(*low, index=index, sink=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = selected_attention(*low, index=index, sink=True)
    graph.replay()
    assert torch.equal(captured, expected)


@needs_native
def test_the_library_turns_pairs_only() -> None:
    tokens, angle = torch.zeros(1, 1, 2, 3), torch.zeros(1)
    with pytest.raises(ValueError, match=r"^a rotation turns pairs of channels, so D must be even, got 3$"):
        torch.ops.icseg.selected_attention(
            tokens, tokens, tokens, None, angle, angle, None, None, [], [], False, None, "native"
        )
