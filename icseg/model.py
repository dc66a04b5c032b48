"""PatchICL: the model that users hold, whichever architecture its configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from icseg.checkpoint import bundled_weights, load_checkpoint, save_checkpoint
from icseg.config import PatchICLConfig
from icseg.memory import SupportMemory
from icseg.output import SegmentationOutput

if TYPE_CHECKING:
    from icseg.baselines.dense import DenseNetwork
    from icseg.published.network import PublishedNetwork
    from icseg.sparse.network import SparseNetwork


class PatchICL(nn.Module):
    """In-context segmentation with a coarse-to-fine cascade of picked patches (arXiv 2604.12752).

    ```
    model = icseg.PatchICL.from_pretrained()
    out = model(target, support_images, support_masks)          # out.logits [B, 1, H, W]
    memory = model.encode_support(support_images, support_masks)
    out = model(target, memory=memory)                          # the support set is paid for once
    ```
    """

    def __init__(self, config: PatchICLConfig | None = None) -> None:
        super().__init__()
        self.config = config or PatchICLConfig.sparse()
        self.network = _make_network(self.config)

    def encode_support(self, images: Tensor, masks: Tensor, *, seed: int | None = None) -> SupportMemory:
        """Encode a support set once, for any number of targets.

        images, masks: [B, S, 1, H, W] float in [0, 1]. B = 1 serves target batches of any size.
        seed:          in training, varies which of several equally good support patches are picked.
        """
        return self.network.encode_support(*_checked_support(images, masks), seed=seed)

    def forward(
        self,
        target: Tensor,
        support_images: Tensor | None = None,
        support_masks: Tensor | None = None,
        *,
        memory: SupportMemory | None = None,
        target_mask: Tensor | None = None,
        seed: int | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> SegmentationOutput:
        """Segment target images.

        target:         [B, 1, H, W] float in [0, 1].
        support_images: [B, S, 1, h, w] float in [0, 1]; support_masks: the same shape, in [0, 1]. Or `memory`.
        target_mask:    [B, 1, H, W], read only where training picks patches by the true error.
        seed:           draws the patches with this seed; None in evaluation mode takes the best ones, without noise.
        noise:          uniforms in (0, 1), one tensor [rows, candidates] a sampler call, in the model's order.
        """
        if target.ndim != 4 or target.shape[1] != 1:
            raise ValueError(f"target must have shape [B, 1, H, W], got {list(target.shape)}")
        if not target.is_floating_point():
            raise TypeError(f"target must be floating-point, in [0, 1], got {target.dtype}")
        if memory is None:
            if support_images is None or support_masks is None:
                raise ValueError("support_images and support_masks, or memory, must be given")
            memory = self.encode_support(support_images, support_masks, seed=seed if self.training else None)
        elif support_images is not None or support_masks is not None:
            raise ValueError("memory must not be given together with support_images or support_masks")
        memory.check(self.network.fingerprint, target.shape[0])
        return self.network(target, memory, target_mask=target_mask, seed=seed, noise=noise)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, *, device: str | torch.device = "cpu") -> Self:
        """The model of a checkpoint (.safetensors with its configuration inside), in evaluation mode.

        path: None takes the bundled weights. Raises FileNotFoundError, or ValueError for a corrupt or foreign file.
        """
        path = bundled_weights() if path is None else path
        config, state = load_checkpoint(path)
        model = cls(config)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        given = {name: tensor.shape for name, tensor in state.items()}
        wrong = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
        if wrong:
            raise ValueError(
                "checkpoint must hold the weights that its configuration names, "
                f"got {path} where {len(wrong)} differ ({wrong[0]}, for one)"
            )
        model.load_state_dict(state)
        return model.to(device).eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights and configuration to one .safetensors file; the file appears whole or not at all."""
        save_checkpoint(path, self.config, self.state_dict())


def _make_network(config: PatchICLConfig) -> SparseNetwork | PublishedNetwork | DenseNetwork:
    from icseg.baselines.dense import DenseConfig, DenseNetwork
    from icseg.published.config import PublishedConfig
    from icseg.published.network import PublishedNetwork
    from icseg.sparse.config import SparseConfig
    from icseg.sparse.network import SparseNetwork

    match config:
        case SparseConfig():
            return SparseNetwork(config)
        case PublishedConfig():
            return PublishedNetwork(config)
        case DenseConfig():
            return DenseNetwork(config)
    raise TypeError(
        f"config must be PatchICLConfig.sparse(), .published() or .universeg(), got {type(config).__name__}"
    )


def _checked_support(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 5 or images.shape[2] != 1:
        raise ValueError(f"support_images must have shape [B, S, 1, H, W], got {list(images.shape)}")
    if images.shape[1] == 0:
        raise ValueError("support_images must hold at least one image, got S = 0")
    if masks.shape != images.shape:
        raise ValueError(
            f"support_masks must have the shape of support_images {list(images.shape)}, got {list(masks.shape)}"
        )
    if not images.is_floating_point():
        raise TypeError(f"support_images must be floating-point, in [0, 1], got {images.dtype}")
    return images, masks.to(images.dtype)
