"""gumbel_topk as Triton kernels: a row is one tile in registers, or chunks that are filtered and then merged.

The k + 1 best of a tile are found without a sort. Scores become unsigned integers of the same order; an interval of
these that holds the (k + 1)-th is divided by four, by counts, until what lies above its lower end is just k + 1
elements, or equal scores, of which the first are taken. These survivors go to memory in the order of their index and
are ranked by counting who comes before each.

Bits equal the reference's if nothing is contracted: launch with `enable_fp_fusion=False`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation
from icseg_kernels.philox_triton_kernels import noise_of_groups

RANKS = 64  # survivors ranked at a time
CHUNK = 4096  # elements of a chunk of a long row
LARGEST_TILE = 8192  # of a row in one piece
MERGED_AT_ONCE = 1024  # candidates
BACKWARD_BLOCK = 1024


@triton.jit
def without_nan(x):  # type: ignore[no-untyped-def]
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def perturbed(  # type: ignore[no-untyped-def]
    logits,
    noise_pointer,
    seed_pointer,
    seed_low,
    seed_high,
    row,
    start,
    count,
    noise_row_stride,
    noise_stride,
    TILE: tl.constexpr,
    NOISE: tl.constexpr,
):
    """logits [TILE], of the elements of `row` from `start` on, plus noise; NaN becomes -inf.

    NOISE: "none", "given" (noise_pointer), "pointer" (to the seed) or "words" (of the seed, in two int32).
    """
    if NOISE == "given":
        element = start + tl.arange(0, TILE)
        place = row.to(tl.int64) * noise_row_stride + element.to(tl.int64) * noise_stride
        noise = tl.load(noise_pointer + place, mask=element < count, other=0.0).to(logits.dtype)
        scores = without_nan(logits + noise)
    elif NOISE == "none":
        scores = logits
    else:
        if NOISE == "pointer":
            seed = tl.load(seed_pointer)
        else:
            seed = (tl.cast(seed_high, tl.int64) << 32) | (tl.cast(seed_low, tl.int64) & 0xFFFFFFFF)
        groups = (start >> 2) + tl.arange(0, TILE // 4)
        noise = noise_of_groups(seed, row, 0, 0, groups).reshape([TILE])
        scores = logits + noise.to(logits.dtype)
    return scores


@triton.jit
def _ordered(scores):  # type: ignore[no-untyped-def]
    """Unsigned integers in the order of the scores; those of -0 and 0 are equal."""
    scores = tl.where(scores == 0, 0.0, scores)
    if scores.dtype == tl.float64:
        bits = scores.to(tl.int64, bitcast=True)
        keys = (bits ^ ((bits >> 63) | -0x8000000000000000)).to(tl.uint64, bitcast=True)
    else:
        bits = scores.to(tl.int32, bitcast=True)
        keys = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
    return keys


@triton.jit
def _interval(DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first key above that of -inf, and the first above that of inf."""
    if DTYPE == tl.float64:  # noqa: SIM300
        low = tl.full((), 0x0010000000000000, tl.uint64)
        high = tl.full((), 0xFFF0000000000001, tl.uint64)
    else:
        low = tl.full((), 0x00800000, tl.uint32)
        high = tl.full((), 0xFF800001, tl.uint32)
    return low, high


@triton.jit
def _narrowed(low, high, from_low, from_high, wanted, a, b, c, from_a, from_b, from_c):  # type: ignore[no-untyped-def]
    """The part of [low, high) cut at a < b < c that holds the wanted-th largest key, given how many lie from each on.

    from_low >= wanted > from_high, here and in the result.
    """
    new_low = tl.where(from_c >= wanted, c, tl.where(from_b >= wanted, b, tl.where(from_a >= wanted, a, low)))
    new_from_low = tl.where(
        from_c >= wanted, from_c, tl.where(from_b >= wanted, from_b, tl.where(from_a >= wanted, from_a, from_low))
    )
    new_high = tl.where(from_a < wanted, a, tl.where(from_b < wanted, b, tl.where(from_c < wanted, c, high)))
    new_from_high = tl.where(
        from_a < wanted, from_a, tl.where(from_b < wanted, from_b, tl.where(from_c < wanted, from_c, from_high))
    )
    return new_low, new_high, new_from_low, new_from_high


@triton.jit
def _places(keys, low, high, above_before, equal_before, needed):  # type: ignore[no-untyped-def]
    """Which keys are among the best, and their places in the order of their index.

    All from `high` on are, and of those in [low, high) the first `needed`; above_before and equal_before of the two
    kinds came before this tile. Also how many of them come with it.
    """
    above, equal = keys >= high, (keys >= low) & (keys < high)
    counts = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    so_far = tl.cumsum(counts, 0)
    total = tl.sum(counts)
    above_so_far, equal_so_far = above_before + (so_far & 0xFFFF), equal_before + (so_far >> 16)
    chosen = above | (equal & (equal_so_far <= needed))
    place = above_so_far + tl.minimum(equal_so_far, needed) - 1
    return chosen, place, above_before + (total & 0xFFFF), equal_before + (total >> 16)


@triton.jit
def _best_of_tile(scores, wanted):  # type: ignore[no-untyped-def]
    """Which of `scores` are the `wanted` best, or all above -inf if these are fewer; their places; how many."""
    keys = _ordered(scores)
    low, high = _interval(scores.dtype)
    from_low = tl.sum((keys >= low).to(tl.int32))
    from_high = from_low * 0
    wanted = tl.minimum(from_low, wanted)
    while (high - low > 1) & (from_low != wanted):
        step = tl.maximum((high - low) >> 2, 1)
        a = low + step
        b = a + step
        c = b + step
        packed = (keys >= a).to(tl.int64) + ((keys >= b).to(tl.int64) << 21) + ((keys >= c).to(tl.int64) << 42)
        total = tl.sum(packed)
        from_a, from_b = (total & 0x1FFFFF).to(tl.int32), ((total >> 21) & 0x1FFFFF).to(tl.int32)
        from_c = (total >> 42).to(tl.int32)
        low, high, from_low, from_high = _narrowed(
            low, high, from_low, from_high, wanted, a, b, c, from_a, from_b, from_c
        )
    chosen, place, _, _ = _places(keys, low, high, 0, 0, wanted - from_high)
    return chosen, place, wanted


@triton.jit
def _as_bits(index, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 indices as floats of the same bits, to lie beside scores."""
    if DTYPE == tl.float64:  # noqa: SIM300
        bits = index.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        bits = index.to(tl.float32, bitcast=True)
    return bits


@triton.jit
def _from_bits(bits):  # type: ignore[no-untyped-def]
    if bits.dtype == tl.float64:
        index = bits.to(tl.int64, bitcast=True).to(tl.int32)
    else:
        index = bits.to(tl.int32, bitcast=True)
    return index


@triton.jit
def _fill(pointer, found, size, DTYPE: tl.constexpr, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores and indices [2, size] from `found` on: -inf and -1."""
    for start in range(found, size, RANKS):
        place = start + tl.arange(0, RANKS)
        nothing = tl.full([RANKS], float("-inf"), DTYPE)
        tl.store(pointer + place, nothing, mask=place < size)
        tl.store(pointer + size + place, _as_bits(tl.full([RANKS], -1, tl.int32), DTYPE), mask=place < size)


@triton.jit
def _write_ranked(  # type: ignore[no-untyped-def]
    survivors_pointer,
    indices_pointer,
    scores_pointer,
    kappa_pointer,
    kappa_index_pointer,
    coords_pointer,
    row,
    first,
    k,
    columns,
    stride,
    before,
    RANKS: tl.constexpr,
    SORTED: tl.constexpr,
    NO_PATCH: tl.constexpr,
):
    """Write RANKS of a row's survivors [2, k + 1], from `first` on, where they come in the order drawn."""
    row = row.to(tl.int64)
    mine = first + tl.arange(0, RANKS)
    scores = tl.load(survivors_pointer + mine, mask=mine <= k, other=float("-inf"))
    index = _from_bits(tl.load(survivors_pointer + k + 1 + mine, mask=mine <= k, other=0.0))
    if SORTED:
        place = mine
    else:
        ahead = tl.zeros([RANKS, RANKS], tl.int32)
        for start in range(0, k + 1, RANKS):
            theirs = start + tl.arange(0, RANKS)
            others = tl.load(survivors_pointer + theirs, mask=theirs <= k, other=float("-inf"))
            tied = (others[None, :] == scores[:, None]) & (theirs[None, :] < mine[:, None])
            ahead += ((others[None, :] > scores[:, None]) | tied).to(tl.int32)
        place = tl.sum(ahead, 1)
    drawn = (mine <= k) & (place < k)
    tl.store(indices_pointer + row * k + place, index.to(tl.int64), mask=drawn)
    tl.store(scores_pointer + row * k + place, scores, mask=drawn)
    if kappa_pointer is not None:
        last = (mine <= k) & (place == k)
        tl.store(kappa_pointer + row + place * 0, scores, mask=last)
        tl.store(kappa_index_pointer + row + place * 0, index.to(tl.int64), mask=last)
    if coords_pointer is not None:
        y, x = index // columns * stride - before, index % columns * stride - before
        corner = coords_pointer + (row * k + place) * 2
        tl.store(corner, tl.where(index < 0, NO_PATCH, y), mask=drawn)
        tl.store(corner + 1, tl.where(index < 0, NO_PATCH, x), mask=drawn)


@triton.jit
def _exponentials(logits):  # type: ignore[no-untyped-def]
    """(their maximum, the sum of exp(logits - maximum)); the sum is 0 where the maximum is not finite."""
    top = tl.max(logits)
    finite = (top > float("-inf")) & (top < float("inf"))
    return top, tl.sum(tl.where(finite, tl.exp(tl.where(finite, logits - top, 0.0)), 0.0))


@triton.jit
def _log_of_sum(top, total):  # type: ignore[no-untyped-def]
    finite = (top > float("-inf")) & (top < float("inf"))
    return tl.where(finite, top + tl.log(tl.where(finite, total, 1.0)), top)


@triton.jit
def draw_tile(  # type: ignore[no-untyped-def]
    logits,
    scores,
    survivors_pointer,
    indices_pointer,
    scores_pointer,
    logsumexp_pointer,
    kappa_pointer,
    kappa_index_pointer,
    coords_pointer,
    row,
    k,
    columns,
    stride,
    before,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    RANKED: tl.constexpr,
    NO_PATCH: tl.constexpr,
):
    """All outputs of one row, whose logits and scores are [TILE]; without RANKED only logsumexp and survivors."""
    if logsumexp_pointer is not None:
        top, total = _exponentials(logits)
        tl.store(logsumexp_pointer + row, _log_of_sum(top, total))
    chosen, place, found = _best_of_tile(scores, k + 1)
    survivors = survivors_pointer + row.to(tl.int64) * 2 * (k + 1)
    tl.store(survivors + place, scores, mask=chosen)
    tl.store(survivors + k + 1 + place, _as_bits(tl.arange(0, TILE), scores.dtype), mask=chosen)
    _fill(survivors, found, k + 1, scores.dtype, RANKS)
    if RANKED:
        tl.debug_barrier()  # what other threads stored is read
        for first in range(0, k + 1, RANKS):
            _write_ranked(
                survivors,
                indices_pointer,
                scores_pointer,
                kappa_pointer,
                kappa_index_pointer,
                coords_pointer,
                row,
                first,
                k,
                columns,
                stride,
                before,
                RANKS,
                False,
                NO_PATCH,
            )


@triton.jit(do_not_specialize=["seed_low", "seed_high", "k", "columns", "stride", "before"])
def draw_kernel(  # type: ignore[no-untyped-def]
    logits_pointer,
    noise_pointer,
    seed_pointer,
    seed_low,
    seed_high,
    survivors_pointer,
    indices_pointer,
    scores_pointer,
    logsumexp_pointer,
    kappa_pointer,
    kappa_index_pointer,
    coords_pointer,
    count,
    k,
    row_stride,
    element_stride,
    noise_row_stride,
    noise_stride,
    columns,
    stride,
    before,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    NOISE: tl.constexpr,
    RANKED: tl.constexpr,
    DTYPE: tl.constexpr,
    NO_PATCH: tl.constexpr,
):
    """The whole draw on a grid of rows of at most TILE elements."""
    row = tl.program_id(0)
    element = tl.arange(0, TILE)
    place = row.to(tl.int64) * row_stride + element.to(tl.int64) * element_stride
    logits = tl.load(logits_pointer + place, mask=element < count, other=float("-inf"))
    logits = without_nan(logits.to(DTYPE))
    scores = perturbed(
        logits,
        noise_pointer,
        seed_pointer,
        seed_low,
        seed_high,
        row,
        0,
        count,
        noise_row_stride,
        noise_stride,
        TILE,
        NOISE,
    )
    draw_tile(
        logits,
        scores,
        survivors_pointer,
        indices_pointer,
        scores_pointer,
        logsumexp_pointer,
        kappa_pointer,
        kappa_index_pointer,
        coords_pointer,
        row,
        k,
        columns,
        stride,
        before,
        TILE,
        RANKS,
        RANKED,
        NO_PATCH,
    )


@triton.jit(do_not_specialize=["seed_low", "seed_high", "kept", "chunks"])
def filter_kernel(  # type: ignore[no-untyped-def]
    logits_pointer,
    noise_pointer,
    seed_pointer,
    seed_low,
    seed_high,
    candidates_pointer,
    sums_pointer,
    count,
    kept,
    chunks,
    row_stride,
    element_stride,
    noise_row_stride,
    noise_stride,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The `kept` best of each chunk of TILE elements, on a grid of rows times chunks.

    candidates: [B, 2, chunks, kept] scores and bits of indices. sums: [B, 2, chunks] maxima and sums of exponentials.
    """
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    element = chunk * TILE + tl.arange(0, TILE)
    place = row.to(tl.int64) * row_stride + element.to(tl.int64) * element_stride
    logits = tl.load(logits_pointer + place, mask=element < count, other=float("-inf"))
    logits = without_nan(logits.to(DTYPE))
    if sums_pointer is not None:
        top, total = _exponentials(logits)
        sums = sums_pointer + row.to(tl.int64) * 2 * chunks + chunk
        tl.store(sums, top)
        tl.store(sums + chunks, total)
    scores = perturbed(
        logits,
        noise_pointer,
        seed_pointer,
        seed_low,
        seed_high,
        row,
        chunk * TILE,
        count,
        noise_row_stride,
        noise_stride,
        TILE,
        NOISE,
    )
    chosen, place, found = _best_of_tile(scores, kept)
    plane = kept.to(tl.int64) * chunks
    candidates = candidates_pointer + row.to(tl.int64) * 2 * plane + chunk.to(tl.int64) * kept
    tl.store(candidates + place, scores, mask=chosen)
    tl.store(candidates + plane + place, _as_bits(element, DTYPE), mask=chosen)
    for start in range(found, kept, RANKS):
        empty = start + tl.arange(0, RANKS)
        tl.store(candidates + empty, tl.full([RANKS], float("-inf"), DTYPE), mask=empty < kept)


@triton.jit
def _count_from(candidates, total, key, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of a row's `total` candidates have a key of at least `key`."""
    found = tl.zeros([TILE], tl.int32)
    for start in range(0, total, TILE):
        place = start + tl.arange(0, TILE)
        found += (_ordered(tl.load(candidates + place, mask=place < total, other=float("-inf"))) >= key).to(tl.int32)
    return tl.sum(found)


@triton.jit(do_not_specialize=["total", "chunks", "k", "columns", "stride", "before"])
def merge_kernel(  # type: ignore[no-untyped-def]
    candidates_pointer,
    sums_pointer,
    survivors_pointer,
    indices_pointer,
    scores_pointer,
    logsumexp_pointer,
    kappa_pointer,
    kappa_index_pointer,
    coords_pointer,
    total,
    chunks,
    k,
    columns,
    stride,
    before,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    IN_TILE: tl.constexpr,
    RANKED: tl.constexpr,
    DTYPE: tl.constexpr,
    NO_PATCH: tl.constexpr,
):
    """As `draw_kernel`, from the filter's candidates [B, 2, total], which are in the order of their index.

    IN_TILE: there are at most TILE of them.
    """
    row = tl.program_id(0)
    if logsumexp_pointer is not None:
        sums = sums_pointer + row.to(tl.int64) * 2 * chunks
        tops = tl.full([RANKS], float("-inf"), DTYPE)
        for start in range(0, chunks, RANKS):
            chunk = start + tl.arange(0, RANKS)
            tops = tl.maximum(tops, tl.load(sums + chunk, mask=chunk < chunks, other=float("-inf")))
        top = tl.max(tops)
        finite = (top > float("-inf")) & (top < float("inf"))
        parts = tl.zeros([RANKS], DTYPE)
        for start in range(0, chunks, RANKS):
            chunk = start + tl.arange(0, RANKS)
            tops = tl.load(sums + chunk, mask=chunk < chunks, other=float("-inf"))
            scale = tl.exp(tl.where(finite, tops - top, 0.0))
            parts += tl.load(sums + chunks + chunk, mask=chunk < chunks, other=0.0) * scale
        tl.store(logsumexp_pointer + row, _log_of_sum(top, tl.sum(parts)))
    candidates = candidates_pointer + row.to(tl.int64) * 2 * total
    survivors = survivors_pointer + row.to(tl.int64) * 2 * (k + 1)
    if IN_TILE:
        element = tl.arange(0, TILE)
        scores = tl.load(candidates + element, mask=element < total, other=float("-inf"))
        chosen, place, wanted = _best_of_tile(scores, k + 1)
        tl.store(survivors + place, scores, mask=chosen)
        tl.store(survivors + k + 1 + place, tl.load(candidates + total + element, mask=chosen), mask=chosen)
    else:
        low, high = _interval(DTYPE)
        from_low = _count_from(candidates, total, low, TILE)
        from_high = from_low * 0
        wanted = tl.minimum(from_low, k + 1)
        while (high - low > 1) & (from_low != wanted):
            step = tl.maximum((high - low) >> 2, 1)
            a = low + step
            b = a + step
            c = b + step
            from_a, from_b, from_c = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
            for start in range(0, total, TILE):
                place = start + tl.arange(0, TILE)
                keys = _ordered(tl.load(candidates + place, mask=place < total, other=float("-inf")))
                from_a += (keys >= a).to(tl.int32)
                from_b += (keys >= b).to(tl.int32)
                from_c += (keys >= c).to(tl.int32)
            low, high, from_low, from_high = _narrowed(
                low, high, from_low, from_high, wanted, a, b, c, tl.sum(from_a), tl.sum(from_b), tl.sum(from_c)
            )
        needed = wanted - from_high
        above_before, equal_before = from_high * 0, from_high * 0
        for start in range(0, total, TILE):
            element = start + tl.arange(0, TILE)
            scores = tl.load(candidates + element, mask=element < total, other=float("-inf"))
            chosen, place, above_before, equal_before = _places(
                _ordered(scores), low, high, above_before, equal_before, needed
            )
            tl.store(survivors + place, scores, mask=chosen)
            tl.store(survivors + k + 1 + place, tl.load(candidates + total + element, mask=chosen), mask=chosen)
    _fill(survivors, wanted, k + 1, DTYPE, RANKS)
    if RANKED:
        tl.debug_barrier()  # what other threads stored is read
        for first in range(0, k + 1, RANKS):
            _write_ranked(
                survivors,
                indices_pointer,
                scores_pointer,
                kappa_pointer,
                kappa_index_pointer,
                coords_pointer,
                row,
                first,
                k,
                columns,
                stride,
                before,
                RANKS,
                False,
                NO_PATCH,
            )


@triton.jit(do_not_specialize=["k", "blocks", "columns", "stride", "before"])
def rank_kernel(  # type: ignore[no-untyped-def]
    survivors_pointer,
    indices_pointer,
    scores_pointer,
    kappa_pointer,
    kappa_index_pointer,
    coords_pointer,
    k,
    blocks,
    columns,
    stride,
    before,
    RANKS: tl.constexpr,
    SORTED: tl.constexpr,
    NO_PATCH: tl.constexpr,
):
    """The outputs from survivors [B, 2, k + 1], on a grid of rows times blocks of RANKS survivors."""
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    _write_ranked(
        survivors_pointer + row.to(tl.int64) * 2 * (k + 1),
        indices_pointer,
        scores_pointer,
        kappa_pointer,
        kappa_index_pointer,
        coords_pointer,
        row,
        block * RANKS,
        k,
        columns,
        stride,
        before,
        RANKS,
        SORTED,
        NO_PATCH,
    )


@triton.jit
def _gradient_of_logsumexp(logits, logsumexp, grad):  # type: ignore[no-untyped-def]
    probability = tl.exp(logits - logsumexp)
    return grad * tl.where(probability == probability, probability, 0.0)


@triton.jit(do_not_specialize=["blocks", "k"])
def backward_kernel(  # type: ignore[no-untyped-def]
    logits_pointer,
    indices_pointer,
    kappa_index_pointer,
    logsumexp_pointer,
    grad_scores_pointer,
    grad_logsumexp_pointer,
    grad_kappa_pointer,
    grad_pointer,
    count,
    k,
    blocks,
    row_stride,
    element_stride,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    OF_NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradient [B, N] on a grid of rows times blocks of BLOCK elements; a row's indices differ from each other.

    A block is written as if nothing of it had been drawn, then again where something was.
    """
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    first = block * BLOCK
    element = first + tl.arange(0, BLOCK)
    logits, grad = logits_pointer + row * row_stride, grad_pointer + row * count
    if OF_NOISE:
        values = tl.zeros([BLOCK], DTYPE)
    else:
        logsumexp, grad_logsumexp = tl.load(logsumexp_pointer + row), tl.load(grad_logsumexp_pointer + row)
        own = tl.load(logits + element.to(tl.int64) * element_stride, mask=element < count, other=0.0)
        values = _gradient_of_logsumexp(own.to(DTYPE), logsumexp, grad_logsumexp)
    tl.store(grad + element, values, mask=element < count)
    tl.debug_barrier()  # what other threads stored is stored again
    for start in range(0, k + 1, RANKS):
        draw = start + tl.arange(0, RANKS)
        index = tl.load(indices_pointer + row * k + draw, mask=draw < k, other=-1)
        drawn = tl.load(grad_scores_pointer + row * k + draw, mask=draw < k, other=0.0)
        index = tl.where(draw == k, tl.load(kappa_index_pointer + row), index)
        drawn = tl.where(draw == k, tl.load(grad_kappa_pointer + row), drawn)
        here = (index >= first) & (index < tl.minimum(first + BLOCK, count)) & (draw <= k)
        if not OF_NOISE:
            again = tl.load(logits + index * element_stride, mask=here, other=0.0)
            drawn += _gradient_of_logsumexp(again.to(DTYPE), logsumexp, grad_logsumexp)
        tl.store(grad + index, drawn, mask=here)


def tile_of(count: int) -> tuple[int, int]:
    """(TILE, num_warps) of a row of `count` elements; of one of its chunks, where the row is too long for one tile."""
    tile = CHUNK if count > LARGEST_TILE else max(256, triton.next_power_of_2(count))
    return tile, min(32, max(4, tile // 512))


def tile_of_merge(total: int) -> tuple[int, int]:
    """(TILE, num_warps) of `total` candidates, in several tiles where one would spill registers."""
    if total > MERGED_AT_ONCE:
        return 2 * MERGED_AT_ONCE, 8
    return max(256, triton.next_power_of_2(total)), 4


_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def _compilations() -> list[Compilation]:
    outputs = {
        "survivors_pointer": "*fp32",
        "indices_pointer": "*i64",
        "scores_pointer": "*fp32",
        "logsumexp_pointer": "*fp32",
        "kappa_pointer": "*fp32",
        "kappa_index_pointer": "*i64",
    }
    of_patches: dict[str, Any] = {"coords_pointer": None, "NO_PATCH": 0}
    integers = dict.fromkeys(("count", "k", "row_stride", "noise_row_stride", "columns", "stride", "before"), "i32")
    sources: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "none": ({}, {"noise_pointer": None, "seed_pointer": None, "noise_stride": 1}),
        "given": ({"noise_pointer": "*fp32"}, {"seed_pointer": None, "noise_stride": 1}),
        "pointer": ({"seed_pointer": "*i64"}, {"noise_pointer": None, "noise_stride": 1}),
        "words": ({}, {"noise_pointer": None, "seed_pointer": None, "noise_stride": 1}),
    }
    found = []

    def draw(dtype: str, count: int, noise: str, ranked: bool = True) -> None:
        tile, warps = tile_of(count)
        types, absent = sources[noise]
        common = {"seed_low": "i32", "seed_high": "i32", "logits_pointer": _TYPES[dtype], **types}
        constants = {"TILE": tile, "RANKS": RANKS, "NOISE": noise, "DTYPE": tl.float32, "element_stride": 1} | absent
        name = f"{dtype}, {count}, noise {noise}"
        if count <= LARGEST_TILE:
            kernel, signature = draw_kernel, common | outputs | integers
            constants |= {"RANKED": ranked} | of_patches
            name = f"draw, {name}" + ("" if ranked else ", unranked")
        else:
            kernel, name = filter_kernel, f"filter, {name}"
            signature = common | {
                "candidates_pointer": "*fp32",
                "sums_pointer": "*fp32",
                "kept": "i32",
                "chunks": "i32",
            }
            signature |= {name: integers[name] for name in ("count", "row_stride", "noise_row_stride")}
        found.append(
            Compilation(
                f"gumbel_topk: {name}",
                kernel,
                signature,
                constants,
                aligned=("count", "row_stride", "noise_row_stride"),
                num_warps=warps,
                enable_fp_fusion=False,
            )
        )

    for count in (256, 512, 1024, 2048, 4096, 8192):
        draw("float32", count, "pointer")
    for noise in sources:
        draw("float32", 4096, noise) if noise != "pointer" else None
    for dtype in ("float16", "bfloat16"):
        draw(dtype, 4096, "pointer")
    draw("float32", 4096, "pointer", ranked=False)
    for noise in sources:
        draw("float32", 2 * LARGEST_TILE, noise)
    merged = {name: integers[name] for name in ("k", "columns", "stride", "before")}
    for total, ranked in (
        (512, True),
        (MERGED_AT_ONCE, True),
        (MERGED_AT_ONCE, False),
        (2 * LARGEST_TILE, True),
        (2 * LARGEST_TILE, False),
    ):
        tile, warps = tile_of_merge(total)
        in_tile = total <= MERGED_AT_ONCE
        found.append(
            Compilation(
                f"gumbel_topk: merge, {total}" + ("" if ranked else ", unranked"),
                merge_kernel,
                {"candidates_pointer": "*fp32", "sums_pointer": "*fp32", "total": "i32", "chunks": "i32"}
                | outputs
                | merged,
                {"TILE": tile, "RANKS": RANKS, "IN_TILE": in_tile, "RANKED": ranked, "DTYPE": tl.float32} | of_patches,
                num_warps=warps,
                enable_fp_fusion=False,
            )
        )
    found.append(
        Compilation(
            "gumbel_topk: rank",
            rank_kernel,
            {name: kind for name, kind in outputs.items() if name != "logsumexp_pointer"} | merged | {"blocks": "i32"},
            {"RANKS": RANKS, "SORTED": False} | of_patches,
            num_warps=8,
            enable_fp_fusion=False,
        )
    )
    for dtype, kind in _TYPES.items():
        for of_noise in (False, True):
            pointers = ("logsumexp", "grad_scores", "grad_logsumexp", "grad_kappa", "grad")
            found.append(
                Compilation(
                    f"gumbel_topk: backward, {dtype}" + (" of noise" if of_noise else ""),
                    backward_kernel,
                    {"logits_pointer": kind, "indices_pointer": "*i64", "kappa_index_pointer": "*i64"}
                    | {f"{name}_pointer": "*fp32" for name in pointers}
                    | dict.fromkeys(("count", "k", "blocks", "row_stride"), "i32"),
                    {
                        "element_stride": 1,
                        "BLOCK": BACKWARD_BLOCK,
                        "RANKS": RANKS,
                        "OF_NOISE": of_noise,
                        "DTYPE": tl.float32,
                    },
                    aligned=("count", "row_stride"),
                    enable_fp_fusion=False,
                )
            )
    return found


COMPILATIONS = _compilations()
