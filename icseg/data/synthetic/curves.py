"""Families of thin and of frame-filling structures: vessels, worms, fibres, networks, membranes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.data.synthetic.anatomy import CENTRE, new_scene
from icseg.data.synthetic.fields import TURN, edges, smooth_noise
from icseg.data.synthetic.objects import anywhere
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.scene import Scene, backgrounds, noise_regions, object_label
from icseg.data.synthetic.shapes import DESIGN_SIZE, Blob, Objects, walk

STRUCTURE = object_label(1)
_STEP = 5.0  # length of a piece of a curve


def _curve_scene(draws: Draws, subjects: int, size: int, origin: Tensor | None = None) -> Scene:
    """A scene for curves, with a round decoy about the origin [T, N, 2] in some tasks."""
    scene = new_scene(draws, backgrounds(draws, subjects, size, shared=0.1))
    if origin is None:
        origin = CENTRE + draws.normal(45.0, subjects, 2)
    blob = Blob.draw(draws, draws.uniform(8, 30, 1), 0.05, 1.2)
    decoy = draws.chance(0.4).view(-1, 1, 1)
    kind = torch.zeros(len(draws), subjects, 1, dtype=torch.int64, device=draws.device)
    outline = blob.of(kind).relatives(draws, subjects, 1)
    scene.canvas.blobs(Objects(origin.unsqueeze(2), outline, object_label(0), decoy))
    scene.deformation = torch.full((len(draws),), 0.3, device=draws.device)
    scene.offer(1.0, STRUCTURE)
    return scene


def trees(draws: Draws, subjects: int, size: int) -> Scene:
    """Branching vessels from one origin, with an optic-disc-like decoy there in some tasks."""
    origin = CENTRE + draws.normal(45.0, subjects, 2)
    scene = _curve_scene(draws, subjects, size, origin)
    width, curvature = draws.log_uniform(1.3, 6), draws.uniform(0.012, 0.12)
    trunks, pieces = 5, 18
    heading = draws.uniform(0, TURN, subjects, 1) + torch.arange(trunks, device=draws.device) * 1.7
    heading = heading + draws.normal(0.3, subjects, trunks)
    start = origin.unsqueeze(2).expand(-1, -1, trunks, -1)
    exists = torch.arange(trunks, device=draws.device) < draws.integers(2, trunks + 1, subjects, 1)
    length = draws.uniform(35, 90, subjects, trunks)
    width = width.view(-1, 1, 1).expand(-1, subjects, trunks)
    depth = draws.integers(2, 5, subjects, 1)
    shade = draws.normal(0.05, subjects, trunks)
    for generation in range(5):
        exists = exists & (depth >= generation) & ((width > 0.9) if generation else True)
        count = heading.shape[2]
        points = walk(draws, (subjects, count), pieces, _STEP, curvature, heading) + start.unsqueeze(3)
        used = torch.arange(pieces, device=draws.device) * _STEP < length.unsqueeze(3)
        taper = torch.linspace(1, 0.75, pieces, device=draws.device)
        _pieces(scene, points, width.unsqueeze(3) * taper, used & exists.unsqueeze(3), shade.unsqueeze(3))
        if generation == 4:
            break
        last = (length / _STEP).ceil().clamp(1, pieces).long()
        end = points.gather(3, last.view(*last.shape, 1, 1).expand(-1, -1, -1, 1, 2)).squeeze(3)
        children = []
        for side in (-1.0, 1.0):
            turned = heading + side * draws.uniform(0.2, 0.7, subjects, count)
            children.append((end, turned, exists & draws.chance(0.85, subjects, count), 0.7, 0.78))
        if generation < 2:
            along = (draws.uniform(0.1, 1, subjects, count) * last).long()
            middle = points.gather(3, along.view(*along.shape, 1, 1).expand(-1, -1, -1, 1, 2)).squeeze(3)
            turned = heading + draws.choice([-1, 1], subjects, count) * draws.uniform(0.5, 1.1, subjects, count)
            children.append((middle, turned, exists & draws.chance(0.6, subjects, count), 0.5, 0.6))
        start = torch.cat([c[0] for c in children], 2)
        heading = torch.cat([c[1] for c in children], 2)
        exists = torch.cat([c[2] for c in children], 2)
        jitter = draws.uniform(0.8, 1.2, 2, subjects, heading.shape[2])
        width = torch.cat([width * c[3] for c in children], 2) * jitter[:, 0]
        length = torch.cat([length * c[4] for c in children], 2) * jitter[:, 1]
        shade = torch.cat([shade] * len(children), 2)
    return scene


def _pieces(scene: Scene, points: Tensor, width: Tensor, active: Tensor, shade: Tensor) -> None:
    """Draw curves [T, N, M, P + 1, 2] with widths and existing pieces [T, N, M, P]."""
    start, end = points[..., :-1, :].flatten(2, 3), points[..., 1:, :].flatten(2, 3)
    shade = shade.expand(active.shape).flatten(2)
    scene.canvas.tubes(start, end, width.expand(active.shape).flatten(2), STRUCTURE, active.flatten(2), shade)


_MOST_CURVES = 22


def worms(draws: Draws, subjects: int, size: int) -> Scene:
    """Many curves of a limited length, thinner towards their ends."""
    scene = _curve_scene(draws, subjects, size)
    width, curvature, length = draws.log_uniform(1.3, 11), draws.uniform(0.02, 0.2), draws.uniform(6, 40)
    exists = _some_curves(draws, subjects, width)
    pieces = 56
    steps = (length.view(-1, 1, 1) * draws.uniform(0.6, 1.4, subjects, _MOST_CURVES)).long() + 3
    start = anywhere(draws, subjects, _MOST_CURVES)
    heading = draws.uniform(0, TURN, subjects, _MOST_CURVES)
    points = walk(draws, (subjects, _MOST_CURVES), pieces, _STEP, curvature, heading) + start.unsqueeze(3)
    number = torch.arange(pieces, device=draws.device)
    along = 2 * number / (steps - 1).unsqueeze(3) - 1
    own = width.view(-1, 1, 1) * draws.normal(0.15, subjects, _MOST_CURVES).exp()
    thickness = own.unsqueeze(3) * (1 - 0.5 * along.abs() ** 3)
    active = (number < steps.unsqueeze(3)) & exists.unsqueeze(3)
    _pieces(scene, points, thickness, active, draws.normal(0.05, subjects, _MOST_CURVES, 1))
    return scene


def fibres(draws: Draws, subjects: int, size: int) -> Scene:
    """Curves that cross the whole image."""
    scene = _curve_scene(draws, subjects, size)
    width, curvature = draws.log_uniform(1.3, 11), draws.uniform(0.008, 0.08)
    exists = _some_curves(draws, subjects, width)
    start = anywhere(draws, subjects, _MOST_CURVES)
    heading = draws.uniform(0, TURN, subjects, _MOST_CURVES)
    points = walk(draws, (subjects, _MOST_CURVES), 70, _STEP, curvature, heading) + start.unsqueeze(3)
    own = width.view(-1, 1, 1) * draws.normal(0.4, subjects, _MOST_CURVES).exp()
    active = exists.unsqueeze(3).expand(-1, -1, -1, 70)
    _pieces(scene, points, own.unsqueeze(3), active, draws.normal(0.05, subjects, _MOST_CURVES, 1))
    return scene


def _some_curves(draws: Draws, subjects: int, width: Tensor) -> Tensor:
    """[T, N, _MOST_CURVES] of which there are fewer where they are thick."""
    count = (draws.uniform(0.3, 1.5) * 40 / width).clamp(1, _MOST_CURVES).view(-1, 1, 1)
    count = (count * draws.uniform(0.6, 1.4, subjects, 1)).clamp_min(1)
    return torch.arange(_MOST_CURVES, device=draws.device) < count


def network(draws: Draws, subjects: int, size: int) -> Scene:
    """Ridges: where a smooth noise is near zero."""
    scene = _curve_scene(draws, subjects, size)
    noise = smooth_noise(draws, subjects, draws.integers(4, 12), size)
    threshold = draws.uniform(0.05, 0.2) * (draws.log_uniform(1.3, 11) / 4 + 0.3)
    ridge = noise.abs() < threshold.view(-1, 1, 1, 1)
    scene.canvas.fill(ridge, STRUCTURE)
    return scene


def membranes(draws: Draws, subjects: int, size: int) -> Scene:
    """Cells that fill the frame and touch: their membranes, or small bodies inside them."""
    background = torch.zeros(len(draws), subjects, size, size, dtype=torch.int64, device=draws.device)
    scene = new_scene(draws, background)
    resolution = draws.integers(6, 16)
    everyone = torch.ones(len(draws), dtype=torch.bool, device=draws.device)
    cell = noise_regions(draws, subjects, 8 * everyone.long(), resolution, size, ~everyone)
    scene.background_shade = draws.normal(0.06, subjects, 8).gather(2, cell.flatten(2)).view(cell.shape)
    most = 40
    kind = torch.zeros(len(draws), subjects, most, dtype=torch.int64, device=draws.device)
    blob = Blob.draw(draws, draws.uniform(3, 9, 1), 0.1, 2.0).of(kind).relatives(draws, subjects, most)
    bodies = draws.chance(0.5)
    exists = torch.arange(most, device=draws.device) < draws.integers(5, most + 1, subjects, 1)
    active = exists & bodies.view(-1, 1, 1)
    scene.canvas.blobs(Objects(anywhere(draws, subjects, most), blob, object_label(0), active))
    edge = edges(cell)
    thickness = draws.choice([1, 2, 5, 7]).view(-1, 1, 1, 1)
    thick = torch.zeros_like(edge, dtype=torch.bool)
    for width in (1, 2, 5, 7):
        side = max(1, round(width * size / DESIGN_SIZE))
        dilated = F.max_pool2d(F.pad(edge, ((side - 1) // 2, side // 2, (side - 1) // 2, side // 2)), side, 1)
        thick |= (dilated > 0) & (thickness == width)
    scene.canvas.fill(thick, STRUCTURE)
    scene.offer(2.0, STRUCTURE)
    scene.offer(bodies.float(), object_label(0))
    scene.deformation = torch.full((len(draws),), 0.2, device=draws.device)
    return scene
