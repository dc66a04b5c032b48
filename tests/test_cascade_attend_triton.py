"""attend_patches against the modules of the sparse model, in float64 and as they are; without a GPU, interpreted."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from samples import DEVICE
from torch import Tensor, nn

from icseg.sparse.cascade import Cascade
from icseg.sparse.config import SparseConfig
from icseg.sparse.encoder import PatchEncoder
from icseg.sparse.network import SparseNetwork
from icseg.sparse.patches import OUTSIDE, PATCH, PatchInputs
from icseg.sparse.support import LevelMemory
from icseg_kernels import triton_launch
from icseg_kernels.transformer_block.triton import missing

if missing():
    pytest.skip("; ".join(missing()), allow_module_level=True)

import triton
import triton.language as tl

from icseg_kernels.cascade import attend_triton_kernels
from icseg_kernels.cascade.attend import TokenWeights, attend_patches

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BFLOAT16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])
DTYPES = [torch.float32, torch.float16, BFLOAT16]
if triton_launch.INTERPRETED:
    DTYPES.append(torch.float64)
LEVEL = 1

SMALL = SparseConfig(
    levels=(16, 32, 64), distinct_levels=3, target_patches=(4, 6, 8), support_patches=(4, 6, 8), exploration=(4, 6, 6),
    dim=32, depth=2, heads=2, stem_channels=8, registers=2,
)  # fmt: skip


@dataclasses.dataclass
class Case:
    network: SparseNetwork
    hidden: Tensor
    coords: Tensor
    longer_side: int
    memory: list[Tensor]
    is_target: bool = True

    @property
    def of_token(self) -> int:
        """Hidden units that the token's linear layer takes; the context's takes the others."""
        return self.network.encoder.token[-1].in_features

    def to(self, dtype: torch.dtype) -> Case:
        return dataclasses.replace(
            self, network=copy.deepcopy(self.network).to(dtype), hidden=self.hidden.to(dtype),
            memory=[piece.to(dtype) for piece in self.memory],
        )  # fmt: skip

    def cache(self, start: int = 0, seed: int = 9) -> Tensor:
        """With values before `start`, NaN after it."""
        config, (samples, count, _) = self.network.config, self.hidden.shape
        rows = start + config.registers + count + 3
        cache = normal(config.depth, samples, rows, 2 * config.dim, seed=seed).to(self.hidden)
        cache[:, :, start:] = math.nan
        return cache


def normal(*shape: int, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")
    return values.to(DEVICE)


def made(
    samples: int = 2, count: int = 21, keys: int = 13, dtype: torch.dtype = torch.float32, *, of_memory: int = 0,
    is_target: bool = True, few_units: bool = True, **changes: Any,
) -> Case:  # fmt: skip
    """keys: of the memory, 0 for none; of_memory: its samples, 0 for as many as there are.

    few_units: in place of the model's 1280 hidden units, for which the interpreter takes long.
    """
    config = dataclasses.replace(SMALL, **changes)
    torch.manual_seed(0)
    network = SparseNetwork(config).eval()
    if few_units:
        network.encoder.token[-1], network.encoder.context[-1] = nn.Linear(40, config.dim), nn.Linear(24, config.dim)
    units = network.encoder.token[-1].in_features + network.encoder.context[-1].in_features
    network.requires_grad_(False)
    for parameter in network.parameters():  # the zero-initialised output layers would hide a fault behind them
        if parameter.ndim == 1 or not parameter.any():
            parameter += 0.1 * torch.randn_like(parameter)
    hidden = normal(samples, count, units, seed=1)
    generator = torch.Generator().manual_seed(2)
    coords = torch.randint(0, 9, (samples, count, 2), generator=generator).to(DEVICE) * PATCH
    coords[:, 3:4] = OUTSIDE
    rows = of_memory or samples, keys, 2 * config.dim
    memory = [normal(*rows, seed=3 + i) for i in range(config.depth if keys else 0)]
    return Case(network.to(DEVICE), hidden, coords, 70, memory, is_target).to(dtype)


def weights_of(case: Case) -> TokenWeights:
    network, encoder = case.network, case.network.encoder
    token, context, position = encoder.token[-1], encoder.context[-1], encoder.position
    registers = network.target_registers if case.is_target else network.support_registers
    return TokenWeights(
        token.weight, token.bias, context.weight, context.bias, position.weight, position.bias, encoder.frequency,
        encoder.level_embedding[LEVEL], encoder.role_embedding[int(case.is_target)],
        encoder.norm.weight, encoder.norm.bias, registers, network.norm.weight, network.norm.bias,
        encoder.norm.eps, network.norm.eps,
    )  # fmt: skip


def run(case: Case, cache: Tensor, start: int = 0) -> Tensor:
    blocks = [block._weights() for block in case.network.blocks]
    return attend_patches(
        case.hidden, case.coords, case.longer_side, weights_of(case), blocks, case.memory, cache, start,
        case.network.config.heads,
    )  # fmt: skip


class Given(nn.Module):
    """Whatever comes in, a tensor comes out."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def embedded(case: Case) -> Tensor:
    """What PatchEncoder makes of the hidden units."""
    encoder: PatchEncoder = copy.deepcopy(case.network.encoder)
    hidden, (samples, count, _) = case.hidden.flatten(0, 1), case.hidden.shape
    nothing = hidden.new_zeros(samples * count, 1, 1, 1)
    encoder.stem = encoder.label_stem = Given(nothing)
    encoder.token = nn.Sequential(Given(hidden[:, : case.of_token]), encoder.token[-1])
    encoder.context = nn.Sequential(Given(hidden[:, case.of_token :]), encoder.context[-1])
    place = ((case.coords + PATCH / 2) / case.longer_side).clamp(-1, 2).to(hidden.dtype)
    pixels = hidden.new_zeros(samples, count, 2, 16, 16)
    inputs = PatchInputs(pixels, pixels, pixels, place)
    return encoder(inputs, LEVEL, is_target=case.is_target)[1]


@torch.no_grad()
def expected(case: Case, cache: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """By the model's own modules: tokens, and keys and values of all blocks [depth, B, R + K, 2D]."""
    network, tokens, samples = case.network, embedded(case), len(case.hidden)
    if case.is_target:
        memory = [piece.expand(samples, -1, -1) for piece in case.memory]
        if not memory:
            memory = [cache[0, :, :0]] * len(network.blocks)
        state = Cascade([[rows[:, :start]] for rows in cache], [None], [start])
        found = network._attend(tokens, LevelMemory(memory, tokens, tokens, None), state, None)
        return found, torch.stack([pieces[-1] for pieces in state.blocks])
    tokens, count = torch.cat([network.support_registers.expand(samples, -1, -1), tokens], 1), tokens.shape[1]
    keys = []
    for block in network.blocks:
        tokens, own = block(tokens, [], None)
        keys.append(own)
    return network.norm(tokens[:, -count:]), torch.stack(keys)


def assert_near(case: Case, start: int = 0) -> None:
    """Twice the modules' errors at most, but for some units in the last place of the largest value."""
    cache = case.cache(start)
    before = cache.clone()
    found = run(case, cache, start)
    torch.use_deterministic_algorithms(False)  # by `poisoned`; cuBLAS would want to be told before it starts
    oracle, theirs = (expected(c, before.to(c.hidden), start) for c in (case.to(torch.float64), case))
    config, count = case.network.config, case.hidden.shape[1]
    end = start + config.registers + count
    for ours, other, right in zip((found, cache[:, :, start:end]), theirs, oracle, strict=True):
        assert ours.shape == right.shape
        assert ours.dtype == case.hidden.dtype
        error, usual = ((x.double() - right).abs().max() for x in (ours, other))
        assert error <= 2 * usual + 4 * torch.finfo(ours.dtype).eps * right.abs().max()
    assert torch.equal(cache[:, :, :start], before[:, :, :start])
    assert cache[:, :, end:].isnan().all()


CASES: dict[str, dict[str, Any]] = {
    "several": {},
    "one memory for all": {"of_memory": 1, "count": 15},
    "no memory": {"samples": 1, "keys": 0},
    "support": {"keys": 0, "is_target": False},
    "one program": {"samples": 3, "count": 9},
    "as many as a program takes": {"samples": 1, "count": 14},
    "one patch": {"count": 1, "keys": 1},
    "no registers": {"samples": 1, "count": 17, "registers": 0},
    "one block": {"depth": 1, "samples": 1, "count": 16},
    "three blocks": {"depth": 3, "count": 4},
    "heads of no power of two": {"samples": 1, "dim": 48, "heads": 3, "count": 15},
    "one head": {"heads": 1, "mlp_ratio": 3, "count": 5},
    "wide": {"samples": 1, "dim": 256, "heads": 8, "depth": 1, "count": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_is_what_the_modules_do(poisoned, name):
    case = made(**CASES[name])
    assert_near(case, start=7 if case.is_target else 0)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["one memory for all", "support", "one program"])
def test_dtypes(poisoned, name, dtype):
    assert_near(made(**CASES[name], dtype=dtype))


def test_at_the_sizes_of_the_model(poisoned):
    config = SparseConfig()
    sizes = {name: getattr(config, name) for name in ("dim", "depth", "heads", "mlp_ratio", "registers")}
    assert_near(made(1, 20, 76, few_units=False, **sizes), start=40)


def test_places_are_exact_in_half_precision():
    """The highest frequency turns a place by 76 times: rounded to half precision it would be anywhere."""
    case = made(1, 9, 0, torch.float16, is_target=False, depth=1)
    for parameter in (*case.network.encoder.token[-1].parameters(), *case.network.encoder.context[-1].parameters()):
        parameter.zero_()
    found, right = run(case, case.cache()), expected(case.to(torch.float64), case.to(torch.float64).cache())[0]
    torch.testing.assert_close(found.double(), right, rtol=0, atol=0.02)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_launch(monkeypatch, depth):
    grids, launch = [], triton_launch.launch

    def counted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        grids.append(grid)
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(triton_launch, "launch", counted)
    case = made(2, 15, 3, depth=depth)
    run(case, case.cache())
    assert grids == [(4,)] * (depth + 1 if triton_launch.INTERPRETED else 1)
    grids.clear()
    case = made(2, 14, 3, depth=depth)
    run(case, case.cache())
    assert grids == [(2,)]  # programs that wait for none but themselves


@triton.jit
def meet_kernel(words, number, tokens, TIMES: tl.constexpr):  # type: ignore[no-untyped-def]
    attend_triton_kernels._begin(words, number, tokens, 16)
    for time in range(TIMES):
        attend_triton_kernels._arrive(words, number, tokens, 16)
        attend_triton_kernels._wait(words + tl.program_id(0), (number << 16) + time + 1)
    attend_triton_kernels._leave(words, number, TIMES, tokens, 16)


@pytest.mark.parametrize("garbage", [0, -1, 2**63 - 1, (5 << 16) + 1, (2**44 + 6 << 16) + 65535])
def test_words_may_hold_anything_and_are_cleared(garbage):
    words = torch.full((3,), garbage, device=DEVICE)
    meet_kernel[(2,)](words, 2**44 + 7, 9, 3)
    assert words.tolist() == [0, 0, garbage]


def test_samples_of_a_batch_are_what_they_are_alone():
    case = made(2, 15, depth=1)
    cache = case.cache(5)
    before = cache.clone()
    found = run(case, cache, 5)
    for i in range(2):
        part = slice(i, i + 1)
        alone = dataclasses.replace(
            case, hidden=case.hidden[part], coords=case.coords[part], memory=[piece[part] for piece in case.memory]
        )
        of_one = before[:, part].contiguous()
        assert torch.equal(run(alone, of_one, 5), found[part])
        assert_same(of_one, cache[:, part])


def assert_same(a: Tensor, b: Tensor) -> None:
    """Also where they are NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_twice_the_same_bits():
    case = made(2, 15)
    caches = case.cache(), case.cache()
    assert torch.equal(run(case, caches[0]), run(case, caches[1]))
    assert_same(*caches)


def test_memory_that_is_expanded_or_has_gaps():
    case = made(2, 3, 13, of_memory=1, depth=1)
    right = run(case, case.cache())
    whole = [piece.repeat(2, 1, 1) for piece in case.memory]
    apart = [torch.cat([piece, torch.full_like(piece, math.nan)], 1)[:, :13] for piece in whole]
    for memory in (whole, [piece.expand(2, -1, -1) for piece in case.memory], apart):
        assert torch.equal(run(dataclasses.replace(case, memory=memory), case.cache()), right)


def test_a_level_after_another():
    """Keys of earlier tokens are those that an earlier call wrote."""
    first, second = made(2, 4, 5), made(2, 9, 5)
    cache = torch.full((2, 2, 20, 64), math.nan, device=DEVICE)
    run(first, cache)
    found = run(second, cache, 6)
    earlier = expected(first, first.cache())[1]
    torch.testing.assert_close(found, expected(second, earlier, 6)[0], rtol=1e-4, atol=1e-4)
    assert cache[:, :, 17:].isnan().all()


def test_nan_stays_in_its_sample():
    case = made(2, 15, depth=1)
    right = run(case, case.cache())
    case.hidden[0, 4, 2] = math.nan
    found = run(case, case.cache())
    assert found[0].isnan().all()
    assert torch.equal(found[1], right[1])


@pytest.mark.parametrize(("samples", "count"), [(0, 4), (2, 0), (0, 0)])
def test_nothing(samples, count):
    case = made(samples, count, 0)
    cache = case.cache()
    assert run(case, cache).shape == (samples, count, 32)
    assert cache[:, :, :2].isfinite().all()  # registers are there all the same
    assert cache[:, :, 2:].isnan().all()


def test_refuses_what_it_cannot_serve():
    case = made(2, 5, 3)
    config = case.network.config
    good = {
        "hidden": case.hidden, "coords": case.coords, "longer_side": 70, "weights": weights_of(case),
        "blocks": [block._weights() for block in case.network.blocks], "memory": case.memory, "cache": case.cache(),
        "start": 3, "heads": config.heads,
    }  # fmt: skip
    attend_patches(**good)
    weights, blocks, cache = good["weights"], good["blocks"], good["cache"]
    for changes, error, message in (
        ({"hidden": case.hidden.int()}, ValueError, "hidden is torch.int32"),
        ({"hidden": case.hidden[0]}, ValueError, r"hidden must be \[B, K, F\]"),
        ({"hidden": case.hidden.mT.contiguous().mT}, ValueError, "hidden must be contiguous"),
        (
            {"hidden": case.hidden[..., 1:].contiguous()},
            ValueError,
            r"weights.context_weight must have shape \[32, 23\]",
        ),
        ({"coords": case.coords.int()}, TypeError, "coords must be torch.int64"),
        ({"coords": case.coords[:, :4].contiguous()}, ValueError, r"coords must have shape \[2, 5, 2\]"),
        ({"weights": weights._replace(role=weights.role[1:])}, ValueError, "weights.role must have shape"),
        ({"blocks": blocks[:1]}, ValueError, "blocks must be 1 to 4, as many as cache has"),
        ({"blocks": [blocks[0], blocks[1]._replace(eps=0.1)]}, ValueError, "eps must be that of all blocks"),
        ({"memory": case.memory[:1]}, ValueError, "memory as many or none, got 2, 2 and 1"),
        ({"memory": [piece.double() for piece in case.memory]}, TypeError, r"memory\[0\] must be torch.float32"),
        ({"memory": [case.memory[0], case.memory[1][:, 1:]]}, ValueError, r"memory\[1\] must have shape \[2, 3, 64\]"),
        ({"memory": [case.memory[0], case.memory[1][:1].expand(2, -1, -1)]}, ValueError, "the same strides"),
        ({"memory": [torch.cat([piece] * 2, 2)[..., :64] for piece in case.memory]}, ValueError, "must be contiguous"),
        ({"cache": cache[:, :, 1:], "start": 0}, ValueError, "cache must be contiguous"),
        ({"cache": cache[:, :1]}, ValueError, r"cache must have shape \[2, 2, 10, 64\]"),
        ({"start": 4}, ValueError, "cache must have room for rows 4 to 11, got 10"),
        ({"start": -1}, ValueError, "cache must have room"),
        ({"heads": 4}, ValueError, "a power of two of at least 16 a head, got 32 in 4 heads"),
        ({"heads": 0}, ValueError, "in 0 heads"),
    ):
        with pytest.raises(error, match=message):
            attend_patches(**{**good, **changes})


def test_kernels_are_named_apart():
    names = [c.name for c in attend_triton_kernels.COMPILATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("samples", "count"), [(1, 512), (64, 64)])
def test_many_programs(dtype, samples, count):
    assert_near(made(samples, count, 76 if samples > 1 else 0, dtype, of_memory=1, dim=128, heads=4, depth=4), start=9)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_replays_with_new_values(dtype):
    case = made(2, 40, dtype=dtype)
    cache = case.cache(7)
    run(case, cache, 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(case, cache, 7)
    for scale in (1.0, 0.5, 0.25):
        case.hidden.mul_(scale)
        graph.replay()
        again = cache.clone()
        assert torch.equal(found, run(case, again, 7))
        assert_same(again, cache)
