"""The published PatchICL against recorded outputs of the published code, and every setting on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import icseg
from icseg.checkpoint import load_checkpoint
from icseg.losses import LossConfig, segmentation_loss
from icseg.masks import level_mask
from icseg.model import PatchICL
from icseg.published import config as settings
from icseg.published.config import (
    AggregationConfig,
    BackboneConfig,
    CascadeConfig,
    ConfidenceConfig,
    FeatureConfig,
    LevelConfig,
    OracleSchedule,
    PublishedConfig,
    SamplerConfig,
)
from icseg.published.convert import state_from_published
from icseg.published.dictionary import loss_from_published
from icseg.published.features import FeatureExtractor, read_patches
from icseg.published.level import Aggregation, ConfidenceMap, Level
from icseg.published.sampling import (
    MODEL_SCORES,
    ORACLE_SCORES,
    SUPPORT_SCORES,
    Draws,
    binary_entropy,
    half_entropy,
)
from icseg.published.transformer import POSITIONS, Block, RotaryEmbedding, attend, rotated
from icseg_kernels import Rotation

DATA = Path(__file__).parent / "data"
FIXTURES = ("patchicl_3level", "patchicl_overlap")
TOLERANCE = 1e-5  # the fixtures' own is 1e-4; float32 rounding stays below 2e-6 here


# --- against the published code --------------------------------------------------------------------


class Recorded:
    """A fixture: the published code's configuration, weights, inputs, noise and outputs, and our model's output."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
            self.tensors = {key: torch.from_numpy(file[key]) for key in file.files}
        self.config = json.loads((DATA / f"{name}.json").read_text())["config"]
        self.weights = self.group("weight/")
        self.noise = [self.tensors[k] for k in sorted(self.tensors) if k.startswith("noise/")]
        self.model = icseg.load_published(self.weights, self.config)
        self.inputs = [self.tensors[f"in/{n}"] for n in ("target_image", "support_images", "support_masks")]
        with torch.no_grad():
            self.output = self.model(*self.inputs, noise=self.noise)

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="module", params=FIXTURES)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.param)


def by_coordinate(coords: Tensor, values: Tensor | None = None) -> Tensor:
    """Coordinates [K, 2], or values [K, ...] in the order of their coordinates: ties in score may swap rows."""
    order = (coords[:, 0].long() * 10_000 + coords[:, 1].long()).argsort(stable=True)
    return (coords if values is None else values)[order]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_parity_of_logits(recorded: Recorded) -> None:
    close(recorded.output.logits, recorded.tensors["out/final_logits"])
    for i, level in enumerate(recorded.output.levels):
        theirs = recorded.group(f"out/level{i}/")
        close(level.logits, theirs["combined_pred"])
        close(level.prediction, theirs["pred"])
        assert torch.equal(level.coverage.float(), theirs["coverage_mask"])


def test_parity_of_patches(recorded: Recorded) -> None:
    for i, level in enumerate(recorded.output.levels):
        theirs = recorded.group(f"out/level{i}/")
        for b in range(len(level.coords)):
            ours, own = level.coords[b].long(), theirs["coords"][b]
            assert torch.equal(by_coordinate(ours), by_coordinate(own))
            close(by_coordinate(ours, level.patch_logits[b]), by_coordinate(own, theirs["patch_logits"][b]))
            images = level.support_coords.shape[1]
            supports = theirs["context_coords"][b].unflatten(0, (images, -1))
            for s in range(images):
                assert torch.equal(by_coordinate(level.support_coords[b, s].long()), by_coordinate(supports[s]))


def test_parity_of_registers_and_confidence(recorded: Recorded) -> None:
    for i, level in enumerate(recorded.output.levels):
        theirs = recorded.group(f"out/level{i}/")
        close(level.extras["registers"], theirs["register_tokens"])
        close(level.extras["confidence"], theirs["combined_sampling_map"])


def test_parity_of_features(recorded: Recorded) -> None:
    """Recorded from the extractor itself, without the model's detour over the feature grid's size."""
    features = recorded.model.network.features
    before, features.config = features.config, dataclasses.replace(features.config, via_grid=False)
    try:
        with torch.no_grad():
            target = features(recorded.inputs[0]).flatten(2).transpose(1, 2)
            support = features(*(t.flatten(0, 1)[:1] for t in recorded.inputs[1:]))[0].flatten(1).T
    finally:
        features.config = before
    close(target, recorded.tensors["out/target_features"].view_as(target))
    close(support, recorded.tensors["out/support_features_00"])


def test_memory_gives_the_same_bits(recorded: Recorded) -> None:
    target, *support = recorded.inputs
    memory = recorded.model.encode_support(*support)
    for draw in ({}, {"seed": 3}, {"noise": recorded.noise}):
        with torch.no_grad():
            a, b = recorded.model(target, *support, **draw), recorded.model(target, memory=memory, **draw)
        assert torch.equal(a.logits, b.logits)
        for mine, yours in zip(a.levels, b.levels, strict=True):
            assert torch.equal(mine.support_coords, yours.support_coords)


def test_support_decoding_is_kept_where_published(recorded: Recorded) -> None:
    decoded = not recorded.config["cascade"]["skip_context_decoding"]
    for level in recorded.output.levels:
        assert (level.support_patch_logits is not None) == decoded
        if decoded:
            assert level.support_patch_logits.shape[:3] == level.support_coords.shape[:3]
            assert level.extras["support_prediction"].shape[-2:] == level.resolution


def test_weights_from_a_file(recorded: Recorded, tmp_path: Path) -> None:
    state = {k: v for k, v in recorded.weights.items() if not k.startswith("feature_extractor.")}
    extractor = {k: v for k, v in recorded.weights.items() if k.startswith("feature_extractor.model.")}
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "model.pt")
    torch.save({k.removeprefix("feature_extractor.model."): v for k, v in extractor.items()}, tmp_path / "u.pt")
    model = icseg.load_published(tmp_path / "model.pt", recorded.config, universeg=tmp_path / "u.pt")
    for name, tensor in recorded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(ValueError, match="weights must fit the configuration"):
        icseg.load_published(tmp_path / "model.pt", recorded.config)


def test_foreign_weights_are_refused(recorded: Recorded) -> None:
    with pytest.raises(ValueError, match="got the key other"):
        icseg.load_published({**recorded.weights, "other": torch.zeros(1)}, recorded.config)
    wrong = {**recorded.weights, "backbone.fusion_proj.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match="weights must fit the configuration"):
        icseg.load_published(wrong, recorded.config)


def test_weights_of_wrapped_models(recorded: Recorded) -> None:
    """Compiled, distributed, or compiled in part."""
    for wrapped in ("module._orig_mod.{}", "_orig_mod.module.{}", "module.{}"):
        model = icseg.load_published({wrapped.format(k): v for k, v in recorded.weights.items()}, recorded.config)
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in recorded.model.state_dict().items())
    compiled = {k.replace("backbone.", "backbone._orig_mod."): v for k, v in recorded.weights.items()}
    model = icseg.load_published(compiled, recorded.config)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in recorded.model.state_dict().items())


def test_files_of_other_values_are_refused(recorded: Recorded, tmp_path: Path) -> None:
    torch.save({"model_state_dict": recorded.weights, "loss": np.float64(0.5)}, tmp_path / "numpy.pt")
    with pytest.raises(ValueError, match=r"a torch file of tensors and plain values, got .*numpy\.pt") as caught:
        icseg.load_published(tmp_path / "numpy.pt", recorded.config)
    assert "weights_only" not in str(caught.value)
    with pytest.raises(ValueError, match="weights must map names to tensors, got int at 'step'"):
        icseg.load_published({"model_state_dict": {**recorded.weights, "step": 3}}, recorded.config)
    with pytest.raises(ValueError, match="weights must be a state dict, got a list"):
        icseg.load_published({"model_state_dict": []}, recorded.config)


def test_gates_that_the_published_code_lacks(recorded: Recorded) -> None:
    """Only with a prior and no support masks: without either there is no fusion."""
    for prior, support, expected in (("none", False, False), ("logits", False, True), ("none", True, False)):
        backbone = BackboneConfig(dim=16, heads=2, fusion="gated", mask_prior=prior, support_mask=support)
        assert ("fusion.gates.support" in state_from_published({}, tiny(backbone=backbone))) == expected


def test_a_loaded_model_saves_and_loads(recorded: Recorded, tmp_path: Path) -> None:
    recorded.model.save_pretrained(tmp_path / "model.safetensors")
    again = PatchICL.from_pretrained(tmp_path / "model.safetensors")
    assert again.config == recorded.model.config
    with torch.no_grad():
        assert torch.equal(again(*recorded.inputs, noise=recorded.noise).logits, recorded.output.logits)


# --- tiny models -----------------------------------------------------------------------------------


def tiny(size: int = 16, **changes: Any) -> PublishedConfig:
    levels = (LevelConfig(8, 1, 1), LevelConfig(size, 3, 2, target_blur=1.0, support_blur=1.0))
    fields: dict[str, Any] = {
        "image_size": size,
        "levels": levels,
        "features": FeatureConfig("convolutional", channels=4, input_size=16, grid=16, freeze=False),
        "backbone": BackboneConfig(dim=16, heads=2, layers=2, context_layers=1),
    }
    return PublishedConfig(**{**fields, **changes})


def make(config: PublishedConfig | None = None, seed: int = 0) -> PatchICL:
    torch.manual_seed(seed)
    model = PatchICL(config or tiny())
    with torch.no_grad():  # the conditioning starts as the identity; make it and all else count
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def task(batch: int = 2, images: int = 2, size: tuple[int, int] = (16, 16), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = F.interpolate(torch.rand(batch * (images + 1), 1, 4, 4, generator=generator), size) > 0.6
    noise = torch.rand(batch * (images + 1), 1, *size, generator=generator)
    masks, pictures = masks.float(), 0.6 * masks + 0.4 * noise
    return {
        "target": pictures[:batch],
        "support_images": pictures[batch:].unflatten(0, (batch, images)),
        "support_masks": masks[batch:].unflatten(0, (batch, images)),
        "target_mask": masks[:batch],
    }


def finite_both_ways(model: PatchICL, data: dict[str, Tensor]) -> None:
    """Training forward and backward: finite, and every gradient that exists is finite."""
    output = model.train()(**data, seed=1)
    losses = segmentation_loss(output, data["target_mask"], LossConfig(target_patch=1.0, target_aggregated=1.0))
    losses["total"].backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"model_{s}": {"sampler": SamplerConfig(model_score=s)} for s in ("entropy", "foreground_entropy", "uniform")},
    **{f"support_{s}": {"sampler": SamplerConfig(support_score=s)} for s in settings.SUPPORT_SCORES},
    **{
        f"oracle_{s}": {
            "sampler": SamplerConfig(oracle_score=s),
            "oracle": OracleSchedule((True, True), (True, True)),
        }
        for s in settings.ORACLE_SCORES
    },
    "oracle_scheduled": {"oracle": OracleSchedule((False, True), (), scheduled=True)},
    **{f"differentiable_{d}": {"sampler": SamplerConfig(differentiable=d)} for d in settings.DIFFERENTIABLE},
    **{
        f"fusion_{f}": {"backbone": BackboneConfig(dim=16, heads=2, fusion=f, mask_prior=p)}
        for f, p in zip(settings.FUSIONS, ("probability", "logits", "none"), strict=True)
    },
    "no_masks": {"backbone": BackboneConfig(dim=16, heads=2, support_mask=False)},
    "no_registers": {"backbone": BackboneConfig(dim=16, heads=2, registers=0, zero_key=False, dropout=0.0)},
    "no_context_layers": {"backbone": BackboneConfig(dim=16, heads=2, context_layers=0, registers=3)},
    "checkpointing": {"backbone": BackboneConfig(dim=16, heads=2, checkpointing=True)},
    "published_positions": {"backbone": BackboneConfig(dim=16, heads=2, positions="published")},
    "skips_16": {
        "backbone": BackboneConfig(dim=16, heads=2, skips=True, patch_grid=16),
        "cascade": CascadeConfig(decode_support=True),
    },
    "skips": {
        "backbone": BackboneConfig(dim=16, heads=2, skips=True),
        "cascade": CascadeConfig(decode_support=True),
    },
    "detached": {"cascade": CascadeConfig(detach=True, registers=True)},
    "no_cascade": {"cascade": CascadeConfig(registers=False)},
    "confidence_entropy": {
        "confidence": ConfidenceConfig("entropy", 2.0),
        "sampler": SamplerConfig(model_score="confidence"),
    },
    "confidence_learned": {
        "confidence": ConfidenceConfig("learned"),
        "sampler": SamplerConfig(model_score="confidence"),
        "aggregation": AggregationConfig(confidence_weighting=True),
    },
    "temperature_fixed": {"confidence": ConfidenceConfig("entropy", learn_temperature=False)},
    "gaussian": {"aggregation": AggregationConfig("gaussian")},
    "universeg": {"features": FeatureConfig(channels=4, scales=(0, 2), input_size=16, grid=8, via_grid=True)},
    "universeg_trained": {"features": FeatureConfig(channels=4, input_size=16, grid=16, freeze=False, chunk=1)},
    "pixel": {"features": FeatureConfig("convolutional", 4, (1, 3), 16, 32, freeze=False, alignment="pixel")},
    "antialias": {
        "features": FeatureConfig("convolutional", 4, (0,), 16, 16, False, True, alignment="pixel", antialias=True)
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_trains_and_predicts(name: str) -> None:
    model, data = make(tiny(**VARIANTS[name])), task()
    finite_both_ways(model, data)
    with torch.no_grad():
        output = model.eval()(**data)
    assert output.logits.shape == (2, 1, 16, 16)
    assert output.logits.isfinite().all()
    assert [level.resolution for level in output.levels] == [(8, 8), (16, 16)]


def test_evaluation_is_deterministic_and_seeds_vary_it() -> None:
    """Two calls agree bit for bit, with a seed too; two seeds do not pick the same patches."""
    model, data = make().eval(), task()
    with torch.no_grad():
        plain = [model(**data).logits for _ in range(2)]
        seeded = [model(**data, seed=s) for s in (1, 1, 2)]
    assert torch.equal(*plain)
    assert torch.equal(seeded[0].logits, seeded[1].logits)
    assert not torch.equal(seeded[0].levels[1].coords, seeded[2].levels[1].coords)


def test_target_and_support_draw_independently() -> None:
    draws = Draws(2, False, 5, None)
    seeds = {draws.source(call)["seed"] for call in range(4)}
    assert len(seeds) == 4
    chance = draws.oracle_chance(1, 64, torch.device("cpu"))
    assert chance.shape == (64, 1, 1, 1)
    assert 0 < chance.min() < chance.max() < 1
    with pytest.raises(ValueError, match="must not both"):
        Draws(2, False, 1, [])
    with pytest.raises(ValueError, match="noise must hold 4 tensors, two a level, got 1"):
        Draws(2, False, None, [torch.rand(1, 1)])
    noise = [torch.rand(2, 1), torch.rand(4, 1), torch.rand(2, 3), torch.rand(4, 4)]
    with pytest.raises(ValueError, match=r"noise must have shape .* = \[2, 4\] at resolution 16, got \[2, 3\]"):
        make().eval()(**task(), noise=noise)


def test_one_memory_serves_a_batch() -> None:
    model, data = make().eval(), task()
    one = {k: v[:1] for k, v in data.items()}
    memory = model.encode_support(one["support_images"], one["support_masks"])
    with torch.no_grad():
        both = model(data["target"], memory=memory).logits
        drawn = model(data["target"], memory=memory, seed=4)
        repeated = {k: v[:1].expand_as(v) for k, v in data.items() if k.startswith("support")}
        drawn_alone = model(data["target"], **repeated, seed=4)
        for b in range(2):
            alone = model(data["target"][b : b + 1], memory=memory).logits
            torch.testing.assert_close(both[b : b + 1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.logits, drawn_alone.logits, rtol=0, atol=1e-5)
    assert torch.equal(drawn.levels[1].support_coords, drawn_alone.levels[1].support_coords)


def test_the_order_of_the_support_set_does_not_matter() -> None:
    model, data = make().eval(), task(images=3)
    flipped = {k: v.flip(1) if k.startswith("support") else v for k, v in data.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**data).logits, model(**flipped).logits, rtol=0, atol=1e-5)


def test_more_patches_than_windows_are_clamped() -> None:
    levels = (LevelConfig(8, 99, 99), LevelConfig(16, 99, 99, target_patches_eval=2))
    model, data = make(tiny(levels=levels)), task()
    output = model.train()(**data)
    assert [level.coords.shape[1] for level in output.levels] == [1, 4]
    assert output.levels[0].coverage.all()
    with torch.no_grad():
        output = model.eval()(**data)
    assert output.levels[1].coords.shape[1] == 2


def test_padding_lets_patches_stick_out() -> None:
    levels = (LevelConfig(8, 4, 4, stride=6, pad_before=3, pad_after=3),)
    with torch.no_grad():
        level = make(tiny(levels=levels)).eval()(**task()).levels[0]
    assert set(level.coords.flatten().tolist()) == {-3, 3}
    assert level.coverage.all()


@pytest.mark.parametrize("size", [(16, 24), (20, 12), (7, 9)])
def test_any_aspect_ratio(size: tuple[int, int]) -> None:
    with torch.no_grad():
        output = make().eval()(**task(size=size))
    assert output.logits.shape == (2, 1, *size)
    assert output.logits.isfinite().all()


def test_degenerate_inputs_are_finite() -> None:
    """A constant image, an empty mask, a full mask."""
    for value in (0.0, 1.0):
        data = {k: torch.full_like(v, value) for k, v in task().items()}
        finite_both_ways(make(), data)


def test_soft_and_boolean_masks() -> None:
    """Masks may be fractions; a boolean target mask is as good as its floats."""
    data = task()
    data["support_masks"] = 0.5 * data["support_masks"]
    model = make(tiny(oracle=OracleSchedule((True, True), (True, True)))).eval()
    with torch.no_grad():
        floats = model(**data).logits
        assert torch.equal(floats, model(**{**data, "target_mask": data["target_mask"] > 0.5}).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(dtype: torch.dtype) -> None:
    data = task()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        output = make().eval()(**data)
    assert output.logits.isfinite().all()
    reduced = {k: v.to(dtype) for k, v in data.items()}
    with torch.no_grad():
        assert make().to(dtype).eval()(**reduced).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saturated_scores_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    """Also where 1 - 1e-6 rounds to 1, in values and in gradients."""
    logits = torch.tensor([-30.0, 0.0, 30.0], dtype=dtype).view(1, 1, 1, 3).requires_grad_()
    mask = torch.ones(1, 1, 1, 3, dtype=dtype, requires_grad=True)
    scores = [MODEL_SCORES[name](logits, None) for name in ("entropy", "foreground_entropy")]
    scores += [ORACLE_SCORES["error"](mask, logits), ORACLE_SCORES["foreground_entropy"](mask, logits)]
    scores += [SUPPORT_SCORES["foreground_entropy"](mask), ConfidenceMap(1.0, True)(logits)]
    total = torch.stack([score.float() for score in scores])
    total.sum().backward()
    assert total.isfinite().all()
    assert logits.grad.isfinite().all()
    assert mask.grad.isfinite().all()
    noise = Draws(1, True, None, [torch.tensor([0.0, 1.0], dtype=dtype)] * 2).source(0)["noise"]
    assert noise.isfinite().all()
    assert binary_entropy(mask.double()).dtype == torch.float64


@pytest.mark.parametrize("confidence", ["none", "entropy"])
def test_saturated_predictions_under_autocast(confidence: str) -> None:
    config = tiny(
        confidence=ConfidenceConfig(confidence),
        sampler=SamplerConfig(model_score="entropy" if confidence == "none" else "confidence"),
        aggregation=AggregationConfig(confidence_weighting=confidence != "none"),
    )
    model = make(config)
    with torch.no_grad():
        model.network.decoder.head[-1].bias.fill_(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        finite_both_ways(model, task())


def test_no_graph_break_in_evaluation() -> None:
    model, data = make().eval(), task()
    names = ("target", "support_images", "support_masks")

    def run(target: Tensor, images: Tensor, masks: Tensor) -> Tensor:
        return model.network(target, model.network.encode_support(images, masks)).logits

    with torch.no_grad():
        compiled = torch.compile(run, backend="eager", fullgraph=True)(*(data[n] for n in names))
        assert torch.equal(compiled, run(*(data[n] for n in names)))


# --- training --------------------------------------------------------------------------------------


def test_a_one_level_model_learns() -> None:
    """One level with only its combined prediction supervised, which the published loss leaves without gradient."""
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=32, heads=2, layers=1, context_layers=0, dropout=0.0)
    features = FeatureConfig("convolutional", channels=8, scales=(0,), input_size=16, grid=16, freeze=False)
    model = PatchICL(tiny(levels=(LevelConfig(16, 4, 4),), backbone=backbone, features=features)).train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    data, losses = task(batch=4), []
    for _ in range(25):
        loss = segmentation_loss(model(**data), data["target_mask"], LossConfig())["total"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_straight_through_changes_no_value_but_brings_gradients() -> None:
    """The coarser level's parameters get gradients through the choice of patches; "published" rescales the logits."""
    data, logits, gradients = task(), {}, {}
    for kind in settings.DIFFERENTIABLE:
        config = tiny(sampler=SamplerConfig(differentiable=kind), backbone=BackboneConfig(dim=16, heads=2, dropout=0.0))
        model = make(config).train()
        logits[kind] = model(**data, seed=2).logits
        score_path = model.network.decoder.head[-1].weight
        gradients[kind] = torch.autograd.grad(logits[kind].square().sum(), score_path)[0]
    torch.testing.assert_close(logits["straight_through"], logits["off"])
    assert not torch.allclose(gradients["straight_through"], gradients["off"])
    assert not torch.allclose(logits["published"], logits["off"])


def test_support_losses_need_decoded_support() -> None:
    data, wanted = task(), LossConfig(support_patch=1.0, support_aggregated=1.0)
    model = make(tiny(cascade=CascadeConfig(decode_support=True))).train()
    losses = segmentation_loss(model(**data), data["target_mask"], wanted, data["support_masks"])
    losses["total"].backward()
    assert losses["total"].isfinite()
    with pytest.raises(ValueError, match="support_patch"):
        segmentation_loss(make().train()(**data), data["target_mask"], wanted, data["support_masks"])


def test_oracle_schedule() -> None:
    schedule = OracleSchedule(scheduled=True, warmup=1, decay=5, start=0.5, end=0.0)
    assert [schedule.probability(step) for step in (0, 1, 2, 3, 6, 99)] == pytest.approx([0.5, 0.5, 0.4, 0.3, 0, 0])
    assert OracleSchedule().probability(7) == 1.0
    network = make(tiny(oracle=dataclasses.replace(schedule, train_levels=(True, True)))).network
    assert network.oracle_share.item() == 0.5
    network.set_oracle_step(3)
    assert network.oracle_share.item() == pytest.approx(0.3)
    assert "oracle_share" not in network.state_dict()


def test_the_oracle_follows_its_share() -> None:
    """With the share at 0 the model picks, at 1 the oracle, in between sample by sample."""
    batch = 32
    config = tiny(
        levels=(LevelConfig(8, 1, 1), LevelConfig(32, 1, 1)),
        oracle=OracleSchedule((False, True), (), scheduled=True, start=0.5, end=0.0),
        sampler=SamplerConfig(model_score="uniform"),
    )
    model, data = make(config).train(), task(batch=batch, size=(32, 32))
    data["target_mask"] = torch.zeros(batch, 1, 32, 32)
    data["target_mask"][:, :, 24:, 24:] = 1

    def share_at_mask(step: int) -> float:
        model.network.set_oracle_step(step)
        with torch.no_grad():
            coords = model(**data, seed=0).levels[1].coords[:, 0]
        return (coords == 24).all(-1).float().mean().item()

    assert share_at_mask(99) < 0.3
    assert 0.3 < share_at_mask(0) < 0.8
    model.network.oracle_share.fill_(1.0)
    with torch.no_grad():
        assert (model(**data, seed=0).levels[1].coords == 24).float().mean() > 0.9


def test_an_oracle_needs_the_mask() -> None:
    model, data = make(tiny(oracle=OracleSchedule((), (False, True)))).eval(), task()
    with pytest.raises(ValueError, match="target_mask must be given where level 1"):
        model(**{k: v for k, v in data.items() if k != "target_mask"})
    with pytest.raises(ValueError, match=r"target_mask must have shape \[B, C, H, W\]"):
        model(**{**data, "target_mask": data["target_mask"][:1]})


def test_frozen_features_stay_frozen() -> None:
    features = FeatureConfig(channels=4, input_size=16, grid=16)
    network = make(tiny(features=features)).train().network
    assert not network.features.extractor.training
    assert not any(p.requires_grad for p in network.features.parameters())
    assert not network.features(torch.rand(1, 1, 16, 16)).requires_grad


def test_a_custom_extractor() -> None:
    class Intensity(torch.nn.Module):
        def forward(self, images: Tensor, masks: Tensor | None) -> list[Tensor]:
            return [images, torch.zeros_like(images) if masks is None else masks]

    model = make(tiny(features=FeatureConfig("custom", channels=2, input_size=16, grid=8)))
    with pytest.raises(RuntimeError, match=r"features\.extractor must be set"):
        model.eval()(**task())
    model.network.features.extractor = Intensity()
    finite_both_ways(model, task())


def test_a_custom_extractor_is_frozen_and_reloads(tmp_path: Path) -> None:
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(1)

        def forward(self, images: Tensor, masks: Tensor | None) -> list[Tensor]:
            return [self.norm(images)]

    def extended(config: icseg.PatchICLConfig) -> PatchICL:
        model = PatchICL(config).train()
        model.network.features.extractor = Normed()
        return model

    for freeze in (True, False):
        model = extended(tiny(features=FeatureConfig("custom", 1, input_size=16, grid=8, freeze=freeze)))
        extractor = model.network.features.extractor
        assert [p.requires_grad for p in extractor.parameters()] == [not freeze] * 2
        assert not (freeze and extractor.training)
    torch.nn.init.normal_(extractor.norm.weight)
    model.save_pretrained(tmp_path / "model.safetensors")
    config, state = load_checkpoint(tmp_path / "model.safetensors")
    again = extended(config)
    again.load_state_dict(state)
    assert torch.equal(again.network.features.extractor.norm.weight, extractor.norm.weight)


def test_chunks_change_no_batch_statistics() -> None:
    images, means = torch.rand(5, 1, 16, 16), []
    for chunk in (2, 5):
        torch.manual_seed(0)
        features = FeatureExtractor(FeatureConfig("convolutional", 4, (0,), 16, 16, freeze=False, chunk=chunk)).train()
        features(images)
        means.append(features.extractor.image_blocks[0][1].running_mean)
        evaluated = features.eval()(images)
        torch.testing.assert_close(evaluated[:2], features(images[:2]), rtol=0, atol=1e-5)
    assert torch.equal(*means)


# --- parts -----------------------------------------------------------------------------------------


def test_real_rotation_is_the_complex_one() -> None:
    dim, tokens = 16, 5
    torch.manual_seed(0)
    positions = torch.randint(0, POSITIONS, (2, tokens, 2))
    x = torch.randn(2, tokens, dim)
    theta = 10000.0 ** -(torch.arange(0, dim // 2, 2).double() / (dim // 2))
    turn = [torch.polar(torch.ones(()).double(), positions[..., axis, None] * theta) for axis in (1, 0)]
    halves = torch.view_as_complex(x.double().unflatten(-1, (2, dim // 4, 2)))  # [B, N, half, D / 4]
    expected = torch.view_as_real(halves * torch.stack(turn, dim=2)).flatten(2)
    torch.testing.assert_close(rotated(x, RotaryEmbedding(dim)(positions)).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("zero_key", [False, True])
def test_split_attention_is_the_masked_one(zero_key: bool) -> None:
    torch.manual_seed(0)
    ns, nr, nt = 5, 2, 3
    total = ns + nr + nt
    q, k, v = torch.randn(3, 2, 2, total, 4, dtype=torch.float64).unbind(0)
    bounds = [(ns, ns + nr), (nr + nt, total)]
    seen = torch.ones(total, total + zero_key, dtype=torch.bool)
    seen[:ns, ns + nr : total] = False
    angles = torch.randn(2, 2, total, 2, dtype=torch.float64)
    turn = Rotation(angles.cos(), angles.sin())
    keys, values = (F.pad(t, (0, 0, 0, int(zero_key))) for t in (rotated(k, turn), v))
    for first in (0, ns):  # all queries, and the last run's alone
        runs = bounds if first == 0 else bounds[1:]
        expected = F.scaled_dot_product_attention(rotated(q, turn)[:, :, first:], keys, values, attn_mask=seen[first:])
        for dropout in (0.0, 1e-12):
            found = attend(q[:, :, first:], k, v, turn, runs, zero_key, dropout)
            torch.testing.assert_close(found, expected)


def test_a_block_can_leave_leading_tokens_out() -> None:
    torch.manual_seed(0)
    block = Block(BackboneConfig(dim=16, heads=2, dropout=0.0))
    x, rotation = torch.randn(2, 7, 16), RotaryEmbedding(16)(torch.randint(0, POSITIONS, (2, 7, 2)))
    whole = block(x, 4, rotation, [(3, 4), (4, 7)])
    torch.testing.assert_close(block(x, 4, rotation, [(4, 7)]), whole[:, 3:])


def test_support_never_sees_the_target_in_one_layer() -> None:
    """With one joint layer, support predictions do not depend on the target; with two they do, through registers."""
    changed = {}
    for layers in (1, 2):
        config = tiny(
            backbone=BackboneConfig(dim=16, heads=2, layers=layers),
            cascade=CascadeConfig(decode_support=True),
        )
        model, data = make(config).eval(), task()
        with torch.no_grad():
            a = model(**data).levels[0].support_patch_logits
            b = model(**{**data, "target": 1 - data["target"]}).levels[0].support_patch_logits
        changed[layers] = not torch.equal(a, b)
    assert changed == {1: False, 2: True}


def test_scores() -> None:
    p = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(binary_entropy(p), torch.tensor([0.0, 1.0, 0.0]), atol=3e-5, rtol=0)
    torch.testing.assert_close(half_entropy(p), torch.tensor([0.0, 0.75, 0.5]), atol=3e-5, rtol=0)


def test_level_masks_keep_small_objects() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[0, 0, 3, 3] = 1
    assert level_mask(mask, (4, 4), 1.0)[0, 0, 0, 0] == 1
    assert level_mask(mask, (4, 4), 1.0).sum() == 1
    assert level_mask(mask, (4, 4), 0.5)[0, 0, 0, 0] == 0.5
    assert level_mask(mask, (4, 4), 0.0)[0, 0, 0, 0] == pytest.approx(1 / 16)
    assert level_mask(mask, (16, 16), 1.0) is mask


def test_feature_patches_are_aligned() -> None:
    """Of a ramp, "pixel" reads the pixel centres, and "published" points spaced 8 / 7 from half a pixel before."""
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    coords = torch.tensor([[[8, 40]]])
    pixel = FeatureConfig(grid=64, alignment="pixel")
    own = read_patches(ramp, coords, 64, 8, 8, pixel)[0, 0, 0, 0]
    torch.testing.assert_close(own, torch.arange(40.0, 48.0))
    published = read_patches(ramp, coords, 64, 8, 8, FeatureConfig(grid=64))[0, 0, 0, 0]
    torch.testing.assert_close(published, 39.5 + torch.arange(8) * 8 / 7)
    coarse = read_patches(ramp, torch.tensor([[[0, 8]]]), 16, 8, 8, pixel)[0, 0, 0, 0]
    torch.testing.assert_close(coarse, 4 * torch.arange(8.0, 16.0) + 1.5)
    stripes = (torch.arange(64) % 4 == 0).float().expand(1, 1, 64, 64)
    smooth = read_patches(stripes, coords // 4, 16, 8, 8, dataclasses.replace(pixel, antialias=True))
    torch.testing.assert_close(smooth, torch.full_like(smooth, 0.25))


def test_positions_ignore_what_the_model_was_made_for() -> None:
    """ "image" positions depend on the share of the image alone, to the bit; "published" ones clamp."""
    coords = torch.tensor([[0, 8], [8, 0]])
    network = make().network
    assert network.levels[1].positions(coords, 16).tolist() == [[0, 511], [511, 0]]
    for resolution in (24, 49, 93):
        level = Level(LevelConfig(resolution, 1, 1), tiny())
        grid = torch.arange(resolution + 1)[:, None].expand(-1, 2)
        expected = torch.tensor([1023 * y // resolution for y in range(resolution + 1)])[:, None].expand(-1, 2)
        for height in (7, 24, 49, 1023):
            assert torch.equal(level.positions(grid, height), expected)
    published = make(tiny(backbone=BackboneConfig(dim=16, heads=2, positions="published"))).network
    assert published.levels[1].positions(coords, 16).tolist() == [[0, 511], [511, 0]]
    assert published.levels[1].positions(coords, 48).tolist() == [[0, 1023], [1023, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", settings.AGGREGATIONS)
def test_tiny_weights_still_give_the_weighted_mean(kind: str, dtype: torch.dtype) -> None:
    """Equal confidences of any size give the plain mean, and none of it overflows backwards."""
    aggregation = Aggregation(AggregationConfig(kind, sigma_ratio=0.05, confidence_weighting=True), 8)
    values = torch.tensor([4.0, -2.0], dtype=dtype).view(1, 2, 1, 1, 1).expand(1, 2, 1, 8, 8).clone().requires_grad_()
    coords = torch.zeros(1, 2, 2, dtype=torch.int64)
    for size in (1.0, 1e-5, 1e-9, 0.0):
        confidence = torch.full_like(values, size).detach().requires_grad_()
        map_, covered, _ = aggregation(values, coords, 16, confidence)
        inside = map_[..., :8, :8]
        torch.testing.assert_close(inside, torch.ones_like(inside))
        assert covered.sum() == 64
        gradients = torch.autograd.grad(map_.sum(), [values, confidence])
        assert all(g.isfinite().all() for g in gradients)


# --- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (128, [(24, 9, 0.0), (64, 20, 4.0), (128, 30, 4.0)]),
        (512, [(24, 9, 0.0), (64, 20, 4.0), (128, 20, 4.0), (512, 30, 4.0)]),
    ],
)
def test_the_papers_settings(size: int, expected: list[tuple[int, int, float]]) -> None:
    config = icseg.PatchICLConfig.published(size)
    assert [(lv.resolution, lv.target_patches, lv.target_blur) for lv in config.levels] == expected
    assert all(lv.support_patches == lv.target_patches and lv.stride == 8 for lv in config.levels)
    assert (config.features.grid, config.features.dim, config.features.input_size) == (128, 256, size)
    assert config.features.via_grid
    b = config.backbone
    assert (b.dim, b.heads, b.layers, b.context_layers, b.registers, b.fusion) == (256, 4, 2, 1, 1, "concat")
    assert b.zero_key
    assert not b.skips


def test_parameters_of_the_papers_model() -> None:
    """7.99 million trainable ones, as published."""
    with torch.device("meta"):
        model = PatchICL(icseg.PatchICLConfig.published(128))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pytest.approx(7.99e6, rel=0.002)


def test_flops_of_the_papers_model() -> None:
    """At 512 px with 3 pairs: below the published code's 307.55 GFLOPs, and most of it once a support set."""
    with FakeTensorMode(), torch.no_grad():
        model = PatchICL(icseg.PatchICLConfig.published(512)).eval()
        support, gflops = torch.rand(1, 3, 1, 512, 512), []
        with FlopCounterMode(display=False) as counter:
            memory = model.encode_support(support, support)
        gflops.append(counter.get_total_flops() / 1e9)
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(1, 1, 512, 512), memory=memory)
        gflops.append(counter.get_total_flops() / 1e9)
    assert gflops == pytest.approx([219.9, 85.6], abs=0.1)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name: str) -> None:
    config = tiny(**VARIANTS[name])
    again = icseg.PatchICLConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_every_field_is_validated() -> None:
    """No field of any section takes a value of another kind."""
    config = tiny()
    sections = [config, *config.levels[:1], *(getattr(config, name) for name in settings._SECTIONS)]
    for section in sections:
        for field in dataclasses.fields(section):
            with pytest.raises((ValueError, TypeError), match=field.name):
                dataclasses.replace(section, **{field.name: object()})


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (LevelConfig, {"resolution": 0}, "resolution must be an int of at least 1, got 0"),
        (LevelConfig, {"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        (LevelConfig, {"target_blur": float("nan")}, "target_blur must be a finite number"),
        (SamplerConfig, {"model_score": "magic"}, "model_score must be one of entropy"),
        (OracleSchedule, {"start": 1.5}, "start must be a finite number"),
        (OracleSchedule, {"train_levels": (1,)}, "train_levels must be a tuple of bools"),
        (FeatureConfig, {"scales": (1, 0)}, "scales must be a tuple of ascending ints"),
        (FeatureConfig, {"input_size": 100}, "input_size must be divisible by 8, got 100"),
        (FeatureConfig, {"antialias": True}, 'antialias must be False with alignment "published"'),
        (BackboneConfig, {"dim": 12}, "dim must be divisible by 8"),
        (BackboneConfig, {"heads": 3}, r"by 2 \* heads = 6"),
        (BackboneConfig, {"patch_grid": 4}, "patch_grid must be 8 or 16, got 4"),
        (PublishedConfig, {"levels": ()}, "levels must be a tuple of at least one LevelConfig"),
        (PublishedConfig, {"levels": (LevelConfig(4, 1, 1),)}, "at least patch_size = 8, got 4"),
        (PublishedConfig, {"oracle": OracleSchedule((True,))}, "train_levels must hold 4 bools"),
        (
            PublishedConfig,
            {"sampler": SamplerConfig(model_score="confidence")},
            'model_score must not be "confid',
        ),
        (
            PublishedConfig,
            {"aggregation": AggregationConfig(confidence_weighting=True)},
            "confidence_weighting must",
        ),
    ],
)
def test_bad_values_have_clear_messages(cls: type, fields: dict[str, Any], message: str) -> None:
    required = {"resolution": 8, "target_patches": 1, "support_patches": 1} if cls is LevelConfig else {}
    with pytest.raises(ValueError, match=message):
        cls(**{**required, **fields})


def test_unknown_keys_are_errors() -> None:
    values = tiny().to_dict()
    with pytest.raises(ValueError, match="PublishedConfig has no field bakbone"):
        icseg.PatchICLConfig.from_dict({**values, "bakbone": {}})
    with pytest.raises(ValueError, match="BackboneConfig has no field width"):
        icseg.PatchICLConfig.from_dict({**values, "backbone": {"width": 3}})
    with pytest.raises(ValueError, match="LevelConfig has no field size"):
        icseg.PatchICLConfig.from_dict({**values, "levels": [{"size": 3}]})
    with pytest.raises(ValueError, match="backbone must hold tables"):
        icseg.PatchICLConfig.from_dict({**values, "backbone": 3})
    with pytest.raises(ValueError, match="PublishedConfig has no field size"):
        icseg.PatchICLConfig.published(64, size=3)


# --- configurations of the published code ----------------------------------------------------------


def published() -> dict[str, Any]:
    return json.loads((DATA / "patchicl_3level.json").read_text())["config"]


def test_a_published_configuration() -> None:
    config = PublishedConfig.from_published_dict(published())
    assert config.levels[1] == LevelConfig(32, 6, 6, target_blur=2.0, support_blur=2.0)
    assert config.features == FeatureConfig(channels=8, input_size=64, grid=64, via_grid=True)
    assert config.sampler == SamplerConfig(differentiable="published")
    assert (config.backbone.positions, config.backbone.mask_prior) == ("published", "none")
    assert config.cascade == CascadeConfig(detach=False, registers=True, decode_support=False)


def test_published_defaults() -> None:
    level = {"resolution": 24, "patch_size": 8, "num_patches": 9}
    config = PublishedConfig.from_published_dict(
        {"levels": [level], "feature_extractor": {"type": "icl_encoder"}, "backbone": {"embed_dim": 256}}
    )
    assert config.levels[0] == LevelConfig(24, 9, 9, stride=1, temperature=0.3, pad_before=2, pad_after=5)
    expected = FeatureConfig("convolutional", channels=64, input_size=128, grid=16, freeze=False)
    assert config.features == expected
    assert config.oracle.train_levels == (True,)
    assert config.cascade == CascadeConfig(detach=True, registers=False, decode_support=True)


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("backbone", "num_layer", 2, "backbone has no key num_layer"),
        ("sampler", "target_sampling", "gt_foreground", "sampler has no key target_sampling"),
        ("sampler", "type", "sliding_window", "type must be 'continuous'"),
        ("sampler", "context_sampling", "gt_border", "sampling modes must be among"),
        (
            "feature_extractor",
            "type",
            "medsam2",
            "feature_extractor type must be one of universeg, icl_encoder",
        ),
        ("backbone", "embed_dim", 30, "embed_dim must be divisible by the 4 layers"),
        ("oracle_scheduling", "schedule", "cosine", "schedule must be 'linear'"),
        ("loss", "confidence", {}, "loss has no key confidence"),
        ("aggregator", "use_confidence", True, "aggregator has no key use_confidence"),
    ],
)
def test_what_a_published_configuration_may_not_hold(table: str, key: str, value: Any, message: str) -> None:
    config = published()
    config.setdefault(table, {})[key] = value
    with pytest.raises(ValueError, match=message):
        _ = PublishedConfig.from_published_dict(config), loss_from_published(config)


def test_keys_without_effect_are_ignored_by_name() -> None:
    config = published()
    config["backbone"] |= {"compile": True, "target_self_attention": True}
    config["cascade"] |= {"additive_fusion": True, "learned_alpha": False}
    config["sampler"]["augmentation"] = {"enabled": True}
    config["model_version"] = "v3"
    assert PublishedConfig.from_published_dict(config) == PublishedConfig.from_published_dict(published())


def test_published_losses() -> None:
    config = published()
    kind = {"type": "softdiceFocal", "args": {"alpha": 0.5}}
    config["loss"] = {
        "patch_loss": kind,
        "aggreg_loss": kind,
        "weights": {"target_patch": 0.5, "context_aggreg": 0.0},
        "level_weights": [0.0, 0.0, 1.0],
    }
    expected = LossConfig(target_patch=0.5, level_weights=(0.0, 0.0, 1.0), mask_reduction="hybrid", focal_alpha=0.5)
    assert loss_from_published(config) == expected
    config["loss"]["patch_loss"] = {"type": "dice"}
    with pytest.raises(ValueError, match="must be the same"):
        loss_from_published(config)


def test_the_trainable_extractor_converts() -> None:
    """A state dict in the published extractor's names gives the same features."""
    level = {"resolution": 16, "patch_size": 8, "num_patches": 4}
    extractor = {"type": "icl_encoder", "output_grid_size": 16, "layer_idx": [0]}
    backbone = {"embed_dim": 4, "embed_proj_dim": 16, "num_heads": 2, "num_registers": 0, "use_context_mask": True,
                "mask_fusion_type": "gated", "patch_feature_grid_size": 8}  # fmt: skip
    config = {"levels": [level], "feature_extractor": extractor, "backbone": backbone}
    ours = make(PublishedConfig.from_published_dict(config)).eval()
    theirs = _published_names(ours.network.state_dict())
    loaded = icseg.load_published(theirs, config)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def _published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of the conversion, for the model of the test above."""
    theirs = {}
    for name, tensor in state.items():
        name = name.replace("features.extractor.image_blocks.0.", "feature_extractor.img_blocks.0.block.")
        name = name.replace("features.extractor.mask_blocks.0.", "feature_extractor.msk_blocks.0.block.")
        name = name.replace("scale.frequencies", "backbone.scale_encoder.freqs")
        name = name.replace("mask_encoder.layers", "backbone.mask_encoder.mask_downscaling")
        name = name.replace("fusion.gates.prior", "backbone.mask_gate")
        name = name.replace("fusion.gates.support", "backbone.context_mask_gate")
        name = name.replace("encoder.project", "backbone.encoder.input_proj")
        name = name.replace("encoder.stages", "backbone.encoder.levels").replace(
            "decoder.stages", "backbone.decoder.levels"
        )
        name = name.replace("decoder.head", "backbone.decoder.seg_head").replace("transformer", "backbone.attention")
        if "decoder.levels" in name:
            name = name.replace(".conv.", ".fuse_conv.").replace(".norm.", ".fuse_norm.")
        if name == "backbone.attention.registers":
            continue
        if ".film." in name:
            for part, value in zip(("gamma_proj", "beta_proj"), tensor.chunk(2), strict=True):
                theirs[name.replace("film", part)] = value
        elif name.endswith(".types"):
            for part, value in zip(("context_embed", "target_embed"), tensor, strict=True):
                theirs[name.replace("types", part)] = value.view(1, 1, -1)
        elif ".key_value." in name:
            for part, value in zip(("k_proj", "v_proj"), tensor.chunk(2), strict=True):
                theirs[name.replace("key_value", part)] = value
        else:
            name = name.replace(".query.", ".q_proj.").replace("s.0.out.", "s.0.out_proj.")
            theirs[name] = tensor.flatten(1) if name.endswith("input_proj.weight") else tensor
    return theirs
