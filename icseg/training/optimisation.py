"""The optimiser's parameter groups, the moving average of the weights, and the precision of a run."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from icseg.training.config import OptimiserConfig
from icseg.training.muon import MuonAdamW

_MATRICES = (nn.Linear, nn.modules.conv._ConvNd)


def make_optimiser(model: nn.Module, config: OptimiserConfig) -> MuonAdamW:
    """`config.method` over the weights of linear and convolution layers, AdamW over the rest of what is trainable.

    Weight decay acts on the former; biases, norms, embeddings and bare parameters have none.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, _MATRICES)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if id(p) in matrices],
            "weight_decay": config.weight_decay,
            "muon": config.method == "muon",
        },
        {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0, "muon": False},
    ]
    return MuonAdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), ratio=config.muon_ratio)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the weights of `average` towards those of `model`; buffers are copied.

    Early steps use the smaller decay (1 + step) / (10 + step), so that the initial weights are soon
    forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context for a forward pass: bfloat16 autocast or nothing."""
    if precision == "float32" or (precision == "auto" and not has_bfloat16(device)):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False
