"""Grey levels and imaging effects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from icseg.data.synthetic.appearance import Look, mean_intensities
from icseg.data.synthetic.effects import EFFECTS, Picture, apply_effects, field_of_view
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.scene import FIRST_OBJECT, LABELS, object_label

TASKS = 400
TARGET, DECOY, OTHER = object_label(0) + 1, object_label(1), object_label(2)


def draws(tasks: int) -> Draws:
    return Draws(torch.arange(tasks))


def of_labels(*labels: int) -> Tensor:
    table = torch.zeros(TASKS, LABELS, dtype=torch.bool)
    table[:, list(labels)] = True
    return table


def means_of(alike: Tensor, faint: bool) -> Tensor:
    """[T, 2 subjects, LABELS] where TARGET is the foreground."""
    first = torch.full((TASKS,), TARGET)
    nothing = torch.zeros(TASKS, dtype=torch.bool)
    look = Look(of_labels(TARGET), alike, first, nothing | faint, nothing)
    area = torch.ones(TASKS, 2, LABELS)
    area[..., 0] = 1000
    return mean_intensities(draws(TASKS), look, area)


@pytest.mark.parametrize("faint", [False, True])
def test_lookalikes_share_the_mean_intensity(faint: bool) -> None:
    means = means_of(of_labels(DECOY), faint)
    decoy, other = ((means[..., label] - means[..., TARGET]).abs() for label in (DECOY, OTHER))
    # Of a decoy: deviations 0.02 between labels, and at most 0.08 of each label between subjects (0.01 if faint).
    deviation = (0.02**2 + 2 * (0.01 if faint else 0.08) ** 2) ** 0.5
    assert decoy.max() < 5 * deviation
    assert other.mean() > 2 * decoy.mean()


def test_the_foreground_differs_from_its_surroundings() -> None:
    faint, plain = (means_of(of_labels(), kind).mean(1) for kind in (True, False))
    contrast = (faint[:, TARGET] - faint[:, 0]).abs()
    assert contrast.max() < 0.15 + 5 * 0.01
    assert contrast.mean() < 0.5 * (plain[:, TARGET] - plain[:, 0]).abs().mean()


def test_lookalikes_are_drawn_as_often_as_asked_and_never_the_foreground() -> None:
    present = of_labels(0, TARGET, DECOY, OTHER)
    look = Look.draw(draws(TASKS), of_labels(TARGET), present, [(TARGET, DECOY, 0.7)], faint=0.2)
    assert not (look.alike & look.foreground).any()
    assert not look.alike[:, :FIRST_OBJECT].any()
    assert not look.alike[:, [object_label(0), object_label(0) + 2]].any()  # the same object's
    for label, probability in ((DECOY, 1 - 0.3 * (1 - 0.6 * 0.25)), (OTHER, 0.6 * 0.25)):
        share = look.alike[:, label].float().mean().item()
        assert abs(share - probability) < 4.5 * (probability * (1 - probability) / TASKS) ** 0.5
    assert (look.first == TARGET).all()
    assert not (look.faint & look.by_texture).any()


def picture(tasks: int) -> Picture:
    labels = torch.zeros(tasks, 2, 160, 160, dtype=torch.int64)
    labels[:, 0, 30:100, 40:110] = labels[:, 1, 60:130, 25:90] = TARGET
    mask = (labels == TARGET).float()
    return Picture(0.3 + 0.4 * mask, mask, labels, torch.linspace(0.2, 1, tasks))


@pytest.mark.parametrize("name", EFFECTS)
def test_every_effect_changes_images_and_treats_each_task_on_its_own(name: str) -> None:
    everyone, one, before = torch.arange(4), torch.tensor([2]), picture(4)
    alone = {other: float(other == name) for other in EFFECTS}
    changed = apply_effects(draws(4).of(everyone, 0), before.of(everyone), alone)
    assert changed.shape == before.image.shape
    assert changed.isfinite().all()
    assert (changed != before.image).flatten(1).any(1).sum() >= 2
    assert torch.equal(apply_effects(draws(4).of(one, 0), before.of(one), alone)[0], changed[2])


def test_no_effect_changes_nothing() -> None:
    found = apply_effects(draws(3), picture(3), dict.fromkeys(EFFECTS, 0.0))
    assert torch.equal(found, picture(3).image)


def test_effects_are_as_frequent_as_a_family_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def raised(_: Draws, picture: Picture) -> Tensor:
        return picture.image + 1

    monkeypatch.setitem(EFFECTS, "halo", (0.35, raised))
    others = dict.fromkeys(EFFECTS, 0.0)
    del others["halo"]
    flat = torch.zeros(TASKS, 1, 4, 4)
    for chosen, probability in ((others, 0.35), ({**others, "halo": 0.8}, 0.8)):
        image = apply_effects(draws(TASKS), Picture(flat.clone(), flat, flat.long(), torch.ones(TASKS)), chosen)
        share = (image == 1).float().mean().item()
        assert abs(share - probability) < 4.5 * (probability * (1 - probability) / TASKS) ** 0.5


def test_fields_of_view() -> None:
    seen = field_of_view(draws(TASKS), 2, 32, 0.0)
    full = seen.flatten(1).all(1).float().mean().item()  # but for the discs that reach beyond the image's corners
    assert 0.8 - 4.5 * (0.16 / TASKS) ** 0.5 < full < 0.95
    sectors = field_of_view(draws(TASKS), 2, 32, 1.0)
    assert not sectors.flatten(1).all(1).any()
    assert not sectors[..., -1, [0, -1]].any()  # their lower corners
    assert sectors.float().mean() > 0.2
