"""sample_patches, gather_patches and scatter_patches as modules that hold their settings."""

from __future__ import annotations

from torch import Tensor, nn

from icseg_kernels import checks
from icseg_kernels.patches import PatchSample, Scatter, gather_patches, sample_patches, scatter_patches


class PatchSampler(nn.Module):
    """`icseg_kernels.sample_patches` with its settings: a draw in training, the best `k` windows in evaluation."""

    def __init__(
        self,
        k: int,
        patch_size: int,
        *,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        temperature: float = 1.0,
        blur_sigma: float = 0.0,
        differentiable: bool = False,
    ) -> None:
        super().__init__()
        self.k = checks.integer("k", k, 0)
        self.patch_size = checks.integer("patch_size", patch_size, 1)
        self.stride = checks.integer("stride", stride, 1)
        self.padding = checks.pair("padding", padding, 0)
        self.temperature = checks.number("temperature", temperature, above=0)
        self.blur_sigma = checks.number("blur_sigma", blur_sigma, least=0)
        self.differentiable = differentiable

    def forward(
        self, weights: Tensor, *, seed: int | Tensor | None = None, noise: float | Tensor | None = None
    ) -> PatchSample:
        """weights [B, 1, H, W]. With a seed or noise, a draw in evaluation too."""
        if not self.training and seed is None and noise is None:
            noise = 0.0
        return sample_patches(
            weights,
            self.k,
            self.patch_size,
            stride=self.stride,
            padding=self.padding,
            temperature=self.temperature,
            blur_sigma=self.blur_sigma,
            seed=seed,
            noise=noise,
            differentiable=self.differentiable,
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, patch_size={self.patch_size}, stride={self.stride}, temperature={self.temperature:g}"


class PatchGather(nn.Module):
    """`icseg_kernels.gather_patches` with its settings."""

    def __init__(
        self, patch_size: int | float | tuple[float, float], *, out_size: int | None = None, alignment: str = "pixel"
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.out_size = None if out_size is None else checks.integer("out_size", out_size, 1, otherwise=" or None")
        self.alignment = alignment

    def forward(self, source: Tensor, coords: Tensor) -> Tensor:
        """source [..., C, H, W], coords [..., K, 2] -> [..., K, C, p, p], or n x n with out_size=n."""
        return gather_patches(source, coords, self.patch_size, out_size=self.out_size, alignment=self.alignment)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, out_size={self.out_size}, alignment={self.alignment!r}"


class PatchScatter(nn.Module):
    """`icseg_kernels.scatter_patches` with its settings. A weight [p, p] moves with the module, in no state dict."""

    weight: Tensor | None

    def __init__(self, *, weight: str | Tensor | None = None, fill: float = -10.0) -> None:
        super().__init__()
        if isinstance(weight, str) and weight != "gaussian":
            raise ValueError(f'weight must be None, "gaussian" or a tensor, got {weight!r}')
        if weight is not None and not isinstance(weight, str):
            checks.tensor("weight", weight)
        self.gaussian = isinstance(weight, str)
        self.register_buffer("weight", None if isinstance(weight, str) else weight, persistent=False)
        self.fill = checks.number("fill", fill)

    def forward(self, patches: Tensor, coords: Tensor, size: tuple[int, int]) -> Scatter:
        """patches [B, K, C, p, p], coords [B, K, 2], size (H, W) -> Scatter(mean, coverage)."""
        weight = "gaussian" if self.gaussian else self.weight
        return scatter_patches(patches, coords, size, weight=weight, fill=self.fill)

    def extra_repr(self) -> str:
        kind = "gaussian" if self.gaussian else None if self.weight is None else list(self.weight.shape)
        return f"weight={kind}, fill={self.fill:g}"
