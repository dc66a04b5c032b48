"""sample_patches by the native library, on the CPU. What it draws equals the reference bit for bit."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_double, c_int32, c_int64, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype
from icseg_kernels.patches.windows import Windows, blur_kernel

# maps, taps, noise, indices, scores, coords, workspace; its bytes; B, H, W, p, stride, before, after, taps, k, threads;
# strides of B, H, W and of the noise's rows; temperature; seeded, seed
_DRAW_ARGUMENTS = [c_void_p] * 7 + [c_int64] * 15 + [c_double, c_int64, c_uint64]
_DRAW = {
    torch.float32: library.function("icseg_sample_patches_f32", _DRAW_ARGUMENTS),
    torch.float64: library.function("icseg_sample_patches_f64", _DRAW_ARGUMENTS),
}
# maps, taps, logits, workspace; its bytes; B, H, W, p, stride, before, after, taps, threads; strides of B, H, W;
# temperature
_LOGITS_ARGUMENTS = [c_void_p] * 4 + [c_int64] * 13 + [c_double]
_LOGITS = {
    torch.float32: library.function("icseg_window_logits_f32", _LOGITS_ARGUMENTS),
    torch.float64: library.function("icseg_window_logits_f64", _LOGITS_ARGUMENTS),
}
