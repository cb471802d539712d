"""The student as one module whose forward is the loss, so that ZeRO's hooks see every use of a weight.

In: a Batch, the step's plan, the loss. Out: the micro-batch's share of the step's loss, a scalar to run backward from;
and the way back, the plain weights. Nothing here knows of DeepSpeed.

Shapes: N loss tokens, D the student's hidden width, V the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.algo.chunked_loss import chunked_loss
from switchkd.algo.losses import atkd_weights, cross_entropy, forward_kl, token_weights
from switchkd.algo.topk import TopK, concatenated, unpack
from switchkd.algo.topk_losses import coarse
from switchkd.engines.models.lm_head import LMHead, final_hidden, finished
from switchkd.learner.batching import Batch, LossSpec
from switchkd.types import BatchAssignment, TokenSource

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]


class OutputLayer(nn.Module):
    """The student's last layer with the loss behind it. It owns the layer's parameters a second time, as tied ones.

    Trap: under ZeRO-3 a call of a module may gather its weights from all ranks, and ranks have different numbers of
    chunks. So the loop over chunks must be inside *one* module call, and must not call modules itself.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: Any, *, vocab_size: int, scale: float, softcap: float, chunk: int) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = getattr(layer, "bias", None)
        self.vocab_size, self.scale, self.softcap, self.chunk = vocab_size, scale, softcap, chunk

    def forward(self, hidden: Tensor, *, teacher: Callable[[slice], Tensor | TopK | None], batch: Batch,
                objective: StepLoss) -> Tensor:  # fmt: skip
        """[N, D] to the weighted sum of the losses."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if len(weight) > self.vocab_size:  # rows beyond the shared vocabulary do not exist
            weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
        return chunked_loss(
            hidden, weight, bias, partial(finished, scale=self.scale, softcap=self.softcap), teacher, batch.labels,
            torch.ones_like(batch.labels, dtype=torch.bool), objective.weights, objective.per_token, objective.extras,
            self.chunk,
        )  # fmt: skip


class StepLoss:
    """The loss of one micro-batch: weights that hold the whole step's denominators, and what is seen on the way."""

    def __init__(self, spec: LossSpec, assignment: BatchAssignment, batch: Batch) -> None:
        self.spec = spec
        self.seen: dict[str, list[Tensor]] = {"loss": [], "kl": [], "lm": []}
        mask = torch.ones_like(batch.labels, dtype=torch.bool)
        self.weights = token_weights(mask, num_loss_tokens=assignment.num_loss_tokens)
        self.extras: dict[str, Tensor] = {}
        if spec.hard_frac is not None:
            hard = batch.uncertainty >= assignment.hard_threshold
            num_easy = assignment.num_loss_tokens - assignment.num_hard
            self.weights = atkd_weights(mask, hard, num_easy=num_easy, num_hard=assignment.num_hard)
            self.extras["hard"] = hard
            self.extras["unc"] = batch.uncertainty
        if spec.lm_coef:
            # over all tokens of the step, whatever the other loss divides by
            share = spec.lm_coef / max(assignment.num_loss_tokens, 1) / self.weights
            self.extras["lm_weight"] = torch.where(batch.sources == TokenSource.DATA, share, 0.0)

    def per_token(self, p_logits: Tensor | TopK | None, q_logits: Tensor, labels: Tensor, mask: Tensor,
                  *, lm_weight: Tensor | None = None, **extras: Tensor) -> Tensor:  # fmt: skip
        """What chunked_loss calls for a few rows at a time."""
        loss = self._distance(p_logits, q_logits, labels, mask, extras)
        if not loss.requires_grad:  # a constant, of a user's own: ranks wait for each other in every backward pass
            loss = loss + 0 * q_logits.sum(-1)
        self._record("loss", loss)
        if p_logits is not None:
            with torch.no_grad():
                if self.spec.name == "forward_kl":
                    kl = loss
                elif isinstance(p_logits, TopK):  # of the coarse-grained laws: from below
                    kl = coarse(forward_kl, p_logits, q_logits, labels, mask)
                else:
                    kl = forward_kl(p_logits, q_logits, labels, mask)
            self._record("kl", kl)
        if lm_weight is None:
            return loss
        lm = cross_entropy(None, q_logits, labels, mask)
        self._record("lm", lm)
        return loss + lm_weight * lm

    def _distance(
        self, p: Tensor | TopK | None, q_logits: Tensor, labels: Tensor, mask: Tensor, extras: dict[str, Tensor]
    ) -> Tensor:
        if isinstance(p, TopK):
            if self.spec.tail is None:
                raise ValueError(f"loss {self.spec.name} takes whole rows, but the teacher sent its top k only")
            return self.spec.tail(p, q_logits, labels, mask, **self.spec.numbers, **extras)
        whole = {name: tensor for name, tensor in extras.items() if name != "unc"}
        return self.spec.per_token(p, q_logits, labels, mask, **self.spec.numbers, **whole)

    def of(self, name: str) -> Tensor | None:
        """Per-token numbers seen in the forward pass, [N]: `loss`, `kl` (with a teacher), `lm` (with lm_coef)."""
        return torch.cat(self.seen[name]) if self.seen[name] else None

    def _record(self, name: str, values: Tensor) -> None:
        self.seen[name].append(values.detach())


class StudentModule(nn.Module):
    """What DeepSpeed wraps: model, output layer, loss."""

    def __init__(self, model: nn.Module, *, vocab_size: int, scale: float, softcap: float, chunk: int) -> None:
        super().__init__()
        self.model = model  # a causal language model, or peft's wrapper of one
        layer = causal_model(model).get_output_embeddings()
        _check_output_layer(causal_model(model), layer)
        self.output = OutputLayer(layer, vocab_size=vocab_size, scale=scale, softcap=softcap, chunk=chunk)

    def forward(self, batch: Batch, objective: StepLoss, heads: Mapping[str, LMHead]) -> Tensor:
        """The micro-batch's share of the step's loss. Already divided: shares of all micro-batches and ranks add up."""
        hidden = final_hidden(
            causal_model(self.model), input_ids=batch.input_ids, attention_mask=batch.attention_mask,
            position_ids=batch.position_ids, use_cache=False,
        )  # fmt: skip
        states = hidden[batch.rows, batch.positions]
        teacher = teacher_rows(batch, heads, self.output.vocab_size)
        return self.output(states, teacher=teacher, batch=batch, objective=objective)


def teacher_rows(batch: Batch, heads: Mapping[str, LMHead], vocab_size: int) -> Callable[[slice], Tensor | TopK | None]:
    """The teacher's logits for a slice of the loss tokens, float32 [n, V], made when asked for; compressed rows as they
    are."""
    kinds = {segment.kind for segment in batch.teacher}
    if "top_logprobs" in kinds and len(kinds) > 1:
        raise ValueError(
            f"signals of kinds {sorted(kinds)} came in one batch; resume with the teacher.output of before"
        )
    for segment in batch.teacher:
        if segment.kind == "hidden_states" and segment.teacher not in heads:
            raise ValueError(
                f"hidden states of teacher {segment.teacher!r} came in, the learner has heads of {sorted(heads)}"
            )

    def values_of(tokens: slice) -> Tensor | TopK:
        """Compressed rows."""
        parts = [
            unpack(segment.values[max(tokens.start - segment.start, 0) : tokens.stop - segment.start])
            for segment in batch.teacher
            if max(tokens.start, segment.start) < min(tokens.stop, segment.stop)
        ]
        return concatenated(parts)

    def rows_of(tokens: slice) -> Tensor | None:
        parts = []
        for segment in batch.teacher:
            start, stop = max(tokens.start, segment.start), min(tokens.stop, segment.stop)
            if start < stop:
                values = segment.values[start - segment.start : stop - segment.start]
                parts.append(values.float() if segment.kind == "logits" else heads[segment.teacher].logits(values))
        if parts:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        return None if batch.teacher else torch.zeros(0, vocab_size, device=batch.labels.device)

    if "top_logprobs" in kinds:
        return values_of
    return rows_of if batch.teacher or not len(batch.labels) else lambda _: None


def causal_model(model: Any) -> Any:
    """The transformers model inside peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def full_tensors(model: nn.Module, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """The student's weights under their own names, layer by layer, adapters merged on the way, tied ones once.

    `gather(parameters)` makes whole tensors of partitioned ones while it is open: use each tensor before asking for the
    next one. All ranks must run to the end.
    """
    seen: set[int] = set()
    inside: str | None = None  # an adapter layer, whose parts are not weights of their own
    for prefix, module in causal_model(model).named_modules():
        if inside and prefix.startswith(inside):
            continue
        adapter = hasattr(module, "get_delta_weight")
        own = [p for _, p in module.named_parameters(recurse=adapter)]
        layer = module.base_layer if adapter else module
        with torch.no_grad(), gather(own):
            for name, parameter in layer.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                delta = adapter and name == "weight"
                yield f"{prefix}.{name}".lstrip("."), (parameter + _delta(module) if delta else parameter).detach()
        if adapter:
            inside = f"{prefix}."


def _delta(adapter: Any) -> Tensor:
    return sum(adapter.get_delta_weight(name) for name in adapter.active_adapters)


def _check_output_layer(causal: Any, layer: nn.Module) -> None:
    for name, module in causal.named_modules():
        if hasattr(module, "get_delta_weight") and module.base_layer.weight is getattr(layer, "weight", None):
            raise ValueError(f"LoRA's target_modules include {name}, which is (tied to) the output layer: leave it out")
