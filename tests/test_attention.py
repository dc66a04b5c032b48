"""selected_attention against a loop over queries in float64, and against torch's own attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from icseg_kernels import attention, selected_attention
from icseg_kernels.attention import KeyBounds

B, H, NQ, NK, D, DV = 2, 3, 6, 9, 8, 5
INT64 = torch.iinfo(torch.int64)
SCALE = torch.tensor(0.3, dtype=torch.float64)


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


def test_worked_example_by_hand() -> None:
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [float(torch.log(torch.tensor(3.0)))]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    out, lse = selected_attention(q, k, v, index=torch.tensor([[0, 1, 1]]), kv_end=[(1, 2), (1, 3)], return_lse=True)
    close(out.flatten(), torch.tensor([(4 + 3 * 8) / 4, (4 + 6 * 8) / 7]), 1e-6)  # weights 1 : 3 and 1 : 3 : 3
    close(lse.flatten().exp(), torch.tensor([4.0, 7.0]), 1e-6)


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
    assert torch.equal(selected_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_asymmetric_layout_is_masked_attention() -> None:
    support, registers, target = 3, 2, 4
    n = support + registers + target
    q, k, v = tokens(nq=n, nk=n)
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[:support, support + registers :] = False
    out = selected_attention(q, k, v, kv_end=[(support, support + registers), (registers + target, n)])
    close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


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


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_sink_scales_the_output_by_sigmoid_of_lse(indexed: bool, return_lse: bool) -> None:
    q, k, v = tokens()
    index = hostile_index() if indexed else None
    out, lse = selected_attention(q, k, v, index=index, return_lse=True)
    sunk = selected_attention(q, k, v, index=index, sink=True, return_lse=return_lse)
    close(sunk[0] if return_lse else sunk, out * lse.sigmoid()[..., None])


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


def test_empty_batch_and_groups_without_queries() -> None:
    q, k, v = tokens()
    assert selected_attention(q[:0], k[:0], v[:0], index=hostile_index()[:0]).shape == (0, H, NQ, DV)
    index = hostile_index()[:, None].expand(B, 4, 8)
    assert selected_attention(q[:, :, :0], k, v, index=index, kv_end=[]).shape == (B, H, 0, DV)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bounds", ["none", "runs"])
@pytest.mark.parametrize("lists", ["all", "hostile", "groups"])
def test_gradients(lists: str, bounds: str, sink: bool) -> None:
    """With logsumexp, so that every call but `all` and the first output goes through the registered op."""
    index, kv_end = LISTS[lists](), BOUNDS[bounds]
    inputs = tokens(grad=True)

    def both(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return selected_attention(*qkv, index=index, kv_end=kv_end, sink=sink, return_lse=True)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradcheck(lambda *qkv: selected_attention(*qkv, kv_end=kv_end, sink=sink), inputs)


def test_gradients_of_both_paths_agree() -> None:
    plain, written = tokens(grad=True), tokens(grad=True)
    selected_attention(*plain, kv_end=[(2, 3), (4, 9)], sink=True).square().sum().backward()
    out, _ = selected_attention(*written, kv_end=[(2, 3), (4, 9)], sink=True, return_lse=True)
    out.square().sum().backward()
    for a, b in zip(plain, written, strict=True):
        close(a.grad, b.grad)


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
    assert torch.equal(torch.func.grad(loss)(q.detach()), expected)
    if options:  # without, it is SDPA, which differentiates in float64
        for grad_mode in (torch.enable_grad(), torch.no_grad()):  # forward mode heeds neither
            with grad_mode, pytest.raises(NotImplementedError, match="forward"):
                torch.func.jvp(loss, (q.detach(),), (torch.ones_like(q),))


def test_logsumexp_merges_disjoint_keys() -> None:
    q, k, v = tokens()
    parts = [selected_attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 4), slice(4, NK))]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    close(merged, selected_attention(q, k, v))


def test_order_of_the_list_does_not_matter() -> None:
    q, k, v = tokens()
    index = hostile_index()
    shuffled = index[:, torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])]
    close(selected_attention(q, k, v, index=shuffled), selected_attention(q, k, v, index=index))


def test_one_list_is_the_same_list_for_every_group() -> None:
    q, k, v = tokens()
    index = hostile_index()
    out = selected_attention(q, k, v, index=index[:, None].expand(B, NQ, 8))
    close(out, selected_attention(q, k, v, index=index))


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


def test_keys_shared_by_heads_and_batch() -> None:
    q, k, v = tokens()
    k, v = k[:1, :1].clone().requires_grad_(), v[:1, :1].clone().requires_grad_()
    shared = [t.expand(B, H, -1, -1) for t in (k, v)]
    close(selected_attention(q, *shared, index=hostile_index()), oracle(q, *shared, hostile_index())[0])
    assert torch.autograd.gradcheck(
        lambda k, v: selected_attention(q, k.expand(B, H, -1, -1), v.expand(B, H, -1, -1), index=hostile_index()),
        (k, v),
    )


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_keep_dtype_and_return_float32_lse(dtype: torch.dtype) -> None:
    q, k, v = tokens(dtype=dtype)
    out, lse = selected_attention(q, k, v, index=hostile_index(), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    close(lse, oracle(q, k, v, hostile_index())[1], 1e-5)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = tokens(dtype=torch.float32)
    q, k = (200 * (3 * t).round() for t in (q, k))  # scores of up to 1e7, all exact in float32
    out = selected_attention(q, k, v, index=hostile_index(), scale=1.0)
    close(out, oracle(q, k, v, hostile_index(), scale=1.0)[0], 1e-6)


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


@pytest.mark.parametrize("runs", [([], []), ([2, 4], [3, 8])])
@pytest.mark.parametrize(("indexed", "scale"), [(False, SCALE), (True, SCALE), (True, None)])
def test_opcheck(indexed: bool, scale: Tensor | None, runs: tuple[list[int], list[int]]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (strided(t) for t in tokens(dtype=dtype))
        index = hostile_index()[:, None] if indexed else None
        opcheck(attention._forward_op, (q, k, v, index, *runs, True, scale))
        out, lse = attention._forward_op(q, k, v, index, *runs, True, scale)
        opcheck(attention._backward_op, (out, lse, q, k, v, index, *runs, True, scale))


@pytest.mark.parametrize("kv_end", [None, 5, ((2, 3), (4, 8))])
@pytest.mark.parametrize("lists", ["all", "hostile", "groups"])
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


@pytest.mark.parametrize("options", [{}, {"index": hostile_index()}, {"return_lse": True}])
def test_compile_serves_new_scales_without_recompiling(options: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        result = selected_attention(q, k, v, scale=scale, **options)
        return result[0] if isinstance(result, tuple) else result

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for i in range(10):
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
        (lambda: bad(backend="triton"), NotImplementedError, "selected_attention has no triton backend"),
        (lambda: bad(backend="fast"), ValueError, "backend must be one of"),
    ],
)
def test_errors(call: Callable[[], dict[str, object]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        selected_attention(**call())  # type: ignore[call-overload]


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
