"""U-Nets whose blocks let targets and supports exchange features: UniverSeg, Tyche and MultiverSeg.

A block convolves every pair [target; support_i], linearly, to z_i = conv_u(target) + conv_v(support_i). Without an
activation of z the new target depends on mean(z_i) = conv_u(target) + conv_v(mean(support_i)) alone. Nothing reads the
support features of the last block. In the first block z_i is a sum of one term of the target and one of the support.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from icseg_kernels.accelerate import convolutions
from icseg_kernels.accelerate.report import REWRITES, Change
from icseg_kernels.accelerate.rewrite import (
    Memory,
    Switches,
    convolve,
    differentiated,
    each,
    geometry,
    hooked,
    overridden,
    recorded,
)
from icseg_kernels.cross_conv import cross_conv2d, cross_conv2d_and_mean, cross_conv2d_mean

_ALIVE = 8  # feature maps of the widest block that one support image has at once, with its skips, at most


def rewrite(
    name: str, module: nn.Module, switches: Switches, changes: list[Change], replaced: list[tuple[nn.Module, Any]]
) -> None:
    """Replace the forward pass of the module if it is one of these networks."""
    network = NETWORKS.get(type(module).__name__)
    if network is None:
        return
    kind = network.kind
    mismatch = network.mismatch(module)
    if mismatch or not switches.split:
        reason = mismatch or "needs the split"
        wanted = [switch for switch in REWRITES if switch != "split" and getattr(switches, switch)]
        changes.extend(Change(name, kind, switch, False, reason) for switch in wanted)
        return
    plan = network(module, switches)
    for switch in REWRITES:
        if switch != "split":
            reason = plan.reason(switch)
            changes.append(Change(name, kind, switch, not reason, reason))
    replaced.append((module, plan.forward))


class CrossNetwork:
    """The forward pass of one network; `forward` takes the model's own arguments."""

    kind = ""
    block_name = "CrossBlock"
    arguments: tuple[str, ...] = ()
    forward: Callable[..., Tensor]

    def __init__(self, model: Any, switches: Switches) -> None:
        self.model, self.switches = model, switches
        self._memory = Memory()

    @classmethod
    def mismatch(cls, model: Any) -> str:
        """Why the module is not the network that is known, or ""."""
        if overridden(model):
            return "its forward has been replaced already"
        if tuple(inspect.signature(type(model).forward).parameters)[1:] != cls.arguments:
            return f"forward takes other arguments than {', '.join(cls.arguments)}"
        for part in ("enc_blocks", "dec_blocks", "downsample", "upsample", "out_conv"):
            if not isinstance(getattr(model, part, None), nn.Module):
                return f"it lacks {part}"
        if not isinstance(model.enc_blocks, nn.ModuleList) or not isinstance(model.dec_blocks, nn.ModuleList):
            return "enc_blocks and dec_blocks are no ModuleLists"
        if not len(model.enc_blocks) or len(model.dec_blocks) >= len(model.enc_blocks):
            return f"{len(model.dec_blocks)} decoder blocks are too many for {len(model.enc_blocks)} encoder blocks"
        for block in (*model.enc_blocks, *model.dec_blocks):
            found = cls._block_mismatch(block)
            if found:
                return found
        return ""

    @classmethod
    def _block_mismatch(cls, block: Any) -> str:
        if type(block).__name__ != cls.block_name or overridden(block):
            return f"a block is no {cls.block_name} with its own forward, but {type(block).__name__}"
        cross: Any = getattr(block, "cross", None)
        conv: Any = getattr(cross, "cross_conv", None)
        if type(conv).__name__ not in convolutions.NAMES or not isinstance(conv, nn.Conv2d):
            return "a block lacks cross.cross_conv"
        if overridden(cross) or overridden(conv):
            return "the forward of a block's part has been replaced already"
        if conv.groups != 1:
            return f"{conv.groups} groups of channels, which targets and supports share"
        if not hasattr(cross, "nonlinearity") or (cross.nonlinearity is not None and not hasattr(cross, "nonlin")):
            return "a block lacks cross.nonlinearity or cross.nonlin"
        if not all(hasattr(getattr(block, side, None), "vmapped") for side in ("target", "support")):
            return "a block lacks target.vmapped or support.vmapped"
        return ""

    def reason(self, switch: str) -> str:
        """Why a rewrite is not made, or ""."""
        if not getattr(self.switches, switch):
            return "no limit given" if switch == "max_memory" else "switched off"
        last, first = self._blocks[-1], self._blocks[0]
        if switch == "commute_mean":
            if not _linear(last.cross):
                return f"{_nonlinear_part(last.cross)} comes before the mean"
            return "" if self.switches.drop_dead_support else "needs drop_dead_support"
        if switch == "cache_support":
            if not _linear(first.cross):
                return f"{_nonlinear_part(first.cross)} mixes target and support in the first block"
            if len(self._blocks) == 1:
                return "nothing reads the support features of the only block"
            begin = next(iter(first.support.vmapped.named_children()), ("", None))
            if begin[0] != "conv" or not isinstance(begin[1], nn.Conv2d) or begin[1].groups != 1:
                return "the support path of the first block does not begin with a convolution of one group"
            if getattr(first, "cross_residual", False) or getattr(first, "conv_residual", False):
                return "shortcuts pass by the convolutions of the first block"
        return ""

    def forget(self) -> None:
        """Free what is kept of a support set."""
        self._memory.forget()

    @property
    def _blocks(self) -> list[Any]:
        return [*self.model.enc_blocks, *self.model.dec_blocks]

    def _bypassed(self) -> list[nn.Module]:
        """Modules that the network would call, and this does not."""
        parts = [part for b in self._blocks for part in (b, b.cross, b.cross.cross_conv)]
        last, first = self._blocks[-1].support, self._blocks[0].support
        return [*parts, *last.modules(), first, first.vmapped, *first.vmapped.children()]

    def _original(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = type(self.model).forward(self.model, *args, **kwargs)
        return found

    def _must_stay(self, support: Tensor) -> bool:
        return support.shape[1] == 0 or hooked(self._bypassed())

    def _features(self, target: Tensor, support: Tensor) -> Tensor:
        """What the last block makes of the target: [B, T, C, H, W].

        target: [B, T, Ct, H, W]; support: [B, S, Cs, H, W], S >= 1.
        """
        chunk = self._chunk(support)
        if chunk < support.shape[1]:
            return self._streamed(target, support, chunk)
        blocks = self._blocks
        of_target, of_support = self._stream(target), self._stream(support)
        for level, block in enumerate(blocks):
            of_target.enter(level)
            wanted = level + 1 < len(blocks) or not self.switches.drop_dead_support
            if not wanted and self._averages(level):
                of_support.average()
            of_support.enter(level)
            if level == 0 and self._caches(target, support):
                of_target.now, of_support.now = self._first_block(block, target, support)
            else:
                of_target.now, of_support.now = self._step(block, of_target.now, of_support.now, wanted)
        return of_target.now

    def _stream(self, features: Tensor) -> _Stream:
        return _Stream(features, self.model.downsample, self.model.upsample, len(self.model.enc_blocks))

    def _averages(self, level: int) -> bool:
        """Whether a block whose support features nothing reads may be given the mean of what it would upsample."""
        model = self.model
        upsampled = level >= len(model.enc_blocks) and isinstance(model.upsample, nn.Upsample)
        return upsampled and self.switches.commute_mean and _linear(self._blocks[level].cross)

    # One block: what pairs become, then what targets and supports become.

    def _step(self, block: Any, target: Tensor, support: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        """New target and support; unless wanted, the support comes back as it was given."""
        pairs, mean = self._pairs_and_mean(block.cross, self._query(target), support, wanted)
        if pairs is None:
            return self._new_target(block, target, mean), support
        return self._new_target(block, target, mean), self._new_support(block, support, pairs)

    def _query(self, target: Tensor) -> Tensor:
        """The target image that supports are paired with, [B, 1, C, H, W]."""
        return target

    def _new_target(self, block: Any, target: Tensor, mean: Tensor) -> Tensor:
        found: Tensor = block.target(mean)
        return found

    def _new_support(self, block: Any, support: Tensor, pairs: Tensor) -> Tensor:
        found: Tensor = block.support(pairs)
        return found

    def _pairs_and_mean(self, cross: Any, query: Tensor, support: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
        """Pairs [B, S, C, H, W], None unless wanted, and their mean [B, 1, C, H, W]."""
        conv = cross.cross_conv
        arguments = (query, support, conv.weight, conv.bias)
        moves = geometry(conv)
        if _linear(cross) and not wanted and self.switches.commute_mean:
            return None, cross_conv2d_mean(*arguments, **moves)
        activation = _activation(cross)
        fused = _linear(cross) or (activation is not None and getattr(cross, "norm", None) is None)
        if fused and not differentiated(arguments):  # the fused ops can be differentiated only once
            moves |= activation or {}
            if not wanted:
                mean = cross_conv2d_mean(*arguments, **moves) if activation else None
                return None, cross_conv2d(*arguments, **moves).mean(dim=2) if mean is None else mean
            pairs, mean = cross_conv2d_and_mean(*arguments, **moves)
            return pairs.squeeze(1), mean
        pairs = cross_conv2d(*arguments, **moves).squeeze(1)
        if cross.nonlinearity is not None:
            pairs = each(cross.nonlin, pairs)
        if getattr(cross, "norm", None) is not None:
            pairs = each(cross.norml, pairs)
        return pairs if wanted else None, pairs.mean(dim=1, keepdim=True)

    # The first block of a support set that has been seen before.

    def _caches(self, target: Tensor, support: Tensor) -> bool:
        if self.reason("cache_support") or recorded(support):
            return False
        block = self._blocks[0]
        return not differentiated((target, support, *block.cross.parameters(), *block.support.parameters()))

    def _first_block(self, block: Any, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """Target and support features after the first block."""
        conv, after = block.cross.cross_conv, block.support.vmapped.conv
        of_target, of_support = conv.weight.split([target.shape[2], support.shape[2]], dim=1)
        sources = [support, of_support, conv.bias, after.weight, after.bias]

        def make() -> tuple[Tensor, Tensor]:
            pairs = convolve(support, conv, of_support, conv.bias)
            return pairs.mean(dim=1, keepdim=True), convolve(pairs, after, after.weight, after.bias)

        mean, new = self._memory.recall(sources, make)
        pair = convolve(self._query(target), conv, of_target, None)
        new = new + convolve(pair, after, after.weight, None)
        for name, module in block.support.vmapped.named_children():
            if name != "conv":
                new = each(module, new)
        return self._new_target(block, target, pair + mean), new

    # Support sets in chunks: a block needs no more of the set than a mean.

    def _chunk(self, support: Tensor) -> int:
        """Images of the support set to hold features of at once."""
        limit, images = self.switches.max_memory, support.shape[1]
        if limit is None or recorded(support) or differentiated((support, *self.model.parameters())):
            return images
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.model.modules()):
            return images
        channels = max(b.cross.cross_conv.out_channels for b in self._blocks)
        pixels = support.shape[0] * math.prod(support.shape[3:])
        return min(images, max(1, limit // (_ALIVE * channels * pixels * support.element_size())))

    def _streamed(self, target: Tensor, support: Tensor, chunk: int) -> Tensor:
        """As `_features`, with features of `chunk` images of the support set at once, computed anew for every block."""
        of_target = self._stream(target)
        entered: list[Tensor] = []  # the target features that every block has been given
        for level, block in enumerate(self._blocks):
            of_target.enter(level)
            entered.append(of_target.now)
            mean: Tensor | float = 0.0
            for images in support.split(chunk, dim=1):
                part = self._part(entered, images)
                mean = mean + part * (images.shape[1] / support.shape[1])
            assert isinstance(mean, Tensor)
            of_target.now = self._new_target(block, of_target.now, mean)
        return of_target.now

    def _part(self, entered: list[Tensor], support: Tensor) -> Tensor:
        """The mean over these support images of what the last of these blocks pairs them to."""
        of_support = self._stream(support)
        for level, (block, target) in enumerate(zip(self._blocks, entered, strict=False)):
            wanted = level + 1 < len(entered)
            if not wanted and self._averages(level):
                of_support.average()
            of_support.enter(level)
            pairs, mean = self._pairs_and_mean(block.cross, self._query(target), of_support.now, wanted)
            if pairs is not None:
                of_support.now = self._new_support(block, of_support.now, pairs)
        return mean


class _Stream:
    """Features of targets or supports on their way through the network, and those kept for its decoder."""

    def __init__(self, features: Tensor, downsample: nn.Module, upsample: nn.Module, encoder_blocks: int) -> None:
        self.now = features
        self._skips: list[Tensor] = []
        self._downsample, self._upsample, self._encoder_blocks = downsample, upsample, encoder_blocks

    def enter(self, level: int) -> None:
        """To what block `level` is given, from what the one before has made."""
        if level >= self._encoder_blocks:
            self.now = torch.cat([each(self._upsample, self.now), self._skips.pop()], dim=2)
        elif level:
            self._skips.append(self.now)
            self.now = each(self._downsample, self.now)

    def average(self) -> None:
        """To the mean over images, which commutes with upsampling and concatenation only."""
        self.now = self.now.mean(dim=1, keepdim=True)
        self._skips = [skip.mean(dim=1, keepdim=True) for skip in self._skips]


class UniverSegNetwork(CrossNetwork):
    """UniverSeg (Butoi et al. 2023, arXiv 2304.06131)."""

    kind = "UniverSeg"
    arguments = ("target_image", "support_images", "support_labels")

    def forward(self, target_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        """[B, 1, H, W], [B, S, 1, H, W] and [B, S, 1, H, W] -> logits [B, 1, H, W]"""
        support = torch.cat([support_images, support_labels], dim=2)
        if self._must_stay(support) or target_image.ndim != 4:
            return self._original(target_image, support_images, support_labels)
        found: Tensor = self.model.out_conv(self._features(target_image[:, None], support)[:, 0])
        return found


class TycheNetwork(CrossNetwork):
    """Tyche (Rakic et al. 2024, arXiv 2401.13650): K targets, whose mean is paired with the supports."""

    kind = "Tyche"
    block_name = "CrossBlockTarget"
    arguments = ("support_images", "support_labels", "target_image", "noise_image")

    def forward(
        self, support_images: Tensor, support_labels: Tensor, target_image: Tensor, noise_image: Tensor
    ) -> Tensor:
        """[B, S, 1, H, W] twice, [B, K, 1, H, W] twice -> logits [B, K, 1, H, W]"""
        support = torch.cat([support_images, support_labels], dim=2)
        if self._must_stay(support):
            return self._original(support_images, support_labels, target_image, noise_image)
        target = torch.cat([target_image, noise_image], dim=2)
        return each(self.model.out_conv, self._features(target, support))

    @classmethod
    def _block_mismatch(cls, block: Any) -> str:
        conv = getattr(getattr(getattr(block, "meanconv", None), "vmapped", None), "conv", None)
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
            return "a block lacks meanconv.vmapped.conv"
        return super()._block_mismatch(block)

    def _bypassed(self) -> list[nn.Module]:
        convs = [part for b in self._blocks for part in (b.meanconv, b.meanconv.vmapped, b.meanconv.vmapped.conv)]
        return [*super()._bypassed(), *convs]

    def _query(self, target: Tensor) -> Tensor:
        return target.mean(dim=1, keepdim=True)

    def _new_target(self, block: Any, target: Tensor, mean: Tensor) -> Tensor:
        conv = block.meanconv.vmapped.conv
        new = cross_conv2d(target, mean, conv.weight, conv.bias, **geometry(conv)).squeeze(2)
        for name, module in block.meanconv.vmapped.named_children():
            if name != "conv":
                new = each(module, new)
        found: Tensor = block.target(new)
        return found


class MultiverSegNetwork(CrossNetwork):
    """MultiverSeg (Wong et al. 2024, arXiv 2412.15058)."""

    kind = "MultiverSeg"
    arguments = ("target_image", "support_images", "support_labels")

    def forward(
        self, target_image: Tensor, support_images: Tensor | None = None, support_labels: Tensor | None = None
    ) -> Tensor:
        """[B, C, H, W] or [B, 1, C, H, W], [B, S, 1, H, W] twice -> logits [B, 1, H, W]"""
        if support_images is None or support_labels is None:
            return self._original(target_image, support_images, support_labels)
        support = torch.cat([support_images, support_labels], dim=2)
        if self._must_stay(support):
            return self._original(target_image, support_images, support_labels)
        target = target_image[:, None] if target_image.ndim == 4 else target_image
        found: Tensor = self.model.out_conv(self._features(target, support)[:, 0])
        return found

    def _new_target(self, block: Any, target: Tensor, mean: Tensor) -> Tensor:
        if getattr(block, "cross_residual", False):
            mean = mean + block.target_cross_shortcut(target)
        new: Tensor = block.target(mean)
        return new + block.target_conv_shortcut(mean) if getattr(block, "conv_residual", False) else new

    def _new_support(self, block: Any, support: Tensor, pairs: Tensor) -> Tensor:
        if getattr(block, "cross_residual", False):
            pairs = pairs + block.support_cross_shortcut(support)
        new: Tensor = block.support(pairs)
        return new + block.support_conv_shortcut(pairs) if getattr(block, "conv_residual", False) else new


NETWORKS: dict[str, type[CrossNetwork]] = {
    "UniverSeg": UniverSegNetwork,
    "TysegXC": TycheNetwork,
    "MultiverSegNet": MultiverSegNetwork,
}


def _linear(cross: Any) -> bool:
    return cross.nonlinearity is None and getattr(cross, "norm", None) is None


def _nonlinear_part(cross: Any) -> str:
    part = cross.nonlin if cross.nonlinearity is not None else cross.norml
    return f"{type(part).__name__} of every pair"


def _activation(cross: Any) -> dict[str, Any] | None:
    """The arguments of `cross_conv2d` for the activation, if it knows it."""
    nonlin = cross.nonlin if cross.nonlinearity is not None else None
    if nonlin is None or hooked([nonlin]):
        return None
    if type(nonlin) is nn.LeakyReLU:
        return {"activation": "leaky_relu", "negative_slope": nonlin.negative_slope}
    if type(nonlin) is nn.ReLU:
        return {"activation": "relu"}
    if type(nonlin) is nn.GELU and nonlin.approximate == "none":
        return {"activation": "gelu"}
    return None
