"""Patch ops: pick patches on a map (sample), cut them out (gather), write them back (scatter, upsample)."""

from icseg_kernels.patches.coords import NO_PATCH
from icseg_kernels.patches.gather import gather_patches
from icseg_kernels.patches.sample import PatchSample, sample_patches
from icseg_kernels.patches.scatter import Scatter, gaussian_weight, scatter_patches
from icseg_kernels.patches.upsample import upsample_with_patches

__all__ = [
    "NO_PATCH",
    "PatchSample",
    "Scatter",
    "gather_patches",
    "gaussian_weight",
    "sample_patches",
    "scatter_patches",
    "upsample_with_patches",
]
