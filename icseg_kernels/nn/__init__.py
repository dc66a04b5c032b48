"""The ops as modules, to stand in for modules of other models: with their constructors, state dicts and calls."""

from icseg_kernels.nn import functional
from icseg_kernels.nn.attention import SelectedAttention
from icseg_kernels.nn.cross_conv import CrossConv2d, CrossConv3d
from icseg_kernels.nn.patches import PatchGather, PatchSampler, PatchScatter
from icseg_kernels.nn.router import PatchRouter, Routed, prediction_entropy
from icseg_kernels.nn.selection import SelectByIndex, SelectByMask, SelectByScore, Selected, Selection

__all__ = [
    "CrossConv2d",
    "CrossConv3d",
    "PatchGather",
    "PatchRouter",
    "PatchSampler",
    "PatchScatter",
    "Routed",
    "SelectByIndex",
    "SelectByMask",
    "SelectByScore",
    "Selected",
    "SelectedAttention",
    "Selection",
    "functional",
    "prediction_entropy",
]
