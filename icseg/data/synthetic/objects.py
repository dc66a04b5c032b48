"""Families of objects that lie anywhere: cells, lesions, and objects among others that look like them."""

from __future__ import annotations

import torch
from torch import Tensor

from icseg.data.synthetic.anatomy import CENTRE, new_scene, variability
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.scene import Scene, backgrounds, layer_maps, object_label
from icseg.data.synthetic.shapes import DESIGN_SIZE, Blob, Objects

_KINDS = 3
_MOST_CELLS = 72
_TRIES = 6


def anywhere(draws: Draws, *shape: int) -> Tensor:
    """[T, *shape, 2] places."""
    return draws.uniform(0, DESIGN_SIZE, *shape, 2)


def cells(draws: Draws, subjects: int, size: int) -> Scene:
    """Many objects of one to three kinds anywhere, sparse to crowded, sometimes at several magnifications."""
    scene = new_scene(draws, backgrounds(draws, subjects, size, shared=0.1))
    kinds = draws.integers(1, _KINDS + 1)
    dense = draws.chance(0.3)
    cover = draws.uniform(0.04, torch.where(dense, 0.65, 0.4)) / kinds
    radius = draws.log_uniform(4, 48, _KINDS)
    exists = torch.arange(_KINDS, device=draws.device) < kinds.unsqueeze(1)
    kind_of = Blob.draw(draws, radius, draws.uniform(0.02, 0.25, _KINDS), draws.uniform(1, 3, _KINDS))
    count = (cover.unsqueeze(1) * DESIGN_SIZE**2 / (torch.pi * radius**2)).clamp(1, 70) * exists
    core = draws.uniform(0.3, 0.75, _KINDS) * draws.chance(0.4, _KINDS)
    rim = draws.chance(0.35, _KINDS)

    magnification = torch.where(draws.chance(0.25), 0.45, 0.05).unsqueeze(1)
    zoom = draws.normal(magnification, subjects).clamp(-0.8, 0.8).exp()
    number = count.unsqueeze(1) * draws.normal(0.35, subjects, _KINDS).exp()
    number = (number / zoom.clamp_min(1).unsqueeze(2) ** 2).round().clamp_min(1) * exists.unsqueeze(1)
    last = number.cumsum(2)  # [T, N, kinds]: how many up to each kind
    kind = (torch.arange(_MOST_CELLS, device=draws.device).view(-1, 1) >= last.unsqueeze(2)).sum(3)
    wanted, kind = kind < _KINDS, kind.clamp(max=_KINDS - 1)
    blob = kind_of.of(kind).relatives(draws, subjects, _MOST_CELLS)
    blob = blob.scaled(zoom.unsqueeze(2) * draws.normal(0.18, subjects, _MOST_CELLS).exp())
    few = (count <= 2).gather(1, kind.flatten(1)).view_as(kind)
    place, free = _free_places(draws, blob.radius, wanted, few, draws.uniform(0.6, 1.1))
    shade = draws.normal(draws.choice([0.0, 0.05, 0.12, 0.25]).view(-1, 1, 1), subjects, _MOST_CELLS)

    label = object_label(0) + 3 * kind
    has_rim = rim.gather(1, kind.flatten(1)).view_as(kind)
    share = core.gather(1, kind.flatten(1)).view_as(blob.radius)
    body = blob.scaled(torch.where(has_rim, (1 - 2 / blob.radius).clamp_min(0.5), 1.0))
    off_centre = draws.normal(0.12, subjects, _MOST_CELLS, 2) * blob.radius.unsqueeze(-1)
    scene.canvas.blobs(
        Objects(place, blob, label + 2, free & has_rim, shade),
        Objects(place, body, label, free, shade),
        Objects(place + off_centre, body.scaled(share), label + 1, free & (share > 0), shade),
    )
    for k in range(_KINDS):
        body_label = object_label(k)
        weight = exists[:, k].float()
        scene.offer(2 * weight, body_label, body_label + 1, body_label + 2)
        has_core = weight * (core[:, k] > 0)
        scene.offer(2 * has_core, body_label + 1)
        scene.offer(has_core, body_label, body_label + 2)
        scene.offer(weight * rim[:, k], body_label + 2)
    scene.deformation = torch.full((len(draws),), 0.15, device=draws.device)
    return scene


def _free_places(draws: Draws, radius: Tensor, wanted: Tensor, few: Tensor, spacing: Tensor) -> tuple[Tensor, Tensor]:
    """Places [T, N, M, 2] one after the other, each away from those before it, and where that was found [T, N, M]."""
    subjects, count = radius.shape[1:]
    tries = torch.where(
        few.view(*few.shape, 1, 1),
        CENTRE + draws.normal(45.0, subjects, count, _TRIES, 2),
        anywhere(draws, subjects, count, _TRIES),
    )
    place, free = tries[:, :, :, 0].clone(), torch.zeros_like(wanted)
    spacing = spacing.view(-1, 1, 1, 1)
    for m in range(count):
        if not wanted[:, :, m].any():
            continue
        distance = (tries[:, :, m].unsqueeze(3) - place[:, :, :m].unsqueeze(2)).norm(dim=-1)  # [T, N, tries, m]
        apart = spacing * (radius[:, :, :m] + radius[:, :, m : m + 1]).unsqueeze(2)
        clear = ((distance > apart) | ~free[:, :, :m].unsqueeze(2)).all(3)
        first = clear.int().argmax(2)
        place[:, :, m] = tries[:, :, m].gather(2, first.view(*first.shape, 1, 1).expand(-1, -1, 1, 2)).squeeze(2)
        free[:, :, m] = clear.any(2) & wanted[:, :, m]
    return place, free


def lesions(draws: Draws, subjects: int, size: int) -> Scene:
    """One or a few focal objects of very different size and place, among other structures."""
    scene = new_scene(draws, backgrounds(draws, subjects, size, shared=0.1))
    _clutter(draws, scene, subjects, kinds=3, most=2)
    label = object_label(3)
    most = 3
    blob = Blob.draw(draws, draws.log_uniform(9, 85, 1), draws.uniform(0.04, 0.3, 1), 2.0)
    kind = torch.zeros(len(draws), subjects, most, dtype=torch.int64, device=draws.device)
    size_spread = draws.choice([0.15, 0.3, 0.5]).view(-1, 1, 1)
    blob = blob.of(kind).relatives(draws, subjects, most).scaled(draws.normal(size_spread, subjects, most).exp())
    spread = draws.uniform(15, 80).view(-1, 1, 1, 1)
    place = (CENTRE + draws.normal(spread, subjects, most, 2)).clamp(15, DESIGN_SIZE - 15)
    several = torch.where(draws.chance(0.2), most, 1)
    number = 1 + (draws.uniform(0, 1, subjects, 1) * several.view(-1, 1, 1)).long()
    active = torch.arange(most, device=draws.device) < number
    core = (draws.uniform(0.3, 0.8) * draws.chance(0.25)).view(-1, 1, 1)
    scene.canvas.blobs(
        Objects(place, blob, label, active), Objects(place, blob.scaled(core), label + 1, active & (core > 0))
    )
    scene.offer(2.0, label, label + 1)
    scene.offer((core.flatten() > 0).float(), label + 1)
    scene.deformation = torch.full((len(draws),), 0.5, device=draws.device)
    return scene


def _clutter(draws: Draws, scene: Scene, subjects: int, kinds: int, most: int) -> None:
    """Up to `kinds` kinds of other objects, labels from object 0 on, up to `most` of each in a subject."""
    exists = torch.arange(kinds, device=draws.device) < draws.integers(0, kinds + 1, 1)
    blob = Blob.draw(draws, draws.log_uniform(5, 50, kinds), 0.2, 2.5)
    kind = torch.arange(kinds, device=draws.device).repeat_interleave(most).expand(len(draws), subjects, -1)
    number = torch.arange(most, device=draws.device).repeat(kinds)
    count = draws.integers(0, most + 1, subjects, kinds).repeat_interleave(most, 2)
    active = (number < count) & exists.repeat_interleave(most, 1).unsqueeze(1)
    place = anywhere(draws, subjects, kinds * most)
    label = object_label(0) + 3 * kind
    scene.canvas.blobs(Objects(place, blob.of(kind).relatives(draws, subjects, kinds * most), label, active=active))


def echoes(draws: Draws, subjects: int, size: int) -> Scene:
    """Layers of tissue, dark vessels and one structure beside them, as ultrasound shows a nerve or a nodule."""
    spread = variability(draws)
    scene = new_scene(draws, layer_maps(draws, subjects, draws.integers(2, 7), spread, size))
    anchor = CENTRE + draws.normal(25.0, 1, 2) + draws.normal(18 * spread.view(-1, 1, 1), subjects, 2)
    scale = draws.normal(0.15, subjects, 1).exp()
    others = 4
    vessel = Blob.draw(draws, draws.log_uniform(5, 22, others), 0.1, 1.8)
    offset = draws.normal(45.0, 1, others, 2)
    exists = torch.arange(others, device=draws.device) < draws.integers(0, others + 1, 1, 1)
    place = anchor.unsqueeze(2) + offset * scale.unsqueeze(-1) + draws.normal(6.0, subjects, others, 2)
    outline = vessel.variant(draws, subjects, spread, 0.3 * spread).scaled(scale)
    scene.canvas.blobs(Objects(place, outline, object_label(1), active=exists.expand(-1, subjects, -1)))
    target = Blob.draw(draws, draws.log_uniform(9, 45, 1), draws.uniform(0.05, 0.2, 1), 2.8)
    rim = draws.chance(0.35).view(-1, 1, 1)
    outline = target.variant(draws, subjects, 1.5 * spread, 0.25 * spread)
    outline = outline.scaled(scale * draws.normal(0.2, subjects, 1).exp())
    inner = outline.scaled((1 - 3 / outline.radius).clamp_min(0.5))
    label = object_label(0)
    at = anchor.unsqueeze(2)
    scene.canvas.blobs(Objects(at, outline, label + 2, active=rim.expand(-1, subjects, -1)))
    scene.canvas.blobs(Objects(at, outline.scaled(torch.where(rim, inner.radius / outline.radius, 1.0)), label))
    scene.offer(4.0, label, label + 2)
    scene.offer(0.5, object_label(1))
    scene.deformation = 0.4 * spread
    return scene
