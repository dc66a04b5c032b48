"""Whole synthetic tasks: valid, the same from the same seed, and each on its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icseg.baselines.floors import copy_support
from icseg.data.synthetic import FAMILIES, MAX_CLASSES, SyntheticTask, TaskBatch, generate_task, generate_tasks
from icseg.data.synthetic import task as task_module
from icseg.data.synthetic.anatomy import layers, new_scene
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.scene import FIRST_OBJECT, LABELS, Scene, object_label
from icseg.data.synthetic.task import Family
from icseg.metrics import dice

SUMMARY = """
import hashlib
from icseg.data.synthetic import FAMILIES, generate_task
digest = hashlib.sha256()
for seed, family in enumerate(FAMILIES):
    task = generate_task(seed, 3, 64, family)
    digest.update(task.images.tobytes() + task.masks.tobytes())
print(digest.hexdigest())
"""


def check_task(task: SyntheticTask, subjects: int, size: int) -> None:
    for array in (task.images, task.masks):
        assert array.shape == (subjects, size, size)
        assert array.dtype == np.uint8
    classes = int(task.masks.max())
    assert 1 <= classes <= MAX_CLASSES
    for mask in (task.masks == c for c in range(1, classes + 1)):
        assert mask.sum((1, 2)).min() >= 60 * (size / 256) ** 2
        assert 0.006 < mask.mean() < 0.5
    assert task.images.std((1, 2)).min() > 2
    assert task.family in FAMILIES


def equal(first: TaskBatch, second: TaskBatch) -> bool:
    same = torch.equal(first.images, second.images) and torch.equal(first.masks, second.masks)
    return same and first.families == second.families


def part(tasks: TaskBatch, index: list[int]) -> TaskBatch:
    return TaskBatch(tasks.images[index], tasks.masks[index], [tasks.families[i] for i in index])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [96, 256])
def test_every_family_gives_valid_tasks(family: str, size: int) -> None:
    tasks = generate_tasks(range(3), 3, size, family=family)
    assert tasks.families == [family] * 3
    for index in range(3):
        check_task(tasks[index], 3, size)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), subjects=st.integers(1, 3), size=st.integers(32, 96))
def test_any_arguments_give_a_valid_task(seed: int, subjects: int, size: int) -> None:
    check_task(generate_task(seed, subjects, size), subjects, size)


def test_same_in_other_processes() -> None:
    digests = set()
    for hashing in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": hashing}
        root = Path(__file__).parent.parent
        command = [sys.executable, "-c", SUMMARY]
        run = subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True)
        digests.add(run.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("size", [64, 192])
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_change_single_pixels_by_rounding(family: str, size: int, threads: Callable[[int], None]) -> None:
    """As documented: sums over an image and MKL's Fourier transforms are cut up by the number of threads."""
    threads(1)
    one = generate_task(3, 3, size, family)
    threads(2)
    two = generate_task(3, 3, size, family)
    difference = np.abs(one.images.astype(np.int16) - two.images)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    assert (one.masks != two.masks).mean() < 1e-3


@pytest.mark.parametrize(
    ("seed", "family", "drawn", "mean", "foreground"),
    [
        (0, None, "lesions", 114.18, 11119),
        (1, "cells", "cells", 54.82, 5489),
        (2, "trees", "trees", 102.47, 937),
        (3, "echoes", "echoes", 70.88, 2412),
    ],
)
def test_the_seeds_still_give_these_tasks(
    seed: int, family: str | None, drawn: str, mean: float, foreground: int
) -> None:
    """Anything that changes them must raise GENERATOR_VERSION. Loose enough for another BLAS."""
    task = generate_task(seed, 3, 128, family)
    assert task.family == drawn
    assert task.images.mean() == pytest.approx(mean, abs=0.2)
    assert (task.masks == 1).sum() == pytest.approx(foreground, rel=0.005)


def test_a_task_does_not_depend_on_the_others_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [*range(20), 2**40, 2**63 - 1]
    whole = generate_tasks(seeds, 2, 64, absent=0.5)
    compositions = [[i] for i in range(0, len(seeds), 3)]
    compositions += [list(reversed(range(len(seeds)))), [3, 3, 17, 20], list(range(1, len(seeds), 2))]
    for index in compositions:
        assert equal(generate_tasks([seeds[i] for i in index], 2, 64, absent=0.5), part(whole, index))
    for pixels in (1, 3 * 2 * 64**2):  # one and three tasks at once
        monkeypatch.setitem(task_module._LARGEST_BATCH, "cpu", pixels)
        assert equal(generate_tasks(seeds, 2, 64, absent=0.5), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_of_a_family_does_not_depend_on_its_batch(family: str) -> None:
    whole = generate_tasks(range(5), 2, 48, family=family)
    assert equal(generate_tasks([4, 1], 2, 48, family=family), part(whole, [4, 1]))


def test_seeds_may_be_a_tensor_and_none() -> None:
    assert equal(generate_tasks(torch.tensor([3, 1]), 2, 32), generate_tasks([3, 1], 2, 32))
    assert generate_tasks([], 2, 32).images.shape == (0, 2, 32, 32)


def test_every_family_reaches_its_share() -> None:
    count = 20_000
    drawn = task_module._draw_families(Draws(torch.arange(count)), None).bincount(minlength=len(FAMILIES))
    total = sum(family.weight for family in FAMILIES.values())
    for found, family in zip(drawn.tolist(), FAMILIES.values(), strict=True):
        share = family.weight / total
        assert abs(found / count - share) < 4.5 * (share * (1 - share) / count) ** 0.5
    families = generate_tasks(range(400), 1, 64).families  # those that are hard to satisfy are drawn less often
    for name, family in FAMILIES.items():
        expected = 400 * family.weight / total
        assert families.count(name) == pytest.approx(expected, abs=0.35 * expected + 4 * expected**0.5)


def choose(scene: Scene, share: Tensor) -> tuple[Tensor, Tensor]:
    return task_module._choose_classes(Draws(torch.arange(len(share))), scene, share)


def test_classes_are_disjoint_candidates_within_the_limits() -> None:
    tasks = 60
    scene = new_scene(Draws(torch.arange(tasks)), torch.zeros(tasks, 2, 8, 8, dtype=torch.int64))
    share = torch.zeros(tasks, 2, LABELS)
    share[:, :, 1:9] = 0.05
    share[:, 1, 7] = 0.0005  # too small in one subject
    share[:, :, 8] = 0.6
    offered = [(1,), (2,), (3,), (1, 2), (4, 5), (5, 6), (6,), (7,), (8,)]
    for labels in offered:
        scene.offer(1.0, *labels)
    scene.offer(0.0, 10)
    classes, valid = choose(scene, share)
    assert valid.all()
    assert classes.amax() == MAX_CLASSES
    first = set()
    for row in classes:
        chosen = [tuple((row == c).nonzero().flatten().tolist()) for c in range(1, int(row.max()) + 1)]
        assert set(chosen) <= set(offered) - {(7,), (8,)}
        assert len(chosen) == MAX_CLASSES or all(set(c) & set(sum(chosen, ())) for c in offered[:-2])
        first.add(chosen[0])
    assert first == set(offered) - {(7,), (8,)}
    nothing, valid = choose(scene, torch.zeros_like(share))
    assert not valid.any()
    assert not nothing.any()


def test_class_masks_are_those_of_the_scenes_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes: list[Scene] = []

    def recording(draws: Draws, subjects: int, size: int) -> Scene:
        scenes.append(layers(draws, subjects, size))
        return scenes[-1]

    def still(draws: Draws, subjects: int, strength: Tensor, size: int) -> Tensor:
        return torch.arange(size * size).expand(len(draws), subjects, -1)

    def disc(draws: Draws, subjects: int, size: int, sector: float) -> Tensor:
        axis = torch.linspace(-1, 1, size)
        return (axis.view(-1, 1) ** 2 + axis**2 < 0.9).expand(len(draws), subjects, -1, -1)

    monkeypatch.setitem(FAMILIES, "layers", Family(recording, 1.0))
    monkeypatch.setattr(task_module, "warp_index", still)
    monkeypatch.setattr(task_module, "field_of_view", disc)
    seen = disc(Draws(torch.arange(1)), 2, 64, 0.0).numpy()[0]
    most = 0
    for seed in range(8):
        scenes.clear()
        task = generate_task(seed, 2, 64, "layers")
        scene = scenes[-1]
        labels = scene.canvas.labels(scene.canvas.code, scene.background)[0]
        wanted = [table[0][labels].numpy() & seen for table, weight in scene.candidates if weight[0] > 0]
        for number in range(1, int(task.masks.max()) + 1):
            assert any(((task.masks == number) == mask).all() for mask in wanted)
        for image in task.images:
            assert len(np.unique(image[~seen[0]])) == 1
        most = max(most, int(task.masks.max()))
    assert most == MAX_CLASSES


def test_absent_empties_class_1_of_the_last_subject_alone() -> None:
    seeds = range(160)
    whole, some, all_ = (generate_tasks(seeds, 2, 48, absent=absent) for absent in (0.0, 0.4, 1.0))
    assert whole.families == some.families == all_.families
    changed = {}
    for tasks, probability in ((some, 0.4), (all_, 1.0)):
        assert torch.equal(tasks.masks[:, :-1], whole.masks[:, :-1])
        emptied = (tasks.masks[:, -1] != 1).flatten(1).all(1)
        gone = (whole.masks[:, -1] == 1) & emptied.view(-1, 1, 1)
        assert torch.equal(tasks.masks[:, -1][~gone], whole.masks[:, -1][~gone])
        left = tasks.masks[:, -1] * gone  # nothing, but that a layer beneath may be a class too
        assert all(f == "layers" for f, more in zip(tasks.families, left.flatten(1).any(1), strict=True) if more)
        changed[probability] = emptied
    objects = changed[1.0]
    assert (whole.masks[:, -1] == 1).flatten(1).any(1).all()
    for family, emptied in zip(whole.families, objects.tolist(), strict=True):
        assert family == "layers" or emptied == (family != "regions")  # layers may have deposits, which are objects
    assert not changed[0.4][~objects].any()
    share, count = changed[0.4][objects].float().mean().item(), int(objects.sum())
    assert abs(share - 0.4) < 4.5 * (0.24 / count) ** 0.5
    untouched = ~changed[0.4]
    assert torch.equal(some.images[untouched], whole.images[untouched])


@pytest.mark.parametrize("family", ["worms", "cells", "membranes"])
def test_nothing_is_left_of_what_is_absent(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """No label, and no shade of an object that is gone: what lies there is the background with its own shade."""
    drawn: list[tuple[Tensor, Tensor]] = []
    usual = task_module.render

    def recording(draws: Draws, labels: Tensor, shade: Tensor, *others: Any) -> Tensor:
        drawn.append((labels, shade))
        return usual(draws, labels, shade, *others)

    monkeypatch.setattr(task_module, "render", recording)
    whole = generate_tasks(range(4), 2, 64, family=family)
    some = generate_tasks(range(4), 2, 64, family=family, absent=1.0)
    gone = (whole.masks[:, -1] == 1) & (some.masks[:, -1] != 1)
    assert gone.flatten(1).any(1).all()
    labels, shade = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert (labels[:4, -1][gone] >= FIRST_OBJECT).all()
    assert (labels[4:, -1][gone] < FIRST_OBJECT).all()
    if family == "membranes":  # whose cells have shades of their own
        assert (shade[4:, -1][gone] != 0).all()
    else:
        assert (shade[4:, -1][gone] == 0).all()


def test_seeds_give_different_tasks_and_subjects_differ() -> None:
    tasks = generate_tasks(range(6), 3, 64, family="organs")
    for first, second in ((0, 1), (1, 5)):
        assert (tasks.images[first] != tasks.images[second]).float().mean() > 0.5
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert ((tasks.images[:, a] != tasks.images[:, b]).float().mean((1, 2)) > 0.1).all()
        assert ((tasks.masks[:, a] == 1) != (tasks.masks[:, b] == 1)).flatten(1).any(1).all()


def test_a_seed_gives_about_the_same_scene_at_most_sizes() -> None:
    """Not where a structure is just large enough at one of them, nor where borders are a pixel thick."""
    coarse, fine = (generate_tasks(range(24), 2, size) for size in (64, 128))
    different = (coarse.masks != fine.masks[..., ::2, ::2]).float().mean((1, 2, 3))
    same = [a == b for a, b in zip(coarse.families, fine.families, strict=True)]
    assert (torch.tensor(same) & (different < 0.1)).float().mean() > 0.8


def seed_all(seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    random.seed(seed)


def global_states() -> tuple:
    return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002


def test_no_global_random_state_is_read_or_written() -> None:
    tasks = []
    for seed in (0, 1):
        seed_all(seed)
        before = global_states()
        tasks.append(generate_tasks(range(4), 2, 48))
        assert global_states() == before
    assert equal(*tasks)


def test_copying_the_support_masks_does_not_solve_the_tasks() -> None:
    masks = generate_tasks(range(60), 4, 64).masks.unsqueeze(2) == 1
    copied = copy_support(masks[:, :3].float())
    assert 0 < dice(copied, masks[:, 3]).mean() < 0.4


def test_a_scene_without_foreground_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(draws: Draws, subjects: int, size: int) -> Scene:
        scene = new_scene(draws, torch.zeros(len(draws), subjects, size, size, dtype=torch.int64))
        scene.deformation = torch.zeros(len(draws))
        scene.offer(1.0, object_label(0))
        return scene

    monkeypatch.setitem(FAMILIES, "cells", Family(empty, 1.0))
    task = generate_task(0, 4, 64, "cells")
    check_task(task, 4, 64)
    assert task.family == "cells"
    assert task.masks[:, 16:48, 16:48].sum() > 0.8 * task.masks.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [3, -1]}, "seed must not be negative, got -1"),
        ({"seeds": torch.zeros(2, 2)}, r"seeds must be a list or a tensor \[T\], got shape \[2, 2\]"),
        ({"subjects": 0}, "subjects must be at least 1, got 0"),
        ({"size": 31}, "size must be at least 32, got 31"),
        ({"family": "cats"}, "family must be one of regions, .*, got 'cats'"),
        ({"absent": 1.5}, r"absent must lie in \[0, 1\], and be 0 for a single subject, got 1.5"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tasks(**({"seeds": [0], "subjects": 2} | arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_nearly_the_same_tasks() -> None:
    """Single pixels differ where a logarithm or a cosine is rounded otherwise."""
    here = generate_tasks(range(40), 2, 96, absent=0.3)
    there = generate_tasks(range(40), 2, 96, absent=0.3, device="cuda")
    assert there.images.is_cuda
    assert there.families == here.families
    assert (there.masks.cpu() != here.masks).float().mean() < 0.01
    assert (there.images.cpu().float() - here.images.float()).abs().mean() < 2
