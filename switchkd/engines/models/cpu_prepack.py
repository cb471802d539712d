"""Matrices in the order in which a CPU's matrix unit reads them: a short step is bound by how fast weights come in.

In: a weight [out, in] on a CPU. Out: the same product, from a second copy of the weight in oneDNN's blocked order. On
two cores a step of 8 rows is 1.7 times as fast (float32), an output layer of 49k rows 3 times. Without the copy each
product would bring the weight into that order again, or do without.

Layers that read the same input (q, k, v; gate, up) become one product: another 5 to 8% of a step of 8 rows.

Only for reading: no gradient passes through. oneDNN's operators are those that `torch.compile` freezes models with;
where this build of torch lacks them, or their answer differs, the plain product is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from switchkd.config.errors import ConfigError

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
        self._packed = _reordered(self.weight)

    def product(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], both in the weight's dtype."""
        return linear(x, self.weight, self.bias) if _is_plain(x) else _times(x, self._packed, self.bias)


class FusedLinear:
    """Layers that read the same input: the first one asked computes for all, the others take their parts.

    Any order of calls is right, the usual one (each once, first to last, with the same tensor) is fast.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._sizes = [layer.weight.shape[0] for layer in layers]
        self._seen: Tensor | None = None
        self._parts: Sequence[Tensor] = ()
        self.refresh()

    def refresh(self) -> None:
        with torch.inference_mode():
            biases = [layer.bias for layer in self.layers]
            self._bias = None if biases[0] is None else torch.cat(biases)
            self._packed = _reordered(torch.cat([layer.weight for layer in self.layers]))
        self._seen, self._parts = None, ()

    def product(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` makes of x [..., in]: a part of [..., all outputs], so not contiguous."""
        layer = self.layers[index]
        if _is_plain(x):
            return linear(x, layer.weight, layer.bias)
        if index == 0 or x is not self._seen:
            self._seen, self._parts = x, _times(x, self._packed, self._bias).split(self._sizes, -1)
        part = self._parts[index]
        if index == len(self.layers) - 1:
            self._seen, self._parts = None, ()  # keeps no activation alive
        return part


def _reordered(weight: Tensor) -> Tensor:
    with torch.inference_mode():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def _times(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def _is_plain(x: Tensor) -> bool:
    """Nothing to compute, or a gradient to pass: oneDNN's operators do neither."""
    return x.numel() == 0 or (torch.is_grad_enabled() and x.requires_grad)


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
    packed: list[Prepacked | FusedLinear] = []
    for group in _sharing(model):
        packed.append(together := FusedLinear(group))
        for index, layer in enumerate(group):
            layer.forward = partial(together.product, index)
    for layer in layers:
        if can_pack(layer.weight) and "forward" not in vars(layer):
            packed.append(alone := Prepacked(layer.weight, layer.bias))
            layer.forward = alone.product
    if switch == "on" and not packed:
        raise ConfigError(
            f"{key}: on, but no layer of this {model.dtype} model on {model.device} can be packed; it takes a CPU with "
            f"oneDNN and float32 or bfloat16: set {key}: auto"
        )

    def refresh() -> None:
        for copied in packed:
            copied.refresh()

    return refresh


_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _sharing(model: Any) -> Iterator[list[Any]]:
    """Groups of linear layers that transformers' models call with the same input, and that can be one matrix."""
    for module in model.modules():
        for names in _SAME_INPUT:
            group: list[Any] = [getattr(module, name, None) for name in names]
            if not all(type(layer) is torch.nn.Linear for layer in group) or not can_pack(group[0].weight):
                continue
            alike = {(x.weight.device, x.weight.dtype, x.weight.shape[1], x.bias is None) for x in group}
            if len(alike) == 1:
                yield group
