"""The canvas and what is drawn on it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.scene import LABELS, noise_regions, object_label, warp_index
from icseg.data.synthetic.shapes import DESIGN_SIZE, HARMONICS, Blob, Canvas, Objects, walk

CPU = torch.device("cpu")


def discs(radius: list[float], elongation: float = 1.0, angle: float = 0.0) -> Blob:
    """Of one subject of one task."""
    size = torch.tensor(radius).view(1, 1, -1)
    nothing = torch.zeros(*size.shape, HARMONICS)
    return Blob(size, nothing, nothing, torch.full_like(size, elongation), torch.full_like(size, angle))


def drawn(places: list[tuple[float, float]], blob: Blob, label: Tensor | int = 1, size: int = 128) -> Tensor:
    """[H, H] labels."""
    canvas = Canvas(1, 1, size, CPU)
    canvas.blobs(Objects(torch.tensor(places).view(1, 1, -1, 2), blob, label))
    return labels(canvas)


def labels(canvas: Canvas) -> Tensor:
    return canvas.labels(canvas.code, torch.zeros_like(canvas.code, dtype=torch.int64))[0, 0]


def tubes(canvas: Canvas, pieces: list[tuple[float, float, float, float]], width: list[float], label: int = 1) -> None:
    ends = torch.tensor(pieces).view(1, 1, -1, 4)
    active, shade = torch.ones(1, 1, len(pieces), dtype=torch.bool), torch.zeros(1, 1, len(pieces))
    canvas.tubes(ends[..., :2], ends[..., 2:], torch.tensor(width).view(1, 1, -1), label, active, shade)


def area(where: Tensor) -> float:
    """In design pixels."""
    return where.sum().item() * (DESIGN_SIZE / where.shape[-1]) ** 2


def disc(place: tuple[float, float], radius: float, size: int) -> Tensor:
    """[H, H] bool: the pixels whose centres lie in a disc."""
    axis = (torch.arange(size) + 0.5) * DESIGN_SIZE / size
    return (axis.view(-1, 1) - place[1]) ** 2 + (axis - place[0]) ** 2 <= radius**2


@pytest.mark.parametrize("size", [64, 97, 256])
@pytest.mark.parametrize("radius", [6.3, 15.1, 45.7, 110.9])
def test_discs_are_the_pixels_whose_centres_they_hold(size: int, radius: float) -> None:
    place = (127.3, 120.2)
    found = drawn([place], discs([radius]), size=size) == 1
    assert torch.equal(found, disc(place, radius, size))
    if size == 256:
        assert area(found) == pytest.approx(math.pi * radius**2, rel=0.02)


def test_ellipses_keep_the_area_and_turn() -> None:
    upright = drawn([(128.0, 128.0)], discs([40.0], elongation=1.5), size=256)
    turned = drawn([(128.0, 128.0)], discs([40.0], elongation=1.5, angle=math.pi / 2), size=256)
    for mask in (upright, turned):
        assert area(mask) == pytest.approx(math.pi * 40**2, rel=0.01)
    assert (upright.amax(0).sum() - turned.amax(1).sum()).abs() <= 1
    assert upright.amax(0).sum() == pytest.approx(2 * 40 * 1.5, abs=1)


@pytest.mark.parametrize("end", [(180.0, 128.0), (128.0, 70.0), (170.0, 165.0), (128.0, 128.0)])
def test_capsules_have_their_area(end: tuple[float, float]) -> None:
    canvas = Canvas(1, 1, 256, CPU)
    tubes(canvas, [(128.0, 128.0, *end)], [14.0])
    length = math.dist((128, 128), end)
    assert area(labels(canvas)) == pytest.approx(14 * length + math.pi * 49, rel=0.02)


def test_thin_tubes_stay_connected() -> None:
    canvas = Canvas(1, 1, 64, CPU)
    tubes(canvas, [(10.0, 20.0, 240.0, 200.0)], [0.1])
    assert (labels(canvas)[:, 4:-6].amax(0) == 1).all()


def test_later_objects_hide_earlier_ones() -> None:
    places = [(100.0, 128.0), (128.0, 128.0), (156.0, 128.0)]
    several = discs([30.0, 30.0, 30.0])
    alone = [drawn([place], discs([30.0])) == 1 for place in places]
    expected = torch.zeros(128, 128, dtype=torch.int64)
    for label, mask in enumerate(alone, 3):
        expected[mask] = label
    assert torch.equal(drawn(places, several, torch.tensor([3, 4, 5])), expected)
    canvas = Canvas(1, 1, 128, CPU)
    for label, place in enumerate(places, 3):
        canvas.blobs(Objects(torch.tensor(place).view(1, 1, 1, 2), discs([30.0]), label))
    assert torch.equal(labels(canvas), expected)
    canvas.fill(alone[0].view(1, 1, 128, 128), 9)
    expected[alone[0]] = 9
    assert torch.equal(labels(canvas), expected)


def test_groups_are_drawn_object_by_object() -> None:
    places = [(100.0, 128.0), (128.0, 128.0)]
    canvas, place = Canvas(1, 1, 128, CPU), torch.tensor(places).view(1, 1, 2, 2)
    shades = torch.tensor([0.1, 0.2]).view(1, 1, 2)
    canvas.blobs(
        Objects(place, discs([40.3, 40.3]), 1, shade=shades),
        Objects(place, discs([20.3, 20.3]), 2),
    )
    expected, shade = torch.zeros(128, 128, dtype=torch.int64), torch.zeros(128, 128)
    for at, own in zip(places, (0.1, 0.2), strict=True):
        for radius, label, value in ((40.3, 1, own), (20.3, 2, 0.0)):
            expected[disc(at, radius, 128)], shade[disc(at, radius, 128)] = label, value
    assert torch.equal(labels(canvas), expected)
    assert torch.equal(canvas.shade(canvas.code)[0, 0], shade)


def test_objects_across_the_border_are_cut_off_there() -> None:
    for place, share in (((0.0, 0.0), 1 / 4), ((256.0, 128.0), 1 / 2), ((128.0, 256.0), 1 / 2)):
        assert area(drawn([place], discs([50.0]), size=256)) == pytest.approx(math.pi * 50**2 * share, rel=0.01)
    canvas = Canvas(1, 1, 128, CPU)
    tubes(canvas, [(-100.0, 128.0, 400.0, 128.0)], [20.0])
    assert area(labels(canvas)) == pytest.approx(20 * DESIGN_SIZE, rel=0.01)


@pytest.mark.parametrize("place", [(-60.0, 128.0), (128.0, 320.0), (1e6, 1e6), (-1e6, 128.0)])
def test_objects_outside_are_not_seen(place: tuple[float, float]) -> None:
    assert not drawn([place], discs([50.0])).any()


@pytest.mark.parametrize("radius", [200.0, 1000.0, 1e5])
def test_objects_larger_than_the_image_fill_it(radius: float) -> None:
    assert (drawn([(128.0, 128.0)], discs([radius]), size=48) == 1).all()


def test_inactive_and_infinite_objects_are_not_drawn() -> None:
    canvas = Canvas(1, 1, 64, CPU)
    place = torch.full((1, 1, 3, 2), 128.0)
    active = torch.tensor([False, True, True]).view(1, 1, 3)
    canvas.blobs(Objects(place, discs([30.0, math.inf, math.nan]), 1, active))
    assert not labels(canvas).any()


def test_every_subject_has_its_own_objects() -> None:
    canvas = Canvas(2, 2, 64, CPU)
    place = torch.tensor([[64.0, 64.0], [192.0, 64.0], [64.0, 192.0], [192.0, 192.0]]).view(2, 2, 1, 2)
    blob = Blob(*(t.expand(2, 2, *t.shape[2:]) for t in vars(discs([30.0])).values()))
    canvas.blobs(Objects(place, blob, torch.tensor([1, 2, 3, 4]).view(2, 2, 1)))
    found = canvas.labels(canvas.code, torch.zeros(2, 2, 64, 64, dtype=torch.int64))
    for task, subject in ((0, 0), (0, 1), (1, 0), (1, 1)):
        label = 2 * task + subject + 1
        assert set(found[task, subject].unique().tolist()) == {0, label}
        x, y = (place[task, subject, 0] / 4).long()
        assert found[task, subject, y, x] == label
    canvas.transpose(torch.tensor([False, True]).view(2, 1, 1, 1))
    turned = canvas.labels(canvas.code, torch.zeros(2, 2, 64, 64, dtype=torch.int64))
    assert torch.equal(turned[0], found[0])
    assert torch.equal(turned[1], found[1].mT)


def test_kinds_are_drawn_alike_at_any_size() -> None:
    draws = Draws(torch.arange(6))
    blob = Blob.draw(draws, torch.full((6, 1), 40.0), 0.2, 2.0).of(torch.zeros(6, 1, 1, dtype=torch.int64))
    shares = []
    for size in (64, 256):
        canvas = Canvas(6, 1, size, CPU)
        canvas.blobs(Objects(torch.full((6, 1, 1, 2), 128.0), blob, 1))
        shares.append((canvas.code > 0).float().mean((1, 2, 3)))
    assert shares[0] == pytest.approx(shares[1], rel=0.04)


def test_mirrored_blobs_are_mirrored() -> None:
    draws = Draws(torch.arange(4))
    blob = Blob.draw(draws, torch.full((4, 1), 60.0), 0.2, 1.8).of(torch.zeros(4, 1, 1, dtype=torch.int64))
    masks = []
    for outline in (blob, blob.mirrored()):
        canvas = Canvas(4, 1, 96, CPU)
        canvas.blobs(Objects(torch.full((4, 1, 1, 2), 128.0), outline, 1))
        masks.append(canvas.code > 0)
    assert (masks[0].flip(3) != masks[1]).float().mean() < 0.002
    assert (masks[0] != masks[1]).float().mean() > 0.01


def test_walks_have_steps_of_one_length_and_turn_gently() -> None:
    draws = Draws(torch.arange(3))
    points = walk(draws, (2, 4), 20, 5.0, torch.tensor([0.0, 0.05, 0.1]), torch.zeros(3, 2, 4))
    assert points.shape == (3, 2, 4, 21, 2)
    steps = points.diff(dim=3)
    torch.testing.assert_close(steps.norm(dim=-1), torch.full((3, 2, 4, 20), 5.0))
    assert not points[:, :, :, 0].any()
    torch.testing.assert_close(points[0, :, :, -1], torch.tensor([100.0, 0.0]).expand(2, 4, 2))
    cosine = (steps[..., 1:, :] * steps[..., :-1, :]).sum(-1) / 25
    assert cosine[2].min() > 0.5
    assert points[2, :, :, -1, 1].abs().max() > 1


def test_a_warp_of_strength_zero_moves_nothing_but_near_and_far() -> None:
    tasks, size = 200, 33
    index = warp_index(Draws(torch.arange(tasks)), 2, torch.zeros(tasks), size)
    still = (index == torch.arange(size**2)).all(2)
    distant = ~still.all(1)
    assert abs(distant.float().mean().item() - 0.15) < 4.5 * (0.15 * 0.85 / tasks) ** 0.5
    middle = size**2 // 2
    assert (index[..., middle] == middle).all()  # what is magnified stays where it is
    assert (index[distant].diff(dim=2)[..., middle] >= 0).all()


def test_a_warp_stays_inside_and_deforms_every_subject_on_its_own() -> None:
    tasks, size = 6, 64
    index = warp_index(Draws(torch.arange(tasks)), 3, torch.linspace(0.5, 3, tasks), size)
    assert index.min() >= 0
    assert index.max() < size**2
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert ((index[:, a] != index[:, b]).float().mean(1) > 0.5).all()


def test_noise_regions() -> None:
    tasks = 12
    count, shared = torch.arange(tasks) % 5 + 2, torch.arange(tasks) % 2 == 0
    found = noise_regions(Draws(torch.arange(tasks)), 2, count, torch.full((tasks,), 8), 64, shared)
    for task in range(tasks):
        assert set(found[task].unique().tolist()) == set(range(int(count[task])))
        assert torch.equal(found[task, 0], found[task, 1]) == bool(shared[task])


def test_labels_of_objects_fit() -> None:
    assert object_label(10) + 2 < LABELS <= 64
