"""A sliding-window network on the windows where a coarse pass is unsure."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg_kernels import checks
from icseg_kernels.gumbel_topk import gumbel_topk
from icseg_kernels.nn.patches import PatchScatter
from icseg_kernels.numerics import accumulation_dtype
from icseg_kernels.patches import gather_patches


class Routed(NamedTuple):
    """What a `PatchRouter` returns.

    logits:   [B, K, H, W], of the network where a window lies, of the coarse pass elsewhere; where their dtypes differ,
              of the wider one.
    coarse:   [B, K, H, W], the coarse pass at full size, for a loss of its own.
    entropy:  [B, 1, H, W], of the coarse pass, in nats, without gradients, as `prediction_entropy` has it.
    coverage: [B, 1, H, W] bool, where a window lies.
    coords:   [B, k, 2] int64 (y, x) of the windows' top-left corners, the least certain first; as many as there are,
              if that is less than k. Negative where the image is smaller than a window.
    """

    logits: Tensor
    coarse: Tensor
    entropy: Tensor
    coverage: Tensor
    coords: Tensor


class PatchRouter(nn.Module):
    """Sliding-window inference at the k windows of an image of which a coarse pass is least certain.

    The candidates are those of sliding-window inference: every `stride` pixels on both axes, the last window flush
    with the border; an image smaller than a window lies in the middle of it. Windows are ranked by their mean entropy
    under the coarse pass (NaN counts as 0), and in training drawn without replacement in proportion to it. Their logits
    are averaged where they overlap; pixels without a window keep the coarse logits. Gradients reach the network, and
    the coarse pass by its uncovered pixels and by `Routed.coarse`; the choice of windows gets none.

    network:     maps windows [N, C, p, p] to logits [N, K, p, p]; one channel (K = 1) is a sigmoid's.
    k:           windows an image, at most; None: all, which is sliding-window inference.
    patch_size:  p.
    stride:      between candidates; None: p // 2, at least 1.
    coarse:      maps the whole image [B, C, H, W] to logits [B, K, h, w] of any size, resized bilinearly. None:
                 `network` itself, of the image scaled to `coarse_size`.
    coarse_size: (h, w) that the network sees in that pass; None: (p, p).
    weight:      of a pixel by its place in the window, as in `icseg_kernels.scatter_patches`.
    chunk:       windows in one call of the network, at most; None: all at once.

    ```
    router = PatchRouter(network, k=16, patch_size=96)
    logits = router(image).logits                           # [B, K, H, W]
    ```
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        k: int | None,
        patch_size: int,
        stride: int | None = None,
        coarse: nn.Module | None = None,
        coarse_size: tuple[int, int] | None = None,
        weight: str | Tensor | None = "gaussian",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if coarse is not None and coarse_size is not None:
            raise ValueError(f"coarse_size must be None with a coarse network, got {coarse_size}")
        self.network, self.coarse = network, coarse
        self.k = None if k is None else checks.integer("k", k, 0, otherwise=" or None")
        p = self.patch_size = checks.integer("patch_size", patch_size, 1)
        self.stride = max(p // 2, 1) if stride is None else checks.integer("stride", stride, 1, p)
        self.coarse_size = (p, p) if coarse_size is None else checks.pair("coarse_size", coarse_size, 1)
        self.chunk = None if chunk is None else checks.integer("chunk", chunk, 1, otherwise=" or None")
        self.scatter = PatchScatter(weight=weight, fill=0.0)

    def forward(self, image: Tensor, *, seed: int | Tensor | None = None) -> Routed:
        """image: [B, C, H, W], H, W > 0; what a window has outside of it is 0. seed: draw, in evaluation too.

        Raises TypeError or ValueError for an image, or an output of a network, of another type or shape.
        """
        if checks.floating("image", image).ndim != 4 or 0 in image.shape[1:]:
            raise ValueError(f"image must have shape [B, C, H, W] with C, H, W > 0, got {list(image.shape)}")
        size = image.shape[2], image.shape[3]
        coarse = self._coarse_logits(image)
        entropy = prediction_entropy(coarse.detach())
        coords = self._windows(entropy, seed)
        if coords.shape[1] == 0 or coords.shape[0] == 0:
            return Routed(coarse, coarse, entropy, torch.zeros_like(entropy, dtype=torch.bool), coords)
        logits = self._window_logits(gather_patches(image, coords, self.patch_size), coarse.shape[1])
        mean, coverage = self.scatter(logits, coords, size)
        return Routed(torch.where(coverage, mean, coarse), coarse, entropy, coverage, coords)

    def _coarse_logits(self, image: Tensor) -> Tensor:
        if self.coarse is not None:
            logits = self.coarse(image)
        else:
            logits = self.network(F.interpolate(image, self.coarse_size, mode="area"))
        checks.floating("the output of the coarse pass", logits)
        if logits.ndim != 4 or logits.shape[0] != image.shape[0] or 0 in logits.shape[1:]:
            raise ValueError(
                f"the coarse pass must return [B, K, h, w] with B = {image.shape[0]}, got {list(logits.shape)}"
            )
        if logits.shape[2:] == image.shape[2:]:
            return logits
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)

    def _windows(self, entropy: Tensor, seed: int | Tensor | None) -> Tensor:
        """[B, k, 2]"""
        p, (height, width) = self.patch_size, entropy.shape[2:]
        y, x = (_starts(n, p, self.stride, entropy.device) for n in (height, width))
        # In float64, which autocast leaves alone.
        total = _members(y, p, height) @ entropy[:, 0].double().nan_to_num(0.0) @ _members(x, p, width).mT
        mean = total.flatten(1) / p**2  # [B, windows]
        k = mean.shape[1] if self.k is None else min(self.k, mean.shape[1])
        drawn = self.training or seed is not None
        score = mean.clamp(min=1e-30).log()  # odds in proportion to the entropy, and all can be drawn
        index = gumbel_topk(score, k, seed=seed, noise=None if drawn else 0.0).indices
        corners = torch.stack([y[:, None].expand(-1, len(x)), x.expand(len(y), -1)], dim=-1).flatten(0, 1)
        return corners[index]

    def _window_logits(self, windows: Tensor, channels: int) -> Tensor:
        """[B, k, C, p, p] -> [B, k, K, p, p]"""
        batch, k, _, p, _ = windows.shape
        flat = windows.flatten(0, 1)
        parts = flat.split(self.chunk or len(flat))
        found = [checks.floating("the output of network", self.network(part)) for part in parts]
        logits = found[0] if len(found) == 1 else torch.cat(found)
        if logits.shape != (batch * k, channels, p, p):
            raise ValueError(
                f"network must map windows to logits {[batch * k, channels, p, p]}, as many channels as the coarse "
                f"pass has, got {list(logits.shape)}"
            )
        return logits.unflatten(0, (batch, k))

    def extra_repr(self) -> str:
        return f"k={self.k}, patch_size={self.patch_size}, stride={self.stride}, chunk={self.chunk}"


def prediction_entropy(logits: Tensor) -> Tensor:
    """[B, K, H, W] -> [B, 1, H, W] in nats: of the softmax over K channels, or of the sigmoid if K = 1.

    Float32, or float64 for float64 logits, which may be infinite. Raises TypeError or ValueError.
    """
    if checks.floating("logits", logits).ndim != 4 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [B, K, H, W] with K > 0, got {list(logits.shape)}")
    logits = logits.to(accumulation_dtype(logits.dtype))
    most = torch.finfo(logits.dtype).max / 2  # differences of finite logits are finite, and so 0 * log(0) is 0
    logits = logits.clamp(-most, most)
    if logits.shape[1] == 1:
        logits = torch.cat([logits, torch.zeros_like(logits)], dim=1)
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1, keepdim=True)


def _starts(length: int, patch: int, stride: int, device: torch.device) -> Tensor:
    """Where windows begin: every `stride` pixels, and flush with the end; around the middle of a shorter image."""
    last, missing = max(length - patch, 0), max(patch - length, 0)
    return (torch.arange(-(-last // stride) + 1, device=device) * stride).clamp(max=last) - missing // 2


def _members(starts: Tensor, patch: int, length: int) -> Tensor:
    """[windows, length]: 1 where a window lies, else 0."""
    place = torch.arange(length, device=starts.device) - starts[:, None]
    return ((place >= 0) & (place < patch)).double()
