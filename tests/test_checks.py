"""Hostile arguments of every op: a TypeError or ValueError that names the argument, and never anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from icseg_kernels import (
    BlockWeights,
    ConvLayer,
    checks,
    cross_conv2d,
    cross_conv2d_and_mean,
    cross_conv2d_mean,
    gather_patches,
    group_norm_film,
    gumbel_topk,
    halvings,
    qkv_projection,
    sample_patches,
    scatter_patches,
    selected_attention,
    small_convolutions,
    transformer_block,
    upsample_with_patches,
)
from icseg_kernels.philox import gumbel_noise
from icseg_kernels.transformer_block.native import shapes


def valid(op: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that `op` serves."""
    coords = torch.zeros(2, 3, 2, dtype=torch.int64)
    return {
        gumbel_topk: {"logits": torch.zeros(2, 9), "k": 3, "seed": 0},
        gumbel_noise: {"seed": 0, "rows": 2, "elements": 9, "stream": 1, "offset": 2},
        sample_patches: {"weights": torch.zeros(2, 1, 8, 8), "k": 3, "patch_size": 4, "stride": 2, "seed": 0},
        gather_patches: {"source": torch.zeros(2, 1, 8, 8), "coords": coords, "patch_size": 4},
        scatter_patches: {"patches": torch.zeros(2, 3, 1, 4, 4), "coords": coords, "size": (8, 8)},
        selected_attention: {
            "q": torch.zeros(2, 1, 4, 8),
            "k": torch.zeros(2, 1, 5, 8),
            "v": torch.zeros(2, 1, 5, 8),
            "index": torch.zeros(2, 3, dtype=torch.int64),
        },
        cross_conv2d: images(),
        cross_conv2d_mean: images(),
        cross_conv2d_and_mean: images(),
        group_norm_film: {"x": torch.zeros(2, 4, 3), "groups": 2, "gain": torch.zeros(4), "bias": torch.zeros(2, 4)},
        small_convolutions: {"x": torch.zeros(2, 3, 4, 4), "layers": [ConvLayer(torch.zeros(2, 3, 3, 3))]},
        transformer_block: {
            "tokens": torch.zeros(2, 3, 4),
            "memory": [torch.zeros(2, 1, 8)],
            "block": BlockWeights(*map(torch.zeros, shapes(4, 5))),
            "heads": 2,
            "index": torch.zeros(2, 4, dtype=torch.int64),
        },
        qkv_projection: {
            "x": torch.zeros(2, 3, 4),
            "weight": torch.zeros(12, 4),
            "bias": torch.zeros(12),
            "heads": 2,
            "added": torch.zeros(3, 4),
        },
        halvings: {"image": torch.zeros(2, 1, 4, 4), "count": 2, "deviations": 1},
        upsample_with_patches: {
            "coarser": torch.zeros(2, 1, 4, 4),
            "patches": torch.zeros(2, 3, 1, 2, 2),
            "coords": coords,
            "size": (8, 8),
        },
    }[op]


def images() -> dict[str, Any]:
    return {
        "x": torch.zeros(2, 1, 2, 8, 8),
        "y": torch.zeros(2, 3, 2, 8, 8),
        "weight": torch.zeros(4, 4, 3, 3),
        "bias": torch.zeros(4),
        "padding": 1,
    }


IMAGE_OPS = (cross_conv2d, cross_conv2d_mean, cross_conv2d_and_mean)
TENSORS = [
    (gumbel_topk, "logits"),
    (sample_patches, "weights"),
    (gather_patches, "source"),
    (gather_patches, "coords"),
    (scatter_patches, "patches"),
    (scatter_patches, "coords"),
    *((selected_attention, name) for name in ("q", "k", "v", "index")),
    *((op, name) for op in IMAGE_OPS for name in ("x", "y", "weight", "bias")),
    *((group_norm_film, name) for name in ("x", "gain", "bias")),
    (small_convolutions, "x"),
    *((transformer_block, name) for name in ("tokens", "index")),
    *((qkv_projection, name) for name in ("x", "added")),
    (halvings, "image"),
    *((upsample_with_patches, name) for name in ("coarser", "patches", "coords")),
]
# The first tensor of an op says where the others must be.
FOLLOWING = [(op, name) for op, name in TENSORS if name != next(iter(valid(op)))]
FLOATING = [(op, name) for op, name in TENSORS if name not in ("source", "coords", "index")]
INTEGERS = [
    *((gumbel_topk, name) for name in ("k", "seed")),
    *((gumbel_noise, name) for name in ("seed", "rows", "elements", "stream", "offset")),
    *((sample_patches, name) for name in ("k", "patch_size", "stride", "seed")),
    (gather_patches, "patch_size"),
    (selected_attention, "kv_end"),
    *((op, name) for op in IMAGE_OPS for name in ("stride", "padding", "dilation")),
    (group_norm_film, "groups"),
    (transformer_block, "heads"),
    *((qkv_projection, name) for name in ("heads", "kv_heads", "queries")),
]
NUMBERS = [
    (sample_patches, "temperature"),
    (sample_patches, "blur_sigma"),
    (selected_attention, "scale"),
    (scatter_patches, "fill"),
    *((op, "negative_slope") for op in IMAGE_OPS),
    (group_norm_film, "eps"),
    (qkv_projection, "eps"),
]


def call(op: Callable[..., Any], **changes: object) -> Any:
    return op(**{**valid(op), **changes})


def label(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("hostile", [np.zeros((2, 9)), [[0.0]], 1.0, object()], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("op", "name"), TENSORS, ids=label)
def test_no_tensor(op: Callable[..., Any], name: str, hostile: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a torch.Tensor, got {type(hostile).__name__}$"):
        call(op, **{name: hostile})


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=label)
def test_tensor_that_is_not_dense(op: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got layout torch.sparse_coo$"):
        call(op, **{name: valid(op)[name].to_sparse()})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize(("op", "name"), FLOATING, ids=label)
def test_tensor_of_another_dtype(op: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a floating-point tensor .*, got {dtype}$"):
        call(op, **{name: valid(op)[name].to(dtype)})


@pytest.mark.parametrize(("op", "name"), FOLLOWING, ids=label)
def test_tensor_on_another_device(op: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be on cpu, .* got meta$"):
        call(op, **{name: valid(op)[name].to("meta")})


@pytest.mark.parametrize("hostile", [2.0, 1.5, True, "2", np.float64(2), np.array([2.0]), b"2", torch.tensor(2.0), {}])
@pytest.mark.parametrize(("op", "name"), INTEGERS, ids=label)
def test_no_integer(op: Callable[..., Any], name: str, hostile: object) -> None:
    if isinstance(hostile, Tensor) and name == "seed":
        hostile = hostile.numpy()
    error = ValueError if (name, hostile) == ("padding", "2") else TypeError  # "same" and "valid" are strings too
    with pytest.raises(error, match=rf"^{name}.* must be"):
        call(op, **{name: hostile})


@pytest.mark.parametrize("value", [np.int64(1), np.uint8(1), np.array(1)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("op", "name"), INTEGERS, ids=label)
def test_integers_of_numpy(op: Callable[..., Any], name: str, value: Any) -> None:
    ours, theirs = (call(op, **{name: v}) for v in (value, 1))
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (ours, theirs)), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("hostile", [True, "0.5", None, np.array([0.5, 0.5]), 1j, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=label)
def test_no_number(op: Callable[..., Any], name: str, hostile: object) -> None:
    if name == "scale" and hostile is None:
        hostile = [None]
    with pytest.raises(TypeError, match=rf"^{name} must be a finite number"):
        call(op, **{name: hostile})


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), -float("inf"), np.float32("nan")], ids=repr)
@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=label)
def test_number_that_is_not_finite(op: Callable[..., Any], name: str, hostile: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number"):
        call(op, **{name: hostile})


@pytest.mark.parametrize(
    ("op", "name", "hostile", "error"),
    [
        (sample_patches, "padding", 1, TypeError),
        (sample_patches, "padding", "11", TypeError),
        (sample_patches, "padding", (1.0, 1), TypeError),
        (sample_patches, "padding", (1, 1, 1), ValueError),
        (sample_patches, "padding", (True, 1), TypeError),
        (sample_patches, "noise", "0", TypeError),
        (sample_patches, "noise", np.zeros((2, 9)), TypeError),
        (gumbel_topk, "noise", True, TypeError),
        (scatter_patches, "size", 8, TypeError),
        (scatter_patches, "size", (8.0, 8), TypeError),
        (scatter_patches, "size", (8, -8), ValueError),
        (scatter_patches, "weight", 1.0, TypeError),
        (selected_attention, "kv_end", ["ab"], TypeError),
        (selected_attention, "kv_end", "ab", TypeError),
        (selected_attention, "kv_end", [(4.0, 3.0)], TypeError),
        (selected_attention, "kv_end", [(4, True)], TypeError),
        (selected_attention, "kv_end", [(4, 3, 1)], ValueError),
        (selected_attention, "kv_end", [4, 3], TypeError),
        (selected_attention, "kv_end", np.array([[4, 3]]), TypeError),
        *((op, "stride", (1, 1.5), TypeError) for op in IMAGE_OPS),
        *((op, "stride", (1, 1, 1), ValueError) for op in IMAGE_OPS),
        *((op, "padding", (1, "1"), TypeError) for op in IMAGE_OPS),
        *((op, "activation", hostile, ValueError) for op in IMAGE_OPS for hostile in ("tanh", 1, ["relu"], {})),
        *((group_norm_film, "activation", hostile, ValueError) for hostile in ("relu", 1, ["gelu"], {})),
        (group_norm_film, "groups", -2, ValueError),
        (group_norm_film, "eps", -1e-9, ValueError),
        (group_norm_film, "gain", torch.zeros(()), ValueError),
        (group_norm_film, "gain", torch.zeros(1, 4), ValueError),
        (group_norm_film, "bias", torch.zeros(2), ValueError),
        (group_norm_film, "x", torch.zeros(4), ValueError),
        (small_convolutions, "x", torch.zeros(3, 4, 4), ValueError),
        *((small_convolutions, "layers", hostile, TypeError) for hostile in (None, 1, "layers", {}, [None])),
        (small_convolutions, "layers", (), ValueError),
        (transformer_block, "tokens", torch.zeros(3, 4), ValueError),
        *((transformer_block, "memory", hostile, TypeError) for hostile in (None, 1, "memory", {}, [None])),
        *((transformer_block, "block", hostile, TypeError) for hostile in (None, (), [torch.zeros(4)] * 14)),
    ],
    ids=label,
)
def test_other_arguments(op: Callable[..., Any], name: str, hostile: object, error: type[Exception]) -> None:
    changes = {"seed": None, name: hostile} if name == "noise" else {name: hostile}
    with pytest.raises(error, match=rf"^{name}.* must (be|have)"):
        call(op, **changes)


@pytest.mark.parametrize(
    ("least", "most", "value", "message"),
    [
        (1, None, 2.0, "n must be an integer of at least 1, got 2.0"),
        (None, None, "x", "n must be an integer, got 'x'"),
        (0, 9, True, "n must be an integer from 0 to 9, got True"),
        (None, 9, torch.zeros(3), "n must be an integer of at most 9, got Tensor"),
        (1, None, 0, "n must be an integer of at least 1, got 0"),
        (None, 9, 10, "n must be an integer of at most 9, got 10"),
    ],
)
def test_messages_of_integers(least: int | None, most: int | None, value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        checks.integer("n", value, least, most)


@pytest.mark.parametrize(
    ("limits", "value", "message"),
    [
        ({}, "x", "s must be a finite number, got 'x'"),
        ({"least": 0}, -1, "s must be a finite number of at least 0, got -1"),
        ({"above": 0}, 0.0, "s must be a finite number greater than 0, got 0.0"),
    ],
)
def test_messages_of_numbers(limits: dict[str, float], value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        checks.number("s", value, **limits)


def test_checks_trace_whole_and_do_not_compile_new_values_anew() -> None:
    def checked(x: Tensor, n: int, s: float, size: tuple[int, int]) -> Tensor:
        checks.device("x", checks.floating("x", x), x.device)
        height, width = checks.pair("size", size, 0)
        return x * checks.number("s", s, above=0) + checks.integer("n", n, 1, 100) + height - width

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(checked, fullgraph=True, backend=counter)
    for i in range(2, 12):
        arguments = torch.ones(3), i, 0.1 * i, (i, i + 1)
        assert torch.equal(compiled(*arguments), checked(*arguments))
    assert counter.frame_count <= 2
