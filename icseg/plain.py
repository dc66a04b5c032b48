"""Which modules compute what their class says, so that a fused call may take their place."""

from __future__ import annotations

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether something runs before or after it, or its gradients."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def is_plain(module: nn.Module) -> bool:
    """Whether it has no hooks, and no parameters but weight and bias, which are not computed from others."""
    return not is_hooked(module) and module._parameters.keys() <= {"weight", "bias"}
