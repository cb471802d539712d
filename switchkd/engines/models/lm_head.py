"""A model's output layer taken apart, so that hidden states can travel instead of rows of logits.

In: a causal language model. Out: its final hidden states, and the `LMHead` that makes float32 logits of them,
anywhere; with the arrays in which both travel.

Shapes: N positions, D hidden width, V shared vocabulary, B sequences, T positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from switchkd.config.errors import ConfigError
from switchkd.engines.models.cpu_prepack import Prepacked, can_pack
from switchkd.engines.wire import from_numpy, to_numpy

# How far a rebuilt logit may lie from the model's own, as a share of the largest: rounding of the model's dtype.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class LMHeadState:
    """An output head as it travels."""

    weight: np.ndarray  # [V, D], bfloat16 as uint16
    weight_dtype: str
    bias: np.ndarray  # float32 [V], or [0] without one
    scale: float
    softcap: float  # 0 for none


class LMHead:
    """logits = cap(scale * (hidden @ weight.T + bias)), computed in the weight's dtype, float32 by default.

    The soft-cap is Gemma-2's: cap(x) = c * tanh(x / c).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, scale: float = 1.0,
                 softcap: float = 0.0) -> None:  # fmt: skip
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap
        self.vocab_size = weight.shape[0]
        self._packed: Prepacked | None = None

    def prepack(self) -> LMHead:
        """Keep a second copy of the weight, in the order that a CPU reads fastest; nothing where that cannot be."""
        if can_pack(self.weight):
            self._packed = Prepacked(self.weight, self.bias)
        return self

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] in any float dtype to float32 [..., V]. Differentiable in `hidden`."""
        hidden = hidden.to(device=self.weight.device, dtype=self.weight.dtype)
        if self._packed is not None:
            out = self._packed.product(hidden)
        else:
            out = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return scaled_logits(out, scale=self.scale, softcap=self.softcap)

    def copy_from(self, model: Any) -> None:
        """Take the model's present weights, in place: who holds this head sees the new ones."""
        layer = model.get_output_embeddings()
        with torch.no_grad():
            self.weight.copy_(layer.weight[: self.vocab_size])
            if self.bias is not None:
                self.bias.copy_(layer.bias[: self.vocab_size])
        if self._packed is not None:
            self._packed.refresh()

    def to_arrays(self) -> LMHeadState:
        """As bfloat16 where that loses nothing (the usual checkpoint), which halves what travels."""
        weight = self.weight.detach()
        short = weight.to(torch.bfloat16)
        if torch.equal(short.to(weight.dtype), weight):
            weight = short
        values, dtype = to_numpy(weight)
        bias = np.zeros(0, np.float32) if self.bias is None else self.bias.detach().float().cpu().numpy()
        return LMHeadState(weight=values, weight_dtype=dtype, bias=bias, scale=self.scale, softcap=self.softcap)

    @classmethod
    def from_arrays(
        cls, arrays: LMHeadState, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LMHead:
        """The head on another process's device."""
        weight = from_numpy(arrays.weight, arrays.weight_dtype, device).to(dtype)
        bias = torch.tensor(arrays.bias, device=device, dtype=dtype) if len(arrays.bias) else None
        return cls(weight, bias, scale=arrays.scale, softcap=arrays.softcap)


def scaled_logits(product: torch.Tensor, *, scale: float, softcap: float) -> torch.Tensor:
    """float32 logits of what the output layer's matrix gave, row by row: what a `LMHead` does after the product."""
    out = product.float()
    if scale != 1.0:
        out = out * scale
    if softcap:
        out = torch.tanh(out / softcap) * softcap
    return out


def lm_head_of(model: Any, vocab_size: int, dtype: torch.dtype = torch.float32) -> LMHead:
    """The output head of any causal language model, cut to the shared vocabulary, checked against the model's own
    logits. Shares the model's memory where the dtype allows.

    Raises ConfigError where the logits are not of LinearHead's form.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    name = model.config.name_or_path or type(model).__name__
    if weight is None or weight.ndim != 2 or weight.shape[0] < vocab_size:
        shape = None if weight is None else tuple(weight.shape)
        raise ConfigError(
            f"the output layer of {name} has a weight of shape {shape}, {vocab_size} rows are needed; set "
            f"teacher.output: logits, or take a model that knows the whole tokenizer"
        )
    bias = getattr(layer, "bias", None)
    weight = weight.detach()[:vocab_size].to(dtype)
    bias = None if bias is None else bias.detach()[:vocab_size].to(dtype)
    hidden, own = _probe(model)
    return fitted_head(weight, bias, model.config.get_text_config(), hidden, own, dtype=model.dtype, name=name)


def fitted_head(weight: torch.Tensor, bias: torch.Tensor | None, config: Any, hidden: torch.Tensor, own: torch.Tensor,
                *, dtype: torch.dtype, name: str, remedy: str = "set teacher.output: logits") -> LMHead:  # fmt: skip
    """The head with the scale and the soft-cap that make a model's own logits [N, its vocabulary] of its hidden states
    [N, D], within rounding of the model's `dtype`. Raises ConfigError where none does."""
    own = own[..., : len(weight)]
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    limit, errors = _TOLERANCE.get(dtype, 1e-4), {}
    for scale in _scales(config):
        head = LMHead(weight, bias, scale=scale, softcap=softcap)
        errors[scale] = float((head.logits(hidden) - own.to(weight.device)).abs().max() / own.abs().max())
        if errors[scale] <= limit:
            return head
    raise ConfigError(
        f"the logits of {name} cannot be rebuilt from its last hidden state (relative error "
        f"{min(errors.values()):.2g}, limit {limit:.2g}); {remedy}"
    )


def final_hidden(model: Any, **inputs: Any) -> torch.Tensor:
    """The input of the output layer at every position, [B, T, D], whatever the model does before it. No logits are
    computed: the output layer is run on no rows at all."""
    seen: list[torch.Tensor] = []

    def take(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden[:0]

    with _before_head(model, take):
        model(**inputs)
    if not seen:
        raise _unhookable(model)
    return seen[0]


def own_logits(model: Any, rows: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The model's own logits, float32 [N, its vocabulary], at the flat positions `rows` (int64 [N], row-major in
    [B, T])."""
    seen: list[bool] = []

    def pick(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(True)
        return hidden.flatten(0, 1)[rows.to(hidden.device)][None]

    with _before_head(model, pick):
        logits = model(**inputs).logits
    flat = logits.flatten(0, 1)
    return (flat if seen else flat[rows.to(flat.device)]).float()


@contextmanager
def _before_head(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While inside, the output layer gets change(its input)."""
    layer = model.get_output_embeddings()
    if layer is None:
        yield
        return
    handle = layer.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _unhookable(model: Any) -> ConfigError:
    return ConfigError(f"{type(model).__name__} does not call its output layer as a module; set teacher.output: logits")


def _scales(config: Any) -> list[float]:
    """Factors that a config announces for its logits, most likely first. The same name multiplies in one family and
    divides in another (Granite divides by `logits_scaling`, HyperCLOVA X multiplies), so the probe decides."""
    scales = []
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scales += [float(value), 1.0 / float(value)]
    return [*scales, 1.0]


@torch.no_grad()
def _probe(model: Any, num_tokens: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the model's own float32 logits on a few fixed pseudo-random tokens."""
    seen: list[torch.Tensor] = []

    def look(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden

    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, size, (1, num_tokens))).to(model.device)
    with _before_head(model, look):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if not seen:
        raise _unhookable(model)
    return seen[0][0], logits[0].float()
