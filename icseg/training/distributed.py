"""The processes of a run: this one alone, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# The first process may make tasks or validate for hours while the others wait; torchrun ends them all if one dies.
_LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """rank: of this process, from 0; count: of all; device: of this process."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, validates and shows progress."""
        return self.rank == 0

    def share(self, parts: int) -> range:
        """Those of `parts` micro-batches that are this process's.

        Raises ValueError unless every process gets as many.
        """
        if parts % self.count:
            raise ValueError(
                f"[optimiser] accumulate must be a multiple of the number of processes, {self.count}, got {parts}"
            )
        return range(self.rank, parts, self.count)

    def add_up(self, values: Tensor) -> None:
        """Replace `values` by their sum over all processes, which is the same bit for bit in each."""
        if self.count > 1:
            dist.all_reduce(values)

    def largest(self, *values: float) -> list[float]:
        """Of each value the largest that a process gave. Every process waits for the others here."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self) -> None:
        """Return when every process has come here."""
        self.largest(0.0)


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all that torchrun started, or is alone."""
    return not _several() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def connected(device: torch.device) -> Iterator[Processes]:
    """The processes of the run, connected while the context lasts; a group that exists already is used, and kept.

    device: "cuda" becomes the GPU of LOCAL_RANK. Raises ValueError, where there are several processes, for a GPU with a
    number, or if there are fewer GPUs than processes on this machine.
    """
    if not _several():
        yield Processes(0, 1, device)
        return
    device = _own_device(device, int(os.environ["LOCAL_RANK"]))
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_LONGEST_WAIT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if ours:
            dist.destroy_process_group()


def _several() -> bool:
    return all(name in os.environ for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"device must be cpu or cuda where torchrun starts several processes, got {device}")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"torchrun must start at most one process a GPU, got LOCAL_RANK {local_rank} "
            f"with {torch.cuda.device_count()} GPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
