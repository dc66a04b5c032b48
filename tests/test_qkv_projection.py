"""qkv_projection: its definition written out in float64, its gradients, its contract and its refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import BackendError, Rotation, flops, qkv_projection, selected_attention


@dataclass
class Call:
    """Arguments of one call."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor] | None
    norm: tuple[Tensor, Tensor | None] | None
    added: Tensor | None
    rotary: tuple[Rotation | None, Rotation | None] | None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str | None = "reference") -> tuple[Tensor, Tensor, Tensor]:
        bias = self.biases
        return qkv_projection(
            self.x,
            self.weights[0] if len(self.weights) == 1 else self.weights,
            bias[0] if bias is not None and len(bias) == 1 else bias,
            norm=self.norm,
            added=self.added,
            rotary=self.rotary,
            backend=backend,
            **self.options,
        )

    def leaves(self) -> list[Tensor]:
        found = [self.x, *self.weights, *(self.biases or []), *(self.norm or ()), self.added]
        return [t for t in found if t is not None]

    def mapped(self, change: Any) -> Call:
        """With every leaf replaced, and rotations in float32, or for float64 in that."""
        new = {id(t): change(t) for t in self.leaves()}
        get = lambda t: None if t is None else new[id(t)]  # noqa: E731
        x = get(self.x)
        rotary = self.rotary
        if rotary is not None:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            first, second = (r and Rotation(*(t.to(x.device, wide) for t in r)) for r in rotary)
            rotary = first, second
        return Call(
            x,
            [get(w) for w in self.weights],
            None if self.biases is None else [get(b) for b in self.biases],
            None if self.norm is None else (get(self.norm[0]), get(self.norm[1])),
            get(self.added),
            rotary,
            self.options,
        )

    def to(self, *target: Any) -> Call:
        return self.mapped(lambda t: t.detach().to(*target))

    def with_gradients(self, backend: str | None = "reference") -> list[Tensor]:
        """Outputs, and gradients of a fixed weighted sum of them."""
        call = self.mapped(lambda t: t.detach().requires_grad_())
        out = call.run(backend)
        upstream = [normal(*o.shape, seed=90 + i).to(o) for i, o in enumerate(out)]
        return [*(o.detach() for o in out), *torch.autograd.grad(out, call.leaves(), upstream)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(
    batch: int = 2, count: int = 7, channels: int = 24, heads: int = 2, width: int = 8, *, kv_heads: int | None = None,
    queries: int | None = None, pieces: int = 1, bias: bool = True, norm: str = "both", added: bool = True,
    rotary: str = "both", dtype: torch.dtype = torch.float64,
) -> Call:  # fmt: skip
    """norm: "both", "weight" or "none"; rotary: "both", "q", "k", "shared" by samples and heads, or "none"."""
    kv = heads if kv_heads is None else kv_heads
    sections = [heads * width, kv * width, kv * width]
    rows = {1: [sum(sections)], 2: [sections[0], 2 * sections[1]], 3: sections}[pieces]
    weights = [normal(n, channels, seed=i + 1) / channels**0.5 for i, n in enumerate(rows)]
    biases = [normal(n, seed=i + 4) for i, n in enumerate(rows)] if bias else None
    gain, shift = 1 + normal(channels, seed=7) / 4, normal(channels, seed=8)
    turns: list[Rotation | None] = []
    for side, outer in (("q", (batch, heads, count if queries is None else queries)), ("k", (batch, kv, count))):
        angles = normal(*((1, 1, outer[2]) if rotary == "shared" else outer), width // 2, seed=9)
        turns.append(Rotation(angles.cos(), angles.sin()) if rotary in ("both", "shared", side) else None)
    call = Call(
        2 * normal(batch, count, channels) + 1,
        weights,
        biases,
        None if norm == "none" else (gain, shift if norm == "both" else None),
        normal(count, channels, seed=10) if added else None,
        None if rotary == "none" else (turns[0], turns[1]),
        {"heads": heads, "kv_heads": kv_heads, "queries": queries},
    )
    return call.to(dtype)


def written_out(call: Call) -> list[Tensor]:
    """The definition, of sums and complex numbers."""
    y, heads = call.x, call.options["heads"]
    kv = call.options["kv_heads"] or heads
    if call.norm is not None:
        deviation = y - y.mean(-1, keepdim=True)
        y = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt() * call.norm[0]
        y = y if call.norm[1] is None else y + call.norm[1]
    if call.added is not None:
        y = y + call.added
    everything = torch.einsum("bnc,oc->bno", y, torch.cat(call.weights))
    if call.biases is not None:
        everything = everything + torch.cat(call.biases)
    width = everything.shape[2] // (heads + 2 * kv)
    parts = everything.split([heads * width, kv * width, kv * width], -1)
    q, k, v = (t.unflatten(-1, (n, width)).transpose(1, 2) for t, n in zip(parts, (heads, kv, kv), strict=True))
    queries = call.options["queries"]
    found = [q if queries is None else q[:, :, q.shape[2] - queries :], k, v]
    for i, turn in enumerate(call.rotary or ()):
        if turn is not None:
            pairs = torch.view_as_complex(found[i].unflatten(-1, (-1, 2)).contiguous())
            found[i] = torch.view_as_real(pairs * torch.complex(*turn)).flatten(-2)
    return found


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "plain": {"norm": "none", "added": False, "rotary": "none", "bias": False},
    "two weights": {"pieces": 2, "queries": 3, "rotary": "shared"},
    "three weights": {"pieces": 3, "kv_heads": 1, "heads": 3, "norm": "weight"},
    "three weights, no bias": {"pieces": 3, "bias": False, "added": False, "rotary": "q"},
    "few queries": {"queries": 3, "norm": "none", "rotary": "k"},
    "few queries, no bias": {"queries": 2, "bias": False, "kv_heads": 1},
    "no query": {"queries": 0, "pieces": 2},
    "one token": {"batch": 1, "count": 1, "heads": 1, "width": 2, "channels": 1, "norm": "none"},
    "odd heads": {"width": 5, "rotary": "none", "channels": 7, "heads": 3, "kv_heads": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_definition(name: str) -> None:
    call = made(**CASES[name])
    for found, expected in zip(call.run(), written_out(call), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["all", "two weights", "three weights"])
def test_gradients(name: str) -> None:
    call = made(1, 3, **{"channels": 6, "width": 2, **{k: v for k, v in CASES[name].items() if k != "queries"}})
    leaves = [t.requires_grad_() for t in call.leaves()]
    assert torch.autograd.gradcheck(lambda *_: call.run(), leaves)


def test_reference_is_twice_differentiable() -> None:
    call = made(1, 2, channels=3, width=2, heads=1)
    leaves = [t.requires_grad_() for t in call.leaves()]
    assert torch.autograd.gradgradcheck(lambda *_: call.run(), leaves)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_has_the_bits_of_torchs_layers(pieces: int) -> None:
    call = made(pieces=pieces, dtype=torch.float32, rotary="none")
    y = F.layer_norm(call.x, call.x.shape[-1:], *call.norm) + call.added
    joined = torch.cat([F.linear(y, w, b) for w, b in zip(call.weights, call.biases, strict=True)], -1)
    for found, expected in zip(call.run(), joined.chunk(3, -1), strict=True):
        assert torch.equal(found.transpose(1, 2).flatten(2), expected)


def test_attention_turns_as_the_projection_does() -> None:
    """Same bits of queries and keys, turned here or there, of the last queries too."""
    call = made(queries=3, dtype=torch.float32)
    q, k, v = call.run()
    call.rotary, rotary = None, call.rotary
    expected = selected_attention(*call.run(), rotary=rotary, backend="reference")
    assert torch.equal(selected_attention(q, k, v, backend="reference"), expected)


def test_layers_of_torch() -> None:
    """torch.nn.MultiheadAttention's weights, and a fused linear layer's."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    q, k, v = qkv_projection(x, attention.in_proj_weight, attention.in_proj_bias, heads=4)
    joined = selected_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.out_proj(joined), attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    """Turned in float32; outputs and gradients in the dtype of the inputs."""
    call = made(dtype=dtype)
    found = call.with_gradients()
    exact = call.to(torch.float64).with_gradients()
    for ours, oracle, like in zip(found, exact, [call.x] * 3 + call.leaves(), strict=True):
        assert ours.dtype == like.dtype
        scale = max(1.0, oracle.abs().max().item())
        assert (ours.double() - oracle).abs().max() <= 8 * torch.finfo(dtype).eps * scale


def test_autocast() -> None:
    """Norm and sum as they are, products in the half type."""
    call = made(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = call.with_gradients()
        y = F.linear(F.layer_norm(call.x, (24,), *call.norm) + call.added, call.weights[0], call.biases[0])
    assert [t.dtype for t in found[:3]] == [torch.bfloat16] * 3
    assert all(t.dtype == torch.float32 for t in found[3:])
    assert torch.equal(found[2].transpose(1, 2).flatten(2), y.chunk(3, -1)[2])
    for name, value in (("x", call.x.double()), ("weight", call.weights[0].double())):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="must have the dtype of x"):
            qkv_projection(**{"x": call.x, "weight": call.weights[0], "heads": 2, name: value})


@pytest.mark.parametrize(("batch", "count"), [(0, 4), (2, 0)])
def test_nothing(batch: int, count: int) -> None:
    q, k, v = made(batch, count, pieces=2).run()
    assert q.shape == k.shape == v.shape == (batch, 2, count, 8)


@pytest.mark.parametrize("shape", [(), (1,), (24,), (7, 1), (1, 7, 24), (2, 1, 24), (2, 7, 24)])
def test_what_is_added_is_broadcast(shape: tuple[int, ...]) -> None:
    call = made()
    call.added = normal(*shape, seed=3)
    expected = written_out(call)
    for found, right in zip(call.run(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert call.with_gradients()[-1].shape == shape


def test_compiles_once_for_new_values() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def project(call: Call) -> tuple[Tensor, ...]:
        return call.run(None)

    compiled = torch.compile(project, fullgraph=True, backend=counter)
    for factor in (1.0, -2.0):
        call = made(dtype=torch.float32).mapped(lambda t, factor=factor: factor * t)
        for ours, theirs in zip(compiled(call), call.run(), strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 1


def test_flops_and_bytes() -> None:
    call = made(pieces=2, queries=3, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = call.run()
    formula = flops.qkv_projection_flops(2, 7, 24, 2, 8, queries=3)
    assert counter.get_total_flops() == formula == 2 * 2 * 24 * 8 * (2 * 3 + 2 * 2 * 7)
    assert flops.qkv_projection_flops(2, 7, 24, 4, 8, kv_heads=1) == 2 * 2 * 24 * 8 * 7 * 6
    tensors = [call.x, *call.weights, *call.biases, *out]
    assert flops.qkv_projection_bytes(2, 7, 24, 2, 8, queries=3) == sum(t.numel() * 4 for t in tensors)


def turn(*shape: int, dtype: torch.dtype = torch.float32) -> Rotation:
    return Rotation(torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


W, ODD = torch.zeros(24, 6), torch.zeros(18, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 6)}, ValueError, r"x must have shape \[B, N, C\] with C > 0, got \[2, 6\]"),
        ({"x": torch.zeros(2, 5, 0)}, ValueError, r"x must have shape \[B, N, C\] with C > 0, got \[2, 5, 0\]"),
        ({"x": torch.zeros(2, 5, 6).int()}, TypeError, "x must be a floating-point tensor"),
        ({"heads": 0}, ValueError, "heads must be an integer of at least 1, got 0"),
        ({"heads": 2.0}, TypeError, "heads must be an integer of at least 1, got 2.0"),
        ({"kv_heads": 0}, ValueError, "kv_heads must be an integer of at least 1 or None, got 0"),
        ({"queries": 6}, ValueError, "queries must be an integer from 0 to 5 or None, got 6"),
        ({"queries": -1}, ValueError, "queries must be an integer from 0 to 5 or None, got -1"),
        ({"weight": torch.zeros(25, 6)}, ValueError, r"weight must have shape \[6 D, 6\] with D > 0, got \[25, 6\]"),
        ({"weight": torch.zeros(0, 6)}, ValueError, r"weight must have shape \[6 D, 6\] with D > 0, got \[0, 6\]"),
        ({"weight": torch.zeros(24, 5)}, ValueError, r"weight must have shape \[6 D, 6\] with D > 0, got \[24, 5\]"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor or a sequence of them, got NoneType"),
        ({"weight": [W]}, ValueError, "weight must be a tensor, two or three of them, got 1"),
        ({"weight": [W, None]}, TypeError, r"weight\[1\] must be a torch.Tensor, got NoneType"),
        ({"weight": [W[:8], W[:8]]}, ValueError, r"weight\[1\] must have 16 rows, 4 a head, got 8"),
        ({"weight": W.double()}, TypeError, r"weight must have the dtype of x, torch\.float32, got torch\.float64"),
        ({"weight": W.to("meta")}, ValueError, "weight must be on cpu, .* got meta"),
        ({"bias": torch.zeros(23)}, ValueError, r"bias must have shape \[24\], got \[23\]"),
        ({"bias": [torch.zeros(8), torch.zeros(16)]}, ValueError, "bias must be as many tensors as weight, 1, got 2"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, a sequence of them or None, got float"),
        ({"bias": [None]}, TypeError, r"bias\[0\] must be a torch.Tensor, got NoneType"),
        ({"norm": torch.zeros(6)}, TypeError, "norm must be a pair of weight and bias, or None, got Tensor"),
        ({"norm": (None, None)}, TypeError, r"norm\[0\] must be a torch.Tensor, got NoneType"),
        ({"norm": (torch.zeros(6), torch.zeros(5))}, ValueError, r"norm\[1\] must have shape \[6\], got \[5\]"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number of at least 0, got -1.0"),
        ({"eps": math.nan}, ValueError, "eps must be a finite number of at least 0, got nan"),
        ({"added": torch.zeros(4, 6)}, ValueError, r"added must be broadcastable to \[2, 5, 6\], got shape \[4, 6\]"),
        ({"added": torch.zeros(1, 2, 5, 6)}, ValueError, r"added must be broadcastable to \[2, 5, 6\]"),
        ({"rotary": turn(5, 2).cos}, TypeError, "rotary must be a pair of rotations, of q and of k, got Tensor"),
        ({"rotary": (1, None)}, TypeError, r"rotary\[0\] must be a Rotation or None, got 1"),
        ({"rotary": (None, turn(5, 3))}, ValueError, r"rotary\[1\].cos must be broadcastable to \[2, 2, 5, 2\], got"),
        ({"rotary": (turn(5, 2), None), "queries": 4}, ValueError, r"rotary\[0\].cos must be broadcastable"),
        ({"rotary": (turn(5, 2, dtype=torch.float64), None)}, TypeError, r"rotary\[0\].cos must be torch.float32"),
        ({"rotary": (turn(5, 1), None), "weight": ODD}, ValueError, r"rotary\[0\] must turn pairs of channels, D even"),
        ({"backend": "native"}, BackendError, "qkv_projection has no native backend"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        qkv_projection(**{"x": torch.zeros(2, 5, 6), "weight": W, "heads": 2, **changes})
