"""Data sets in folders as packs to evaluate on."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from toy_folders import write_folders, write_nifti, write_nnunet
from toy_pack import write_varied_pack
from typer.testing import CliRunner

from icseg.cli import app
from icseg.evaluation import load_dataset, pack_cases


def test_a_folder_of_images_and_masks(tmp_path: Path) -> None:
    pack = load_dataset(write_folders(tmp_path / "worms"), 32)
    assert (pack.name, pack.class_names) == ("worms", ("background", "1", "2"))
    assert pack.images.shape == pack.masks.shape == (6, 32, 32)
    assert set(np.unique(pack.masks)) == {0, 1, 2}
    assert len(set(pack.sources())) == 6


def test_supports_are_of_other_patients(tmp_path: Path) -> None:
    pack = load_dataset(write_folders(tmp_path / "worms"), 32, patient=r"^(p\d)_")
    assert sorted(pack.sources()) == [0, 0, 1, 1, 2, 2]
    for case in pack_cases(pack, 1, support=4):
        assert len(case.supports) == 4
        assert case.source not in pack.sources()[list(case.supports)]


def test_the_slices_of_a_volume_are_one_patient(tmp_path: Path) -> None:
    pack = load_dataset(write_nnunet(tmp_path / "organs"), 32)
    assert pack.class_names[:3] == ("background", "liver", "spleen")
    assert len(pack.images) == 5 * 4  # two of six slices are empty
    assert len(set(pack.sources())) == 5
    assert [len(pack.holders(c)) for c in (1, 2)] == [20, 5]


def test_what_nnunet_ignores_is_no_class(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path / "organs")
    for path in sorted((root / "labelsTr").iterdir())[:3]:
        volume = nibabel.load(path)
        labels = np.asarray(volume.dataobj).copy()
        labels[0, 0] = 3
        nibabel.save(nibabel.Nifti1Image(labels, volume.affine), path)
    pack = load_dataset(root, 32)
    assert pack.class_names == ("background", "liver", "spleen")
    assert set(np.unique(pack.masks)) == {0, 1, 2}


def test_a_mask_of_another_format_than_its_volume_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    volume = np.random.default_rng(0).random((12, 12, 12)).astype(np.float32)
    for i in range(2):
        write_nifti(root / "images" / f"case{i}.nii.gz", volume)
        (root / "masks").mkdir(exist_ok=True)
        np.save(root / "masks" / f"case{i}.npy", (volume > 0.5).astype(np.uint8))
    with pytest.raises(ValueError, match=r"case0\.npy must be in the format of .*case0\.nii\.gz"):
        load_dataset(root, 32)


def test_a_blank_image_without_a_label_is_left_out(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "worms")
    for folder in ("images", "masks"):
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(root / folder / "p9_blank.png")
    assert len(load_dataset(root, 32).images) == 6


def test_the_pattern_sees_the_name_without_its_ending_alone(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "worms")
    for folder in ("images", "masks"):
        for path in (root / folder).iterdir():
            path.rename(path.with_name(f"scan.v1.{path.name}"))
    assert sorted(load_dataset(root, 32, patient=r"(p\d)_").sources()) == [0, 0, 1, 1, 2, 2]


def test_packs_take_no_pattern(tmp_path: Path) -> None:
    pack = write_varied_pack(tmp_path / "dots.npz")
    result = CliRunner().invoke(app, ["evaluate", str(pack), "--patient", "(.)"])
    assert result.exit_code == 2
    assert "patient must be empty where no data set is a folder" in result.output


def test_a_folder_has_no_size_of_its_own(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "worms")
    with pytest.raises(ValueError, match=f"size must be a number of pixels for a folder.* got own for {folder}"):
        load_dataset(folder)


def test_the_command_scores_a_folder(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "worms")
    arguments = ["evaluate", str(folder), "--patient", r"^(p\d)_", "--size", "32", "--limit", "2", "--threads", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "worms" in result.output
    assert "| 2 |" in result.output
    failed = CliRunner().invoke(app, ["evaluate", str(folder), "--patient", "(", "--size", "32"])
    assert failed.exit_code == 2
    assert "patient must be a regular expression" in failed.output
