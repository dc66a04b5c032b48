"""PatchICL: the model that users hold, whichever architecture its configuration names."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from icseg.checkpoint import bundled_weights, load_checkpoint, save_checkpoint
from icseg.config import PatchICLConfig, check_int
from icseg.graph import CapturedForward, capture
from icseg.memory import SupportMemory
from icseg.output import SegmentationOutput
from icseg.sparse.budget import Budget, as_budget
from icseg.sparse.support import SupportEncoder, check_support

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

    def train(self, mode: bool = True) -> Self:
        """As of any module; weights that may change are no longer those that a memory on disk was made with."""
        if mode:
            self.network.weights_identity = ""
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; see `train`."""
        self.network.weights_identity = ""
        return super().load_state_dict(*args, **kwargs)

    @property
    def multi_class(self) -> bool:
        """Whether support masks may have more than one class, all of which one pass segments."""
        return self.network.multi_class

    @property
    def any_size(self) -> bool:
        """Whether images may have any size and shape, a budget bounds the cost, and support sets may be streamed."""
        return self.network.any_size

    def encode_support(
        self, images: Tensor, masks: Tensor, *, valid: Tensor | None = None, seed: int | None = None
    ) -> SupportMemory:
        """Encode a support set once, for any number of targets.

        images: [B, S, 1, H, W] float in [0, 1]. B = 1 serves target batches of any size.
        masks:  [B, S, C, H, W] in [0, 1], one channel a class.
        valid:  [B, S] bool, False for images that only fill up support sets of different S; None: all are valid.
        seed:   in training, varies which of several equally good support patches are picked.

        The order of the images does not matter (but for rounding). Many images cost bounded memory beyond the images
        themselves; `support_encoder` takes those one by one too.
        """
        check_support(images, masks, valid)
        if masks.shape[2] > 1 and not self.multi_class:
            raise ValueError(f"support_masks must have one class for this architecture, got C = {masks.shape[2]}")
        masks = masks.to(images.dtype)
        if valid is None:
            return self.network.encode_support(images, masks, seed=seed)
        return self._require_sparse("valid").encode_support(images, masks, valid=valid, seed=seed)

    def support_encoder(self, count: int, *, seed: int | None = None) -> SupportEncoder:
        """An encoder for a support set of `count` images that come one by one, or in chunks of one size each.

        ```
        encoder = model.support_encoder(count=len(pairs))
        for image, mask in pairs:                                # [1, 1, 1, H, W], [1, 1, C, H, W] in [0, 1]
            encoder.add(image, mask)
        memory = encoder.finish()
        ```
        """
        check_int("count", count, 1)
        return self._require_sparse("support_encoder").support_encoder(count, seed=seed)

    def forward(
        self,
        target: Tensor,
        support_images: Tensor | None = None,
        support_masks: Tensor | None = None,
        *,
        memory: SupportMemory | None = None,
        budget: Budget | int | None = None,
        seeds: Sequence[int] | None = None,
        target_mask: Tensor | None = None,
        seed: int | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> SegmentationOutput:
        """Segment target images.

        target:         [B, 1, H, W] float in [0, 1].
        support_images: [B, S, 1, h, w] float in [0, 1]; support_masks: [B, S, C, h, w] in [0, 1]. Or `memory`.
        budget:         what a target may cost: a number of patches, or a `Budget`; None takes as many patches as the
                        expected error asks for (`SparseConfig.tolerance`; under torch.compile and export at most
                        `SparseConfig.target_patches` a level and round, so that shapes are static).
        seeds:          a draw of patches with each of these seeds: `hypotheses`, and the logits of their mean.
        target_mask:    [B, C, H, W], read only where training picks patches by the true error.
        seed:           draws the patches with this seed, differently for each row of the batch; None in evaluation mode
                        takes the best ones, without noise.
        noise:          uniforms in (0, 1), one tensor [rows, candidates] a sampler call, in the model's order.
        """
        if target.ndim != 4 or target.shape[1] != 1 or 0 in target.shape:
            raise ValueError(f"target must have shape [B, 1, H, W], got {list(target.shape)}")
        if not target.is_floating_point():
            raise TypeError(f"target must be floating-point, in [0, 1], got {target.dtype}")
        if memory is None:
            if support_images is None or support_masks is None:
                raise ValueError("support_images and support_masks, or memory, must be given")
            memory = self.encode_support(support_images, support_masks, seed=seed if self.training else None)
        elif support_images is not None or support_masks is not None:
            raise ValueError("memory must not be given together with support_images or support_masks")
        memory.check_model(self.network.fingerprint, self.network.weights_identity)
        memory.check_target(target)
        if target_mask is not None and target_mask.shape != (target.shape[0], memory.classes, *target.shape[2:]):
            shape = [target.shape[0], memory.classes, *target.shape[2:]]
            raise ValueError(f"target_mask must have shape [B, C, H, W] = {shape}, got {list(target_mask.shape)}")
        options: dict[str, Any] = {"target_mask": target_mask, "noise": noise}
        if budget is not None:
            self._require_sparse("budget")
            options["budget"] = as_budget(budget)
        if seeds is None:
            return self.network(target, memory, seed=seed, **options)
        if seed is not None or len(seeds) == 0:
            raise ValueError(f"seeds must hold at least one seed, and seed be None, got {list(seeds)} and {seed}")
        return _mean_of([self.network(target, memory, seed=operator.index(one), **options) for one in seeds])

    def graph(
        self,
        batch: int,
        size: tuple[int, int],
        *,
        memory: SupportMemory | None = None,
        support: int | None = None,
        support_size: tuple[int, int] | None = None,
        classes: int = 1,
        budget: Budget | int | None = None,
    ) -> CapturedForward:
        """The forward pass for inputs of these shapes as one CUDA graph: it runs without Python in between.

        batch:        B targets a call, of `size` (H, W).
        memory:       the support set; its tensors are copied, `CapturedForward.set_memory` takes another one. Or
        support:      S pairs a target, encoded in each call.
        support_size: theirs, None: that of the targets; classes: C of their masks.
        budget:       as for `forward`; an adaptive one takes at most `SparseConfig.target_patches` a level and round.

        The model must be on a CUDA device, in evaluation mode; later changes of its weights in place are seen. Images
        are copied into tensors of the weights' dtype. Raises TypeError or ValueError for other arguments.

        ```
        captured = model.graph(1, (512, 512), memory=memory)
        for image in images:                                     # [1, 1, 512, 512]
            mask = captured(image).logits[0, 0] > 0              # the logits are overwritten by the next call
        ```
        """
        network = self._require_sparse("graph")
        if memory is not None:
            memory.check_model(network.fingerprint, network.weights_identity)
        options = {} if budget is None else {"budget": as_budget(budget)}
        return capture(self, batch, size, memory, support, support_size, classes, options)

    def _require_sparse(self, argument: str) -> SparseNetwork:
        from icseg.sparse.network import SparseNetwork

        if not isinstance(self.network, SparseNetwork):
            raise ValueError(f"{argument} needs the sparse architecture, got {self.config.architecture}")
        return self.network

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
        model.network.weights_identity = identity(state)
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


def identity(state: dict[str, Tensor]) -> str:
    """16 hexadecimal digits that tell these weights from others."""
    digest = hashlib.sha256()
    for name in sorted(set(state) - {"network.temperature"}):  # of which a memory holds nothing
        digest.update(name.encode() + state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _mean_of(draws: list[SegmentationOutput]) -> SegmentationOutput:
    probabilities = torch.stack([draw.logits.float().sigmoid() for draw in draws], 1)
    logits = probabilities.mean(1).logit(eps=1e-6).to(draws[0].logits.dtype)
    uncovered = [draw.uncovered_error for draw in draws if draw.uncovered_error is not None]
    mean = torch.stack(uncovered).mean(0) if uncovered else None
    return SegmentationOutput(logits, draws[-1].levels, probabilities, mean)
