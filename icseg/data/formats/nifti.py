"""NIfTI. Volumes are turned so that slices are as a radiologist's viewer shows them; maps are turned back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import nibabel
import numpy as np
from nibabel import orientations

from icseg.data.formats.content import Array, Content, Geometry

# First axis to the left, second to the back, third to the feet: with axes reversed to [z, y, x], the rows
# and columns of axial, coronal and sagittal slices run as on a viewing screen.
DISPLAY_AXES = orientations.axcodes2ornt("LPI")


@dataclass(frozen=True)
class NiftiGeometry(Geometry):
    """The NIfTI class (1 or 2), affine and header of the file."""

    kind: type
    affine: Array
    header: Any
    suffix: str = ".nii.gz"
    anatomical: ClassVar[bool] = True

    def planes(self, array: Array, axis: int) -> Array:
        """Axis 0 gives sagittal, 1 coronal, 2 axial slices, however the file is stored."""
        if array.ndim == 2:
            return array.T[None]
        turn = orientations.ornt_transform(orientations.io_orientation(self.affine), DISPLAY_AXES)
        return np.moveaxis(orientations.apply_orientation(array, turn).transpose(2, 1, 0), 2 - axis, 0)

    def from_planes(self, planes: Array, axis: int, ndim: int) -> Array:
        if ndim == 2:
            return planes[0].T
        turn = orientations.ornt_transform(DISPLAY_AXES, orientations.io_orientation(self.affine))
        return orientations.apply_orientation(np.moveaxis(planes, 0, 2 - axis).transpose(2, 1, 0), turn)

    def write(self, path: Path, array: Array) -> None:
        header = self.header.copy()
        header.set_data_dtype(array.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0
        shape = header.get_data_shape()  # with the axes of length 1 that reading dropped
        nibabel.save(self.kind(array.reshape(shape), self.affine, header), path)


def read(path: Path, *, labels: bool) -> Content:
    """Read a 2-D or 3-D NIfTI file; values are scaled as its header says."""
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):  # Nifti2Image is one too
        raise ValueError(f"it is {type(image).__name__}, not NIfTI")
    stored = image.get_data_dtype()
    if stored.fields is not None or stored.kind == "c":
        raise ValueError(f"its values are {stored}; one real value a voxel is needed")
    array = np.asanyarray(image.dataobj)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not np.isfinite(image.affine).all() or (array.ndim == 3 and np.linalg.matrix_rank(image.affine[:3, :3]) < 3):
        raise ValueError("its affine, which maps voxels to space, must be finite and invertible")
    suffix = ".nii" if path.suffix.lower() == ".nii" else ".nii.gz"
    geometry = NiftiGeometry(type(image), image.affine, image.header, suffix)
    return Content(array, stored, geometry)
