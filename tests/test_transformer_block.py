"""transformer_block against its definition in float64, and its own reference, on every backend here."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BACKENDS, needs_native
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from icseg.sparse.encoder import Block, visible
from icseg_kernels import BackendError, BlockWeights, flops, library, transformer_block
from icseg_kernels.transformer_block import native

# B, N, tokens of every piece of memory, D, heads, hidden: as a small model has them, then odd ones.
CASES: dict[str, tuple[int, int, list[int], int, int, int]] = {
    "target": (1, 20, [52, 30], 128, 4, 256),
    "several": (3, 7, [5, 0, 9], 128, 4, 256),
    "alone": (2, 33, [], 128, 4, 256),
    "odd": (2, 5, [3, 1], 15, 3, 7),
    "narrow": (2, 3, [4], 1, 1, 1),
    "heads of one": (1, 9, [8], 6, 6, 40),
    "one wide head": (1, 4, [6], 70, 1, 33),
    "one token": (1, 1, [], 24, 2, 48),
    "keys in blocks": (1, 5, [700, 340], 32, 2, 16),
}
Case = tuple[Tensor, list[Tensor], BlockWeights, int]


def weights_of(dim: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> BlockWeights:
    """Random ones that keep the size of values."""
    generator, tensors = torch.Generator().manual_seed(seed), []
    for shape in native.shapes(dim, hidden):
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** (0.5 if shape[1:] else 0)
        tensors.append((tensor if shape[1:] else 0.5 * tensor + 0.5).to(dtype))
    return BlockWeights(*tensors)


def case(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    batch, count, pieces, dim, heads, hidden = CASES[name]
    return made(batch, count, pieces, dim, heads, hidden, dtype, seed)


def made(
    batch: int, count: int, pieces: list[int], dim: int, heads: int, hidden: int,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    memory = [normal(batch, n, 2 * dim) for n in pieces]
    return normal(batch, count, dim), memory, weights_of(dim, hidden, dtype, seed), heads


def some_hidden(batch: int, keys: int, seed: int = 0) -> Tensor:
    """An index that hides a third of the keys, others for every sample."""
    seen = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) > 1 / 3
    return torch.where(seen, torch.arange(keys), -1)


def keys_of(tokens: Tensor, memory: list[Tensor]) -> int:
    return sum(piece.shape[1] for piece in memory) + tokens.shape[1]


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def plain(
    tokens: Tensor, memory: list[Tensor], block: BlockWeights, heads: int, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition."""
    x = norm(tokens, block.norm_attention_weight, block.norm_attention_bias, block.eps)
    own = x @ block.key_value_weight.mT + block.key_value_bias
    q = x @ block.query_weight.mT + block.query_bias
    keys, values = torch.cat([*memory, own], 1).chunk(2, -1)
    attended, width = torch.zeros_like(q), q.shape[2] // heads
    for b in range(len(tokens)):
        rows = torch.arange(keys.shape[1]) if index is None else index[b]
        rows = rows[(rows >= 0) & (rows < keys.shape[1])].long()
        for h in range(heads if len(rows) else 0):
            part = slice(h * width, (h + 1) * width)
            scores = q[b, :, part] @ keys[b, rows, part].mT / width**0.5
            attended[b, :, part] = scores.softmax(-1) @ values[b, rows, part]
    tokens = tokens + attended @ block.out_weight.mT + block.out_bias
    x = norm(tokens, block.norm_mlp_weight, block.norm_mlp_bias, block.eps) @ block.mlp_in_weight.mT + block.mlp_in_bias
    x = x * (torch.erf(x / 2**0.5) + 1) / 2
    return tokens + x @ block.mlp_out_weight.mT + block.mlp_out_bias, own


def assert_near(
    found: tuple[Tensor, Tensor], tokens: Tensor, memory: list[Tensor], block: BlockWeights, heads: int,
    index: Tensor | None = None,
) -> None:  # fmt: skip
    wide = BlockWeights(*(t.double() for t in block[:14]), block.eps)
    oracle = plain(tokens.double(), [piece.double() for piece in memory], wide, heads, index)
    for a, b in zip(found, oracle, strict=True):
        assert a.shape == b.shape
        assert a.is_contiguous()
        largest = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=100 * torch.finfo(a.dtype).eps * largest)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("hiding", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_is_the_block(backend, name, hiding):
    tokens, memory, block, heads = case(name)
    index = some_hidden(len(tokens), keys_of(tokens, memory)) if hiding else None
    found = transformer_block(tokens, memory, block, heads=heads, index=index, backend=backend)
    assert_near(found, tokens, memory, block, heads, index)


@pytest.mark.parametrize("hiding", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_native(isa, poisoned, name, hiding):
    tokens, memory, block, heads = case(name)
    index = some_hidden(len(tokens), keys_of(tokens, memory)) if hiding else None
    found = transformer_block(tokens, memory, block, heads=heads, index=index, backend="native")
    assert_near(found, tokens, memory, block, heads, index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["several", "odd"])
def test_reference_of_other_dtypes(name, dtype):
    tokens, memory, block, heads = case(name, dtype)
    out, own = transformer_block(tokens, memory, block, heads=heads)
    assert out.dtype == own.dtype == dtype
    wide = BlockWeights(*(t.double() for t in block[:14]))
    expected = plain(tokens.double(), [piece.double() for piece in memory], wide, heads)
    tolerance = 1e-12 if dtype == torch.float64 else 30 * torch.finfo(dtype).eps
    torch.testing.assert_close((out.double(), own.double()), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [2, 11, 13, 14, 15, 16, 27, 29, 63, 64, 65, 130])
def test_every_number_of_tokens(isa, poisoned, count):
    """Tokens are cut into tiles of every size, and into several runs."""
    tokens, memory, block, heads = made(1, count, [3], 20, 2, 24)
    found = transformer_block(tokens, memory, block, heads=heads, backend="native")
    assert_near(found, tokens, memory, block, heads)


@pytest.mark.parametrize("dim", [2, 7, 8, 9, 16, 17, 31, 32, 33, 48, 49, 64])
def test_every_width(isa, poisoned, dim):
    for heads in (1, dim):
        tokens, memory, block, _ = made(2, 3, [2, 17], dim, heads, dim + 3)
        found = transformer_block(tokens, memory, block, heads=heads, backend="native")
        assert_near(found, tokens, memory, block, heads)


@needs_native
def test_the_largest():
    tokens, memory, block, heads = made(2, 3, [5], 512, 8, 2048)
    assert_near(transformer_block(tokens, memory, block, heads=heads, backend="native"), tokens, memory, block, heads)


def test_by_hand(backend):
    """One channel: the norm leaves its bias; two equal scores; an MLP of GELU(1) = 0.8413."""
    one, zero = torch.ones(1), torch.zeros(1)
    matrix = torch.ones(1, 1)
    block = BlockWeights(
        one, 2 * one, matrix, zero, torch.tensor([[0.0], [3.0]]), torch.zeros(2), matrix, zero,
        one, one, matrix, zero, matrix, zero,
    )  # fmt: skip
    memory = torch.tensor([[[0.0, 8.0]]])
    out, own = transformer_block(torch.tensor([[[5.0]]]), [memory], block, heads=1, backend=backend)
    assert own.tolist() == [[[0.0, 6.0]]]
    assert out.item() == pytest.approx(5 + (8 + 6) / 2 + 0.8413447, abs=1e-6)


def test_eps_of_the_norms(backend):
    tokens, memory, block, heads = case("odd")
    block = block._replace(eps=0.7)
    found = transformer_block(tokens, memory, block, heads=heads, backend=backend)
    assert_near(found, tokens, memory, block, heads)


@pytest.mark.parametrize(("batch", "count"), [(0, 4), (2, 0), (0, 0)])
def test_nothing(backend, batch, count):
    tokens, memory, block, heads = made(batch, count, [3, 0], 8, 2, 4)
    index = some_hidden(batch, 3 + count)
    for listed in (None, index):
        out, own = transformer_block(tokens, memory, block, heads=heads, index=listed, backend=backend)
        assert out.shape == (batch, count, 8)
        assert own.shape == (batch, count, 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_lists_keys_in_any_order(backend, dtype):
    """Also twice, and with entries that are no keys."""
    tokens, memory, block, heads = case("several")
    keys = keys_of(tokens, memory)
    extremes = torch.iinfo(dtype)
    index = torch.tensor([[5, 3, 5, -1, keys - 1], [keys, -7, 0, 20, 1], [extremes.min, extremes.max, 2, 2, 2]])
    index = index.to(dtype)
    found = transformer_block(tokens, memory, block, heads=heads, index=index, backend=backend)
    assert_near(found, tokens, memory, block, heads, index)
    apart = torch.stack([index, index.flip(0)], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
    assert not apart.is_contiguous()
    again = transformer_block(tokens, memory, block, heads=heads, index=apart, backend=backend)
    torch.testing.assert_close(again, found)
    one = index[:1].expand(3, -1)
    found = transformer_block(tokens, memory, block, heads=heads, index=one, backend=backend)
    assert_near(found, tokens, memory, block, heads, one)


def test_what_visible_makes(backend):
    tokens, memory, block, heads = case("several")
    masks = [torch.tensor([[True, False, True, True, False]]).expand(3, -1), None, None]
    masks.append(torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) > 0.5)
    index = visible(masks, [5, 0, 9, 7], 3, torch.device("cpu"))
    found = transformer_block(tokens, memory, block, heads=heads, index=index, backend=backend)
    assert_near(found, tokens, memory, block, heads, index)


def test_no_visible_key(backend):
    """Attention adds the bias of `out` alone, in the sample where all are hidden."""
    tokens, memory, block, heads = case("several")
    index = torch.arange(21).repeat(3, 1)
    index[1] = -1
    found = transformer_block(tokens, memory, block, heads=heads, index=index, backend=backend)
    assert_near(found, tokens, memory, block, heads, index)
    empty = torch.zeros(3, 0, dtype=torch.int64)
    found = transformer_block(tokens, [], block, heads=heads, index=empty, backend=backend)
    assert_near(found, tokens, [], block, heads, empty)


@needs_native
@pytest.mark.parametrize("name", ["several", "odd", "keys in blocks"])
def test_hidden_keys_are_as_if_they_were_not_there(isa, name):
    """To the bit."""
    tokens, memory, block, heads = case(name)
    lengths = [piece.shape[1] for piece in memory]
    seen = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(3)) > 0.5
    all_seen = torch.cat([seen, torch.ones(tokens.shape[1], dtype=torch.bool)])
    index = torch.where(all_seen, torch.arange(len(all_seen)), -1).expand(len(tokens), -1)
    kept = [piece[:, mask] for piece, mask in zip(memory, seen.split(lengths), strict=True)]
    found = transformer_block(tokens, memory, block, heads=heads, index=index, backend="native")
    expected = transformer_block(tokens, kept, block, heads=heads, backend="native")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_is_seen(backend, bad):
    tokens, memory, block, heads = case("several")
    index = torch.arange(21).repeat(3, 1)
    index[:, 2] = index[0, 16] = -1
    clean = transformer_block(tokens, memory, block, heads=heads, index=index, backend=backend)
    memory[0][:, 2] = bad  # hidden
    tokens[0, 2, 3] = bad  # its key is hidden
    tokens[1, 6, 0] = bad  # seen by all of that sample
    out, own = transformer_block(tokens, memory, block, heads=heads, index=index, backend=backend)
    assert out[0, 2].isnan().all()
    assert own[0, 2].isnan().all()
    assert out[1].isnan().all()
    for found, expected in zip((out, own), clean, strict=True):
        rest = found[0, [0, 1, 3, 4, 5, 6]], found[2]
        torch.testing.assert_close(rest, (expected[0, [0, 1, 3, 4, 5, 6]], expected[2]))


@pytest.mark.parametrize("name", ["several", "odd"])
def test_strided_views(backend, name):
    tokens, memory, block, heads = case(name)
    expected = transformer_block(tokens, memory, block, heads=heads, backend=backend)

    def check(tokens: Tensor, memory: list[Tensor], block: BlockWeights) -> None:
        found = transformer_block(tokens, memory, block, heads=heads, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        if backend == "native":
            assert torch.equal(found[0], expected[0])
        assert found[0].is_contiguous()
        assert found[1].is_contiguous()

    for view in (_gapped, _turned, _spread):
        check(view(tokens), memory, block)
        check(tokens, [view(piece) for piece in memory], block)
    check(tokens, memory, BlockWeights(*(_spread(t) for t in block[:14])))
    check(tokens, memory, BlockWeights(*(t.mT.contiguous().mT if t.ndim == 2 else t for t in block[:14])))
    check(tokens, tuple(memory), block._replace(query_bias=nn.Parameter(block.query_bias, requires_grad=False)))


def _gapped(x: Tensor) -> Tensor:
    """With NaN between its rows and samples."""
    apart = torch.full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3), math.nan)
    view = apart[1:, 1:-1, 2:-1]
    view.copy_(x)
    return view


def _turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _spread(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def test_expanded_memory(backend):
    tokens, memory, block, heads = case("several")
    one = [piece[:1].expand(3, -1, -1) for piece in memory]
    found = transformer_block(tokens, one, block, heads=heads, backend=backend)
    copied = transformer_block(tokens, [piece.contiguous() for piece in one], block, heads=heads, backend=backend)
    torch.testing.assert_close(found, copied, rtol=0, atol=0)
    assert_near(found, tokens, one, block, heads)


@needs_native
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which a few pages are touched: two samples far apart."""
    tokens, memory, block, heads = case("odd")
    storage = torch.empty(2**31 + 4096)  # not written: no memory
    far = storage.as_strided((2, 3, 30), (2**31, 30, 1))
    far.copy_(memory[0])
    far_tokens = storage[1024:].as_strided((2, 5, 15), (2**31, 15, 1))
    far_tokens.copy_(tokens)
    found = transformer_block(far_tokens, [far, memory[1]], block, heads=heads, backend="native")
    assert torch.equal(found[0], transformer_block(tokens, memory, block, heads=heads, backend="native")[0])


@pytest.mark.parametrize(
    ("batch", "count", "pieces"), [(1, 20, [150]), (5, 31, [7, 0, 2]), (1, 150, []), (25, 1, [30])]
)
def test_threads_change_no_bit(isa, threads, batch, count, pieces):
    tokens, memory, block, heads = made(batch, count, pieces, 128, 4, 256)
    index, results = some_hidden(batch, keys_of(tokens, memory)), []
    for number in (1, 2, 3):
        threads(number)
        results.append(transformer_block(tokens, memory, block, heads=heads, index=index, backend="native"))
    for found in results[1:]:
        assert torch.equal(found[0], results[0][0])
        assert torch.equal(found[1], results[0][1])


def test_a_sample_is_the_same_alone_and_among_others(isa):
    tokens, memory, block, heads = made(9, 19, [40, 3], 128, 4, 256)
    together = transformer_block(tokens, memory, block, heads=heads, backend="native")
    for i in range(9):
        here = slice(i, i + 1)
        alone = transformer_block(tokens[here], [m[here] for m in memory], block, heads=heads, backend="native")
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


def test_a_token_is_the_same_beside_fewer(isa):
    """The keys being the same: those of tokens left out go to the memory."""
    tokens, memory, block, heads = made(1, 40, [23], 128, 4, 256)
    out, own = transformer_block(tokens, memory, block, heads=heads, backend="native")
    for count in (1, 2, 3, 5, 12, 13, 33):
        some, theirs = transformer_block(
            tokens[:, -count:], [*memory, own[:, :-count]], block, heads=heads, backend="native"
        )
        assert torch.equal(some, out[:, -count:])
        assert torch.equal(theirs, own[:, -count:])


@st.composite
def random_case(draw: Any) -> tuple[Case, Tensor | None]:
    heads, width = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    batch, count = draw(st.integers(0, 4)), draw(st.integers(0, 40))
    pieces = draw(st.lists(st.integers(0, 50), max_size=4))
    found = made(batch, count, pieces, heads * width, heads, draw(st.integers(1, 80)))
    keys = sum(pieces) + count
    index = None
    if draw(st.booleans()):
        listed = draw(st.integers(0, keys + 3))
        index = torch.randint(-1, keys + 1, (batch, listed), generator=torch.Generator().manual_seed(5))
    return found, index


@settings(max_examples=60, deadline=None)
@given(drawn=random_case())
@needs_native
def test_random_cases(drawn):
    (tokens, memory, block, heads), index = drawn
    if index is None and not keys_of(tokens, memory):
        return
    found = transformer_block(tokens, memory, block, heads=heads, index=index, backend="native")
    assert_near(found, tokens, memory, block, heads, index)
    expected = transformer_block(tokens, memory, block, heads=heads, index=index, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hiding", [False, True])
def test_gradcheck(hiding):
    tokens, memory, block, heads = made(2, 3, [2, 0], 4, 2, 3, torch.float64)
    index = some_hidden(2, 5) if hiding else None
    inputs = [tokens, *memory, *block[:14]]
    for tensor in inputs:
        tensor.requires_grad_()

    def run(tokens: Tensor, first: Tensor, second: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return transformer_block(tokens, [first, second], BlockWeights(*weights), heads=heads, index=index)

    assert torch.autograd.gradcheck(run, tuple(inputs), nondet_tol=0.0)


class Names(TorchFunctionMode):
    """Names of the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def is_native(tokens: Tensor, memory: list[Tensor], block: BlockWeights, heads: int) -> bool:
    with Names() as names:
        transformer_block(tokens, memory, block, heads=heads)
    return any("transformer_block" in name for name in names.seen)


@needs_native
def test_the_reference_serves_what_wants_a_gradient():
    tokens, memory, block, heads = case("several")
    assert is_native(tokens, memory, block, heads)
    for tensor in (tokens, memory[2], block.mlp_in_bias):
        tensor.requires_grad_()
        assert not is_native(tokens, memory, block, heads)
        assert transformer_block(tokens, memory, block, heads=heads)[0].requires_grad
        with pytest.raises(BackendError, match="it has no gradients, and tokens, memory or a weight requires one"):
            transformer_block(tokens, memory, block, heads=heads, backend="native")
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert is_native(tokens, memory, block, heads)
                assert not transformer_block(tokens, memory, block, heads=heads, backend="native")[0].requires_grad
        tensor.requires_grad_(False)


@needs_native
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_the_reference_serves_transforms():
    tokens, memory, block, heads = case("several")
    run = lambda x: transformer_block(x, memory, block, heads=heads)[0]  # noqa: E731
    mapped = torch.func.vmap(run)(torch.stack([tokens, 2 * tokens]))
    torch.testing.assert_close(mapped[1], run(2 * tokens), rtol=1e-4, atol=1e-4)
    native_run = lambda x: transformer_block(x, memory, block, heads=heads, backend="native")[0]  # noqa: E731
    with pytest.raises(BackendError, match="no rules for forward-mode differentiation and function transforms"):
        torch.func.jvp(native_run, (tokens,), (tokens,))
    with pytest.raises(NotImplementedError):  # as torch's own attention
        torch.func.jvp(run, (tokens,), (tokens,))


@needs_native
def test_native_refuses_what_it_cannot_serve():
    tokens, memory, block, heads = case("several", torch.float64)

    def refused(message: str, **changes: Any) -> None:
        call = {"tokens": tokens, "memory": memory, "block": block, "heads": heads, **changes}
        with pytest.raises(BackendError, match=f"the native backend cannot serve transformer_block of .*{message}"):
            transformer_block(**call, backend="native")
        if call["tokens"].is_cpu:
            transformer_block(**call)

    refused(r"it computes in float32, and tokens are torch\.float64")
    tokens, memory, block, heads = case("several")
    mixed = [memory[0].bfloat16(), *memory[1:]]
    refused(r"it computes in float32, and memory\[0\] is torch\.bfloat16", memory=mixed)
    with torch.autocast("cpu", torch.bfloat16):
        refused("it computes in float32, and autocast is enabled")
    meta = BlockWeights(*(t.to("meta") for t in block[:14]))
    refused(
        "it runs on the CPU, and tokens are on meta",
        tokens=tokens.to("meta"), memory=[piece.to("meta") for piece in memory], block=meta,
    )  # fmt: skip
    for sizes in ((1, 1, [], 513, 1, 4), (1, 1, [], 4, 1, 2049)):
        tokens, memory, block, heads = made(*sizes)
        refused(f"at most 512 channels and 2048 hidden ones, got {sizes[3]} and {sizes[5]}")


@needs_native
@pytest.mark.parametrize("hiding", [False, True])
def test_opcheck(hiding):
    tokens, memory, block, heads = case("several")
    index = some_hidden(3, 21) if hiding else None
    torch.library.opcheck(
        torch.ops.icseg.transformer_block.default,
        (tokens, memory, list(block[:14]), heads, index, 1e-5, "native"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@needs_native
def test_compile_is_one_node():
    """Whole graphs; new values do not compile anew, and new numbers of tokens at most once."""
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()
    run = lambda tokens, memory, block, index: transformer_block(tokens, memory, block, heads=4, index=index)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=recorder)
    for count, seed in ((4, 0), (4, 1), (5, 0), (6, 2)):
        tokens, memory, block, _ = made(2, count, [7, 3], 32, 4, 48, seed=seed)
        index = some_hidden(2, count + 10)
        with torch.no_grad():
            found, expected = compiled(tokens, memory, block, index), run(tokens, memory, block, index)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert len(recorder.graphs) <= 2
    for graph in recorder.graphs:
        called = [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
        assert [name for name in called if "transformer_block" in name] == ["icseg.transformer_block.default"]
        assert not [name for name in called if "linear" in name]


def test_compile_fullgraph_with_gradients():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = lambda tokens, memory, block: transformer_block(tokens, memory, block, heads=3)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for count in (2, 2, 3, 4):
        tokens, memory, block, _ = made(2, count, [4], 15, 3, 7)
        wanted = [tokens.requires_grad_(), memory[0].requires_grad_(), *(t.requires_grad_() for t in block[:14])]
        ours, theirs = (
            torch.autograd.grad(f(tokens, memory, block)[0].square().sum(), wanted) for f in (compiled, run)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


@needs_native
def test_exports():
    tokens, memory, block, heads = case("several")

    class Module(nn.Module):
        def forward(self, tokens: Tensor, memory: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
            return transformer_block(tokens, memory, BlockWeights(*weights), heads=4)

    count = torch.export.Dim("count", min=2)
    shapes = {"tokens": {1: count}, "memory": [None] * 3, "weights": [None] * 14}
    with torch.no_grad():
        program = torch.export.export(Module(), (tokens, memory, list(block[:14])), dynamic_shapes=shapes)
        longer = torch.cat([tokens, tokens], 1)
        found = program.module()(longer, memory, list(block[:14]))
        expected = transformer_block(longer, memory, block, heads=heads)
    assert torch.equal(found[0], expected[0])


def module_of(tokens: Tensor, heads: int, hidden: int) -> Block:
    block = Block(tokens.shape[2], heads, hidden // tokens.shape[2])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return block


@pytest.mark.parametrize("hiding", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_the_module_is_the_same_with_and_without_gradients(hiding, half):
    tokens, memory, _, heads = case("several")
    block = module_of(tokens, heads, 256)
    index = some_hidden(3, 21) if hiding else None
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        trained = block(tokens, memory, index)
        with torch.no_grad():
            used = block(tokens, memory, index)
    assert trained[0].requires_grad
    tolerance = 0.05 if half else 1e-5
    torch.testing.assert_close(used, tuple(t.detach() for t in trained), rtol=tolerance, atol=tolerance)
    assert [t.dtype for t in used] == [t.dtype for t in trained]


def test_a_replaced_layer_of_the_module_is_called():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    tokens, memory, _, heads = case("several")
    block = module_of(tokens, heads, 256)
    query, block.query = block.query, Doubled(128, 128)
    block.query.load_state_dict(query.state_dict())
    with torch.no_grad():
        found = block(tokens, memory, None)
    expected = block(tokens, memory, None)
    torch.testing.assert_close(found, tuple(t.detach() for t in expected), rtol=1e-5, atol=1e-5)
    block.query = query
    assert not torch.allclose(found[0], block(tokens, memory, None)[0], atol=1e-3)


def doubled(module, arguments, output):
    return 2 * output


CHANGES = {
    "activation": lambda block: setattr(block.mlp, "1", nn.ReLU()),
    "another eps": lambda block: setattr(block.norm_mlp, "eps", 0.5),
    "a hook": lambda block: block.query.register_forward_hook(doubled),
    "no bias": lambda block: setattr(block.query, "bias", None),
    "pruned": lambda block: prune.l1_unstructured(block.query, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_layer_of_the_module_is_called(change):
    tokens, memory, _, heads = case("several")
    block = module_of(tokens, heads, 256)
    before = block(tokens, memory, None)[0]
    change(block)
    with torch.no_grad():
        found = block(tokens, memory, None)
    expected = block(tokens, memory, None)
    torch.testing.assert_close(found, tuple(t.detach() for t in expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], before, atol=1e-5)


def weights_of_module(block: Block) -> BlockWeights:
    layers = block.norm_attention, block.query, block.key_value, block.out, block.norm_mlp, block.mlp[0], block.mlp[2]
    return BlockWeights(*(t for layer in layers for t in (layer.weight, layer.bias)))


@pytest.mark.parametrize("hiding", [False, True])
def test_autocast_is_that_of_the_layers(hiding):
    """Memory may then have another dtype; own is of the autocast dtype."""
    tokens, memory, _, heads = case("several")
    block = module_of(tokens, heads, 256)
    memory = [memory[0].bfloat16(), memory[1], memory[2].double()]
    index = some_hidden(3, 21) if hiding else None
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(tokens, memory, index)
        found = transformer_block(tokens, memory, weights_of_module(block), heads=heads, index=index)
        grads = [
            torch.autograd.grad(out.float().square().sum(), block.out.weight)[0] for out in (found[0], expected[0])
        ]
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("hiding", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_layers(backend, name, hiding):
    tokens, memory, block, heads = case(name)
    keys = keys_of(tokens, memory)
    index = some_hidden(len(tokens), keys) if hiding else None
    with FlopCounterMode(display=False) as theirs:
        transformer_block(tokens, memory, block, heads=heads, index=index, backend="reference")
    with FlopCounterMode(display=False) as ours:
        found = transformer_block(tokens, memory, block, heads=heads, index=index, backend=backend)
    batch, count, dim = tokens.shape
    hidden = len(block.mlp_in_bias)
    expected = flops.transformer_block_flops(batch, count, keys, dim, hidden)
    assert ours.get_total_flops() == theirs.get_total_flops() == expected > 0
    moved = sum(t.numel() for t in (tokens, *memory, *block[:14], *found))
    assert flops.transformer_block_bytes(batch, count, keys - count, dim, hidden) == 4 * moved


GOOD = BlockWeights(*map(torch.zeros, native.shapes(8, 4)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": None}, TypeError, "tokens must be a torch.Tensor, got NoneType"),
        ({"tokens": torch.zeros(2, 8)}, ValueError, r"tokens must have shape \[B, N, D\] with D > 0, got \[2, 8\]"),
        ({"tokens": torch.zeros(2, 3, 0)}, ValueError, r"tokens must have .* got \[2, 3, 0\]"),
        ({"tokens": torch.zeros(2, 3, 8).int()}, TypeError, "tokens must be a floating-point tensor"),
        ({"tokens": torch.zeros(2, 3, 8).double()}, TypeError, "must have the dtype of tokens, torch.float64"),
        ({"tokens": torch.zeros(2, 3, 6)}, ValueError, r"norm_attention_weight must have shape \[6\], got \[8\]"),
        ({"block": GOOD[:14]}, TypeError, "block must be a BlockWeights, got tuple"),
        ({"block": None}, TypeError, "block must be a BlockWeights, got NoneType"),
        ({"query_weight": None}, TypeError, "block.query_weight must be a torch.Tensor, got NoneType"),
        ({"query_weight": torch.zeros(8, 9)}, ValueError, r"query_weight must have shape \[8, 8\], got \[8, 9\]"),
        ({"key_value_bias": torch.zeros(8)}, ValueError, r"key_value_bias must have shape \[16\], got \[8\]"),
        ({"mlp_in_weight": torch.zeros(8)}, ValueError, r"mlp_in_weight must have shape \[H, D\] with H > 0"),
        ({"mlp_in_weight": torch.zeros(0, 8)}, ValueError, r"with H > 0, got \[0, 8\]"),
        ({"mlp_out_weight": torch.zeros(4, 8)}, ValueError, r"mlp_out_weight must have shape \[8, 4\], got \[4, 8\]"),
        ({"out_bias": torch.zeros(8).half()}, TypeError, "out_bias must have the dtype of tokens, torch.float32"),
        ({"out_bias": torch.zeros(8, device="meta")}, ValueError, "block.out_bias must be on cpu, .* got meta"),
        ({"eps": -1.0}, ValueError, "block.eps must be a finite number of at least 0, got -1.0"),
        ({"eps": None}, TypeError, "block.eps must be a finite number of at least 0, got None"),
        ({"eps": math.inf}, ValueError, "block.eps must be a finite number of at least 0, got inf"),
        ({"heads": 3}, ValueError, "heads must divide the 8 channels of tokens, got 3"),
        ({"heads": 0}, ValueError, "heads must be an integer of at least 1, got 0"),
        ({"heads": 2.0}, TypeError, "heads must be an integer of at least 1, got 2.0"),
        ({"heads": True}, TypeError, "heads must be an integer of at least 1, got True"),
        ({"memory": torch.zeros(1, 2, 3, 16)}, TypeError, "memory must be a sequence of tensors, got Tensor"),
        ({"memory": None}, TypeError, "memory must be a sequence of tensors, got NoneType"),
        ({"memory": [None]}, TypeError, r"memory\[0\] must be a torch.Tensor, got NoneType"),
        ({"memory": [torch.zeros(2, 3, 8)]}, ValueError, r"memory\[0\] must have shape \[2, M, 16\], got \[2, 3, 8\]"),
        ({"memory": [torch.zeros(1, 3, 16)]}, ValueError, r"memory\[0\] must have shape .* got \[1, 3, 16\]"),
        ({"memory": [torch.zeros(2, 3, 16).int()]}, TypeError, r"memory\[0\] must be a floating-point tensor"),
        ({"memory": [torch.zeros(2, 3, 16, device="meta")]}, ValueError, r"memory\[0\] must be on cpu"),
        ({"index": [0]}, TypeError, "index must be a torch.Tensor, got list"),
        ({"index": torch.zeros(2, 3)}, TypeError, "index must be int32 or int64, got torch.float32"),
        ({"index": torch.zeros(2, 1, 3).int()}, ValueError, r"have shape \[B, L\] with B = 2, got \[2, 1, 3\]"),
        ({"index": torch.zeros(1, 3).int()}, ValueError, r"with B = 2, got \[1, 3\]"),
        ({"index": torch.zeros(2, 3, device="meta").int()}, ValueError, "index must be on cpu"),
        ({"backend": "cuda"}, BackendError, "transformer_block has no cuda backend"),
    ],
)  # fmt: skip
def test_errors(changes, error, message):
    of_block = {name: value for name, value in changes.items() if name in BlockWeights._fields}
    others = {name: value for name, value in changes.items() if name not in of_block}
    call = {"tokens": torch.zeros(2, 3, 8), "memory": [], "block": GOOD._replace(**of_block), "heads": 2, **others}
    with pytest.raises(error, match=message):
        transformer_block(**call)


@needs_native
def test_operators_called_directly_check_before_raw_pointers():
    op = torch.ops.icseg.transformer_block
    good = {
        "tokens": torch.zeros(2, 3, 8), "memory": [torch.zeros(2, 1, 16)], "weights": list(GOOD[:14]),
        "heads": 2, "index": torch.zeros(2, 4, dtype=torch.int64), "eps": 1e-5, "backend": "native",
    }  # fmt: skip
    assert op(**good)[0].shape == (2, 3, 8)
    for changes, message in (
        ({"tokens": torch.zeros(2, 3, 8).double()}, "tokens must be float32"),
        ({"tokens": torch.zeros(3, 8)}, r"tokens must have shape \[B, N, D\]"),
        ({"heads": 0}, "heads be positive"),
        ({"weights": list(GOOD[:13])}, "weights must be 14"),
        ({"weights": [torch.zeros(7), *GOOD[1:14]]}, r"weights\[0\] must be float32 \[8\] on the CPU, got \[7\]"),
        ({"weights": [*GOOD[:13], torch.zeros(8).double()]}, r"weights\[13\] must be float32"),
        ({"memory": [torch.zeros(2, 1, 15)]}, r"memory\[0\] must be float32 \[2, 1, 16\]"),
        ({"memory": [torch.zeros(1, 16)]}, r"memory\[0\] must have shape \[2, M, 16\]"),
        ({"index": torch.zeros(2, 4)}, "index must be int32 or int64"),
        ({"index": torch.zeros(1, 4, dtype=torch.int64)}, r"index must be int32 or int64 \[2, M\]"),
    ):
        with pytest.raises(ValueError, match=message):
            op(**{**good, **changes})
    with pytest.raises(RuntimeError, match="native library: a block must have 1 to 512 channels"):
        op(**{**good, "heads": 3})


@needs_native
def test_impossible_sizes_of_the_entry():
    size = ctypes.c_int64()
    good = {"batch": 1, "count": 2, "dim": 8, "heads": 2, "hidden": 4, "keys": 2, "listed": 2, "slots": 1}

    def entry(workspace_bytes: int, index_bytes: int = 0, memory: tuple[int, ...] = (), **changes: int) -> int:
        sizes = {**good, **changes}
        described = native._call_bytes(
            *(0,) * 14, 1e-5, sizes["dim"], sizes["heads"], sizes["hidden"], 0, sizes["batch"], sizes["count"], 0, 0,
            0, index_bytes, sizes["listed"], 0, 0, 0, workspace_bytes, sizes["slots"],
        )  # fmt: skip
        pieces = native._memory_bytes(len(memory)).pack(*(n for tokens in memory for n in (0, tokens, 0, 0)))
        return native._transformer_block(described, pieces, len(memory), None, None)

    for changes, message in (
        ({"dim": 0}, "1 to 512 channels"),
        ({"dim": 513, "heads": 1}, "1 to 512 channels"),
        ({"heads": 3}, "heads that divide them"),
        ({"heads": 0}, "heads that divide them"),
        ({"hidden": 0}, "1 to 2048 hidden"),
        ({"hidden": 2049}, "1 to 2048 hidden"),
        ({"batch": -1}, "negative"),
        ({"count": -1}, "negative"),
        ({"listed": -1}, "negative"),
        ({"slots": 0}, "63 bits"),
        ({"slots": 2**62}, "63 bits"),
        ({"batch": 2**62}, "63 bits"),
        ({"listed": 2**62}, "63 bits"),
    ):
        code = native._workspace(*{**good, **changes}.values(), ctypes.byref(size))
        with pytest.raises(RuntimeError, match=message):
            library.check(code)
        with pytest.raises(RuntimeError, match=message):
            library.check(entry(2**40, **changes))
    assert native._workspace(*good.values(), ctypes.byref(size)) == 0
    for given_bytes, arguments, message in (
        (size.value - 1, {}, "workspace"),
        (2**40, {"memory": (-1,)}, "negative"),
        (2**40, {"memory": (2**62, 2**62)}, "63 bits"),
        (2**40, {"memory": (2**62,)}, "63 bits"),
        (2**40, {"memory": (1,)}, "runs must"),
        (2**40, {"index_bytes": 2}, "element_bytes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            library.check(entry(given_bytes, **arguments))
    assert entry(2**40, batch=0) == 0
