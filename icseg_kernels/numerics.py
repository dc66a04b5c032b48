"""Arithmetic that several ops share: dtypes of sums, an order of sums, missing values, scalars, autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32 for floating dtypes of less than 4 bytes, else `dtype` itself."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def nan_as_minus_infinity(x: Tensor) -> Tensor:
    """`x` in its `accumulation_dtype`, with NaN replaced by -inf."""
    x = x.to(accumulation_dtype(x.dtype))
    return x.masked_fill(x.isnan(), -torch.inf)


def scalar(value: float, device: torch.device) -> Tensor:
    """`value` as a 0-dim float64 tensor, which promotes no dtype.

    For ops that torch.compile shall not compile anew for every value: it keeps a float as an input of the graph
    where it is a factor, but makes it a constant where it is the argument of an op or of torch.full.
    """
    return torch.ones((), dtype=torch.float64, device=device) * value


def autocast(x: Tensor) -> Tensor:
    """Floating-point `x` as autocast, if enabled, hands it to torch's matrix products; float64 stays as it is."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def deterministic_add(total: Tensor, index: Tensor, values: Tensor, dim: int = -1) -> Tensor:
    """total[b, ..., index[b, j], ...] += values[b, ..., j, ...], in place, the same bits in every run.

    total:  [B, ..., N, ...] with N at `dim`, which is not 0.
    index:  int64 [B, M], from 0 to N - 1; the values of one that is repeated add up.
    values: [B, ..., M, ...], of the dtype of `total` and of its shape but at `dim`.

    Returns `total`.
    """
    if total.numel() == 0 or values.numel() == 0:
        return total
    if not total.is_cuda:
        lengths = [1] * total.ndim
        lengths[0], lengths[dim] = index.shape
        return total.scatter_add_(dim, index.reshape(lengths).expand_as(values), values)
    # scatter_add_ adds in any order there; index_put_ sorts first.
    batch, size = total.shape[0], total.shape[dim]
    flat = (index + size * torch.arange(batch, device=index.device)[:, None]).flatten()
    rows = values.movedim(dim, 1).flatten(0, 1)
    added = rows.new_zeros(batch * size, *rows.shape[1:]).index_put_((flat,), rows, accumulate=True)
    total += added.unflatten(0, (batch, size)).movedim(1, dim)
    return total
