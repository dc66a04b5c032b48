"""Muon for matrices and AdamW for the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from icseg.training import OptimiserConfig
from icseg.training.muon import MuonAdamW, orthogonalised
from icseg.training.optimisation import make_optimiser


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 12), (2, 12, 40), (1, 1, 9)])
def test_singular_values_become_about_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1.0, 50.0])[
        : shape[0]
    ].view(-1, 1, 1)
    left, before, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalised(matrices)
    kept = before > 0.02 * before[:, :1]  # the iteration leaves the smallest ones behind
    after = torch.linalg.svdvals(result)
    assert bool((after[kept] > 0.6).all())
    assert float(after.max()) < 1.3
    # The singular vectors stay: the result is diagonal in them.
    diagonal = left.mT @ result @ right.mT
    assert torch.allclose(diagonal, torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2)), atol=1e-3)


def test_half_precision_matrices_keep_their_type() -> None:
    assert orthogonalised(torch.randn(1, 8, 4).bfloat16()).dtype == torch.bfloat16


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(6 * 36, 4), nn.Linear(4, 4))


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        x = torch.randn(3, 1, 8, 8, generator=generator)
        optimiser.zero_grad(set_to_none=True)
        (model(x) - 1).square().mean().backward()
        optimiser.step()
    return [p.detach().clone() for p in model.parameters()]


def test_adamw_is_that_of_torch() -> None:
    ours = make_model()
    config = OptimiserConfig(method="adamw", learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.95)
    mine = train(ours, make_optimiser(ours, config))
    theirs = make_model()
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    expected = train(theirs, torch.optim.AdamW(groups, betas=(0.8, 0.95)))
    for a, b in zip(mine, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_muon_takes_the_matrices_alone() -> None:
    model = make_model()
    optimiser = make_optimiser(model, OptimiserConfig(learning_rate=1e-2, weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, optimiser, steps=1)
    for old, new in zip(before, after, strict=True):
        step = (new - old).flatten(1) if old.ndim > 1 else new - old
        if old.ndim > 1:
            factor = 1e-2 * 13 * max(1, step.shape[0] / step.shape[1]) ** 0.5
            largest = float(torch.linalg.svdvals(step)[0])
            assert 0.6 * factor < largest < 1.3 * factor
        else:
            assert float(step.abs().max()) <= 1e-2 * 1.001  # a first step of Adam


def test_the_same_steps_from_a_saved_state() -> None:
    model, config = make_model(), OptimiserConfig(learning_rate=1e-2)
    optimiser = make_optimiser(model, config)
    train(model, optimiser, 3)
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    other = make_optimiser(twin, config)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for a, b in zip(train(model, optimiser, 2), train(twin, other, 2), strict=True):
        assert torch.equal(a, b)


def test_parameters_without_a_gradient_stay() -> None:
    model = make_model()
    optimiser = make_optimiser(model, OptimiserConfig())
    before = [p.detach().clone() for p in model.parameters()]
    optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert isinstance(optimiser, MuonAdamW)
    assert not optimiser.state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "sgd"}, "method must be one of muon, adamw, got 'sgd'"),
        ({"muon_ratio": 0.0}, "muon_ratio must be .* above 0, got 0.0"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimiserConfig(**arguments)  # type: ignore[arg-type]
