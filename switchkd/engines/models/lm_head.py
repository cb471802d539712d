"""A model's output layer on its own, so that a process can send hidden states instead of rows of logits.

In: a causal language model. Out: its final hidden states, and the `LMHead` that computes float32 logits from them in
any process.

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
from switchkd.engines.models.cpu_prepack import PackedLinear, can_pack
from switchkd.engines.wire import from_numpy, to_numpy

# Largest error of a rebuilt logit, relative to the largest logit: rounding of the model's dtype.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class LMHeadState:
    """An LM head as plain arrays, to be sent to another process."""

    weight: np.ndarray  # [V, D], bfloat16 as uint16
    weight_dtype: str
    bias: np.ndarray  # float32 [V], or [0] without one
    scale: float
    softcap: float  # 0 for none


class LMHead:
    """logits = cap(scale * (hidden @ weight.T + bias)), computed in the weight's dtype, float32 by default.

    The soft-cap is Gemma-2's: cap(x) = c * tanh(x / c).
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, scale: float = 1.0, softcap: float = 0.0
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.scale = scale
        self.softcap = softcap
        self.vocab_size = weight.shape[0]
        self._packed: PackedLinear | None = None

    def prepack(self) -> LMHead:
        """Keep a second copy of the weight in the order that a CPU reads fastest, where that is possible."""
        if can_pack(self.weight):
            self._packed = PackedLinear(self.weight, self.bias)
        return self

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] in any float dtype to float32 [..., V]. Differentiable in `hidden`."""
        hidden = hidden.to(device=self.weight.device, dtype=self.weight.dtype)
        if self._packed is not None:
            out = self._packed.forward(hidden)
        else:
            out = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return scaled_logits(out, scale=self.scale, softcap=self.softcap)

    def copy_from(self, model: Any) -> None:
        """Copy the model's current weights, in place."""
        layer = model.get_output_embeddings()
        with torch.no_grad():
            self.weight.copy_(layer.weight[: self.vocab_size])
            if self.bias is not None:
                self.bias.copy_(layer.bias[: self.vocab_size])
        if self._packed is not None:
            self._packed.refresh()

    def to_state(self) -> LMHeadState:
        """The LM head as arrays, the weight as bfloat16 where that is exact (the usual checkpoint): half the bytes."""
        weight = self.weight.detach()
        as_bfloat16 = weight.to(torch.bfloat16)
        if torch.equal(as_bfloat16.to(weight.dtype), weight):
            weight = as_bfloat16
        values, dtype = to_numpy(weight)
        bias = np.zeros(0, np.float32) if self.bias is None else self.bias.detach().float().cpu().numpy()
        return LMHeadState(weight=values, weight_dtype=dtype, bias=bias, scale=self.scale, softcap=self.softcap)

    @classmethod
    def from_state(cls, state: LMHeadState, device: torch.device | str = "cpu") -> LMHead:
        """The LM head in float32 on `device`."""
        weight = from_numpy(state.weight, state.weight_dtype, device).float()
        bias = torch.tensor(state.bias, device=device, dtype=torch.float32) if len(state.bias) else None
        return cls(weight, bias, scale=state.scale, softcap=state.softcap)


def scaled_logits(product: torch.Tensor, *, scale: float, softcap: float) -> torch.Tensor:
    """Scale, then soft-cap the output layer's product [N, V] to float32 logits [N, V]."""
    out = product.float()
    if scale != 1.0:
        out = out * scale
    if softcap:
        out = torch.tanh(out / softcap) * softcap
    return out


def lm_head_of(model: Any, vocab_size: int, dtype: torch.dtype = torch.float32) -> LMHead:
    """The LM head of any causal language model, cut to the shared vocabulary and checked against the model's logits. It
    shares the model's memory where the dtype is the same. Raises ConfigError where the logits are not of LMHead's form.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    name = model.config.name_or_path or type(model).__name__
    if weight is None or weight.ndim != 2 or weight.shape[0] < vocab_size:
        shape = None if weight is None else tuple(weight.shape)
        raise ConfigError(
            f"the output layer of {name} has a weight of shape {shape}, {vocab_size} rows are needed; take a model "
            "that knows the whole tokenizer, or add rows with model.resize_token_embeddings and save it"
        )
    bias = getattr(layer, "bias", None)
    weight = weight.detach()[:vocab_size].to(dtype)
    bias = None if bias is None else bias.detach()[:vocab_size].to(dtype)
    hidden, logits = _probe(model)
    check_finite(model, logits)
    return fit_lm_head(weight, bias, model.config.get_text_config(), hidden, logits, dtype=model.dtype, name=name)


def fit_lm_head(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: Any,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    *,
    dtype: torch.dtype,
    name: str,
    remedy: str = "set teacher.output: logits where it is the teacher; a student has to be another model",
) -> LMHead:
    """The LM head with the scale and the soft-cap that reproduce a model's logits [N, its vocabulary] from its hidden
    states [N, D], within rounding of the model's `dtype`. Raises ConfigError where no scale does."""
    logits = logits[..., : len(weight)].to(weight.device)
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    limit, errors = _TOLERANCE.get(dtype, 1e-4), []
    for scale in logit_scales(config):
        lm_head = LMHead(weight, bias, scale=scale, softcap=softcap)
        errors.append(float((lm_head.logits(hidden) - logits).abs().max() / logits.abs().max()))
        if errors[-1] <= limit:
            return lm_head
    raise ConfigError(
        f"the logits of {name} cannot be rebuilt from its last hidden state (relative error {min(errors):.2g}, limit "
        f"{limit:.2g}); {remedy}"
    )


def check_finite(model: Any, values: torch.Tensor) -> None:
    """Raise ConfigError where values that the model computed hold NaN or infinity (masked logits may be -inf), and say
    whether its weights do."""
    if not bool((values.isnan() | values.isposinf()).any()):
        return
    name, dtype = model.config.name_or_path or type(model).__name__, str(model.dtype).removeprefix("torch.")
    broken = [key for key, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    if broken:
        raise ConfigError(
            f"model {name} computes NaN or infinity: {len(broken)} of its weight tensors hold them, first {broken[0]} "
            f"(loaded as {dtype}); copy the model again, take an earlier checkpoint, or another dtype"
        )
    raise ConfigError(
        f"model {name} computes NaN or infinity in {dtype}, from finite weights; load it with dtype: float32 (or "
        "bfloat16 instead of float16), or set attn: eager"
    )


def final_hidden(model: Any, **inputs: Any) -> torch.Tensor:
    """The input of the output layer at every position, [B, T, D]. The output layer runs on no rows, so that no logits
    are computed."""
    return _hidden_and_output(model, slice(0, 0), **inputs)[0]


def own_logits(model: Any, rows: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The model's logits, float32 [N, its vocabulary], at flat positions `rows` (int64 [N], row-major in [B, T])."""
    selected: list[bool] = []

    def select(hidden: torch.Tensor) -> torch.Tensor:
        selected.append(True)
        return hidden.flatten(0, 1)[rows.to(hidden.device)][None]

    with _output_layer_input(model, select):
        logits = model(**inputs).logits.flatten(0, 1)
    return (logits if selected else logits[rows.to(logits.device)]).float()


def _hidden_and_output(model: Any, sequences: slice, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """The input of the output layer [B, T, D], and the model's output with logits for some of the B sequences."""
    captured: list[torch.Tensor] = []

    def capture(hidden: torch.Tensor) -> torch.Tensor:
        captured.append(hidden)
        return hidden[sequences]

    with _output_layer_input(model, capture):
        output = model(**inputs)
    if not captured:
        raise ConfigError(
            f"{type(model).__name__} does not call its output layer as a module; set teacher.output: logits"
        )
    return captured[0], output


@contextmanager
def _output_layer_input(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace the output layer's input by change(input) inside the block."""
    layer = model.get_output_embeddings()
    if layer is None:
        yield
        return
    handle = layer.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def logit_scales(config: Any) -> list[float]:
    """Candidates for the scale of a config's logits, most likely first. One name multiplies in one model family and
    divides in another (Granite divides by `logits_scaling`, HyperCLOVA X multiplies), so the probe decides."""
    scales = []
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            scales += [float(value), 1.0 / float(value)]
    return [*scales, 1.0]


@torch.no_grad()
def _probe(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the model's float32 logits on a few fixed pseudo-random tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, size, (1, 8))).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    hidden, output = _hidden_and_output(model, slice(None), **inputs)
    return hidden[0], output.logits[0].float()
