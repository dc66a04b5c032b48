"""Random numbers: their distributions, and that streams neither meet nor depend on the batch."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from icseg.data.synthetic.random import Draws

TASKS, COUNT = 200, 500
NUMBER = TASKS * COUNT
SIGMAS = 4.5  # about one in 150,000 for a normal statistic


@pytest.fixture
def draws() -> Draws:
    return Draws(torch.arange(TASKS))


def correlation(first: Tensor, second: Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1].item()


def check_distribution(values: Tensor, distribution: stats.rv_frozen) -> None:
    """By Kolmogorov and Smirnov, at a level of 1e-5."""
    assert stats.kstest(values.flatten().double().numpy(), distribution.cdf).pvalue > 1e-5


def test_uniform(draws: Draws) -> None:
    values = draws.uniform(0, 1, COUNT)
    assert values.dtype == torch.float32
    assert values.min() > 0
    assert values.max() <= 1
    check_distribution(values, stats.uniform())
    check_distribution(draws.uniform(-2, 3, COUNT), stats.uniform(-2, 5))
    highs = torch.arange(1.0, TASKS + 1).unsqueeze(1)
    assert (draws.uniform(0, highs, COUNT).amax(1) <= highs.squeeze(1)).all()


def test_normal(draws: Draws) -> None:
    values = draws.normal(1.0, COUNT)
    assert values.dtype == torch.float32
    check_distribution(values, stats.norm())
    assert abs(values.mean().item()) < SIGMAS / NUMBER**0.5
    assert abs(values.var().item() - 1) < SIGMAS * (2 / NUMBER) ** 0.5
    deviation = torch.linspace(0, 2, TASKS).unsqueeze(1)
    assert draws.normal(deviation, COUNT).std(1) == pytest.approx(deviation[:, 0], rel=SIGMAS / (2 * COUNT) ** 0.5)


def test_log_uniform(draws: Draws) -> None:
    check_distribution(draws.log_uniform(2, 50, COUNT).log(), stats.uniform(math.log(2), math.log(25)))


def test_white_noise_takes_all_its_values_as_often(draws: Draws) -> None:
    values = draws.white(5, 10, 10)
    assert values.shape == (TASKS, 5, 10, 10)
    steps = (values * (256 / math.sqrt(12)) + 127.5).round().long()
    assert stats.chisquare(steps.flatten().bincount(minlength=256).numpy()).pvalue > 1e-5
    assert abs(values.mean().item()) < SIGMAS / NUMBER**0.5
    assert values.std().item() == pytest.approx(1, rel=0.01)
    assert draws.white(3).shape == (TASKS, 3)


def test_integers_choices_and_chances(draws: Draws) -> None:
    counts = draws.integers(3, 10, COUNT).flatten().bincount(minlength=10)
    assert counts[:3].sum() == 0
    assert stats.chisquare(counts[3:].numpy()).pvalue > 1e-5
    highs = torch.arange(TASKS).unsqueeze(1) + 1
    drawn = draws.integers(0, highs, COUNT)
    assert ((drawn >= 0) & (drawn < highs)).all()
    assert set(draws.choice([0.5, 2.0, 7.0], COUNT).flatten().tolist()) == {0.5, 2.0, 7.0}
    share = draws.chance(0.3, COUNT).float().mean().item()
    assert abs(share - 0.3) < SIGMAS * (0.3 * 0.7 / NUMBER) ** 0.5
    assert not draws.chance(0.0, COUNT).any()


@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_elements_of_a_draw_are_independent(draws: Draws, lag: int) -> None:
    values = draws.uniform(0, 1, COUNT)
    assert abs(correlation(values[:, lag:], values[:, :-lag])) < SIGMAS / (TASKS * (COUNT - lag)) ** 0.5


@pytest.mark.parametrize("step", [1, 2**20, 2**32, 2**40])
def test_tasks_are_independent(step: int) -> None:
    first, second = (Draws(torch.arange(TASKS) * 3 * step + shift).uniform(0, 1, COUNT) for shift in (0, step))
    assert abs(correlation(first, second)) < SIGMAS / NUMBER**0.5


def test_successive_draws_and_parts_are_independent(draws: Draws) -> None:
    everyone = torch.arange(TASKS)
    streams = [draws, draws.of(everyone, 0), draws.of(everyone, 1), draws.of(everyone, 0).of(everyone, 0)]
    values = torch.stack([stream.uniform(0, 1, COUNT) for stream in streams for _ in range(3)])
    matrix = torch.corrcoef(values.flatten(1).double())
    assert (matrix - torch.eye(len(matrix))).abs().max() < SIGMAS / NUMBER**0.5


def test_no_draws_of_different_tasks_coincide() -> None:
    draws = Draws(torch.arange(16))
    values = torch.stack([draws.uniform(0, 1, 8) for _ in range(16)]).flatten(0, 1)
    assert len(values.unique(dim=0)) == 16 * 16


@pytest.mark.parametrize("kind", ["uniform", "normal", "white"])
def test_a_task_has_the_same_draws_whatever_the_others(kind: str) -> None:
    def drawn(draws: Draws) -> Tensor:
        first = draws.uniform(0, 1, 3)
        arguments = {"uniform": (0, 1), "normal": (1.0,), "white": ()}[kind]
        return torch.cat([first, getattr(draws, kind)(*arguments, 5)], 1)

    seeds = torch.tensor([0, 5, 2**40, 2**63 - 1, 7])
    whole = drawn(Draws(seeds).of(torch.arange(5), 4))
    for subset in ([3], [4, 0], [1, 1, 2]):
        assert torch.equal(drawn(Draws(seeds).of(torch.tensor(subset), 4)), whole[subset])
        assert torch.equal(drawn(Draws(seeds[subset]).of(torch.arange(len(subset)), 4)), whole[subset])


def test_a_part_does_not_depend_on_what_was_drawn_before() -> None:
    used, fresh = Draws(torch.arange(4)), Draws(torch.arange(4))
    used.normal(1.0, 100)
    assert torch.equal(used.of(torch.arange(4), 2).uniform(0, 1, 3), fresh.of(torch.arange(4), 2).uniform(0, 1, 3))
