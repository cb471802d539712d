"""Near ties: tokens that rounding might change are counted, and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import STOP, VOCAB, ToyStudent, ToyTeacher, task

from switchkd.algo import switching
from switchkd.algo.sampling import NEAR_TIE, SamplingParams
from switchkd.algo.switching import Rule
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import RolloutParams
from switchkd.types import Rollout

GREEDY = SamplingParams(temperature=0.0)
NEAR, FAR = 0.5 * NEAR_TIE, 2 * NEAR_TIE


def params(rule: Rule, **more) -> RolloutParams:  # type: ignore[no-untyped-def]
    common = {"student": GREEDY, "teacher": GREEDY, "max_new_tokens": 1, "seed": 7}
    return RolloutParams(rule=rule, **{**common, **more})


def near_ties(a_mode: RolloutParams, p_row: torch.Tensor, drafted: int, drafter: str, num: int = 1) -> list[Rollout]:
    """Rollouts of one token: every teacher's row is `p_row`, and the student is sure of `drafted`."""
    q_row = torch.zeros(VOCAB).index_fill(0, torch.tensor([drafted]), 50.0)
    worker = SwitchingGenerator(
        student=ToyStudent(q_row.expand(VOCAB, VOCAB, -1), 4),
        teacher=ToyTeacher(p_row.expand(VOCAB, VOCAB, -1)),
        head=None,
        stop_ids=frozenset({STOP}),
        max_draft_tokens=1 if drafter == "none" else 4,
        drafter=drafter,
    )
    found: list[Rollout] = []
    worker.run([GenerationRequest(task=task(i), params=a_mode) for i in range(num)], found.extend)
    return found


@pytest.mark.parametrize("drafter", ["student", "teacher", "none"])
@pytest.mark.parametrize(
    ("rank", "gap", "expected"),
    [(5, NEAR, 1), (6, NEAR, 1), (5, FAR, 0), (6, FAR, 0), (5, 1.0, 0), (6, 1.0, 0), (4, NEAR, 0), (7, NEAR, 0)],
)
def test_skd_counts_drafts_at_the_edge_of_the_top_k(rank: int, gap: float, expected: int, drafter: str) -> None:
    """SKD's draft is a near tie iff its log-prob lies within the tolerance of the other side of the k-th place."""
    p_row = -torch.arange(VOCAB).double()
    p_row[5:] += 1 - gap  # id i has rank i + 1; `gap` is between the fifth and the sixth
    (rollout,) = near_ties(params(switching.outside_top_k(k=5)), p_row.float(), rank - 1, drafter)
    assert rollout.sources.tolist() == [int(rank > 5)] and rollout.statistic.tolist() == [rank]
    assert rollout.stats.num_near_ties == expected


def test_rank_bounds_equal_a_slow_loop() -> None:
    """The smallest rank counts the ids that are ahead by the tolerance, the largest those that may be ahead."""
    generator = torch.Generator().manual_seed(0)
    p_logits = (torch.randn(200, 20, generator=generator) * 2).round()
    p_logits += torch.tensor([0.0, NEAR, FAR])[torch.randint(3, p_logits.shape, generator=generator)]
    drafted = torch.randint(20, (200,), generator=generator)
    rule = switching.outside_top_k(k=5)
    inputs = {"p_logits": p_logits, "q_logits": None, "drafted": drafted, "coins": torch.zeros(200)}
    assert rule.bounds is not None
    low, high = (values.tolist() for values in rule.bounds(**inputs))
    rank = rule.statistic(**inputs).tolist()
    for i, (row, token) in enumerate(zip(p_logits.tolist(), drafted.tolist(), strict=True)):
        others = [value - row[token] for j, value in enumerate(row) if j != token]
        assert low[i] == 1 + sum(value >= NEAR_TIE for value in others)
        assert high[i] == 1 + sum(value > -NEAR_TIE for value in others)
        assert low[i] <= rank[i] <= high[i]
    assert 20 < sum(a < b for a, b in zip(low, high, strict=True)) < 190


@pytest.mark.parametrize("distance", [NEAR, -NEAR, FAR, -FAR])
def test_other_rules_count_statistics_near_their_threshold(distance: float) -> None:
    """A divergence is a near tie within the tolerance of its threshold; a coin, which has no rounding, never is."""
    row = torch.zeros(VOCAB)
    rule = Rule(
        name="fixed",
        statistic=lambda *, p_logits, q_logits, drafted, coins: torch.full_like(coins, 0.5 + distance),
        threshold=lambda t, step, memory: torch.full(t.shape, 0.5, dtype=torch.float64),
        needs_coins=True,
    )
    (rollout,) = near_ties(params(rule), row + torch.arange(VOCAB), 3, "student")
    assert rollout.stats.num_near_ties == (abs(distance) == NEAR)
    (rollout,) = near_ties(params(replace(rule, needs_rows=False)), row + torch.arange(VOCAB), 3, "student")
    assert rollout.stats.num_near_ties == 0


@pytest.mark.parametrize("offset", [NEAR / 4, -NEAR / 4, 0.05])
def test_draws_at_the_edge_of_a_nucleus_are_counted(offset: float) -> None:
    """Where the mass before an id lies within the tolerance of top_p, draws that it wins or could win are near ties."""
    law = torch.full((VOCAB,), 1e-12)
    law[1:5] = torch.tensor([0.4, 0.25 + offset, 0.2, 0.15 - offset])
    teacher = SamplingParams(top_p=0.65)
    a_mode = params(switching.jsd_threshold(schedule="constant", tau_0=0.0), teacher=teacher)
    found = near_ties(a_mode, law.log(), 7, "none", num=400)
    near = sum(rollout.stats.num_near_ties > 0 for rollout in found)
    assert 40 < near < 160 if abs(offset) < NEAR_TIE else near == 0
