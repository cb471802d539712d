"""Verifies drafted blocks: decides which model writes each token, and accepts or replaces the drafted ones.

In: slots with the tokens that one of the models drafted, and both models' distributions at every drafted position.
Out: the slots, longer by at least one token each, and how many tokens of each draft are accepted.

Both models draw with the same keyed Gumbel numbers, so a token may be the drafted one whichever model writes it. A
block continues as long as the emitted token equals the drafted one. A student's block ends where the teacher writes the
token and draws another one; a teacher's block where the student does. Even then the emitted token is kept. The outcome
depends neither on the block size nor on the drafter.

The writer of a token depends on statistic and memory only, never on a draw: the writers of all positions are known
before a token is drawn, and only the draws that may be emitted are made.

Shapes: R slots, K drafted positions (ragged, `counts`), W columns that are verified together, n live slots of R,
N live positions, flat, V shared vocabulary, M memory of the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.losses import uncertainty
from switchkd.algo.noise import Purpose, coin
from switchkd.algo.sampling import NEAR_TIE, SamplingParams
from switchkd.algo.switching import Rule
from switchkd.algo.topk import TopK, coarse_grain, kept, spread
from switchkd.algo.transfer import to_device, to_host
from switchkd.rollout.state import RolloutParams, RolloutSlots
from switchkd.rollout.top_logprobs import TopTokens
from switchkd.types import TokenSource

VERIFY_COLUMNS = 4
"""Columns that are verified together on a CPU: one product with each LM head, little of it beyond a block's end."""

Draw = Callable[..., Any]
"""`algo.sampling.draw`, or a function that draws the same tokens."""
Rows = Callable[[np.ndarray, np.ndarray], Tensor]
"""Float32 logits [N, V] of drafted position `positions[i]` of row `rows[i]` of the block."""
TopRows = Callable[[np.ndarray, np.ndarray], TopK]
RecordOutcome = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Gets verified positions: t int [N], written by the teacher bool [N], whether both models' draws differ: 1, 0, or -1
where only one of them was made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftBlock:
    """One model's draft for R slots. tokens int64 [R, K] (-1 beyond counts [R] >= 1); nothing is drafted after a stop
    id or beyond a completion's limit."""

    tokens: np.ndarray
    counts: np.ndarray
    by_teacher: bool
    p_rows: Rows
    q_rows: Rows
    top_rows: TopRows | None = None  # `teacher.output: top_logprobs`: all that is known of the teacher's rows
    on_device: bool = False
    """A device verifies all columns at once and makes all draws of a block in one call: waiting for the results of the
    first ones costs more than draws that are not used."""

    @property
    def columns(self) -> int:
        """How many columns are verified together."""
        return self.tokens.shape[1] if self.on_device else VERIFY_COLUMNS


def verify(
    state: RolloutSlots,
    slots: np.ndarray,
    block: DraftBlock,
    *,
    params: RolloutParams,
    version: int,
    stop_ids: np.ndarray,
    draw: Draw,
    record_outcome: RecordOutcome | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Accept or replace the tokens of one block per slot; all slots share `params`.

    Returns the numbers of emitted tokens and of accepted ones (those that equal the drafted token), int [R] each. With
    `record_outcome`, both models draw at the first position of every block, whichever writes it.
    """
    num_emitted, num_accepted = np.zeros((2, len(slots)), np.int64)
    alive = np.arange(len(slots))
    for first in range(0, block.tokens.shape[1], block.columns):
        alive = alive[block.counts[alive] > first]
        if len(alive) == 0:
            break
        window = _Window(state, slots, block, alive, first, params, draw)
        decision = _decide(window)
        outcome = _emitted(window, decision, probe=record_outcome is not None and first == 0)
        if record_outcome is not None:
            at = outcome.mask
            record_outcome(window.t[at], decision.by_teacher[at], outcome.differ[at])
        _write(window, decision, outcome, version, stop_ids)
        num_emitted[alive] += outcome.mask.sum(1)
        num_accepted[alive] += outcome.num_accepted
        rejected = outcome.num_accepted < window.live.sum(1)
        state.num_rejections[slots[alive]] += rejected
        alive = alive[~rejected]
    if params.rule.teacher_only is not None:
        state.teacher_only[slots] = params.teacher_only(state.memory[slots, : params.rule.memory_size])
    return num_emitted, num_accepted


def keyed_draws(
    state: RolloutSlots,
    slots: np.ndarray,
    t: np.ndarray,
    logits: Tensor,
    *,
    draw: Draw,
    params: RolloutParams,
    sampling: SamplingParams,
    purpose: Purpose,
) -> np.ndarray:
    """Draws of completion tokens t [N] of `slots` [N] from logits [N, V], int64 [N]; near ties are counted."""
    if len(slots) == 0:
        return np.zeros(0, np.int64)
    tokens, margins = draw(
        logits,
        run_seed=params.seed,
        rollout_ids=state.rollout_ids[slots],
        positions=t,
        purpose=purpose,
        sampling=sampling,
        return_margin=True,
    )
    np.add.at(state.num_near_ties, slots, margins < NEAR_TIE)
    return tokens


class _Window:
    """The live slots of a block at the columns from `first` on: which positions were drafted, and both models'
    distributions there. Rules that read no rows get none, and LM heads see only rows that are asked for."""

    def __init__(
        self,
        state: RolloutSlots,
        slots: np.ndarray,
        block: DraftBlock,
        alive: np.ndarray,
        first: int,
        params: RolloutParams,
        draw: Draw,
    ) -> None:
        self.state = state
        self.block = block
        self.alive = alive
        self.first = first
        self.params = params
        self._draw = draw
        self.slots = slots[alive]
        columns = np.arange(first, min(first + block.columns, block.tokens.shape[1]))
        self.drafted = block.tokens[np.ix_(alive, columns)]
        self.live = columns < block.counts[alive, None]
        self.t = state.t(self.slots)[:, None] + np.arange(len(columns))
        self._i, self._j = np.nonzero(self.live)
        self._place = np.zeros(self.live.shape, np.int64)
        self._place[self._i, self._j] = np.arange(len(self._i))
        needs_rows = params.rule.needs_rows
        self._p = block.p_rows(alive[self._i], first + self._j) if needs_rows and block.top_rows is None else None
        self._q = block.q_rows(alive[self._i], first + self._j) if needs_rows else None
        self._student: np.ndarray | None = None  # the student's draws, where the rule reads them
        if block.by_teacher and params.rule.needs_draft:
            drawn = self._draws(self._i, self._j, self.q_rows(self._i, self._j), params.student, params.purpose)
            self._student = self.drafted.copy()
            self._student[self._i, self._j] = drawn

    def values(self) -> np.ndarray:
        """The rule's statistic, and the smallest and largest value that rounding might give it: float64 [3, n, W], 0
        where nothing was drafted."""
        i, j, rule = self._i, self._j, self.params.rule
        p_logits, q_logits, drafted, coins = self._p, self._q, None, None
        if self.block.top_rows is not None and q_logits is not None:
            rows = self.block.top_rows(self.alive[i], self.first + j).to(q_logits.device)
            p_logits, q_logits = _coarse_rows(rule, rows, q_logits)
        if rule.needs_coins:
            coins = torch.from_numpy(coin(self.params.seed, self.state.rollout_ids[self.slots[i]], self.t[i, j]))
        if rule.needs_draft:
            student = self.drafted if self._student is None else self._student
            drafted = torch.from_numpy(student[i, j])
        values = np.zeros((3, *self.live.shape))
        inputs = {"p_logits": p_logits, "q_logits": q_logits, "drafted": drafted, "coins": coins}
        values[:, i, j] = to_host(_values(rule, **inputs)).numpy()
        return values

    def draws(self, i: np.ndarray, j: np.ndarray, by_teacher: np.ndarray) -> np.ndarray:
        """The draw of the teacher, or else the student, at positions (i, j): int64 [N]. SKD's replacement has a
        separate purpose: its test looks at the drafted id, so shared noise would bias the replacement."""
        tokens = np.empty(len(i), np.int64)
        if by_teacher.any():
            k, m, params = i[by_teacher], j[by_teacher], self.params
            purpose = params.rule.replacement if _replaces(params.rule) else params.purpose
            tokens[by_teacher] = self._draws(k, m, self._rows_to_draw(k, m), params.teacher, purpose)
        if not by_teacher.all():
            k, m = i[~by_teacher], j[~by_teacher]
            tokens[~by_teacher] = self._student_draws(k, m)
        return tokens

    def _student_draws(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        if self._student is not None:
            return self._student[i, j]
        return self._draws(i, j, self.q_rows(i, j), self.params.student, self.params.purpose)

    def _draws(
        self, i: np.ndarray, j: np.ndarray, logits: Tensor, sampling: SamplingParams, purpose: Purpose
    ) -> np.ndarray:
        how: dict[str, Any] = {"draw": self._draw, "params": self.params, "sampling": sampling, "purpose": purpose}
        return keyed_draws(self.state, self.slots[i], self.t[i, j], logits, **how)

    def _rows_to_draw(self, i: np.ndarray, j: np.ndarray) -> Tensor:
        """Logits [N, V] from which the teacher draws. Of a compressed row these are the kept ids, renormalised, as a
        teacher that sends such rows draws itself (`within_top`): exact where the teacher's top_k ends within them, or
        its temperature is 0."""
        if self.block.top_rows is None:
            return self.p_rows(i, j)
        return kept(self.block.top_rows(self.alive[i], self.first + j))

    def tops(self, i: np.ndarray, j: np.ndarray, num: int) -> tuple[TopTokens, TopTokens]:
        """The teacher's and the student's `num` most likely ids at positions (i, j)."""
        student = TopTokens.of(self.q_rows(i, j), num)
        if self.block.top_rows is None:
            return TopTokens.of(self.p_rows(i, j), num), student
        rows = self.block.top_rows(self.alive[i], self.first + j)
        return TopTokens.padded(rows.ids[:, :num], rows.logprobs[:, :num], num), student

    def q_rows(self, i: np.ndarray, j: np.ndarray) -> Tensor:
        """The student's logits [N, V] at positions (i, j)."""
        return self._rows(self._q, self.block.q_rows, i, j)

    def p_rows(self, i: np.ndarray, j: np.ndarray) -> Tensor:
        """The teacher's logits [N, V] at positions (i, j)."""
        return self._rows(self._p, self.block.p_rows, i, j)

    def _rows(self, ready: Tensor | None, make: Rows, i: np.ndarray, j: np.ndarray) -> Tensor:
        if ready is None:
            return make(self.alive[i], self.first + j)
        places = self._place[i, j]
        return ready if len(places) == len(ready) else ready[to_device(places, ready.device)]


class _Decision(NamedTuple):
    """Which model writes each position of a window, and why; [n, W] each but `memory`."""

    by_teacher: np.ndarray  # bool
    statistic: np.ndarray  # float64, NaN where it was not computed
    threshold: np.ndarray  # float64
    near_tie: np.ndarray  # bool, rounding might change the writer
    memory: np.ndarray | None  # float64 [W + 1, n, M], the rule's before the first token, and after each


def _decide(window: _Window) -> _Decision:
    rule, t = window.params.rule, window.t
    statistic, low, high = window.values()
    steps = window.state.steps[window.slots]
    if rule.memory_size == 0:
        empty = np.zeros((t.size, 0))
        shown, threshold, _ = _step(rule, statistic.ravel(), t.ravel(), np.repeat(steps, t.shape[1]), empty)
        shown, threshold, memory = shown.reshape(t.shape), threshold.reshape(t.shape), None
    else:
        shown, threshold = np.empty_like(statistic), np.empty_like(statistic)
        memory = np.empty((t.shape[1] + 1, len(t), rule.memory_size))
        memory[0] = window.state.memory[window.slots, : rule.memory_size]
        for k in range(t.shape[1]):
            shown[:, k], threshold[:, k], memory[k + 1] = _step(rule, statistic[:, k], t[:, k], steps, memory[k])
    switched = np.isnan(shown) & ~np.isnan(statistic)  # a rule has no statistic after a permanent switch
    wants = np.where(switched, 0.0, statistic) > threshold
    if window.params.teacher_budget is not None:
        spent = window.state.num_teacher[window.slots, None] + np.cumsum(wants, 1) - wants
        wants &= spent < window.params.teacher_budget
    return _Decision(wants, shown, threshold, (low <= threshold) & (threshold < high), memory)


def _step(
    rule: Rule, statistic: np.ndarray, t: np.ndarray, steps: np.ndarray, memory: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The statistic, NaN after a permanent switch, the threshold and the updated memory of one token each."""
    before = torch.from_numpy(memory)
    values = torch.from_numpy(statistic)
    shown = statistic
    if rule.teacher_only is not None:
        settled = rule.teacher_only(before)
        values = values.masked_fill(settled, 0.0)
        shown = np.where(settled.numpy(), np.nan, statistic)
    threshold = rule.threshold(torch.from_numpy(t), torch.from_numpy(steps), before)
    after = rule.update(before, values, threshold) if rule.memory_size else before
    return shown, threshold.numpy(), after.numpy()


class _Outcome(NamedTuple):
    """The tokens of a window, [n, W] each."""

    tokens: np.ndarray  # int64
    mask: np.ndarray  # bool, emitted
    differ: np.ndarray  # whether both models' draws differ: 1, 0, or -1 where only one was made
    num_accepted: np.ndarray  # int [n]


def _emitted(window: _Window, decision: _Decision, *, probe: bool) -> _Outcome:
    """Each writer's draw up to the first that is not the drafted token. The drafter's own tokens are in the block."""
    block, by_teacher, replaced = window.block, decision.by_teacher, _replaces(window.params.rule)
    tokens, differ = window.drafted.copy(), np.full(window.live.shape, -1)
    same = window.live.copy()
    unknown = window.live & (by_teacher != block.by_teacher)
    if block.by_teacher and replaced:
        unknown = window.live.copy()
    if probe and not (replaced and not block.by_teacher):
        others = np.flatnonzero(~unknown[:, 0] if not replaced else by_teacher[:, 0])
        first = np.zeros(len(others), np.int64)
        drawn = window.draws(others, first, np.full(len(others), not block.by_teacher))
        differ[others, 0] = drawn != window.drafted[others, 0]
    while unknown.any():
        if block.on_device:
            i, j = np.nonzero(unknown)
        else:
            i = np.flatnonzero(unknown.any(1))
            j = unknown[i].argmax(1)
        drawn = window.draws(i, j, by_teacher[i, j])
        tokens[i, j] = drawn
        same[i, j] = drawn == window.drafted[i, j]
        other = by_teacher[i, j] != block.by_teacher
        differ[i[other], j[other]] = ~same[i[other], j[other]]
        unknown[i, j] = False
        unknown[i[~same[i, j]]] = False
    num_accepted = np.logical_and.accumulate(same, axis=1).sum(1)
    mask = window.live & (np.arange(same.shape[1]) <= num_accepted[:, None])
    return _Outcome(tokens, mask, differ, num_accepted)


def _write(window: _Window, decision: _Decision, outcome: _Outcome, version: int, stop_ids: np.ndarray) -> None:
    """Append a window's emitted tokens to their slots, with what decided them."""
    state, params, slots = window.state, window.params, window.slots
    i, j = np.nonzero(outcome.mask)
    t = window.t[i, j]
    tokens = outcome.tokens[i, j]
    counts = outcome.mask.sum(1)
    state.tokens[slots[i], state.prompt_lens[slots[i]] + t] = tokens
    state.statistic[slots[i], t] = decision.statistic[i, j]
    state.threshold[slots[i], t] = decision.threshold[i, j]
    state.num_near_ties[slots] += (decision.near_tie & outcome.mask).sum(1)
    if decision.memory is not None:
        state.memory[slots, : params.rule.memory_size] = decision.memory[counts, np.arange(len(slots))]
    if params.wants_uncertainty:
        p_logits = window.p_rows(i, j)
        values = uncertainty(p_logits, to_device(tokens, p_logits.device))
        state.uncertainty[slots[i], t] = to_host(values).numpy()
    if params.top_logprobs:
        state.keep_tops(slots[i], t, *window.tops(i, j, params.top_logprobs))
    sources = np.where(decision.by_teacher[i, j], TokenSource.TEACHER, TokenSource.STUDENT)
    state.emit(slots, counts, sources=sources, version=version, stop_ids=stop_ids)


def _replaces(rule: Rule) -> bool:
    return rule.replacement != Purpose.GUMBEL


def _coarse_rows(rule: Rule, row: TopK, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a rule sees of compressed ones: both distributions on the kept ids and one bin for the tail. A
    rule that reads the drafted id gets whole rows, the tail spread evenly: ids of the tail rank after all kept ones."""
    return (spread(row, q_logits.shape[1]), q_logits) if rule.needs_draft else coarse_grain(row, q_logits)


def _values(rule: Rule, **inputs: Tensor | None) -> Tensor:
    """The rule's statistic, and the smallest and largest value that rounding might give it: float64 [3, N]."""
    statistic = rule.statistic(**inputs).double()
    if rule.bounds is not None:
        low, high = rule.bounds(**inputs)
    else:
        error = NEAR_TIE if rule.needs_rows else 0.0  # coins are exact
        low, high = statistic - error, statistic + error
    return torch.stack([statistic, low, high])
