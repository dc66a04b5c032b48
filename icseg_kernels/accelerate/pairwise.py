"""Networks that mix every (context, target) pair by 1 x 1 convolutions: Neuralizer and Neuroverse3D.

The mixer of [context_i; target] is a sum of one convolution of each. Neuralizer averages it for the target, so that its
context half sees the mean; nothing reads the contexts of the last block, nor does the target reach those of the first
before its mixer.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg_kernels.accelerate.report import REWRITES, Change
from icseg_kernels.accelerate.rewrite import Memory, Switches, differentiated, hooked, overridden, recorded

_LINEAR = {nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_ALIVE = 8  # feature maps of the widest block that one context has at once, with its skips, at most


def rewrite(
    name: str, module: nn.Module, switches: Switches, changes: list[Change], replaced: list[tuple[nn.Module, Any]]
) -> None:
    """Replace the forward of the module if it is one of these networks or of their blocks."""
    block = BLOCKS.get(type(module).__name__)
    if block is not None:
        reason = block.mismatch(module) if switches.split else "switched off"
        changes.append(Change(name, block.kind, "split", not reason, reason))
        if block is PairwiseBlock:
            mean = reason or ("" if switches.commute_mean else "switched off")
            changes.append(Change(name, block.kind, "commute_mean", not mean, mean))
        if not reason:
            replaced.append((module, block(module, switches).forward))
    elif type(module).__name__ == "PairwiseConvAvgModel":
        reason = PairwiseNetwork.mismatch(module) if switches.split else "needs the split"
        done = False
        for wanted in ("drop_dead_support", "cache_support", "max_memory"):
            off = "no limit given" if wanted == "max_memory" else "switched off"
            why = reason or ("" if getattr(switches, wanted) else off)
            changes.append(Change(name, "Neuralizer", wanted, not why, why))
            done = done or not why
        if done:
            replaced.append((module, PairwiseNetwork(module, switches).forward))
    elif type(module).__name__ == "Neuroverse3D":
        for wanted, why in _NEUROVERSE.items():
            assert wanted in REWRITES
            changes.append(Change(name, "Neuroverse3D", wanted, False, why))


_NEUROVERSE = {
    "commute_mean": "the model averages contexts before it mixes them with the target",
    "drop_dead_support": "the target reads the contexts of every block",
    "cache_support": "contexts come in mini-contexts, in random order",
    "max_memory": "the model streams contexts itself, by its argument l",
}


class ContextBlock:
    """The forward of a block of Neuroverse3D's that mixes the target into contexts."""

    kind = "Neuroverse3D"
    arguments: tuple[str, ...] = ("context", "target", "verbose")
    mixers: tuple[str, ...] = ("combine_conv_context",)
    parts: tuple[str, ...] = ("context_conv",)

    def __init__(self, block: Any, switches: Switches) -> None:
        self.block, self.switches = block, switches

    @classmethod
    def mismatch(cls, module: nn.Module) -> str:
        """Why the module is not the block that is known, or ""."""
        if overridden(module):
            return "its forward has been replaced already"
        if tuple(inspect.signature(type(module).forward).parameters)[1:] != cls.arguments:
            return f"forward takes other arguments than {', '.join(cls.arguments)}"
        for mixer in cls.mixers:
            conv: Any = getattr(getattr(module, mixer, None), "module", None)
            if type(conv) not in _LINEAR or set(conv.kernel_size) != {1} or conv.groups != 1:
                return f"{mixer} is no 1 x 1 convolution"
            if conv.in_channels != 2 * conv.out_channels or set(conv.stride) != {1}:
                return f"{mixer} does not halve its channels at stride 1"
            if conv.padding not in ("same", "valid") and set(conv.padding) != {0}:
                return f"{mixer} pads"
        for part in cls.parts:
            if not isinstance(getattr(module, part, None), nn.Module):
                return f"it lacks {part}"
        return ""

    def forward(self, context: Tensor, target: Tensor, verbose: bool = False) -> Tensor:
        """context: [B, L, C, ...], and back; target: [B, C, ...]."""
        if verbose or hooked(mixers_of(self.block, self.mixers)):
            found: Tensor = type(self.block).forward(self.block, context, target, verbose)
            return found
        context = self.block.context_conv(context)
        return F.gelu(context + _mixed(self.block.combine_conv_context, context, target))

    def forget(self) -> None:
        """Nothing is kept."""


class PairwiseBlock(ContextBlock):
    """The forward of a block of Neuralizer's."""

    kind = "Neuralizer"
    arguments = ("context", "target")
    mixers = ("combine_conv_target", "combine_conv_context")
    parts = ("context_conv", "target_conv")

    def forward(self, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """context: [B, L, C, ...], target: [B, C, ...], and back."""
        if hooked(mixers_of(self.block, self.mixers)):
            found: tuple[Tensor, Tensor] = type(self.block).forward(self.block, context, target)
            return found
        context, target = self.block.context_conv(context), self.block.target_conv(target)
        update = target_update(self.block, context, target, self.switches.commute_mean)
        return F.gelu(context + _mixed(self.block.combine_conv_context, context, target)), F.gelu(target + update)


BLOCKS: dict[str, type[ContextBlock]] = {
    "PairwiseConvAvgModelBlock": PairwiseBlock,
    "ConvBlock_context_t2c": ContextBlock,
}


class PairwiseNetwork:
    """The forward of Neuralizer's network."""

    arguments = ("context_in", "context_out", "target_in")

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
        lists = [getattr(model, f"{part}_blocks", None) for part in ("enc", "downsample", "dec", "upsample")]
        if not all(isinstance(part, nn.ModuleList) for part in lists):
            return "it lacks enc_blocks, downsample_blocks, dec_blocks or upsample_blocks"
        stages = len(lists[0] or ())
        if stages == 0 or [len(part or ()) for part in lists[1:]] != [stages - 1] * 3:
            return "its lists of blocks have other lengths"
        if not getattr(model, "context_filled", False):
            return "contexts come without masks"
        for part in ("context_embedding", "target_embedding", "output_block"):
            if not isinstance(getattr(model, part, None), nn.Module):
                return f"it lacks {part}"
        for block in (*model.enc_blocks, *model.dec_blocks):
            if type(block).__name__ != "PairwiseConvAvgModelBlock":
                return f"a block is no PairwiseConvAvgModelBlock, but {type(block).__name__}"
            found = PairwiseBlock.mismatch(block)
            if found:
                return found
        return ""

    def forward(self, context_in: Tensor, context_out: Tensor, target_in: Tensor) -> Tensor:
        """[B, L, Ci, ...], [B, L, Co, ...] and [B, Ci, ...] -> [B, Co, ...]"""
        if context_in.shape[1] == 0 or hooked(self._bypassed()):
            found: Tensor = type(self.model).forward(self.model, context_in, context_out, target_in)
            return found
        contexts = torch.cat([context_in, context_out], dim=2)
        target = self.model.target_embedding(target_in)
        chunk = self._chunk(contexts)
        inners: list[Tensor] = []  # what the mixers of every block have been given of the target
        outer: list[Tensor] = []  # what every block has made of it
        skips: list[tuple[Tensor, Tensor]] = []
        context = contexts[:, :0]  # streamed contexts do not live on
        for level, block in enumerate(self._blocks):
            whole = chunk >= contexts.shape[1]
            if level:
                context, target = self._between(level, context if whole else target[:, None], target, skips)
            inners.append(block.target_conv(target))
            if whole:
                context = self._first(contexts) if level == 0 else block.context_conv(context)
                update = target_update(block, context, inners[-1], self.switches.commute_mean)
                if level + 1 < len(self._blocks) or not self.switches.drop_dead_support:
                    context = F.gelu(context + _mixed(block.combine_conv_context, context, inners[-1]))
            else:
                mean = self._mean(contexts, chunk, inners, outer)
                update = target_update(block, mean, inners[-1], True)
            target = F.gelu(inners[-1] + update)
            outer.append(target)
        out: Tensor = self.model.output_block(target)
        return out

    def forget(self) -> None:
        """Free what is kept of contexts."""
        self._memory.forget()

    @property
    def _blocks(self) -> list[Any]:
        return [*self.model.enc_blocks, *self.model.dec_blocks]

    def _bypassed(self) -> list[nn.Module]:
        blocks = self._blocks
        first = [*self.model.context_embedding.modules(), *blocks[0].context_conv.modules()]
        return [*blocks, *first, *(m for b in blocks for m in mixers_of(b, PairwiseBlock.mixers))]

    def _between(
        self, level: int, context: Tensor, target: Tensor, skips: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What block `level` is given, from what the one before has made."""
        encoder = len(self.model.enc_blocks)
        if level < encoder:
            context, target, skip = self.model.downsample_blocks[level - 1](context, target)
            skips.append(skip)
        else:
            context, target = self.model.upsample_blocks[level - encoder](context, target, skips.pop())
        return context, target

    def _first(self, contexts: Tensor) -> Tensor:
        """Context features that the first mixer is given."""
        embedding, conv = self.model.context_embedding, self._blocks[0].context_conv
        weights = [*embedding.parameters(), *conv.parameters()]
        if not self.switches.cache_support or recorded(contexts) or differentiated((contexts, *weights)):
            made: Tensor = conv(embedding(contexts))
            return made
        return self._memory.recall([contexts, *weights], lambda: (conv(embedding(contexts)),))[0]

    def _chunk(self, contexts: Tensor) -> int:
        """Contexts to hold features of at once."""
        limit, images = self.switches.max_memory, contexts.shape[1]
        if limit is None or recorded(contexts) or differentiated((contexts, *self.model.parameters())):
            return images
        channels = max(b.combine_conv_context.module.out_channels for b in self._blocks)
        pixels = contexts.shape[0] * math.prod(contexts.shape[3:])
        return min(images, max(1, limit // (_ALIVE * channels * pixels * contexts.element_size())))

    def _mean(self, contexts: Tensor, chunk: int, inners: list[Tensor], outer: list[Tensor]) -> Tensor:
        """The mean of the context features that the mixers of the last of these blocks are given, [B, 1, C, ...]."""
        total = None
        for part in contexts.split(chunk, dim=1):
            skips: list[tuple[Tensor, Tensor]] = []
            context = self.model.context_embedding(part)
            for level, (block, inner) in enumerate(zip(self._blocks, inners, strict=False)):
                if level:
                    context, _ = self._between(level, context, outer[level - 1], skips)
                context = block.context_conv(context)
                if level + 1 < len(inners):
                    context = F.gelu(context + _mixed(block.combine_conv_context, context, inner))
            share = context.mean(dim=1, keepdim=True) * (part.shape[1] / contexts.shape[1])
            total = share if total is None else total + share
        assert total is not None
        return total


def mixers_of(block: Any, names: tuple[str, ...]) -> list[nn.Module]:
    """Modules that a rewritten block does not call."""
    return [module for name in names for module in getattr(block, name).modules()]


def target_update(block: Any, context: Tensor, target: Tensor, commute_mean: bool) -> Tensor:
    """The mean over contexts of what the block's mixer makes for the target, [B, C, ...]."""
    pooled = context.mean(dim=1, keepdim=True) if commute_mean else context
    return _mixed(block.combine_conv_target, pooled, target).mean(dim=1)


def _mixed(mixer: Any, context: Tensor, target: Tensor) -> Tensor:
    """The convolution of every [context; target], [B, L, C, ...]."""
    conv = mixer.module
    linear = _LINEAR[type(conv)]
    of_context, of_target = conv.weight.split([context.shape[2], target.shape[1]], dim=1)
    parts = linear(context.flatten(0, 1), of_context).unflatten(0, context.shape[:2])
    return parts + linear(target, of_target, conv.bias).unsqueeze(1)
