"""One level of the cascade: where its patches lie, and how they become a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from icseg.published.config import AggregationConfig, LevelConfig, PublishedConfig
from icseg.published.sampling import binary_entropy, precise
from icseg.published.transformer import POSITIONS
from icseg_kernels import PatchSample, sample_patches, scatter_patches
from icseg_kernels.patches.sample import candidate_grid


class Level:
    """Geometry of one level: its sampler calls and the positions of its patches."""

    def __init__(self, config: LevelConfig, model: PublishedConfig) -> None:
        self.config = config
        self.resolution = config.resolution
        self._patch_size, self._image_size = model.patch_size, model.image_size
        self._per_image = model.backbone.positions == "image"

    def sample_target(
        self,
        score: Tensor,
        source: dict[str, Tensor | float | int | None],
        training: bool,
        differentiable: bool,
    ) -> PatchSample:
        """Pick target patches by score [B, 1, r, r]; `source` is a noise or a seed (`Draws.source`)."""
        config = self.config
        count = config.target_patches if training else config.target_patches_eval or config.target_patches
        return self._sample(score, count, config.stride, config.target_blur, source, differentiable)

    def sample_support(
        self, score: Tensor, source: dict[str, Tensor | float | int | None], training: bool
    ) -> PatchSample:
        """Pick support patches of each image by score [N, 1, r, r]."""
        config = self.config
        count = config.support_patches if training else config.support_patches_eval or config.support_patches
        stride = config.support_stride or config.stride
        return self._sample(score, count, stride, config.support_blur, source, False)

    def _sample(
        self,
        score: Tensor,
        count: int,
        stride: int,
        blur: float,
        source: dict[str, Tensor | float | int | None],
        differentiable: bool,
    ) -> PatchSample:
        padding = (self.config.pad_before, self.config.pad_after)
        rows, columns = candidate_grid(self.resolution, self.resolution, self._patch_size, stride, padding)
        noise, shape = source.get("noise"), (len(score), rows * columns)
        if isinstance(noise, Tensor) and noise.shape != shape:
            raise ValueError(
                f"noise must have shape [rows, candidates] = {list(shape)} at resolution {self.resolution}, "
                f"got {list(noise.shape)}"
            )
        return sample_patches(
            score,
            min(count, rows * columns),
            self._patch_size,
            stride=stride,
            padding=padding,
            temperature=self.config.temperature,
            blur_sigma=blur,
            differentiable=differentiable,
            **source,  # type: ignore[arg-type]
        )

    def positions(self, coords: Tensor, height: int) -> Tensor:
        """Rotary positions [..., K, 2] int64 in [0, 1024) of patches in an image `height` pixels high.

        The height is read only with positions = "published".
        """
        if self._per_image:  # in integers: a rounded share may fall below its own floor
            positions = coords.long() * (POSITIONS - 1) // self.resolution
        else:
            positions = coords.float() * (height / self.resolution) / self._image_size * (POSITIONS - 1)
        return positions.clamp(0, POSITIONS - 1).long()


class ConfidenceMap(nn.Module):
    """1 - the binary entropy of logits over a temperature: 1 where sure, 0 where not."""

    def __init__(self, temperature: float, learned: bool) -> None:
        super().__init__()
        log_temperature = torch.tensor(temperature).log()
        if learned:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    def forward(self, logits: Tensor) -> Tensor:
        probability = (precise(logits) / precise(self.log_temperature).exp()).sigmoid()
        return (1 - binary_entropy(probability)).to(logits.dtype)


class Aggregation(nn.Module):
    """Patches to maps: the weighted mean where they overlap."""

    weight: Tensor

    def __init__(self, config: AggregationConfig, patch_size: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("weight", _pixel_weights(config, patch_size), persistent=False)

    def forward(
        self, patches: Tensor, coords: Tensor, resolution: int, confidence: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Patches [B, K, 1, p, p] as a map [B, 1, r, r], where they lie (bool), and the map of their confidence.

        confidence: [B, K, 1, p, p] in [0, 1] or None; its map is 0 where no patch lies.
        As a weight it is raised to `smallest_weight` first, and so is its map then.
        """
        size, fill = (resolution, resolution), self.config.uncovered_logit
        if confidence is None:
            return *scatter_patches(patches, coords, size, weight=self.weight, fill=fill), None
        if not self.config.confidence_weighting:
            both = torch.cat([patches, confidence], dim=2)
            mean, covered = scatter_patches(both, coords, size, weight=self.weight, fill=0.0)
            return mean[:, :1].masked_fill(~covered, fill), covered, mean[:, 1:]
        weight = precise(confidence).clamp_min(self.config.smallest_weight)
        both = torch.cat([patches * weight, weight], dim=2)
        mean, covered = scatter_patches(both, coords, size, weight=self.weight, fill=0.0)
        weighted = mean[:, :1] / mean[:, 1:].masked_fill(~covered, 1.0)
        weighted = weighted.masked_fill(~covered, fill).to(patches.dtype)
        return weighted, covered, mean[:, 1:].to(confidence.dtype)


def _pixel_weights(config: AggregationConfig, patch_size: int) -> Tensor:
    if config.kind == "average":
        return torch.ones(patch_size, patch_size)
    offset = torch.arange(patch_size) - (patch_size - 1) / 2
    squares = offset[:, None] ** 2 + offset**2
    weight = torch.exp(-squares / (2 * (patch_size * config.sigma_ratio) ** 2))
    return (weight / weight.max()).clamp_min(config.smallest_weight)
