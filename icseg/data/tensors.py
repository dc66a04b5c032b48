"""Grey images and their masks as the tensors that models take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_tensors(
    images: NDArray[np.uint8], masks: NDArray[np.uint8], classes: Sequence[int] = (1,)
) -> tuple[Tensor, Tensor]:
    """Images [N, H, W] and masks of the same shape as float32: [N, 1, H, W] in [0, 1], and [N, C, H, W] in {0, 1}.

    masks holds class ids; a channel of the result is where it is one of `classes`.
    """
    x = torch.from_numpy(images.astype(np.float32) / 255)[:, None]
    return x, torch.from_numpy(np.stack([masks == c for c in classes], 1).astype(np.float32))
