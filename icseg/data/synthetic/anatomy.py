"""Families whose structures lie at about the same place in every subject."""

from __future__ import annotations

import torch
from torch import Tensor

from icseg.data.synthetic.fields import TURN
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.scene import Scene, backgrounds, layer_maps, noise_regions, object_label
from icseg.data.synthetic.shapes import DESIGN_SIZE, Blob, Canvas, Objects

CENTRE = DESIGN_SIZE / 2


def variability(draws: Draws) -> Tensor:
    """[T] how much the subjects of a task differ."""
    return draws.log_uniform(0.4, 1.6)


def new_scene(draws: Draws, background: Tensor) -> Scene:
    """A scene with nothing on its background yet."""
    tasks, subjects, size, _ = background.shape
    return Scene(Canvas(tasks, subjects, size, draws.device), background)


def regions(draws: Draws, subjects: int, size: int) -> Scene:
    """A frame-filling atlas of smooth regions, alike in all subjects."""
    count = draws.integers(3, 12)
    alike = torch.ones(len(draws), dtype=torch.bool, device=draws.device)
    scene = new_scene(draws, noise_regions(draws, subjects, count, draws.integers(3, 9), size, alike))
    for region in range(11):
        scene.offer((region < count).float(), region)
    scene.deformation = 1.3 * variability(draws).clamp_min(0.7)
    return scene


def layers(draws: Draws, subjects: int, size: int) -> Scene:
    """Stacked tissue layers, sometimes with deposits on one boundary, lying or upright."""
    count = draws.integers(3, 8)
    labels = layer_maps(draws, subjects, count, variability(draws), size)
    scene = new_scene(draws, labels)
    most = 4
    x = draws.uniform(20, DESIGN_SIZE - 20, subjects, most)
    column = (x * size / DESIGN_SIZE).long().unsqueeze(2).expand(-1, -1, size, -1)
    boundary = (draws.uniform(0, 1) * count).long().view(-1, 1, 1, 1)
    y = (labels.gather(3, column) <= boundary).sum(2) * (DESIGN_SIZE / size) + 4
    blob = Blob.draw(draws, draws.uniform(5, 18, 1), 0.25, 2.5)
    deposits = draws.chance(0.5)
    number = torch.arange(most, device=draws.device)
    active = (number < draws.integers(1, most + 1, subjects, 1)) & deposits.view(-1, 1, 1)
    place = torch.stack([x, y.float()], -1)
    blobs = Blob.of(blob, torch.zeros(len(draws), subjects, most, dtype=torch.int64, device=draws.device))
    scene.canvas.blobs(Objects(place, blobs.relatives(draws, subjects, most), object_label(0), active=active))
    for layer in range(1, 8):
        scene.offer((layer < count).float(), layer)
    scene.offer(2 * deposits.float(), object_label(0))
    upright = draws.chance(0.25).view(-1, 1, 1, 1)
    scene.background = torch.where(upright, labels.mT, labels)
    scene.canvas.transpose(upright)
    scene.deformation = torch.full((len(draws),), 0.35, device=draws.device)
    return scene


_ORGANS = 8


def organs(draws: Draws, subjects: int, size: int) -> Scene:
    """Structures at fixed places in a body: known by where they are as much as by how they look."""
    spread = variability(draws)
    scene = new_scene(draws, backgrounds(draws, subjects, size, shared=0.5))
    per_subject = spread.view(-1, 1, 1)
    middle = CENTRE + draws.normal(12.0, 1, 2) + draws.normal(5 * per_subject, subjects, 2)  # [T, N, 2]
    scale = draws.normal(0.08 * per_subject, subjects, 1).exp()
    turn = draws.normal(0.1 * per_subject, subjects, 1)

    body = Blob.draw(draws, draws.uniform(80, 130, 1), 0.08, 1.5)
    body = body.variant(draws, subjects, spread, torch.full_like(spread, 0.05)).scaled(scale)
    has_body = draws.chance(0.75).view(-1, 1, 1)
    scene.canvas.blobs(Objects(middle.unsqueeze(2), body, object_label(0), active=has_body))

    radius = draws.log_uniform(7, 60, _ORGANS).sort(1, descending=True).values  # the largest hides no other
    blob = Blob.draw(draws, radius, 0.22, 2.4)
    angle, distance = draws.uniform(0, TURN, _ORGANS), draws.uniform(0, 85, _ORGANS)
    offset = torch.stack([angle.cos(), angle.sin()], -1) * distance.unsqueeze(-1)
    core = draws.uniform(0.4, 0.85, _ORGANS) * draws.chance(0.4, _ORGANS)
    mirrored = draws.chance(0.25, _ORGANS)
    count = draws.integers(2, _ORGANS + 1)

    own = blob.variant(draws, subjects, spread, 0.12 * spread)
    own = own.scaled(scale * draws.normal(0.12 * per_subject, subjects, _ORGANS).exp())
    shift = draws.normal((3.5 * per_subject + 0.04 * radius.unsqueeze(1)).unsqueeze(-1), subjects, _ORGANS, 2)
    cos, sin = turn.cos(), turn.sin()
    x, y = offset.unsqueeze(1).unbind(-1)
    place = torch.stack([cos * x - sin * y, sin * x + cos * y], -1) * scale.unsqueeze(-1) + shift
    number = torch.arange(_ORGANS, device=draws.device)
    exists = number < count.unsqueeze(1)
    groups = []
    for side in (1.0, -1.0):
        active = (exists if side > 0 else exists & mirrored).unsqueeze(1).expand(-1, subjects, -1)
        outline = own if side > 0 else own.mirrored()
        at = middle.unsqueeze(2) + place * torch.tensor([side, 1.0], device=draws.device)
        labels = object_label(1) + 3 * number
        groups.append(Objects(at, outline, labels, active))
        has_core = active & (core > 0).unsqueeze(1)
        groups.append(Objects(at, outline.scaled(core.unsqueeze(1)), labels + 1, has_core))
    scene.canvas.blobs(*groups)
    choice = draws.integers(0, 3, _ORGANS)
    for organ in range(_ORGANS):
        label, cored = object_label(1 + organ), exists[:, organ] & (core[:, organ] > 0)
        scene.offer((exists[:, organ] & (~cored | (choice[:, organ] == 0))).float(), label)
        scene.offer((cored & (choice[:, organ] == 1)).float(), label + 1)
        scene.offer((cored & (choice[:, organ] == 2)).float(), label, label + 1)
    scene.deformation = 0.8 * spread
    return scene


def chambers(draws: Draws, subjects: int, size: int) -> Scene:
    """A cavity in a ring, among cavities that look like it: told apart by what surrounds it.

    As the left ventricle among other blood pools: the place varies, a companion stays beside it.
    """
    spread = variability(draws)
    scene = new_scene(draws, backgrounds(draws, subjects, size, shared=0.3))
    middle = CENTRE + draws.normal(20.0, 1, 2) + draws.normal(14 * spread.view(-1, 1, 1), subjects, 2)
    size_spread = draws.choice([0.1, 0.3, 0.5]).view(-1, 1, 1)
    scale = draws.normal(size_spread, subjects, 1).exp()
    turn = draws.normal(0.25, subjects, 1)

    count = 6
    radius = draws.log_uniform(8, 30, count)
    decoy = Blob.draw(draws, radius, 0.2, 1.8)
    angle = draws.uniform(0, TURN, 1, count) + turn
    reach = draws.uniform(35, 90, 1, count) * scale
    place = middle.unsqueeze(2) + torch.stack([angle.cos(), angle.sin()], -1) * reach.unsqueeze(-1)
    place = place + draws.normal(5.0, subjects, count, 2)
    decoys = decoy.variant(draws, subjects, spread, 0.2 * spread).scaled(scale)
    exists = torch.arange(count, device=draws.device) < draws.integers(1, count + 1, 1, 1)
    scene.canvas.blobs(Objects(place, decoys, object_label(1), active=exists.expand(-1, subjects, -1)))

    ring = Blob.draw(draws, draws.log_uniform(14, 48, 1), 0.08, 1.35)
    thickness = draws.uniform(0.3, 0.85, 1, 1) * draws.normal(0.1, subjects, 1).exp()
    outline = ring.variant(draws, subjects, spread, 0.3 * spread).scaled(scale)
    scene.canvas.blobs(Objects(middle.unsqueeze(2), outline, object_label(0)))
    off_centre = draws.normal(0.05, subjects, 1, 2) * outline.radius.unsqueeze(-1)
    inner = outline.scaled(thickness.clamp(0.2, 0.9))
    scene.canvas.blobs(Objects(middle.unsqueeze(2) + off_centre, inner, object_label(0) + 1))
    scene.offer(2.0, object_label(0) + 1)
    scene.offer(1.0, object_label(0))
    scene.offer(1.0, object_label(0), object_label(0) + 1)
    scene.offer(0.5, object_label(1))
    scene.alike(object_label(0) + 1, object_label(1), probability=0.7)
    scene.deformation = 0.5 * spread
    return scene
