"""Data sets on disk as training tasks: what is read, how it is drawn, mixed and kept."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from toy_folders import subject, write_folders, write_nifti, write_nnunet, write_pack

import icseg.data.folders.cache as cache
from icseg.data.folders import DataSet, SourceConfig, list_source, open_data_set
from icseg.training.mixture import MixedTasks, Shares

SIZE = 32
IMAGES = 4


def number_of(image: NDArray, mask: NDArray, class_id: int, as_class: int = 1) -> int:
    """Which subject an image of a task shows, by the brightness of its class."""
    values = image[mask == as_class].astype(float)
    return round((np.median(values) - 60 * class_id) / 4)


def opened(path: Path, count: int = IMAGES, size: int = SIZE, folder: str = "cache", **fields: object) -> DataSet:
    config = SourceConfig(str(path), **fields)  # type: ignore[arg-type]
    directory = path.parent / folder
    return open_data_set(list_source(config), directory, images=count, size=size, seed=(0, 0), progress=False)


# Formats


@pytest.mark.parametrize(("ending", "suffix"), [("", ".png"), ("_mask", ".tif"), ("_seg", ".bmp"), ("", ".jpg")])
def test_folders_of_images(tmp_path: Path, ending: str, suffix: str) -> None:
    data = opened(write_folders(tmp_path / "set", ending=ending, suffix=suffix))
    assert data.classes == [1, 2]
    for i in range(10):
        task = data.task(i)
        assert task.images.shape == task.masks.shape == (IMAGES, SIZE, SIZE)
        assert task.images.dtype == task.masks.dtype == np.uint8
        for mask in task.masks:
            assert set(np.unique(mask)) == {0, 1, 2}
            assert [(mask == c).any(1).sum() for c in (1, 2)] == [5, 5]  # 6 rows of 40 at 32


def test_intensities_are_those_of_inference_and_shapes_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for i in range(2):
        image, mask = subject(i, 1, (20, 40))
        write_nifti(root / "images" / f"{i}.nii.gz", (image.astype(np.float32) * 30 - 1000).T)
        write_nifti(root / "masks" / f"{i}.nii.gz", mask.T)
    task = opened(root, count=2, size=40).task(0)
    for image, mask in zip(task.images, task.masks, strict=True):
        assert np.array_equal(mask[10:30], subject(0, 1, (20, 40))[1])
        assert not mask[:10].any()
        assert not mask[30:].any()
        assert number_of(image, mask, 1) in (0, 1)
        assert np.array_equal(image[30:], np.repeat(image[29:30], 10, 0))  # continued by its edge pixels
        assert (image.min(), image.max()) == (0, 255)


def test_nnunet_volumes(tmp_path: Path) -> None:
    data = opened(write_nnunet(tmp_path / "set"))
    assert data.classes == [1, 2]
    for i in range(20):
        task = data.task(i)
        holds_both = [set(np.unique(mask)) == {0, 1, 2} for mask in task.masks]
        upper_is_asked_for = [int(np.flatnonzero((mask == 1).any(1))[0]) < 8 for mask in task.masks]
        assert len(set(upper_is_asked_for)) == 1
        if not upper_is_asked_for[0]:  # class 2 is in the slices alone that hold both
            assert all(holds_both)
        asked = 1 if upper_is_asked_for[0] else 2
        cases = [number_of(*pair, asked) for pair in zip(task.images, task.masks, strict=True)]
        assert len(set(cases)) == IMAGES
    entries = list((tmp_path / "cache").glob("*.npy"))
    assert len(entries) == 5
    assert {np.load(path).shape for path in entries} == {(2, 4, SIZE, SIZE)}  # slices without a label are left out


def test_slices_along_another_axis_and_few_pixels(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path / "set")
    opened(root, axis=0, least_pixels=1, folder="other")
    shapes = {np.load(path).shape for path in (tmp_path / "other").glob("*.npy")}
    assert shapes == {(2, 22, SIZE, SIZE)}  # the columns that the classes take
    with pytest.raises(ValueError, match="must have images of one class of at least 4 patients"):
        opened(root, least_pixels=200)


def test_nnunet_images(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    for i in range(5):
        image, mask = subject(i)
        Image.fromarray(np.stack([image] * 3, -1)).save(root / "imagesTr" / f"road_{i}_0000.png")
        Image.fromarray(mask).save(root / "labelsTr" / f"road_{i}.png")
    labels = {"background": 0, "whole": [1, 2], "lower": 2}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".png"}))
    data = opened(root, classes=("lower",))
    assert data.classes == [2]
    task = data.task(0)
    assert set(np.unique(task.masks)) == {0, 1}
    assert len({number_of(i, m, 2) for i, m in zip(task.images, task.masks, strict=True)}) == IMAGES


def test_former_nnunet_sets(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path / "set")
    for path in (root / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}}))
    assert opened(root, classes=("spleen",)).classes == [2]


def test_packs(tmp_path: Path) -> None:
    data = opened(write_pack(tmp_path / "pack.npz"), classes=("lower",))
    for i in range(20):
        task = data.task(i)
        numbers = [number_of(*pair, 2) for pair in zip(task.images, task.masks, strict=True)]
        assert len({number % 5 for number in numbers}) == IMAGES


# Draws


def test_supports_and_targets_never_share_a_patient(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set", subjects=10)
    data = opened(root, patient=r"p(\d+)_")
    seen = set()
    for i in range(60):
        task = data.task(i)
        asked = 1 if np.flatnonzero((task.masks[0] == 1).any(1))[0] < 8 else 2
        numbers = [number_of(*pair, asked) for pair in zip(task.images, task.masks, strict=True)]
        assert len({number // 2 for number in numbers}) == IMAGES
        seen |= set(numbers)
    assert seen == set(range(10))
    with pytest.raises(ValueError, match=r"must have images of at least 6 patients, .* got 5"):
        opened(root, count=6, patient=r"p(\d+)_")


def test_classes_are_balanced_and_those_of_few_patients_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folders(tmp_path / "set", subjects=12, classes=3)
    for i in range(12):  # class 2 is in five images, class 3 in two
        path = root / "masks" / f"p{i // 2}_s{i}.png"
        mask = np.asarray(Image.open(path)).copy()
        mask[(mask == 2) & (i >= 5) | (mask == 3) & (i >= 2)] = 0
        Image.fromarray(mask).save(path)
    with caplog.at_level(logging.WARNING):
        data = opened(root)
    assert "data set set: classes of fewer than 4 patients left out: 3 (2)" in caplog.text
    assert data.classes == [1, 2]
    rows = [int(np.flatnonzero((data.task(i).masks[0] == 1).any(1))[0]) for i in range(400)]
    asked = Counter(row > 8 for row in rows)
    assert 160 < asked[True] < 240
    for i in range(20):
        masks = data.task(i).masks
        assert all(set(np.unique(mask)) >= set(range(masks.max() + 1)) for mask in masks)


def test_a_task_is_a_function_of_the_seed_and_its_number(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set")
    first, again = opened(root), opened(root)
    tasks = [first.task(i) for i in range(8)]
    for i in reversed(range(8)):
        task = again.task(i)
        assert np.array_equal(task.images, tasks[i].images)
        assert np.array_equal(task.masks, tasks[i].masks)
    listing = list_source(SourceConfig(str(root)))
    other = open_data_set(listing, tmp_path / "cache", images=IMAGES, size=SIZE, seed=(1, 0), progress=False)
    assert not all(np.array_equal(other.task(i).images, tasks[i].images) for i in range(8))


# Mixture


def test_the_weights_are_the_shares_of_the_tasks() -> None:
    shares = Shares([1.0, 2.0, 1.0], 2000, 0)
    counts = [shares.count(source) for source in range(3)]
    assert sum(counts) == 2000
    for count, share in zip(counts, (0.25, 0.5, 0.25), strict=True):
        assert abs(count / 2000 - share) < 0.03
    for source in range(3):
        assert np.array_equal(shares.number[shares.source == source], np.arange(counts[source]))
    fewer = Shares([1.0, 2.0, 1.0], 500, 0)
    assert np.array_equal(fewer.source, shares.source[:500])
    assert np.array_equal(fewer.number, shares.number[:500])
    assert not np.array_equal(Shares([1.0, 2.0, 1.0], 500, 1).source, fewer.source)


def test_mixed_tasks_are_those_of_their_sources() -> None:
    shares = Shares([1.0, 3.0], 40, 0)
    mixed = MixedTasks(shares, [lambda i: ("a", i), lambda i: ("b", i)])  # type: ignore[list-item, arg-type, return-value]
    assert len(mixed) == 40
    drawn = [mixed[i] for i in range(40)]
    assert [d for d in drawn if d[0] == "a"] == [("a", i) for i in range(shares.count(0))]  # type: ignore[index]
    assert [d for d in drawn if d[0] == "b"] == [("b", i) for i in range(shares.count(1))]  # type: ignore[index]


# Cache


def test_nothing_is_read_a_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_nnunet(tmp_path / "set")
    task = opened(root).task(3)
    read: list[Path] = []
    usual = cache._write

    def counting(item: cache.Item, *arguments: object) -> None:
        read.append(item.image)
        usual(item, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "_write", counting)
    again = opened(root, least_pixels=20, weight=2.0, name="other").task(3)
    assert read == []
    assert np.array_equal(task.images, again.images)
    changed = root / "labelsTr" / "case_002.nii.gz"
    os.utime(changed, ns=(1, 1))
    opened(root)
    assert [path.name for path in read] == ["case_002_0000.nii.gz"]
    read.clear()
    opened(root, size=48)
    assert len(read) == 5


def test_an_interrupted_reading_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "set")
    usual, read = cache._write, []

    def interrupted(item: cache.Item, *arguments: object) -> None:
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(item.image.name)
        usual(item, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(root)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(written) == 8
    opened(root)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert len(list((tmp_path / "cache").iterdir())) == 12


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set")
    opened(root)
    record = next((tmp_path / "cache").glob("*.json"))
    record.write_text("{")
    with pytest.raises(ValueError, match=rf"{record.name} must be as icseg wrote it, got a damaged file; delete it"):
        opened(root)


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path must name a folder or a file, got ''"),
        ({"format": "dicom"}, "format must be one of , folders, nnunet, npz, got 'dicom'"),
        ({"weight": 0}, "weight must be a finite number above 0, got 0"),
        ({"axis": 3}, "axis must be 0, 1 or 2, got 3"),
        ({"classes": (1.5,)}, r"classes must be a list of ids or names, got \(1.5,\)"),
        ({"least_pixels": 0}, "least_pixels must be an int of at least 1, got 0"),
        ({"patient": "p("}, r"patient must be a regular expression, got 'p\('"),
        ({"patient": "p.*"}, r"patient must be a regular expression with one group, got 'p\.\*' with 0"),
    ],
)
def test_bad_configurations(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**{"path": "set", **fields})  # type: ignore[arg-type]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data set none must be an existing folder or file, got .*none"):
        opened(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must be a folder with images and masks, .* which is none of these"):
        opened(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"must hold dataset\.json, got .*empty without"):
        opened(tmp_path / "empty", format="nnunet")
    root = write_folders(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="pictures must be an existing folder"):
        opened(root, format="folders", images="pictures")
    with pytest.raises(ValueError, match=r"patient must match the name of every image, got 'q\(.\)' for .*p0_s0\.png"):
        opened(root, patient="q(.)")
    with pytest.raises(ValueError, match="classes of data set set must be of 1, 2, got 3, liver"):
        opened(root, classes=(3, "liver"))
    with pytest.raises(ValueError, match=r"must have images of at least 9 patients, for the supports and .*, got 6"):
        opened(root, count=9)
    (root / "masks" / "p0_s0.png").rename(root / "masks" / "p0.png")
    with pytest.raises(ValueError, match=r"p0_s0\.png must have a mask named p0_s0, p0_s0_mask or p0_s0_seg in"):
        opened(root)


def test_bad_files(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set")
    mask = root / "masks" / "p0_s0.png"
    Image.fromarray(np.ones((40, 41), np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"p0_s0\.png must have the size of .*\[1, 40, 40\], got \[1, 40, 41\]"):
        opened(root)
    Image.fromarray(np.full((40, 40), 300, np.uint16)).save(mask)
    with pytest.raises(ValueError, match=r"p0_s0\.png must hold class ids up to 255 for training, got 300"):
        opened(root)
    mask.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"p0_s0\.png cannot be read"):
        opened(root)
    for i in range(6):
        Image.fromarray(np.arange(1600).astype(np.uint8).reshape(40, 40)).save(root / "masks" / f"p{i // 2}_s{i}.png")
    with pytest.raises(ValueError, match=r"at most 64 classes unless .* are images and masks swapped"):
        opened(root)


def test_bad_nnunet_sets(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path / "set")
    (root / "imagesTr" / "case_001_0000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"case_001\.nii\.gz must have an image .*case_001_0000.*, got none"):
        opened(root)
    for text, message in (
        ("{", "must be JSON, got a damaged file"),
        ("[]", "must hold an object, got list"),
        ('{"file_ending": ".nrrd"}', r"must have a file_ending of \.png, .*, got '\.nrrd'"),
        ('{"file_ending": ".png"}', r"labelsTr must hold at least one \.png file, got none"),
    ):
        (root / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            opened(root)
    whole = write_nnunet(tmp_path / "whole")
    for labels, message in (
        ('{"liver": "one"}', "each label a class id, got 'liver': 'one'"),
        ("1", "labels, an object"),
    ):
        (whole / "dataset.json").write_text(f'{{"labels": {labels}}}')
        with pytest.raises(ValueError, match=message):
            opened(whole)


def test_packs_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "pack.npz", images=np.array([{}], object), masks=np.zeros(1), class_names=["a"])
    with pytest.raises(ValueError, match=r"pack\.npz"):
        opened(tmp_path / "pack.npz")
    with pytest.raises(ValueError, match="patient must be left out for the pack"):
        opened(write_pack(tmp_path / "good.npz"), patient="(.)")
