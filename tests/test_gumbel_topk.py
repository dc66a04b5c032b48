"""Sampling without replacement: its law, its edge cases, its probabilities and their gradients."""

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from samples import BACKENDS, needs_native
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from icseg_kernels import gumbel_topk, library, use_backend
from icseg_kernels.gumbel_topk import TopK
from icseg_kernels.philox import gumbel_noise

INF = float("inf")
NAN = float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs once for each backend."""
    with use_backend(request.param):
        yield request.param


def ordered_probability(weights: list[float], draw: tuple[int, ...]) -> float:
    """Plackett-Luce, by its definition."""
    left, probability = sum(weights), 1.0
    for i in draw:
        probability *= weights[i] / left
        left -= weights[i]
    return probability


def naive_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    rows = []
    for row, draw in zip(logits, indices.tolist(), strict=True):
        left = list(range(len(row)))
        total = row.new_zeros(())
        for i in (i for i in draw if i >= 0):
            total = total + row[i] - row[left].logsumexp(0)
            left.remove(i)
        rows.append(total)
    return torch.stack(rows)


def random_logits(batch: int, size: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, size, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize(("size", "k", "count"), [(2, 1, 40_000), (3, 3, 40_000), (6, 3, 40_000), (8, 4, 200_000)])
def test_ordered_draws_follow_plackett_luce(size: int, k: int, count: int) -> None:
    logits = random_logits(1, size, scale=1.0)
    weights = logits[0].double().exp().tolist()
    draws = gumbel_topk(logits.expand(count, size), k, seed=5).indices
    outcomes = dict.fromkeys(permutations(range(size), k), 0)
    for draw in map(tuple, draws.tolist()):
        outcomes[draw] += 1
    probabilities = [ordered_probability(weights, draw) for draw in outcomes]
    assert sum(probabilities) == pytest.approx(1.0)
    observed = list(outcomes.values())
    assert stats.chisquare(observed, [count * p for p in probabilities]).pvalue > 1e-3
    for i in range(size):  # as the first draw
        p, seen = weights[i] / sum(weights), int((draws[:, 0] == i).sum())
        assert abs(seen - count * p) < 4 * (count * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_the_largest_sums_in_order(dtype: torch.dtype) -> None:
    logits = random_logits(4, 33, dtype)
    draw = gumbel_topk(logits, 7, seed=3)
    wide = torch.promote_types(dtype, torch.float32)
    sums = logits.to(wide) + gumbel_noise(3, 4, 33).to(wide)
    expected, order = sums.topk(8, dim=1)
    assert torch.equal(draw.indices, order[:, :7])
    assert torch.equal(draw.scores, expected[:, :7])
    assert torch.equal(draw.kappa, expected[:, 7])
    torch.testing.assert_close(draw.logsumexp, logits.to(wide).logsumexp(1))
    assert {x.dtype for x in draw[1:]} == {wide}
    assert draw.indices.dtype == torch.int64


def test_noise_zero_is_plain_top_k() -> None:
    logits = random_logits(3, 20)
    draw = gumbel_topk(logits, 5, noise=0)
    assert torch.equal(draw.scores, logits.topk(5).values)
    assert torch.equal(draw.indices, logits.topk(5).indices)
    for zeros in (torch.zeros(3, 20), torch.zeros(1, 20), torch.zeros(())):
        assert torch.equal(gumbel_topk(logits, 5, noise=zeros).indices, draw.indices)


def test_noise_is_added() -> None:
    logits, noise = random_logits(2, 9), gumbel_noise(8, 2, 9)
    given, drawn = gumbel_topk(logits, 4, noise=noise), gumbel_topk(logits, 4, seed=8)
    for a, b in zip(given, drawn, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(gumbel_topk(logits, 4, noise=1.5).scores, logits.topk(4).values + 1.5)


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 500:510] = 1.0
    logits[0, 3] = -0.0
    indices = gumbel_topk(logits, 20, noise=0).indices
    assert indices.tolist() == [[*range(500, 510), *range(10)]]


def test_minus_infinity_and_nan_are_never_drawn() -> None:
    logits = torch.tensor([[-INF, 1.0, NAN, 0.0], [NAN, NAN, -INF, -INF], [2.0, 1.0, 0.0, -INF]])
    draw = gumbel_topk(logits, 3, noise=0)
    assert draw.indices.tolist() == [[1, 3, -1], [-1, -1, -1], [0, 1, 2]]
    assert draw.scores.tolist() == [[1.0, 0.0, -INF], [-INF] * 3, [2.0, 1.0, 0.0]]
    assert draw.kappa.tolist() == [-INF] * 3
    assert draw.logsumexp[1] == -INF
    assert draw.logsumexp[0] == pytest.approx(1.3132617)
    seeded = gumbel_topk(logits.expand(3, 4), 3, seed=0)
    assert torch.equal(seeded.indices.sort().values, draw.indices.sort().values)


def test_bad_noise_is_never_drawn() -> None:
    noise = torch.tensor([[NAN, -INF, 0.0, INF]])
    draw = gumbel_topk(torch.tensor([[5.0, 5.0, 5.0, -INF]]), 3, noise=noise)
    assert draw.indices.tolist() == [[2, -1, -1]]


def test_plus_infinity_comes_first() -> None:
    logits = torch.tensor([[0.0, INF, 9.0, INF]])
    for seed in range(5):
        assert gumbel_topk(logits, 3, seed=seed).indices.tolist() == [[1, 3, 2]]


def test_k_zero_and_k_all() -> None:
    logits = random_logits(3, 6)
    none, everything = gumbel_topk(logits, 0, seed=1), gumbel_topk(logits, 6, seed=1)
    assert none.indices.shape == (3, 0)
    assert torch.equal(none.kappa, everything.scores[:, 0])
    assert torch.equal(none.log_prob(logits), torch.zeros(3))
    assert none.inclusion_log_prob(logits).shape == (3, 0)
    assert torch.equal(everything.indices.sort().values, torch.arange(6).expand(3, 6))
    assert torch.equal(everything.kappa, torch.full((3,), -INF))
    assert torch.equal(everything.inclusion_log_prob(logits), torch.zeros(3, 6))


@pytest.mark.parametrize(("batch", "size"), [(0, 5), (2, 0), (0, 0)])
def test_empty(batch: int, size: int) -> None:
    logits = torch.zeros(batch, size, requires_grad=True)
    draw = gumbel_topk(logits, 0, seed=0)
    assert draw.indices.shape == (batch, 0)
    assert torch.equal(draw.kappa, torch.full((batch,), -INF))
    (draw.log_prob(logits).sum() + draw.scores.sum() + draw.inclusion_log_prob(logits).sum()).backward()
    assert torch.equal(logits.grad, torch.zeros(batch, size))


def test_same_seed_same_draw_and_new_rows_draw_anew() -> None:
    logits = torch.zeros(50, 100)
    first, second = gumbel_topk(logits, 5, seed=2), gumbel_topk(logits, 5, seed=torch.tensor(2))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.scores, second.scores)
    assert len(first.indices.unique(dim=0)) == 50
    assert torch.equal(gumbel_topk(logits[:20], 5, seed=2).indices, first.indices[:20])
    assert not torch.equal(gumbel_topk(logits, 5, seed=3).indices, first.indices)


def test_seed_none_follows_torch_generator() -> None:
    logits = torch.zeros(4, 100)
    torch.manual_seed(7)
    first, second = gumbel_topk(logits, 5), gumbel_topk(logits, 5)
    torch.manual_seed(7)
    assert torch.equal(gumbel_topk(logits, 5).indices, first.indices)
    assert not torch.equal(second.indices, first.indices)


def test_documented_example() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    draw = gumbel_topk(logits, 2, seed=1)
    assert draw.indices.tolist() == [[0, 2]]
    assert float(draw.log_prob(logits).exp()) == pytest.approx(0.7 * 0.1 / (1 - 0.7))


def test_strided_logits_and_noise() -> None:
    logits = random_logits(12, 40).t()[::2, 1:]
    noise = gumbel_noise(0, 11, 20).t()
    assert not logits.is_contiguous()
    assert torch.equal(
        gumbel_topk(logits, 3, noise=noise).indices,
        gumbel_topk(logits.contiguous(), 3, noise=noise.contiguous()).indices,
    )


def test_inputs_are_left_alone() -> None:
    logits = torch.tensor([[NAN, 1.0, -INF]])
    gumbel_topk(logits, 2, seed=0).log_prob(logits)
    assert logits[0, 0].isnan()


@pytest.mark.parametrize("k", [1, 3, 6])
def test_log_prob_equals_its_definition(k: int) -> None:
    logits = random_logits(5, 6, torch.float64)
    draw = gumbel_topk(logits, k, seed=4)
    expected = [
        ordered_probability(row.exp().tolist(), tuple(indices))
        for row, indices in zip(logits, draw.indices.tolist(), strict=True)
    ]
    torch.testing.assert_close(draw.log_prob(logits).exp(), torch.tensor(expected, dtype=torch.float64))


def test_log_probs_of_all_draws_sum_to_one() -> None:
    logits = random_logits(1, 5, torch.float64)
    draws = torch.tensor(list(permutations(range(5), 3)))
    nothing = torch.zeros(len(draws))
    all_draws = TopK(draws, nothing, nothing, nothing)
    assert all_draws.log_prob(logits.expand(len(draws), 5)).exp().sum() == pytest.approx(1.0)


def test_log_prob_is_stable_for_peaked_logits() -> None:
    """Subtracting drawn weights from the total loses every digit here; float32 must come near float64."""
    logits = random_logits(4, 4096, scale=15.0)
    draw = gumbel_topk(logits, 64, seed=1)
    exact = naive_log_prob(logits.double(), draw.indices)
    torch.testing.assert_close(draw.log_prob(logits).double(), exact, rtol=2e-6, atol=1e-5)


def test_log_prob_of_missing_and_impossible_draws() -> None:
    logits = torch.tensor([[0.0, 1.0, -INF, 2.0], [0.0, -INF, -INF, -INF], [-INF] * 4], requires_grad=True)
    indices = torch.tensor([[3, 0, 1], [0, -1, -1], [-1, -1, -1]])
    draw = TopK(indices, torch.zeros(3, 3), torch.zeros(3), torch.full((3,), -INF))
    value = draw.log_prob(logits)
    torch.testing.assert_close(value[0], naive_log_prob(logits[:1], indices[:1])[0])
    assert value[1:].tolist() == [0.0, 0.0]
    value.sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[1:] == 0).all())


def test_impossible_draws_have_no_probability_and_no_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, -INF, 2.0], [0.0, NAN, 1.0, 2.0], [-INF] * 4, [3.0, 1.0, 0.0, 2.0]])
    indices = torch.tensor([[2, 0], [0, 1], [3, -1], [1, 0]])
    draw = TopK(indices, torch.zeros(4, 2), torch.zeros(4), torch.full((4,), -INF))
    logits.requires_grad_()
    value = draw.log_prob(logits)
    assert value[:3].tolist() == [-INF] * 3
    value.sum().backward()
    assert torch.equal(logits.grad[:3], torch.zeros(3, 4))
    alone = logits.detach()[3:].clone().requires_grad_()
    naive_log_prob(alone, indices[3:]).sum().backward()
    torch.testing.assert_close(logits.grad[3:], alone.grad)


def test_missing_draws_add_nothing_under_other_logits() -> None:
    """An index of -1 is no draw, also where these logits would have left something to draw."""
    drawn_with = torch.tensor([[0.0, -INF, -INF, -INF], [1.0, 2.0, -INF, -INF]])
    draw = gumbel_topk(drawn_with, 3, noise=0)
    assert draw.indices.tolist() == [[0, -1, -1], [1, 0, -1]]
    logits = random_logits(2, 4, torch.float64).requires_grad_()
    torch.testing.assert_close(draw.log_prob(logits), naive_log_prob(logits, draw.indices))
    assert torch.autograd.gradcheck(draw.log_prob, (logits,))
    assert torch.equal(draw.inclusion_log_prob(logits), torch.zeros(2, 3, dtype=torch.float64))


def test_inclusion_is_certain_where_all_were_drawn() -> None:
    """Where kappa is -inf, for any logit: -inf - -inf is no number."""
    logits = torch.tensor([[-INF, 0.0, NAN]], requires_grad=True)
    draw = TopK(torch.tensor([[0, 1, 2]]), torch.zeros(1, 3), torch.zeros(1), torch.full((1,), -INF))
    value = draw.inclusion_log_prob(logits)
    assert value.tolist() == [[0.0, 0.0, 0.0]]
    value.sum().backward()
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_log_prob_gradient(k: int) -> None:
    logits = random_logits(3, 7, torch.float64).requires_grad_()
    draw = gumbel_topk(logits, k, seed=0)
    assert torch.autograd.gradcheck(draw.log_prob, (logits,))
    (ours,) = torch.autograd.grad(draw.log_prob(logits).sum(), logits)
    if k:
        (exact,) = torch.autograd.grad(naive_log_prob(logits, draw.indices).sum(), logits)
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_log_prob_of_narrow_logits(dtype: torch.dtype) -> None:
    logits = random_logits(2, 50, dtype).requires_grad_()
    draw = gumbel_topk(logits, 10, seed=0)
    value = draw.log_prob(logits)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, naive_log_prob(logits.double(), draw.indices).float(), rtol=1e-5, atol=1e-5)
    value.sum().backward()
    assert logits.grad.dtype == dtype


def test_inclusion_log_prob_equals_its_definition() -> None:
    logits = random_logits(6, 40, torch.float64)
    draw = gumbel_topk(logits, 8, seed=2)
    rate = (logits.gather(1, draw.indices) - draw.kappa.unsqueeze(1)).exp()
    torch.testing.assert_close(draw.inclusion_log_prob(logits), (-torch.expm1(-rate)).log(), rtol=1e-12, atol=0)


def test_inclusion_log_prob_far_from_kappa() -> None:
    """log(1 - exp(-x)) is log(x) - x / 2 for tiny x, 0 for large x; its slope in log(x) is x / expm1(x)."""
    logits = torch.tensor([[-80.0, -20.0, -10.5, -9.5, 0.0, 6.0, 50.0, 1e4]], requires_grad=True)
    draw = TopK(torch.arange(8).unsqueeze(0), torch.zeros(1, 8), torch.zeros(1), torch.zeros(1))
    value = draw.inclusion_log_prob(logits)
    rate = logits.detach().double().exp()
    exact = torch.where(rate > 1e-8, (-torch.expm1(-rate)).log(), logits.detach().double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)
    value.sum().backward()
    slope = torch.where(rate > 100, 0.0, rate / torch.expm1(rate.clamp(max=100)))
    torch.testing.assert_close(logits.grad.double(), slope, rtol=1e-5, atol=1e-7)


def test_inclusion_log_prob_gradient() -> None:
    logits = random_logits(3, 9, torch.float64).requires_grad_()
    draw = gumbel_topk(logits.detach(), 4, seed=0)
    assert torch.autograd.gradcheck(draw.inclusion_log_prob, (logits,))


def test_horvitz_thompson_estimate_is_unbiased() -> None:
    count, size, k = 20_000, 12, 4
    logits = random_logits(1, size, scale=1.5).expand(count, size)
    values = torch.linspace(-1, 1, size)
    draw = gumbel_topk(logits, k, seed=6)
    log_weight = logits.gather(1, draw.indices) - draw.logsumexp.unsqueeze(1) - draw.inclusion_log_prob(logits)
    estimates = (log_weight.exp() * values[draw.indices]).sum(1).double()
    exact = (logits[0].softmax(0) * values).sum()
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / count**0.5


def test_gradients_of_scores_kappa_and_logsumexp() -> None:
    logits = random_logits(3, 8, torch.float64).requires_grad_()
    noise = gumbel_noise(1, 3, 8).double().requires_grad_()

    def outputs(logits: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        draw = gumbel_topk(logits, 3, noise=noise)
        return draw.scores, draw.kappa, draw.logsumexp

    assert torch.autograd.gradcheck(outputs, (logits, noise))
    gumbel_topk(logits, 8, seed=0).scores.sum().backward()
    assert torch.equal(logits.grad, torch.ones(3, 8, dtype=torch.float64))


def test_gradients_where_nothing_is_left() -> None:
    logits = torch.tensor([[0.0, -INF, NAN], [-INF] * 3], requires_grad=True)
    draw = gumbel_topk(logits, 2, noise=0)
    grads = torch.ones(2, 2), torch.ones(2), torch.ones(2)
    torch.autograd.backward((draw.scores, draw.kappa, draw.logsumexp), grads)
    assert logits.grad.tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    logits.grad = None
    draw.inclusion_log_prob(logits).sum().backward()
    assert logits.grad.tolist() == [[0.0] * 3] * 2


def test_broadcast_noise_gets_gradients() -> None:
    noise = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    gumbel_topk(torch.tensor([[4.0, 3, 2, 1]]).expand(5, 4), 2, noise=noise).scores.sum().backward()
    assert noise.grad.tolist() == [[5.0, 5.0, 0.0, 0.0]]


def test_second_derivatives_are_refused() -> None:
    logits = random_logits(1, 4).requires_grad_()
    loss = gumbel_topk(logits, 2, seed=0).logsumexp.square().sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_opcheck(backend: str) -> None:
    ops = torch.ops.icseg
    for dtype in DTYPES:
        logits = random_logits(2, 9, dtype)
        torch.library.opcheck(ops.gumbel_topk.default, (logits, 3, torch.tensor(1), None, backend))
        torch.library.opcheck(ops.gumbel_topk.default, (logits, 9, None, torch.zeros(2, 9), backend))
        indices, scores, logsumexp, kappa, kappa_index = ops.gumbel_topk(logits, 3, torch.tensor(1), None, backend)
        arguments = (logits, indices, kappa_index, logsumexp, scores, logsumexp, kappa)
        for of_noise in (False, True):
            torch.library.opcheck(ops.gumbel_topk_backward.default, (*arguments, of_noise, backend))
    torch.library.opcheck(ops.gumbel_topk.default, (torch.zeros(2, 0), 0, torch.tensor(1), None, backend))


def test_compiles_whole_with_gradients() -> None:
    def draw(logits: Tensor, seed: int | Tensor) -> tuple[Tensor, ...]:
        top = gumbel_topk(logits, 4, seed=seed)
        return top.indices, top.scores, top.kappa, top.log_prob(logits), top.inclusion_log_prob(logits)

    torch.compiler.reset()
    compiled = torch.compile(draw, fullgraph=True)
    logits = random_logits(3, 30).requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (torch.tensor(1), torch.tensor(2)):
            expected, actual = draw(logits, seed), compiled(logits, seed)
            torch.testing.assert_close(actual, expected)
            (expected_grad,) = torch.autograd.grad(sum(x.sum() for x in expected[1:]), logits)
            (actual_grad,) = torch.autograd.grad(sum(x.sum() for x in actual[1:]), logits)
            torch.testing.assert_close(actual_grad, expected_grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_with_a_new_seed() -> None:
    logits, seed = random_logits(3, 1000).cuda(), torch.tensor(1, device="cuda")
    gumbel_topk(logits, 8, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw = gumbel_topk(logits, 8, seed=seed)
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        expected = gumbel_topk(logits.cpu(), 8, seed=value)
        assert torch.equal(draw.indices.cpu(), expected.indices)
        assert torch.equal(draw.scores.cpu(), expected.scores)


def test_autocast_changes_nothing() -> None:
    logits = random_logits(2, 30)
    plain = gumbel_topk(logits, 4, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gumbel_topk(logits, 4, seed=0)
        assert torch.equal(mixed.log_prob(logits), plain.log_prob(logits))
        assert torch.equal(mixed.inclusion_log_prob(logits), plain.inclusion_log_prob(logits))
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("logits", "k", "options", "error", "message"),
    [
        (torch.zeros(2, 3), 4, {}, ValueError, r"k must lie in \[0, N\] with N = 3, got 4"),
        (torch.zeros(2, 3), -1, {}, ValueError, "got -1"),
        (torch.zeros(3), 1, {}, ValueError, r"logits must have shape \[B, N\], got \[3\]"),
        (
            torch.zeros(2, 3).long(),
            1,
            {},
            TypeError,
            "logits must be a floating-point tensor .*, got torch.int64",
        ),
        (torch.zeros(2, 3), 1, {"seed": 1, "noise": 0}, ValueError, "seed and noise must not both be given"),
        (
            torch.zeros(2, 3),
            1,
            {"seed": 1.0},
            TypeError,
            "seed must be an integer, a 0-dim int64 tensor or None, got 1.0",
        ),
        (
            torch.zeros(2, 3),
            1,
            {"noise": torch.zeros(3, 3)},
            ValueError,
            r"broadcast to shape \[2, 3\], got \[3, 3\]",
        ),
        (
            torch.zeros(2, 3),
            1,
            {"noise": torch.zeros(2, 3).int()},
            TypeError,
            "noise must be a floating-point tensor .*, got torch.int32",
        ),
        (
            torch.zeros(2, 3),
            1,
            {"backend": "cuda"},
            NotImplementedError,
            "the cuda backend cannot serve gumbel_topk",
        ),
    ],
)
def test_errors(logits: Tensor, k: int, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gumbel_topk(logits, k, **options)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (
            torch.zeros(1, 3),
            ValueError,
            r"logits must have shape \[B, N\] with B = 2 and N of at least 2, got \[1, 3\]",
        ),
        (torch.zeros(2, 1), ValueError, r"N of at least 2, got \[2, 1\]"),
        (torch.zeros(2), ValueError, r"got \[2\]"),
        (torch.zeros(2, 3).long(), TypeError, "logits must be a floating-point tensor .*, got torch.int64"),
        (torch.zeros(2, 3, device="meta"), ValueError, "logits must be on cpu, .* got meta"),
        ([[0.0, 0.0]] * 2, TypeError, "logits must be a torch.Tensor, got list"),
    ],
)
def test_log_prob_checks_the_logits(logits: Tensor, error: type[Exception], message: str) -> None:
    draw = gumbel_topk(torch.zeros(2, 3), 2, seed=0)
    for method in (draw.log_prob, draw.inclusion_log_prob):
        with pytest.raises(error, match=message):
            method(logits)


def test_compile_serves_new_counts_seeds_and_noises() -> None:
    """A graph for the first value of each argument, and one for every other."""

    def seeded(logits: Tensor, k: int, seed: int) -> Tensor:
        return gumbel_topk(logits, k, seed=seed).scores

    def noisy(logits: Tensor, noise: float) -> Tensor:
        return gumbel_topk(logits, 3, noise=noise).scores

    logits = random_logits(2, 30)
    for call, arguments in (
        (seeded, [(2, i) for i in range(2, 12)]),
        (seeded, [(i, 5) for i in range(2, 12)]),
        (noisy, [(0.1 * i,) for i in range(1, 11)]),
    ):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=counter)
        for values in arguments:
            assert torch.equal(compiled(logits, *values), call(logits, *values))
        assert counter.frame_count <= 2


def test_functional_transforms() -> None:
    """Reverse mode is that of autograd; forward mode is refused rather than taken for zero."""
    logits = random_logits(2, 9).requires_grad_()
    draw = gumbel_topk(logits.detach(), 3, seed=0)
    losses = (
        lambda x: gumbel_topk(x, 3, seed=0).scores.square().sum(),
        lambda x: gumbel_topk(x, 3, seed=0).logsumexp.square().sum(),
        lambda x: draw.log_prob(x).square().sum(),
    )
    for loss in losses:
        (expected,) = torch.autograd.grad(loss(logits), logits)
        assert torch.equal(torch.func.grad(loss)(logits.detach()), expected)
        with pytest.raises(NotImplementedError, match="forward"):
            torch.func.jvp(loss, (logits.detach(),), (torch.ones_like(logits),))


BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def assert_equal_draws(logits: Tensor, k: int, **options: object) -> None:
    """Native indices and scores are the reference's, bit for bit; logsumexp within rounding."""
    ours = gumbel_topk(logits, k, backend="native", **options)
    expected = gumbel_topk(logits, k, backend="reference", **options)
    assert torch.equal(ours.indices, expected.indices)
    for name in ("scores", "kappa"):
        a, b = getattr(ours, name), getattr(expected, name)
        assert torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))
    torch.testing.assert_close(ours.logsumexp, expected.logsumexp, equal_nan=True)


def hostile_logits(kind: str, size: int, dtype: torch.dtype) -> Tensor:
    logits = random_logits(2, size, torch.float64, scale=1.0)
    position = torch.arange(size)
    return {
        "normal": logits,
        "cold": logits * 20,
        "equal": torch.zeros_like(logits),
        "few values": logits.round(),  # -0 and 0 among them
        "one huge": torch.where(position == size // 2, 1e4, logits),
        "huge spread": logits * 1e30,
        "far from zero": logits - 1e6,
        "few possible": torch.where(position % (size // 7 + 1) == 0, 0.5, -INF).expand(2, size),
        "infinite and missing": torch.where(position % 17 == 3, INF, torch.where(position % 5 == 1, NAN, logits)),
        "ascending": (3 * logits).sort(1).values,
        "descending": (3 * logits).sort(1, descending=True).values,
        "a ramp": -position.double().expand(2, size) / 100,
    }[kind].to(dtype)


KINDS = [
    "normal",
    "cold",
    "equal",
    "few values",
    "one huge",
    "huge spread",
    "far from zero",
    "few possible",
    "infinite and missing",
    "ascending",
    "descending",
    "a ramp",
]


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_native_draws_equal_the_reference(kind: str, isa: str, poisoned: None) -> None:
    for dtype in (torch.float32, torch.float64):
        for size in (1, 3, 256, 1000, 5000):
            logits = hostile_logits(kind, size, dtype)
            noise = gumbel_noise(5, 2, size).to(dtype)
            for k in {0, 1, min(size, 60), min(size, 300), size}:
                assert_equal_draws(logits, k, seed=size + k)
                assert_equal_draws(logits, k, noise=0)
                assert_equal_draws(logits, k, noise=noise)


@needs_native
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_many_seeds_equal_the_reference(isa: str) -> None:
    """What the words alone rule out must never have been drawn."""
    for seed in range(12):
        for dtype in (torch.float32, torch.float64):
            assert_equal_draws(random_logits(1, 20_003, dtype, scale=0.25 * seed), 5 + 7 * seed, seed=seed - 6)
    assert_equal_draws(random_logits(1, 300_000), 1000, seed=2**64 - 1)


@needs_native
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_long_rows_equal_the_reference(isa: str) -> None:
    size = 2**18 + 77
    for kind, k in (("normal", 256), ("few values", 100), ("few possible", 0)):
        logits = hostile_logits(kind, size, torch.float32)[:1]
        assert_equal_draws(logits, k, seed=3)
        assert_equal_draws(logits, k, noise=0)
    assert_equal_draws(hostile_logits("cold", size, torch.float64)[:1], 100, seed=1)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_native_draws_from_narrow_logits(dtype: torch.dtype, isa: str, poisoned: None) -> None:
    logits = random_logits(3, 700, dtype)
    logits[0, 5], logits[1, ::2], logits[2, 9] = NAN, -INF, INF
    for noise in (gumbel_noise(1, 3, 700), gumbel_noise(1, 3, 700).to(dtype), gumbel_noise(1, 1, 700).double()):
        assert_equal_draws(logits, 40, noise=noise)
    assert_equal_draws(logits, 40, seed=torch.tensor(7))


@needs_native
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_native_takes_any_strides(isa: str, tmp_path: Path) -> None:
    base = random_logits(6, 1200)
    views = [
        base[::2, 100:900],
        base.t().contiguous().t(),
        base[:, ::3],
        base[:1].expand(4, 1200),
        base[:, :1].expand(6, 90),
    ]
    for logits in views:
        batch, size = logits.shape
        assert_equal_draws(logits, 30, seed=1)
        for noise in (
            base.t().contiguous().t()[:batch, :size],
            base[:1, :1],
            base[0, 0],
            base[:1, -size:],
            base[:batch, :1],
        ):
            assert_equal_draws(logits, 30, noise=noise)
    far = 2**31 + 7
    sparse = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 500)
    logits = sparse.as_strided((2, 500), (far, 1))
    logits.copy_(base[:2, :500])
    assert_equal_draws(logits, 30, seed=1)
    assert_equal_draws(base[:2, :500], 30, noise=logits)


@needs_native
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_threads_change_no_bit(isa: str) -> None:
    threads = torch.get_num_threads()
    cases = [(5, 60_000, 50), (3, 50_000, 400), (1, 700_000, 100), (4, 9000, 9000)]
    try:
        for batch, size, k in cases:
            logits = random_logits(batch, size).requires_grad_()
            for options in ({"seed": 3}, {"noise": 0}):
                found = []
                for count in (1, 2):
                    torch.set_num_threads(count)
                    draw = gumbel_topk(logits, k, **options)
                    (grad,) = torch.autograd.grad(sum(x.sum() for x in draw[1:]), logits)
                    found.append((*draw, grad, gumbel_noise(3, batch, size)))
                for a, b in zip(*found, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_native_gradients_are_those_of_the_reference(dtype: torch.dtype, isa: str, poisoned: None) -> None:
    logits = random_logits(12, 301, dtype)
    logits[0, 3], logits[0, 4], logits[1, 8], logits[2] = NAN, -INF, INF, -INF
    for k in (0, 5, 301):
        found = []
        for name in ("native", "reference"):
            leaf, noise = logits.clone().requires_grad_(), gumbel_noise(2, 1, 301).requires_grad_()
            draw = gumbel_topk(leaf[::2], k, noise=noise, backend=name)
            upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in draw[1:]]
            found.append(torch.autograd.grad(draw[1:], (leaf, noise), upstream))
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected)


@needs_native
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_native_gradient_skips_indices_that_do_not_exist() -> None:
    int64 = torch.iinfo(torch.int64)
    indices = torch.tensor([[0, -1, int64.min, int64.max, 6, 5]])
    ones, one = torch.ones(1, 6), torch.ones(1)
    arguments = (torch.zeros(1, 6), indices, torch.tensor([2**40]), one, ones, one)
    grad = torch.ops.icseg.gumbel_topk_backward(*arguments, one, True, "native")
    assert grad.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
    with pytest.raises(
        ValueError, match=r"grad_kappa must have shape \[1\] and dtype torch.float32 on the CPU, got \[2\]"
    ):
        torch.ops.icseg.gumbel_topk_backward(*arguments, torch.ones(2), True, "native")
    with pytest.raises(
        ValueError, match=r"noise must have the shape \[2, 5\] of logits and be on the CPU, got \[1, 2\] on cpu"
    ):
        torch.ops.icseg.gumbel_topk(torch.zeros(2, 5), 2, None, torch.zeros(1, 2), "native")


@needs_native
@hypothesis.settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_random_draws_equal_the_reference(backend: str, data: st.DataObject) -> None:
    batch, size = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 700))
    k = data.draw(st.integers(0, size))
    seed = data.draw(st.integers(-(2**63), 2**64 - 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    scale = data.draw(st.sampled_from([0.0, 0.1, 1.0, 30.0, 3000.0]))
    logits = (gumbel_noise(seed, batch, size, stream=1) * scale).to(dtype)
    assert_equal_draws(logits, k, seed=seed)
    assert_equal_draws(logits.round(), k, noise=0)


@needs_native
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_impossible_sizes_are_refused_by_the_library() -> None:
    functions = library.get()
    for suffix in ("f32", "f64"):
        draw = getattr(functions, f"icseg_gumbel_topk_{suffix}")  # which has its argument types; an item has not
        backward = getattr(functions, f"icseg_gumbel_topk_backward_{suffix}")
        for batch, count, k, message in (
            (-1, 2, 1, "negative"),
            (1, -2, 1, "negative"),
            (1, 2, -1, "negative"),
            (1, 2, 3, "outnumber"),
            (1, 2**31, 3, "63 bits"),
            (2**32, 2, 1, "63 bits"),
            (2**62, 2**30, 1, "63 bits"),
        ):
            code = draw(*[None] * 8, 2**62, batch, count, k, count, 0, 1, 1)
            assert message in functions.icseg_error(code).decode()
            assert backward(*[None] * 8, batch, count, k, count) == code
        code = draw(*[None] * 8, 4, 1, 1000, 257, 1000, 0, 1, 1)
        assert "the workspace must" in functions.icseg_error(code).decode()
    noise = functions.icseg_gumbel_noise
    assert "negative" in functions.icseg_error(noise(None, 1, 1, 0, -1, 0)).decode()
    for arguments in ((2**62, 2**62, 0, 0, 0), (1, 1, 0, 2**32, 0), (1, 1, 0, 0, 2**32), (2**32, 1, 0, 0, 0)):
        assert "63 bits" in functions.icseg_error(noise(None, *arguments)).decode()


@needs_native
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_what_native_does_not_take_says_why() -> None:
    too_many = torch.zeros(1).expand(1, 2**31)
    message = r"the native backend cannot serve gumbel_topk .*at most 2147483647 candidates, got 2147483648"
    with pytest.raises(NotImplementedError, match=message):
        gumbel_topk(too_many, 1, noise=0)
