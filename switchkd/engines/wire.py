"""Hidden states on the wire: tensors as NumPy arrays, bfloat16 as uint16."""

from __future__ import annotations

import numpy as np
import torch

from switchkd.algo.transfer import to_host


def to_numpy(hidden: torch.Tensor) -> tuple[np.ndarray, str]:
    """A tensor as it travels, and the name of its dtype: bfloat16 as uint16, which NumPy has no better name for."""
    hidden = to_host(hidden.detach())
    if hidden.dtype == torch.bfloat16:
        return hidden.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return hidden.numpy(), str(hidden.dtype).removeprefix("torch.")


def from_numpy(values: np.ndarray, dtype: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The tensor that travelled, in its dtype. Shares the array's memory on a CPU, unless the array is read-only (an
    object store's), where a write through the tensor would be fatal."""
    if not values.flags.writeable:
        values = values.copy()
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(values).to(device)
