"""U-Nets whose blocks let targets and supports exchange features: UniverSeg, Tyche and MultiverSeg.

A block convolves every pair [target; support_i], linearly, to z_i = conv_u(target) + conv_v(support_i). Without an
activation of z the new target depends on mean(z_i) = conv_u(target) + conv_v(mean(support_i)) alone. Nothing reads the
support features of the last block. In the first block z_i is a sum of one term of the target and one of the support.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from icseg_kernels.accelerate import convolutions
from icseg_kernels.accelerate.report import REWRITES, Change
from icseg_kernels.accelerate.rewrite import (
    Network,
    Rewritten,
    Switches,
    argument_names,
    convolve,
    differentiated,
    each,
    foreign,
    geometry,
    hooked,
    is_sequence,
    is_vmap,
    known,
    overridden,
    recorded,
    unsettled,
)
from icseg_kernels.cross_conv import cross_conv2d, cross_conv2d_and_mean, cross_conv2d_mean

_PARTS = ("enc_blocks", "dec_blocks", "downsample", "upsample", "out_conv")
_LINEAR_RESIZING = (nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d)


def rewrite(name: str, module: nn.Module, switches: Switches, changes: list[Change], replaced: list[Rewritten]) -> None:
    """Replace the forward pass of the module if it is one of these networks."""
    network = next((NETWORKS[kind] for kind in NETWORKS if known(module, (kind,))), None)
    if network is None:
        return
    kind = network.kind
    refusal = network.refusal(module)
    if refusal or not switches.split:
        reason = refusal or "needs the split"
        wanted = [switch for switch in REWRITES if switch != "split" and getattr(switches, switch)]
        changes.extend(Change(name, kind, switch, False, reason) for switch in wanted)
        return
    plan = network(module, switches)
    for switch in REWRITES:
        if switch != "split":
            reason = plan.reason(switch)
            changes.append(Change(name, kind, switch, not reason, reason or plan.remark(switch)))
    replaced.append(plan)


class CrossNetwork(Network):
    """The forward pass of one network."""

    kind = ""
    block_name = "CrossBlock"
    block_parts: tuple[str, ...] = ("cross", "target", "support")

    @classmethod
    def refusal(cls, model: Any) -> str:
        """Why the module is not rewritten, or ""."""
        found = super().refusal(model)
        if found:
            return found
        for block in (*model.enc_blocks, *model.dec_blocks):
            if argument_names(block) != ("target", "support") or argument_names(block.cross) != ("target", "support"):
                return "the forward of a block takes other arguments than target, support"
            if argument_names(block.cross.cross_conv) != ("x", "y"):
                return "the forward of a cross convolution takes other arguments than x, y"
        return ""

    @classmethod
    def mismatch(cls, model: Any) -> str:
        """Why the module has not the structure that is known, or ""."""
        for part in _PARTS:
            if not isinstance(getattr(model, part, None), nn.Module):
                return f"it lacks {part}"
        if not isinstance(model.enc_blocks, nn.ModuleList) or not isinstance(model.dec_blocks, nn.ModuleList):
            return "enc_blocks and dec_blocks are no ModuleLists"
        if len(model.enc_blocks) != len(getattr(model, "encoder_blocks", model.enc_blocks)):
            return "enc_blocks are not as many as encoder_blocks"
        if not len(model.enc_blocks) or len(model.dec_blocks) >= len(model.enc_blocks):
            return f"{len(model.dec_blocks)} decoder blocks are too many for {len(model.enc_blocks)} encoder blocks"
        for block in (*model.enc_blocks, *model.dec_blocks):
            found = cls._block_mismatch(block)
            if found:
                return found
        return foreign(model, _PARTS)

    @classmethod
    def _block_mismatch(cls, block: Any) -> str:
        if not known(block, (cls.block_name,)) or overridden(block):
            return f"a block is no {cls.block_name} with its own forward, but {type(block).__name__}"
        cross: Any = getattr(block, "cross", None)
        if not known(cross, ("CrossOp",)) or overridden(cross):
            return "a block lacks a CrossOp with its own forward"
        found = convolutions.mismatch(getattr(cross, "cross_conv", None))
        if found:
            return found
        if not hasattr(cross, "nonlinearity") or (cross.nonlinearity is not None and not hasattr(cross, "nonlin")):
            return "a block lacks cross.nonlinearity or cross.nonlin"
        if getattr(cross, "norm", None) is not None and not hasattr(cross, "norml"):
            return "a block lacks cross.norml"
        parts = [*cls.block_parts, *_shortcuts(block)]
        for part in parts:
            if part != "cross" and not is_vmap(getattr(block, part, None), "vmapped"):
                return f"{part} of a block is no Vmap"
        return foreign(block, parts) or foreign(cross, ("cross_conv", "nonlin", "norml"))

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
            if not _begins_with_convolution(first.support):
                return "the support path of the first block does not begin with a convolution of one group"
            if _shortcuts(first):
                return "shortcuts pass by the convolutions of the first block"
        return ""

    def remark(self, switch: str) -> str:
        """When a rewrite that is made waits, or ""."""
        kind = ""
        if switch in ("drop_dead_support", "commute_mean"):
            kind = unsettled(self._dead(), training=True)
        elif switch == "max_memory":
            kind = unsettled(self.module.modules(), training=True)
        return f"in evaluation mode, for {kind} on the support path" if kind else ""

    @property
    def _blocks(self) -> list[Any]:
        return [*self.module.enc_blocks, *self.module.dec_blocks]

    def bypassed(self) -> list[nn.Module]:
        """Modules that the network would call, and this does not, or on fewer images."""
        parts = [part for b in self._blocks for part in (b, b.cross, b.cross.cross_conv)]
        first = self._blocks[0].support
        return [*parts, *self._dead(), first, first.vmapped, *first.vmapped.children(), self.module.upsample]

    def _dead(self) -> list[nn.Module]:
        """Modules of the last block that make what nothing reads."""
        block = self._blocks[-1]
        names = ["support", *(name for name in _shortcuts(block) if name.startswith("support"))]
        return [part for name in names for part in getattr(block, name).modules()]

    def _serves(self, target: Tensor, support: Tensor) -> bool:
        """Whether it computes a call as the network would, which else does itself, or refuses to."""
        if target.ndim != 5 or support.ndim != 5 or target.dtype != support.dtype:
            return False
        if target.shape[0] != support.shape[0] or target.shape[3:] != support.shape[3:]:
            return False
        if target.shape[1] == 0 or support.shape[1] == 0 or not self.fits():
            return False
        conv = self._blocks[0].cross.cross_conv
        return getattr(conv, "in_channels_x", target.shape[2]) == target.shape[2]

    def _features(self, target: Tensor, support: Tensor) -> Tensor:
        """What the last block makes of the target: [B, T, C, H, W].

        target: [B, T, Ct, H, W]; support: [B, S, Cs, H, W], S >= 1.
        """
        chunk = self._chunk(support)
        if chunk < support.shape[1]:
            self.forget()
            return self._streamed(target, support, chunk)
        blocks = self._blocks
        dead = self.switches.drop_dead_support and not unsettled(self._dead())
        of_target, of_support = self._stream(target), self._stream(support)
        for level, block in enumerate(blocks):
            of_target.enter(level)
            wanted = level + 1 < len(blocks) or not dead
            if not wanted and self._averages(level):
                of_support.average()
            of_support.enter(level)
            if level == 0 and self._caches(target, support):
                of_target.now, of_support.now = self._first_block(block, target, support)
            else:
                of_target.now, of_support.now = self._step(block, of_target.now, of_support.now, wanted)
        return of_target.now

    def _stream(self, features: Tensor) -> _Stream:
        return _Stream(features, self.module.downsample, self.module.upsample, len(self.module.enc_blocks))

    def _averages(self, level: int) -> bool:
        """Whether a block whose support features nothing reads may be given the mean of what it would upsample."""
        model = self.module
        linear = type(model.upsample) in _LINEAR_RESIZING and not overridden(model.upsample)
        upsampled = level >= len(model.enc_blocks) and linear
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
        if getattr(block, "cross_residual", False):
            mean = mean + block.target_cross_shortcut(target)
        new: Tensor = block.target(mean)
        return new + block.target_conv_shortcut(mean) if getattr(block, "conv_residual", False) else new

    def _new_support(self, block: Any, support: Tensor, pairs: Tensor) -> Tensor:
        if getattr(block, "cross_residual", False):
            pairs = pairs + block.support_cross_shortcut(support)
        new: Tensor = block.support(pairs)
        return new + block.support_conv_shortcut(pairs) if getattr(block, "conv_residual", False) else new

    def _pairs_and_mean(self, cross: Any, query: Tensor, support: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
        """Pairs [B, S, C, H, W], None unless wanted, and their mean [B, 1, C, H, W]."""
        conv = cross.cross_conv
        tensors = (query, support, conv.weight, conv.bias)
        moves = geometry(conv)
        if _linear(cross) and not wanted and self.switches.commute_mean:
            return None, cross_conv2d_mean(*tensors, **moves)
        activation = _activation(cross)
        fused = _linear(cross) or (activation is not None and getattr(cross, "norm", None) is None)
        if fused and not differentiated(tensors):  # the fused ops can be differentiated only once
            moves |= activation or {}
            if not wanted and activation:
                return None, cross_conv2d_mean(*tensors, **moves)
            if not wanted:
                return None, cross_conv2d(*tensors, **moves).mean(dim=2)
            pairs, mean = cross_conv2d_and_mean(*tensors, **moves)
            return pairs.squeeze(1), mean
        pairs = cross_conv2d(*tensors, **moves).squeeze(1)
        if cross.nonlinearity is not None:
            pairs = each(cross.nonlin, pairs)
        if getattr(cross, "norm", None) is not None:
            pairs = each(cross.norml, pairs)
        return pairs if wanted else None, pairs.mean(dim=1, keepdim=True)

    # The first block of a support set that has been seen before.

    def _caches(self, target: Tensor, support: Tensor) -> bool:
        if recorded(support) or self.reason("cache_support"):
            return False
        block = self._blocks[0]
        if differentiated((target, support, *block.cross.parameters(), *block.support.parameters())):
            return False
        room = self._room(support, support.shape[2] + block.support.vmapped.conv.out_channels)
        if room < support.shape[1]:
            self.forget()
        return room >= support.shape[1]

    def _first_block(self, block: Any, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """Target and support features after the first block."""
        conv, (after, *others) = block.cross.cross_conv, block.support.vmapped
        of_target, of_support = conv.weight.split([target.shape[2], support.shape[2]], dim=1)
        sources = [support, of_support, conv.bias, after.weight, after.bias]

        def make() -> tuple[Tensor, Tensor]:
            pairs = convolve(support, conv, of_support, conv.bias)
            return pairs.mean(dim=1, keepdim=True), convolve(pairs, after, after.weight, after.bias)

        way = *geometry(conv).values(), *geometry(after).values()
        mean, new = self._memory.recall(sources, make, *way)
        pair = convolve(self._query(target), conv, of_target, None)
        new_target = self._new_target(block, target, pair + mean)
        new = new + convolve(pair, after, after.weight, None)
        for module in others:
            new = each(module, new)
        return new_target, new

    # Support sets in chunks: a block needs no more of the set than a mean.

    def _maps(self) -> float:
        pool, stages = self.module.downsample, len(self.module.enc_blocks)
        halves = type(pool) is nn.MaxPool2d and pool.stride in (2, (2, 2))
        most = 0.0
        for level, block in enumerate(self._blocks):
            depth = level if level < stages else max(0, 2 * (stages - 1) - level)
            most = max(most, _maps(block) * (4.0**-depth if halves else 1.0))
        return most

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
        target = target_image[:, None]
        if self._serves(target, support):
            found: Tensor = self.module.out_conv(self._features(target, support)[:, 0])
        else:
            found = self.original(target_image, support_images, support_labels)
        return found


class TycheNetwork(CrossNetwork):
    """Tyche (Rakic et al. 2024, arXiv 2401.13650): K targets, whose mean is paired with the supports."""

    kind = "Tyche"
    block_name = "CrossBlockTarget"
    block_parts = ("cross", "meanconv", "target", "support")
    arguments = ("support_images", "support_labels", "target_image", "noise_image")

    def forward(
        self, support_images: Tensor, support_labels: Tensor, target_image: Tensor, noise_image: Tensor
    ) -> Tensor:
        """[B, S, 1, H, W] twice, [B, K, 1, H, W] twice -> logits [B, K, 1, H, W]"""
        support = torch.cat([support_images, support_labels], dim=2)
        target = torch.cat([target_image, noise_image], dim=2)
        if not self._serves(target, support):
            found: Tensor = self.original(support_images, support_labels, target_image, noise_image)
            return found
        return each(self.module.out_conv, self._features(target, support))

    @classmethod
    def _block_mismatch(cls, block: Any) -> str:
        found = super()._block_mismatch(block)
        if not found and not _begins_with_convolution(block.meanconv):
            return "meanconv of a block does not begin with a convolution of one group"
        return found

    def bypassed(self) -> list[nn.Module]:
        convs = [part for b in self._blocks for part in (b.meanconv, b.meanconv.vmapped, b.meanconv.vmapped.conv)]
        return [*super().bypassed(), *convs]

    def _query(self, target: Tensor) -> Tensor:
        return target.mean(dim=1, keepdim=True)

    def _new_target(self, block: Any, target: Tensor, mean: Tensor) -> Tensor:
        conv, *others = block.meanconv.vmapped
        new = cross_conv2d(target, mean, conv.weight, conv.bias, **geometry(conv)).squeeze(2)
        for module in others:
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
        if support_images is None or support_labels is None or support_images.shape[1] == 0:
            return self._published(target_image, support_images, support_labels)
        support = torch.cat([support_images, support_labels], dim=2)
        target = target_image[:, None] if target_image.ndim == 4 else target_image
        if target.shape[1] != 1 or not self._serves(target, support):
            return self._published(target_image, support_images, support_labels)
        found: Tensor = self.module.out_conv(self._features(target, support)[:, 0])
        return found

    def _published(self, *given: Tensor | None) -> Tensor:
        found: Tensor = self.original(*given)
        return found


NETWORKS: dict[str, type[CrossNetwork]] = {
    "UniverSeg": UniverSegNetwork,
    "TysegXC": TycheNetwork,
    "MultiverSegNet": MultiverSegNetwork,
}


def _linear(cross: Any) -> bool:
    return cross.nonlinearity is None and getattr(cross, "norm", None) is None


def _shortcuts(block: Any) -> list[str]:
    """Names of its shortcuts."""
    kinds = [kind for kind in ("cross", "conv") if getattr(block, f"{kind}_residual", False)]
    return [f"{side}_{kind}_shortcut" for kind in kinds for side in ("target", "support")]


def _begins_with_convolution(vmap: Any) -> bool:
    """Whether every image passes a sequence that begins with a plain convolution, called conv."""
    if not is_sequence(vmap.vmapped):
        return False
    begin = next(iter(vmap.vmapped), None)
    plain = type(begin) is nn.Conv2d and begin.groups == 1 and not overridden(begin)
    return plain and begin is getattr(vmap.vmapped, "conv", None)


def _maps(block: Any) -> int:
    """Channels of the widest features of a support image in the block; its input may have twice as many."""
    convs = [part for part in block.support.modules() if isinstance(part, nn.Conv2d)]
    inputs = -(-block.cross.cross_conv.in_channels // 4)  # half of them are of the target
    return max(inputs, *(conv.out_channels for conv in (block.cross.cross_conv, *convs)))


def _nonlinear_part(cross: Any) -> str:
    part = cross.nonlin if cross.nonlinearity is not None else cross.norml
    return f"{type(part).__name__} of every pair"


def _activation(cross: Any) -> dict[str, Any] | None:
    """The arguments of `cross_conv2d` for the activation, if it knows it."""
    nonlin = cross.nonlin if cross.nonlinearity is not None else None
    if nonlin is None or overridden(nonlin) or hooked([nonlin]):
        return None
    if type(nonlin) is nn.LeakyReLU:
        return {"activation": "leaky_relu", "negative_slope": nonlin.negative_slope}
    if type(nonlin) is nn.ReLU:
        return {"activation": "relu"}
    if type(nonlin) is nn.GELU and nonlin.approximate == "none":
        return {"activation": "gelu"}
    return None
