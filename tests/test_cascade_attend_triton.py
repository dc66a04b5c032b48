"""attend_patches against the modules of the sparse model, in float64 and as they are; without a GPU, interpreted."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
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
from icseg_kernels.transformer_block import triton

if triton.missing():
    pytest.skip("; ".join(triton.missing()), allow_module_level=True)

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
        network.encoder.token[-1], network.encoder.context[-1] = nn.Linear(80, config.dim), nn.Linear(48, config.dim)
    units = network.encoder.token[-1].in_features + network.encoder.context[-1].in_features
    network.requires_grad_(False)
    for parameter in network.parameters():  # the zero-initialised output layers would hide a fault behind them
        if parameter.ndim == 1 or not parameter.any():
            parameter += 0.1 * torch.randn_like(parameter)
    hidden = normal(samples, count, units, seed=1)
    generator = torch.Generator().manual_seed(2)
    coords = torch.randint(0, 9, (samples, count, 2), generator=generator).to(DEVICE) * PATCH
    coords[:, 3:4] = OUTSIDE
    memory = [normal(of_memory or samples, keys, 2 * config.dim, seed=3 + i) for i in range(config.depth if keys else 0)]
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


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    """The grids of all launches."""
    grids, launch = [], triton_launch.launch

    def counted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        grids.append(grid)
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(triton_launch, "launch", counted)
    yield grids


CASES: dict[str, dict[str, Any]] = {
    "several": {},
    "one memory for all": {"of_memory": 1},
    "no memory": {"keys": 0},
    "support": {"keys": 0, "is_target": False},
    "one program": {"samples": 3, "count": 9},
    "as many as a program takes": {"samples": 1, "count": 14},
    "one patch": {"count": 1, "keys": 1},
    "no registers": {"count": 17, "registers": 0},
    "one block": {"depth": 1},
    "three blocks": {"depth": 3, "count": 4},
    "heads of no power of two": {"dim": 48, "heads": 3},
    "one head": {"heads": 1, "mlp_ratio": 3},
    "wide": {"samples": 1, "dim": 256, "heads": 8, "depth": 1},
}


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("name", CASES)
def test_is_what_the_modules_do(poisoned, name, start):
    case = made(**CASES[name])
    assert_near(case, start if case.is_target else 0)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["several", "support", "one program"])
def test_dtypes(poisoned, name, dtype):
    assert_near(made(**CASES[name], dtype=dtype))


def test_at_the_sizes_of_the_model(poisoned):
    config = SparseConfig()
    sizes = {name: getattr(config, name) for name in ("dim", "depth", "heads", "mlp_ratio", "registers")}
    assert_near(made(1, 28, 76, few_units=False, **sizes), start=40)
