"""`segment` and its parts: sizes, geometry, class ids, uncertainty, and every refusal."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import nn

import icseg
from icseg.data.frame import ScaledFrame, SquareFrame
from icseg.data.normalise import intensity_window, normalise
from icseg.inference import Segmenter, resolve_device, segment
from icseg.inputs import EncodedSupport, OrientationWarning, SegmentOptions, SupportSet
from icseg.overlay import PALETTE, draw_overlay, montage, overlay
from icseg.posterior import Entropy, Winner
from icseg.sparse.budget import Budget, as_budget


class ByBrightness:
    """Foreground is what is nearer to the mean brightness of the masks than to that of the rest.

    A stand-in for a model, good on discs of even brightness; it counts its calls.
    """

    def __init__(self):
        self.encoded = []
        self.batches = []

    def encode_support(self, images, masks):
        self.encoded.append((images, masks))
        return (images * masks).sum() / masks.sum(), (images * (1 - masks)).sum() / (1 - masks).sum()

    def __call__(self, target, *, memory, seed=None):
        self.batches.append(len(target))
        inside, outside = memory
        logits = 40 * ((target - outside).abs() - (target - inside).abs())
        return SimpleNamespace(logits=logits if seed is None else logits + (seed - 1.5))


def disc(height, width, level=200, ground=50, dtype=np.uint8, class_id=1):
    """An image with a disc, off centre, and its mask."""
    y, x = np.mgrid[:height, :width]
    mask = (y - 0.4 * height) ** 2 + (x - 0.55 * width) ** 2 < (0.3 * min(height, width)) ** 2
    return np.where(mask, level, ground).astype(dtype), mask.astype(np.uint8) * class_id


def supports(count=2, class_id=1, **options):
    pairs = [disc(40 + 10 * i, 60, class_id=class_id, **options) for i in range(count)]
    return [image for image, _ in pairs], [mask for _, mask in pairs]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("size", [(40, 60), (300, 120), (257, 1), (1, 64), (500, 500), (33, 260)])
def test_frame_keeps_place_and_proportion(size):
    height, width = size
    frame = SquareFrame(height, width, 128)
    rows = torch.linspace(0, 1, height)[None, :, None].expand(1, height, width)
    inside = frame.enter(rows)
    assert inside.shape == (1, 1, 128, 128)
    assert max(frame.scaled) == 128
    back = frame.leave(inside)
    assert back.shape == (1, 1, height, width)
    torch.testing.assert_close(back[0, 0], rows[0], atol=1 / min(height, frame.scaled[0]), rtol=0)


def test_frame_continues_images_and_not_masks():
    frame = SquareFrame(64, 128, 128)
    assert (frame.enter(torch.ones(1, 64, 128)) == 1).all()
    mask = frame.enter_masks(torch.ones(1, 64, 128))
    assert mask[0, 0, 32:96].eq(1).all()
    assert mask.sum() == 64 * 128


def test_frame_keeps_the_area_of_small_masks():
    mask = torch.zeros(1, 1000, 1000)
    mask[0, 400:420, 500:510] = 1
    area = SquareFrame(1000, 1000, 250).enter_masks(mask).sum().item()
    assert area == pytest.approx(200 / 16, rel=0.02)


@pytest.mark.parametrize(("height", "width"), [(211, 333), (30, 200), (128, 128), (900, 100)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_mask_has_the_images_size_and_place(height, width, dtype):
    image, truth = disc(height, width, dtype=dtype)
    result = segment(image, *supports(), model=ByBrightness(), size=128)
    assert result.mask.shape == image.shape
    assert result.mask.dtype == (np.uint8 if dtype == np.float32 else dtype)
    assert dice(result.mask > 0, truth > 0) > 0.95


def test_list_in_list_out_and_support_encoded_once():
    model = ByBrightness()
    images = [disc(50, 70)[0], disc(90, 40)[0]]
    results = segment(images, *supports(3), model=model, size=128)
    assert [r.mask.shape for r in results] == [(50, 70), (90, 40)]
    assert len(model.encoded) == 1
    assert model.encoded[0][0].shape == (1, 3, 1, 128, 128)


def test_volume_goes_in_batches_of_slices():
    image, truth = disc(40, 60)
    model = ByBrightness()
    result = segment(np.stack([image] * 7, axis=1), *supports(), model=model, axis=1, batch_size=3, size=128)
    assert model.batches == [3, 3, 1]
    assert result.mask.shape == (40, 7, 60)
    for i in range(7):
        assert dice(result.mask[:, i] > 0, truth > 0) > 0.95


def test_volume_supports_give_their_annotated_slices():
    image, mask = disc(40, 60)
    volume, labels = np.stack([image] * 5), np.stack([mask] * 5)
    labels[[0, 3]] = 0
    model = ByBrightness()
    segment(image, [volume], [labels], model=model, axis=0, size=128)
    assert model.encoded[0][0].shape[1] == 3


def test_batch_size_does_not_change_the_result():
    volume = np.stack([disc(40, 60, level=100 + 20 * i)[0] for i in range(5)])
    results = [
        segment(volume, *supports(), model=ByBrightness(), axis=0, batch_size=b, uncertainty=True, size=128)
        for b in (1, 5)
    ]
    np.testing.assert_array_equal(results[0].mask, results[1].mask)
    np.testing.assert_array_equal(results[0].uncertainty, results[1].uncertainty)


def three_levels(classes=(0, 7, 255)):
    """Background, a disc and a bar of three brightnesses, with class ids."""
    image, mask = disc(60, 80, level=130)
    image[50:58, 5:75] = 250
    ids = np.array(classes, np.uint8)[mask]
    ids[50:58, 5:75] = classes[2]
    return image, ids


def test_class_ids_come_back():
    image, ids = three_levels()
    result = segment(image, [image], [ids], model=ByBrightness(), size=128)
    assert result.classes == (7, 255)
    assert set(np.unique(result.mask)) == {0, 7, 255}
    assert (result.mask == ids).mean() > 0.95


def test_one_class_of_several_and_only_its_supports():
    image, ids = three_levels()
    model = ByBrightness()
    only_disc = np.where(ids == 7, ids, 0)
    result = segment(image, [image, image], [ids, only_disc], model=model, classes=[255], size=128)
    assert set(np.unique(result.mask)) == {0, 255}
    assert [images.shape[1] for images, _ in model.encoded] == [1]


def test_ids_that_the_input_dtype_cannot_hold_widen_it():
    image, mask = disc(40, 60)
    result = segment(image, [image], [mask.astype(np.uint16) * 1000], model=ByBrightness(), size=128)
    assert result.mask.dtype == np.uint16
    assert result.mask.max() == 1000


class Fixed:
    """Gives the same logit everywhere, one value a class, in order."""

    def __init__(self, *logits):
        self.logits = list(logits)
        self.encoded = 0

    def encode_support(self, images, masks):
        self.encoded += 1
        return self.logits[self.encoded - 1]

    def __call__(self, target, *, memory, seed=None):
        return SimpleNamespace(logits=torch.full_like(target, memory + (0 if seed is None else seed)))


def entropy(*probabilities):
    p = np.array(probabilities)
    return -(p * np.log(p)).sum() / np.log(len(p))


@pytest.mark.parametrize("logit", [-3.0, 0.0, 1.5])
def test_uncertainty_is_the_binary_entropy(logit):
    image, mask = disc(30, 40)
    result = segment(image, [image], [mask], model=Fixed(logit), uncertainty=True, size=128)
    p = 1 / (1 + np.exp(-logit))
    assert result.uncertainty.dtype == np.float32
    np.testing.assert_allclose(result.uncertainty, entropy(p, 1 - p), rtol=1e-5)


def test_uncertainty_of_classes_is_the_entropy_of_their_posterior():
    image, ids = three_levels()
    result = segment(image, [image], [ids], model=Fixed(0.5, 1.0), uncertainty=True, size=128)
    p, q = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(-1.0))
    joint = np.array([(1 - p) * (1 - q), p * (1 - q), q * (1 - p)])  # independent, given that they exclude each other
    np.testing.assert_allclose(result.uncertainty, entropy(*joint / joint.sum()), rtol=1e-5)
    assert (result.mask == 255).all()


@pytest.mark.parametrize(("threshold", "expected"), [(0.2, 1), (0.7, 1), (0.75, 0)])
def test_threshold(threshold, expected):
    image, mask = disc(30, 40)
    result = segment(image, [image], [mask], model=Fixed(1.0), threshold=threshold, size=128)  # p = .731
    assert (result.mask == expected).all()


def test_seeds_average_probabilities():
    image, mask = disc(30, 40)
    result = segment(image, [image], [mask], model=Fixed(0.0), seeds=[0, 3], uncertainty=True, size=128)
    p = (0.5 + 1 / (1 + np.exp(-3.0))) / 2
    np.testing.assert_allclose(result.uncertainty, entropy(p, 1 - p), rtol=1e-4)


def test_window_replaces_percentiles():
    image, mask = disc(40, 60, level=1000, ground=-1000, dtype=np.int16)
    model = ByBrightness()
    segment(image, [image], [mask], model=model, window=(-3000, 3000), size=128)
    encoded = model.encoded[0][0]
    assert encoded.min().item() == pytest.approx(1 / 3, abs=1e-5)
    assert encoded.max().item() == pytest.approx(2 / 3, abs=1e-5)


def test_files_in_files_out(tmp_path):
    image, truth = disc(40, 60)
    Picture.fromarray(image).save(tmp_path / "a.png")
    Picture.fromarray(truth * 255).save(tmp_path / "m.png")
    volume = np.stack([image.T] * 3, -1).astype(np.int16)
    affine = np.array([[-2.0, 0, 0, 9], [0, -2, 0, 8], [0, 0, 5, 7], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "v.nii.gz")
    pair = [tmp_path / "a.png"], [str(tmp_path / "m.png")]
    flat = segment(tmp_path / "a.png", *pair, model=ByBrightness(), size=128)
    flat.save(tmp_path / "out.png")
    with Picture.open(tmp_path / "out.png") as written:
        assert dice(np.asarray(written) == 255, truth > 0) > 0.95
    with pytest.warns(OrientationWarning):
        result = segment(str(tmp_path / "v.nii.gz"), *pair, model=ByBrightness(), axis=2, size=128)
    result.save(tmp_path / "out.nii.gz")
    written = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(written.affine, affine)
    assert written.get_data_dtype() == np.int16
    ids = np.asarray(written.dataobj)
    np.testing.assert_array_equal(ids, result.mask)
    for i in range(3):
        assert dice(ids[..., i] == 255, truth.T > 0) > 0.95


GOOD, MASK = disc(40, 60)
REFUSALS = {
    "no supports": (
        {"support_images": [], "support_masks": []},
        "support_images must hold at least one image",
    ),
    "no mask": (
        {"support_masks": []},
        "support_masks must hold one mask for each of 1 support images, got 0",
    ),
    "mask of another size": (
        {"support_masks": [MASK[:-1]]},
        r"support_masks\[0\] must have the size of support_images\[0\] \(40 x 60\), got 39 x 60",
    ),
    "empty masks": (
        {"support_masks": [MASK * 0]},
        "support_masks must mark at least one pixel, got only background",
    ),
    "constant image": ({"images": MASK * 0}, "images must not be constant, got 0 everywhere"),
    "constant of several": ({"images": [GOOD, MASK * 0]}, r"images\[1\] must not be constant"),
    "constant support": ({"support_images": [MASK * 0]}, r"support_images\[0\] must not be constant"),
    "NaN": ({"images": np.where(MASK, np.nan, 1.0)}, "images must hold finite values, got nan"),
    "absent class": ({"classes": [1, 3]}, r"classes must be ids in the support masks \(1\), got 3"),
    "class 0": ({"classes": [0]}, r"classes must be ids of at least 1 \(0 is background\), got \[0\]"),
    "soft mask": (
        {"support_masks": [MASK * 0.4]},
        r"support_masks\[0\] must hold integer class ids, got 0.4",
    ),
    "3-D target": ({"images": GOOD[None].repeat(3, 0)}, "images must be 2-D unless an axis"),
    "3-D support": (
        {"support_images": [GOOD[None].repeat(3, 0)], "support_masks": [MASK[None].repeat(3, 0)]},
        r"support_images\[0\] must be 2-D unless an axis",
    ),
    "3-D mask": (
        {"support_masks": [MASK[None].repeat(3, 0)]},
        r"support_masks\[0\] must be 2-D unless an axis",
    ),
    "size": ({"size": 20}, "size must be an integer from 32 to 4096, or None for the images' own, got 20"),
    "size of a square": ({"size": 100}, "size must be an integer from 128 to 1024 for a model of squares, got 100"),
    "own size": ({"size": None}, "from 128 to 1024 for a model of squares, got the images' own"),
    "budget": ({"budget": 0}, "budget must be at least 1 patch, got 0"),
    "budget of another model": (
        {"budget": 9},
        r"budget must be None for a model of a fixed cost, got Budget\(patches=9",
    ),
    "neither supports nor memory": (
        {"support_images": None},
        "support_images and support_masks, or memory, must be given",
    ),
    "memory with supports": (
        {"memory": "m.safetensors"},
        "memory must not be given together with support_images or support_masks",
    ),
    "axis": ({"axis": 3}, "axis must be 0, 1, 2 or None, got 3"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    "threshold": ({"threshold": 1.0}, "threshold must lie between 0 and 1, got 1.0"),
    "window": ({"window": (5, 5)}, r"window must be \(low, high\), finite, with low < high, got \(5, 5\)"),
    "window beside the values": (
        {"window": (300, 400)},
        r"window must overlap the values of .* \(50 to 200\), got 300 to 400",
    ),
    "grey image as mask": (
        {"support_masks": [np.arange(2400).reshape(40, 60)]},
        r"support_masks\[0\] must hold at most 64 class ids unless .* got 2399; are images and masks swapped\?",
    ),
    "missing file": ({"images": "none.png"}, r"none\.png must be an existing file"),
    "device": ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, got 'gpu'"),
    "no such device": ({"device": "cuda:99"}, "device must be one of this machine, which has cpu"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_come_before_any_work(case):
    changes, message = REFUSALS[case]
    model = ByBrightness()
    arguments = {"images": GOOD, "support_images": [GOOD], "support_masks": [MASK], "size": 128} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        segment(**arguments, model=model)
    assert "\n" not in str(refusal.value)
    assert not model.encoded


def test_a_single_support_path_is_refused():
    with pytest.raises(
        TypeError, match=r"support_images must be a list of paths or arrays, got the single path a\.png"
    ):
        segment(GOOD, "a.png", [MASK], model=ByBrightness())


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N, got meta"):
        resolve_device("meta")


class TinyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.modes = []

    def encode_support(self, images, masks):
        return None

    def forward(self, target, *, memory, seed=None):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return SimpleNamespace(logits=target * self.gain - 0.5)


@pytest.mark.parametrize("training", [True, False])
def test_modules_run_in_evaluation_mode_and_get_their_mode_back(training):
    model = TinyNetwork().train(training)
    segment(GOOD, [GOOD], [MASK], model=model, size=128, device="cpu")
    assert model.modes == [(False, False)]
    assert model.training is training


def test_parts_that_were_frozen_stay_frozen():
    model = TinyNetwork().train()
    model.frozen, model.trained = nn.Dropout().eval(), nn.Dropout()
    segment(GOOD, [GOOD], [MASK], model=model, size=128, device="cpu")
    assert (model.training, model.frozen.training, model.trained.training) == (True, False, True)


def test_half_precision_logits_are_accepted():
    class Half(Fixed):
        def __call__(self, target, *, memory, seed=None):
            return SimpleNamespace(logits=super().__call__(target, memory=memory).logits.bfloat16())

    result = segment(GOOD, [GOOD], [MASK], model=Half(1.0), uncertainty=True, size=128)
    assert (result.mask == 1).all()
    assert result.uncertainty.dtype == np.float32


def test_a_result_is_shown_in_a_line():
    image, mask = disc(40, 60)
    shown = repr(segment(image, [image], [mask], model=ByBrightness(), size=128))
    assert shown == "SegmentationResult(mask=uint8 [40, 60], uncertainty=None, classes=(1,), image='images')"
    shown = repr(segment([image], [image], [mask], model=ByBrightness(), size=128, uncertainty=True)[0])
    assert "uncertainty=float32 [40, 60], classes=(1,), image='images[0]'" in shown


def nifti(path, array):
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


@pytest.mark.parametrize("other", ["images", "support_images", "support_masks"])
def test_nifti_beside_other_files_is_warned_of(tmp_path, other):
    files = {"images": GOOD, "support_images": GOOD, "support_masks": MASK}
    volumes = {name: nifti(tmp_path / f"{name}.nii", array.T[..., None]) for name, array in files.items()}

    def run(**inputs):
        target, supports, masks = inputs.values()
        segment(target, [supports], [masks], model=ByBrightness(), size=128, axis=2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(**files)
        run(**volumes)
    with pytest.warns(OrientationWarning, match="NIfTI slices are taken as a radiologist's viewer shows them") as seen:
        run(**volumes | {other: files[other]})
    assert [warning.filename for warning in seen] == [__file__]


def test_segmenter_reports_its_slices():
    volume = np.stack([GOOD] * 5)
    done = []
    options = SegmentOptions(size=128, axis=0, batch_size=2)
    segmenter = Segmenter(ByBrightness(), SupportSet([GOOD], [MASK], options), options)
    segmenter(volume, on_slices=done.append)
    assert done == [2, 2, 1]


class AnySize:
    """As ByBrightness, of all classes at once and of images of any size."""

    multi_class = any_size = True

    def __init__(self):
        self.added = []
        self.calls = []

    def support_encoder(self, count):
        self.added, self.count = [], count
        return self

    def add(self, images, masks):
        self.added.append((images, masks))

    def finish(self):
        assert len(self.added) == self.count
        means = []
        for share in (lambda mask: mask, lambda mask: 1 - mask):
            parts = [
                ((image * share(mask)).sum((0, 1, 3, 4)), share(mask).sum((0, 1, 3, 4))) for image, mask in self.added
            ]
            means.append(sum(part[0] for part in parts) / sum(part[1] for part in parts))
        tensors = {"inside": means[0][None], "outside": means[1][None]}
        return icseg.SupportMemory("brightness", 1, tensors, classes=len(means[0]))

    def __call__(self, target, *, memory, budget, seeds):
        self.calls.append((tuple(target.shape), budget, seeds))
        inside, outside = (memory.tensors[name][..., None, None] for name in ("inside", "outside"))
        logits = 40 * ((target - outside).abs() - (target - inside).abs())
        return SimpleNamespace(logits=logits, uncovered_error=target.mean((1, 2, 3)))


def test_all_classes_go_in_one_call_as_they_do_alone():
    image, ids = three_levels()
    only_disc = np.where(ids == 7, ids, 0)
    model = AnySize()
    result = segment(image, [image, image[:50]], [ids, only_disc[:50]], model=model)
    assert result.classes == (7, 255)
    assert (result.mask == ids).mean() > 0.95
    assert model.calls == [((1, 1, 192, 256), None, None)]
    assert [tuple(image.shape) for image, _ in model.added] == [(1, 1, 1, 192, 256), (1, 1, 1, 160, 256)]
    assert [tuple(mask.shape) for _, mask in model.added] == [(1, 1, 2, 192, 256), (1, 1, 2, 160, 256)]
    assert [bool(mask[0, 0, 1].any()) for _, mask in model.added] == [True, False]
    alone = [segment(image, [image, image[:50]], [ids, only_disc[:50]], model=AnySize(), classes=[i]) for i in (7, 255)]
    assert ((result.mask == 255) <= (alone[1].mask == 255)).all()
    assert ((result.mask > 0) == (alone[0].mask > 0) | (alone[1].mask > 0)).all()


def test_a_model_of_several_classes_and_squares_gets_stacked_squares():
    class Stacked(ByBrightness):
        multi_class = True

        def encode_support(self, images, masks):
            self.encoded.append((images, masks))

        def __call__(self, target, *, memory):
            return SimpleNamespace(logits=torch.cat([target - 0.5, target - 0.9], 1))

    image, ids = three_levels()
    model = Stacked()
    result = segment(image, [image] * 3, [ids] * 3, model=model, size=128)
    assert [tuple(t.shape) for t in model.encoded[0]] == [(1, 3, 1, 128, 128), (1, 3, 2, 128, 128)]
    assert set(np.unique(result.mask)) == {0, 7}


@pytest.mark.parametrize(
    ("shape", "size", "scaled"),
    [
        ((40, 60), 256, (171, 256)),
        ((300, 120), 32, (32, 13)),
        ((40, 60), None, (40, 60)),
        ((20, 10), None, (32, 16)),
        ((9000, 3), None, (4096, 1)),
        ((5000, 2500), None, (4096, 2048)),
        ((1, 64), None, (1, 64)),
    ],
)
def test_images_are_scaled_by_one_factor(shape, size, scaled):
    frame = ScaledFrame(*shape, size)
    assert frame.scaled == scaled
    rows = torch.linspace(0, 1, shape[0])[None, :, None].expand(1, *shape)
    inside = frame.enter(rows)
    assert inside.shape == (1, 1, *scaled)
    back = frame.leave(inside.expand(1, 3, *scaled))
    assert back.shape == (1, 3, *shape)
    torch.testing.assert_close(back[0, 2], rows[0], atol=1 / min(shape[0], scaled[0]), rtol=0)
    if size is None and max(scaled) == max(shape):
        assert torch.equal(back[0, 0], rows[0])


def test_own_size_is_that_of_each_image():
    model = AnySize()
    image, truth = disc(90, 130)
    result = segment(image, *supports(), model=model, size=None)
    assert [tuple(image.shape[-2:]) for image, _ in model.added] == [(40, 60), (50, 60)]
    assert model.calls[0][0] == (1, 1, 90, 130)
    assert dice(result.mask > 0, truth > 0) > 0.95


@pytest.mark.parametrize("budget", [None, 200, Budget(gflops=1.5)])
def test_budget_and_seeds_reach_the_model(budget):
    model = AnySize()
    volume = np.stack([GOOD] * 3)
    segment(volume, [GOOD], [MASK], model=model, axis=0, size=64, budget=budget)
    segment(volume, [GOOD], [MASK], model=model, axis=0, size=64, budget=budget, seeds=[3, 4])
    asked = as_budget(budget) if budget else None
    assert model.calls == [((3, 1, 43, 64), asked, None), *[((1, 1, 43, 64), asked, [3, 4])] * 3]


def test_error_left_uncovered_is_the_worst_slices():
    volume = np.stack([GOOD, GOOD // 2, GOOD // 3])
    result = segment(volume, [GOOD], [MASK], model=AnySize(), axis=0, size=64, batch_size=2, window=(0, 255))
    assert len(result.uncovered_errors) == 3
    assert result.uncovered_error == max(result.uncovered_errors) == result.uncovered_errors[0]
    assert segment(GOOD, [GOOD], [MASK], model=ByBrightness()).uncovered_error is None


def test_many_classes_go_in_smaller_batches(monkeypatch):
    image, ids = three_levels()
    monkeypatch.setattr("icseg.inference.MOST_LOGITS", 2 * 60 * 80 * 3)
    model = AnySize()
    segment(np.stack([image] * 5), [image], [ids], model=model, axis=0, size=None)
    assert [call[0][0] for call in model.calls] == [3, 2]


def encoded(path, options, images, masks):
    memory = Segmenter(AnySize(), SupportSet(images, masks, options), options).memory
    memory.save(path)
    return memory


@pytest.mark.parametrize("size", [64, None])
def test_a_memory_serves_as_its_supports(tmp_path, size):
    image, ids = three_levels()
    support = [image, image[:50]], [ids, ids[:50]]
    memory = encoded(tmp_path / "m.safetensors", SegmentOptions(size=size, window=(0, 300)), *support)
    direct = segment(image, *support, model=AnySize(), size=size, window=(0, 300), uncertainty=True)
    for given in (memory, tmp_path / "m.safetensors", str(tmp_path / "m.safetensors")):
        model = AnySize()
        result = segment(image, memory=given, model=model, uncertainty=True)
        assert (result.classes, model.added) == ((7, 255), [])
        np.testing.assert_array_equal(result.mask, direct.mask)
        np.testing.assert_array_equal(result.uncertainty, direct.uncertainty)
    one = segment(image, memory=memory, model=AnySize(), classes=[255], size=size)
    assert set(np.unique(one.mask)) == {0, 255}
    memory.notes["author"] = "someone"
    assert segment(image, memory=memory, model=AnySize()).classes == (7, 255)
    loaded = EncodedSupport(icseg.SupportMemory.load(tmp_path / "m.safetensors"))
    assert loaded.holders() == {7: 2, 255: 1}
    assert loaded.anatomical == {False}


def test_a_memory_without_notes_takes_its_users_size():
    image, _ = three_levels()
    model = AnySize()
    encoder = model.support_encoder(1)
    encoder.add(torch.rand(1, 1, 1, 40, 50), torch.rand(1, 1, 2, 40, 50).round())
    result = segment(image, memory=encoder.finish(), model=model, size=96, window=(0, 100))
    assert result.classes == (1, 2)
    assert model.calls[0][0] == (1, 1, 72, 96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 128}, r"size must be that of the memory \(64\), got 128"),
        ({"size": None}, r"size must be that of the memory \(64\), got the images' own"),
        ({"window": (0, 5)}, r"window must be that of the memory \(percentiles\), got 0 to 5"),
        ({"classes": [1, 3]}, r"classes must be ids in the memory \(1\), got 3"),
        ({"memory": "none.safetensors"}, "memory must be an existing .safetensors file, got none"),
    ],
)
def test_options_must_be_those_of_the_memory(tmp_path, changes, message):
    memory = encoded(tmp_path / "m.safetensors", SegmentOptions(size=64), [GOOD], [MASK])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        segment(GOOD, model=AnySize(), **{"memory": memory} | changes)


@pytest.mark.parametrize(
    "notes", [{"size": "3"}, {"size": "x"}, {"classes": "[1]"}, {"classes": '{"1": 1, "2": 1}'}, {"window": "7"}]
)
def test_damaged_notes_are_refused(notes):
    memory = icseg.SupportMemory("brightness", 1, {}, notes=notes)
    with pytest.raises(ValueError, match="memory must carry notes as icseg writes them, got"):
        segment(GOOD, memory=memory, model=AnySize())


def test_a_memory_must_fit():
    with pytest.raises(ValueError, match="memory must hold one support set, got 2"):
        segment(GOOD, memory=icseg.SupportMemory("brightness", 2, {}), model=AnySize())
    with pytest.raises(ValueError, match="memory must hold one class for this model, got 2"):
        segment(GOOD, memory=icseg.SupportMemory("brightness", 1, {}, classes=2), model=ByBrightness())
    image, ids = three_levels()
    options = SegmentOptions()
    with pytest.raises(ValueError, match="classes must be one for a memory of this model, got 2"):
        _ = Segmenter(ByBrightness(), SupportSet([image], [ids], options), options).memory
    with pytest.raises(ValueError, match=r"model must make an icseg\.SupportMemory, got a tuple"):
        _ = Segmenter(ByBrightness(), SupportSet([GOOD], [MASK], options), options).memory


def test_a_memory_remembers_its_orientation(tmp_path):
    volume, labels = nifti(tmp_path / "v.nii", GOOD.T[..., None]), nifti(tmp_path / "m.nii", MASK.T[..., None])
    memory = encoded(tmp_path / "m.safetensors", SegmentOptions(size=64), [volume], [labels])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segment(volume, memory=memory, model=AnySize())
    with pytest.warns(OrientationWarning):
        segment(GOOD, memory=memory, model=AnySize())


@pytest.fixture(scope="module")
def tiny():
    """A PatchICL whose zero-initialised layers are drawn too, so that it predicts something; 128 px have 256 cells."""
    config = icseg.PatchICLConfig.sparse(
        levels=(32, 64, 128),
        target_patches=(4, 8, 8),
        support_patches=(4, 4, 4),
        dim=16,
        depth=1,
        heads=2,
        stem_channels=8,
    )
    torch.manual_seed(0)
    model = icseg.PatchICL(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("shape", [(40, 60), (300, 120), (1, 64), (57, 1), (128, 128), (500, 700), (2, 2)])
def test_patchicl_segments_any_shape(tiny, shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    for seeds in (None, [1, 2]):
        first, again = (
            segment(image, *supports(), model=tiny, size=128, uncertainty=True, seeds=seeds) for _ in range(2)
        )
        assert first.mask.shape == first.uncertainty.shape == shape
        assert np.isfinite(first.uncertainty).all()
        assert len(np.unique(first.uncertainty)) > 1
        np.testing.assert_array_equal(first.uncertainty, again.uncertainty)


@pytest.mark.parametrize("size", [None, 200])
@pytest.mark.parametrize("options", [{}, {"budget": 9}, {"budget": Budget(gflops=0.01)}, {"seeds": [1, 2]}])
def test_patchicl_from_supports_and_from_their_file(tiny, tmp_path, size, options):
    rng = np.random.default_rng(0)
    image, *support_images = (
        rng.integers(0, 256, shape).astype(np.uint8) for shape in [(70, 170), (90, 60), (40, 130)]
    )
    support_masks = [np.zeros(support.shape, np.uint8) for support in support_images]
    support_masks[0][:30], support_masks[0][60:] = 3, 9
    support_masks[1][:, 20:50], support_masks[1][5:20, 80:] = 3, 200
    options = {"model": tiny, "uncertainty": True, "threshold": 0.1} | options
    direct = segment(image, support_images, support_masks, size=size, **options)
    assert direct.classes == (3, 9, 200)
    assert direct.mask.shape == image.shape
    assert len(np.unique(direct.mask)) > 1
    settings, path = SegmentOptions(size=size), tmp_path / "m.safetensors"
    Segmenter(tiny, SupportSet(support_images, support_masks, settings), settings).memory.save(path)
    result = segment(image, memory=path, **options)
    np.testing.assert_array_equal(result.mask, direct.mask)
    np.testing.assert_array_equal(result.uncertainty, direct.uncertainty)
    assert result.uncovered_error == direct.uncovered_error


def test_patchicl_sees_images_as_they_are_at_their_own_size(tiny):
    image, ids = three_levels()
    values = torch.from_numpy(normalise(image, intensity_window(image, "")))[None, None]
    masks = torch.stack([torch.from_numpy(ids == i).float() for i in (7, 255)])[None, None]
    with torch.inference_mode():
        out = tiny(values, values[None], masks, budget=12)
    result = segment(image, [image], [ids], model=tiny, size=None, budget=12, uncertainty=True)
    np.testing.assert_allclose(out.uncertainty[0, 0], result.uncertainty, atol=1e-5)


def test_a_small_budget_leaves_an_error_uncovered(tiny):
    image = np.random.default_rng(0).integers(0, 256, (100, 120)).astype(np.uint8)
    errors = [segment(image, *supports(), model=tiny, size=128, budget=b).uncovered_error for b in (10, 10**6)]
    assert errors[0] > errors[1] == 0


def test_batch_size_does_not_change_a_result_with_seeds(tiny):
    volume = np.random.default_rng(0).integers(0, 256, (5, 90, 100)).astype(np.uint8)
    options = {"model": tiny, "size": 128, "uncertainty": True}
    one, three, eight = (
        segment(volume, *supports(), axis=0, seeds=[3, 4], batch_size=size, **options) for size in (1, 3, 8)
    )
    np.testing.assert_array_equal(one.uncertainty, three.uncertainty)
    np.testing.assert_array_equal(one.uncertainty, eight.uncertainty)
    alone = segment(volume[4], *supports(), seeds=[3, 4], window=(0, 255), **options)
    within = segment(volume, *supports(), axis=0, seeds=[3, 4], window=(0, 255), **options)
    np.testing.assert_array_equal(alone.uncertainty, within.uncertainty[4])
    other = segment(volume, *supports(), axis=0, seeds=[3, 5], **options)
    assert (one.uncertainty != other.uncertainty).any(axis=(1, 2)).all()


def test_batch_size_changes_a_result_without_seeds_by_rounding_only(tiny):
    volume = np.random.default_rng(0).integers(0, 256, (5, 90, 100)).astype(np.uint8)
    one, five = (
        segment(volume, *supports(), model=tiny, size=128, uncertainty=True, axis=0, batch_size=size) for size in (1, 5)
    )
    np.testing.assert_allclose(one.uncertainty, five.uncertainty, atol=1e-4)


@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_running_winner_and_entropy_are_those_of_all_logits(classes, scale):
    torch.manual_seed(0)
    logits = scale * torch.randn(2, classes, 30, 20)
    logits[0, -1] = logits[0, 0]  # of equals the first class wins
    shape, device = (2, 30, 20), torch.device("cpu")
    winner, entropy = Winner(shape, 0.4, device), Entropy(shape, device)
    for one in logits.unbind(1):
        winner.add(one)
        entropy.add(one)
    best = logits.max(1).values
    first = (logits == best[:, None]).int().argmax(1)
    torch.testing.assert_close(winner.index, torch.where(best.sigmoid() > 0.4, first + 1, 0))
    log_posterior = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1).double().log_softmax(1)
    plain = -(log_posterior.exp() * log_posterior).sum(1) / np.log(classes + 1)
    torch.testing.assert_close(entropy.value().double(), plain, atol=1e-6, rtol=0)


def test_colour_arrays_are_segmented_as_their_luma():
    grey, mask = disc(40, 60)
    colour = np.stack([grey] * 3, -1)
    result = segment(colour, [colour], [mask], model=ByBrightness(), size=128)
    assert result.mask.shape == (40, 60)
    np.testing.assert_array_equal(result.mask, segment(grey, [grey], [mask], model=ByBrightness(), size=128).mask)
    model = ByBrightness()
    segment(colour, [colour], [np.stack([mask] * 3, -1)], model=model, size=128, axis=2)
    assert model.batches == [3]


WRONG_TYPES = {
    "size": [True, 128.0, "128"],
    "budget": [True, 20.0, "200"],
    "axis": [True, 1.0, "0"],
    "batch_size": [True, 2.0, "8", None],
    "threshold": [True, "0.5", None],
    "classes": [3, "12", [1.0], [True], ["1"]],
    "window": ["ab", 3, [1, "2"], [False, True], [None, 1]],
    "seeds": [3, "12", [1.0], [True]],
    "uncertainty": [1, "yes", None],
}


def test_a_memory_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"memory must be an icseg\.SupportMemory or its file, got a dict"):
        segment(GOOD, memory={}, model=AnySize())


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values])
def test_options_of_another_type_are_refused(name, value):
    with pytest.raises(TypeError, match=rf"^{name}(\[\d\])? must be .*, got "):
        SegmentOptions(**{name: value})
    with pytest.raises(TypeError, match=rf"^{name}(\[\d\])? must be .*, got "):
        segment(GOOD, [GOOD], [MASK], model=ByBrightness(), **{name: value})


def test_options_take_numpy_numbers_and_any_sequence():
    options = SegmentOptions(
        size=np.int64(128),
        classes=np.array([1, 2]),
        seeds=range(2),
        window=[np.float32(1), 2],
        threshold=np.float64(0.5),
    )
    assert options == SegmentOptions(size=128, classes=(1, 2), seeds=(0, 1), window=(1.0, 2.0))
    assert [type(value) for value in (options.size, *options.classes, *options.seeds)] == [int] * 5
    with pytest.raises(ValueError, match=r"seeds must lie in \[0, 2\^63\), got \[-1\]"):
        SegmentOptions(seeds=[-1])


def test_overlay_draws_contour_and_fill():
    image = np.full((40, 60), 0.5, np.float32)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:30], mask[10:30, 40:50] = 3, 9
    picture = draw_overlay(image, mask, (3, 9))
    assert picture.dtype == np.uint8
    assert (picture[0, 0] == 128).all()
    assert (picture[10, 15] == PALETTE[0]).all()
    assert (picture[10, 45] == PALETTE[1]).all()
    fill = np.rint(0.65 * 127.5 + 0.35 * PALETTE[0])
    assert (picture[20, 20] == fill).all()


def test_overlay_of_a_volume_shows_labelled_slices():
    volume = np.stack([disc(40, 60, level=60 + 10 * i)[0] for i in range(14)])
    options = SegmentOptions(size=128, axis=0)
    segmenter = Segmenter(ByBrightness(), SupportSet(*supports(), options), options)
    result = segmenter(volume)
    assert overlay(result, options).shape == (3 * 40, 3 * 60, 3)
    result.mask[:] = 0
    result.mask[4] = 1
    assert overlay(result, options).shape == (40, 60, 3)


def test_montage_is_filled_row_by_row():
    sheet = montage([np.full((2, 3, 3), i, np.uint8) for i in range(1, 6)])
    assert sheet.shape == (4, 9, 3)
    assert sheet[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
