"""Arithmetic that several ops share: the dtype of their sums, the order of their sums, and missing values."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32 for floating dtypes of less than 4 bytes, else `dtype` itself."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def nan_as_minus_infinity(x: Tensor) -> Tensor:
    """`x` in `accumulation_dtype`, with NaN replaced by -inf."""
    x = x.to(accumulation_dtype(x.dtype))
    return x.masked_fill(x.isnan(), -torch.inf)


def deterministic_add(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """total[..., index[..., j]] += values[..., j], in place, in an order that does not depend on the run.

    total:  [..., N], contiguous.
    index:  int64 [..., M], broadcastable to `values`; from 0 to N - 1, repeats allowed.
    values: [..., M], with the dtype and the leading dimensions of `total`.

    Returns `total`.
    """
    if total.numel() == 0 or values.numel() == 0:
        return total
    index = index.expand_as(values)
    if not total.is_cuda:
        return total.scatter_add_(-1, index, values)
    # scatter_add_ adds in any order there; index_put_ sorts first.
    rows = total.view(-1, total.shape[-1])
    row = torch.arange(rows.shape[0], device=total.device)[:, None]
    rows.index_put_((row, index.reshape(rows.shape[0], -1)), values.reshape(rows.shape[0], -1), accumulate=True)
    return total
