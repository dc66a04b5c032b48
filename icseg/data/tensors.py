"""Grey images and their masks as the tensors that models take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_tensors(
    images: NDArray[np.uint8] | Tensor, masks: NDArray[np.uint8] | Tensor, classes: Sequence[int] = (1,)
) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, H, W] and masks of the same shape as float32: [N, 1, H, W] in [0, 1], [N, C, H, W] in {0, 1}.

    masks holds class ids; a channel of the result is where it is one of `classes`. Tensors stay on their device.
    """
    ids = torch.as_tensor(masks)
    return torch.as_tensor(images).float()[:, None] / 255, torch.stack([ids == c for c in classes], 1).float()
