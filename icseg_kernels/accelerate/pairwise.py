"""Networks that mix every (context, target) pair by 1 x 1 convolutions: Neuralizer and Neuroverse3D.

The mixer of [context_i; target] is a sum of one convolution of each. Neuralizer averages it for the target, so that its
context half sees the mean; nothing reads the contexts of the last block, nor does the target reach those of the first
before its mixer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg_kernels.accelerate.report import Change
from icseg_kernels.accelerate.rewrite import (
    Network,
    Rewritten,
    Switches,
    differentiated,
    foreign,
    is_vmap,
    known,
    overridden,
    recorded,
    unsettled,
)

_LINEAR = {nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_LISTS = ("enc_blocks", "downsample_blocks", "dec_blocks", "upsample_blocks")
_DOWN, _UP = ("UnetDownsampleAndCreateShortcutBlock",), ("UnetUpsampleAndConcatShortcutBlock",)


def rewrite(name: str, module: nn.Module, switches: Switches, changes: list[Change], replaced: list[Rewritten]) -> None:
    """Replace the forward of the module if it is one of these networks or of their blocks."""
    for names, block in BLOCKS.items():
        if known(module, (names,)):
            reason = block.refusal(module) if switches.split else "switched off"
            changes.append(Change(name, block.kind, "split", not reason, reason))
            if block is PairwiseBlock:
                mean = reason or ("" if switches.commute_mean else "switched off")
                changes.append(Change(name, block.kind, "commute_mean", not mean, mean))
            if not reason:
                replaced.append(block(module, switches))
    for names, network in NETWORKS.items():
        if known(module, (names,)):
            refusal = network.refusal(module) if switches.split else "needs the split"
            for wanted, never in network.rewrites.items():
                off = "no limit given" if wanted == "max_memory" else "switched off"
                reason = never or refusal or ("" if getattr(switches, wanted) else off)
                changes.append(Change(name, network.kind, wanted, not reason, reason))
            if any(change.done for change in changes[-len(network.rewrites) :]):
                replaced.append(network(module, switches))


class ContextBlock(Rewritten):
    """The forward of a block of Neuroverse3D's that mixes the target into contexts."""

    kind = "Neuroverse3D"
    arguments: tuple[str, ...] = ("context", "target", "verbose")
    mixers: tuple[str, ...] = ("combine_conv_context",)
    parts: tuple[str, ...] = ("context_conv",)

    @classmethod
    def mismatch(cls, module: Any) -> str:
        """Why the module has not the structure that is known, or ""."""
        for mixer in cls.mixers:
            conv: Any = getattr(getattr(module, mixer, None), "module", None)
            if type(conv) not in _LINEAR or set(conv.kernel_size) != {1} or conv.groups != 1:
                return f"{mixer} is no 1 x 1 convolution"
            if not is_vmap(getattr(module, mixer), "module") or overridden(conv):
                return f"{mixer} is no Vmap of a convolution with their own forwards"
            if conv.in_channels != 2 * conv.out_channels or set(conv.stride) != {1}:
                return f"{mixer} does not halve its channels at stride 1"
            if conv.padding not in ("same", "valid") and set(conv.padding) != {0}:
                return f"{mixer} pads"
        for part in cls.parts:
            if not isinstance(getattr(module, part, None), nn.Module):
                return f"it lacks {part}"
        if not is_vmap(module.context_conv, "module"):
            return "context_conv is no Vmap"
        return foreign(module, (*cls.mixers, *cls.parts))

    def bypassed(self) -> list[nn.Module]:
        """The mixers."""
        return mixers_of(self.module, self.mixers)

    def forward(self, context: Tensor, target: Tensor, verbose: bool = False) -> Tensor:
        """context: [B, L, C, ...], and back; target: [B, C, ...]."""
        if verbose or not self.fits():
            found: Tensor = self.original(context, target, verbose)
            return found
        context = self.module.context_conv(context)
        return F.gelu(context + mixed(self.module.combine_conv_context, context, target))


class PairwiseBlock(ContextBlock):
    """The forward of a block of Neuralizer's."""

    kind = "Neuralizer"
    arguments = ("context", "target")
    mixers = ("combine_conv_target", "combine_conv_context")
    parts = ("context_conv", "target_conv")

    def forward(self, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """context: [B, L, C, ...], target: [B, C, ...], and back."""
        if not self.fits():
            found: tuple[Tensor, Tensor] = self.original(context, target)
            return found
        context, target = self.module.context_conv(context), self.module.target_conv(target)
        update = target_update(self.module, context, target, self.switches.commute_mean)
        return F.gelu(context + mixed(self.module.combine_conv_context, context, target)), F.gelu(target + update)


BLOCKS: dict[str, type[ContextBlock]] = {
    "PairwiseConvAvgModelBlock": PairwiseBlock,
    "ConvBlock_context_t2c": ContextBlock,
}


class ContextNetwork(Network):
    """What the networks share: context features that the first mixer is given, kept for the next target."""

    kind = ""
    rewrites: ClassVar[dict[str, str]]  # those it is asked about, and why one is never made, or ""

    def _keeps(self, contexts: Tensor, embedding: Any, conv: Any) -> bool:
        """Whether `_recall` may keep what it makes."""
        if not self.switches.cache_support or recorded(contexts):
            return False
        parts = [*embedding.modules(), *conv.modules()]
        return not differentiated((contexts, *embedding.parameters(), *conv.parameters())) and not unsettled(parts)

    def _recall(self, contexts: Tensor, embedding: Any, conv: Any) -> Tensor:
        """What `conv` makes of the embedded contexts, from the last call if they are the same."""
        values = [v for part in (embedding, conv) for v in (*part.parameters(), *part.buffers())]
        way = *embedding.modules(), *conv.modules(), repr(embedding), repr(conv)  # which names their settings
        return self._memory.recall([contexts, *values], lambda: (conv(embedding(contexts)),), *way)[0]


class PairwiseNetwork(ContextNetwork):
    """The forward of Neuralizer's network."""

    kind = "Neuralizer"
    arguments = ("context_in", "context_out", "target_in")
    rewrites: ClassVar[dict[str, str]] = dict.fromkeys(("drop_dead_support", "cache_support", "max_memory"), "")

    @classmethod
    def mismatch(cls, model: Any) -> str:
        """Why the module has not the structure that is known, or ""."""
        lists = [getattr(model, part, None) for part in _LISTS]
        if not all(isinstance(part, nn.ModuleList) for part in lists):
            return f"it lacks {', '.join(_LISTS)}"
        stages = len(model.enc_blocks)
        if stages == 0 or [len(part or ()) for part in lists[1:]] != [stages - 1] * 3:
            return "its lists of blocks have other lengths"
        if getattr(model, "stages", stages) != stages:
            return "enc_blocks are not as many as stages"
        if not getattr(model, "context_filled", False):
            return "contexts come without masks"
        for part in ("context_embedding", "target_embedding", "output_block"):
            if not isinstance(getattr(model, part, None), nn.Module):
                return f"it lacks {part}"
        if not is_vmap(model.context_embedding, "module"):
            return "context_embedding is no Vmap"
        if not {type(model.target_embedding), type(model.context_embedding.module)} <= set(_LINEAR):
            return "an embedding is no convolution"
        for block in (*model.enc_blocks, *model.dec_blocks):
            if not known(block, ("PairwiseConvAvgModelBlock",)) or overridden(block):
                return f"a block is no PairwiseConvAvgModelBlock with its own forward, but {type(block).__name__}"
            found = PairwiseBlock.mismatch(block)
            if found:
                return found
        for names, blocks in ((_DOWN, model.downsample_blocks), (_UP, model.upsample_blocks)):
            if any(not known(block, names) or overridden(block) for block in blocks):
                return f"a block is no {names[0]} with its own forward"
        return foreign(model, (*_LISTS, "context_embedding", "target_embedding", "output_block"))

    def forward(self, context_in: Tensor, context_out: Tensor, target_in: Tensor) -> Tensor:
        """[B, L, Ci, ...], [B, L, Co, ...] and [B, Ci, ...] -> [B, Co, ...]"""
        if context_in.shape[1] == 0 or not self.fits():
            found: Tensor = self.original(context_in, context_out, target_in)
            return found
        contexts = torch.cat([context_in, context_out], dim=2)
        target = self.module.target_embedding(target_in)
        chunk = self._chunk(contexts)
        whole = chunk >= contexts.shape[1]
        if not whole:
            self.forget()
        inners: list[Tensor] = []  # what the mixers of every block have been given of the target
        outer: list[Tensor] = []  # what every block has made of it
        skips: list[tuple[Tensor, Tensor]] = []
        context = contexts[:, :0]  # streamed contexts do not live on
        for level, block in enumerate(self._blocks):
            if level:
                context, target = self._between(level, context if whole else target[:, None], target, skips)
            if whole:
                context = block.context_conv(context) if level else self._first(contexts)
            inners.append(block.target_conv(target))
            if whole:
                update = target_update(block, context, inners[-1], self.switches.commute_mean)
                if level + 1 < len(self._blocks) or not self.switches.drop_dead_support:
                    context = F.gelu(context + mixed(block.combine_conv_context, context, inners[-1]))
            else:
                mean = self._mean(contexts, chunk, inners, outer)
                update = target_update(block, mean, inners[-1], True)
            target = F.gelu(inners[-1] + update)
            outer.append(target)
        out: Tensor = self.module.output_block(target)
        return out

    @property
    def _blocks(self) -> list[Any]:
        return [*self.module.enc_blocks, *self.module.dec_blocks]

    def bypassed(self) -> list[nn.Module]:
        blocks = self._blocks
        first = [*self.module.context_embedding.modules(), *blocks[0].context_conv.modules()]
        return [*blocks, *first, *(m for b in blocks for m in mixers_of(b, PairwiseBlock.mixers))]

    def _between(
        self, level: int, context: Tensor, target: Tensor, skips: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What block `level` is given, from what the one before has made."""
        encoder = len(self.module.enc_blocks)
        if level < encoder:
            context, target, skip = self.module.downsample_blocks[level - 1](context, target)
            skips.append(skip)
        else:
            context, target = self.module.upsample_blocks[level - encoder](context, target, skips.pop())
        return context, target

    def _first(self, contexts: Tensor) -> Tensor:
        """Context features that the first mixer is given."""
        embedding, conv = self.module.context_embedding, self._blocks[0].context_conv
        if self._keeps(contexts, embedding, conv):
            if self._room(contexts, contexts.shape[2] + self._channels) >= contexts.shape[1]:
                return self._recall(contexts, embedding, conv)
            self.forget()
        made: Tensor = conv(embedding(contexts))
        return made

    # Contexts in chunks: a block needs no more of them than a mean.

    @property
    def _channels(self) -> int:
        return max(block.combine_conv_context.module.out_channels for block in self._blocks)

    def _maps(self) -> float:
        return self._channels

    def _mean(self, contexts: Tensor, chunk: int, inners: list[Tensor], outer: list[Tensor]) -> Tensor:
        """The mean of the context features that the mixers of the last of these blocks are given, [B, 1, C, ...]."""
        total = None
        for part in contexts.split(chunk, dim=1):
            skips: list[tuple[Tensor, Tensor]] = []
            context = self.module.context_embedding(part)
            for level, (block, inner) in enumerate(zip(self._blocks, inners, strict=False)):
                if level:
                    context, _ = self._between(level, context, outer[level - 1], skips)
                context = block.context_conv(context)
                if level + 1 < len(inners):
                    context = F.gelu(context + mixed(block.combine_conv_context, context, inner))
            share = context.mean(dim=1, keepdim=True) * (part.shape[1] / contexts.shape[1])
            total = share if total is None else total + share
        assert total is not None
        return total


class NeuroverseNetwork(ContextNetwork):
    """The forward of Neuroverse3D's network, for contexts of one mini-context: the features of its first block kept."""

    kind = "Neuroverse3D"
    arguments = ("target_in", "context_in", "context_out", "l")
    rewrites: ClassVar[dict[str, str]] = {
        "commute_mean": "the model averages contexts before it mixes them with the target",
        "drop_dead_support": "the target reads the contexts of every block",
        "cache_support": "",
        "max_memory": "the model streams contexts itself, by its argument l",
    }

    @classmethod
    def mismatch(cls, model: Any) -> str:
        """Why the module has not the structure that is known, or ""."""
        parts = {"target_encoder": "TargetEncoder", "context_unet": "ContextUNet", "target_decoder": "TargetDecoder"}
        for name, kind in parts.items():
            if not known(getattr(model, name, None), (kind,)) or overridden(getattr(model, name)):
                return f"{name} is no {kind} with its own forward"
        unet = model.context_unet
        lists = [getattr(unet, part, None) for part in _LISTS]
        if not all(isinstance(part, nn.ModuleList) for part in lists):
            return f"context_unet lacks {', '.join(_LISTS)}"
        stages = len(unet.enc_blocks)
        if stages < 2 or [len(part or ()) for part in lists[1:]] != [stages - 1] * 3:
            return "the lists of blocks of context_unet have other lengths"
        if {getattr(model, "stages", stages), getattr(unet, "stages", stages)} != {stages}:
            return "enc_blocks of context_unet are not as many as stages"
        if not getattr(unet, "context_filled", False) or not is_vmap(unet.context_embedding, "module"):
            return "context_embedding is no Vmap"
        first = unet.enc_blocks[0]
        if not known(first, ("ConvBlock_context_t2c",)) or overridden(first):
            return f"the first block is no ConvBlock_context_t2c with its own forward, but {type(first).__name__}"
        found = ContextBlock.mismatch(first)
        return found or foreign(model, parts) or foreign(unet, (*_LISTS, "context_embedding"))

    def forward(self, target_in: Tensor, context_in: Tensor, context_out: Tensor, l: int = 3) -> Tensor:  # noqa: E741
        """[B, Ci, ...], [B, L, Ci, ...] and [B, L, Co, ...] -> [B, Co, ...]; l: contexts of a mini-context."""
        alone = isinstance(l, int) and 0 < context_in.shape[1] <= l and context_in.shape[1] == context_out.shape[1]
        if alone and self.switches.cache_support and self.fits():
            place, unet = next(self.module.parameters()).device, self.module.context_unet
            contexts = torch.cat([context_in.to(place), context_out.to(place)], dim=2)
            if self._keeps(contexts, unet.context_embedding, unet.enc_blocks[0].context_conv):
                return self._segmented(target_in, contexts)
        found: Tensor = self.original(target_in, context_in, context_out, l)
        return found

    def _segmented(self, target_in: Tensor, contexts: Tensor) -> Tensor:
        """The output for these contexts [B, L, Ci + Co, ...]."""
        model, unet = self.module, self.module.context_unet
        first, *blocks = unet.enc_blocks
        shortcuts, target = model.target_encoder(target_in)
        context = self._recall(contexts, unet.context_embedding, first.context_conv)
        context = F.gelu(context + mixed(first.combine_conv_context, context, shortcuts[0][1]))
        skips = []
        for level, (downsample, block) in enumerate(zip(unet.downsample_blocks, blocks, strict=True), 1):
            context, _, skip = downsample(context, None)
            skips.append(skip)
            context = block(context, shortcuts[level][1]) if level < len(blocks) else block(context)
        means = [context.mean(dim=1, keepdim=True)]
        for upsample, block in zip(unet.upsample_blocks, unet.dec_blocks, strict=True):
            context, _ = upsample(context, None, skips.pop())
            context = block(context)
            means.append(context.mean(dim=1, keepdim=True))
        out: Tensor = model.target_decoder(target, means, shortcuts)
        return out

    def bypassed(self) -> list[nn.Module]:
        unet = self.module.context_unet
        return [unet, *unet.context_embedding.modules(), *unet.enc_blocks[0].modules()]


NETWORKS: dict[str, type[ContextNetwork]] = {
    "PairwiseConvAvgModel": PairwiseNetwork,
    "Neuroverse3D": NeuroverseNetwork,
}


def mixers_of(block: Any, names: tuple[str, ...]) -> list[nn.Module]:
    """Modules that a rewritten block does not call."""
    return [module for name in names for module in getattr(block, name).modules()]


def target_update(block: Any, context: Tensor, target: Tensor, commute_mean: bool) -> Tensor:
    """The mean over contexts of what the block's mixer makes for the target, [B, C, ...]."""
    pooled = context.mean(dim=1, keepdim=True) if commute_mean else context
    return mixed(block.combine_conv_target, pooled, target).mean(dim=1)


def mixed(mixer: Any, context: Tensor, target: Tensor) -> Tensor:
    """The convolution of every [context; target], [B, L, C, ...]."""
    conv = mixer.module
    linear = _LINEAR[type(conv)]
    of_context, of_target = conv.weight.split([context.shape[2], target.shape[1]], dim=1)
    parts = linear(context.flatten(0, 1), of_context).unflatten(0, context.shape[:2])
    return parts + linear(target, of_target, conv.bias).unsqueeze(1).expand_as(parts)  # refuses as the model does
