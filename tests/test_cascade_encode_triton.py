"""encode_patches against the modules that define it, in float64 and in its own dtype; without a GPU, interpreted."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from samples import DEVICE
from torch import Tensor, nn

from icseg.sparse.config import SparseConfig
from icseg.sparse.encoder import PatchEncoder
from icseg.sparse.patches import CONTEXT, CROP, HALO, OUTSIDE, context_corner, coords_of, cut, grid_size, patch_inputs
from icseg.sparse.pyramid import CONTEXT_STEPS, Pyramid
from icseg_kernels import halvings, triton_launch
from icseg_kernels.cascade import encode
from icseg_kernels.cascade.encode import EncoderWeights, encode_patches

if triton_launch.missing():
    pytest.skip("; ".join(triton_launch.missing()), allow_module_level=True)

from icseg_kernels.cascade import encode_triton_kernels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BFLOAT16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])
DTYPES = [torch.float32, torch.float16, BFLOAT16]
if triton_launch.INTERPRETED:
    DTYPES.append(torch.float64)
LEVELS = 3


def made_encoder(channels: int = 8) -> PatchEncoder:
    """With weights and inputs whose features are as large as they come, so that no layer hides another's fault."""
    torch.manual_seed(0)
    encoder = PatchEncoder(32, channels, 3)
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=1.3 / math.sqrt(layer.weight[0].numel()))
            nn.init.normal_(layer.bias, std=0.3)
    return encoder.to(DEVICE).to(memory_format=torch.channels_last).eval()


def weights_of(encoder: PatchEncoder, dtype: torch.dtype = torch.float32) -> EncoderWeights:
    layers = [*encoder.stem, *encoder.label_stem, *encoder.token, *encoder.context]
    convolutions = [layer.to(dtype) for layer in layers if isinstance(layer, nn.Conv2d)]
    return EncoderWeights(*(t.detach() for layer in convolutions for t in (layer.weight, layer.bias)))


class Inputs:
    """A level of a target (logits of `classes` at half its size, or none at 0) or a support image (masks)."""

    def __init__(
        self,
        size: tuple[int, int] = (37, 50),
        level: int = 1,
        *,
        images: int = 2,
        classes: int = 1,
        from_logits: bool = True,
        picks: list[int] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        finest = [side << (LEVELS - 1 - level) for side in size]
        image = torch.rand(images, 1, *finest, generator=generator, dtype=torch.float64)
        self.level, self.from_logits = level, from_logits
        self.pyramid = Pyramid.of(image, LEVELS)
        height, width = self.pyramid.image(level).shape[-2:]
        if not from_logits:
            mask = (torch.rand(images, classes, *finest, generator=generator, dtype=torch.float64) > 0.6).double()
            masks = [*halvings(mask, LEVELS - 1 + CONTEXT_STEPS)[0][::-1], mask]
            self.label: Tensor | None = masks[level + CONTEXT_STEPS]
            self.label_coarse: Tensor | None = masks[level]
        elif classes:
            half = -(-height // 2), -(-width // 2)
            self.label = self.label_coarse = 3 * torch.randn(
                images, classes, *half, generator=generator, dtype=torch.float64
            )
        else:
            self.label = self.label_coarse = None
        rows, columns = grid_size(height, width)
        if picks is None:
            index = torch.stack([torch.randperm(rows * columns, generator=generator)[:2] for _ in range(images)])
        else:
            index = torch.tensor(picks, dtype=torch.int64).expand(images, -1)
        self.coords = coords_of(index, columns)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Of these values, rounded."""
        other = copy.copy(self)
        other.pyramid = Pyramid(*([x.to(DEVICE, dtype) for x in part] for part in vars(self.pyramid).values()))
        other.label, other.label_coarse = (
            None if x is None else x.to(DEVICE, dtype) for x in (self.label, self.label_coarse)
        )
        other.coords = self.coords.to(DEVICE)
        return other

    def run(self, weights: EncoderWeights) -> tuple[Tensor, Tensor]:
        pyramid, level = self.pyramid, self.level
        image, detail, coarse = pyramid.image(level), pyramid.detail(level), pyramid.context(level)
        labels = self.label, self.label_coarse
        return encode_patches(image, detail, coarse, *labels, self.coords, weights, from_logits=self.from_logits)

    @torch.no_grad()
    def defined(self, encoder: PatchEncoder) -> tuple[Tensor, Tensor]:
        """By the modules, in the dtype of the encoder."""
        coords, label, label_coarse = self.coords, self.label, self.label_coarse
        if not self.from_logits:
            assert label is not None
            assert label_coarse is not None
            seen = cut(label, coords - HALO, CROP).amax(2, keepdim=True) * 2 - 1
            around = cut(label_coarse.amax(1, keepdim=True) * 2 - 1, context_corner(coords), CONTEXT)
        elif label is None:
            seen = around = self.pyramid.images[0].new_zeros(*coords.shape[:2], 1, CROP, CROP)
        else:
            crops = cut(label, coords // 2 - HALO // 2, CROP // 2, CROP)
            crops_around = cut(label, 2 * context_corner(coords), 2 * CONTEXT, CONTEXT)
            seen, around = (x.amax(2, keepdim=True).sigmoid() * 2 - 1 for x in (crops, crops_around))
        inputs = patch_inputs(self.pyramid, self.level, coords, seen, around)
        units: list[Tensor] = []
        linear = [part[-1] for part in (encoder.token, encoder.context)]
        hooks = [layer.register_forward_pre_hook(lambda _, x: units.append(x[0])) for layer in linear]
        features, _ = encoder(inputs, self.level, is_target=self.from_logits)
        for hook in hooks:
            hook.remove()
        return features, torch.cat(units, 1)


def check(inputs: Inputs, dtype: torch.dtype = torch.float32, channels: int = 8) -> None:
    """Twice the errors of the modules at most, but for some units in the last place of the largest value.

    In float64 the oracle is the modules themselves, so that only these units are allowed.
    """
    torch.use_deterministic_algorithms(False)  # by `poisoned`
    encoder = made_encoder(channels).to(dtype)
    inputs = inputs.to(dtype)
    found = inputs.run(weights_of(encoder, dtype))
    theirs = inputs.defined(encoder)
    oracle = inputs.to(torch.float64).defined(copy.deepcopy(encoder).double())
    patches = inputs.coords.shape[:2].numel()
    assert found[0].shape == (patches, channels, 8, 8)
    assert found[1].shape == (patches, 1280)
    for ours, other, right in zip(found, theirs, oracle, strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert right.std() > 0.1
        error, usual = ((x.double() - right).abs().max() for x in (ours, other))
        units = 16 if dtype == torch.float64 else 4
        assert error <= 2 * usual + units * torch.finfo(dtype).eps * right.abs().max()


@pytest.mark.parametrize("from_logits", [True, False])
def test_is_the_encoder(poisoned, from_logits):
    check(Inputs(classes=3, from_logits=from_logits))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("from_logits", [True, False])
def test_dtypes(poisoned, dtype, from_logits):
    check(Inputs((21, 30), classes=2, from_logits=from_logits), dtype)


def test_without_labels(poisoned):
    check(Inputs((16, 12), level=0, classes=0))


@pytest.mark.parametrize("from_logits", [True, False])
def test_without_detail(poisoned, from_logits):
    check(Inputs((40, 33), level=LEVELS - 1, from_logits=from_logits))


@pytest.mark.parametrize("size", [(1, 1), (8, 3), (9, 70), (64, 64)])
@pytest.mark.parametrize("from_logits", [True, False])
def test_sizes(poisoned, size, from_logits):
    picks = [0] if max(size) < 9 else [grid_size(*size)[1] - 1, 0, math.prod(grid_size(*size)) - 1]
    check(Inputs(size, images=1, picks=picks, from_logits=from_logits))


@pytest.mark.parametrize("from_logits", [True, False])
def test_entries_that_are_no_patches(poisoned, from_logits):
    inputs = Inputs(picks=[3, -1, 7], from_logits=from_logits, classes=2)
    assert (inputs.coords[:, 1] == OUTSIDE).all()
    check(inputs)


@pytest.mark.parametrize("from_logits", [True, False])
def test_patches_at_the_edge_of_sight(poisoned, from_logits):
    """The first and last places where a crop touches the image, and those before and after."""
    inputs = Inputs((24, 24), images=1, from_logits=from_logits)
    places = [[-36, 5], [5, -33], [-12, 5], [5, -11], [27, 5], [5, 28], [51, 5], [5, 52]]
    inputs.coords = torch.tensor([places])
    check(inputs)


@pytest.mark.parametrize("from_logits", [True, False])
def test_sizes_of_the_model(poisoned, from_logits):
    """Those of the model itself: 24 channels, 48 patches, 512 pixels; of patches at all borders and some between."""
    config = SparseConfig()
    picks = [0, 63, 64 * 63, 64 * 64 - 1, *range(100, 4000, 97)][: 48 if torch.cuda.is_available() else 6]
    inputs = Inputs((512, 512), LEVELS - 1, images=1, picks=picks, from_logits=from_logits)
    check(inputs, channels=config.stem_channels)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_tf32_where_it_is_allowed(precision, monkeypatch):
    """In the interpreter both are exact."""
    given = []
    launch = triton_launch.launch
    monkeypatch.setattr(triton_launch, "launch", lambda *a, **named: (given.append(named), launch(*a, **named)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        encoder, inputs = made_encoder(), Inputs((16, 16), picks=[0]).to(torch.float32)
        features, units = inputs.run(weights_of(encoder))
    finally:
        torch.set_float32_matmul_precision(before)
    assert [named["PRECISION"] for named in given] == ["tf32" if precision == "high" else "ieee"]
    for ours, right in zip((features, units), inputs.defined(encoder), strict=True):
        torch.testing.assert_close(ours, right, rtol=2e-2, atol=2e-2)


def test_one_launch(monkeypatch):
    """Of weights that are channels_last nothing is copied; of others the result is the same."""
    inputs, weights = Inputs((16, 16), picks=[2]).to(torch.float32), weights_of(made_encoder())
    launches = []
    launch = triton_launch.launch
    monkeypatch.setattr(triton_launch, "launch", lambda *a, **named: (launches.append(a), launch(*a, **named)))
    found = inputs.run(weights)
    assert len(launches) == 1
    passed = {x.data_ptr() for x in launches[0] if isinstance(x, Tensor)}
    assert {x.data_ptr() for x in weights[:16]} <= passed
    plain = EncoderWeights(*(x.contiguous() for x in weights[:16]))
    assert not plain.token_weight.is_contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, inputs.run(plain), found))


def test_twice_the_same_bits():
    inputs, weights = Inputs(picks=[9]).to(torch.float32), weights_of(made_encoder())
    assert all(map(torch.equal, inputs.run(weights), inputs.run(weights)))


@pytest.mark.parametrize(("images", "picks"), [(2, []), (0, [1, 2])])
def test_nothing(images, picks):
    inputs = Inputs((16, 16), picks=picks).to(torch.float32)
    if images == 0:
        inputs.pyramid = Pyramid(*([x[:0] for x in part] for part in vars(inputs.pyramid).values()))
        inputs.label = inputs.label_coarse = inputs.label[:0]
        inputs.coords = inputs.coords[:0]
    features, units = inputs.run(weights_of(made_encoder()))
    assert features.shape == (0, 8, 8, 8)
    assert units.shape == (0, 1280)


def test_what_is_not_finite_stays_in_patches_that_see_it():
    inputs, weights = Inputs((32, 40), picks=[0, 12, 18]).to(torch.float32), weights_of(made_encoder())
    clean = inputs.run(weights)
    corner = inputs.coords.flatten(0, 1)
    seen = ((corner - HALO <= 20) & (corner - HALO + CROP > 20)).all(1)
    seen[len(seen) // 2 :] = False  # of the other image
    assert seen.sum() == 2
    for bad in (math.nan, -math.inf):
        inputs.pyramid.image(1)[0, 0, 20, 20] = bad
        features, units = inputs.run(weights)
        assert features[seen].isnan().flatten(1).any(1).all()
        assert torch.equal(features[~seen], clean[0][~seen])
        assert torch.equal(units[~seen], clean[1][~seen])
        assert torch.equal(units[:, 768:], clean[1][:, 768:])


@pytest.mark.parametrize("from_logits", [True, False])
def test_the_largest_class_is_nan_where_one_is(from_logits):
    weights = weights_of(made_encoder())
    for which in (0, 1, 2):
        inputs = Inputs((16, 16), images=1, classes=3, picks=[1], from_logits=from_logits).to(torch.float32)
        assert inputs.label is not None
        assert inputs.label_coarse is not None
        inputs.label[:, which] = math.nan
        inputs.label_coarse[:, which] = math.nan
        features, units = inputs.run(weights)
        assert not features.isnan().any()
        assert units[:, :768].isnan().all()
        assert units[:, 768:].isnan().any()


def test_patches_are_the_same_alone_and_among_others():
    inputs, weights = Inputs().to(torch.float32), weights_of(made_encoder())
    together = inputs.run(weights)
    inputs.coords = inputs.coords[:, 1:2]
    for ours, all_of_them in zip(inputs.run(weights), together, strict=True):
        assert torch.equal(ours, all_of_them.unflatten(0, (2, -1))[:, 1])


def test_compiled_ahead_is_what_is_launched(monkeypatch):
    """But for the operands of products, which are wider in the interpreter."""
    encoder = PatchEncoder(128, SparseConfig().stem_channels, 1).to(DEVICE).to(memory_format=torch.channels_last)
    launched = []
    monkeypatch.setattr(triton_launch, "launch", lambda *_, **named: launched.append(named))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for from_logits in (True, False):
            Inputs((16, 16), from_logits=from_logits).to(dtype).run(weights_of(encoder, dtype))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    for from_logits in (True, False):
        Inputs((16, 16), from_logits=from_logits).to(torch.float32).run(weights_of(encoder.float()))
    torch.set_float32_matmul_precision(before)
    compiled = [
        c.constants | {"num_warps": c.num_warps, "num_stages": c.num_stages} for c in encode_triton_kernels.COMPILATIONS
    ]
    for options in (*launched, *compiled):
        del options["OPERAND"]
    assert all(options in compiled for options in launched)
    assert all(options in launched for options in compiled)


def test_refuses_what_it_cannot_serve():
    inputs, weights = Inputs((16, 16)).to(torch.float32), weights_of(made_encoder())
    pyramid = inputs.pyramid
    good = {
        "image": pyramid.image(1), "detail": pyramid.detail(1), "coarse": pyramid.context(1), "label": inputs.label,
        "label_coarse": inputs.label_coarse, "coords": inputs.coords, "weights": weights, "from_logits": True,
    }  # fmt: skip
    for changes, message in (
        ({"image": good["image"][0]}, r"image must have shape \[N, 1, h, w\]"),
        ({"image": good["image"].expand(-1, 2, -1, -1)}, r"image must have shape \[N, 1, h, w\]"),
        ({"detail": good["detail"][..., 1:]}, r"detail must be torch.float32 \[2, 1, 16, 16\]"),
        ({"detail": good["detail"].half()}, "got torch.float16"),
        ({"coarse": good["coarse"][:1]}, r"coarse must be torch.float32 \[2, 1, 4, 4\]"),
        ({"coarse": good["coarse"][..., :0]}, "of at least one pixel"),
        ({"label": None}, "must both be given"),
        ({"label": None, "label_coarse": None, "from_logits": False}, "must both be given"),
        ({"label": good["label"][:, :0]}, r"label must be torch.float32 \[2, 1, 8, 8\]"),
        ({"label_coarse": good["label"].expand(-1, 2, -1, -1)}, r"label_coarse must be torch.float32 \[2, 1, 8, 8\]"),
        ({"from_logits": False}, r"label must be torch.float32 \[2, 1, 16, 16\]"),
        ({"coords": good["coords"].int()}, r"coords must be int64 \[2, K, 2\]"),
        ({"coords": good["coords"][:1]}, r"coords must be int64 \[2, K, 2\]"),
        ({"weights": weights._replace(token_bias=weights.label_stem_bias)}, r"token_bias must be torch.float32 \[48\]"),
        ({"weights": weights._replace(token_weight=torch.zeros(300, 16, 4, 4))}, "1 to 128 channels, got 300"),
        ({"weights": weights._replace(token_weight=weights.token_weight[:, 1:])}, "token_weight must be"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_patches(**{**good, **changes})
    with pytest.raises(TypeError, match=r"image is torch\.int32"):
        encode_patches(**{**good, "image": good["image"].int()})


def test_compilations_give_every_argument():
    names = [c.name for c in encode_triton_kernels.COMPILATIONS]
    assert len(set(names)) == len(names)
    for c in encode_triton_kernels.COMPILATIONS:
        assert set(c.signature) | set(c.constants) == set(c.kernel.arg_names)


def test_tiles_cover_every_size():
    """Steps of powers of two, with no more products than the tiles of a program hold."""
    for itemsize, fused in ((2, False), (4, False), (4, True), (8, True)):
        for channels in (encode.Channels(12, 16, 24, 24, 8, 48, 16, 32), encode.Channels(*[128] * 8)):
            found = encode.options(channels, itemsize, fused=fused)
            for name in channels._fields:
                rows, block, width = (found[f"{name.upper()}_{part}"] for part in ("M", "K", "WIDTH"))
                assert all(value >= 16 and value & (value - 1) == 0 for value in (rows, block, width))
                assert rows * block <= 32768 // itemsize
                assert width * block <= 32768 // itemsize


@pytest.mark.gpu
@needs_gpu
def test_captured_as_a_graph():
    inputs, weights = Inputs((64, 64)).to(torch.float16), weights_of(made_encoder(), torch.float16)
    expected = inputs.run(weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = inputs.run(weights)
    for x in found:
        x.zero_()
    graph.replay()
    assert all(map(torch.equal, found, expected))
