"""Verifies drafted blocks: decides token by token which model writes, and accepts or replaces the drafted token.

In: rows with the tokens that one of the models drafted, and both models' distributions at every drafted position.
Out: the rows, longer by at least one token each, and how many tokens of each draft are accepted.

Both models draw with the same keyed Gumbel numbers, so a token may be the drafted one whichever model writes it. A
block continues as long as the emitted token equals the drafted one. A student's block ends where the teacher writes the
token and draws another one; a teacher's block where the student does. Even then the emitted token is kept. The outcome
depends neither on the block size nor on the drafter.

Shapes: R rows, K drafted positions (ragged, `counts`), V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.losses import uncertainty
from switchkd.algo.noise import Purpose, coin
from switchkd.algo.sampling import NEAR_TIE, SamplingParams, draw
from switchkd.algo.switching import Rule
from switchkd.algo.topk import TopK, coarse_grain, kept, spread
from switchkd.rollout.state import RolloutState
from switchkd.rollout.top_logprobs import TopTokens
from switchkd.types import TokenSource

VERIFY_COLUMNS = 4
"""Columns whose distributions are made together: one product with each LM head, little of it beyond a block's end."""

Rows = Callable[[np.ndarray, np.ndarray], Tensor]
"""Float32 logits [n, V] of drafted position `positions[i]` of row `rows[i]`."""
TopRows = Callable[[np.ndarray, np.ndarray], TopK]
RecordOutcome = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Gets verified positions: t int [n], written by the teacher bool [n], whether both models' draws differ: 1, 0, or -1
where only one of them was made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftBlock:
    """One model's draft for R rows. tokens int64 [R, K] (-1 beyond counts [R] >= 1)."""

    tokens: np.ndarray
    counts: np.ndarray
    by_teacher: bool
    p_rows: Rows
    q_rows: Rows
    top_rows: TopRows | None = None  # `teacher.output: top_logprobs`: all that is known of the teacher's rows

    def of(self, members: list[int]) -> DraftBlock:
        """The block of some rows only."""
        if len(members) == len(self.tokens):
            return self
        index, top_rows = np.array(members), self.top_rows
        return DraftBlock(
            tokens=self.tokens[index],
            counts=self.counts[index],
            by_teacher=self.by_teacher,
            p_rows=lambda r, k: self.p_rows(index[r], k),
            q_rows=lambda r, k: self.q_rows(index[r], k),
            top_rows=None if top_rows is None else lambda r, k: top_rows(index[r], k),
        )


def verify(
    rows: list[RolloutState],
    block: DraftBlock,
    *,
    version: int,
    stop_ids: frozenset[int],
    record_outcome: RecordOutcome | None = None,
) -> np.ndarray:
    """Accept or replace the tokens of one block per row; all rows share `RolloutParams`.

    Returns num_accepted int [R]: how many emitted tokens equal the drafted ones, from the left. With `record_outcome`,
    both models draw at the first position of every block, whichever writes it.
    """
    num_accepted = np.zeros(len(rows), np.int64)
    alive = np.arange(len(rows))
    for first in range(0, block.tokens.shape[1], VERIFY_COLUMNS):
        alive = alive[block.counts[alive] > first]
        if len(alive) == 0:
            break
        span = _Window(rows, block, alive, first)
        for k in range(first, min(first + VERIFY_COLUMNS, block.tokens.shape[1])):
            alive = alive[block.counts[alive] > k]
            if len(alive) == 0:
                break
            same = _settle(rows, span, alive, k, version, stop_ids, record_outcome)
            num_accepted[alive[same]] += 1
            for r in alive[~same]:
                rows[r].stats.num_rejections += 1
            ended = np.array([bool(rows[r].finish_reason) for r in alive])
            alive = alive[same & ~ended]
    return num_accepted


def _settle(
    rows: list[RolloutState],
    span: _Window,
    alive: np.ndarray,
    k: int,
    version: int,
    stop_ids: frozenset[int],
    record_outcome: RecordOutcome | None,
) -> np.ndarray:
    """Verify position k of rows `alive`: whether each emitted token is the drafted one, bool [n]."""
    params, block = rows[0].params, span.block
    t = np.array([rows[r].t for r in alive])
    decision = _decide(rows, span, alive, k)
    owned = decision.wants & np.array([rows[r].teacher_may_write for r in alive])
    proposed = block.tokens[alive, k]
    tokens, differ = _tokens(rows, span, alive, k, owned, probe=record_outcome is not None and k == 0)
    if record_outcome is not None:
        record_outcome(t, owned, differ)
    if params.wants_uncertainty:
        for r, value in zip(alive, span.uncertainty(alive, k, tokens).tolist(), strict=True):
            rows[r].uncertainty.append(value)
    if params.top_logprobs:
        for r, p, q in zip(alive, *span.tops(alive, k, params.top_logprobs), strict=True):
            rows[r].teacher_top.append(p)
            rows[r].student_top.append(q)
    for i, r in enumerate(alive):
        row = rows[r]
        row.memory = decision.memory[i : i + 1]
        row.statistic.append(float(decision.statistic[i]))
        row.threshold.append(float(decision.threshold[i]))
        row.stats.num_near_ties += int(decision.near_tie[i])
        row.accept(int(tokens[i]), TokenSource.TEACHER if owned[i] else TokenSource.STUDENT, version, stop_ids)
    return tokens == proposed


class _Decision(NamedTuple):
    """Which model writes one token of n rows, and why."""

    wants: np.ndarray  # bool [n], the teacher
    statistic: Tensor  # float64 [n], NaN where it was not computed
    threshold: Tensor  # float64 [n]
    memory: Tensor  # float64 [n, M], the rule's, after this token
    near_tie: np.ndarray  # bool [n], rounding might change the writer


def _decide(rows: list[RolloutState], span: _Window, alive: np.ndarray, k: int) -> _Decision:
    rule = rows[0].params.rule
    memory = torch.cat([rows[r].memory for r in alive])
    t, step = torch.tensor([(rows[r].t, rows[r].step) for r in alive]).T
    statistic, low, high = span.values[:, alive, k - span.first]
    shown = statistic
    if rule.teacher_only is not None:  # after its switch a rule has no statistic, whichever model drafts
        settled = rule.teacher_only(memory)
        statistic, shown = statistic.masked_fill(settled, 0.0), shown.masked_fill(settled, torch.nan)
    threshold = rule.threshold(t, step, memory)
    memory = rule.update(memory, statistic, threshold)
    near_tie = (low <= threshold) & (threshold < high)
    return _Decision((statistic > threshold).numpy(), shown, threshold, memory, near_tie.numpy())


def _coarse_rows(rule: Rule, row: TopK, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a rule sees of compressed ones: both distributions on the kept ids and one bin for the tail. A
    rule that reads the drafted id gets whole rows, the tail spread evenly: ids of the tail rank after all kept ones."""
    return (spread(row, q_logits.shape[1]), q_logits) if rule.needs_draft else coarse_grain(row, q_logits)


def _values(rule: Rule, **inputs: Tensor | None) -> Tensor:
    """The rule's statistic, and the smallest and largest value that rounding might give it: float64 [3, n]."""
    statistic = rule.statistic(**inputs).double()
    if rule.bounds is not None:
        low, high = rule.bounds(**inputs)
    else:
        error = NEAR_TIE if rule.needs_rows else 0.0  # coins are exact
        low, high = statistic - error, statistic + error
    return torch.stack([statistic, low, high])


def _tokens(
    rows: list[RolloutState], span: _Window, alive: np.ndarray, k: int, owned: np.ndarray, *, probe: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Each writer's draw, int64 [n], and whether the two models' draws differ (1, 0, -1 for unknown).

    The drafter's own tokens are in the block already. SKD's replacement has a separate purpose: its test looks at the
    drafted id, so shared noise would bias the replacement.
    """
    params, block = rows[0].params, span.block
    drafted = block.tokens[alive, k]
    tokens, differ = drafted.copy(), np.full(len(alive), -1)
    replaced = params.rule.replacement != Purpose.GUMBEL
    if block.by_teacher:
        drawn = ~owned | probe
        other = span.student_draws(alive[drawn], k)
        tokens[~owned] = other[~owned[drawn]]
        if replaced and owned.any():
            tokens[owned] = _teacher_draws(rows, span, alive[owned], k, params.rule.replacement)
    else:
        drawn = owned | (probe and not replaced)
        other = _teacher_draws(rows, span, alive[drawn], k, params.rule.replacement if replaced else params.purpose)
        tokens[owned] = other[owned[drawn]]
    differ[drawn] = other != drafted[drawn]
    return tokens, differ


def _teacher_draws(rows: list[RolloutState], span: _Window, which: np.ndarray, k: int, purpose: Purpose) -> np.ndarray:
    if len(which) == 0:
        return np.zeros(0, np.int64)
    logits = span.rows_to_draw(which, k)
    return draws(rows, which, np.zeros(len(which), int), logits, rows[0].params.teacher, purpose)


def draws(
    rows: list[RolloutState],
    which: np.ndarray,
    ahead: np.ndarray,
    logits: Tensor,
    sampling: SamplingParams,
    purpose: Purpose,
) -> np.ndarray:
    """Keyed draws from logits [n, V] for rows `which`, `ahead[i]` positions after their next one: int64 [n]."""
    tokens, margins = draw(
        logits,
        run_seed=rows[which[0]].params.seed,
        rollout_ids=[rows[r].task.rollout_id for r in which],
        positions=[rows[r].t + int(a) for r, a in zip(which, ahead, strict=True)],
        purpose=purpose,
        sampling=sampling,
        return_margin=True,
    )
    for r, margin in zip(which, margins, strict=True):
        rows[r].stats.num_near_ties += int(margin < NEAR_TIE)
    return tokens


class _Window:
    """Both distributions of the live rows at the columns from `first` on, VERIFY_COLUMNS at most, and `_values` of the
    rule there: float64 [3, R, columns], NaN where nothing was drafted. A rule that reads no rows gets none."""

    def __init__(self, rows: list[RolloutState], block: DraftBlock, alive: np.ndarray, first: int) -> None:
        self.rows, self.block, self.first = rows, block, first
        params, rule = rows[0].params, rows[0].params.rule
        width = min(VERIFY_COLUMNS, block.tokens.shape[1] - first)
        live = np.zeros((len(rows), width), bool)
        live[alive] = first + np.arange(width) < block.counts[alive, None]
        r, k = np.nonzero(live)
        self._place = np.full(live.shape, -1)
        self._place[r, k] = np.arange(len(r))
        self._p = block.p_rows(r, first + k) if rule.needs_rows and block.top_rows is None else None
        self._q = block.q_rows(r, first + k) if rule.needs_rows else None
        self._drawn: dict[int, int] = {}
        drafted = block.tokens[r, first + k]
        if block.by_teacher and rule.needs_draft:
            logits = self._q if self._q is not None else block.q_rows(r, first + k)
            drafted = draws(rows, r, k, logits, params.student, params.purpose)
            self._drawn = dict(zip(self._place[r, k].tolist(), drafted.tolist(), strict=True))
        coins = coin(params.seed, [rows[i].task.rollout_id for i in r], np.array([rows[i].t for i in r], int) + k)
        p_logits, q_logits = self._p, self._q
        if block.top_rows is not None and q_logits is not None:
            p_logits, q_logits = _coarse_rows(rule, block.top_rows(r, first + k).to(q_logits.device), q_logits)
        inputs = {"drafted": torch.from_numpy(drafted) if rule.needs_draft else None, "coins": torch.from_numpy(coins)}
        self.values = torch.full((3, *live.shape), torch.nan, dtype=torch.float64)
        self.values[:, r, k] = _values(rule, p_logits=p_logits, q_logits=q_logits, **inputs).cpu()

    def rows_to_draw(self, which: np.ndarray, k: int) -> Tensor:
        """Logits [n, V] from which the teacher draws at position k of rows `which`. Of a compressed row these are the
        kept ids, renormalised, as a teacher that sends such rows draws itself (`within_top`): exact where the
        teacher's top_k ends within them, or its temperature is 0."""
        if self.block.top_rows is None:
            return self.p_rows(which, k)
        return kept(self.block.top_rows(which, np.full(len(which), k)))

    def uncertainty(self, which: np.ndarray, k: int, tokens: np.ndarray) -> Tensor:
        """ATKD's UnC of the emitted tokens, [n]."""
        p_logits = self.p_rows(which, k)
        return uncertainty(p_logits, torch.from_numpy(tokens).to(p_logits.device))

    def tops(self, which: np.ndarray, k: int, num: int) -> tuple[list[TopTokens], list[TopTokens]]:
        """Each model's `num` most likely ids at position k of rows `which`, one piece a row."""
        student = TopTokens.of(self.q_rows(which, k), num)
        if self.block.top_rows is None:
            return TopTokens.of(self.p_rows(which, k), num).split(), student.split()
        rows = self.block.top_rows(which, np.full(len(which), k))
        return TopTokens.padded(rows.ids[:, :num], rows.logprobs[:, :num], num).split(), student.split()

    def q_rows(self, which: np.ndarray, k: int) -> Tensor:
        """The student's logits [n, V] at position k of rows `which`."""
        return self._rows(self._q, self.block.q_rows, which, k)

    def p_rows(self, which: np.ndarray, k: int) -> Tensor:
        """The teacher's logits [n, V] at position k of rows `which`."""
        return self._rows(self._p, self.block.p_rows, which, k)

    def student_draws(self, which: np.ndarray, k: int) -> np.ndarray:
        """The student's own draws at position k of rows `which`: int64 [n]."""
        if len(which) == 0:
            return np.zeros(0, np.int64)
        if self._drawn:
            return np.array([self._drawn[int(place)] for place in self._place[which, k - self.first]], np.int64)
        params = self.rows[0].params
        logits = self.q_rows(which, k)
        return draws(self.rows, which, np.zeros(len(which), int), logits, params.student, params.purpose)

    def _rows(self, ready: Tensor | None, make: Rows, which: np.ndarray, k: int) -> Tensor:
        if ready is None:
            return make(which, np.full(len(which), k))
        return ready[torch.from_numpy(self._place[which, k - self.first]).to(ready.device)]
