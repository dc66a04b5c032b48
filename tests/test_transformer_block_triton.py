"""transformer_block by Triton against its definition in float64 and its reference; without a GPU, interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from samples import DEVICE
from test_transformer_block import Case, keys_of, made, plain, some_hidden
from torch import Tensor

from icseg_kernels import BackendError, BlockWeights, transformer_block, triton_launch
from icseg_kernels.transformer_block import triton

if triton.missing():
    pytest.skip("; ".join(triton.missing()), allow_module_level=True)

from icseg_kernels.transformer_block import triton_kernels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BFLOAT16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])
DTYPES = [torch.float32, torch.float16, BFLOAT16]
if triton_launch.INTERPRETED:
    DTYPES.append(torch.float64)

# B, N, tokens of every piece of memory, D, heads, hidden.
CASES: dict[str, tuple[int, int, list[int], int, int, int]] = {
    "several": (2, 18, [5, 0, 40], 32, 2, 48),
    "alone": (2, 33, [], 32, 2, 32),
    "one token": (1, 1, [1], 16, 1, 1),
    "one head": (1, 5, [130], 16, 1, 16),
    "heads of no power of two": (1, 7, [33], 48, 3, 100),
    "heads of 32": (1, 3, [9, 20, 8], 128, 4, 256),
    "wide": (1, 3, [5], 256, 8, 40),
    "wide heads": (1, 3, [5], 256, 2, 40),
}


def on_device(case: Case) -> Case:
    tokens, memory, block, heads = case
    weights = BlockWeights(*(t.to(DEVICE) for t in block[:14]), block.eps)
    return tokens.to(DEVICE), [piece.to(DEVICE) for piece in memory], weights, heads


def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    return on_device(made(*CASES[name], dtype))


def some(tokens: Tensor, memory: list[Tensor]) -> Tensor:
    return some_hidden(len(tokens), keys_of(tokens, memory)).to(DEVICE)


def run(
    tokens: Tensor, memory: list[Tensor], block: BlockWeights, heads: int, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return transformer_block(tokens, memory, block, heads=heads, index=index, backend="triton")


def assert_near(
    found: tuple[Tensor, Tensor], tokens: Tensor, memory: list[Tensor], block: BlockWeights, heads: int,
    index: Tensor | None = None,
) -> None:  # fmt: skip
    """Twice the reference's errors at most, but for some units in the last place of the largest value."""
    torch.use_deterministic_algorithms(False)  # by `poisoned`; cuBLAS would want to be told before it starts
    wide = BlockWeights(*(t.double() for t in block[:14]), block.eps)
    oracle = plain(tokens.double(), [piece.double() for piece in memory], wide, heads, index)
    theirs = transformer_block(tokens, memory, block, heads=heads, index=index, backend="reference")
    for ours, other, right in zip(found, theirs, oracle, strict=True):
        assert ours.shape == right.shape
        assert ours.dtype == tokens.dtype
        assert ours.is_contiguous()
        error, usual = ((x.double() - right).abs().max() for x in (ours, other))
        assert error <= 2 * usual + 4 * torch.finfo(ours.dtype).eps * right.abs().max()


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("hiding", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_is_the_block(poisoned, name, hiding):
    tokens, memory, block, heads = case(name)
    index = some(tokens, memory) if hiding else None
    assert_near(run(tokens, memory, block, heads, index), tokens, memory, block, heads, index)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["several", "heads of no power of two", "wide"])
def test_dtypes(poisoned, name, dtype):
    tokens, memory, block, heads = case(name, dtype)
    index = some(tokens, memory)
    assert_near(run(tokens, memory, block, heads, index), tokens, memory, block, heads, index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_for_many_tokens(monkeypatch, poisoned, dtype):
    monkeypatch.setattr(triton_kernels, "_ENOUGH", 1)
    tokens, memory, block, heads = on_device(made(1, 70, [21], 32, 2, 48, dtype))
    options = triton_kernels.attend_options(1, 70, 32, heads, 48, 1, dtype, False)
    assert options["BLOCK_TOKENS"] == (32 if dtype.itemsize == 2 else 16)
    assert_near(run(tokens, memory, block, heads), tokens, memory, block, heads)


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 8, 9, 10])
def test_every_number_of_pieces(poisoned, pieces):
    tokens, memory, block, heads = on_device(made(2, 3, list(range(1, pieces + 1)), 32, 2, 16))
    index = some(tokens, memory)
    found = run(tokens, memory, block, heads, index)
    assert_near(found, tokens, memory, block, heads, index)
    torch.testing.assert_close(found, run(tokens, [torch.cat(memory, 1)], block, heads, index), rtol=1e-5, atol=1e-5)


def test_eps_of_the_norms():
    tokens, memory, block, heads = case("several")
    block = block._replace(eps=0.7)
    assert_near(run(tokens, memory, block, heads), tokens, memory, block, heads)


@pytest.mark.parametrize(("batch", "count"), [(0, 4), (2, 0), (0, 0)])
def test_nothing(batch, count):
    tokens, memory, block, heads = on_device(made(batch, count, [3, 0], 32, 2, 16))
    for index in (None, some(tokens, memory)):
        out, own = run(tokens, memory, block, heads, index)
        assert out.shape == (batch, count, 32)
        assert own.shape == (batch, count, 64)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_lists_keys_in_any_order(poisoned, dtype):
    """Also twice, and with entries that are no keys."""
    tokens, memory, block, heads = on_device(made(3, 7, [5, 0, 9], 32, 2, 16))
    extremes = torch.iinfo(dtype)
    rows = [[5, 3, 5, -1, 20], [21, -7, 0, 20, 1], [extremes.min, extremes.max, 2, 2, 2]]
    index = torch.tensor(rows, dtype=dtype, device=DEVICE)
    found = run(tokens, memory, block, heads, index)
    assert_near(found, tokens, memory, block, heads, index)
    apart = torch.stack([index, index.flip(0)], -1)[..., 0]
    assert not apart.is_contiguous()
    assert_same(run(tokens, memory, block, heads, apart), found)
    one = index[:1].expand(3, -1)
    assert_near(run(tokens, memory, block, heads, one), tokens, memory, block, heads, one)


def test_rows_of_2_to_the_32_and_more_are_no_keys():
    tokens, memory, block, heads = case("several")
    index = torch.arange(63, device=DEVICE).repeat(2, 1)
    index[:, ::2] = -1
    beyond = torch.where(index < 0, torch.arange(63, device=DEVICE) + 2**32, index)
    assert_same(run(tokens, memory, block, heads, beyond), run(tokens, memory, block, heads, index))


def test_no_visible_key():
    """Attention adds the bias of `out` alone, in the sample where all are hidden."""
    tokens, memory, block, heads = case("several")
    index = torch.arange(63, device=DEVICE).repeat(2, 1)
    index[1] = -1
    assert_near(run(tokens, memory, block, heads, index), tokens, memory, block, heads, index)
    empty = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    assert_near(run(tokens, [], block, heads, empty), tokens, [], block, heads, empty)


def test_keys_seen_late():
    """Whole blocks of hidden keys, before and between those that are seen."""
    tokens, memory, block, heads = on_device(made(1, 4, [300], 16, 1, 16))
    index = torch.full((1, 304), -1, device=DEVICE)
    index[0, 150], index[0, 303] = 7, 302
    assert_near(run(tokens, memory, block, heads, index), tokens, memory, block, heads, index)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_is_seen(bad):
    tokens, memory, block, heads = on_device(made(3, 7, [5, 0, 9], 32, 2, 16))
    index = torch.arange(21, device=DEVICE).repeat(3, 1)
    index[:, 2] = index[0, 16] = -1
    clean = run(tokens, memory, block, heads, index)
    memory[0][:, 2] = bad  # hidden
    tokens[0, 2, 3] = bad  # its key is hidden
    tokens[1, 6, 0] = bad  # seen by all of that sample
    out, own = run(tokens, memory, block, heads, index)
    assert out[0, 2].isnan().all()
    assert own[0, 2].isnan().all()
    assert out[1].isnan().all()
    for found, expected in zip((out, own), clean, strict=True):
        assert torch.equal(found[0, [0, 1, 3, 4, 5, 6]], expected[0, [0, 1, 3, 4, 5, 6]])
        assert torch.equal(found[2], expected[2])


def test_large_scores():
    tokens, memory, block, heads = case("several")
    block = block._replace(query_weight=1000 * block.query_weight)
    found = run(tokens, memory, block, heads)
    torch.testing.assert_close(
        found, transformer_block(tokens, memory, block, heads=heads, backend="reference"), rtol=1e-3, atol=1e-3
    )


def _gapped(x: Tensor) -> Tensor:
    """With NaN between its rows and samples."""
    apart = torch.full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3), math.nan, dtype=x.dtype, device=x.device)
    view = apart[1:, 1:-1, 2:-1]
    view.copy_(x)
    return view


def _aligned(x: Tensor) -> Tensor:
    """With NaN between samples, none between rows."""
    apart = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2]), math.nan, dtype=x.dtype, device=x.device)
    view = apart[:, 1:-1]
    view.copy_(x)
    return view


def _turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _spread(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def test_strided_views():
    tokens, memory, block, heads = on_device(made(2, 3, [5, 2], 32, 2, 16))
    expected = run(tokens, memory, block, heads)
    for view in (_gapped, _aligned, _turned, _spread):
        assert_same(run(view(tokens), memory, block, heads), expected)
        assert_same(run(tokens, [view(piece) for piece in memory], block, heads), expected)
    spread = BlockWeights(*(_spread(t) for t in block[:14]))
    assert_same(run(tokens, memory, spread, heads), expected)
    odd = tokens[:1].as_strided((1, 3, 32), (7, 32, 1))  # the stride of one sample means nothing
    assert_same(run(odd, [piece[:1] for piece in memory], block, heads), (expected[0][:1], expected[1][:1]))


def test_expanded_memory():
    tokens, memory, block, heads = case("several")
    one = [piece[:1].expand(2, -1, -1) for piece in memory]
    assert_same(run(tokens, one, block, heads), run(tokens, [piece.contiguous() for piece in one], block, heads))


def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which a few pages are touched: two samples far apart."""
    tokens, memory, block, heads = on_device(made(2, 3, [4, 2], 16, 1, 16))
    storage = torch.empty(2**31 + 4096, device=DEVICE)  # not written: no memory
    far = storage.as_strided((2, 4, 32), (2**31, 32, 1))
    far.copy_(memory[0])
    far_tokens = storage[1024:].as_strided((2, 3, 16), (2**31, 16, 1))
    far_tokens.copy_(tokens)
    assert_same(run(far_tokens, [far, memory[1]], block, heads), run(tokens, memory, block, heads))


def test_a_sample_is_the_same_alone_and_among_others_of_one_shape():
    tokens, memory, block, heads = case("several")
    index = some(tokens, memory)
    together = run(tokens, memory, block, heads, index)
    for i in range(2):
        here = slice(i, i + 1)
        alone = run(tokens[here], [m[here] for m in memory], block, heads, index[here])
        assert_same(alone, (together[0][here], together[1][here]))


def test_twice_the_same_bits():
    tokens, memory, block, heads = case("several")
    index = some(tokens, memory)
    assert_same(run(tokens, memory, block, heads, index), run(tokens, memory, block, heads, index))


@pytest.mark.parametrize("hiding", [False, True])
def test_opcheck(hiding):
    tokens, memory, block, heads = on_device(made(2, 3, [2], 16, 1, 16))
    index = some(tokens, memory) if hiding else None
    torch.library.opcheck(
        torch.ops.icseg.transformer_block.default,
        (tokens, memory, list(block[:14]), heads, index, 1e-5, "triton"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compile_fullgraph():
    torch.compiler.reset()
    tokens, memory, block, heads = on_device(made(2, 3, [2], 16, 1, 16))
    index = some(tokens, memory)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(tokens, memory, block, heads, index), run(tokens, memory, block, heads, index))


def test_refuses_what_it_cannot_serve():
    def refused(message: str, case: Case) -> None:
        tokens, memory, block, heads = case
        with pytest.raises(BackendError, match=f"the triton backend cannot serve transformer_block of .*{message}"):
            run(tokens, memory, block, heads)

    def of(*sizes: int) -> Case:
        dim, heads, hidden = sizes
        return on_device(made(1, 2, [3], dim, heads, hidden))

    limit = "at most 256 channels, a power of two of at least 16 a head, got"
    refused(f"{limit} 288 in 9 heads", of(288, 9, 16))
    refused(f"{limit} 32 in 4 heads", of(32, 4, 16))
    refused(f"{limit} 48 in 1 heads", of(48, 1, 16))
    tokens, memory, block, heads = good = of(16, 1, 16)
    mixed = [memory[0].double()]
    refused(r"memory\[0\] is torch\.float64", (tokens, mixed, block, heads))
    with torch.autocast(DEVICE, torch.bfloat16):
        refused("autocast is enabled", good)
    block.query_bias.requires_grad_()
    refused("it has no gradients, and tokens, memory or a weight requires one", good)
    with torch.no_grad():
        run(*good)


def test_operators_called_directly_check_before_raw_pointers():
    tokens, memory, block, heads = on_device(made(2, 3, [1], 16, 1, 16))
    good = {
        "tokens": tokens, "memory": memory, "weights": list(block[:14]), "heads": heads,
        "index": torch.zeros(2, 4, dtype=torch.int64, device=DEVICE), "eps": 1e-5, "backend": "triton",
    }  # fmt: skip
    op = torch.ops.icseg.transformer_block
    assert op(**good)[0].shape == (2, 3, 16)
    for changes, message in (
        ({"tokens": tokens.int()}, "tokens is torch.int32"),
        ({"tokens": tokens.half()}, r"weights\[0\] must be torch.float16"),
        ({"tokens": tokens[0]}, r"tokens must have shape \[B, N, D\]"),
        ({"heads": 0}, "heads divide D"),
        ({"heads": 2}, "at most 256 channels"),
        ({"weights": list(block[:13])}, "weights must be 14"),
        ({"weights": [tokens[0, 0, :7], *block[1:14]]}, r"weights\[0\] must be torch.float32 \[16\] on .* got \[7\]"),
        ({"memory": [memory[0][..., :31]]}, r"memory\[0\] must be torch.float32 \[2, 1, 32\]"),
        ({"memory": [memory[0][0]]}, r"memory\[0\] must have shape \[2, M, 32\]"),
        ({"index": torch.zeros(2, 4, device=DEVICE)}, "index must be int32 or int64"),
        ({"index": torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)}, r"index must be int32 or int64 \[2, M\]"),
    ):
        with pytest.raises(ValueError, match=message):
            op(**{**good, **changes})


def test_kernels_are_named_apart():
    names = [c.name for c in triton_kernels.COMPILATIONS]
    assert len(set(names)) == len(names)


def test_slots_hold_their_pieces():
    assert [triton_kernels.slots_of(n) for n in range(9)] == [0, 1, 2, 4, 4, 8, 8, 8, 8]


def test_versions_of_triton():
    assert triton._too_old("3.2.0") == ["it needs Triton 3.3 or newer, got 3.2.0"]
    for version in ("3.3.1", "3.10.0", "4.0.0+git1a2b", "unknown"):
        assert triton._too_old(version) == []


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_replays_with_new_values(dtype):
    tokens, memory, block, heads = case("heads of 32", dtype)
    index = some(tokens, memory)
    run(tokens, memory, block, heads, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(tokens, memory, block, heads, index)
    tokens.mul_(0.5)
    index.copy_(torch.arange(index.shape[1], device=DEVICE))
    graph.replay()
    assert_same(found, run(tokens, memory, block, heads, index))


@pytest.mark.gpu
@needs_gpu
def test_tf32_where_torch_allows_it():
    tokens, memory, block, heads = case("heads of 32")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = run(tokens, memory, block, heads)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, run(tokens, memory, block, heads), rtol=1e-2, atol=1e-2)
