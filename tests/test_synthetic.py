from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icseg.data.synthetic import (
    FAMILIES,
    MAX_CLASSES,
    SyntheticTask,
    TaskPool,
    generate_task,
    pool,
    pool_task_seed,
    render,
)
from icseg.data.synthetic import task as task_module
from icseg.data.synthetic.fields import blur, smooth_noise
from icseg.data.synthetic.labels import cells, layers
from icseg.data.synthetic.scene import LABELS, Scene, warp
from icseg.data.synthetic.shapes import Blob, Canvas

SUMMARY = """
import hashlib
from icseg.data.synthetic import FAMILIES, generate_task
digest = hashlib.sha256()
for seed, family in enumerate(FAMILIES):
    task = generate_task(seed, 3, 128, family)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [128, 256])
def test_every_family_gives_valid_tasks(family: str, size: int) -> None:
    for seed in range(3):
        task = generate_task(seed, 3, size, family)
        check_task(task, 3, size)
        assert task.family == family


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63), subjects=st.integers(1, 3), size=st.integers(32, 96))
def test_any_arguments_give_a_valid_task(seed: int, subjects: int, size: int) -> None:
    check_task(generate_task(seed, subjects, size), subjects, size)


def test_same_in_other_processes_whatever_the_threads() -> None:
    digests = set()
    for threads in ("1", "2"):
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        root = Path(__file__).parent.parent
        command = [sys.executable, "-c", SUMMARY]
        run = subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True)
        digests.add(run.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("seed", "family", "drawn", "mean", "foreground"),
    [
        (0, None, "lesion", 120.58, 2263),
        (1, "cells", "cells", 94.99, 4297),
        (2, "tubes", "tubes", 94.85, 6200),
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


def test_further_classes_change_neither_images_nor_class_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """As version 1 of the generator gave them, which had no further classes."""
    seeds = list(enumerate([*FAMILIES, *FAMILIES, None, None]))
    tasks = [generate_task(seed, 3, 96, family) for seed, family in seeds]
    assert max(int(task.masks.max()) for task in tasks) == MAX_CLASSES
    monkeypatch.setattr(task_module, "_add_further_classes", lambda *arguments: None)
    for (seed, family), task in zip(seeds, tasks, strict=True):
        alone = generate_task(seed, 3, 96, family)
        assert np.array_equal(alone.images, task.images)
        assert np.array_equal(alone.masks, task.masks == 1)


def test_further_classes_are_disjoint_candidates_of_the_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Scene] = []

    def recording(rng: np.random.Generator, subjects: int, size: int) -> Scene:
        seen.append(layers(rng, subjects, size))
        return seen[-1]

    def still(rng: np.random.Generator, labels: np.ndarray, shade: np.ndarray, strength: float) -> tuple:
        return labels, shade

    monkeypatch.setitem(FAMILIES, "layers", (recording, 1.0))
    monkeypatch.setattr(task_module, "warp", still)
    monkeypatch.setattr(render, "EFFECTS", ())
    most = 0
    for seed in range(8):
        masks = generate_task(seed, 2, 64, "layers").masks
        scene, classes = seen[-1], range(1, int(masks.max()) + 1)
        wanted = [np.isin(scene.labels, candidate) for candidate in scene.candidates]
        assert all(any(((masks == c) == mask).all() for mask in wanted) for c in classes)
        most = max(most, len(classes))
    assert most == MAX_CLASSES


def test_further_classes_are_cut_where_the_image_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def classes_of(seed: int) -> list[np.ndarray]:
        masks = generate_task(seed, 2, 64, "regions").masks
        return [(masks == c) for c in range(1, int(masks.max()) + 1)]

    monkeypatch.setattr(render, "EFFECTS", ((1.0, render._aperture),))
    corner = (slice(None), slice(0, 6), slice(0, 6))
    counts = []
    for seed in range(6):
        classes = classes_of(seed)
        counts.append(len(classes))
        assert not any(mask[corner].any() for mask in classes)
    assert max(counts) > 1


def test_seeds_give_different_tasks() -> None:
    first, second = generate_task(0, 2, 64, "cells"), generate_task(1, 2, 64, "cells")
    assert (first.images != second.images).any()


def test_subjects_differ() -> None:
    task = generate_task(5, 3, 128, "organs")
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (task.images[a] != task.images[b]).mean() > 0.1
        assert ((task.masks[a] == 1) != (task.masks[b] == 1)).any()


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
        tasks.append(generate_task(3, 2, 64))
        assert global_states() == before
    np.testing.assert_array_equal(tasks[0].images, tasks[1].images)
    np.testing.assert_array_equal(tasks[0].masks, tasks[1].masks)


def test_copying_the_support_masks_does_not_solve_the_tasks() -> None:
    dice = []
    for seed in range(40):
        masks = generate_task(seed, 5, 128).masks == 1
        copied = masks[:3].mean(0) > 0.5
        dice += [2 * (copied & mask).sum() / (copied.sum() + mask.sum()) for mask in masks[3:]]
    assert 0 < np.mean(dice) < 0.4


def test_a_scene_without_foreground_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(rng: np.random.Generator, subjects: int, size: int) -> Scene:
        scene = cells(rng, subjects, size)
        return Scene(scene.labels, scene.shade, [(LABELS - 1,)], scene.deformation)

    monkeypatch.setitem(FAMILIES, "cells", (empty, FAMILIES["cells"][1]))
    task = generate_task(0, 4, 64, "cells")
    check_task(task, 4, 64)
    assert task.masks[:, 20:44, 20:44].sum() > 0.8 * task.masks.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"subjects": 0}, "subjects must be at least 1, got 0"),
        ({"size": 31}, "size must be at least 32, got 31"),
        ({"family": "cats"}, "family must be one of regions, .*, got 'cats'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_task(**({"seed": 0, "subjects": 2} | arguments))


def test_blur_keeps_constants_and_matches_the_gaussian() -> None:
    flat = np.full((2, 40, 40), 0.7, np.float32)
    np.testing.assert_allclose(blur(flat, 3), flat, rtol=1e-5)
    point = np.zeros((1, 41, 41), np.float32)
    point[0, 20, 20] = 1
    spread = blur(point, 2)[0]
    assert spread.sum() == pytest.approx(1, rel=1e-4)
    assert spread[20, 22] / spread[20, 20] == pytest.approx(np.exp(-0.5), rel=1e-5)


@pytest.mark.parametrize("resolution", [3, 20, 64, 100])
def test_smooth_noise_has_unit_deviation_and_its_coarseness(resolution: int) -> None:
    noise = smooth_noise(np.random.default_rng(0), 8, resolution, 64)
    assert noise.dtype == np.float32
    assert noise.std() == pytest.approx(1, abs=0.05)
    step = np.abs(np.diff(noise, axis=2)).mean()
    assert step < 2.5 * resolution / 64


def test_warp_of_strength_zero_moves_at_most_the_zoom() -> None:
    labels = np.zeros((3, 64, 64), np.uint8)
    labels[:, 20:40, 24:44] = 5
    shade = labels.astype(np.float32)
    for seed in range(10):
        warped, warped_shade = warp(np.random.default_rng(seed), labels, shade, 0)
        np.testing.assert_array_equal(warped_shade, warped.astype(np.float32))
        if (warped == labels).all():
            return
    pytest.fail("no draw without a change of magnification")


def test_warp_deforms_every_subject_on_its_own() -> None:
    labels = np.zeros((3, 64, 64), np.uint8)
    labels[:, 20:40, 24:44] = 5
    warped, _ = warp(np.random.default_rng(1), labels, labels.astype(np.float32), 1)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (warped[a] != warped[b]).mean() > 0.01


def test_shapes_scale_with_the_size() -> None:
    outline = 128 + Blob.draw(np.random.default_rng(0), 40, 0.1, 1.5).relative(np.random.default_rng(1))
    fractions = []
    for size in (64, 256):
        canvas = Canvas(np.zeros((size, size), np.uint8))
        canvas.polygon(outline, 1)
        canvas.tube(np.array([[10.0, 10], [240, 10]]), np.array([12.0]), 1)
        fractions.append(canvas.labels().mean())
    assert fractions[0] == pytest.approx(fractions[1], rel=0.08)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Shards of three tasks; the seeds of the tasks that are made."""
    seeds: list[int] = []

    def recording(seed: int, subjects: int, size: int) -> SyntheticTask:
        seeds.append(seed)
        return generate_task(seed, subjects, size)

    monkeypatch.setattr(pool, "SHARD_TASKS", 3)
    monkeypatch.setattr(pool, "generate_task", recording)
    return seeds


def test_pool_holds_the_generated_tasks(tmp_path: Path, made: list[int]) -> None:
    tasks = TaskPool(tmp_path / "new" / "pool", 7, 2, 32, seed=4)
    assert len(tasks) == len(list(tasks)) == 7
    for i in (0, 3, 6, -1):
        wanted = generate_task(pool_task_seed(4, i % 7), 2, 32)
        np.testing.assert_array_equal(tasks[i].images, wanted.images)
        np.testing.assert_array_equal(tasks[i].masks, wanted.masks)
        assert tasks[i].family == tasks.families[i] == wanted.family
    assert tasks[0].images.flags.writeable
    for i in (7, -8):
        with pytest.raises(IndexError, match=f"pool of 7 tasks, got {i}"):
            tasks[i]


def test_pool_is_reused_shrinks_and_grows(tmp_path: Path, made: list[int]) -> None:
    TaskPool(tmp_path, 4, 2, 32)
    made.clear()
    assert len(TaskPool(tmp_path, 2, 2, 32)) == 2
    assert len(TaskPool(tmp_path, 4, 2, 32)) == 4
    assert made == []
    assert len(TaskPool(tmp_path, 8, 2, 32)) == 8
    assert made == [3, 4, 5, 6, 7]


def test_pool_resumes_after_an_interruption(tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    recording = pool.generate_task

    def interrupted(seed: int, subjects: int, size: int) -> SyntheticTask:
        if seed == 4:
            raise KeyboardInterrupt
        return recording(seed, subjects, size)

    monkeypatch.setattr(pool, "generate_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TaskPool(tmp_path, 6, 2, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "families-00000.json",
        "images-00000.npy",
        "masks-00000.npy",
        "pool.json",
    ]
    made.clear()
    monkeypatch.setattr(pool, "generate_task", recording)
    tasks = TaskPool(tmp_path, 6, 2, 32)
    assert made == [3, 4, 5]
    np.testing.assert_array_equal(tasks[4].images, generate_task(4, 2, 32).images)


def test_pool_shard_without_its_last_file_is_made_again(tmp_path: Path, made: list[int]) -> None:
    TaskPool(tmp_path, 6, 2, 32)
    made.clear()
    (tmp_path / "families-00001.json").unlink()
    TaskPool(tmp_path, 6, 2, 32)
    assert made == [3, 4, 5]


@pytest.mark.parametrize("changed", [{"subjects": 3}, {"size": 48}, {"seed": 1}])
def test_pool_refuses_tasks_of_other_parameters(tmp_path: Path, made: list[int], changed: dict[str, int]) -> None:
    TaskPool(tmp_path, 1, 2, 32)
    made.clear()
    arguments = {"count": 1, "subjects": 2, "size": 32, "seed": 0} | changed
    with pytest.raises(ValueError, match="directory must be empty or hold tasks made with"):
        TaskPool(tmp_path, **arguments)
    assert made == []


def test_pool_refuses_another_generator_version(
    tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    TaskPool(tmp_path, 1, 2, 32)
    monkeypatch.setattr(pool, "GENERATOR_VERSION", pool.GENERATOR_VERSION + 1)
    with pytest.raises(ValueError, match="directory must be empty or hold tasks made with"):
        TaskPool(tmp_path, 1, 2, 32)


def test_pool_refuses_tasks_whose_parameters_are_lost(tmp_path: Path, made: list[int]) -> None:
    TaskPool(tmp_path, 1, 2, 32)
    (tmp_path / "pool.json").write_text("{")
    with pytest.raises(ValueError, match=r"directory must hold a readable pool\.json"):
        TaskPool(tmp_path, 1, 2, 32)
    (tmp_path / "pool.json").unlink()
    with pytest.raises(ValueError, match=r"directory must hold the pool\.json of its tasks"):
        TaskPool(tmp_path, 1, 2, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be between 1 and 2"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"size": 8}, "size must be at least 32, got 8"),
    ],
)
def test_pool_with_bad_arguments_writes_nothing(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    directory = tmp_path / "pool"
    with pytest.raises(ValueError, match=message):
        TaskPool(directory, **({"count": 1, "subjects": 2, "size": 32} | arguments))
    assert not directory.exists()


def test_pool_workers_make_the_same_tasks(tmp_path: Path) -> None:
    count = pool.SHARD_TASKS + 2
    alone = TaskPool(tmp_path / "alone", count, 1, 32)
    shared = TaskPool(tmp_path / "shared", count, 1, 32, workers=2)
    assert alone.families == shared.families
    for i in range(count):
        np.testing.assert_array_equal(alone[i].images, shared[i].images)


def test_pools_of_different_seeds_share_no_seed() -> None:
    last_of_first, first_of_second = pool_task_seed(0, 2**32 - 1), pool_task_seed(1, 0)
    assert last_of_first < first_of_second
