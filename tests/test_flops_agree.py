"""FLOPs of whole models counted three ways: by torch's counter, by fvcore, and by formula; and the published figures.

Where two counters differ, the difference is a convention, and exact:
- a multiply-add is one FLOP to fvcore, two to the others;
- fvcore counts bilinear upsampling and no attention of torch's; torch's counter the reverse;
- `torch.jit.trace`, which fvcore reads, leaves out what nobody reads (UniverSeg's last support convolution);
- `icseg_kernels.flops` counts interpolated samples, means of overlaps and random draws, formulas of models do not;
- `target_flops` leaves the registers out, but as keys.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import icseg
from icseg.baselines.universeg import UniverSeg
from icseg.sparse.config import SparseConfig
from icseg.sparse.cost import layer_flops, target_flops
from icseg.sparse.propagation import CELLS
from icseg_kernels import flops, use_backend

C = 64  # channels of UniverSeg
Inputs = tuple[Tensor, ...]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("models")


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    """Whose operations are torch's own, so that every counter sees them."""
    with torch.no_grad(), use_backend("reference"):
        yield


def task(side: int, support: int) -> Inputs:
    return torch.rand(1, 1, side, side), torch.rand(1, support, 1, side, side), torch.rand(1, support, 1, side, side)


def by_torch(run: Callable[..., object], inputs: Inputs) -> tuple[int, dict[str, int]]:
    """All FLOPs, and those of each operation."""
    with FlopCounterMode(display=False) as counter:
        run(*inputs)
    return counter.get_total_flops(), {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def by_fvcore(run: Callable[..., Any], inputs: Inputs) -> int:
    """Twice its multiply-adds, with attention and without upsampling.

    Of the operations that were run, not of the Python code: its tracing makes tensors of sizes.
    """
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    operations = Operations(make_fx(run)(*inputs))
    handles = flops.fvcore_handles()
    handles["aten::_scaled_dot_product_flash_attention_for_cpu"] = attention
    handles["aten::upsample_bilinear2d"] = lambda inputs, outputs: 0
    return 2 * FlopCountAnalysis(operations, inputs).set_op_handle(**handles).total()


class Operations(torch.nn.Module):
    """A graph, run operation by operation: its own code has a variable for each, all of which tracing looks up."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.fx.Interpreter(self.graph).run(*inputs)


def attention(inputs: list[Any], outputs: list[Any]) -> int:
    (b, h, nq, d), (_, _, nk, dv) = (inputs[i].type().sizes() for i in (0, 2))
    return flops.selected_attention_flops(b, h, nq * nk, d, dv) // 2


# UniverSeg


def encoder_flops(side: int, support: int, *, factorised: bool, last_support: bool) -> int:
    """UniverSeg's contracting half. last_support: whether the support side of its last block is computed."""
    total = 0
    for scale, (target, pair) in enumerate([(1, 2), (C, C), (C, C), (C, C)]):
        pixels = (side >> scale) ** 2
        wanted = last_support or scale < 3
        total += cross_block_flops(target, pair, support, pixels, factorised=factorised, wanted=wanted)
    return total


def cross_block_flops(
    target: int, pair: int, support: int, pixels: int, *, factorised: bool, wanted: bool = True
) -> int:
    """Convolutions of 3 x 3: of pairs, of the new target, and, where it is `wanted`, of the new support."""
    images = support if wanted or not factorised else 1  # else a mean of the support set is enough
    crossed = target + images * pair if factorised else images * (target + pair)
    return 2 * 9 * C * pixels * (crossed + C + (C * support if wanted else 0))


def universeg_flops(side: int, support: int, *, factorised: bool) -> int:
    total = encoder_flops(side, support, factorised=factorised, last_support=True)
    for scale in (2, 1, 0):
        wanted = scale > 0 or not factorised
        pixels = (side >> scale) ** 2
        total += cross_block_flops(2 * C, 2 * C, support, pixels, factorised=factorised, wanted=wanted)
    return total + 2 * C * side**2


@pytest.mark.parametrize("factorised", [False, True])
@pytest.mark.parametrize("support", [1, 3])
def test_universeg(support: int, factorised: bool) -> None:
    model, inputs = UniverSeg(factorised=factorised), task(32, support)
    formula = universeg_flops(32, support, factorised=factorised)
    unread = 0 if factorised else 2 * 9 * C**2 * support * 32**2
    assert by_torch(model, inputs)[0] == formula
    assert by_fvcore(model, inputs) == formula - unread


@pytest.mark.parametrize(("factorised", "gflops"), [(False, 549.35), (True, 299.31)])
def test_universeg_at_512_pixels(factorised: bool, gflops: float) -> None:
    with FakeTensorMode():
        counted, _ = by_torch(UniverSeg(factorised=factorised), task(512, 3))
    assert counted == universeg_flops(512, 3, factorised=factorised)
    assert counted / 1e9 == pytest.approx(gflops, abs=0.005)


# The sparse model

UNCOUNTED = ("icseg.gather_patches_bilinear", "icseg.scatter_patches", "icseg.gumbel_noise", "icseg.gumbel_topk")
EVERYTHING = icseg.Budget(tolerance=0)


def registers_flops(network: torch.nn.Module, levels: int) -> int:
    """What the registers of one side cost in the blocks' layers."""
    layers = [layer for block in network.blocks for layer in block.modules()]
    return levels * network.config.registers * layer_flops(layers, 1)


def sparse_run(model: icseg.PatchICL, budget: icseg.Budget, given: Inputs, *, kept: bool) -> tuple[Any, Inputs]:
    """A call and its inputs: cold, or with the support set encoded before."""
    target, *support = given
    if not kept:
        return lambda *inputs: model(*inputs, budget=budget).logits, given
    memory = model.encode_support(*support)
    return lambda target: model(target, memory=memory, budget=budget).logits, (target,)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("side", "budget"), [(64, EVERYTHING), (128, icseg.Budget(patches=40))])
def test_sparse(models: ModuleType, side: int, budget: icseg.Budget, kept: bool) -> None:
    model, given = icseg.PatchICL.from_pretrained(), task(side, 2)
    network, memory = model.network, model.encode_support(*given[1:])
    levels = [level.coords.shape[1] for level in model(given[0], memory=memory, budget=budget).levels]
    formula = target_flops(network, memory, levels) + registers_flops(network, len(levels))
    if not kept:
        patches = [memory.tensors[f"level{i}.keys"].shape[2] // CELLS for i in range(len(levels))]
        formula += models.support_flops(network, patches) + registers_flops(network, len(levels))
    run, inputs = sparse_run(model, budget, given, kept=kept)
    total, by_operation = by_torch(run, inputs)
    assert total - sum(by_operation.get(name, 0) for name in UNCOUNTED) == formula
    with use_backend(None):  # where kernels of ours serve, their formulas stand for the same work
        assert by_torch(run, inputs)[0] == total


@pytest.mark.parametrize("kept", [False, True])
def test_sparse_by_fvcore(kept: bool) -> None:
    model = icseg.PatchICL(SparseConfig(depth=1)).eval()
    run, inputs = sparse_run(model, EVERYTHING, task(64, 2), kept=kept)
    assert by_fvcore(run, inputs) == by_torch(run, inputs)[0]


def test_rounds_of_an_adaptive_budget_cost_hardly_more_than_one(models: ModuleType) -> None:
    model, case = icseg.PatchICL.from_pretrained(), models.synthetic_case(256)
    memory = model.encode_support(case.support_images[None], case.support_masks[None])
    run = functools.partial(model, memory=memory)
    levels = [level.coords.shape[1] for level in run(case.target[None]).levels]
    total, _ = by_torch(run, (case.target[None],))
    assert total == pytest.approx(target_flops(model.network, memory, levels), rel=0.03)


# The published PatchICL


def test_published_at_128_pixels() -> None:
    model, inputs = icseg.PatchICL(icseg.PatchICLConfig.published(128)).eval(), task(128, 1)
    total, _ = by_torch(model, inputs)
    assert by_fvcore(lambda *given: model(*given).logits, inputs) == total


def test_published_at_512_pixels() -> None:
    """307.55 GFLOPs, as the published code spends them, from what is spent here."""
    side, support = 512, 3
    config = icseg.PatchICLConfig.published(side)
    with FakeTensorMode():
        model = icseg.PatchICL(config).eval()
        inputs = task(side, support)
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
        in_transformer = transformer_flops_here(model, inputs)
    total, counts = counter.get_total_flops(), counter.get_flop_counts()
    features = sum(counts["PatchICL.network.features"].values())
    images = support + 1
    assert features == images * encoder_flops(side, 1, factorised=True, last_support=False)
    # The published extractor also computes the last block's support side, which nobody reads;
    published = total - features + images * encoder_flops(side, 1, factorised=True, last_support=True)
    # its layers see all tokens together, under a mask, also those whose output nobody reads;
    published += transformer_flops_there(config, support) - in_transformer
    # its blur is one two-dimensional convolution at every window, and nothing else of its sampling counts.
    operations = {str(operation): count for operation, count in counts["Global"].items()}
    published -= sum(operations[f"icseg.{name}"] for name in ("sample_patches", "gather_patches_bilinear"))
    published += blur_flops(config, support)
    assert published / 1e9 == pytest.approx(307.55, abs=0.01)


def transformer_flops_here(model: icseg.PatchICL, inputs: Inputs) -> int:
    found = 0

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            nonlocal found
            with FlopCounterMode(display=False) as counter:
                output = call(*given, **named)
            found += counter.get_total_flops()
            return output

        return counted

    transformer = model.network.transformer
    with pytest.MonkeyPatch.context() as patch:
        for name in ("context", "forward"):
            patch.setattr(transformer, name, counting(getattr(transformer, name)))
        model(*inputs)
    return found


def transformer_flops_there(config: Any, support: int) -> int:
    backbone, total = config.backbone, 0
    for level in config.levels:
        kept = support * level.support_patches + backbone.registers
        counts = [kept] * backbone.context_layers + [kept + level.target_patches] * backbone.layers
        for tokens in counts:
            total += flops.transformer_block_flops(1, tokens, tokens + 1, backbone.dim, 4 * backbone.dim)
    return total


def blur_flops(config: Any, support: int) -> int:
    total = 0
    for level in config.levels:
        windows = (level.resolution - config.patch_size + 1) ** 2
        for blur, maps in ((level.target_blur, 1), (level.support_blur, support)):
            taps = int(4 * blur + 1) | 1
            total += 2 * taps**2 * windows * maps if blur else 0
    return total
