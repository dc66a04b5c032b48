"""Sampling without replacement by the Gumbel-top-k trick, and the probabilities of what was drawn."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, cuda_library, flops, library, triton_launch
from icseg_kernels.gumbel_topk import cuda, native, reference, triton
from icseg_kernels.gumbel_topk.reference import scattered
from icseg_kernels.numerics import accumulation_dtype, nan_as_minus_infinity, scalar
from icseg_kernels.philox import checked_seed

_IMPLEMENTATIONS: dict[str, Any] = {"cuda": cuda, "triton": triton, "native": native, "reference": reference}

backends.declare(
    "gumbel_topk",
    {
        "cuda": backends.Backend(cuda_library.missing, cuda.unsupported, triton_launch.slower),
        "triton": backends.Backend(triton_launch.missing, triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, native.unsupported),
        "reference": backends.Backend(),
    },
)


class TopK(NamedTuple):
    """An ordered draw of k out of N elements without replacement.

    indices:   int64 [B, k], in the order drawn (descending score); -1 where nothing was left to draw.
    scores:    [B, k] perturbed logits; -inf where nothing was left. Their gradient goes to the element drawn.
    logsumexp: [B] log of the normaliser of the logits.
    kappa:     [B] the (k + 1)-th perturbed logit, -inf if there is none: the threshold of Kool et al. 2019.
    """

    indices: Tensor
    scores: Tensor
    logsumexp: Tensor
    kappa: Tensor

    def log_prob(self, logits: Tensor) -> Tensor:
        """[B] log-probability of this ordered draw under the Plackett-Luce model of `logits`.

        sum_i (l_i - log D_i) over the draws i, where D_i sums exp(l) over what was left before draw i. D is
        summed from the last draw backwards, so that nearly equal sums are never subtracted. An index of -1
        adds nothing. A draw of an element of logit -inf or NaN is impossible: the row's log-probability is -inf
        and its gradient 0.

        logits: [B, N] float16, bfloat16, float32 or float64, of the N candidates drawn from, on the device of the
                draw; they may be others than those drawn with. Gradients reach them, once.

        Returns float32, or float64 for float64 logits. Raises TypeError or ValueError; an N smaller than that of
        the draw is only noticed if it is below k, or by torch when an index does not exist.
        """
        self._check(logits)
        value, _ = _PlackettLuce.apply(nan_as_minus_infinity(logits), self.indices)
        found: Tensor = value
        return found

    def inclusion_log_prob(self, logits: Tensor) -> Tensor:
        """[B, k] log-probability that each drawn element exceeds kappa: log(1 - exp(-exp(l - kappa))).

        With q = exp of it, the sum over the draws of exp(l_i - logsumexp) / q_i * f_i is an unbiased estimate
        of the expectation of f under softmax(l) (Kool, van Hoof and Welling 2019). 0 where the index is -1
        and where kappa is -inf: then all were drawn. Gradients reach logits; kappa counts as a constant.

        logits, dtypes and errors as for `log_prob`.
        """
        self._check(logits)
        certain = (self.indices < 0) | (self.kappa == -torch.inf).unsqueeze(1)
        drawn = nan_as_minus_infinity(logits).gather(1, self.indices.clamp(min=0))
        # exp(-exp(7)) is 0 in float64 too, so the clamp changes no value.
        excess = (drawn - self.kappa.detach().unsqueeze(1)).masked_fill(certain, 7.0).clamp(max=7.0)
        rate = excess.clamp(min=-10.0).exp()
        series = excess - excess.exp() / 2 + (2 * excess).exp() / 24
        return torch.where(excess < -10.0, series, (-torch.expm1(-rate)).log())

    def _check(self, logits: Tensor) -> None:
        checks.device("logits", checks.floating("logits", logits), self.indices.device)
        batch, k = self.indices.shape
        if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < k:
            raise ValueError(
                f"logits must have shape [B, N] with B = {batch} and N of at least {k}, got {list(logits.shape)}"
            )


def gumbel_topk(
    logits: Tensor,
    k: int,
    *,
    seed: int | Tensor | None = None,
    noise: float | Tensor | None = None,
    backend: str | None = None,
) -> TopK:
    """Draw k of N elements without replacement, with probabilities softmax(logits).

    The k largest of logits + Gumbel noise are such a draw, in order (Kool, van Hoof and Welling 2019,
    "Stochastic beams and where to find them").

    logits:  [B, N] float16, bfloat16, float32 or float64, unnormalised, any strides. -inf and NaN are never
             drawn; +inf is drawn before every finite logit, lower index first, and makes the row's
             probabilities undefined.
    k:       0 <= k <= N. Rows with fewer than k elements to draw end in index -1 and score -inf.
    seed:    int, or a 0-dim int64 tensor on the device of logits, which a CUDA graph may refill; None takes
             one from torch's generator. The noise is float32 and depends on seed, row and element alone
             (`icseg_kernels.philox`), so the same logits give the same draw on every device and backend. Rows
             count from the start of the batch: its first half alone draws the same, its second half does not.
    noise:   [B, N] (or broadcastable) noise instead of a seed; 0 gives the plain top-k. Receives gradients.
    backend: "triton" (on CUDA devices), "native" (C++, on the CPU), "reference", or None for the best.

    Returns TopK, with scores, logsumexp and kappa in float32 (float64 for float64 logits). Of equal scores,
    the lower index comes first. Gradients reach logits, once, through scores and kappa (1 at the element) and
    logsumexp, in reverse mode. New values of k, seed and noise do not compile anew. Raises TypeError or ValueError
    for other types, shapes, devices or values, or for both seed and noise; BackendError if the named backend cannot
    serve.

    ```
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    draw = gumbel_topk(logits, 2, seed=1)
    draw.indices                    # tensor([[0, 2]]): first element 0, then element 2
    draw.log_prob(logits).exp()     # tensor([0.2333]) = 0.7 * 0.1 / (1 - 0.7)
    ```
    """
    if checks.floating("logits", logits).ndim != 2:
        raise ValueError(f"logits must have shape [B, N], got {list(logits.shape)}")
    k = checks.integer("k", k)
    if not 0 <= k <= logits.shape[1]:
        raise ValueError(f"k must lie in [0, N] with N = {logits.shape[1]}, got {k}")
    seeded, noise = noise_source(seed, noise, logits.shape, logits.device)
    chosen = backends.select("gumbel_topk", backend, logits, k)
    indices, scores, logsumexp, kappa, _ = backends.call(_GumbelTopK, _op, logits, k, seeded, noise, chosen)
    return TopK(indices, scores, logsumexp, kappa)


def noise_source(
    seed: int | Tensor | None, noise: float | Tensor | None, shape: tuple[int, ...], device: torch.device
) -> tuple[int | Tensor | None, Tensor | None]:
    """`seed` (`checked_seed`) and `noise` for candidates of `shape`: one of them, or neither for no noise."""
    if noise is None:
        return checked_seed(seed, device), None
    if seed is not None:
        raise ValueError("seed and noise must not both be given")
    if not isinstance(noise, Tensor):
        if isinstance(noise, bool) or not isinstance(noise, float | int | numbers.Real):
            raise TypeError(f"noise must be a number or a floating-point tensor, got {noise!r}")
        if noise == 0:
            return None, None
        noise = scalar(noise, device)
    checks.device("noise", checks.floating("noise", noise), device)
    try:
        return None, noise.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"noise must broadcast to shape {list(shape)}, got {list(noise.shape)}") from error


class _GumbelTopK(torch.autograd.Function):
    """(indices [B, k], scores [B, k], logsumexp [B], kappa [B], its index [B])."""

    @staticmethod
    def forward(logits: Tensor, k: int, seed: Tensor | None, noise: Tensor | None, backend: str) -> tuple[Tensor, ...]:
        drawn: tuple[Tensor, ...] = _op(logits, k, seed, noise, backend)
        return drawn

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, _, _, noise, ctx.backend = inputs
        indices, _, logsumexp, _, kappa_index = output
        ctx.mark_non_differentiable(indices, kappa_index)
        ctx.save_for_backward(logits, indices, kappa_index, logsumexp)
        ctx.noise_dtype = None if noise is None else noise.dtype

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _indices: Tensor, grad_scores: Tensor, grad_logsumexp: Tensor, grad_kappa: Tensor, _index: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        arguments = (*ctx.saved_tensors, grad_scores, grad_logsumexp, grad_kappa)
        grad = grad_noise = None
        if ctx.needs_input_grad[0]:
            grad = _backward_op(*arguments, False, ctx.backend).to(ctx.saved_tensors[0].dtype)
        if ctx.needs_input_grad[3]:
            grad_noise = _backward_op(*arguments, True, ctx.backend).to(ctx.noise_dtype)
        return grad, None, None, grad_noise, None


class _PlackettLuce(torch.autograd.Function):
    """Ordered log-probability [B] of `indices` [B, k], and -log D [B, k], for its gradient in closed form."""

    @staticmethod
    def forward(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        drawn = indices >= 0
        chosen = logits.gather(1, indices.clamp(min=0)).masked_fill(~drawn, -torch.inf)
        left_over = logits.masked_fill(scattered(drawn, indices, logits.shape[1]), -torch.inf)
        # log D of the last draw first.
        tail = torch.cat([left_over.logsumexp(1, keepdim=True), chosen.flip(1)], dim=1).logcumsumexp(1)[:, 1:]
        log_total = tail.flip(1)
        possible = chosen > -torch.inf
        terms = torch.where(possible, chosen - log_total, -torch.inf)
        return terms.masked_fill(~drawn, 0.0).sum(1), torch.where(possible, -log_total, -torch.inf)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        value, negative_log_total = output
        ctx.mark_non_differentiable(negative_log_total)
        ctx.save_for_backward(*inputs, value, negative_log_total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """d / d l_i = [i drawn] - exp(l_i) * (sum of 1 / D over the draws until i is gone)."""
        logits, indices, value, negative_log_total = ctx.saved_tensors
        drawn = scattered(indices >= 0, indices, logits.shape[1])
        until_drawn = scattered(negative_log_total.logcumsumexp(1), indices, logits.shape[1])
        until_the_end = negative_log_total.logsumexp(1, keepdim=True)
        expected = (logits + torch.where(drawn, until_drawn, until_the_end)).exp()
        slope = grad.unsqueeze(1) * (drawn.to(grad.dtype) - expected)
        return slope.masked_fill((value == -torch.inf).unsqueeze(1), 0.0), None


def _implementation(
    logits: Tensor, k: int, seed: int | Tensor | None, noise: Tensor | None, backend: str
) -> tuple[Tensor, ...]:
    drawn: tuple[Tensor, ...] = _IMPLEMENTATIONS[backend].gumbel_topk(logits, k, seed, noise)
    return drawn


def _fake(
    logits: Tensor, k: int, seed: Tensor | None, noise: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = logits.shape[0]
    dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((batch, k), dtype=torch.int64),
        logits.new_empty((batch, k), dtype=dtype),
        logits.new_empty((batch,), dtype=dtype),
        logits.new_empty((batch,), dtype=dtype),
        logits.new_empty((batch,), dtype=torch.int64),
    )


def _backward_implementation(logits: Tensor, *arguments: Any) -> Tensor:
    *others, backend = arguments
    grad: Tensor = _IMPLEMENTATIONS[backend].gumbel_topk_backward(logits, *others)
    return grad


def _backward_fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape, dtype=accumulation_dtype(logits.dtype))


_op = backends.register(
    "gumbel_topk(Tensor logits, SymInt k, Tensor? seed, Tensor? noise, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)
_backward_op = backends.register(
    "gumbel_topk_backward(Tensor logits, Tensor indices, Tensor kappa_index, Tensor logsumexp, Tensor grad_scores, "
    "Tensor grad_logsumexp, Tensor grad_kappa, bool of_noise, str backend) -> Tensor",
    _backward_implementation,
    _backward_fake,
)


def _count(logits: Any, k: int, seed: Any, noise: Any, backend: str, *, out_shape: Any = None) -> int:
    return flops.gumbel_topk_flops(*logits)


def _backward_count(logits: Any, *arguments: Any, out_shape: Any = None) -> int:
    """Per candidate an exponential, a subtraction and a product; the scores' gradients are copied."""
    batch, candidates = logits
    of_noise = arguments[-2]
    return 0 if of_noise else (flops.LOGARITHM_FLOPS + 2) * batch * candidates


flops.register(_op, _count)
flops.register(_backward_op, _backward_count)
