"""Converts tensors to the NumPy arrays that cross processes, and back; bfloat16 is sent as uint16."""

from __future__ import annotations

import numpy as np
import torch

from switchkd.algo.transfer import to_host


def to_numpy(hidden: torch.Tensor) -> tuple[np.ndarray, str]:
    """The array to send, and the name of the tensor's dtype. bfloat16 becomes uint16, since NumPy has no bfloat16."""
    hidden = to_host(hidden.detach())
    if hidden.dtype == torch.bfloat16:
        return hidden.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return hidden.numpy(), str(hidden.dtype).removeprefix("torch.")


def from_numpy(values: np.ndarray, dtype: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The inverse of `to_numpy`. On a CPU the tensor shares the array's memory, unless the array is read-only (an
    object store's): a write through the tensor would then be fatal."""
    if not values.flags.writeable:
        values = values.copy()
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(values).to(device)
