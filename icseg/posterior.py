"""What the logits of several classes say of a pixel, taken class by class: memory does not grow with the classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Winner:
    """The most likely class of each pixel, where it passes a threshold."""

    def __init__(self, shape: tuple[int, ...], threshold: float, device: torch.device) -> None:
        self._best = torch.full(shape, math.log(threshold / (1 - threshold)), device=device)
        self._classes = 0
        self.index = torch.zeros(shape, dtype=torch.int64, device=device)
        """1 + the index of the most likely class among those added, 0 where none passes the threshold."""

    def add(self, logits: Tensor) -> None:
        """Take the logits of the next class, of the shape given."""
        self._classes += 1
        self.index = torch.where(logits > self._best, self._classes, self.index)
        self._best = torch.maximum(self._best, logits)


class Entropy:
    """The entropy of background and classes over its maximum, in [0, 1].

    The classes are taken as independent and exclusive, which makes their posterior the softmax of (0, logits); with
    one class it is the binary entropy. The sums of the softmax are rescaled whenever the largest logit grows.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._largest = torch.zeros(shape, device=device)  # the logit of background
        self._weights = torch.ones(shape, device=device)  # sum of w = exp(logit - largest)
        self._moment = torch.zeros(shape, device=device)  # sum of w (logit - largest)
        self._classes = 1

    def add(self, logits: Tensor) -> None:
        """Take the logits of the next class, of the shape given."""
        largest = torch.maximum(self._largest, logits)
        change, offset = self._largest - largest, logits - largest
        rescale, weight = change.exp(), offset.exp()
        self._moment = rescale * (self._moment + change * self._weights) + weight * offset
        self._weights = rescale * self._weights + weight
        self._largest = largest
        self._classes += 1

    def value(self) -> Tensor:
        entropy = self._weights.log() - self._moment / self._weights
        return (entropy / math.log(self._classes)).clamp(0, 1)
