"""The choice between a Triton kernel and the plain torch operations that compute the same.

In: the name of a file of this folder and a tensor. Out: its module where the tensor's device runs Triton kernels, None
where plain torch computes: on a CPU, and on a GPU without a Triton that compiles them, which is logged once.
"""

import logging
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_DEVICE = "cuda"  # the device type that gets kernels; tests of the interpreter replace it by cpu
_PLAIN = {
    "draw": "algo.sampling.draw_on_device (about 450 operations a draw)",
    "divergence": "algo.divergence and algo.losses (up to 17 passes over the rows)",
}
"""What computes instead of a module, for the log."""


def find(name: str, tensor: Tensor) -> Any:
    """The module `draw` or `divergence` if the tensor's device runs its kernels, else None."""
    return _checked(name, tensor.device) if tensor.device.type == _DEVICE else None


@cache
def _checked(name: str, device: torch.device) -> Any:
    """The module after a run of its kernels on a small input, so that a Triton that is missing, or does not compile or
    run them, is found here and not in the middle of a step."""
    try:
        module = import_module(f"{__name__}.{name}")
        module.check(device)
    except Exception as error:  # a compiler fails in many ways: no Triton, no C compiler, an unknown GPU
        reason = " ".join(str(error).split())[:200]
        _log.warning(
            "no Triton kernels for %s on %s (%s: %s): plain torch computes instead, %s",
            name, device, type(error).__name__, reason, _PLAIN[name],
        )  # fmt: skip
        return None
    return module
