"""Sparse patch operations for in-context segmentation: pick, gather, attend, write back.

Each op has a reference in plain PyTorch and, where built, faster backends; see `icseg_kernels.backend`.
"""

from icseg_kernels import nn
from icseg_kernels.accelerate import accelerate
from icseg_kernels.attention import Rotation, selected_attention
from icseg_kernels.backend import BackendError, use_backend
from icseg_kernels.cross_conv import cross_conv2d, cross_conv2d_and_mean, cross_conv2d_mean
from icseg_kernels.group_norm_film import group_norm_film
from icseg_kernels.gumbel_topk import TopK, gumbel_topk
from icseg_kernels.halvings import halvings
from icseg_kernels.patches import (
    PatchSample,
    Scatter,
    gather_patches,
    sample_patches,
    scatter_patches,
    upsample_with_patches,
)
from icseg_kernels.qkv_projection import qkv_projection
from icseg_kernels.small_convolutions import ConvLayer, small_convolutions
from icseg_kernels.transformer_block import BlockWeights, transformer_block

__all__ = [
    "BackendError",
    "BlockWeights",
    "ConvLayer",
    "PatchSample",
    "Rotation",
    "Scatter",
    "TopK",
    "accelerate",
    "cross_conv2d",
    "cross_conv2d_and_mean",
    "cross_conv2d_mean",
    "gather_patches",
    "group_norm_film",
    "gumbel_topk",
    "halvings",
    "nn",
    "qkv_projection",
    "sample_patches",
    "scatter_patches",
    "selected_attention",
    "small_convolutions",
    "transformer_block",
    "upsample_with_patches",
    "use_backend",
]
