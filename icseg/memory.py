"""A support set, encoded once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from icseg.files import written_whole

MEMORY_KEY = "icseg_memory"


@dataclass
class SupportMemory:
    """What a model keeps of a support set; made by `PatchICL.encode_support`, opaque to the caller.

    ```
    memory.save("liver.safetensors")
    memory = icseg.SupportMemory.load("liver.safetensors")
    ```

    fingerprint: of the configuration that encoded it; another configuration refuses it.
    batch:       B, the number of support sets; 1 serves target batches of any size.
    tensors:     the architecture's own encoding, by name; dimension 0 of each is B.
    classes:     C, of its masks.
    weights:     what tells the weights that made it from others of the same configuration; "" if that is not known
                 (of a model that was not loaded from a file).
    notes:       the caller's own, kept in the file.
    """

    fingerprint: str
    batch: int
    tensors: dict[str, Tensor]
    classes: int = 1
    weights: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    def check_model(self, fingerprint: str, weights: str = "") -> None:
        """Raise ValueError unless a model with this configuration, and these weights, made this memory."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"memory must come from a model with configuration {fingerprint}, got one made with {self.fingerprint}"
            )
        if self.weights and weights and self.weights != weights:
            raise ValueError(f"memory must come from the weights {weights}, got one made with {self.weights}")

    def check_target(self, target: Tensor) -> None:
        """Raise ValueError unless this memory serves targets [B, ...], on their device."""
        if self.batch not in (1, len(target)):
            raise ValueError(f"support sets must number 1 or {len(target)}, one a target, got {self.batch}")
        for name, tensor in self.tensors.items():
            if tensor.device != target.device or tensor.shape[0] != self.batch:
                raise ValueError(
                    f"memory must be on the device of target, {target.device}, with batch {self.batch}; "
                    f"got {name} on {tensor.device} with {tensor.shape[0]}"
                )

    def to(self, device: str | torch.device) -> SupportMemory:
        """The same memory on `device`."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return SupportMemory(self.fingerprint, self.batch, tensors, self.classes, self.weights, dict(self.notes))

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file; it appears whole or not at all."""
        about = {name: value for name, value in vars(self).items() if name != "tensors"}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        with written_whole(path) as temporary:
            save_file(tensors, temporary, {MEMORY_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> SupportMemory:
        """What `save` wrote. Raises FileNotFoundError, or ValueError for a file that is no support memory."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"memory must be an existing .safetensors file, got {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {})[MEMORY_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            return cls(tensors=tensors, **about)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a support memory, got another or a corrupt file") from error
