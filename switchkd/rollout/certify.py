"""`teacher.output: top_logprobs`: decide from intervals what is certain, and ask for the exact rows of the rest.

In: rows with the ends between which the rule's statistic lies. Out: a `Verdict` that equals the one of full rows. A
token is decided in four steps, each only for what the one before left open: the cheap interval, the tight one, the
exact row of the token, the exact rows of the tokens that the rule remembers.

Shapes: n rows that are decided together, M numbers of a rule's memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.switching import Rule
from switchkd.algo.topk import TopK, coarse_grain, place_of
from switchkd.rollout.questions import Briefs
from switchkd.rollout.state import Past, RolloutState, Unsure


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Who should write, and why."""

    wants: np.ndarray  # bool [n], the teacher
    seen: Tensor  # float64 [n], the statistic, or the middle of its interval; NaN where nothing is measured
    threshold: Tensor  # float64 [n], or the middle of its interval
    gap: Tensor  # float64 [n], how far statistic and threshold are apart at least
    memory: Tensor  # float64 [n, M], the rule's, after this token (where it is an interval, the lower end)


class Evidence(Protocol):
    """What is known of column k of some rows."""

    @property
    def briefs(self) -> Briefs: ...
    def ends(self, which: np.ndarray, k: int, *, tight: bool) -> tuple[Tensor, Tensor]: ...
    def measure(self, which: np.ndarray, k: int) -> Tensor: ...
    def q_rows(self, which: np.ndarray, k: int) -> Tensor: ...


def certified(rows: list[RolloutState], evidence: Evidence, alive: np.ndarray, k: int) -> Verdict:
    """The decision of full rows for column k of rows `alive`."""
    rule, step = rows[0].params.rule, rows[alive[0]].step
    t = torch.tensor([rows[r].t for r in alive])
    pasts = [_past(rows[r]) for r in alive]
    low, high = (x.clone() for x in evidence.ends(alive, k, tight=False))
    teacher_only = torch.zeros(len(alive), dtype=torch.bool)
    if rule.teacher_only is not None:
        teacher_only = rule.teacher_only(torch.cat([past.low for past in pasts]))
        low, high = low.masked_fill(teacher_only, 0.0), high.masked_fill(teacher_only, 0.0)

    def still_open() -> tuple[np.ndarray, Tensor, Tensor]:
        least, most = (rule.threshold(t, step, torch.cat(memory)) for memory in _ends(pasts))
        return np.flatnonzero(~((low > most) | (high <= least)).numpy()), least, most

    left, least, most = still_open()
    if len(left):
        low[left], high[left] = evidence.ends(alive[left], k, tight=True)
        left, least, most = still_open()
    if len(left):
        low[left] = high[left] = evidence.measure(alive[left], k)
        left, least, most = still_open()
    if len(left):
        _recall(rule, evidence, alive[left], [pasts[i] for i in left])
        left, least, most = still_open()
    if len(left):
        raise RuntimeError(
            f"rule {rule.name} remembers more than its last {rule.memory_size} statistics, or one that is no number: "
            "it cannot be decided from intervals"
        )
    wants = low > most
    if rule.memory_size:
        _remember(rule, evidence, alive, k, pasts, low, high, torch.where(wants, -math.inf, math.inf).double())
    seen = torch.where(high.isfinite(), (low + high) / 2, low).masked_fill(teacher_only, math.nan)
    gap = torch.where(wants, low - most, least - high).masked_fill(teacher_only, math.nan)
    memory = torch.cat([past.low for past in pasts])
    return Verdict(wants=wants.numpy(), seen=seen, threshold=(least + most) / 2, gap=gap, memory=memory)


def coarse_statistic(rule: Rule, row: TopK, q_logits: Tensor, drafted: Tensor, coins: Tensor) -> Tensor:
    """`decide: coarse`: the rule's statistic of the laws on the top k and one bin for the tail, [n]; not certified. The
    rank of a drafted id comes from the top k alone (an id of the tail ranks k + 1)."""
    if rule.needs_draft and rule.interval is not None:
        return rule.interval(row=row, q_logits=q_logits, drafted=drafted, tight=False)[0]
    p, q = coarse_grain(row, q_logits)
    return rule.statistic(p_logits=p, q_logits=q, drafted=place_of(row, drafted.to(row.ids.device)), coins=coins)


def _past(row: RolloutState) -> Past:
    if row.past is None:
        row.past = Past.of(row.memory)
    return row.past


def _ends(pasts: list[Past]) -> tuple[list[Tensor], list[Tensor]]:
    return [past.low for past in pasts], [past.high for past in pasts]


def _recall(rule: Rule, evidence: Evidence, which: np.ndarray, pasts: list[Past]) -> None:
    """Ask for the exact rows of all remembered tokens: each memory becomes the one that full rows would have given."""
    asked = [(r, token) for r, past in zip(which, pasts, strict=True) for token in past.tokens if token.unsure]
    if asked:
        rows, positions = np.array([r for r, _ in asked]), np.array([token.position for _, token in asked])
        p_logits = evidence.briefs.at(rows, positions, "undecided")
        q_logits = torch.stack([token.q_logits for _, token in asked if token.q_logits is not None])
        nothing = torch.zeros(len(asked))
        exact = rule.statistic(p_logits=p_logits, q_logits=q_logits, drafted=nothing.long(), coins=nothing.double())
        for (_, token), value in zip(asked, exact.tolist(), strict=True):
            token.low, token.high, token.q_logits = value, value, None
    for past in pasts:
        past.low, past.high = past.base_low, past.base_high
        for token in past.tokens:
            past.low, past.high = _after(rule, past.low, token, token.low), _after(rule, past.high, token, token.high)


def _remember(rule: Rule, evidence: Evidence, alive: np.ndarray, k: int, pasts: list[Past], low: Tensor, high: Tensor,
              forced: Tensor) -> None:  # fmt: skip
    """Take this token into the memories. A threshold of plus or minus infinity tells the rule what was decided."""
    q_logits = evidence.q_rows(alive, k)
    for i, past in enumerate(pasts):
        ends, position = (float(low[i]), float(high[i])), int(evidence.briefs.first_positions[alive[i]]) + k
        token = Unsure(position, *ends, float(forced[i]), q_logits[i].clone() if ends[0] < ends[1] else None)
        past.low, past.high = _after(rule, past.low, token, ends[0]), _after(rule, past.high, token, ends[1])
        past.tokens.append(token)
        if len(past.tokens) > rule.memory_size:  # what lies behind has no influence any more
            first = past.tokens.pop(0)
            past.base_low = _after(rule, past.base_low, first, first.low)
            past.base_high = _after(rule, past.base_high, first, first.high)
        if rule.teacher_only is not None and bool(rule.teacher_only(past.low)):
            past.tokens.clear()


def _after(rule: Rule, memory: Tensor, token: Unsure, statistic: float) -> Tensor:
    value, forced = (torch.tensor([x], dtype=torch.float64) for x in (statistic, token.forced))
    return rule.update(memory, value, forced)
