"""Weights packed in oneDNN's blocked order for a CPU, where reading the weights bounds the time of a short step.

In: a weight [out, in] on a CPU. Out: the same product, from a second, packed copy of the weight. On two cores a step
of 8 rows is 1.7 times as fast (float32), an output layer of 49k rows 3 times. Layers that read the same input (q, k, v;
gate, up) become one product: another 5 to 8% of a step of 8 rows.

Packed layers pass no gradient. The operators are those that `torch.compile` uses for frozen models; where this build of
torch lacks them, or their result differs, the plain product is used.
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
_ROWS = 256  # rows that the order is optimized for; measured equally good from 1 to 512 rows
MIN_SIZE = 32  # of either dimension; below it the call costs more than the product
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class PackedLinear:
    """`forward(x)` = x @ weight.T + bias for a weight that changes only before `refresh`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.refresh()

    def refresh(self) -> None:
        """Pack the current weight."""
        self._packed = _reordered(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], both in the weight's dtype."""
        if _needs_plain(x):
            return linear(x, self.weight, self.bias)
        return _packed_linear(x, self._packed, self.bias)


class FusedLinear:
    """Layers that read the same input: the first call computes the product of all, the other calls return their parts.

    Every order of calls is correct; the usual one (each layer once, first to last, with the same tensor) is fast.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._sizes = [layer.weight.shape[0] for layer in layers]
        self._last_input: Tensor | None = None
        self._parts: Sequence[Tensor] = ()
        self.refresh()

    def refresh(self) -> None:
        with torch.inference_mode():
            biases = [layer.bias for layer in self.layers]
            self._bias = None if biases[0] is None else torch.cat(biases)
            self._packed = _reordered(torch.cat([layer.weight for layer in self.layers]))
        self._last_input, self._parts = None, ()

    def forward(self, index: int, x: Tensor) -> Tensor:
        """Layer `index` of x [..., in]: a part of [..., all outputs], hence not contiguous."""
        layer = self.layers[index]
        if _needs_plain(x):
            return linear(x, layer.weight, layer.bias)
        if index == 0 or x is not self._last_input:
            self._last_input, self._parts = x, _packed_linear(x, self._packed, self._bias).split(self._sizes, -1)
        part = self._parts[index]
        if index == len(self.layers) - 1:
            self._last_input, self._parts = None, ()  # so that no activation stays alive
        return part


def _reordered(weight: Tensor) -> Tensor:
    with torch.inference_mode():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def _needs_plain(x: Tensor) -> bool:
    """Whether there are no rows, or a gradient must pass: oneDNN's operators support neither."""
    return x.numel() == 0 or (torch.is_grad_enabled() and x.requires_grad)


def can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.ndim == 2
        and min(weight.shape) >= MIN_SIZE
        and weight.is_contiguous()
        and has_packed_product(weight.dtype)
    )


@cache
def has_packed_product(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN computes the plain product, to the rounding of the dtype."""
    if dtype not in _TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator).to(dtype) for n in (48, 5))
    bias = torch.randn(48, generator=generator).to(dtype)
    try:
        product = PackedLinear(weight, bias).forward(x)
    except (AttributeError, RuntimeError):
        return False
    exact = linear(x.double(), weight.double(), bias.double())
    return bool((product.double() - exact).norm() <= _TOLERANCE[dtype] * exact.norm())


def prepack(model: Any, switch: str = "auto", *, key: str = "prepack") -> Callable[[], None]:
    """Make a model's linear layers, all but the output layer (see `LMHead.prepack`), use packed copies of their
    weights. Returns a function to call after a change of the weights.

    `switch`: `on`, `off`, `auto` (a model on a CPU with at most MAX_BYTES of weights). Raises ConfigError, which names
    `key`, for `on` where it cannot work.
    """
    lm_head = model.get_output_embeddings()
    layers: list[Any] = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and layer is not lm_head]
    size = sum(layer.weight.nbytes for layer in layers)
    if switch == "off" or (switch == "auto" and size > MAX_BYTES):
        return lambda: None
    packed: list[PackedLinear | FusedLinear] = []
    for group in _groups_with_one_input(model):
        packed.append(fused := FusedLinear(group))
        for index, layer in enumerate(group):
            layer.forward = partial(fused.forward, index)
    for layer in layers:
        if can_pack(layer.weight) and "forward" not in vars(layer):
            packed.append(single := PackedLinear(layer.weight, layer.bias))
            layer.forward = single.forward
    if switch == "on" and not packed:
        raise ConfigError(
            f"{key}: on, but no layer of this {model.dtype} model on {model.device} can be packed; it takes a CPU with "
            f"oneDNN and float32 or bfloat16: set {key}: auto"
        )

    def refresh() -> None:
        for copy in packed:
            copy.refresh()

    return refresh


_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _groups_with_one_input(model: Any) -> Iterator[list[Any]]:
    """Groups of linear layers that transformers' models call with the same input, and that fit one matrix."""
    for module in model.modules():
        for names in _SAME_INPUT:
            group: list[Any] = [getattr(module, name, None) for name in names]
            if not all(type(layer) is torch.nn.Linear for layer in group) or not can_pack(group[0].weight):
                continue
            if len({(x.weight.device, x.weight.dtype, x.weight.shape[1], x.bias is None) for x in group}) == 1:
                yield group
