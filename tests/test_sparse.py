"""The sparse architecture: exact support memory, determinism, any size, classes in one pass, budgets, gradients."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import icseg
from icseg.draws import derived_seed
from icseg.sparse import selection
from icseg.sparse.budget import Budget, shared_out
from icseg.sparse.config import SparseConfig
from icseg.sparse.cost import target_flops
from icseg.sparse.encoder import SmallConvolutions, activation
from icseg.sparse.patches import OUTSIDE, context_corner, coords_of, cut, grid_size
from icseg.sparse.propagation import cells, pixels
from icseg.sparse.pyramid import CONTEXT_STEPS, Pyramid, finest_size, level_count, to_size
from icseg_kernels import use_backend

SMALL = SparseConfig(
    levels=(16, 32, 64),
    distinct_levels=3,
    target_patches=(4, 6, 8),
    support_patches=(4, 6, 8),
    exploration=(4, 6, 6),
    dim=32,
    depth=2,
    stem_channels=8,
    registers=2,
)


def make_inputs(batch=2, support=3, height=64, width=64, classes=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, 1, height, width, generator=generator)
    images = torch.rand(batch, support, 1, height, width, generator=generator)
    labels = torch.rand(batch, support, classes, height // 8 + 1, width // 8 + 1, generator=generator)
    masks = (labels > 0.6).float().repeat_interleave(8, -1).repeat_interleave(8, -2)
    return target, images, masks[..., :height, :width]


def make_model(config=SMALL):
    torch.manual_seed(0)
    model = icseg.PatchICL(config)
    for parameter in model.parameters():  # the zero-initialised output layers would hide a fault behind them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    for layer in (model.network.encoder.stem, model.network.decoder):  # predictions that depend on the image
        for parameter in layer.parameters():
            parameter.data *= 3
    return model.eval()


@pytest.fixture
def model():
    return make_model()


def patches_of(out):
    """The patches of each level that lie in the image."""
    return [int((level.coords[0] >= 0).all(-1).sum()) for level in out.levels]


def test_shapes_of_every_level(model):
    target, images, masks = make_inputs(classes=2)
    out = model(target, images, masks, budget=18)
    assert out.logits.shape == (2, 2, 64, 64)
    assert out.uncertainty.shape == out.coverage.shape == (2, 1, 64, 64)
    assert [level.resolution for level in out.levels] == [(16, 16), (32, 32), (64, 64)]
    for level, count in zip(out.levels, (4, 6, 8), strict=True):
        assert level.logits.shape == (2, 2, *level.resolution)
        assert level.coords.shape == (2, count, 2)
        assert level.patch_logits.shape == level.extras["error_logits"].shape == (2, count, 2, 8, 8)
        assert level.coverage.sum() == 2 * count * 64
    assert out.levels[0].coverage.all(), "the coarsest level must be tiled completely"
    assert torch.equal(out.coverage, out.levels[-1].coverage)


@pytest.mark.parametrize("size", [(64, 40), (33, 64), (32, 32), (100, 20), (200, 150), (41, 1)])
@pytest.mark.parametrize("budget", [None, 12, Budget(tolerance=0)])
def test_any_size(model, size, budget):
    out = model(*make_inputs(1, 1, *size), budget=budget)
    assert out.logits.shape == (1, 1, *size)
    assert out.logits.isfinite().all()
    assert out.uncovered_error is None or (out.uncovered_error >= 0).all()


def test_proportions_are_kept(model):
    """An image and the same image continued by its edge are segmented alike where they agree."""
    _, images, masks = make_inputs(1, 2)
    memory = model.encode_support(images, masks)
    square = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    square[..., 32:] = square[..., 31:32]
    narrow = square[..., :32]
    whole, part = (model(image, memory=memory, budget=Budget(tolerance=0)) for image in (square, narrow))
    assert [level.resolution for level in part.levels] == [(16, 8), (32, 16), (64, 32)]
    probability = whole.probability[..., :32]
    assert (probability - part.probability).abs().mean() < 0.1


def test_a_column_of_pixels_is_not_its_first_row(model):
    """torch's anti-aliased resizing to width 1 repeats the first row."""
    image = torch.linspace(0, 1, 3000).view(1, 1, 3000, 1).expand(-1, -1, -1, 60)
    resized = to_size(image, (32, 1))
    assert resized.diff(dim=2).min() > 0
    assert resized.mean() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("budget", [None, 18, Budget(tolerance=0)])
def test_nan_pixels_stay_in_their_row(model, budget):
    target, images, masks = make_inputs(batch=2)
    memory = model.encode_support(images[:1], masks[:1])
    clean = model(target[1:], memory=memory, budget=budget).logits
    target[0, 0, 5, 5] = torch.nan
    torch.testing.assert_close(model(target, memory=memory, budget=budget).logits[1:], clean, atol=1e-5, rtol=0)


def test_levels_end_at_the_one_nearest_to_the_image():
    levels = (32, 64, 128, 256)
    sides = {20: 1, 32: 1, 45: 1, 46: 2, 90: 2, 91: 3, 256: 4, 4096: 4}
    assert {side: level_count(side, 1, levels) for side in sides} == sides
    assert level_count(10, 128, levels) == 3


def test_memory_gives_bitwise_the_same_logits(model):
    target, images, masks = make_inputs(classes=2)
    assert torch.equal(
        model(target, images, masks).logits, model(target, memory=model.encode_support(images, masks)).logits
    )


def test_one_memory_serves_any_batch():
    """Targets of one batch take different numbers of patches: what one does not need must not touch it."""
    model = make_model(dataclasses.replace(SMALL, exploration=(4, 2, 2), trial=3))
    target, images, masks = make_inputs(batch=3)
    target[1] = 0.5
    memory = model.encode_support(images[:1], masks[:1])
    budget = Budget(tolerance=0.005)
    together = model(target, memory=memory, budget=budget)
    alone = [model(t[None], memory=memory, budget=budget) for t in target]
    assert len({tuple(patches_of(out)) for out in alone}) > 1, "the targets must need different numbers"
    torch.testing.assert_close(together.logits, torch.cat([out.logits for out in alone]), atol=1e-5, rtol=0)
    uncovered = torch.cat([out.uncovered_error for out in alone])
    torch.testing.assert_close(together.uncovered_error, uncovered, atol=1e-5, rtol=0)


def test_order_of_the_support_set_does_not_matter(model):
    target, images, masks = make_inputs(classes=2)
    order = torch.tensor([2, 0, 1])
    expected = model(target, images, masks, budget=18).logits
    found = model(target, images[:, order], masks[:, order], budget=18).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_padding_of_the_support_set_is_not_seen(model):
    target, images, masks = make_inputs(classes=2)
    valid = torch.tensor([[True, False, True], [True, True, False]])
    images[~valid] = torch.nan
    masks[~valid] = 1.0
    found = model(target, memory=model.encode_support(images.nan_to_num(9.0), masks, valid=valid), budget=18).logits
    for row, keep in enumerate(valid):
        memory = model.encode_support(images[row : row + 1, keep], masks[row : row + 1, keep])
        alone = model(target[row : row + 1], memory=memory, budget=18).logits
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "valid", [torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 3), torch.ones(3, dtype=torch.bool)]
)
def test_padding_mask_is_checked(model, valid):
    _, images, masks = make_inputs()
    with pytest.raises(ValueError, match=r"valid must be bool of shape \[B, S\] = \[2, 3\], got"):
        model.encode_support(images, masks, valid=valid)


def test_support_set_one_by_one(model):
    target, images, masks = make_inputs(batch=1, support=5, classes=2)
    encoder = model.support_encoder(5)
    for image, mask in zip(images.split(1, 1), masks.split(1, 1), strict=True):
        encoder.add(image, mask)
    streamed, whole = encoder.finish(), model.encode_support(images, masks)
    assert streamed.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(streamed.tensors[name], tensor, atol=1e-4, rtol=1e-4)
    assert streamed.classes == whole.classes == 2
    assert model(target, memory=streamed).logits.isfinite().all()


def test_support_set_of_mixed_sizes(model):
    """A small image takes part in the levels that it has."""
    target, images, masks = make_inputs(batch=1, support=1)
    _, small_images, small_masks = make_inputs(batch=1, support=1, height=20, width=30)
    encoder = model.support_encoder(2)
    encoder.add(images, masks)
    encoder.add(small_images, small_masks)
    memory = encoder.finish()
    counts = [memory.tensors[f"level{level}.block0"].shape[1] - SMALL.registers for level in range(3)]
    assert counts == [4 + 2 * 2, 6 + 6, 8]  # at level 0 the small image has 2 x 2 patches, at level 1 6 of its 12
    assert model(target, memory=memory).logits.isfinite().all()


def test_streaming_keeps_patches_and_no_images(model):
    def kept(side):
        _, image, mask = make_inputs(batch=1, support=1, height=side, width=side)
        encoder = model.support_encoder(1)
        encoder.add(image, mask)
        parts = (t for level in encoder.levels for t in (*level.features, *level.tokens, *level.masks))
        return sum(t.untyped_storage().nbytes() for t in parts)

    assert kept(64) == kept(256)


def test_large_support_sets_are_bounded():
    config = dataclasses.replace(SMALL, most_support_patches=40)
    model = make_model(config)
    _, images, masks = make_inputs(batch=1, support=20)
    memory = model.encode_support(images, masks)
    assert {memory.tensors[f"level{level}.block0"].shape[1] for level in range(3)} == {20 * 2 + SMALL.registers}
    with pytest.raises(ValueError, match="count must be an int of at least 1, got 0"):
        model.support_encoder(0)
    encoder = model.support_encoder(2)
    encoder.add(images[:, :2], masks[:, :2])
    with pytest.raises(ValueError, match="support images must number 2 at most, got 3"):
        encoder.add(images[:, :1], masks[:, :1])
    encoder = model.support_encoder(20)
    encoder.add(images[:, :2], masks[:, :2])
    with pytest.raises(ValueError, match="support_masks must have B = 1 and C = 1 like those before"):
        encoder.add(images[:, :2], masks[:, :2].expand(-1, -1, 3, -1, -1))
    with pytest.raises(ValueError, match="support_masks must have the shape of support_images with C classes"):
        encoder.add(images[:, :2], masks[:, :2, :, :32])
    encoder.add(images[:, :2], masks[:, :2].bool())
    with pytest.raises(ValueError, match="support set must hold at least one image, got none"):
        model.support_encoder(3).finish()


def test_memory_on_disk(model, tmp_path):
    target, images, masks = make_inputs(classes=2)
    memory = model.encode_support(images, masks)
    memory.notes["organ"] = "liver"
    memory.save(tmp_path / "memory.safetensors")
    loaded = icseg.SupportMemory.load(tmp_path / "memory.safetensors")
    assert (loaded.classes, loaded.batch, loaded.notes) == (2, 2, {"organ": "liver"})
    assert torch.equal(model(target, memory=loaded).logits, model(target, memory=memory).logits)


@pytest.mark.parametrize("content", [b"", b"not a memory", None])
def test_memory_file_is_checked(model, tmp_path, content):
    path = tmp_path / "memory.safetensors"
    if content is None:
        model.save_pretrained(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"memory.safetensors must be a support memory, got another or a corrupt file"):
        icseg.SupportMemory.load(path)
    with pytest.raises(FileNotFoundError, match="memory must be an existing"):
        icseg.SupportMemory.load(tmp_path / "absent")


def test_memory_of_other_weights_is_refused(model, tmp_path):
    target, images, masks = make_inputs()
    loaded = []
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        loaded.append(icseg.PatchICL.from_pretrained(tmp_path / name))
        with torch.no_grad():
            model.network.norm.bias += 1
    memory = loaded[0].encode_support(images, masks)
    loaded[0](target, memory=memory)
    with pytest.raises(ValueError, match="memory must come from the weights"):
        loaded[1](target, memory=memory)


def test_memory_of_weights_that_changed_is_not_held_against_them(model, tmp_path):
    target, images, masks = make_inputs()
    model.save_pretrained(tmp_path / "weights")
    loaded = icseg.PatchICL.from_pretrained(tmp_path / "weights")
    assert loaded.encode_support(images, masks).weights
    assert not loaded.train().encode_support(images, masks).weights
    loaded = icseg.PatchICL.from_pretrained(tmp_path / "weights")
    loaded.load_state_dict(model.state_dict())
    assert not loaded.encode_support(images, masks).weights
    assert loaded.eval()(target, images, masks).logits.isfinite().all()


def test_memory_elsewhere_is_refused(model):
    target, images, masks = make_inputs()
    memory = model.encode_support(images, masks)
    with pytest.raises(ValueError, match="memory must be on the device of target, cpu"):
        model(target, memory=memory.to("meta"))
    cut_off = {name: tensor[:1] for name, tensor in memory.tensors.items()}
    with pytest.raises(ValueError, match=r"with batch 2; got level0\.block0 on cpu with 1"):
        model(target, memory=dataclasses.replace(memory, tensors=cut_off))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_memory_of_another_precision_serves(model, dtype):
    target, images, masks = make_inputs()
    memory = model.encode_support(images, masks)
    other = {name: tensor.to(dtype) for name, tensor in memory.tensors.items()}
    found = model(target, memory=dataclasses.replace(memory, tensors=other), budget=18)
    assert found.logits.dtype == torch.float32
    assert (found.probability - model(target, memory=memory, budget=18).probability).abs().mean() < 0.02


def test_memory_of_another_configuration_is_refused(model):
    target, images, masks = make_inputs()
    other = icseg.PatchICL(SparseConfig(levels=(16,), target_patches=(4,), support_patches=(4,)))
    with pytest.raises(ValueError, match="memory must come from a model with configuration"):
        model(target, memory=other.encode_support(images, masks))


def test_memory_of_another_batch_is_refused(model):
    target, images, masks = make_inputs(batch=3)
    with pytest.raises(ValueError, match="support sets must number 1 or 3, one a target, got 2"):
        model(target, memory=model.encode_support(images[:2], masks[:2]))


def test_support_may_have_another_size(model):
    target, *_ = make_inputs(1, 1, 64, 64)
    _, images, masks = make_inputs(1, 2, 48, 96)
    assert model(target, images, masks).logits.isfinite().all()


def test_classes_in_one_pass_keep_their_masks_apart(model):
    """Permuting the classes of the support masks permutes the logits, and nothing else."""
    target, images, masks = make_inputs(classes=3)
    order = torch.tensor([2, 0, 1])
    expected = model(target, images, masks, budget=18).logits[:, order]
    torch.testing.assert_close(model(target, images, masks[:, :, order], budget=18).logits, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(expected[:, 0], expected[:, 1])


def test_eight_classes_cost_less_than_two_passes():
    model = make_model(SparseConfig())

    def flops(classes):
        target, images, masks = make_inputs(1, 3, 256, 256, classes)
        with torch.inference_mode(), use_backend("reference"):
            memory = model.encode_support(images, masks)
            with FlopCounterMode(display=False) as counter:
                model(target, memory=memory, budget=120)
        return counter.get_total_flops()

    assert flops(8) < 2 * flops(1)


def test_evaluation_is_deterministic_and_a_seed_draws(model):
    inputs = make_inputs()
    assert torch.equal(model(*inputs).logits, model(*inputs).logits)
    assert torch.equal(model(*inputs, seed=5, budget=18).logits, model(*inputs, seed=5, budget=18).logits)
    drawn = [model(*inputs, seed=seed, budget=18).levels[-1].coords for seed in range(4)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("seed", [None, 3])
def test_seeds_leave_the_memory_alone(model, seed):
    target, images, masks = make_inputs()
    memory = model.encode_support(images, masks)
    assert torch.equal(model(target, images, masks, seed=seed).logits, model(target, memory=memory, seed=seed).logits)


def test_several_seeds_give_hypotheses_and_their_mean(model):
    target, images, masks = make_inputs(classes=2)
    memory = model.encode_support(images, masks)
    out = model(target, memory=memory, seeds=[1, 2, 3], budget=14)
    assert out.hypotheses.shape == (2, 3, 2, 64, 64)
    for i, seed in enumerate((1, 2, 3)):
        assert torch.equal(out.hypotheses[:, i], model(target, memory=memory, seed=seed, budget=14).probability)
    torch.testing.assert_close(out.probability, out.hypotheses.mean(1), atol=1e-5, rtol=0)
    assert ((out.uncertainty >= 0) & (out.uncertainty <= 1 + 1e-6)).all()
    with pytest.raises(ValueError, match="seeds must hold at least one seed"):
        model(target, memory=memory, seeds=[])


def test_temperature_flattens_the_probabilities(model):
    inputs = make_inputs()
    before = model(*inputs).logits
    model.network.set_temperature(2.0)
    torch.testing.assert_close(model(*inputs).logits, before / 2)


def test_support_and_target_draws_are_independent():
    seeds = [derived_seed(s, purpose, level) for s in range(50) for purpose in range(4) for level in range(4)]
    seeds += [derived_seed(s, level) for s in range(50) for level in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- Budgets.


def test_fixed_budget_is_spent(model):
    inputs = make_inputs(1)
    assert patches_of(model(*inputs, budget=18)) == [4, 6, 8]
    assert sum(patches_of(model(*inputs, budget=40))) == 40
    assert patches_of(model(*inputs, budget=1)) == [4, 0, 0], "the first level is always tiled"
    assert patches_of(model(*inputs, budget=999)) == [4, 16, 64], "no more than there are"


def test_tolerance_says_what_is_worth_its_cost(model):
    inputs = make_inputs(1)
    totals, errors = [], []
    for tolerance in (0.0, 0.01, 0.1, 1e9):
        out = model(*inputs, budget=Budget(tolerance=tolerance))
        totals.append(sum(patches_of(out)))
        errors.append(out.uncovered_error.item())
    assert totals == sorted(totals, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] == 0 < errors[-1]
    assert (totals[0], totals[-1]) == (84, 4)


def test_full_coverage_covers(model):
    out = model(*make_inputs(1, height=64, width=40), budget=Budget(tolerance=0))
    assert all(level.coverage.all() for level in out.levels)
    assert out.coverage.all()


@pytest.mark.parametrize("gflops", [0.01, 0.02, 0.05])
def test_gflops_are_kept_to(gflops):
    patches = {"target_patches": (16, 24, 32), "support_patches": (16, 16, 24)}
    model = make_model(SparseConfig(levels=(32, 64, 128), dim=32, depth=1, **patches))
    target, images, masks = make_inputs(1, 1, 128, 128)
    with torch.inference_mode(), use_backend("reference"):
        memory = model.encode_support(images, masks)
        with FlopCounterMode(display=False) as counter:
            out = model(target, memory=memory, budget=Budget(gflops=gflops))
    spent = patches_of(out)
    assert spent[0] == 16
    formula = target_flops(model.network, memory, spent)
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.05)
    assert formula <= gflops * 1e9 or spent == [16, 0, 0]


def test_shared_out_hands_on_what_a_level_cannot_use():
    assert shared_out(20, [4, 2, 100], (1, 5, 5)) == [4, 2, 14]
    assert shared_out(3, [4, 16], (1, 1)) == [4, 0]
    assert sum(shared_out(77, [16, 64, 256], (16, 24, 32))) == 77


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "budget must name one of patches, gflops and tolerance, got none"),
        ({"patches": 3, "gflops": 1.0}, "got patches, gflops"),
        ({"patches": 0}, "patches must be an int of at least 1, got 0"),
        ({"gflops": -1.0}, "gflops must be a finite number of at least 0"),
        ({"tolerance": float("nan")}, "tolerance must be a finite number of at least 0"),
    ],
)
def test_budget_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


@pytest.mark.parametrize("budget", ["all", 1.5, True])
def test_other_budgets_are_refused(model, budget):
    with pytest.raises(TypeError, match="budget must be None, an integer or a Budget, got"):
        model(*make_inputs(), budget=budget)


def test_budgets_and_masks_of_training_are_checked(model):
    target, images, masks = make_inputs()
    with pytest.raises(ValueError, match=r"target_mask must have shape \[B, C, H, W\] = \[2, 1, 64, 64\]"):
        model(target, images, masks, target_mask=masks[:1, 0])
    with pytest.raises(ValueError, match="budget must be None in training"):
        model.train()(target, images, masks, budget=5)


def test_numpy_numbers_serve(model):
    inputs = make_inputs()
    expected = model(*inputs, budget=18, seeds=[3]).logits
    assert torch.equal(model(*inputs, budget=np.int64(18), seeds=np.array([3])).logits, expected)


def test_later_rounds_take_other_patches():
    inputs, budget = make_inputs(1), Budget(tolerance=0.001)
    out = make_model(dataclasses.replace(SMALL, exploration=(4, 2, 2), trial=3))(*inputs, budget=budget)
    small = dataclasses.replace(SMALL, exploration=(4, 2, 2), trial=1, most_patches=1)
    first = make_model(small)(*inputs, budget=budget)
    assert patches_of(first)[1] > 4, "two explore, one is a trial, and rounds of one follow"
    assert torch.equal(out.levels[1].coords[:, :2], first.levels[1].coords[:, :2])
    assert patches_of(out)[1] > 5
    for level in out.levels:
        assert len({tuple(c) for c in level.coords[0].tolist()}) == level.coords.shape[1]


def test_patches_that_mend_little_are_not_taken():
    inputs, budget = make_inputs(1), Budget(tolerance=0.01)
    few, many = (
        make_model(dataclasses.replace(SMALL, exploration=(4, 2, 2), patches_of_tolerance=n))(*inputs, budget=budget)
        for n in (1, 10_000)
    )
    assert patches_of(few)[1] < patches_of(many)[1]


def test_levels_beyond_those_of_training_are_explored_where_the_one_before_was_worth_it():
    inputs = make_inputs(1)
    config = dataclasses.replace(SMALL, exploration=(4, 2, 2), distinct_levels=2, patches_of_tolerance=1)
    model = make_model(config)
    worthless = patches_of(model(*inputs, budget=Budget(tolerance=0.2)))
    assert worthless == [4, 2, 0]
    worth = patches_of(model(*inputs, budget=Budget(tolerance=0.01)))
    assert worth[1] > 2
    assert worth[2] > 0


def test_constant_images_and_masks_stay_finite(model):
    target, images, masks = make_inputs()
    for value in (0.0, 1.0):
        out = model(torch.full_like(target, value), torch.full_like(images, value), torch.full_like(masks, value))
        assert out.logits.isfinite().all()


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


STACKS = {
    "plain": [nn.Conv2d(3, 5, 3), activation(), nn.Conv2d(5, 4, 4, 2, 1)],
    "activation first": [activation(), nn.Conv2d(3, 4, 3)],
    "two activations": [nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.5), nn.LeakyReLU(0.5)],
    "a linear layer": [nn.Conv2d(3, 4, 3), activation(), nn.Flatten(), nn.Linear(4 * 36, 5)],
    "nearest border": [nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate")],
    "reflected border": [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), activation()],
    "dilation": [nn.Conv2d(3, 4, 3, dilation=2), activation()],
    "groups": [nn.Conv2d(3, 6, 3, groups=3), activation()],
    "same": [nn.Conv2d(3, 4, 3, padding="same")],
    "large kernel": [nn.Conv2d(3, 4, 7), activation(), nn.Conv2d(4, 2, (1, 2))],
    "another class": [Doubled(3, 4, 3), activation()],
}


@pytest.mark.parametrize("modules", STACKS.values(), ids=STACKS.keys())
def test_stacks_of_convolutions_are_the_same_with_and_without_gradients(modules):
    stack, x = SmallConvolutions(*modules), torch.randn(2, 3, 8, 8)
    expected = stack(x.clone()).detach()
    with torch.inference_mode():
        torch.testing.assert_close(stack(x.clone()), expected, atol=1e-5, rtol=1e-5)


def test_hooks_of_convolutions_are_called():
    stack, x = SmallConvolutions(nn.Conv2d(3, 4, 3), activation()), torch.randn(2, 3, 8, 8)
    stack[0].register_forward_hook(lambda module, arguments, output: output + 1)
    expected = stack(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(stack(x), expected, atol=1e-5, rtol=1e-5)


# ---- Graphs and half precision.


def tensors_only(model, classes, names, **options):
    """The path of a target as a function of tensors."""

    def run(target, *tensors):
        memory = icseg.SupportMemory(model.network.fingerprint, 1, dict(zip(names, tensors, strict=True)), classes)
        return model(target, memory=memory, **options).logits

    return run


@pytest.mark.parametrize("budget", [Budget(tolerance=0.001), Budget(tolerance=0.2), 18])
def test_compiles_whole_and_equals_eager(budget):
    """Static rounds are as wide as the eager ones may become, so that both take the same patches."""
    config = dataclasses.replace(SMALL, target_patches=(4, 16, 64), most_patches=64, exploration=(4, 2, 2), trial=3)
    model = make_model(dataclasses.replace(config, distinct_levels=2, patches_of_tolerance=10))
    target, images, masks = make_inputs(2, 2)
    memory = model.encode_support(images[:1], masks[:1])
    run = tensors_only(model, 1, memory.tensors, budget=budget)
    with torch.inference_mode():
        expected = run(target, *memory.tensors.values())
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(target, *memory.tensors.values())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_exports_with_the_memory_as_input(model):
    target, images, masks = make_inputs(1, 2)
    memory = model.encode_support(images, masks)

    class PerTarget(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, target, tensors):
            kept = icseg.SupportMemory(model.network.fingerprint, 1, tensors)
            return self.model(target, memory=kept, budget=18).logits

    with torch.no_grad():
        program = torch.export.export(PerTarget(), (target, memory.tensors))
    other, other_images, other_masks = make_inputs(1, 2, seed=1)
    other_memory = model.encode_support(other_images, other_masks)
    found = program.module()(other, other_memory.tensors)
    torch.testing.assert_close(found, model(other, memory=other_memory, budget=18).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, dtype):
    target, images, masks = make_inputs(1, 2, classes=2)
    model.to(dtype)
    found = model(target.to(dtype), images.to(dtype), masks.to(dtype), budget=84)
    assert found.logits.dtype == dtype
    assert found.logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(model, dtype):
    inputs = make_inputs(1, 2)
    expected = model(*inputs, budget=84).probability
    with torch.autocast("cpu", dtype):
        found = model(*inputs, budget=84).probability
    assert (found.float() - expected).abs().mean() < 0.05


# ---- Training.


def test_every_level_trains(model):
    """Every level's own loss reaches every parameter but the other levels' embeddings and gains."""
    target, images, masks = make_inputs()
    model.train()
    own = ("encoder.level_embedding", "decoder.propagation_gain")
    for level in range(3):
        model.zero_grad()
        output = model(target, images, masks, target_mask=masks[:, 0], seed=1).levels[level]
        (output.logits.square().mean() + output.extras["error_logits"].square().mean()).backward()
        dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not dead
        for name in own:
            assert model.network.get_parameter(name).grad.flatten(1 if "embedding" in name else 0)[level].any()


def test_levels_are_detached_from_each_other(model):
    target, images, masks = make_inputs()
    model.train()
    out = model(target, images, masks, seed=1)
    gradient = torch.autograd.grad(out.levels[2].logits.sum(), model.network.encoder.level_embedding)[0]
    assert gradient[2].any()
    assert not gradient[:2].any()


def test_nothing_of_the_target_reaches_the_support(model):
    target, images, masks = make_inputs()
    memory = model.encode_support(images, masks)
    before = {name: tensor.clone() for name, tensor in memory.tensors.items()}
    model(target, memory=memory)
    assert all(torch.equal(before[name], tensor) for name, tensor in memory.tensors.items())


def test_finer_levels_share_the_last_embedding(model):
    shared = make_model(dataclasses.replace(SMALL, distinct_levels=2))
    assert shared.network.encoder.level_embedding.shape[0] == 2
    assert len(shared(*make_inputs()).levels) == 3


def test_change_is_bounded(model):
    with torch.no_grad():
        model.network.decoder.layers[-1].bias.fill_(1e4)
    out = model(*make_inputs())
    assert out.levels[0].logits.abs().max() <= SMALL.residual_bound


def test_level_predictions_are_the_combined_logits_of_their_patches(model):
    for level in model(*make_inputs()).levels:
        torch.testing.assert_close(level.prediction[level.coverage], level.logits[level.coverage])
        y, x = level.coords[0, 0]
        assert torch.equal(level.logits[0, :, y : y + 8, x : x + 8], level.patch_logits[0, 0])


def test_noise_is_refused(model):
    with pytest.raises(NotImplementedError, match="noise must be None for the sparse architecture"):
        model(*make_inputs(), noise=[])


def test_integer_images_are_refused(model):
    target, images, masks = make_inputs()
    with pytest.raises(TypeError, match="target must be floating-point"):
        model((target * 255).byte(), images, masks)
    with pytest.raises(TypeError, match="support_images must be floating-point"):
        model(target, (images * 255).byte(), masks)


# ---- Selection.


def test_support_patches_cover_foreground_first():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 8:24, 8:20] = 1
    index = selection.support_patches(mask, 8, 0.5, None)
    touched = torch.tensor([9, 10, 17, 18])
    assert set(index[0, :4].tolist()) == set(touched.tolist())
    assert index[0].unique().numel() == 8


def test_support_patches_take_classes_in_turn():
    """A small class gets its patches although a large one has more than enough."""
    mask = torch.zeros(1, 2, 64, 64)
    mask[:, 0, :, :40] = 1
    mask[:, 1, 32:40, 48:64] = 1
    index = selection.support_patches(mask, 8, 0.5, None)[0, :4]
    small = {38, 39}
    assert small <= set(index.tolist())


def test_target_patches_take_the_highest():
    score = torch.tensor([[0.1, 0.9, 0.0, 0.5, -1.0]])
    assert selection.target_patches(score, 2, 1.5, None).tolist() == [[1, 3]]
    assert selection.target_patches(score, 9, 1.5, None).tolist() == [[1, 3, 0, 2, -1]]
    drawn = {tuple(selection.target_patches(score, 2, 1.5, seed)[0].tolist()) for seed in range(30)}
    assert len(drawn) > 1
    assert 4 not in set(itertools.chain(*drawn))


def test_exploration_tells_what_others_are_worth():
    score = torch.tensor([[0.4, 0.3, 0.2], [0.4, 0.3, 0.2], [0.4, 0.3, 0.2]])
    index = torch.tensor([[0, 1], [0, -1], [-1, -1]])
    after = torch.tensor([[0.3, 0.05], [0.5, 0.0], [0.0, 0.0]])
    share = selection.reducible_share(score, index, after)
    torch.testing.assert_close(share, torch.tensor([[0.5], [0.0], [0.0]]))


def test_second_look_raises_what_lies_beside_a_change():
    score = torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0]])
    found = selection.second_look(score, torch.tensor([[0.6, 9.0]]), torch.tensor([[1, -1]]), (2, 4))
    half = selection.NEIGHBOUR_ERROR * 0.6
    torch.testing.assert_close(found, torch.tensor([[half, half, half, 0.0, 0.9, half, half, 0.0]]))


# ---- Geometry.


def test_patches_lie_where_their_coords_say():
    image = torch.arange(32 * 32.0).view(1, 1, 32, 32)
    coords = coords_of(torch.tensor([[5, 0, -1]]), 4)
    assert coords.tolist() == [[[8, 8], [0, 0], [OUTSIDE, OUTSIDE]]]
    patches = cut(image, coords - 4, 16)
    assert torch.equal(patches[0, 0, 0], image[0, 0, 4:20, 4:20])
    assert torch.equal(patches[0, 1, 0, 4:, 4:], image[0, 0, :12, :12])
    assert (patches[0, 1, 0, :4, 4:] == image[0, 0, 0, :12]).all(), "the border is replicated"
    quarter = F.avg_pool2d(image, 4)
    context = cut(quarter, context_corner(coords[:, :1]), 16)  # centred on the 2 x 2 px of the patch
    assert torch.equal(context[0, 0, 0, 5:13, 5:13], quarter[0, 0])


def test_prior_patches_are_those_of_the_doubled_map():
    coarser = torch.randn(1, 2, 16, 16)
    coords = coords_of(torch.tensor([[5, 10]]), 4)
    doubled = F.interpolate(coarser, scale_factor=2, mode="bilinear")
    whole = cut(doubled, coords - 4, 16)
    torch.testing.assert_close(cut(coarser, coords // 2 - 2, 8, 16), whole)


def test_pyramid_shows_what_the_mean_hides():
    image = torch.full((1, 1, 64, 64), 0.2)
    image[..., 13, :] = 0.9
    pyramid = Pyramid.of(image, 3)
    assert [tuple(i.shape[-2:]) for i in pyramid.images] == [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64)]
    for level in range(2):
        factor = 2 ** (2 - level)
        torch.testing.assert_close(pyramid.image(level), F.avg_pool2d(image, factor))
        spread = image.unfold(2, factor, factor).unfold(3, factor, factor).flatten(4).std(4, correction=0)
        torch.testing.assert_close(pyramid.detail(level), spread, atol=1e-3, rtol=0)
    assert pyramid.detail(2) is None
    assert pyramid.context(2).shape[-1] == 64 // 2**CONTEXT_STEPS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_details_of_the_half_types_do_not_cancel(dtype):
    image = (0.8 + 0.02 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    for found, expected in zip(Pyramid.of(image, 3).details, Pyramid.of(image.float(), 3).details, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0.01)


def test_to_size_keeps_means_and_proportions():
    image = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(to_size(image, (8, 8)), F.avg_pool2d(image, 2))
    assert finest_size(300, 100, 256) == (256, 85)
    assert finest_size(4096, 1, 64) == (64, 1)
    assert to_size(torch.rand(1, 1, 300, 100), (256, 85)).mean() == pytest.approx(0.5, abs=0.02)
    assert grid_size(256, 85) == (32, 11)


def test_cells_and_pixels_are_inverse():
    x = torch.randn(3, 5, 8, 8)
    assert torch.equal(pixels(cells(x)), x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": (32, 60, 128, 256, 512, 1024)}, "levels must start with a multiple of 8 and double"),
        ({"target_patches": (16, 24)}, "target_patches must have one entry a level"),
        ({"support_patches": (0, 1, 1, 1, 1, 1)}, "support_patches must be an int of at least 1, got 0"),
        ({"levels": 32}, "levels must be a tuple of ints"),
        ({"dim": 128.0}, "dim must be an int of at least 1, got 128.0"),
        ({"heads": True}, "heads must be an int of at least 1, got True"),
        ({"dim": 130}, "dim must be divisible by heads"),
        ({"foreground_share": 1.5}, "foreground_share must be a finite number in"),
        ({"residual_bound": 0.0}, "residual_bound must be a finite number above 0"),
        ({"decoder_channels": (3,)}, "decoder_channels must be two ints"),
        ({"tolerance": -0.1}, "tolerance must be a finite number of at least 0"),
        ({"oracle_share": 0.6, "uniform_share": 0.6}, "oracle_share and uniform_share must add up to at most 1"),
        ({"patches_of_tolerance": 0}, "patches_of_tolerance must be an int of at least 1"),
        ({"exploration": (0,)}, "exploration must be an int of at least 1, got 0"),
        ({"exploration": 3}, "exploration must be a tuple of ints, one a level, got 3"),
        ({"trial": 0}, "trial must be an int of at least 1, got 0"),
    ],
)
def test_configuration_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**fields)
