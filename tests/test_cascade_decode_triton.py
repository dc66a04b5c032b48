"""Label propagation and the decoder in one launch, against the modules in float64; without a GPU, interpreted."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from samples import DEVICE
from test_sparse import make_inputs, make_model
from torch import Tensor

from icseg.sparse.config import SparseConfig
from icseg.sparse.decoder import PatchDecoder
from icseg.sparse.patches import CROP, HALO, OUTSIDE, PATCH, cut
from icseg.sparse.propagation import LabelPropagation
from icseg_kernels import triton_launch
from icseg_kernels.cascade import decode

if triton_launch.missing():
    pytest.skip("; ".join(triton_launch.missing()), allow_module_level=True)

from icseg_kernels.cascade import decode_triton_kernels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BFLOAT16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])
DTYPES = [torch.float32, torch.float16, BFLOAT16]
if triton_launch.INTERPRETED:
    DTYPES.append(torch.float64)
SMALL = SparseConfig(dim=32, stem_channels=8)
MODEL = SparseConfig()
UNEVEN = SparseConfig(
    dim=40, heads=1, stem_channels=5, propagation_heads=3, propagation_key_dim=6, propagation_value_dim=7,
    decoder_channels=(17, 9), residual_bound=1.7,
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, of what is not finite
ONE_HEAD = dataclasses.replace(SMALL, propagation_heads=1, propagation_key_dim=20, propagation_value_dim=30)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


@dataclasses.dataclass
class Modules:
    propagation: LabelPropagation
    decoder: PatchDecoder
    level: int = 0

    @staticmethod
    def of(config: SparseConfig, dtype: torch.dtype = torch.float32, channels_last: bool = True) -> Modules:
        """Of random parameters that let outputs depend on all inputs."""
        c = config
        sizes = c.propagation_heads, c.propagation_key_dim, c.propagation_value_dim
        propagation = LabelPropagation(c.dim, c.stem_channels, *sizes)
        decoder = PatchDecoder(c.dim, c.stem_channels, c.decoder_channels, c.propagation_heads, 4, c.residual_bound)
        seed = 100
        for module in (propagation, decoder):
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                values = normal(*parameter.shape, seed=seed)
                if parameter is propagation.log_scale or parameter is decoder.propagation_gain:
                    parameter += 0.3 * values.cpu()
                else:
                    fan = parameter[0].numel() if parameter.ndim > 1 else 10
                    parameter.copy_(1.5 * values / fan**0.5)
                seed += 1
            if channels_last:
                module.to(memory_format=torch.channels_last)
        found = Modules(propagation, decoder)
        return found.to(dtype)

    def to(self, dtype: torch.dtype) -> Modules:
        """A copy."""
        modules = (copy.deepcopy(m).to(DEVICE, dtype) for m in (self.propagation, self.decoder))
        return Modules(*modules, self.level)

    @property
    def gain(self) -> Tensor:
        return self.decoder.propagation_gain[self.level]

    def weights(self) -> decode.DecodeWeights:
        p, d = self.propagation, self.decoder
        return decode.DecodeWeights(
            p.match_cell.weight, p.match_cell.bias, p.match_token.weight, p.match_out.weight, p.match_out.bias,
            p.value_cell.weight, p.value_cell.bias, p.value_token.weight, p.log_scale, p.out.weight, p.out.bias,
            d.token.weight, d.token.bias, d.shared[0].weight, d.shared[0].bias, d.shared[2].weight, d.shared[2].bias,
            d.own.weight, d.own.bias, d.layers[1].weight, d.layers[1].bias, d.layers[3].weight, d.layers[3].bias,
        )  # fmt: skip

    def decode(
        self, features: Tensor, tokens: Tensor, coords: Tensor, keys: Tensor, values: Tensor, coarser: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As a level's round does."""
        batch, count = coords.shape[:2]
        classes = (values.shape[-1] - self.propagation.value_cell.out_features // self.propagation.heads) // 4
        if coarser is None:
            crops = features.new_zeros(batch, count, classes, CROP, CROP)
        else:
            crops = cut(coarser, coords // 2 - HALO // 2, CROP // 2, CROP)
        keys, values = (x.expand(batch, -1, -1, -1) for x in (keys, values))
        masks, context = self.propagation(features, tokens, keys, values, None)
        prior = crops[..., HALO : HALO + PATCH, HALO : HALO + PATCH].flatten(0, 1)
        decoded = self.decoder(features, tokens, masks, context, prior, self.level)
        logits = prior + decoded.change
        return logits.unflatten(0, (batch, count)), decoded.error.unflatten(0, (batch, count))

    def support(self, features: Tensor, tokens: Tensor, coords: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """As the encoder of a support set does."""
        core = cut(masks, coords - HALO, CROP)[..., HALO : HALO + PATCH, HALO : HALO + PATCH]
        return self.propagation.support(features, tokens, (core * 2 - 1).flatten(0, 1))


Inputs = dict[str, Any]


def of_target(
    config: SparseConfig, batch: int = 2, count: int = 2, support: int = 2, classes: int = 1,
    size: tuple[int, int] | None = (9, 13), dtype: torch.dtype = torch.float32,
) -> Inputs:  # fmt: skip
    """Of `support` patches of a support set; size: of the coarser map."""
    c, n = config, batch * count
    width = 4 * classes + c.propagation_value_dim
    keys = normal(batch, c.propagation_heads, 16 * support, c.propagation_key_dim, seed=3)
    height, columns = (16, 24) if size is None else (2 * size[0], 2 * size[1])
    corners = [torch.randint(0, -(-side // 8), (batch, count)) * 8 for side in (height, columns)]
    floating = {
        "features": normal(n, c.stem_channels, 8, 8, seed=1),
        "tokens": normal(batch, count, c.dim, seed=2),
        "keys": keys / keys.norm(dim=-1, keepdim=True),
        "values": normal(batch, c.propagation_heads, 16 * support, width, seed=4),
        "coarser": None if size is None else 4 * normal(batch, classes, *size, seed=5),
    }
    return cast(floating, dtype) | {"coords": torch.stack(corners, -1).to(DEVICE)}


def of_support(
    config: SparseConfig, sets: int = 2, images: int = 2, count: int = 2, classes: int = 1,
    size: tuple[int, int] = (19, 26), dtype: torch.dtype = torch.float32,
) -> Inputs:  # fmt: skip
    c, n = config, sets * images
    corners = [torch.randint(0, -(-side // 8), (n, count)) * 8 for side in size]
    floating = {
        "features": normal(n * count, c.stem_channels, 8, 8, seed=1),
        "tokens": normal(sets, images * count, c.dim, seed=2),
        "masks": normal(n, classes, *size, seed=3).sigmoid(),
    }
    return cast(floating, dtype) | {"coords": torch.stack(corners, -1).to(DEVICE)}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: x.to(dtype) if x is not None and x.is_floating_point() else x for k, x in inputs.items()}


@pytest.fixture(autouse=True)
def exact_products():
    """The same draws in every test; on a CUDA device, torch would round float32 to TF32 in convolutions."""
    torch.manual_seed(0)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def launches(monkeypatch):
    """How many launches there were, as a list of kernels."""
    found: list[Any] = []
    launch = triton_launch.launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        found.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_launch, "launch", counted)
    return found


def run(modules: Modules, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return decode.decode_patches(**inputs, weights=modules.weights(), gain=modules.gain, bound=modules.decoder.bound)


def support(modules: Modules, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return decode.support_cells(**inputs, weights=modules.weights())


def assert_near(found: tuple[Tensor, ...], theirs: tuple[Tensor, ...], oracle: tuple[Tensor, ...]) -> None:
    """Twice the errors of the modules at most, but for some units in the last place of the largest value.

    In float64, where theirs are none because the oracle is theirs, for more of these.
    """
    units = 32 if found[0].dtype == torch.float64 else 4
    for ours, other, right in zip(found, theirs, oracle, strict=True):
        assert ours.shape == other.shape == right.shape
        assert ours.dtype == other.dtype
        assert ours.is_contiguous()
        error, usual = ((x.double() - right).abs().max() for x in (ours, other))
        assert error <= 2 * usual + units * torch.finfo(ours.dtype).eps * right.abs().max()


def assert_decodes(modules: Modules, inputs: Inputs) -> None:
    found = run(modules, inputs)
    torch.use_deterministic_algorithms(False)  # by `poisoned`; cuBLAS would want to be told before it starts
    oracle = modules.to(torch.float64).decode(**cast(inputs, torch.float64))
    assert oracle[0].std() > 0.5
    assert_near(found, modules.decode(**inputs), oracle)


def assert_supports(modules: Modules, inputs: Inputs) -> None:
    found = support(modules, inputs)
    torch.use_deterministic_algorithms(False)
    oracle, theirs = modules.to(torch.float64).support(**cast(inputs, torch.float64)), modules.support(**inputs)
    assert_near(found, theirs, oracle)
    labels = 4 * inputs["masks"].shape[1]
    assert torch.equal(found[1][..., :labels], theirs[1][..., :labels])


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [SMALL, UNEVEN, ONE_HEAD])
def test_decodes_as_the_modules(poisoned, launches, config, dtype):
    modules, inputs = Modules.of(config, dtype), of_target(config, dtype=dtype)
    assert_decodes(modules, inputs)
    assert launches == [decode_triton_kernels.decode_kernel]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [SMALL, UNEVEN, ONE_HEAD])
def test_cells_as_the_modules(poisoned, launches, config, dtype):
    modules, inputs = Modules.of(config, dtype), of_support(config, dtype=dtype)
    assert_supports(modules, inputs)
    assert launches == [decode_triton_kernels.support_kernel]


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_sizes_of_the_model(poisoned, dtype):
    modules = Modules.of(MODEL, dtype)
    assert_decodes(modules, of_target(MODEL, 1, 2, 61, size=(64, 64), dtype=dtype))
    assert_supports(modules, of_support(MODEL, 1, 2, 4, size=(64, 64), dtype=dtype))


def test_first_level_has_no_prior(poisoned):
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 1, size=None)
    modules.level = 2  # the gain's
    assert_decodes(modules, inputs)


@pytest.mark.parametrize("classes", [3, 16])
def test_several_classes(poisoned, classes):
    modules = Modules.of(SMALL)
    for size in ((9, 13), None)[: 1 if classes > 3 else 2]:
        assert_decodes(modules, of_target(SMALL, 1, 1, 1, classes, size))
    assert_supports(modules, of_support(SMALL, 1, 2, 1, classes))


@pytest.mark.parametrize("support", [1, 16, 17])
def test_numbers_of_support_cells(support):
    """Below, at and past a block."""
    assert_decodes(Modules.of(SMALL), of_target(SMALL, 1, 1, support))


def test_borders_of_small_maps_are_replicated():
    modules = Modules.of(SMALL)
    for size in ((1, 1), (1, 7), (6, 1), (4, 5)):
        assert_decodes(modules, of_target(SMALL, 1, 1, 1, size=size))


def test_what_lies_outside(poisoned):
    """Entries that are no patch have no prior, and masks that are 0 everywhere; others hang over the border."""
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 1, 4, 1)
    inputs["coords"] = torch.tensor([[[OUTSIDE, OUTSIDE], [16, 24], [-5, 3], [8, 37]]], device=DEVICE)
    assert_decodes(modules, inputs)
    inputs = of_support(SMALL, 1, 1, 5)
    far = 2**62
    corners = [[OUTSIDE, OUTSIDE], [16, 24], [-5, 3], [8, 37], [far, -far]]
    inputs["coords"] = torch.tensor([corners], device=DEVICE)
    assert_supports(modules, inputs)
    assert (support(modules, inputs)[1][0, :, :16, :4] == -1).all()


def test_expanded_memory():
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 2, 1)
    one = inputs | {name: inputs[name][:1] for name in ("keys", "values")}
    expanded = one | {name: one[name].expand(2, -1, -1, -1) for name in ("keys", "values")}
    copied = one | {name: expanded[name].contiguous() for name in ("keys", "values")}
    expected = run(modules, copied)
    assert_same(run(modules, expanded), expected)
    assert_same(run(modules, one), expected)


def test_memory_of_another_dtype():
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 1, 1)
    half = {name: inputs[name].half() for name in ("keys", "values")}
    assert_decodes(modules, inputs | half)
    assert_same(run(modules, inputs | half), run(modules, inputs | cast(half, torch.float32)))


def test_weights_of_both_memory_formats():
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 1, 1)
    other = Modules.of(SMALL, channels_last=False)
    assert modules.weights().shared_in_weight.is_contiguous(memory_format=torch.channels_last)
    assert not other.weights().shared_in_weight.is_contiguous(memory_format=torch.channels_last)
    expected = run(modules, inputs)
    torch.testing.assert_close(run(other, inputs), expected, rtol=1e-4, atol=1e-4)
    weights = other.weights()
    mixed = weights._replace(own_mid_weight=weights.own_mid_weight.mT.contiguous().mT)
    found = decode.decode_patches(**inputs, weights=mixed, gain=modules.gain, bound=modules.decoder.bound)
    assert_same(found, run(other, inputs))


def test_nothing():
    modules = Modules.of(SMALL)
    for batch, count in ((0, 3), (2, 0), (0, 0)):
        for found in run(modules, of_target(SMALL, batch, count)):
            assert found.shape == (batch, count, 1, 8, 8)
        keys, values = support(modules, of_support(SMALL, batch, 2, count))
        assert keys.shape == (batch, 2, 32 * count, 16)
        assert values.shape == (batch, 2, 32 * count, 16)
    empty = of_target(SMALL, 1, 2, 0)
    assert all(found.isfinite().all() for found in run(modules, empty))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_patch(bad):
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 1, 3, 1)
    clean = run(modules, inputs)
    inputs["features"][0, 2, 3, 4] = bad
    inputs["tokens"][0, 2, 5] = bad
    for found, expected in zip(run(modules, inputs), clean, strict=True):
        assert found[0, ::2].isnan().flatten(1).any(1).all()
        assert torch.equal(found[0, 1], expected[0, 1])
    inputs = of_support(SMALL)
    clean = support(modules, inputs)
    inputs["features"][1, 2, 3, 4] = inputs["masks"][0, 0, 0, 0] = bad
    inputs["coords"][0, 0] = 0
    rest = torch.tensor([*range(16), *range(32, 64)], device=DEVICE)
    found = support(modules, inputs)
    assert not found[0][0, :, 16:32].isfinite().all()
    assert torch.equal(found[0][:, :, rest], clean[0][:, :, rest])
    assert not found[1][0, :, 0, 0].isfinite().any()
    assert torch.equal(found[1][1], clean[1][1])


def test_a_nan_of_the_prior_stays_in_its_class():
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 1, 1, classes=3)
    inputs["coords"][:] = 0
    clean = run(modules, inputs)
    inputs["coarser"][0, 1, 1, 1] = math.nan
    for found, expected in zip(run(modules, inputs), clean, strict=True):
        assert found[:, :, 1].isnan().any()
        assert torch.equal(found[:, :, [0, 2]], expected[:, :, [0, 2]])


def test_large_logits_and_sharp_look_ups():
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 1)
    inputs["coarser"] *= 1e4
    modules.propagation.log_scale.fill_(math.log(2e3))
    modules.decoder.layers[3].weight.mul_(50)
    oracle = modules.to(torch.float64).decode(**cast(inputs, torch.float64))
    for found, expected in zip(run(modules, inputs), oracle, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_the_same_bits_twice():
    modules, inputs, of_set = Modules.of(SMALL), of_target(SMALL, 1), of_support(SMALL, 1)
    assert_same(run(modules, inputs), run(modules, inputs))
    assert_same(support(modules, of_set), support(modules, of_set))


def test_a_patch_is_the_same_alone_and_among_others():
    modules, inputs = Modules.of(SMALL), of_target(SMALL, 1, 3)
    together = run(modules, inputs)
    for i in (0, 2):
        alone = inputs | {name: inputs[name][:, i : i + 1] for name in ("tokens", "coords")}
        alone["features"] = inputs["features"][i : i + 1]
        assert_same(run(modules, alone), (together[0][:, i : i + 1], together[1][:, i : i + 1]))


def test_looks_up_what_support_cells_wrote():
    modules, of_set = Modules.of(SMALL), of_support(SMALL)
    keys, values = support(modules, of_set)
    inputs = of_target(SMALL, count=1) | {"keys": keys, "values": values}
    assert_decodes(modules, inputs)


def test_rounds_of_the_network(monkeypatch):
    """Every level of a forward pass, and the classes and targets of a batch."""
    model = make_model().to(DEVICE)
    network = model.network
    target, images, masks = (x.to(DEVICE) for x in make_inputs(batch=2, support=1, classes=2))
    rounds, seen, picked = [], [], network._round

    def recorded(task: Any, state: Any, *rest: Any) -> Any:
        coarser = state.logits
        found = picked(task, state, *rest)
        rounds.append((task.level, coarser, found))
        return found

    monkeypatch.setattr(network, "_round", recorded)
    network.propagation.register_forward_hook(lambda module, arguments, output: seen.append(arguments))
    model(target, images, masks, budget=6)
    assert [level for level, _, _ in rounds] == [0, 1, 2]
    modules = Modules(network.propagation, network.decoder)
    for (level, coarser, right), (features, tokens, keys, values, index) in zip(rounds, seen, strict=True):
        assert index is None
        modules.level = level
        inputs = {"features": features, "tokens": tokens, "coords": right.coords, "keys": keys, "values": values}
        found = run(modules, inputs | {"coarser": coarser})
        for ours, theirs in zip(found, (right.logits, right.error), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("terms", [16, 32])
@pytest.mark.parametrize("config", [SMALL, UNEVEN])
def test_blocks_of_every_size(poisoned, monkeypatch, config, terms):
    """As products without tensor cores and of TF32 have them."""
    monkeypatch.setattr(decode, "_terms", lambda dtype, fused: terms)
    modules = Modules.of(config)
    assert_decodes(modules, of_target(config, 1, 1, classes=2))
    assert_supports(modules, of_support(config, 1, 1, 2))


def test_refuses_what_does_not_fit():
    modules, good, of_set = Modules.of(SMALL), of_target(SMALL), of_support(SMALL)
    weights = modules.weights()

    def refused(message: str, **changes: Any) -> None:
        given = {**good, "weights": weights, "gain": modules.gain, **changes}
        with pytest.raises(ValueError, match=message):
            decode.decode_patches(**given, bound=8.0)

    refused(r"features must be torch.float32 \[4, 8, 8, 8\]", features=good["features"][1:])
    refused("match_cell_weight must be torch.float16", features=good["features"].half())
    refused("tokens must be torch.float32", tokens=good["tokens"].half())
    refused(r"tokens must be \[B, K, D\]", tokens=good["tokens"][0])
    refused("coords must be torch.int64", coords=good["coords"].int())
    refused(r"coords must be of 4 patches, got \[2, 1, 2\]", coords=good["coords"][:, :1])
    refused("keys must be of 2 targets, or of 1 for all, got 3", keys=torch.cat([good["keys"]] * 2)[:3])
    refused("keys and values must be .* in whole patches of 16", keys=good["keys"][:, :, 1:])
    refused("values must have 4 C \\+ 12 channels, got 15", values=good["values"][..., 1:])
    refused(r"values must be torch.float32 \[2, 2, 32, 16\]", values=good["values"][:1])
    refused(r"coarser must be torch.float32 \[2, 1, 9, 13\]", coarser=good["coarser"][:1])
    refused(r"gain must be torch.float32 \[\]", gain=modules.gain[None])
    refused(
        r"own_out_bias must be torch.float32 \[2\]", weights=weights._replace(own_out_bias=weights.own_out_bias[:1])
    )
    turned = weights.match_token_weight.T.contiguous().T
    refused("match_token_weight must be contiguous", weights=weights._replace(match_token_weight=turned))
    with pytest.raises(ValueError, match=r"masks must be torch.float32 \[4, 1, 19, 26\]"):
        decode.support_cells(**of_set | {"masks": of_set["masks"][1:]}, weights=weights)
    with pytest.raises(ValueError, match=r"coords must be \[N, K, 2\] of 8 patches"):
        decode.support_cells(**of_set | {"coords": of_set["coords"][1:]}, weights=weights)


def test_kernels_are_named_apart():
    names = [c.name for c in decode_triton_kernels.COMPILATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_replays_with_new_values(dtype):
    modules, inputs, of_set = Modules.of(MODEL, dtype), of_target(MODEL, dtype=dtype), of_support(MODEL, dtype=dtype)

    def both() -> tuple[Tensor, ...]:
        return *run(modules, inputs), *support(modules, of_set)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for x in (inputs["features"], inputs["coarser"], of_set["tokens"]):
        x.mul_(-0.5)
    modules.decoder.own.weight.mul_(2)
    graph.replay()
    assert_same(found, both())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_patches(dtype):
    """What programs leave in one another's caches shows."""
    assert_decodes(Modules.of(MODEL, dtype), of_target(MODEL, 8, 100, 5, dtype=dtype))


@pytest.mark.gpu
@needs_gpu
def test_tf32_where_torch_allows_it():
    modules, inputs = Modules.of(MODEL), of_target(MODEL)
    exact, before = run(modules, inputs), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = run(modules, inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)
