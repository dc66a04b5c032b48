"""The sparse architecture: exact support memory, determinism, sizes, gradients."""

import pytest
import torch

import icseg
from icseg.draws import derived_seed
from icseg.sparse import selection
from icseg.sparse.config import SparseConfig
from icseg.sparse.grid import LevelImage, level_size, resize
from icseg.sparse.propagation import cells, pixels

SMALL = SparseConfig(
    levels=(16, 32, 64), target_patches=(4, 6, 8), support_patches=(4, 6, 8), dim=32, depth=2, stem_channels=8
)


def make_inputs(batch=2, support=3, height=64, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, 1, height, width, generator=generator)
    images = torch.rand(batch, support, 1, height, width, generator=generator)
    masks = (torch.rand(batch, support, 1, height // 8 + 1, width // 8 + 1, generator=generator) > 0.6).float()
    masks = masks.repeat_interleave(8, -1).repeat_interleave(8, -2)
    return target, images, masks[..., :height, :width]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = icseg.PatchICL(SMALL)
    for parameter in model.parameters():  # the zero-initialised output layers would hide a fault behind them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def test_shapes_of_every_level(model):
    target, images, masks = make_inputs()
    out = model(target, images, masks)
    assert out.logits.shape == target.shape
    assert [level.resolution for level in out.levels] == [(16, 16), (32, 32), (64, 64)]
    for level, budget in zip(out.levels, SMALL.target_patches, strict=True):
        assert level.coords.shape == (2, budget, 2)
        assert level.patch_logits.shape == (2, budget, 1, 8, 8)
        assert level.coverage.sum() == 2 * budget * 64
    assert out.levels[0].coverage.all(), "the coarsest level must be tiled completely"


@pytest.mark.parametrize("size", [(64, 40), (33, 64), (32, 32), (100, 20), (200, 150)])
def test_any_size(model, size):
    out = model(*make_inputs(1, 1, *size))
    assert out.logits.shape == (1, 1, *size)
    assert out.logits.isfinite().all()


def test_levels_above_the_image_are_left_out(model):
    assert len(model(*make_inputs(1, 1, 32, 32)).levels) == 2
    assert len(model(*make_inputs(1, 1, 33, 16)).levels) == 3


def test_memory_gives_bitwise_the_same_logits(model):
    target, images, masks = make_inputs()
    assert torch.equal(
        model(target, images, masks).logits, model(target, memory=model.encode_support(images, masks)).logits
    )


def test_one_memory_serves_any_batch(model):
    target, images, masks = make_inputs(batch=3)
    memory = model.encode_support(images[:1], masks[:1])
    together = model(target, memory=memory).logits
    alone = torch.cat([model(t[None], memory=memory).logits for t in target])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_order_of_the_support_set_does_not_matter(model):
    target, images, masks = make_inputs()
    order = torch.tensor([2, 0, 1])
    expected = model(target, images, masks).logits
    torch.testing.assert_close(model(target, images[:, order], masks[:, order]).logits, expected, atol=1e-4, rtol=0)


def test_support_may_have_another_size(model):
    target, *_ = make_inputs(1, 1, 64, 64)
    _, images, masks = make_inputs(1, 2, 48, 96)
    assert model(target, images, masks).logits.isfinite().all()


def test_evaluation_is_deterministic_and_a_seed_draws(model):
    inputs = make_inputs()
    assert torch.equal(model(*inputs).logits, model(*inputs).logits)
    assert torch.equal(model(*inputs, seed=5).logits, model(*inputs, seed=5).logits)
    drawn = [model(*inputs, seed=seed).levels[-1].coords for seed in range(4)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize("seed", [None, 3])
def test_seeds_leave_the_memory_alone(model, seed):
    target, images, masks = make_inputs()
    memory = model.encode_support(images, masks)
    assert torch.equal(model(target, images, masks, seed=seed).logits, model(target, memory=memory, seed=seed).logits)


def test_support_and_target_draws_are_independent():
    seeds = [derived_seed(s, purpose, level) for s in range(50) for purpose in range(3) for level in range(4)]
    seeds += [derived_seed(s, level) for s in range(50) for level in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_integer_images_are_refused(model):
    target, images, masks = make_inputs()
    with pytest.raises(TypeError, match="target must be floating-point"):
        model((target * 255).byte(), images, masks)
    with pytest.raises(TypeError, match="support_images must be floating-point"):
        model(target, (images * 255).byte(), masks)


def test_scores_are_computed_in_float32():
    """Autocast on a GPU refuses cross-entropy of probabilities, and half precision would round small entropies."""
    logits = torch.full((1, 1, 8, 8), 2.0, dtype=torch.bfloat16)
    p = torch.tensor(2.0).sigmoid()
    expected = 1.1 * -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(selection.entropy_score(logits), expected.view(1, 1))


def test_level_predictions_are_the_combined_logits_of_their_patches(model):
    for level in model(*make_inputs()).levels:
        torch.testing.assert_close(level.prediction[level.coverage], level.logits[level.coverage])
        y, x = level.coords[0, 0]
        assert torch.equal(level.logits[0, :, y : y + 8, x : x + 8], level.patch_logits[0, 0])


def test_memory_of_another_model_is_refused(model):
    target, images, masks = make_inputs()
    other = icseg.PatchICL(SparseConfig(levels=(16,), target_patches=(4,), support_patches=(4,)))
    with pytest.raises(ValueError, match="memory must come from a model with configuration"):
        model(target, memory=other.encode_support(images, masks))


def test_memory_of_another_batch_is_refused(model):
    target, images, masks = make_inputs(batch=3)
    with pytest.raises(ValueError, match="support sets must number 1 or 3, one a target, got 2"):
        model(target, memory=model.encode_support(images[:2], masks[:2]))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_and_masks_stay_finite(model, value):
    target, images, masks = make_inputs()
    out = model(torch.full_like(target, value), torch.full_like(images, value), torch.full_like(masks, value))
    assert out.logits.isfinite().all()


def test_every_level_trains(model):
    """Every level's own loss reaches every parameter but the other levels' embeddings and gains."""
    target, images, masks = make_inputs()
    model.train()
    own = ("encoder.level_embedding", "decoder.propagation_gain")
    for level in range(3):
        model.zero_grad()
        model(target, images, masks, target_mask=masks[:, 0], seed=1).levels[level].logits.square().mean().backward()
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


def test_change_is_bounded(model):
    with torch.no_grad():
        model.network.decoder.layers[-1].bias.fill_(1e4)
    out = model(*make_inputs())
    assert out.levels[0].logits.abs().max() <= SMALL.residual_bound


def test_noise_is_refused(model):
    with pytest.raises(NotImplementedError, match="noise must be None for the sparse architecture"):
        model(*make_inputs(), noise=[])


def test_support_patches_cover_foreground_first():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 8:24, 8:20] = 1
    index = selection.support_patches(mask, 8, 0.5, None)
    touched = torch.tensor([9, 10, 17, 18])
    assert set(index[0, :4].tolist()) == set(touched.tolist())
    assert index[0].unique().numel() == 8


def test_target_patches_take_the_highest():
    score = torch.tensor([[0.1, 0.9, 0.0, 0.5]])
    assert selection.target_patches(score, 2, 1.5, None).tolist() == [[1, 3]]
    assert selection.target_patches(score, 9, 1.5, None).tolist() == [[0, 1, 2, 3]]


def test_patches_lie_where_their_coords_say():
    image = torch.arange(32 * 32.0).view(1, 1, 32, 32)
    level = LevelImage(image, torch.zeros_like(image))
    coords = level.coords(torch.tensor([[5, 0]]))
    assert coords.tolist() == [[[8, 8], [0, 0]]]
    patches = level.patches(coords)
    assert torch.equal(patches[0, 0, 0], image[0, 0, 4:20, 4:20])
    assert torch.equal(patches[0, 1, 0, 4:, 4:], image[0, 0, :12, :12])
    context = level.context(coords)  # a 16 x 16 crop of the 8 x 8 image, centred on the 2 x 2 px of the patch
    assert context[0, 0, 2].sum() == 64
    assert torch.equal(context[0, 0, 0, 5:13, 5:13], torch.nn.functional.avg_pool2d(image, 4)[0, 0])


def test_cells_and_pixels_are_inverse():
    x = torch.randn(3, 5, 8, 8)
    assert torch.equal(pixels(cells(x)), x)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((256, 256), 32, (32, 32)), ((256, 128), 64, (64, 32)), ((300, 10), 32, (32, 8))],
)
def test_level_size(size, side, expected):
    assert level_size(*size, side) == expected


def test_resize_down_is_the_area_mean():
    image = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(resize(image, (8, 8)), torch.nn.functional.avg_pool2d(image, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": (32, 60, 128, 256)}, "levels must be increasing multiples of 8"),
        ({"target_patches": (16, 24)}, "target_patches must have one entry a level"),
        ({"support_patches": (0, 1, 1, 1)}, "support_patches must be an int of at least 1, got 0"),
        ({"levels": 32}, "levels must be a tuple of ints"),
        ({"dim": 128.0}, "dim must be an int of at least 1, got 128.0"),
        ({"heads": True}, "heads must be an int of at least 1, got True"),
        ({"dim": 130}, "dim must be divisible by heads"),
        ({"foreground_share": 1.5}, "foreground_share must be a finite number in"),
        ({"residual_bound": 0.0}, "residual_bound must be a finite number above 0"),
    ],
)
def test_configuration_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**fields)
