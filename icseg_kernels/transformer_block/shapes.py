"""Shapes of a block's weights, which the public function and every backend check."""

from __future__ import annotations


def shapes(dim: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    """Of the weights and biases, in their order."""
    d, h = dim, hidden
    attention = (d,), (d,), (d, d), (d,), (2 * d, d), (2 * d,), (d, d), (d,)
    return *attention, (d,), (d,), (h, d), (h,), (d, h), (d,)
