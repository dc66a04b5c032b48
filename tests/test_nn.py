"""The modules against torch's own, against concatenated pairs, and against sliding windows taken everywhere."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

import icseg_kernels
from icseg_kernels.nn import (
    CrossConv2d,
    CrossConv3d,
    PatchGather,
    PatchRouter,
    PatchSampler,
    PatchScatter,
    SelectByIndex,
    SelectByMask,
    SelectByScore,
    Selected,
    SelectedAttention,
    Selection,
    prediction_entropy,
)
from icseg_kernels.nn.functional import scaled_dot_product_attention
from icseg_kernels.nn.selection import listed
from icseg_kernels.patches import gaussian_weight

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def equal_with_gradients(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: list[Tensor],
) -> None:
    """Equal outputs, and equal gradients of the inputs."""
    gradients, outputs = [], []
    for run in (ours, theirs):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        out = run(*leaves)
        (out * rand(*out.shape, seed=77)).sum().backward()
        outputs.append(out.detach())
        gradients.append([x.grad for x in leaves])
    close(*outputs)
    for mine, other in zip(*gradients, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            close(mine, other)


def parameters_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """The gradients of all parameters."""
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (others[name].grad is None), name
        if parameter.grad is not None:
            close(parameter.grad, others[name].grad)


class TestCrossConv:
    @staticmethod
    def pairs(x: Tensor, y: Tensor) -> Tensor:
        sizes = x.shape[0], x.shape[1], y.shape[1]
        return torch.cat([x[:, :, None].expand(*sizes, *x.shape[2:]), y[:, None].expand(*sizes, *y.shape[2:])], 3)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"padding": 1, "bias": False},
            {"padding": "same", "padding_mode": "reflect"},
            {"padding": 2, "stride": 2, "dilation": 2, "padding_mode": "circular"},
            {"padding": 1, "groups": 2},
            {"padding": "valid", "padding_mode": "replicate"},
        ],
    )
    @pytest.mark.parametrize("axes", [2, 3])
    def test_is_the_convolution_of_the_pairs(self, axes: int, settings: dict[str, Any]) -> None:
        cross_conv, conv = ((CrossConv2d, nn.Conv2d), (CrossConv3d, nn.Conv3d))[axes - 2]
        ours = cross_conv((3, 5), 4, 3, **settings, dtype=F64)
        plain = conv(8, 4, 3, **settings, dtype=F64)
        assert [(n, p.shape) for n, p in ours.state_dict().items()] == [
            (n, p.shape) for n, p in plain.state_dict().items()
        ]
        plain.load_state_dict(ours.state_dict())
        x, y = rand(2, 2, 3, *(7, 6, 5)[:axes]), rand(2, 3, 5, *(7, 6, 5)[:axes], seed=1)

        def reference(x: Tensor, y: Tensor) -> Tensor:
            pairs = self.pairs(x, y)
            return plain(pairs.flatten(0, 2)).unflatten(0, pairs.shape[:3])

        equal_with_gradients(ours, reference, [x, y])
        parameters_equal(ours, plain)
        equal_with_gradients(ours.mean, lambda x, y: reference(x, y).mean(2), [x, y])

    def test_published_weights_load(self) -> None:
        with np.load(Path(__file__).parent / "data" / "universeg_8.npz", allow_pickle=False) as file:
            prefix = "weight/enc_blocks.1.cross.cross_conv."
            state = {n.removeprefix(prefix): torch.from_numpy(file[n]) for n in file.files if n.startswith(prefix)}
        out_channels, channels, *kernel = state["weight"].shape
        module = CrossConv2d(channels // 2, out_channels, tuple(kernel), padding=1)
        module.load_state_dict(state)
        assert sorted(state) == sorted(module.state_dict())

    def test_constructor(self) -> None:
        assert CrossConv2d(4, 6, 3).weight.shape == (6, 8, 3, 3)
        assert CrossConv3d(in_channels=(1, 2), out_channels=6, kernel_size=1, padding=0).weight.shape == (6, 3, 1, 1, 1)
        assert CrossConv2d(2, 2, 3, padding=1, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
        assert "padding=(1, 1)" in repr(CrossConv2d(2, 2, 3, padding=1))

    @pytest.mark.parametrize("axes", [2, 3])
    def test_compiles(self, axes: int) -> None:
        module = (CrossConv2d, CrossConv3d)[axes - 2]((2, 3), 4, 3, padding=1, dtype=F64)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        equal_with_gradients(compiled, module, [rand(1, 1, 2, *(4,) * axes), rand(1, 2, 3, *(4,) * axes)])

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("axes", [2, 3])
    def test_empty_sets(self, axes: int, groups: int) -> None:
        conv = (CrossConv2d, CrossConv3d)[axes - 2](2, 4, 3, padding=1, groups=groups)
        image = (5, 4, 6)[:axes]
        for b, sx, sy in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
            x, y = torch.rand(b, sx, 2, *image, requires_grad=True), torch.rand(b, sy, 2, *image)
            out = conv(x, y)
            assert out.shape == (b, sx, sy, 4, *image)
            out.sum().backward()
            assert not x.grad.any()
        assert conv.mean(torch.rand(1, 0, 2, *image), torch.rand(1, 3, 2, *image)).shape == (1, 0, 4, *image)
        with pytest.raises(
            ValueError, match=r"y must hold at least one (image|volume) to take the mean of, got Sy = 0"
        ):
            conv.mean(torch.rand(1, 2, 2, *image), torch.rand(1, 0, 2, *image))

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="x and y must have 4 channels between them, got 2 and 1"):
            CrossConv2d(2, 4, 3)(torch.rand(1, 2, 2, 8, 8), torch.rand(1, 2, 1, 8, 8))
        with pytest.raises(TypeError, match=r"in_channels must be an integer of at least 0 or a pair of them, got"):
            CrossConv2d(2.5, 4, 3)
        with pytest.raises(ValueError, match=r"x must have shape \[B, Sx, Cx, H, W\]"):
            CrossConv2d(2, 4, 3)(torch.rand(2, 2, 8, 8), torch.rand(1, 2, 2, 8, 8))
        volume = torch.rand(1, 2, 2, 4, 4, 4)
        conv = CrossConv3d(2, 4, 3)
        with pytest.raises(ValueError, match=r"x must have shape \[B, Sx, Cx, D, H, W\], got \[2, 2, 4, 4, 4\]"):
            conv(volume[0], volume)
        with pytest.raises(ValueError, match=r"y must have shape .* with B, D, H, W = 1, 4, 4, 4"):
            conv(volume, volume[..., :3])
        with pytest.raises(ValueError, match="x and y must have 4 channels between them, got 2 and 1"):
            conv(volume, volume[:, :, :1])
        with pytest.raises(ValueError, match="y must hold at least one volume"):
            conv.mean(volume, volume[:, :0])


def restricted(index: Tensor, nk: int) -> Tensor:
    """A list of keys without repetitions as a mask, True where attention is allowed: [B, 1, 1, Nk]."""
    allowed = torch.zeros(index.shape[0], nk + 1, dtype=torch.bool)
    allowed.scatter_(1, torch.where((index < 0) | (index >= nk), nk, index), True)
    return allowed[:, None, None, :nk]


class TestFunctional:
    INDEX = torch.tensor([[5, 0, 3, -1], [2, 99, 1, 6]])

    @staticmethod
    def tokens() -> list[Tensor]:
        return [rand(2, 3, 4, 6), rand(2, 3, 7, 6, seed=1), rand(2, 3, 7, 2, seed=2)]

    @pytest.mark.parametrize("scale", [None, 0.7])
    @pytest.mark.parametrize("masked", ["nothing", "causal", "bool", "float"])
    def test_without_a_list_is_torchs(self, scale: float | None, masked: str) -> None:
        causal = masked == "causal"
        mask = {"bool": rand(2, 1, 4, 7, seed=4) > -1, "float": rand(4, 7, seed=4)}.get(masked)
        equal_with_gradients(
            lambda *t: scaled_dot_product_attention(*t, mask, is_causal=causal, scale=scale),
            lambda *t: F.scaled_dot_product_attention(*t, mask, is_causal=causal, scale=scale),
            self.tokens(),
        )

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_of_a_list_is_torchs_under_a_mask(self, masked: bool, biased: bool) -> None:
        allowed = restricted(self.INDEX, 7)
        mask, bias = rand(4, 7, seed=4), rand(2, 7, seed=5)

        def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            scores = torch.zeros(2, 1, 4, 7, dtype=F64).masked_fill(~allowed, -torch.inf)
            scores = scores + mask if masked else scores
            return F.scaled_dot_product_attention(q, k, v, scores + bias[:, None, None] * biased)

        def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return scaled_dot_product_attention(
                q, k, v, mask if masked else None, index=self.INDEX, key_bias=bias if biased else bias * 0
            )

        equal_with_gradients(ours, reference, [*self.tokens(), bias])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_biased_errors_are_torchs(self, dtype: torch.dtype) -> None:
        """Against float64, no more than a little above those of torch's attention under a mask."""
        shapes = ((2, 3, 40, 32), (2, 3, 60, 32), (2, 3, 60, 16), (2, 60))
        tokens = [rand(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
        index = torch.arange(0, 60, 3).expand(2, -1)
        allowed = restricted(index, 60)

        def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            mask = bias[:, None, None].masked_fill(~allowed, -torch.inf).expand(2, 1, 40, 60)
            return F.scaled_dot_product_attention(q, k, v, mask)

        def gradients(run: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in given]
            out = run(*leaves)
            return [out, *torch.autograd.grad(out.double().square().sum(), leaves)]

        exact = gradients(masked, [x.double() for x in tokens])
        ours = gradients(lambda *t: scaled_dot_product_attention(*t[:3], index=index, key_bias=t[3]), tokens)
        theirs = gradients(masked, tokens)
        for mine, other, true in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == dtype
            slack = torch.finfo(dtype).eps * true.abs().max()
            assert (mine - true).abs().max() <= 1.5 * (other - true).abs().max() + slack

    @pytest.mark.parametrize(
        ("batch", "queries", "keys", "listed"), [(0, 4, 7, 3), (2, 0, 7, 3), (2, 4, 0, 3), (2, 4, 7, 0), (2, 4, 0, 0)]
    )
    def test_nothing_to_attend_to_gives_zero(self, batch: int, queries: int, keys: int, listed: int) -> None:
        q, k, v = torch.rand(batch, 2, queries, 4), torch.rand(batch, 2, keys, 4), torch.rand(batch, 2, keys, 5)
        for mask in (None, torch.ones(queries, keys, dtype=torch.bool)):
            for index in (None, torch.full((batch, listed), 1), torch.full((batch, 1, listed), -1)):
                out = scaled_dot_product_attention(q, k, v, mask, index=index)
                assert out.shape == (batch, 2, queries, 5)
                assert not out.isnan().any()
                if keys == 0 or (index is not None and (index.ndim == 3 or listed == 0)):
                    assert not out.any()

    @pytest.mark.parametrize("index", [None, torch.tensor([[1, 2], [0, 6]])])
    def test_a_query_with_all_masked_gives_zero_and_no_gradient(self, index: Tensor | None) -> None:
        q, k, v = (t.requires_grad_() for t in self.tokens())
        mask = torch.arange(4)[:, None].expand(4, 7) != 2
        out = scaled_dot_product_attention(q, k, v, mask, index=index)
        assert not out[:, :, 2].any()
        out.square().sum().backward()
        assert not q.grad[:, :, 2].any()
        assert all(t.grad.isfinite().all() for t in (q, k, v))
        expected = scaled_dot_product_attention(q, k, v, index=index)
        close(out[:, :, [0, 1, 3]], expected[:, :, [0, 1, 3]])

    @pytest.mark.parametrize("sink", [False, True])
    def test_both_ways_agree_on_groups_repetitions_and_empty_lists(self, sink: bool) -> None:
        """A mask that allows all takes torch's attention over gathered keys; none takes the op."""
        index = torch.tensor([[[1, 1, 4], [-1, 7, -5]], [[6, 0, -1], [2, 2, 2]]])
        everything = torch.ones(4, 7, dtype=torch.bool)
        equal_with_gradients(
            lambda *t: scaled_dot_product_attention(*t, everything, index=index, sink=sink),
            lambda *t: scaled_dot_product_attention(*t, index=index, sink=sink),
            self.tokens(),
        )
        if not sink:
            assert not scaled_dot_product_attention(*self.tokens(), everything, index=index)[0, :, 2:].any()

    def test_three_axes_and_shared_heads(self) -> None:
        q, k, v = self.tokens()
        close(
            scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], index=self.INDEX),
            scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1], index=self.INDEX)[:, 0],
        )
        mask = rand(2, 4, 7) > 0
        close(
            scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], mask | (torch.arange(7) == 3)),
            F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], mask | (torch.arange(7) == 3)),
        )
        close(
            scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
            F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        )

    @pytest.mark.parametrize("masked", ["nothing", "causal", "bool", "float", "keys"])
    @pytest.mark.parametrize(
        ("query", "key", "value"),
        [
            ((), (), ()),
            ((3,), (3,), (3,)),
            ((2, 3), (1, 3), (1, 3)),
            ((2, 3), (2, 1), (2, 3)),
            ((1, 3), (2, 3), (2, 3)),
            ((2, 3, 2), (2, 3, 2), (2, 3, 2)),
            ((2, 3, 2), (2, 1, 2), (2, 1, 2)),
        ],
    )
    def test_axes_in_front_are_torchs(
        self, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], masked: str
    ) -> None:
        tokens = [rand(*query, 4, 6), rand(*key, 7, 6, seed=1), rand(*value, 7, 2, seed=2)]
        causal = masked == "causal"
        masks = {"bool": rand(4, 7, seed=4) > -1, "float": rand(*query, 4, 7, seed=4), "keys": rand(1, 7, seed=4)}
        equal_with_gradients(
            lambda *t: scaled_dot_product_attention(*t, masks.get(masked), is_causal=causal),
            lambda *t: F.scaled_dot_product_attention(*t, masks.get(masked), is_causal=causal),
            tokens,
        )

    @pytest.mark.parametrize("masked", [False, True])
    def test_axes_in_front_with_a_list(self, masked: bool) -> None:
        q, k, v = rand(2, 3, 2, 4, 6), rand(2, 3, 2, 7, 6, seed=1), rand(2, 1, 2, 7, 2, seed=2)
        mask = rand(3, 1, 4, 7, seed=3) if masked else None
        bias = rand(2, 7, seed=4)
        expected = scaled_dot_product_attention(
            *(t.expand(2, 3, 2, -1, -1).flatten(1, 2) for t in (q, k, v)),
            None if mask is None else mask.expand(3, 2, -1, -1).flatten(0, 1),
            index=self.INDEX,
            key_bias=bias,
        )
        found = scaled_dot_product_attention(q, k, v, mask, index=self.INDEX, key_bias=bias)
        close(found, expected.unflatten(1, (3, 2)))
        mask = None if mask is None else mask[0, 0]
        close(
            scaled_dot_product_attention(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], mask, index=self.INDEX[:1]),
            scaled_dot_product_attention(q[:1, 0, :1], k[:1, 0, :1], v[:1, 0, :1], mask, index=self.INDEX[:1])[0, 0],
        )

    def test_grouped_heads_in_the_last_but_two_axis(self) -> None:
        q, k, v = rand(6, 4, 8), rand(2, 7, 8, seed=1), rand(2, 7, 5, seed=2)
        equal_with_gradients(
            lambda *t: scaled_dot_product_attention(*t, enable_gqa=True),
            lambda *t: F.scaled_dot_product_attention(*t, enable_gqa=True),
            [q, k, v],
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_lowest_numbers_mask_as_in_torch(self, dtype: torch.dtype) -> None:
        """Also a row of nothing else."""
        q, k, v = (t.to(dtype) for t in self.tokens())
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(4, 7, dtype=dtype)
        mask[:, 4:], mask[2] = lowest, lowest
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), expected)
        index = torch.arange(7).expand(2, -1)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask, index=index), expected)
        bias = mask[:2].clone()
        bias[1, 5] = 0.5
        for scale in (1e-2, 1.0, 1e4):
            leaves = [t.detach().requires_grad_() for t in (q * 1e-2, k * 1e-2, v, bias)]
            for given in (None, index):
                out = scaled_dot_product_attention(*leaves[:3], key_bias=leaves[3], index=given, scale=scale)
                assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), leaves))
                few = scaled_dot_product_attention(*leaves[:3], index=index[:, :4], scale=scale)
                torch.testing.assert_close(out[0], few[0])
        out = scaled_dot_product_attention(q, k, v, key_bias=torch.full((2, 7), lowest, dtype=dtype))
        assert out.isfinite().all()

    def test_autocast_takes_every_dtype_that_torchs_does(self) -> None:
        q, k, v = (t.float() for t in self.tokens())
        mask, bias = rand(4, 7, seed=4).float(), rand(2, 7, seed=5).float()
        with torch.autocast("cpu", torch.bfloat16):
            expected = F.scaled_dot_product_attention(q.bfloat16(), k, v, mask)
            found = scaled_dot_product_attention(q.bfloat16(), k, v, mask)
            assert found.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(found, expected)
            biased = scaled_dot_product_attention(q, k, v, key_bias=bias)
            expected = F.scaled_dot_product_attention(q, k, v, bias[:, None, None].expand(-1, 1, 4, -1))
            torch.testing.assert_close(biased, expected, rtol=0.02, atol=0.02)

    def test_dropout(self) -> None:
        """Kept weights are doubled, so the mean over many values is that without dropout."""
        torch.manual_seed(0)
        q, k, v = torch.zeros(1, 1, 500, 4), torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)
        index = torch.tensor([[0, 3, 5, -1]])
        out = scaled_dot_product_attention(q, k, v, dropout_p=0.5, index=index)
        assert len(out.unique()) == 4  # 0 to 3 of the three keys
        assert out.mean() == pytest.approx(1, abs=0.1)

    def test_masks_as_values(self) -> None:
        """Distinct keys sharpened: each query reads the mask of its own key."""
        keys = torch.eye(5)[None]
        masks = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]])[..., None]
        index = torch.tensor([[3, 2, 1]])
        found = scaled_dot_product_attention(keys[:, 1:4], keys, masks, scale=100.0, index=index)
        torch.testing.assert_close(found, masks[:, 1:4])

    def test_bad_input(self) -> None:
        q, k, v = self.tokens()
        attend = scaled_dot_product_attention
        with pytest.raises(ValueError, match=r"key and value must have shape \[..., Nk, 6\] .* got \[2, 7, 6\]"):
            attend(q, k[:, 0], v)
        with pytest.raises(ValueError, match=r"key and value must have shape \[..., Nk, 6\] .* got \[2, 3, 7, 5\]"):
            attend(q, k[..., 1:], v, is_causal=True)
        with pytest.raises(ValueError, match=r"query must have shape \[..., N, D\], got \[6\]"):
            attend(q[0, 0, 0], k, v)
        with pytest.raises(TypeError, match="query, key and value must have one floating dtype"):
            attend(q, k.float(), v, is_causal=True)
        with pytest.raises(ValueError, match=r"dropout_p must be at most 1, got 1\.5"):
            attend(q, k, v, dropout_p=1.5)
        with pytest.raises(TypeError, match="scale must be a finite number, got '1'"):
            attend(q, k, v, is_causal=True, scale="1")
        with pytest.raises(TypeError, match=r"attn_mask must be a torch\.Tensor, got list"):
            attend(q, k, v, [[True]])
        with pytest.raises(ValueError, match=r"index must name G groups that divide Nq = 4, got shape \[2, 0, 3\]"):
            attend(q, k, v, is_causal=True, index=torch.zeros(2, 0, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="attn_mask must be None where is_causal is True"):
            attend(q, k, v, torch.ones(4, 7) > 0, is_causal=True)
        with pytest.raises(ValueError, match=r"attn_mask must broadcast to \[2, 3, 4, 7\], got \[4, 6\]"):
            attend(q, k, v, torch.ones(4, 6) > 0)
        with pytest.raises(TypeError, match=r"attn_mask must be bool or torch\.float64, as query is"):
            attend(q, k, v, torch.ones(4, 7))
        with pytest.raises(ValueError, match=r"key_bias must have shape \[B, Nk\] = \[2, 7\] and dtype torch.float64"):
            attend(q, k, v, key_bias=torch.ones(2, 6, dtype=F64))
        with pytest.raises(ValueError, match=r"scale must not be 0 with key_bias, got 0"):
            attend(q, k, v, key_bias=torch.ones(2, 7, dtype=F64), scale=0)
        with pytest.raises(ValueError, match=r"index must have shape \[B, M\] or \[B, G, M\]"):
            attend(q, k, v, torch.ones(4, 7) > 0, index=torch.zeros(3, 2, dtype=torch.int64))
        with pytest.raises(TypeError, match="index must be int32 or int64"):
            attend(q, k, v, torch.ones(4, 7) > 0, index=torch.zeros(2, 2))
        with pytest.raises(ValueError, match="key must have a number of heads that divides 3, got 2"):
            attend(q, k[:, :2], v[:, :2], enable_gqa=True)


E, HEADS, NQ, NK = 12, 3, 4, 7


def attentions(**settings: Any) -> tuple[SelectedAttention, nn.MultiheadAttention]:
    """Ours and torch's, of the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, "dtype": F64, **settings})
    for parameter in theirs.parameters():  # biases too
        nn.init.normal_(parameter, std=0.3)
    ours = SelectedAttention(E, HEADS, **{"batch_first": True, "dtype": F64, **settings})
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


class TestSelectedAttention:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"bias": False},
            {"add_bias_kv": True, "add_zero_attn": True},
            {"kdim": 5, "vdim": 9},
            {"batch_first": False, "add_zero_attn": True},
        ],
    )
    @pytest.mark.parametrize("masked", ["nothing", "padding", "float padding", "heads", "both"])
    def test_is_torchs(self, settings: dict[str, Any], masked: str) -> None:
        ours, theirs = attentions(**settings)
        inputs = [rand(2, NQ, E), rand(2, NK, ours.kdim, seed=1), rand(2, NK, ours.vdim, seed=2)]
        if not ours.batch_first:
            inputs = [x.transpose(0, 1).contiguous() for x in inputs]
        padding = torch.arange(NK) >= torch.tensor([[5], [3]])
        attn_mask = rand(2 * HEADS, NQ, NK, seed=3)
        masks: dict[str, Any] = {
            "nothing": {},
            "padding": {"key_padding_mask": padding},
            "float padding": {"key_padding_mask": rand(2, NK, seed=4).masked_fill(padding, -torch.inf)},
            "heads": {"attn_mask": attn_mask},
            "both": {"key_padding_mask": padding, "attn_mask": (attn_mask[0] > 0) & (torch.arange(NK) > 0)},
        }[masked]
        equal_with_gradients(
            lambda *t: ours(*t, need_weights=False, **masks)[0],
            lambda *t: theirs(*t, need_weights=False, **masks)[0],
            inputs,
        )
        parameters_equal(ours, theirs)

    def test_self_attention_unbatched_and_causal(self) -> None:
        ours, theirs = attentions()
        x = rand(NQ, E)
        ours.selection = SelectByIndex()
        close(ours(x, x, x, select=torch.arange(NQ))[0], theirs(x, x, x)[0])
        ours.selection = None
        causal = nn.Transformer.generate_square_subsequent_mask(NQ, dtype=F64)
        close(ours(x, x, x)[0], theirs(x, x, x)[0])
        close(
            ours(x, x, x, attn_mask=causal, is_causal=True)[0],
            theirs(x, x, x, need_weights=False, attn_mask=causal, is_causal=True)[0],
        )
        padding = torch.tensor([False, True, False, False])
        close(ours(x, x, x, padding)[0], theirs(x, x, x, padding)[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("where", ["padding", "mask", "both"])
    def test_lowest_numbers_mask_as_in_torch(self, where: str, dtype: torch.dtype) -> None:
        """As Hugging Face's models have them; the second image, or a query, is masked as a whole."""
        ours, theirs = attentions(dtype=dtype)
        q, k = rand(2, NQ, E).to(dtype), rand(2, NK, E, seed=1).to(dtype)
        lowest = torch.finfo(dtype).min
        padding = torch.zeros(2, NK, dtype=dtype)
        padding[0, 4:], padding[1] = lowest, lowest
        mask = torch.zeros(NQ, NK, dtype=dtype)
        mask[:, :2], mask[1] = lowest, lowest
        given: dict[str, Any] = {
            "padding": (padding, None),
            "mask": (None, mask),
            "both": (padding[:1].expand(2, -1), mask),
        }
        call = dict(zip(("key_padding_mask", "attn_mask"), given[where], strict=True))
        found = ours(q, k, k, **call)[0]
        assert found.isfinite().all()
        expected = theirs(q, k, k, **call, need_weights=False)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=max(5 * torch.finfo(dtype).eps, 1e-5))
        if where != "both":
            with torch.autocast("cpu", torch.bfloat16):  # a lowest float32 is -inf there
                assert ours(q, k, k, **call)[0].isfinite().all()

    def test_lowest_numbers_are_padding_to_a_selection(self) -> None:
        ours, theirs = attentions()
        ours.selection = SelectByMask(3)
        q, k = rand(2, NQ, E), rand(2, NK, E, seed=1)
        padding = torch.zeros(2, NK, dtype=F64)
        padding[:, :3], padding[:, 3] = torch.finfo(F64).min, 0.5
        allowed = (torch.arange(NK) >= 3) & (torch.arange(NK) < 6)
        mask = padding.masked_fill(~allowed, -torch.inf)
        close(ours(q, k, k, padding)[0], theirs(q, k, k, mask, need_weights=False)[0])

    @pytest.mark.parametrize("add", [False, True])
    @pytest.mark.parametrize("biased", [False, True])
    def test_selected_keys_under_masks(self, biased: bool, add: bool) -> None:
        """Fewer keys are projected than there are; what is added to their scores goes with them."""
        ours, theirs = attentions(add_bias_kv=add, add_zero_attn=add, kdim=5)
        score, padding = rand(2, NK, seed=8), rand(2, NK, seed=9)
        padding[0, 2] = -torch.inf
        allowed = score.masked_fill(padding == -torch.inf, -torch.inf)
        allowed = allowed >= allowed.topk(3).values[:, -1:]
        ours.selection = SelectByScore(3, biased=biased, gumbel=False)
        inputs = [
            rand(2, NQ, E),
            rand(2, NK, 5, seed=1),
            rand(2, NK, E, seed=2),
            rand(2 * HEADS, NQ, NK, seed=3),
            score,
        ]

        def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, score: Tensor) -> Tensor:
            bias = (padding + score * biased).masked_fill(~allowed, -torch.inf)
            return theirs(q, k, v, bias, need_weights=False, attn_mask=mask)[0]

        equal_with_gradients(
            lambda q, k, v, mask, score: ours(q, k, v, padding, attn_mask=mask, select=score)[0] + 0 * score.sum(),
            reference,
            inputs,
        )
        parameters_equal(ours, theirs)

    def test_a_key_listed_twice_counts_twice(self) -> None:
        ours, theirs = attentions()
        ours.selection = SelectByIndex()
        twice = torch.tensor([[1, 1, 4], [2, 0, 0]])
        equal_with_gradients(
            lambda q, k: ours(q, k, k, select=twice)[0],
            lambda q, k: theirs(q, *(k[torch.arange(2)[:, None], twice],) * 2, need_weights=False)[0],
            [rand(2, NQ, E), rand(2, NK, E, seed=1)],
        )

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_projects_once_and_only_what_is_read(self, batch_first: bool) -> None:
        ours, _ = attentions(batch_first=batch_first)
        q, k = (x if batch_first else x.transpose(0, 1) for x in (rand(2, NQ, E), rand(2, NK, E, seed=1)))

        def products(*tokens: Tensor, **call: Any) -> list[int]:
            """Elements of the results of all matrix products."""
            found = []

            class Watch(TorchFunctionMode):
                def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                    out = function(*args, **(kwargs or {}))
                    if function is F.linear:
                        found.append(out.numel() // 2 // E)
                    return out

            with Watch():
                ours(*tokens, **call)
            return found

        assert products(k, k, k) == [3 * NK, NK]
        assert sorted(products(q, k, k)) == sorted([NQ, 2 * NK, NQ])
        assert sorted(products(q, k, k.clone())) == sorted([NQ, NK, NK, NQ])
        ours.selection = SelectByMask(2)
        assert sorted(products(q, k, k)) == sorted([NQ, 2 * 2, NQ])
        assert sorted(products(k, k, k)) == sorted([NK, 2 * 2, NK])

    def test_parameters_are_drawn_anew_copied_and_pickled(self) -> None:
        ours = SelectedAttention(E, HEADS, add_bias_kv=True, batch_first=True, selection=SelectByScore(2, features=E))
        ours.eval()
        x = torch.rand(2, NK, E)
        before = ours(x, x, x)[0]
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
            assert torch.equal(other(x, x, x)[0], before)
        for settings in ({}, {"kdim": 5}):
            torch.manual_seed(0)
            ours, theirs = SelectedAttention(E, HEADS, **settings), nn.MultiheadAttention(E, HEADS, **settings)
            for module in (ours, theirs):
                torch.manual_seed(1)
                module._reset_parameters()
            assert all(
                torch.equal(p, theirs.state_dict()[name]) for name, p in ours.state_dict().items() if "out" not in name
            )

    def test_state_dict_round_trip(self) -> None:
        ours, theirs = attentions(add_bias_kv=True, kdim=5)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        learned = SelectedAttention(E, HEADS, selection=SelectByScore(2, features=E))
        assert set(learned.state_dict()) - set(nn.MultiheadAttention(E, HEADS).state_dict()) == {
            "selection.score.weight"
        }

    @pytest.mark.parametrize("add", [False, True])
    @pytest.mark.parametrize("policy", ["mask", "score", "index"])
    def test_policies_are_torchs_under_a_mask(self, policy: str, add: bool) -> None:
        score = rand(2, NK, seed=8)
        padding = torch.arange(NK) >= torch.tensor([[NK], [5]])
        allowed = score.masked_fill(padding, -torch.inf)
        allowed = allowed >= allowed.topk(3).values[:, -1:]
        selection, select = {
            "mask": (SelectByMask(4), allowed),
            "score": (SelectByScore(3), score),
            "index": (SelectByIndex(), score.masked_fill(padding, -torch.inf).topk(3).indices),
        }[policy]
        ours, theirs = attentions(add_bias_kv=add, add_zero_attn=add)
        ours.selection = selection
        ours.eval(), theirs.eval()
        inputs = [rand(2, NQ, E), rand(2, NK, E, seed=1), rand(2, NK, E, seed=2)]
        equal_with_gradients(
            lambda *t: ours(*t, padding, select=select)[0],
            lambda *t: theirs(*t, ~allowed, need_weights=False)[0],
            inputs,
        )

    def test_padding_takes_listed_keys_away(self) -> None:
        ours, theirs = attentions()
        ours.selection = SelectByIndex()
        q, k = rand(2, NQ, E), rand(2, NK, E, seed=1)
        padding = torch.zeros(2, NK, dtype=torch.bool)
        padding[:, 2] = True
        allowed = torch.zeros(2, NK, dtype=torch.bool)
        allowed[:, [1, 4]] = True
        index = torch.tensor([[4, 2, 1, NK], [1, 4, 2, -1]])
        close(ours(q, k, k, padding, select=index)[0], theirs(q, k, k, ~allowed)[0])

    def test_an_index_past_the_keys_is_not_the_extra_key(self) -> None:
        ours, _ = attentions(add_bias_kv=True)
        ours.selection = SelectByIndex()
        q, k = rand(2, NQ, E), rand(2, NK, E, seed=1)
        past, none = torch.tensor([[0, NK], [NK + 1, 3]]), torch.tensor([[0, -1], [-1, 3]])
        close(ours(q, k, k, select=past)[0], ours(q, k, k, select=none)[0])

    def test_learned_score_learns(self) -> None:
        """Values of the keys with a positive first feature are wanted: the score comes to select those."""
        torch.manual_seed(0)
        attention = SelectedAttention(8, 1, batch_first=True, selection=SelectByScore(4, features=8))
        optimiser = torch.optim.Adam(attention.parameters(), 3e-2)
        keys = torch.randn(16, 12, 8)
        wanted = (keys * (keys[..., :1] > 0)).sum(1, keepdim=True) / (keys[..., :1] > 0).sum(1, keepdim=True)
        losses = []
        for _ in range(60):
            loss = F.mse_loss(attention(keys[:, :1], keys, keys)[0], wanted)
            optimiser.zero_grad()
            loss.backward()
            assert attention.selection.score.weight.grad.abs().sum() > 0
            optimiser.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10])

    def test_all_keys_under_a_learned_score_are_biased_attention(self) -> None:
        """The score is added to the attention scores."""
        ours, theirs = attentions()
        ours.selection = SelectByScore(NK, features=E).double()
        q, k = rand(2, NQ, E), rand(2, NK, E, seed=1)
        bias = ours.selection.score(k).squeeze(-1).detach()
        close(ours(q, k, k)[0], theirs(q, k, k, bias, need_weights=False)[0])

    def test_draws_in_training_and_the_best_in_evaluation(self) -> None:
        policy, keys = SelectByScore(1), torch.zeros(4000, 3, 2)
        score = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)
        torch.manual_seed(0)
        drawn = policy(keys, score, None).rows.flatten().bincount(minlength=3) / 4000
        torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.03)
        policy.eval()
        assert not policy(keys, score, None).rows.any()
        assert not SelectByScore(1, gumbel=False)(keys, score, None).rows.any()

    def test_lists(self) -> None:
        mask = torch.tensor([[True, False, True, True], [False, False, False, True], [False] * 4])
        assert listed(mask, 2).tolist() == [[0, 2], [3, -1], [-1, -1]]
        assert listed(mask).tolist() == [[0, 2, 3, -1], [3, -1, -1, -1], [-1] * 4]
        assert listed(mask, 9).shape == (3, 4)
        assert SelectByMask()(torch.zeros(3, 4, 2), mask[:, None].expand(3, 2, 4), None).rows.shape == (3, 2, 4)
        grouped = SelectByScore(2).eval()(
            torch.zeros(1, 3, 2), torch.tensor([[[1.0, 3.0, 2.0], [3.0, 2.0, 1.0]]]), None
        )
        assert grouped.rows.tolist() == [[[1, 2], [0, 1]]]
        few = SelectByScore(3)(torch.zeros(1, 3, 2), torch.tensor([[0.0, -torch.inf, 1.0]]), None)
        assert sorted(few.rows[0].tolist()) == [-1, 0, 2]

    def test_in_torchs_layers(self) -> None:
        """Also in evaluation without gradients, where torch's layer fuses its own attention."""
        layer = nn.TransformerEncoderLayer(E, 2, 16, 0.0, batch_first=True, dtype=F64).eval()  # fused for even heads
        x = rand(2, NK, E)
        padding = torch.arange(NK) >= torch.tensor([[5], [3]])
        with torch.no_grad():
            expected = layer(x), layer(x, src_key_padding_mask=padding)
            attention = SelectedAttention(E, 2, batch_first=True, dtype=F64)
            attention.load_state_dict(layer.self_attn.state_dict())
            layer.self_attn = attention
            close(layer(x), expected[0])
            close(layer(x, src_key_padding_mask=padding)[~padding], expected[1][~padding])
            attention.selection = SelectByMask(2)
            assert (layer(x) - expected[0]).abs().max() > 1e-3
        decoder = nn.TransformerDecoderLayer(E, HEADS, 16, 0.0, batch_first=True, dtype=F64).eval()
        causal = nn.Transformer.generate_square_subsequent_mask(NQ, dtype=F64)
        call = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding}
        expected_decoded = decoder(x[:, :NQ], x, **call)
        for name in ("self_attn", "multihead_attn"):
            attention = SelectedAttention(E, HEADS, batch_first=True, dtype=F64)
            attention.load_state_dict(getattr(decoder, name).state_dict())
            setattr(decoder, name, attention)
        close(decoder(x[:, :NQ], x, **call), expected_decoded)

    def test_in_torchs_encoder_without_nested_tensors(self) -> None:
        layer = nn.TransformerEncoderLayer(E, 2, 16, 0.0, batch_first=True, dtype=F64)
        encoder, x = nn.TransformerEncoder(layer, 2).eval(), rand(2, NK, E)
        padding = torch.arange(NK) >= torch.tensor([[NK], [3]])
        expected = encoder(x, src_key_padding_mask=padding)
        for inside in encoder.layers:
            attention = SelectedAttention(E, 2, batch_first=True, dtype=F64)
            attention.load_state_dict(inside.self_attn.state_dict())
            inside.self_attn = attention.eval()
        encoder.use_nested_tensor = False
        with torch.no_grad():
            close(encoder(x, src_key_padding_mask=padding)[~padding], expected[~padding])

    def test_dropout_only_in_training(self) -> None:
        ours, theirs = attentions(dropout=0.5)
        q, k = rand(2, NQ, E), rand(2, NK, E, seed=1)
        assert (ours(q, k, k)[0] - ours(q, k, k)[0]).abs().max() > 0
        ours.eval(), theirs.eval()
        close(ours(q, k, k)[0], theirs(q, k, k)[0])

    def test_autocast(self) -> None:
        ours, _ = attentions(dtype=torch.float32)
        ours.selection = SelectByMask(3)
        q, k = rand(2, NQ, E).float(), rand(2, NK, E, seed=1).float()
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(q, k, k)[0]
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), ours(q, k, k)[0], rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("masked", ["padding", "float padding", "mask", "both"])
    def test_autocast_is_torchs(self, masked: str) -> None:
        ours, theirs = attentions(dtype=torch.float32, add_bias_kv=True)
        q, k = rand(2, NQ, E).float(), rand(2, NK, E, seed=1).float()
        padding = torch.arange(NK) >= torch.tensor([[5], [3]])
        float_padding = torch.zeros(2, NK).masked_fill(padding, -torch.inf)
        mask = rand(NQ, NK, seed=3).float()
        call: dict[str, Any] = {
            "padding": {"key_padding_mask": padding},
            "float padding": {"key_padding_mask": float_padding},
            "mask": {"attn_mask": mask},
            "both": {"key_padding_mask": float_padding, "attn_mask": mask},
        }[masked]
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = ours(q, k, k, **call)[0], theirs(q, k, k, need_weights=False, **call)[0]
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("masked", [False, True])
    def test_compiles_with_masks(self, masked: bool) -> None:
        ours, _ = attentions(add_bias_kv=True)
        ours.selection = SelectByScore(3, features=E).double()
        ours.eval()
        padding = rand(2, NK, seed=4).masked_fill(rand(2, NK, seed=5) > 1, -torch.inf)
        mask = rand(NQ, NK, seed=6) if masked else None
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        equal_with_gradients(
            lambda *t: compiled(*t, padding, attn_mask=mask)[0],
            lambda *t: ours(*t, padding, attn_mask=mask)[0],
            [rand(2, NQ, E), rand(2, NK, E, seed=1), rand(2, NK, E, seed=2)],
        )

    @pytest.mark.parametrize(
        ("selection", "select"),
        [
            (None, None),
            (SelectByMask(3), rand(2, NK) > 0),
            (SelectByScore(3), rand(2, NK)),
            (SelectByScore(3, features=E), None),
            (SelectByIndex(), torch.tensor([[1, 2], [3, -1]])),
        ],
    )
    def test_compiles(self, selection: nn.Module | None, select: Tensor | None) -> None:
        ours, _ = attentions()
        ours.selection = None if selection is None else selection.double()
        ours.eval()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        equal_with_gradients(
            lambda *t: compiled(*t, select=select)[0],
            lambda *t: ours(*t, select=select)[0],
            [rand(2, NQ, E), rand(2, NK, E, seed=1), rand(2, NK, E, seed=2)],
        )

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_bad_input(self) -> None:
        attention = SelectedAttention(E, HEADS, batch_first=True)
        q, k = torch.rand(2, NQ, E), torch.rand(2, NK, E)
        with pytest.raises(TypeError, match="selection must be a Selection or None, got 3"):
            SelectedAttention(E, HEADS, selection=3)
        with pytest.raises(TypeError, match=r"query must be a dense tensor, got a nested one \(torch.nn.Transformer"):
            attention(*(torch.nested.nested_tensor([torch.rand(3, E), torch.rand(4, E)]),) * 3)
        with pytest.raises(NotImplementedError, match="need_weights must be False"):
            attention(q, k, k, need_weights=True)
        with pytest.raises(ValueError, match="attn_mask must be given where is_causal is True"):
            attention(q, k, k, is_causal=True)
        with pytest.raises(ValueError, match="select must be None without a selection, got Tensor"):
            attention(q, k, k, select=k)
        with pytest.raises(ValueError, match=r"key must have shape \[B, N, E\] with E = 12, got \[2, 7, 11\]"):
            attention(q, k[..., 1:], k)
        with pytest.raises(ValueError, match=r"key and value must have the batch of query, 2, and one length"):
            attention(q, k, k[:, 1:])
        with pytest.raises(ValueError, match=r"key_padding_mask must have shape \[B, Nk\] = \[2, 7\], got \[2, 4\]"):
            attention(q, k, k, torch.ones(2, 4) > 0)
        with pytest.raises(TypeError, match="key_padding_mask must be bool, True for padding, or floating-point"):
            attention(q, k, k, torch.ones(2, 7, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"key_padding_mask must be a torch\.Tensor, got list"):
            attention(q[0], k[0], k[0], [False] * 7)
        with pytest.raises(TypeError, match="attn_mask must be bool, True for a key not to attend to, or floating"):
            attention(q, k, k, attn_mask=torch.ones(4, 7, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"attn_mask must have shape \[Nq, Nk\] or \[B \* h, Nq, Nk\]"):
            attention(q, k, k, attn_mask=torch.ones(2, 4, 7) > 0)
        for selection, select, error, message in (
            (SelectByMask(), torch.ones(2, 3) > 0, ValueError, r"mask must have shape \[B, N\] or \[B, G, N\]"),
            (SelectByMask(), torch.ones(2, NK), TypeError, "mask must be bool, .*, got torch.float32"),
            (SelectByScore(2, features=5), None, ValueError, "keys must have the 5 features of the learned .* got 12"),
            (
                SelectByIndex(),
                torch.zeros(3, 2).long(),
                ValueError,
                r"index must have shape .* with B = 2, got \[3, 2\]",
            ),
            (returning(torch.zeros(2, 2)), None, TypeError, "selection must return a Selected, got Tensor"),
            (
                returning(Selected(torch.zeros(2, 2))),
                None,
                TypeError,
                "rows of the selection must be int32 or int64, got torch.float32",
            ),
            (
                returning(Selected(torch.zeros(2, 2).long(), torch.ones(2, 2))),
                None,
                ValueError,
                r"bias of the selection must have shape \[B, N\] = \[2, 7\], got \[2, 2\]",
            ),
            (SelectByScore(2), None, ValueError, "score must be given with the call, got None"),
            (
                SelectByScore(2, features=E),
                torch.ones(2, NK),
                ValueError,
                "score must not be given where it is learned",
            ),
            (SelectByScore(2), torch.ones(2, NK) > 0, TypeError, "score must be a floating-point tensor"),
            (SelectByScore(2, biased=True), torch.ones(2, 2, NK), ValueError, r"score must have shape \[B, N\] where"),
            (SelectByIndex(), None, ValueError, "index must be given with the call, got None"),
            (SelectByIndex(), torch.ones(2, 2), TypeError, "index must be int32 or int64, got torch.float32"),
        ):
            attention.selection = selection
            with pytest.raises(error, match=message):
                attention(q, k, k, select=select)
        with pytest.raises(ValueError, match="k must be an integer of at least 0, got -1"):
            SelectByScore(-1)


def returning(found: Any) -> Selection:
    selection = Selection()
    selection.forward = lambda *_: found  # type: ignore[method-assign]
    return selection


class TestPatchModules:
    def test_are_the_ops(self) -> None:
        source, weights = rand(2, 3, 16, 20), rand(2, 1, 16, 20, seed=1)
        sampler = PatchSampler(5, 4, stride=2, padding=(1, 1), temperature=0.5, blur_sigma=1.0)
        call: dict[str, Any] = {"stride": 2, "padding": (1, 1), "temperature": 0.5, "blur_sigma": 1.0}
        drawn = sampler(weights, seed=3)
        assert torch.equal(drawn.coords, icseg_kernels.sample_patches(weights, 5, 4, seed=3, **call).coords)
        best = icseg_kernels.sample_patches(weights, 5, 4, noise=0.0, **call).coords
        assert not torch.equal(drawn.coords, best)
        torch.manual_seed(0)
        assert not torch.equal(sampler(weights).coords, best)
        assert torch.equal(sampler.eval()(weights).coords, best)
        patches = PatchGather(4)(source, drawn.coords)
        assert torch.equal(patches, icseg_kernels.gather_patches(source, drawn.coords, 4))
        small = PatchGather(4, out_size=2, alignment="published")(source, drawn.coords)
        expected = icseg_kernels.gather_patches(source, drawn.coords, 4, out_size=2, alignment="published")
        assert torch.equal(small, expected)
        for weight in (None, "gaussian", gaussian_weight(4) + 1):
            scattered = PatchScatter(weight=weight, fill=-2.0)(patches, drawn.coords, (16, 20))
            expected_scatter = icseg_kernels.scatter_patches(patches, drawn.coords, (16, 20), weight=weight, fill=-2.0)
            assert torch.equal(scattered.mean, expected_scatter.mean)
            assert torch.equal(scattered.coverage, expected_scatter.coverage)

    def test_gradients_through_all_three(self) -> None:
        image, weights = rand(1, 2, 8, 8).requires_grad_(), rand(1, 1, 8, 8).requires_grad_()
        drawn = PatchSampler(3, 4, differentiable=True)(weights, seed=0)
        patches = PatchGather(4)(image, drawn.coords) * drawn.weights[:, :, None, None, None]
        PatchScatter(weight="gaussian", fill=0.0)(patches, drawn.coords, (8, 8)).mean.square().sum().backward()
        assert image.grad.abs().sum() > 0
        assert weights.grad.abs().sum() > 0

    def test_hold_no_state(self) -> None:
        scatter = PatchScatter(weight=torch.ones(4, 4))
        modules = nn.Sequential(PatchSampler(1, 4), PatchGather(4), scatter)
        assert not modules.state_dict()
        assert "patch_size=4" in repr(modules)
        assert "weight=[4, 4]" in repr(modules)
        assert modules.to(torch.float64)[2].weight.dtype == torch.float64

    def test_compile(self) -> None:
        sampler, gather, scatter = PatchSampler(3, 4).eval(), PatchGather(4), PatchScatter(fill=0.0)

        def kept(image: Tensor, weights: Tensor) -> Tensor:
            coords = sampler(weights).coords
            return scatter(gather(image, coords), coords, (8, 8)).mean

        compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
        image, weights = rand(1, 2, 8, 8), rand(1, 1, 8, 8)
        assert torch.equal(compiled(image, weights), kept(image, weights))

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="patch_size must be an integer of at least 1, got 0"):
            PatchSampler(3, 0)
        with pytest.raises(ValueError, match="weight must be None, \"gaussian\" or a tensor, got 'flat'"):
            PatchScatter(weight="flat")
        with pytest.raises(ValueError, match="coords must have shape"):
            PatchGather(4)(torch.rand(1, 1, 8, 8), torch.zeros(2, 3, 2, dtype=torch.int64))


class Windowed(nn.Module):
    """A small network [N, C, p, p] -> [N, K, p, p]; counts the windows that it has seen."""

    def __init__(self, channels: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, classes, 3, padding=1)
        ).double()
        self.seen = 0

    def forward(self, windows: Tensor) -> Tensor:
        self.seen += len(windows)
        return self.layers(windows)


def sliding(network: nn.Module, image: Tensor, p: int, stride: int, weight: Tensor) -> Tensor:
    """Sliding-window inference as MONAI has it, a window at a time: smaller images are padded on both sides."""
    missing = [max(p - n, 0) for n in image.shape[2:]]
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
    height, width = image.shape[2:]
    image = F.pad(image, (left, right, top, bottom))
    total = norm = torch.zeros(())
    starts = [sorted({*range(0, n - p, stride), n - p}) for n in image.shape[2:]]
    for y in starts[0]:
        for x in starts[1]:
            logits = network(image[:, :, y : y + p, x : x + p])
            pad = (x, image.shape[3] - p - x, y, image.shape[2] - p - y)
            total, norm = total + F.pad(logits * weight, pad), norm + F.pad(weight, pad)
    return (total / norm)[:, :, top : top + height, left : left + width]


class TestPatchRouter:
    @pytest.mark.parametrize("weight", ["gaussian", None])
    @pytest.mark.parametrize(
        ("size", "stride"), [((16, 24), 8), ((19, 13), 5), ((8, 8), None), ((5, 6), 4), ((3, 21), 8)]
    )
    def test_all_windows_are_sliding_window_inference(
        self, size: tuple[int, int], stride: int | None, weight: str | None
    ) -> None:
        torch.manual_seed(0)
        network = Windowed()
        router = PatchRouter(network, k=None, patch_size=8, stride=stride, weight=weight, chunk=3).eval()
        pixel_weight = gaussian_weight(8, dtype=F64) if weight else torch.ones(8, 8, dtype=F64)
        found = router(rand(2, 2, *size))
        assert found.coverage.all()
        equal_with_gradients(
            lambda image: router(image).logits,
            lambda image: sliding(network, image, 8, stride or 4, pixel_weight),
            [rand(2, 2, *size)],
        )

    def test_takes_the_least_certain_windows_and_leaves_the_rest_coarse(self) -> None:
        """A coarse pass that is sure but for one quarter of the first image and another of the second."""
        image = rand(2, 1, 16, 16)
        coarse = torch.full((2, 1, 16, 16), 20.0, dtype=F64)
        coarse[0, :, 8:, :8] = 0.0
        coarse[1, :, :8, 8:] = 0.5
        network = Windowed(1, 1)
        router = PatchRouter(network, k=1, patch_size=8, stride=8, coarse=lambda_module(lambda _: coarse)).eval()
        out = router(image)
        assert out.coords.tolist() == [[[8, 0]], [[0, 8]]]
        assert out.coverage.sum() == 2 * 64
        assert torch.equal(out.coverage[:, 0], out.entropy[:, 0] > 0.1)
        assert torch.equal(out.coarse, coarse)
        assert torch.equal(out.logits[~out.coverage], coarse[~out.coverage])
        close(out.logits[:1, :, 8:, :8], network(image[:1, :, 8:, :8]))
        assert network.seen == 2 + 1

    def test_coarse_pass_of_the_network_itself(self) -> None:
        network, image = Windowed(), rand(1, 2, 16, 24)
        out = PatchRouter(network, k=0, patch_size=8, coarse_size=(4, 6))(image)
        expected = F.interpolate(network(F.avg_pool2d(image, 4)), (16, 24), mode="bilinear")
        close(out.logits, expected)
        assert not out.coverage.any()
        assert out.coords.shape == (1, 0, 2)

    def test_gradients(self) -> None:
        """They reach both networks and the image."""
        torch.manual_seed(0)
        network, coarse, image = Windowed(), Windowed(), rand(1, 2, 12, 12).requires_grad_()
        router = PatchRouter(network, k=2, patch_size=6, stride=6, coarse=coarse)
        out = router(image, seed=0)
        out.logits.square().sum().backward()
        for module in (network, coarse):
            assert all(p.grad.abs().sum() > 0 for p in module.parameters())
        assert image.grad.abs().sum() > 0
        assert not out.entropy.requires_grad

    def test_draws_in_training_in_proportion_to_entropy(self) -> None:
        logits = torch.zeros(3000, 2, 2, 4)
        logits[..., 2:] = torch.tensor([2.0, 0.0]).view(2, 1, 1)
        router = PatchRouter(nn.Identity(), k=1, patch_size=2, stride=2, coarse=nn.Identity())
        torch.manual_seed(0)
        first = (router(logits).coords[:, 0, 1] == 0).double().mean()
        entropy = prediction_entropy(logits[:1])[0, 0, 0, [0, 2]]
        assert first.item() == pytest.approx((entropy[0] / entropy.sum()).item(), abs=0.03)
        assert (router.eval()(logits).coords[:, 0, 1] == 0).all()

    def test_image_smaller_than_a_window(self) -> None:
        network = Windowed().double()
        image = rand(1, 2, 5, 6)
        out = PatchRouter(network, k=4, patch_size=8).eval()(image)
        assert out.coords.tolist() == [[[-1, -1]]]
        close(out.logits, network(F.pad(image, (1, 1, 1, 2)))[:, :, 1:6, 1:7])

    def test_nan_of_the_coarse_pass_is_not_looked_at(self) -> None:
        coarse = torch.full((1, 1, 4, 8), 3.0, dtype=F64)
        coarse[..., :4] = torch.nan
        router = PatchRouter(Windowed(1, 1), k=1, patch_size=4, stride=4, coarse=lambda_module(lambda _: coarse)).eval()
        out = router(rand(1, 1, 4, 8))
        assert out.coords.tolist() == [[[0, 4]]]
        assert out.logits[..., :4].isnan().all()
        assert not out.logits[..., 4:].isnan().any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_under_autocast_and_half_types(self, dtype: torch.dtype) -> None:
        """The same windows, and logits to the rounding of the type."""
        torch.manual_seed(0)
        network, image = Windowed().float(), rand(1, 2, 12, 20).float()
        coarse = lambda_module(lambda x: torch.cat([x, x[:, :1].square()], dim=1))
        router = PatchRouter(network, k=3, patch_size=6, coarse=coarse).eval()
        expected = router(image)
        with torch.autocast("cpu", dtype):
            found = router(image)
        assert torch.equal(found.coords, expected.coords)
        torch.testing.assert_close(found.logits.float(), expected.logits, rtol=0.05, atol=0.05)
        uncovered = ~found.coverage.expand_as(found.logits)
        assert torch.equal(found.logits[uncovered], found.coarse[uncovered])
        assert (found.coarse.dtype, found.entropy.dtype) == (torch.float32, torch.float32)
        network, image = network.to(dtype), image.to(dtype)
        own = PatchRouter(network, k=3, patch_size=6).eval()(image)
        assert (own.logits.dtype, own.coarse.dtype, own.entropy.dtype) == (dtype, dtype, torch.float32)

    def test_no_images_and_more_windows_than_there_are(self) -> None:
        router = PatchRouter(Windowed(), k=99, patch_size=6, stride=6)
        out = router(rand(0, 2, 12, 12).requires_grad_())
        assert (out.logits.shape, out.coords.shape, out.coverage.shape) == ((0, 3, 12, 12), (0, 4, 2), (0, 1, 12, 12))
        out = router(rand(1, 2, 12, 12))
        assert sorted(out.coords[0].tolist()) == [[0, 0], [0, 6], [6, 0], [6, 6]]
        assert out.coverage.all()

    def test_entropy(self) -> None:
        logits = rand(2, 4, 3, 3)
        p = logits.softmax(1)
        close(prediction_entropy(logits), -(p * p.log()).sum(1, keepdim=True))
        p = logits[:, :1].sigmoid()
        close(prediction_entropy(logits[:, :1]), -(p * p.log() + (1 - p) * (1 - p).log()))
        assert prediction_entropy(torch.full((1, 1, 1, 1), 1e4)).item() == 0

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_entropy_of_certain_predictions(self, dtype: torch.dtype) -> None:
        inf, most = torch.inf, torch.finfo(dtype).max
        rows = torch.tensor(
            [[0, 0, -inf], [inf, 0, -inf], [inf, inf, 0], [most, -most, -inf], [most, most, 0]], dtype=dtype
        )
        logits = rows[:, :, None, None].requires_grad_()
        entropy = prediction_entropy(logits)
        assert entropy.dtype == (F64 if dtype == F64 else torch.float32)
        expected = torch.tensor([2, 1, 2, 1, 2], dtype=entropy.dtype).log()
        torch.testing.assert_close(entropy.flatten(), expected)
        entropy.sum().backward()
        assert logits.grad.isfinite().all()
        sigmoid = torch.tensor([-inf, inf, most, 0], dtype=dtype).view(4, 1, 1, 1)
        torch.testing.assert_close(prediction_entropy(sigmoid).flatten(), expected[[1, 1, 1, 0]])

    def test_compiles(self) -> None:
        torch.manual_seed(0)
        network = Windowed()
        network.forward = network.layers.forward
        router = PatchRouter(network, k=2, patch_size=6, chunk=2).eval()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(router, fullgraph=True, backend=counter)
        equal_with_gradients(lambda x: compiled(x).logits, lambda x: router(x).logits, [rand(2, 2, 12, 12)])
        once = counter.frame_count
        for seed in range(3):
            assert torch.equal(
                compiled(rand(2, 2, 12, 12), seed=torch.tensor(seed)).coords,
                router(rand(2, 2, 12, 12), seed=seed).coords,
            )
        assert counter.frame_count == once + 1  # of a draw

    def test_bad_input(self) -> None:
        network = Windowed()
        with pytest.raises(ValueError, match="stride must be an integer from 1 to 8, got 9"):
            PatchRouter(network, k=1, patch_size=8, stride=9)
        with pytest.raises(ValueError, match="coarse_size must be None with a coarse network"):
            PatchRouter(network, k=1, patch_size=8, coarse=network, coarse_size=(4, 4))
        with pytest.raises(ValueError, match=r"image must have shape \[B, C, H, W\]"):
            PatchRouter(network, k=1, patch_size=8)(rand(2, 8, 8))
        with pytest.raises(ValueError, match=r"the coarse pass must return \[B, K, h, w\] with B = 2, got \[2, 8\]"):
            PatchRouter(network, k=1, patch_size=8, coarse=lambda_module(lambda x: x[:, 0, 0]))(rand(2, 2, 8, 8))
        with pytest.raises(ValueError, match=r"network must map windows to logits \[1, 2, 8, 8\]"):
            PatchRouter(network, k=1, patch_size=8, coarse=nn.Identity())(rand(1, 2, 8, 8))
        several = lambda_module(lambda x: [x, x])  # deep supervision
        with pytest.raises(TypeError, match=r"the output of the coarse pass must be a torch\.Tensor, got list"):
            PatchRouter(several, k=1, patch_size=8)(rand(1, 2, 8, 8))
        with pytest.raises(TypeError, match=r"the output of network must be a torch\.Tensor, got list"):
            PatchRouter(several, k=1, patch_size=8, coarse=nn.Identity())(rand(1, 2, 8, 8))


def lambda_module(function: Callable[[Tensor], Tensor]) -> nn.Module:
    module = nn.Identity()
    module.forward = function  # type: ignore[method-assign]
    return module
