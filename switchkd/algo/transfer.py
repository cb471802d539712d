"""Copies through pinned memory: a copy to the device does not wait, a copy to the host waits once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on `device`. On CUDA the copy runs in the current stream, and PyTorch reuses the pinned
    memory only after it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory, complete: from CUDA into pinned memory, after one wait for the current stream."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = tensor.to("cpu", non_blocking=True)  # PyTorch pins the target of such a copy
    torch.cuda.current_stream(tensor.device).synchronize()
    return host
