"""The whole models that are compared, on one task at a size."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import kilobytes, seconds_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import icseg
from icseg.baselines.universeg import UniverSeg
from icseg.data.synthetic import EVALUATION_SEED, generate_task, pool_task_seed
from icseg.data.tensors import as_tensors
from icseg.evaluation import Case, load_dataset, pack_cases
from icseg.sparse.config import SparseConfig
from icseg.sparse.cost import layer_flops
from icseg.sparse.encoder import Block
from icseg.sparse.network import SparseNetwork
from icseg.sparse.patches import CONTEXT, CROP, PATCH
from icseg.sparse.propagation import CELLS, LabelPropagation
from icseg_kernels import use_backend

SUPPORT = 3
TASK = pool_task_seed(EVALUATION_SEED, 0)
FAMILY = "lesions"
UNIVERSEG, FACTORISED = "UniverSeg, as published", "UniverSeg, factorised"
PUBLISHED = "PatchICL, published"
DENSE = "Dense global attention"
SPARSE, KEPT = "PatchICL, sparse", "PatchICL, sparse, support encoded before"
NAMES = (UNIVERSEG, FACTORISED, PUBLISHED, DENSE, SPARSE, KEPT)

MOST_SECONDS = 180.0  # of one call; rivals that take longer are left out
SLOWEST = 5e9  # FLOP/s, which any machine reaches: what so takes less than the most is not in question
EVERYTHING = icseg.Budget(tolerance=0)


def synthetic_case(side: int, support: int = SUPPORT) -> Case:
    """A lesion that is hard to find, drawn at `side` pixels."""
    task = generate_task(TASK, support + 1, side, FAMILY)
    images, masks = as_tensors(task.images, task.masks)
    return Case(images[0], masks[0], images[1:], masks[1:], 0, 0)


def median_case(pack: Path, side: int, model: icseg.PatchICL) -> Case:
    """The target of a pack's first class, resized to `side` pixels, that takes the median number of patches."""

    def patches(case: Case) -> int:
        output = model(case.target[None], case.support_images[None], case.support_masks[None])
        return sum(level.coords.shape[1] for level in output.levels)

    cases = sorted(_cases(pack, side), key=patches)
    return cases[len(cases) // 2]


def _cases(pack: Path, side: int, support: int = SUPPORT) -> list[Case]:
    return list(pack_cases(load_dataset(pack, side), 1, support=support))


@torch.inference_mode()
def built(name: str, case: Case) -> Callable[[], Tensor]:
    """A model, of random weights where none are bundled, and a call of it on one target and its support set."""
    target, images, masks = case.target[None], case.support_images[None], case.support_masks[None]
    torch.manual_seed(0)
    if name in (UNIVERSEG, FACTORISED):
        universeg = UniverSeg(factorised=name == FACTORISED).eval()
        return lambda: universeg(target, images, masks)
    if name == PUBLISHED:
        published = icseg.PatchICL(icseg.PatchICLConfig.published(target.shape[-1])).eval()
        return lambda: published(target, images, masks).logits
    if name == DENSE:
        dense = dense_global_attention(target.shape[-1], images.shape[1])
        return lambda: dense(target, images, masks, budget=EVERYTHING).logits
    sparse = icseg.PatchICL.from_pretrained()
    if name == SPARSE:
        return lambda: sparse(target, images, masks).logits
    memory = sparse.encode_support(images, masks)
    return lambda: sparse(target, memory=memory).logits


class SdpaBlock(Block):
    """Whose layers and attention are torch's own, also where a kernel of ours could serve."""

    def forward(self, tokens: Tensor, memory: list[Tensor], index: Tensor | None) -> tuple[Tensor, Tensor]:
        with use_backend("reference"):
            return super().forward(tokens, memory, index)


class SdpaPropagation(LabelPropagation):
    """Whose look-up is torch's scaled_dot_product_attention, also where a kernel of ours could serve."""

    def forward(
        self, features: Tensor, tokens: Tensor, keys: Tensor, values: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with use_backend("reference"):
            return super().forward(features, tokens, keys, values, index)


def dense_global_attention(side: int, support: int, bundled: icseg.PatchICL | None = None) -> icseg.PatchICL:
    """The sparse network without its cascade: one level of the image's own size, every patch of which is a token.

    All tokens of the support set attend to each other, all of the target to those and to each other, and every 2 x 2
    cell of the target looks up those of the whole support set, by the backend of SDPA that torch chooses (on CPUs its
    flash attention, which never holds all scores). To be called with `EVERYTHING` as budget.

    side:    of images and masks, one of the bundled model's levels.
    bundled: whose weights it gets; of what is kept by level, that of this one. None: the bundled model.
    """
    bundled = bundled or icseg.PatchICL.from_pretrained()
    config = bundled.config
    if not isinstance(config, SparseConfig) or side not in config.levels:
        raise ValueError(f"side must be a level of a sparse model, got {side}")
    level = min(config.levels.index(side), config.distinct_levels - 1)
    cells = (side // PATCH) ** 2
    model = icseg.PatchICL(
        dataclasses.replace(
            config,
            levels=(side,),
            distinct_levels=1,
            target_patches=(cells,),
            support_patches=(cells,),
            most_support_patches=support * cells,
        )
    )
    network = model.network
    assert isinstance(network, SparseNetwork)
    network.blocks = nn.ModuleList(SdpaBlock(config.dim, config.heads, config.mlp_ratio) for _ in network.blocks)
    sizes = config.propagation_heads, config.propagation_key_dim, config.propagation_value_dim
    network.propagation = SdpaPropagation(config.dim, config.stem_channels, *sizes)
    state = bundled.state_dict()
    for name in ("network.encoder.level_embedding", "network.decoder.propagation_gain"):
        state[name] = state[name][level : level + 1]
    model.load_state_dict(state)
    return model.eval()


def support_flops(network: SparseNetwork, patches: Sequence[int]) -> int:
    """Of a support set of so many patches at each level, all images together: the counterpart of `target_flops`."""
    encoder, propagation, config = network.encoder, network.propagation, network.config
    each = layer_flops(encoder.stem, CROP) + layer_flops(encoder.label_stem, CROP)
    each += layer_flops(encoder.token, PATCH) + layer_flops(encoder.context, CONTEXT)
    each += layer_flops([encoder.position], 1)
    each += layer_flops([layer for block in network.blocks for layer in block.modules()], 1)
    each += CELLS * layer_flops([propagation.match_cell, propagation.match_out, propagation.value_cell], 1)
    each += layer_flops([propagation.match_token, propagation.value_token], 1)
    attended = sum((count + config.registers) ** 2 for count in patches)
    return sum(patches) * each + 4 * config.depth * config.dim * attended


@torch.inference_mode()
def counted(name: str, run: Callable[[], object]) -> float:
    """FLOPs of a model's call by torch's counter; the reference backend hides none.

    On tensors without values, so in no time, but for the models whose patches depend on values.
    """
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        if name in (SPARSE, KEPT):
            run()
        else:
            with FakeTensorMode(allow_non_fake_inputs=True):
                run()
    return float(counter.get_total_flops())


def left_out(name: str, case: Case, flops: float, most_seconds: float = MOST_SECONDS) -> str | None:
    """Why a model is not to be called on a case: it would need more memory than is free, or too long; None: it is.

    The time is that of its FLOPs at the rate that it has at 128 px.
    """
    if name in (SPARSE, KEPT):
        return None
    side, support = case.target.shape[-1], len(case.support_images)
    needed, free = megabytes_needed(name, side, support), free_megabytes()
    if needed > free:
        return f"needs about {needed:.0f} MB by formula, of which {free:.0f} MB are free"
    seconds = flops / speed(name) if flops > SLOWEST * most_seconds else 0.0
    if seconds > most_seconds:
        rate = f"{flops / 1e9:.0f} GFLOPs at the {speed(name) / 1e9:.0f} GFLOP/s of 128 px"
        return f"a call would take about {seconds:.0f} s, more than {most_seconds:.0f} s ({rate})"
    return None


def megabytes_needed(name: str, side: int, support: int) -> float:
    """About what a call holds at its peak, in float32 values.

    The UniverSegs and the published PatchICL hold maps of 64 channels of whole images: about 14 a support image where
    all pairs are concatenated, else 5 an image. Dense attention holds 10,000 values a support patch (features, cells,
    keys and values of all blocks and cells) and 15,000 a target patch (those, and the decoder's maps), but no scores.
    """
    if name == DENSE:
        cells = (side // PATCH) ** 2
        values = cells * (10_000 * support + 15_000)
    else:
        maps = 14 * support if name == UNIVERSEG else 5 * (support + 1)
        values = maps * 64 * side**2
    return 4 * values / 2**20


def free_megabytes() -> float:
    """Of memory, without swapping; infinite where the system does not say (on Linux it does)."""
    info = Path("/proc/meminfo")
    return kilobytes("MemAvailable", info) / 1024 if info.exists() else math.inf


@functools.cache
@torch.inference_mode()
def speed(name: str) -> float:
    """FLOP/s of a model at 128 px: of the fastest of four calls, the first of which warms up."""
    run = built(name, synthetic_case(128))
    return counted(name, run) / min(seconds_of(run) for _ in range(4))
