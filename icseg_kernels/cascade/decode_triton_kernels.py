"""Kernels of label propagation and of the decoder of patches: a program has one patch, with all its cells and classes.

What a later step reads at other pixels goes by way of global memory, in a slot that belongs to one program, so that it
stays in the caches: what a thread has stored there, all threads of its program see after a barrier. Loads from it must
stay behind that barrier: launch with num_stages=1, for which nothing is loaded in advance but what a loop asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import gelu
from icseg_kernels.cascade.decode import Sizes, decode_constants, support_constants, terms_of
from icseg_kernels.compilation import Compilation


@triton.jit
def _cells(features, part, there, FEATURES: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """[16, P]: `part` [P] of the 4 Cf values of each cell of a patch [Cf, 8, 8]."""
    cell = tl.arange(0, 16)
    corner = cell // 4 * 16 + cell % 4 * 2
    offset = part // 4 * 64 + part % 4 // 2 * 8 + part % 2
    return tl.load(features + corner[:, None] + offset[None, :], mask=there[None, :], other=0.0).to(OPERAND)


@triton.jit
def _linear(  # type: ignore[no-untyped-def]
    total, features, token, cell_weight, cell_bias, token_weight, output, wanted,
    FEATURES: tl.constexpr, D: tl.constexpr, BLOCK_INNER: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [16, U] and the outputs `output` [U] of two layers: one of each cell, and one without bias of the token."""
    total += tl.load(cell_bias + output, mask=wanted, other=0.0).to(ACC)[None, :]
    for first in tl.range(0, 4 * FEATURES, BLOCK_INNER, num_stages=3):
        part = first + tl.arange(0, BLOCK_INNER)
        there = part < 4 * FEATURES
        x = _cells(features, part, there, FEATURES, OPERAND)
        at = cell_weight + output[None, :] * (4 * FEATURES) + part[:, None]
        w = tl.load(at, mask=there[:, None] & wanted[None, :], other=0.0).to(OPERAND)
        total = tl.dot(x, w, total, out_dtype=ACC, input_precision=PRECISION)
    for first in tl.range(0, D, BLOCK_INNER, num_stages=3):
        channel = first + tl.arange(0, BLOCK_INNER)
        there = channel < D
        x = tl.load(token + channel, mask=there, other=0.0).to(OPERAND)
        x = tl.broadcast_to(x[None, :], (16, BLOCK_INNER))
        at = token_weight + output[None, :] * D + channel[:, None]
        w = tl.load(at, mask=there[:, None] & wanted[None, :], other=0.0).to(OPERAND)
        total = tl.dot(x, w, total, out_dtype=ACC, input_precision=PRECISION)
    return total


@triton.jit
def _matched(  # type: ignore[no-untyped-def]
    features, token, cell_weight, cell_bias, token_weight, out_weight, out_bias,
    FEATURES: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KEY: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_INNER: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[16, heads, keys]: the L2-normalised key of each cell of a patch; zeros from HEADS and from KEY on."""
    column = tl.arange(0, BLOCK_HEADS * BLOCK_KEY)
    head, key = column // BLOCK_KEY, column % BLOCK_KEY
    wanted = (head < HEADS) & (key < KEY)
    output = head * KEY + key
    found = tl.zeros((16, BLOCK_HEADS * BLOCK_KEY), ACC)
    found += tl.load(out_bias + output, mask=wanted, other=0.0).to(ACC)[None, :]
    for first in range(0, HIDDEN, BLOCK_HIDDEN):
        unit = first + tl.arange(0, BLOCK_HIDDEN)
        exists = unit < HIDDEN
        hidden = tl.zeros((16, BLOCK_HIDDEN), ACC)
        hidden = _linear(
            hidden, features, token, cell_weight, cell_bias, token_weight, unit, exists,
            FEATURES, D, BLOCK_INNER, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        hidden = tl.where(exists[None, :], gelu(hidden), 0.0).to(OPERAND)
        at = out_weight + output[None, :] * HIDDEN + unit[:, None]
        w = tl.load(at, mask=exists[:, None] & wanted[None, :], other=0.0).to(OPERAND)
        found = tl.dot(hidden, w, found, out_dtype=ACC, input_precision=PRECISION)
    found = tl.reshape(tl.where(wanted[None, :], found, 0.0), (16, BLOCK_HEADS, BLOCK_KEY))
    norm = tl.sqrt(tl.sum(found * found, 2))
    norm = tl.where(norm < 1e-12, 1e-12, norm)  # NaN stays
    return found / norm[:, :, None]


@triton.jit
def _halfway(fourths, last):  # type: ignore[no-untyped-def]
    """low, high, and fourths of high: the neighbours of positions in fourths of a pixel, clamped to 0 and `last`."""
    fourths = tl.minimum(tl.maximum(fourths, 0), 4 * last)
    low = fourths // 4
    return low, tl.minimum(low + 1, last), fourths % 4


@triton.jit
def _prior(coarser, top, left, height, width, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """[64]: a map [height, width] at twice its resolution, in the pixels of a patch at 2 (top, left), int64.

    0 where the patch with its halo, 8 x 8 pixels of the map, lies wholly outside.
    """
    pixel = tl.arange(0, 64)
    inside = (top > -6) & (top - 2 < height) & (left > -6) & (left - 2 < width)
    inside = inside & (pixel >= 0)
    upper, lower, down = _halfway(4 * top + 2 * (pixel // 8) - 1, height - 1)
    before, after, right = _halfway(4 * left + 2 * (pixel % 8) - 1, width - 1)
    down, right = down.to(ACC) * 0.25, right.to(ACC) * 0.25
    total = tl.zeros((64,), ACC)
    for row in tl.static_range(2):
        rows, of_row = upper * width, 1.0 - down
        if row == 1:
            rows, of_row = lower * width, down
        total += of_row * (1.0 - right) * tl.load(coarser + rows + before, mask=inside, other=0.0).to(ACC)
        total += of_row * right * tl.load(coarser + rows + after, mask=inside, other=0.0).to(ACC)
    return total


@triton.jit
def _cell_of(y, x):  # type: ignore[no-untyped-def]
    """The cell of a pixel of a patch, and the pixel's number in it."""
    return y // 2 * 4 + x // 2, y % 2 * 2 + x % 2


@triton.jit
def _activated(x, bias, channel, CHANNELS: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Leaky ReLU of x + bias; zeros, not what infinities times zeros are, where there is no channel."""
    x += tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(x.dtype)[None, :]
    x = tl.where(x > 0, x, x * NEGATIVE_SLOPE)
    return tl.where((channel < CHANNELS)[None, :], x, 0.0)


@triton.jit
def _convolution(  # type: ignore[no-untyped-def]
    source, weight, CI: tl.constexpr, PERIOD: tl.constexpr, CO: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """3 x 3, borders replicated, of a map [64, PERIOD] that is zero from channel CI on -> [64, WIDTH]."""
    pixel = tl.arange(0, 64)
    n = tl.arange(0, WIDTH)
    total = tl.zeros((64, WIDTH), ACC)
    for term in range(0, 9 * PERIOD, BLOCK):
        tap = term // PERIOD
        channel = term % PERIOD + tl.arange(0, BLOCK)
        y = tl.minimum(tl.maximum(pixel // 8 + (tap // 3 - 1), 0), 7)
        x = tl.minimum(tl.maximum(pixel % 8 + (tap % 3 - 1), 0), 7)
        pixels = tl.load(source + ((y * 8 + x) * PERIOD)[:, None] + channel[None, :]).to(OPERAND)
        of_term = tap * CI + channel if CHANNELS_LAST else channel * 9 + tap
        weights = tl.load(
            weight + of_term[:, None] + (n * (CI * 9))[None, :],
            mask=(channel < CI)[:, None] & (n < CO)[None, :],
            other=0.0,
        ).to(OPERAND)
        total = tl.dot(pixels, weights, total, out_dtype=ACC, input_precision=PRECISION)
    return total


@triton.jit
def _convolution_of_cells(  # type: ignore[no-untyped-def]
    source, weight, CI: tl.constexpr, STRIDE: tl.constexpr, PERIOD: tl.constexpr, CO: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """3 x 3, borders replicated, of channels [16, PERIOD] that are STRIDE apart and hold 4 pixels a row -> [64, WIDTH].

    For few channels: the terms of all taps in one row.
    """
    TERMS: tl.constexpr = 9 * CI
    pixel = tl.arange(0, 64)
    n = tl.arange(0, WIDTH)
    total = tl.zeros((64, WIDTH), ACC)
    for first in range(0, TERMS, BLOCK):
        term = first + tl.arange(0, BLOCK)
        channel = term % CI if CHANNELS_LAST else term // 9
        tap = term // CI if CHANNELS_LAST else term % 9
        y = tl.minimum(tl.maximum((pixel // 8 - 1)[:, None] + (tap // 3)[None, :], 0), 7)
        x = tl.minimum(tl.maximum((pixel % 8 - 1)[:, None] + (tap % 3)[None, :], 0), 7)
        cell, part = _cell_of(y, x)
        there = term < TERMS
        at = source + cell * PERIOD + part + (channel * STRIDE)[None, :]
        pixels = tl.load(at, mask=there[None, :] & (pixel >= 0)[:, None], other=0.0).to(OPERAND)
        at = weight + term[:, None] + (n * TERMS)[None, :]
        weights = tl.load(at, mask=there[:, None] & (n < CO)[None, :], other=0.0).to(OPERAND)
        total = tl.dot(pixels, weights, total, out_dtype=ACC, input_precision=PRECISION)
    return total


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit(do_not_specialize=["count", "height", "width"], do_not_specialize_on_alignment=["gain"])
def decode_kernel(  # type: ignore[no-untyped-def]
    features, tokens, coords, keys, values, coarser, gain, logits, error, scratch,
    match_cell_weight, match_cell_bias, match_token_weight, match_out_weight, match_out_bias,
    log_scale, out_weight, out_bias, token_weight, token_bias,
    shared_in_weight, shared_in_bias, shared_out_weight, shared_out_bias,
    own_in_weight, own_in_bias, own_mid_weight, own_mid_bias, own_out_weight, own_out_bias,
    keys_batch, values_batch, count, cells, height, width,
    FEATURES: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    HIDDEN: tl.constexpr, CLASSES: tl.constexpr, CONTEXT: tl.constexpr, TOKEN: tl.constexpr, SHARED: tl.constexpr,
    OWN: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, BOUND: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_KEYS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr, BLOCK_TOKEN: tl.constexpr, BLOCK_SHARED: tl.constexpr, BLOCK_OWN: tl.constexpr,
    PERIOD: tl.constexpr, BLOCK_SHARED_IN: tl.constexpr, BLOCK_SHARED_OUT: tl.constexpr, BLOCK_OWN_IN: tl.constexpr,
    BLOCK_OWN_MID: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS_AT: tl.constexpr, MAP_AT: tl.constexpr, HIDDEN_AT: tl.constexpr, OWN_AT: tl.constexpr, SLOT: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """logits and error [patches, CLASSES, 8, 8], a program a patch.

    A slot holds, one after the other: of HEADS, then of clamped and of squashed priors, what was found [16,
    BLOCK_VALUE]: four pixels of each class, then VALUE learned values; the token [TOKEN, 4, 4]; of the part that all
    classes share the input [64, PERIOD] and a hidden layer [64, BLOCK_SHARED]; two maps [64, BLOCK_OWN], of even and of
    odd classes.
    """
    WIDTH: tl.constexpr = 4 * CLASSES + VALUE
    OF_HEAD: tl.constexpr = 16 * BLOCK_VALUE
    INPUTS: tl.constexpr = FEATURES + TOKEN + CONTEXT
    GROUPS: tl.constexpr = BLOCK_HEADS * SPLITS
    here = tl.program_id(0).to(tl.int64)
    slot = scratch + here * SLOT
    kind = scratch.dtype.element_ty
    pixel = tl.arange(0, 64)
    y, x = pixel // 8, pixel % 8
    cell_of_pixel, part_of_pixel = _cell_of(y, x)
    at_pixel = cell_of_pixel * BLOCK_VALUE + part_of_pixel  # of the first class
    of_gain = tl.load(gain).to(ACC)
    cell = tl.arange(0, 16)
    sample = here // count
    of_patch, token = features + here * (FEATURES * 64), tokens + here * D
    top, left = tl.load(coords + here * 2).to(tl.int64) >> 1, tl.load(coords + here * 2 + 1).to(tl.int64) >> 1

    # The prior, which waits in the place of the logits, what is seen of it, and features and token as channels.
    for c in range(CLASSES):
        if coarser is None:
            prior = tl.zeros((64,), ACC)
        else:
            prior = _prior(coarser + (sample * CLASSES + c) * height * width, top, left, height, width, ACC)
            tl.store(logits + (here * CLASSES + c) * 64 + pixel, prior.to(logits.dtype.element_ty))
        clamped = tl.where(prior > 6.0, 6.0, tl.where(prior < -6.0, -6.0, prior)) / 3.0
        at = slot + HEADS * OF_HEAD + c * 4 + at_pixel
        tl.store(at, clamped.to(kind))
        tl.store(at + OF_HEAD, (tl.sigmoid(prior) * 2.0 - 1.0).to(kind))
    held = tl.arange(0, PERIOD)[None, :]
    given = (held < FEATURES) & (pixel >= 0)[:, None]
    seen = tl.load(of_patch + held * 64 + pixel[:, None], mask=given, other=0.0)
    given = given | ((held >= INPUTS) & (pixel >= 0)[:, None])  # zeros where there is no channel
    tl.store(slot + MAP_AT + pixel[:, None] * PERIOD + held, seen, mask=given)
    for first in range(0, 16 * TOKEN, BLOCK_TOKENS):
        output = first + tl.arange(0, BLOCK_TOKENS)
        wanted = output < 16 * TOKEN
        sums = tl.load(token_bias + output, mask=wanted, other=0.0).to(ACC)
        for start in range(0, D, BLOCK_D):
            channel = start + tl.arange(0, BLOCK_D)
            of_token = tl.load(token + channel, mask=channel < D, other=0.0).to(ACC)
            row = token_weight + output[:, None] * D + channel[None, :]
            w = tl.load(row, mask=wanted[:, None] & (channel < D)[None, :], other=0.0).to(ACC)
            sums += tl.sum(w * of_token[None, :], 1)
        tl.store(slot + TOKENS_AT + output, sums.to(kind), mask=wanted)

    # Label propagation. A group is a head and one in SPLITS of every block of keys.
    query = _matched(
        of_patch, token, match_cell_weight, match_cell_bias, match_token_weight, match_out_weight, match_out_bias,
        FEATURES, D, HEADS, KEY, HIDDEN, BLOCK_HEADS, BLOCK_KEY, BLOCK_HIDDEN, BLOCK_INNER,
        OPERAND, ACC, PRECISION,
    )  # fmt: skip
    head = tl.arange(0, BLOCK_HEADS)
    scale = tl.exp(tl.load(log_scale + head, mask=head < HEADS, other=0.0).to(ACC)) * 1.4426950408889634
    query = tl.permute(query * scale[None, :, None], (1, 0, 2))  # scores are exponents of 2
    query = tl.broadcast_to(query[:, None, :, :], (BLOCK_HEADS, SPLITS, 16, BLOCK_KEY))
    query = tl.reshape(query, (GROUPS, 16, BLOCK_KEY)).to(OPERAND)
    group = tl.arange(0, GROUPS)
    head_of_group = (group // SPLITS)[:, None]
    key = tl.arange(0, BLOCK_KEY)[None, None, :]
    value = tl.arange(0, BLOCK_VALUE)[None, None, :]
    most = tl.full((GROUPS, 16), float("-inf"), ACC)
    total = tl.zeros((GROUPS, 16), ACC)
    found = tl.zeros((GROUPS, 16, BLOCK_VALUE), ACC)
    for first in tl.range(0, cells, SPLITS * BLOCK_KEYS, num_stages=3):
        row = first + (group % SPLITS)[:, None] * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)[None, :]
        shown = row < cells
        there = (shown & (head_of_group < HEADS))[:, :, None]
        row = head_of_group * cells + row
        at = keys + sample * keys_batch + row[:, :, None] * KEY + key
        k = tl.load(at, mask=there & (key < KEY), other=0.0).to(OPERAND)  # [g, m, k]
        of_row = values + sample * values_batch + row[:, :, None] * WIDTH + value
        v = tl.load(of_row, mask=there & (value < WIDTH), other=0.0).to(OPERAND)
        scores = tl.dot(query, tl.permute(k, (0, 2, 1)), out_dtype=ACC, input_precision=PRECISION)  # [g, 16, m]
        scores = tl.where(shown[:, None, :], scores, float("-inf"))
        more = tl.maximum(most, tl.max(scores, 2))
        base = tl.where(more == float("-inf"), 0.0, more)
        share = tl.exp2(scores - base[:, :, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(share, 2)
        found = tl.dot(share.to(OPERAND), v, found * shrink[:, :, None], out_dtype=ACC, input_precision=PRECISION)
        most = more
    if SPLITS > 1:
        most = tl.reshape(most, (BLOCK_HEADS, SPLITS, 16))
        more = tl.max(most, 1)[:, None, :]
        shrink = tl.exp2(most - tl.where(more == float("-inf"), 0.0, more))
        total = tl.sum(tl.reshape(total, (BLOCK_HEADS, SPLITS, 16)) * shrink, 1)
        found = tl.reshape(found, (BLOCK_HEADS, SPLITS, 16, BLOCK_VALUE)) * shrink[:, :, :, None]
        found = tl.sum(found, 1)
    found = found / tl.where(cells == 0, 1.0, total)[:, :, None]  # no keys, no labels
    at = slot + head[:, None, None] * OF_HEAD + cell[None, :, None] * BLOCK_VALUE + value
    tl.store(at, found.to(kind), mask=(head < HEADS)[:, None, None] & (cell >= 0)[None, :, None] & (value >= 0))
    tl.debug_barrier()

    # Learned values and the token in the pixels.
    output = tl.arange(0, BLOCK_CONTEXT)
    wanted = output < 4 * CONTEXT
    context = tl.zeros((16, BLOCK_CONTEXT), ACC)
    context += tl.load(out_bias + output, mask=wanted, other=0.0).to(ACC)[None, :]
    for first in range(0, HEADS * VALUE, BLOCK_OUT):
        learned = first + tl.arange(0, BLOCK_OUT)
        exists = learned < HEADS * VALUE
        offset = learned // VALUE * OF_HEAD + learned % VALUE + 4 * CLASSES
        looked_up = tl.load(
            slot + cell[:, None] * BLOCK_VALUE + offset[None, :], mask=exists[None, :] & (cell >= 0)[:, None], other=0.0
        ).to(OPERAND)
        w = tl.load(
            out_weight + output[None, :] * (HEADS * VALUE) + learned[:, None],
            mask=exists[:, None] & wanted[None, :],
            other=0.0,
        ).to(OPERAND)
        context = tl.dot(looked_up, w, context, out_dtype=ACC, input_precision=PRECISION)
    to = (cell // 4 * 16 + cell % 4 * 2)[:, None] + (output % 4 // 2 * 8 + output % 2)[None, :]
    to = slot + MAP_AT + to * PERIOD + (FEATURES + TOKEN + output // 4)[None, :]
    tl.store(to, context.to(kind), mask=wanted[None, :] & (cell >= 0)[:, None])
    channel = tl.arange(0, BLOCK_TOKEN)[None, :]
    there = (channel < TOKEN) & (pixel >= 0)[:, None]
    upper, lower, down = _halfway(2 * y - 1, 3)
    before, after, right = _halfway(2 * x - 1, 3)
    down, right = down.to(ACC) * 0.25, right.to(ACC) * 0.25
    doubled = tl.zeros((64, BLOCK_TOKEN), ACC)
    for row in tl.static_range(2):
        rows, of_row = upper * 4, 1.0 - down
        if row == 1:
            rows, of_row = lower * 4, down
        at = slot + TOKENS_AT + channel * 16
        near = tl.load(at + (rows + before)[:, None], mask=there, other=0.0).to(ACC)
        far = tl.load(at + (rows + after)[:, None], mask=there, other=0.0).to(ACC)
        doubled += (of_row * (1.0 - right))[:, None] * near + (of_row * right)[:, None] * far
    to = slot + MAP_AT + pixel[:, None] * PERIOD + FEATURES + channel
    tl.store(to, doubled.to(kind), mask=there)
    tl.debug_barrier()

    # What the classes share.
    unit, own = tl.arange(0, BLOCK_SHARED), tl.arange(0, BLOCK_OWN)
    hidden = _convolution(
        slot + MAP_AT, shared_in_weight, INPUTS, PERIOD, SHARED, BLOCK_SHARED, CHANNELS_LAST, BLOCK_SHARED_IN,
        OPERAND, ACC, PRECISION,
    )  # fmt: skip
    hidden = _activated(hidden, shared_in_bias, unit, SHARED, NEGATIVE_SLOPE).to(OPERAND)
    shared = tl.zeros((64, BLOCK_OWN), ACC)
    shared += tl.load(shared_out_bias + own, mask=own < OWN, other=0.0).to(ACC)[None, :]
    if BLOCK_SHARED_OUT >= BLOCK_SHARED:
        w = tl.load(
            shared_out_weight + own[None, :] * SHARED + unit[:, None],
            mask=(unit < SHARED)[:, None] & (own < OWN)[None, :],
            other=0.0,
        ).to(OPERAND)
        shared = tl.dot(hidden, w, shared, out_dtype=ACC, input_precision=PRECISION)
    else:
        tl.store(slot + HIDDEN_AT + pixel[:, None] * BLOCK_SHARED + unit[None, :], hidden.to(kind))
        tl.debug_barrier()
        for first in range(0, SHARED, BLOCK_SHARED_OUT):
            some = first + tl.arange(0, BLOCK_SHARED_OUT)
            h = tl.load(slot + HIDDEN_AT + pixel[:, None] * BLOCK_SHARED + some[None, :]).to(OPERAND)
            w = tl.load(
                shared_out_weight + own[None, :] * SHARED + some[:, None],
                mask=(some < SHARED)[:, None] & (own < OWN)[None, :],
                other=0.0,
            ).to(OPERAND)
            shared = tl.dot(h, w, shared, out_dtype=ACC, input_precision=PRECISION)

    # What each class has of its own.
    of_change = tl.load(own_out_weight + own, mask=own < OWN, other=0.0).to(ACC)[None, :]
    of_error = tl.load(own_out_weight + OWN + own, mask=own < OWN, other=0.0).to(ACC)[None, :]
    for c in range(CLASSES):
        mine = shared + _convolution_of_cells(
            slot + c * 4, own_in_weight, HEADS + 2, OF_HEAD, BLOCK_VALUE, OWN, BLOCK_OWN, CHANNELS_LAST,
            BLOCK_OWN_IN, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        mine = _activated(mine, own_in_bias, own, OWN, NEGATIVE_SLOPE)
        stored = slot + OWN_AT + c % 2 * (64 * BLOCK_OWN)
        tl.store(stored + pixel[:, None] * BLOCK_OWN + own[None, :], mine.to(kind))
        tl.debug_barrier()  # one a class is enough: the next class has the other map
        mine = _convolution(
            stored, own_mid_weight, OWN, BLOCK_OWN, OWN, BLOCK_OWN, CHANNELS_LAST, BLOCK_OWN_MID,
            OPERAND, ACC, PRECISION,
        )  # fmt: skip
        mine = _activated(mine, own_mid_bias, own, OWN, NEGATIVE_SLOPE)
        change = tl.sum(mine * of_change, 1) + tl.load(own_out_bias).to(ACC)
        remaining = tl.sum(mine * of_error, 1) + tl.load(own_out_bias + 1).to(ACC)
        labels = tl.zeros((64,), ACC)
        for h in tl.static_range(HEADS):
            labels += tl.load(slot + h * OF_HEAD + c * 4 + at_pixel).to(ACC)
        change = BOUND * _tanh((change + of_gain * (labels / HEADS)) / BOUND)
        place = (here * CLASSES + c) * 64 + pixel
        if coarser is not None:
            change += tl.load(logits + place).to(ACC)
        tl.store(logits + place, change.to(logits.dtype.element_ty))
        tl.store(error + place, remaining.to(error.dtype.element_ty))


@triton.jit(do_not_specialize=["patches", "count", "height", "width"])
def support_kernel(  # type: ignore[no-untyped-def]
    features, tokens, coords, masks, keys, values,
    match_cell_weight, match_cell_bias, match_token_weight, match_out_weight, match_out_bias,
    value_cell_weight, value_cell_bias, value_token_weight,
    patches, count, height, width,
    FEATURES: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    HIDDEN: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_LEARNED: tl.constexpr, BLOCK_LABELS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_INNER: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """keys [B, HEADS, 16 patches, KEY], values [B, HEADS, 16 patches, 4 CLASSES + VALUE], a program a patch.

    patches: of a set; count: of an image. Masks are replicated beyond their borders, and 0 where a patch with its halo
    of 4 pixels lies wholly outside.
    """
    WIDTH: tl.constexpr = 4 * CLASSES + VALUE
    here = tl.program_id(0).to(tl.int64)
    image, number = here // count, here // patches
    of_patch, token = features + here * (FEATURES * 64), tokens + here * D
    cell = tl.arange(0, 16)
    first = (number * HEADS * patches + here % patches) * 16 + cell  # the row of the first head; others are far apart
    step = patches.to(tl.int64) * 16

    found = _matched(
        of_patch, token, match_cell_weight, match_cell_bias, match_token_weight, match_out_weight, match_out_bias,
        FEATURES, D, HEADS, KEY, HIDDEN, BLOCK_HEADS, BLOCK_KEY, BLOCK_HIDDEN, BLOCK_INNER, OPERAND, ACC, PRECISION,
    )  # fmt: skip
    head, key = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_KEY)
    row = first[:, None] + (head * step)[None, :]
    written = (head < HEADS)[None, :, None] & (key < KEY)[None, None, :] & (cell >= 0)[:, None, None]
    to = keys + row[:, :, None] * KEY + key[None, None, :]
    tl.store(to, found.to(keys.dtype.element_ty), mask=written)

    output = tl.arange(0, BLOCK_LEARNED)
    wanted = output < HEADS * VALUE
    learned = tl.zeros((16, BLOCK_LEARNED), ACC)
    learned = _linear(
        learned, of_patch, token, value_cell_weight, value_cell_bias, value_token_weight, output, wanted,
        FEATURES, D, BLOCK_INNER, OPERAND, ACC, PRECISION,
    )  # fmt: skip
    to = (first[:, None] + (output // VALUE * step)[None, :]) * WIDTH + (4 * CLASSES + output % VALUE)[None, :]
    tl.store(values + to, learned.to(values.dtype.element_ty), mask=wanted[None, :] & (cell >= 0)[:, None])

    label = tl.arange(0, BLOCK_LABELS)
    wanted = (label < 4 * CLASSES)[None, :] & (cell >= 0)[:, None]
    top, left = tl.load(coords + here * 2).to(tl.int64), tl.load(coords + here * 2 + 1).to(tl.int64)
    inside = (top > -12) & (top - 4 < height) & (left > -12) & (left - 4 < width)
    top, left = tl.where(inside, top, 0), tl.where(inside, left, 0)
    y = tl.minimum(tl.maximum(top + (cell // 4 * 2)[:, None] + (label % 4 // 2)[None, :], 0), height - 1)
    x = tl.minimum(tl.maximum(left + (cell % 4 * 2)[:, None] + (label % 2)[None, :], 0), width - 1)
    at = masks + ((image * CLASSES + (label // 4)[None, :]) * height + y) * width + x
    inside = wanted & inside
    mask = tl.load(at, mask=inside, other=0.0).to(ACC) * 2.0 - 1.0
    for h in tl.static_range(HEADS):
        to = (first + h * step)[:, None] * WIDTH + label[None, :]
        tl.store(values + to, mask.to(values.dtype.element_ty), mask=wanted)


def arithmetic(dtype: torch.dtype, interpreted: bool, fused: bool) -> dict[str, Any]:
    """Constants: the dtype of sums, that of factors of products, and how float32 is multiplied."""
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    narrow = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {
        "OPERAND": wide if interpreted else narrow.get(dtype, wide),
        "ACC": wide,
        "PRECISION": "ieee" if fused or dtype != torch.float32 else "tf32",
    }


_MODEL = Sizes(features=24, dim=128, heads=2, key=16, value=12, hidden=64, context=16, token=16, shared=32, own=20)
_BOUND = 8.0
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def _compiled(kernel: Any, dtype: torch.dtype, fused: bool, classes: int, prior: bool = True) -> Compilation:
    pointer, terms = _POINTERS[dtype], terms_of(dtype, fused)
    decoding = kernel is decode_kernel
    if decoding:
        given = decode_constants(_MODEL, classes, terms, channels_last=True) | {"BOUND": _BOUND}
    else:
        given = support_constants(_MODEL, classes, terms)
    warps, stages = given.pop("num_warps"), given.pop("num_stages")
    given |= arithmetic(dtype, False, fused)
    integers = {"keys_batch", "values_batch", "patches", "count", "cells", "height", "width"}
    signature = {
        name: "i32" if name in integers else "*i64" if name == "coords" else pointer
        for name in kernel.arg_names
        if name not in given
    }
    if decoding and not prior:
        del signature["coarser"]
        given["coarser"] = None
    shown = "tf32 " if dtype == torch.float32 and not fused else ""
    first = "" if prior else ", first level"
    return Compilation(
        f"cascade: {'decode' if decoding else 'support cells'} {pointer[1:]} {shown}C{classes}{first}",
        kernel,
        signature,
        given,
        unaligned=("gain",) if decoding else (),
        aligned=("keys_batch", "values_batch", "cells") if decoding else (),
        num_warps=warps,
        num_stages=stages,
        tensor_cores=not fused,
    )


def _compilations() -> Iterator[Compilation]:
    kinds = (torch.float32, True), (torch.float32, False), (torch.float16, False), (torch.bfloat16, False)
    for dtype, fused in kinds:
        yield _compiled(decode_kernel, dtype, fused, 1)
        yield _compiled(decode_kernel, dtype, fused, 1, prior=False)
        yield _compiled(support_kernel, dtype, fused, 1)
    for classes in (4, 16):
        yield _compiled(decode_kernel, torch.bfloat16, False, classes)
    yield _compiled(support_kernel, torch.bfloat16, False, 4)


COMPILATIONS = list(_compilations())
