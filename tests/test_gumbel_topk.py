"""Sampling without replacement: its law, its edge cases, its probabilities and their gradients."""

from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from icseg_kernels import gumbel_topk, library, use_backend
from icseg_kernels.gumbel_topk import TopK
from icseg_kernels.philox import gumbel_noise

INF = float("inf")
NAN = float("nan")
BACKENDS = ["reference"] if library.missing() else ["native", "reference"]
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


@pytest.mark.parametrize(("size", "k"), [(2, 1), (3, 3), (5, 2), (6, 3)])
def test_ordered_draws_follow_plackett_luce(size: int, k: int) -> None:
    count = 40_000
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
    for seen, p in zip(observed, probabilities, strict=True):
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
            {"backend": "triton"},
            NotImplementedError,
            "gumbel_topk has no triton backend",
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
