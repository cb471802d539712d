"""The student as one module whose forward is the loss, so that ZeRO's hooks see every use of a weight.

In: a Batch, the step's assignment, the loss. Out: the micro-batch's share of the step's loss, a differentiable scalar;
and the plain weights of the trained student. Nothing here imports DeepSpeed.

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
from switchkd.engines.models.lm_head import LMHead, final_hidden, scaled_logits
from switchkd.learner.batching import Batch, LossSpec
from switchkd.types import BatchAssignment, TokenSource

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]


class OutputLayer(nn.Module):
    """The student's output layer followed by the loss. It registers the layer's parameters again, as tied ones.

    Trap: under ZeRO-3 a call of a module may gather its weights from all ranks, and ranks have different numbers of
    chunks. So the loop over chunks must be inside *one* module call, and must not call modules.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: Any, *, vocab_size: int, scale: float, softcap: float, chunk: int) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = getattr(layer, "bias", None)
        self.vocab_size = vocab_size
        self.scale = scale
        self.softcap = softcap
        self.chunk = chunk

    def forward(
        self, hidden: Tensor, *, teacher: Callable[[slice], Tensor | TopK | None], batch: Batch, step_loss: StepLoss
    ) -> Tensor:
        """[N, D] to the weighted sum of the losses."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if len(weight) > self.vocab_size:  # rows beyond the shared vocabulary are not used
            weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
        return chunked_loss(
            hidden,
            weight,
            bias,
            partial(scaled_logits, scale=self.scale, softcap=self.softcap),
            teacher,
            batch.labels,
            torch.ones_like(batch.labels, dtype=torch.bool),
            step_loss.weights,
            step_loss.per_token,
            step_loss.extras,
            self.chunk,
        )


class StepLoss:
    """The loss of one micro-batch: weights with the whole step's denominators, and per-token values by name."""

    def __init__(self, spec: LossSpec, assignment: BatchAssignment, batch: Batch) -> None:
        self.spec = spec
        self._recorded: dict[str, list[Tensor]] = {"loss": [], "kl": [], "lm": []}
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
            # divided by all tokens of the step, independently of the other loss's denominator
            share = spec.lm_coef / max(assignment.num_loss_tokens, 1) / self.weights
            self.extras["lm_weight"] = torch.where(batch.sources == TokenSource.DATA, share, 0.0)

    def per_token(
        self,
        p_logits: Tensor | TopK | None,
        q_logits: Tensor,
        labels: Tensor,
        mask: Tensor,
        *,
        lm_weight: Tensor | None = None,
        **extras: Tensor,
    ) -> Tensor:
        """The loss of each token; chunked_loss calls it for a few rows at a time."""
        loss = self._distance(p_logits, q_logits, labels, mask, extras)
        if not loss.requires_grad:  # a constant loss of the user's: every rank must run a backward pass
            loss = loss + 0 * q_logits.sum(-1)
        self._record("loss", loss)
        if p_logits is not None:
            with torch.no_grad():
                if self.spec.name == "forward_kl":
                    kl = loss
                elif isinstance(p_logits, TopK):  # KL of the coarse-grained distributions, a lower bound
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

    def recorded(self, name: str) -> Tensor | None:
        """Per-token values of the forward pass, [N]: `loss`, `kl` (with a teacher), `lm` (with lm_coef)."""
        return torch.cat(self._recorded[name]) if self._recorded[name] else None

    def _record(self, name: str, values: Tensor) -> None:
        self._recorded[name].append(values.detach())


class StudentModule(nn.Module):
    """Model, output layer and loss: the module that DeepSpeed wraps."""

    def __init__(self, model: nn.Module, *, vocab_size: int, scale: float, softcap: float, chunk: int) -> None:
        super().__init__()
        self.model = model  # a causal language model, or peft's wrapper of one
        layer = causal_model(model).get_output_embeddings()
        _check_output_layer(causal_model(model), layer)
        self.output = OutputLayer(layer, vocab_size=vocab_size, scale=scale, softcap=softcap, chunk=chunk)

    def forward(self, batch: Batch, step_loss: StepLoss, teacher_lm_heads: Mapping[str, LMHead]) -> Tensor:
        """The micro-batch's share of the step's loss: the step's loss is the sum over all micro-batches and ranks."""
        hidden = final_hidden(
            causal_model(self.model),
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        states = hidden[batch.rows, batch.positions]
        return self.output(states, teacher=teacher_rows(batch, teacher_lm_heads), batch=batch, step_loss=step_loss)


def teacher_rows(batch: Batch, lm_heads: Mapping[str, LMHead]) -> Callable[[slice], Tensor | TopK | None]:
    """Return a function that gives the teacher's rows of a slice of the loss tokens: float32 logits [n, V], or a TopK
    for top-k rows; None where the batch has no teacher. Raises ValueError for mixed kinds or a missing LM head."""
    kinds = {segment.kind for segment in batch.teacher}
    if "top_logprobs" in kinds and len(kinds) > 1:
        raise ValueError(
            f"one batch holds teacher outputs of kinds {sorted(kinds)}; resume with the teacher.output of before"
        )
    for segment in batch.teacher:
        if segment.kind == "hidden_states" and segment.teacher not in lm_heads:
            raise ValueError(
                f"the batch holds hidden states of teacher {segment.teacher!r}, the learner has LM heads of "
                f"{sorted(lm_heads)}"
            )

    def rows_of(tokens: slice) -> Tensor | TopK:
        parts: list[Any] = []
        for segment in batch.teacher:
            start, stop = max(tokens.start, segment.start), min(tokens.stop, segment.stop)
            if start >= stop:
                continue
            values = segment.values[start - segment.start : stop - segment.start]
            match segment.kind:
                case "hidden_states":
                    parts.append(lm_heads[segment.teacher].logits(values))
                case "top_logprobs":
                    parts.append(unpack(values))
                case _:
                    parts.append(values.float())
        if len(parts) == 1:
            return parts[0]
        return concatenated(parts) if "top_logprobs" in kinds else torch.cat(parts)

    return rows_of if batch.teacher else lambda _: None


def causal_model(model: Any) -> Any:
    """The transformers model inside peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def full_tensors(model: nn.Module, gather: Gather) -> Iterator[tuple[str, Tensor]]:
    """The student's weights by name, layer by layer, with merged adapters; tied weights appear once.

    `gather(parameters)` is a context in which partitioned tensors are whole: use each tensor before the next one. All
    ranks must run to the end.
    """
    yielded: set[int] = set()
    adapter_prefix: str | None = None  # of an adapter layer, whose submodules hold no weights of the student
    for prefix, module in causal_model(model).named_modules():
        if adapter_prefix and prefix.startswith(adapter_prefix):
            continue
        is_adapter = hasattr(module, "get_delta_weight")
        layer = module.base_layer if is_adapter else module
        with torch.no_grad(), gather(list(module.parameters(recurse=is_adapter))):
            for name, parameter in layer.named_parameters(recurse=False):
                if id(parameter) in yielded:
                    continue
                yielded.add(id(parameter))
                merged = parameter
                if is_adapter and name == "weight":
                    merged = parameter + sum(module.get_delta_weight(active) for active in module.active_adapters)
                yield f"{prefix}.{name}".lstrip("."), merged.detach()
        if is_adapter:
            adapter_prefix = f"{prefix}."


def _check_output_layer(causal: Any, layer: nn.Module) -> None:
    for name, module in causal.named_modules():
        if hasattr(module, "get_delta_weight") and module.base_layer.weight is getattr(layer, "weight", None):
            raise ValueError(f"LoRA's target_modules include {name}, which is (tied to) the output layer: leave it out")
