"""The lower bound of `bench switching`: the cheapest sequence of rounds in hindsight."""

from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np
import pytest

from switchkd.algo import switching
from switchkd.tools.bench.lower_bound import StepCosts, row_bound_s, row_steady_s
from switchkd.types import CompletionSource, Rollout

COSTS = StepCosts(
    student=1.0, write=1.5, read={1: 1.5, 2: 1.7, 4: 2.1}, check={1: 1.0, 2: 1.2, 4: 1.6}, decide=0.1, prompt=0.5
)


def rollout(owned: list[int], threshold: float = 0.5) -> Rollout:
    num = len(owned)
    return Rollout(
        rollout_id=0,
        batch=0,
        stage=0,
        prompt_id="",
        completion_source=CompletionSource.ROLLOUT,
        prompt_ids=np.zeros(1, np.int32),
        token_ids=np.zeros(num, np.int32),
        sources=np.array(owned, np.uint8),
        weight_versions=np.zeros(num, np.int32),
        statistic=np.zeros(num, np.float32),
        threshold=np.full(num, threshold, np.float32),
        uncertainty=np.zeros(num, np.float32),
        teacher_output=None,
        finish_reason="length",
    )


def slow_bound_s(owned: list[int], differ: list[bool], t: int = 0) -> float:
    """Slow reference: try all sequences of rounds."""
    num = len(owned)
    if t == num:
        return 0.0
    found = [COSTS.student + COSTS.read[1] + COSTS.decide + slow_bound_s(owned, differ, t + 1)]
    for size, teacher in itertools.product(COSTS.read, (False, True)):
        if size > num - t:
            continue
        emitted = 0
        for i in range(t, t + size):
            emitted += 1
            if differ[i] and bool(owned[i]) != teacher:
                break
        step, block = (COSTS.write, COSTS.check) if teacher else (COSTS.student, COSTS.read)
        found.append(size * step + block[size] + emitted * COSTS.decide + slow_bound_s(owned, differ, t + emitted))
    return min(found)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_equals_an_exhaustive_search(seed: int) -> None:
    """Dynamic programming gives the cost that a search over all sequences of rounds gives."""
    rng = np.random.default_rng(seed)
    owned, differ = rng.integers(0, 2, 8).tolist(), (rng.random(8) < 0.5).tolist()
    rule = switching.jsd_threshold()
    assert row_bound_s(rollout(owned), np.array(differ), COSTS, rule) == pytest.approx(slow_bound_s(owned, differ))


@pytest.mark.parametrize("drafter", ["student", "teacher"])
def test_a_fixed_draft_costs_what_a_hand_calculation_gives(drafter: str) -> None:
    """Rounds of 4 with a rejection at the third token, then rounds of the rest, cost what a hand calculation gives."""
    owned, differ = [1, 1, 1, 1, 1, 1], [False, False, True, False, False, False]
    if drafter == "teacher":  # rejects where the student owns
        owned = [1 - each for each in owned]
        by_hand = (4 * 1.5 + 1.6 + 3 * 0.1) + (2 * 1.5 + 1.2 + 2 * 0.1) + (1.5 + 1.0 + 0.1)
    else:
        by_hand = (4 * 1.0 + 2.1 + 3 * 0.1) + (2 * 1.0 + 1.7 + 2 * 0.1) + (1.0 + 1.5 + 0.1)
    rule = switching.jsd_threshold()
    found = row_steady_s(rollout(owned), np.array(differ), COSTS, rule, drafter, 4)
    assert found == pytest.approx(by_hand) and found >= row_bound_s(rollout(owned), np.array(differ), COSTS, rule)


def test_a_teacher_only_row_has_no_checks() -> None:
    """A row that only the teacher writes costs its steps and no check."""
    found = row_bound_s(rollout([1] * 8, threshold=-np.inf), np.zeros(8, bool), COSTS, switching.kl_spike())
    assert found == pytest.approx(8 * COSTS.write)


def test_mean_costs_are_taken_by_field():
    """The mean of step costs is taken by field and block size."""
    twice = StepCosts(**{
        field.name: {k: 3 * v for k, v in value.items()} if isinstance(value, dict) else 3 * value
        for field in fields(COSTS) for value in [getattr(COSTS, field.name)]
    })  # fmt: skip
    found = StepCosts.mean([COSTS, twice])
    assert found.student == pytest.approx(2 * COSTS.student) and found.decide == pytest.approx(2 * COSTS.decide)
    assert found.read == pytest.approx({size: 2 * cost for size, cost in COSTS.read.items()})
