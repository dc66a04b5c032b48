"""A support set, encoded once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class SupportMemory:
    """What a model keeps of a support set; made by `PatchICL.encode_support`, opaque to the caller.

    It belongs to the weights that made it: two models of one configuration are not told apart.

    fingerprint: of the configuration that encoded it; another configuration refuses it.
    batch:       B, the number of support sets; 1 serves target batches of any size.
    tensors:     the architecture's own encoding, by name; dimension 0 of each is B.
    """

    fingerprint: str
    batch: int
    tensors: dict[str, Tensor]

    def check(self, fingerprint: str, target_batch: int) -> None:
        """Raise ValueError unless this memory fits a model with `fingerprint` and `target_batch` targets."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"memory must come from a model with configuration {fingerprint}, got one made with {self.fingerprint}"
            )
        if self.batch not in (1, target_batch):
            raise ValueError(f"support sets must number 1 or {target_batch}, one a target, got {self.batch}")
