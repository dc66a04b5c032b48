"""Grey images and their masks as the tensors that models take."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_tensors(images: NDArray[np.uint8], masks: NDArray[np.generic]) -> tuple[Tensor, Tensor]:
    """Images [N, H, W] and masks of the same shape, non-zero is foreground, as float32 [N, 1, H, W].

    The images then lie in [0, 1], the masks in {0, 1}.
    """
    x = torch.from_numpy(images.astype(np.float32) / 255)[:, None]
    return x, torch.from_numpy((masks != 0).astype(np.float32))[:, None]
