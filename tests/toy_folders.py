"""Small data sets on disk, one of each layout."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image


def subject(number: int, classes: int = 2, shape: tuple[int, int] = (40, 40)) -> tuple[NDArray, NDArray]:
    """Class c is the rows 10 c - 6 to 10 c - 1, of brightness 60 c + 4 * number; the ground is 0, a corner white."""
    mask = np.zeros(shape, np.uint8)
    for c in range(1, classes + 1):
        mask[10 * c - 6 : 10 * c, 8:30] = c
    image = np.where(mask, 60 * mask.astype(int) + 4 * number, 0).astype(np.uint8)
    image[-4:, -4:] = 255
    return image, mask


def write_folders(root: Path, subjects: int = 6, classes: int = 2, ending: str = "", suffix: str = ".png") -> Path:
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(subjects):
        image, mask = subject(i, classes)
        Image.fromarray(image).save(root / "images" / f"p{i // 2}_s{i}{suffix}")
        Image.fromarray(mask).save(root / "masks" / f"p{i // 2}_s{i}{ending}.png")
    return root


def write_nifti(path: Path, array: NDArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), path)


def write_nnunet(root: Path, cases: int = 5) -> Path:
    """Volumes of six axial slices: none has class 1 in the first two, class 2 is in the last of them alone."""
    for i in range(cases):
        image, mask = subject(i)
        volume, labels = np.stack([image] * 6, 2), np.stack([mask] * 6, 2)
        labels[..., :2] = 0
        labels[..., :5][labels[..., :5] == 2] = 0
        write_nifti(root / "imagesTr" / f"case_{i:03d}_0000.nii.gz", volume.swapaxes(0, 1))
        write_nifti(root / "labelsTr" / f"case_{i:03d}.nii.gz", labels.swapaxes(0, 1))
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_pack(path: Path, subjects: int = 8, patients: int = 5) -> Path:
    pairs = [subject(i) for i in range(subjects)]
    arrays = {"images": np.stack([image for image, _ in pairs]), "masks": np.stack([mask for _, mask in pairs])}
    np.savez(path, **arrays, class_names=["ground", "upper", "lower"], patient=np.arange(subjects) % patients)
    return path
