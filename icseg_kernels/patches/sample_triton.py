"""sample_patches by Triton kernels, forward and backward. Maps of any strides and dtypes are read where they lie.

What it draws equals the reference bit for bit, but for the sign of a zero. A small map takes one launch, a larger one
two before those of the draw. Backward takes one or five.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.gumbel_topk import triton as gumbel_topk_triton
from icseg_kernels.numerics import accumulation_dtype
from icseg_kernels.patches.coords import NO_PATCH
from icseg_kernels.patches.windows import Windows, blur_kernel, blur_taps, candidate_grid

_SMALL = 2**18  # loads of pixels that one program may do for a sample
_SMALL_CANDIDATES = 2048


def unsupported(weights: Tensor, candidates: int, *_: object) -> list[str]:
    """Why the kernels cannot draw from `candidates` windows of `weights`."""
    reasons = triton_launch.unsupported_device("weights", weights)
    reasons += triton_launch.unsupported_dtype("weights", weights)
    return reasons + gumbel_topk_triton.unsupported_count(candidates)


class _Sizes(NamedTuple):
    """What the kernels want to know of a map, in their order, and of its blocks."""

    height: int
    width: int
    patch: int
    stride: int
    before: int
    rows: int
    columns: int
    kept_rows: int
    kept_columns: int
    taps: int

    @property
    def candidates(self) -> int:
        return self.kept_rows * self.kept_columns

    def block(self, small: bool) -> tuple[int, int]:
        """(ROWS, COLUMNS) of a block; small: one program goes through all of a sample's."""
        from icseg_kernels.patches.sample_triton_kernels import block

        return block(max(self.columns, self.width), small)

    @property
    def loads(self) -> int:
        """Of pixels and window maxima for a sample."""
        blur = 0 if self.taps == 1 else self.kept_rows * (self.columns + self.kept_columns) * self.taps
        return self.rows * (self.width + self.columns) * self.patch + blur


def _sizes(weights: Tensor, windows: Windows) -> _Sizes:
    _, _, height, width = weights.shape
    size, stride, before, after, _, sigma = windows
    rows, columns = candidate_grid(height, width, size, 1, (before, after))
    kept = candidate_grid(height, width, size, stride, (before, after))
    return _Sizes(height, width, size, stride, before, rows, columns, *kept, blur_taps(sigma))


def sample_patches(
    weights: Tensor, k: int, windows: Windows, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(coords int32 [B, k, 2], scores [B, k], indices int64 [B, k]) of the windows drawn."""
    sizes = _sizes(weights, windows)
    draw = gumbel_topk_triton.outputs(weights, k, coords=True)
    if sizes.candidates <= _SMALL_CANDIDATES and sizes.loads <= _SMALL and k < gumbel_topk_triton.RANKED_AT_ONCE:
        _draw_small(draw, weights, windows, sizes, seed, noise)
    else:
        corners = gumbel_topk_triton.Corners(sizes.kept_columns, sizes.stride, sizes.before, NO_PATCH)
        gumbel_topk_triton.draw_into(draw, window_logits(weights, windows), seed, noise, corners)
    assert draw.coords is not None
    return draw.coords, draw.scores, draw.indices


def window_logits(weights: Tensor, windows: Windows) -> Tensor:
    """The reference's: [B, candidates], a view of the workspace. Two launches."""
    from icseg_kernels.patches import sample_triton_kernels as kernels

    sizes, batch, device = _sizes(weights, windows), weights.shape[0], weights.device
    rows, columns = sizes.block(small=False)
    pool_blocks, blocks = -(-sizes.rows // rows), -(-sizes.kept_rows // rows)
    workspace = _workspace(weights, sizes, pool_blocks)
    dtype = triton_launch.triton_dtype(workspace.dtype)
    common: dict[str, Any] = {"ROWS": rows, "COLUMNS": columns, "DTYPE": dtype, "enable_fp_fusion": False}
    triton_launch.launch(
        kernels.pool_kernel,
        (batch * pool_blocks,),
        device,
        weights,
        workspace,
        *_strides(weights),
        workspace.shape[1],
        sizes.candidates,
        sizes.height,
        sizes.width,
        sizes.patch,
        sizes.before,
        sizes.rows,
        sizes.columns,
        pool_blocks,
        **common,
    )
    triton_launch.launch(
        kernels.logits_kernel,
        (batch * blocks,),
        device,
        workspace,
        _taps(windows.blur_sigma, workspace.dtype, device),
        *_temperature(windows.temperature, workspace),
        workspace.shape[1],
        sizes.candidates,
        *sizes,
        pool_blocks,
        blocks,
        BLUR=sizes.taps > 1,
        BLOCKS=kernels.BLOCKS,
        **common,
    )
    return workspace[:, : sizes.candidates]


def _draw_small(
    draw: gumbel_topk_triton.Draw,
    weights: Tensor,
    windows: Windows,
    sizes: _Sizes,
    seed: int | Tensor | None,
    noise: Tensor | None,
) -> None:
    """All of it in one launch."""
    from icseg_kernels.gumbel_topk.triton_kernels import RANKS
    from icseg_kernels.patches import sample_triton_kernels as kernels

    rows, columns = sizes.block(small=True)
    pool_blocks, blocks = -(-sizes.rows // rows), -(-sizes.kept_rows // rows)
    workspace = _workspace(weights, sizes, pool_blocks)
    pointer, temperature = _temperature(windows.temperature, workspace)
    tile, warps = kernels.tile_of_candidates(sizes.candidates)
    kind, (noise, seed_tensor, *words), noise_strides = gumbel_topk_triton.noise_arguments(seed, noise)
    triton_launch.launch(
        kernels.sample_kernel,
        (weights.shape[0],),
        weights.device,
        weights,
        workspace,
        _taps(windows.blur_sigma, workspace.dtype, weights.device),
        pointer,
        noise,
        seed_tensor,
        draw.survivors,
        draw.indices,
        draw.scores,
        draw.coords,
        temperature,
        *words,
        draw.indices.shape[1],
        *_strides(weights),
        *noise_strides,
        workspace.shape[1],
        sizes.candidates,
        *sizes,
        pool_blocks,
        blocks,
        BLUR=sizes.taps > 1,
        ROWS=rows,
        COLUMNS=columns,
        BLOCKS=kernels.BLOCKS,
        TILE=tile,
        RANKS=RANKS,
        NOISE=kind,
        DTYPE=triton_launch.triton_dtype(workspace.dtype),
        NO_PATCH=NO_PATCH,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def sample_patches_backward(grad: Tensor, indices: Tensor, weights: Tensor, windows: Windows) -> Tensor:
    """Gradient [B, 1, H, W] of the scores [B, k] of windows int64 [B, k], each at most once, to weights; -1 is none."""
    from icseg_kernels.patches import sample_triton_kernels as kernels
    from icseg_kernels.patches.sample_backward_triton_kernels import backward_kernel

    sizes, batch, device = _sizes(weights, windows), weights.shape[0], weights.device
    dtype = accumulation_dtype(weights.dtype)
    small = sizes.loads <= _SMALL
    rows, columns = sizes.block(small)
    map_blocks, window_blocks = -(-sizes.height // rows), -(-sizes.rows // rows)
    first_maxima, pixels = sizes.rows * sizes.columns, sizes.height * sizes.width
    integer_pass = max(sizes.rows * sizes.width, sizes.height * sizes.columns)
    passes = max(integer_pass, sizes.rows * sizes.kept_columns)
    size = sizes.candidates + 2 * first_maxima + pixels + 8 * (map_blocks + window_blocks) + passes
    found = torch.empty(weights.shape, dtype=weights.dtype, device=device)
    workspace = torch.empty(batch, size, dtype=dtype, device=device)
    integers = torch.empty(batch, first_maxima + integer_pass, dtype=torch.int32, device=device)
    arguments = (
        weights,
        indices.contiguous(),
        grad.contiguous(),
        found,
        workspace,
        integers,
        _taps(windows.blur_sigma, dtype, device),
        *_temperature(windows.temperature, workspace),
        indices.shape[1],
        *_strides(weights),
        size,
        integers.shape[1],
        *sizes,
        map_blocks,
        window_blocks,
    )
    steps = [(5, 1)] if small else list(enumerate([map_blocks, window_blocks, window_blocks, map_blocks, map_blocks]))
    for step, blocks in steps:
        triton_launch.launch(
            backward_kernel,
            (batch * blocks,),
            device,
            *arguments,
            blocks,
            STEP=step,
            BLUR=sizes.taps > 1,
            ROWS=rows,
            COLUMNS=columns,
            BLOCKS=kernels.BLOCKS,
            DTYPE=triton_launch.triton_dtype(dtype),
            num_warps=kernels.SMALL_WARPS if small else 4,
            enable_fp_fusion=False,
        )
    return found


def _strides(weights: Tensor) -> tuple[int, int, int]:
    return weights.stride(0), weights.stride(2), weights.stride(3)


def _workspace(weights: Tensor, sizes: _Sizes, pool_blocks: int) -> Tensor:
    """[B, size] for the steps of the window logits, as `pool_kernel` has it."""
    passes = sizes.rows * sizes.width
    if sizes.taps > 1:
        passes = max(passes, sizes.kept_rows * sizes.columns)
    size = sizes.candidates + sizes.rows * sizes.columns + 8 * pool_blocks + passes
    size = -(-size // 16) * 16  # so that every row begins at a multiple of 16 bytes
    return torch.empty(weights.shape[0], size, dtype=accumulation_dtype(weights.dtype), device=weights.device)


def _temperature(temperature: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """As the kernels take it: read through a pointer, or a float32 value."""
    if isinstance(temperature, Tensor):
        return temperature, 1.0
    if like.dtype == torch.float64:
        return torch.full((), temperature, dtype=torch.float64, device=like.device), 1.0
    return None, float(temperature)


def _taps(sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The blur's taps on `device`; None for no blur. They are kept, but not those that belong to a CUDA graph."""
    if blur_taps(sigma) == 1:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        taps = torch.empty(blur_taps(sigma), dtype=dtype, device=device)
        for tap, value in zip(taps.unbind(), blur_kernel(sigma), strict=True):
            tap.fill_(value)  # a copy from the CPU cannot be captured
        return taps
    return _kept_taps(sigma, dtype, device)


@functools.lru_cache(maxsize=64)
def _kept_taps(sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(blur_kernel(sigma), dtype=dtype, device=device)
