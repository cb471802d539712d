"""A naive switching loop in plain transformers, the baseline of `bench switching`.

In: prompts. Out: token ids per prompt, with the engine's distributions but not its draws. Two models with a
`DynamicCache` each generate one token a step in left-padded batches; `torch.multinomial` draws the owner's token. Once
all live rows of AdaSwitch have switched, the student is not called. A batch ends when its longest row does.
`pack_weights` gives the loop the packed weights that switchkd's engines have on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from switchkd.engines.models.cpu_prepack import PackedLinear, can_pack, prepack

Decide = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(p_logits [B, V], q_logits [B, V], drafted [B], t) -> the teacher owns token t, bool [B]."""


def pack_weights(model: Any) -> Any:
    """Make all linear layers of a model on a CPU, its output layer too, use packed weights. Returns the model."""
    prepack(model)
    layer = model.get_output_embeddings()
    if can_pack(layer.weight):
        layer.forward = PackedLinear(layer.weight, layer.bias).forward
    return model


class NaiveSwitching:
    def __init__(self, teacher: Any, student: Any, *, pad_id: int, stop_ids: frozenset[int], vocab_size: int) -> None:
        self.teacher = teacher
        self.student = student
        self.pad_id = pad_id
        self.vocab_size = vocab_size
        self.stops = torch.tensor(sorted(stop_ids), device=student.device)

    def run(
        self, prompts: Sequence[Sequence[int]], rule: Callable[[], Decide], *, batch_size: int, max_new_tokens: int
    ) -> list[list[int]]:
        """Generate all completions, batch by batch. `rule()` returns a new decision for each batch."""
        completions: list[list[int]] = []
        for first in range(0, len(prompts), batch_size):
            completions += self._batch(prompts[first : first + batch_size], rule(), max_new_tokens)
        return completions

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[Sequence[int]], decide: Decide, max_new_tokens: int) -> list[list[int]]:
        device, width = self.student.device, max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        caches = [DynamicCache(), DynamicCache()]
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        switched = torch.zeros_like(done)
        columns: list[Tensor] = []
        for t in range(max_new_tokens):
            p_logits = self._step(self.teacher, caches[0], ids, mask, positions)
            needed = not bool((switched | done).all())
            q_logits = self._step(self.student, caches[1], ids, mask, positions) if needed else p_logits
            drafted = _draw(q_logits)
            owned = decide(p_logits, q_logits, drafted, t)
            switched = getattr(decide, "switched", switched)
            tokens = torch.where(owned, _draw(p_logits), drafted).masked_fill(done, self.pad_id)
            columns.append(tokens)
            done |= torch.isin(tokens, self.stops)
            if bool(done.all()):
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return [self._cut(row) for row in torch.stack(columns, dim=1).tolist()]

    def _step(self, model: Any, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1, : self.vocab_size].float()
        return logits

    def _cut(self, tokens: list[int]) -> list[int]:
        stops = set(self.stops.tolist())
        end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
        return tokens[:end]


def _draw(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


# --- the three rules: their papers' formulas on a batch ------------------------------------------------------------


HALF_LIFE = 16.0
K, L, MIN_DIVERGENCE = 3.0, 10, 1e-6


def switch(p_logits: Tensor, q_logits: Tensor, drafted: Tensor, t: int) -> Tensor:
    """Compare JSD in base 2 with 2^(-t / HALF_LIFE)."""
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    nats = 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))
    return nats / torch.log(torch.tensor(2.0)) > 2 ** (-t / HALF_LIFE)


class AdaSwitch:
    """Compares KL(p‖q) with K times the mean of its last L values; after the switch the teacher owns all tokens."""

    def __init__(self) -> None:
        self.divergences: list[Tensor] = []
        self.switched = torch.zeros(0, dtype=torch.bool)

    def __call__(self, p_logits: Tensor, q_logits: Tensor, drafted: Tensor, t: int) -> Tensor:
        if len(self.switched) == 0:
            self.switched = torch.zeros(len(p_logits), dtype=torch.bool, device=p_logits.device)
        if bool(self.switched.all()):
            return self.switched
        p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        if len(self.divergences) >= L:
            tau = (K * torch.stack(self.divergences[-L:]).mean(0)).clamp(min=MIN_DIVERGENCE)
            self.switched = self.switched | (kl > tau)
        self.divergences.append(kl)
        return self.switched


def skd(p_logits: Tensor, q_logits: Tensor, drafted: Tensor, t: int) -> Tensor:
    """Return whether the drafted id is not among the teacher's 25 most likely."""
    return ~(p_logits.topk(25, dim=-1).indices == drafted[:, None]).any(-1)
