"""Matrices in the order in which a CPU's matrix unit reads them: a short step is bound by how fast weights come in.

In: a weight [out, in] on a CPU. Out: the same product, from a second copy of the weight in oneDNN's blocked order. On
two cores a step of 8 rows is 1.7 times as fast (float32), an output layer of 49k rows 3 times. Without the copy each
product would bring the weight into that order again, or do without.

Only for reading: no gradient passes through. oneDNN's operators are those that `torch.compile` freezes models with;
where this build of torch lacks them, or their answer differs, the plain product is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from switchkd.config import ConfigError

MAX_BYTES = 4 * 2**30
"""`auto` packs no model with more than this: the copy is as large as the weights."""
_ROWS = 256  # what the order is chosen for; measured equally good from 1 to 512 rows
_MIN_SIZE = 32  # of either dimension; below, the call costs more than the product
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Prepacked:
    """`product(x)` = x @ weight.T + bias for a weight that changes only before `refresh`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.refresh()

    def refresh(self) -> None:
        """Take the weight as it is now."""
        with torch.inference_mode():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _ROWS)

    def product(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], both in the weight's dtype."""
        if x.numel() == 0 or (torch.is_grad_enabled() and x.requires_grad):
            return linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out


def can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.ndim == 2
        and min(weight.shape) >= _MIN_SIZE
        and weight.is_contiguous()
        and _works(weight.dtype)
    )


@cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN gives the plain product's answer, to the rounding of the dtype."""
    if dtype not in _TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator).to(dtype) for n in (48, 5))
    bias = torch.randn(48, generator=generator).to(dtype)
    try:
        found = Prepacked(weight, bias).product(x)
    except (AttributeError, RuntimeError):
        return False
    wanted = linear(x.double(), weight.double(), bias.double())
    return bool((found.double() - wanted).norm() <= _TOLERANCE[dtype] * wanted.norm())


def prepack(model: Any, switch: str = "auto", *, key: str = "prepack") -> Callable[[], None]:
    """Let a model's linear layers, the output layer left out (see `LinearHead.prepack`), use packed copies of their
    weights. Returns what is to be called after the weights were changed.

    `switch`: `on`, `off`, `auto` (a model on a CPU with at most MAX_BYTES of weights). Raises ConfigError for `on`
    where it cannot work; `key` is named then.
    """
    head = model.get_output_embeddings()
    layers: list[Any] = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and layer is not head]
    size = sum(layer.weight.nbytes for layer in layers)
    if switch == "off" or (switch == "auto" and size > MAX_BYTES):
        return lambda: None
    packed = []
    for layer in layers:
        if can_pack(layer.weight):
            packed.append(Prepacked(layer.weight, layer.bias))
            layer.forward = packed[-1].product
    if switch == "on" and not packed:
        raise ConfigError(
            f"{key}: on, but no layer of this {model.dtype} model on {model.device} can be packed; it takes a CPU with "
            f"oneDNN and float32 or bfloat16: set {key}: auto"
        )

    def refresh() -> None:
        for layer in packed:
            layer.refresh()

    return refresh
