"""Muon for matrices, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers") steps along the momentum of a matrix with all its
singular values brought to about one, so that rare directions are learned as fast as frequent ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic of the iteration, which takes singular values in (0, 1] to about [0.7, 1.2] in five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-8


class MuonAdamW(torch.optim.Optimizer):
    """Two kinds of parameter groups, told apart by `muon`.

    muon = True:  parameters of two or more dimensions, [rows, ...] taken as matrices: Muon with Nesterov momentum
                  `momentum`, times `ratio` over the learning rate and sqrt(max(1, rows / columns)).
    muon = False: AdamW with `betas`.

    `weight_decay` is decoupled in both: a step shrinks a weight by the group's own step size times it.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        momentum: float = 0.95,
        ratio: float = 13.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum": momentum, "ratio": ratio, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(parameters, group)
            else:
                self._adamw(parameters, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape are made orthogonal together."""
        step_size = group["lr"] * group["ratio"]
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            gradient = p.grad
            assert gradient is not None
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
            by_shape.setdefault(tuple(direction.shape), []).append((p, direction))
        for (rows, columns), same in by_shape.items():
            factor = max(1.0, rows / columns) ** 0.5
            directions = orthogonalised(torch.stack([direction for _, direction in same]))
            for (p, _), direction in zip(same, directions, strict=True):
                p.mul_(1 - step_size * group["weight_decay"])
                p.add_(direction.view(p.shape), alpha=-step_size * factor)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            state["step"] += 1
            step = float(state["step"])
            assert p.grad is not None
            state["mean"].lerp_(p.grad, 1 - first)
            state["square"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
            deviation = (state["square"] / (1 - second**step)).sqrt_().add_(_EPSILON)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(state["mean"], deviation, value=-group["lr"] / (1 - first**step))


def orthogonalised(matrices: Tensor) -> Tensor:
    """[M, rows, columns] with singular values brought to about one by Newton-Schulz steps, in float32."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices.float() if wide else matrices.float().mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)
