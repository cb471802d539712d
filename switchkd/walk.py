"""The decision at the heart of it: walk drafted blocks and settle, token by token, who writes what.

In: rows with their drafted tokens and both models' distributions at every drafted position. Out: the rows, longer by
at least one token each, and how far each draft held.

Both models draw with the same keyed Gumbel numbers, so a token may be the drafted one although the teacher owns it.
A block stays valid as long as the settled token equals the drafted one; it breaks where the teacher owns the token and
its coupled draw differs, and even then the settled token is kept. The outcome does not depend on the block size.

Shapes: R rows, K drafted positions (ragged, `counts`), V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.losses import uncertainty
from switchkd.algo.sampling import Purpose, coin, draw
from switchkd.rows import Row
from switchkd.types import Source

NEAR_TIE = 1e-4
"""Two scores (log-prob + Gumbel), or a statistic and its threshold, closer than this may fall either way under
another batch shape. Such tokens are counted, not hidden."""


def walk(
    rows: list[Row],
    drafted: np.ndarray,
    counts: np.ndarray,
    q_logits: Tensor | None,
    teacher_rows: Callable[[np.ndarray, np.ndarray], Tensor],
    *,
    version: int,
    stop_ids: frozenset[int],
) -> np.ndarray:
    """Settle the tokens of one block per row; all rows share rule, sampling and training step.

    drafted int64 [R, K], counts int [R] >= 1, q_logits float32 [R, K, V] (None when the rule reads no rows),
    teacher_rows(r, k) gives the teacher's float32 logits [n, V] of drafted positions k of rows r.
    Returns held int [R]: how many settled tokens equal the drafted ones, from the left.
    """
    mode, rule = rows[0].mode, rows[0].mode.rule
    statistic = _look(rows, drafted, counts, q_logits, teacher_rows)
    held = np.zeros(len(rows), np.int64)
    alive = np.arange(len(rows))
    for k in range(drafted.shape[1]):
        alive = alive[counts[alive] > k]
        if len(alive) == 0:
            break
        memory = torch.cat([rows[r].memory for r in alive])
        t = torch.tensor([rows[r].t for r in alive])
        now = statistic[alive, k]
        threshold = rule.threshold(t, rows[alive[0]].step, memory)
        memory = rule.update(memory, now, threshold)
        wants = (now > threshold).numpy()
        owned = np.array([bool(want) and rows[r].teacher_may_write for r, want in zip(alive, wants, strict=True)])
        tokens = drafted[alive, k].copy()
        if owned.any():
            tokens[owned] = _teacher_draws(rows, alive[owned], k, teacher_rows)
        if mode.wants_uncertainty:
            _note_uncertainty(rows, alive, k, tokens, teacher_rows)
        near = ((now - threshold).abs() < NEAR_TIE).numpy()
        for i, r in enumerate(alive):
            row = rows[r]
            row.memory = memory[i : i + 1]
            row.statistic.append(float(now[i]))
            row.threshold.append(float(threshold[i]))
            row.num_near_ties += int(near[i])
            row.accept(int(tokens[i]), Source.TEACHER if owned[i] else Source.STUDENT, version, stop_ids)
        same = tokens == drafted[alive, k]
        held[alive[same]] += 1
        for r in alive[~same]:
            rows[r].num_breaks += 1
        alive = np.array([r for r, ok in zip(alive, same, strict=True) if ok and not rows[r].finish_reason], np.int64)
    return held


def _look(
    rows: list[Row],
    drafted: np.ndarray,
    counts: np.ndarray,
    q_logits: Tensor | None,
    teacher_rows: Callable[[np.ndarray, np.ndarray], Tensor],
) -> Tensor:
    """The rule's statistic at every drafted position: float64 [R, K], NaN where nothing was drafted."""
    rule, seed = rows[0].mode.rule, rows[0].mode.seed
    r, k = np.nonzero(np.arange(drafted.shape[1])[None, :] < counts[:, None])
    ids = np.array([rows[i].task.rollout_id for i in r], np.int64)
    positions = np.array([rows[i].t for i in r], np.int64) + k
    coins = coin(seed, ids, positions)
    values = rule.statistic(
        p_logits=teacher_rows(r, k) if rule.needs_rows else None,
        q_logits=q_logits[r, k] if rule.needs_rows and q_logits is not None else None,
        drafted=torch.from_numpy(drafted[r, k]),
        coins=torch.from_numpy(coins),
    )
    statistic = torch.full(drafted.shape, torch.nan, dtype=torch.float64)
    statistic[r, k] = values.double().cpu()
    return statistic


def _teacher_draws(
    rows: list[Row], which: np.ndarray, k: int, teacher_rows: Callable[[np.ndarray, np.ndarray], Tensor]
) -> np.ndarray:
    """The teacher's own coupled draws at drafted position k of rows `which`: int64 [n]. SKD's replacement has its own
    purpose: its test looks at the drafted id, so sharing that noise would bend the law."""
    mode = rows[0].mode
    purpose = mode.rule.replacement if mode.rule.replacement != Purpose.GUMBEL else mode.purpose
    tokens, margin = draw(
        teacher_rows(which, np.full(len(which), k)),
        run_seed=mode.seed,
        rollout_ids=[rows[r].task.rollout_id for r in which],
        positions=[rows[r].t for r in which],
        purpose=purpose,
        sampling=mode.teacher,
        return_margin=True,
    )
    for r, gap in zip(which, margin, strict=True):
        rows[r].num_near_ties += int(gap < NEAR_TIE)
    return tokens


def _note_uncertainty(
    rows: list[Row],
    alive: np.ndarray,
    k: int,
    tokens: np.ndarray,
    teacher_rows: Callable[[np.ndarray, np.ndarray], Tensor],
) -> None:
    """ATKD's UnC = 1 - p(token) of the settled tokens, while the teacher's row is at hand."""
    p_logits = teacher_rows(alive, np.full(len(alive), k))
    values = uncertainty(p_logits, torch.from_numpy(tokens).to(p_logits.device))
    for r, value in zip(alive, values.tolist(), strict=True):
        rows[r].uncertainty.append(value)
