"""Labelled data sets: what is read, at which size, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_pack import COUNT, SIZE, write_pack

from icseg.evaluation import Pack, load_dataset


def test_a_pack_as_it_was_written(tmp_path: Path) -> None:
    pack = load_dataset(write_pack(tmp_path / "toy.npz"))
    assert (pack.name, pack.class_names) == ("toy", ("background", "square", "rare"))
    assert pack.images.shape == pack.masks.shape == (COUNT, SIZE, SIZE)
    assert pack.holders(1).tolist() == list(range(9))
    assert pack.holders(2).tolist() == [0]
    assert pack.sources().tolist() == [i // 2 for i in range(COUNT)]
    assert load_dataset(write_pack(tmp_path / "toy.npz", patient=None)).sources().tolist() == list(range(COUNT))


def test_another_size(tmp_path: Path) -> None:
    path = write_pack(tmp_path / "toy.npz")
    own, double, half = load_dataset(path), load_dataset(path, 2 * SIZE), load_dataset(path, SIZE // 2)
    assert np.array_equal(double.masks, own.masks.repeat(2, 1).repeat(2, 2))
    assert (half.masks[:9, 2:6, 2:6] == 1).all()
    assert (half.masks == 1).sum() == 9 * 16
    assert double.images[5, 16, 16] == half.images[5, 4, 4] == 200
    assert own.resized(SIZE) is own


def test_sides_are_squashed(tmp_path: Path) -> None:
    masks = np.zeros((2, 40, 80), np.uint8)
    masks[:, 10:20, 40:60] = 1
    pack = load_dataset(write_pack(tmp_path / "wide.npz", images=masks * 255, masks=masks, patient=None), 40)
    assert pack.images.shape == (2, 40, 40)
    assert (pack.masks[:, 10:20, 20:30] == 1).all()
    assert (pack.masks == 1).sum() == 200
    assert np.array_equal(pack.images > 127, pack.masks == 1)


def test_what_a_size_loses_is_refused(tmp_path: Path) -> None:
    masks = np.zeros((COUNT, SIZE, SIZE), np.uint8)
    masks[:, 7, 7] = 1
    path = write_pack(tmp_path / "dots.npz", masks=masks)
    load_dataset(path)
    with pytest.raises(ValueError, match=r"dots\.npz at 8 px: pack must hold some class in images of two patients"):
        load_dataset(path, 8)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    pack = load_dataset(write_pack(tmp_path / "toy.npz"))
    moved = load_dataset(write_pack(tmp_path / "other.npz"))
    assert pack.digest() == moved.digest()
    changed = [
        {"patient": None},
        {"patient": np.arange(COUNT)},
        {"images": pack.images + np.uint8(1)},
        {"class_names": np.array(["background", "box", "rare"])},
        {"masks": np.where(pack.masks == 1, 2, 0).astype(np.uint8)},
    ]
    digests = {load_dataset(write_pack(tmp_path / "new.npz", **change)).digest() for change in changed}
    assert len(digests | {pack.digest()}) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": None}, "pack must hold masks, got .* without"),
        ({"images": np.zeros((COUNT, SIZE, SIZE), np.float32)}, r"both uint8, got \[12, 32, 32\] float32"),
        (
            {"images": np.zeros((3, SIZE, SIZE), np.uint8)},
            r"of one shape \[N, H, W\].*got \[3, 32, 32\] uint8",
        ),
        ({"class_names": np.array(["background"])}, "class_names must name class ids up to 2, got 1 names"),
        ({"patient": np.array([{}] * COUNT, dtype=object)}, r"pack must be a readable \.npz file"),
        ({"patient": np.array(["a", "b"])}, r"patient must have one entry an image, shape \[12\], got \[2\]"),
        ({"class_names": np.array("background")}, r"class_names must be a list of strings, got <U10 \[\]"),
        ({"class_names": np.array([["background"] * 3])}, r"class_names must be a list of strings, got <U10 \[1, 3\]"),
        (
            {"class_names": np.array(["background", "square", "square"])},
            "class_names must name each class differently, got square, square",
        ),
        ({"class_names": np.arange(3)}, r"class_names must be a list of strings, got int64 \[3\]"),
        ({"patient": np.zeros(COUNT)}, "pack must hold some class in images of two patients, got none"),
        ({"patient": np.full(COUNT, np.nan)}, "pack must hold some class in images of two patients, got none"),
        ({"masks": np.zeros((COUNT, SIZE, SIZE), np.uint8)}, "pack must hold some class in images of two patients"),
    ],
)
def test_bad_packs(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pack.load(write_pack(tmp_path / "bad.npz", **changes))
    with pytest.raises(ValueError, match=r"bad\.npz"):
        Pack.load(tmp_path / "bad.npz")


def test_files_that_are_no_packs(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not a zip file")
    with pytest.raises(ValueError, match=r"pack must be a readable \.npz file"):
        Pack.load(tmp_path / "text.npz")
    whole = write_pack(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"pack must be a readable \.npz file"):
        Pack.load(tmp_path / "cut.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ValueError, match=r"pack must be a readable \.npz file"):
        Pack.load(tmp_path / "array.npz")
