"""The lower bound of `bench switching`: the cheapest sequence of rounds in hindsight."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest

from switchkd.algo import switching
from switchkd.tools.bench.lower_bound import StepCosts, row_bound_s, row_steady_s
from switchkd.tools.bench.switching import RULES, SMOKE, Engines, agreements
from switchkd.types import CompletionSource, Rollout

COSTS = StepCosts(
    student=1.0, write=1.5, read={1: 1.5, 2: 1.7, 4: 2.1}, check={1: 1.0, 2: 1.2, 4: 1.6}, decide=0.1, prompt=0.5
)


@pytest.fixture(scope="module")
def engines(models) -> Engines:
    """Two tiny models in fp32, with 4 prompts."""
    load = replace(SMOKE, tokens=24)
    return Engines(str(models / "teacher"), str(models / "student"), device="cpu", dtype="float32", load=load)


def rollout(num: int, threshold: float = 0.5) -> Rollout:
    return Rollout(
        rollout_id=0,
        batch=0,
        stage=0,
        prompt_id="",
        completion_source=CompletionSource.ROLLOUT,
        prompt_ids=np.zeros(1, np.int32),
        token_ids=np.zeros(num, np.int32),
        sources=np.zeros(num, np.uint8),
        weight_versions=np.zeros(num, np.int32),
        statistic=np.zeros(num, np.float32),
        threshold=np.full(num, threshold, np.float32),
        uncertainty=np.zeros(num, np.float32),
        teacher_output=None,
        finish_reason="length",
    )


def slow_bound_s(rejected: dict[str, np.ndarray], t: int = 0) -> float:
    """Slow reference: try all sequences of rounds."""
    num = len(rejected["student"])
    if t == num:
        return 0.0
    found = [COSTS.student + COSTS.read[1] + COSTS.decide + slow_bound_s(rejected, t + 1)]
    for size, drafter in itertools.product(COSTS.read, rejected):
        if size > num - t:
            continue
        emitted = 0
        for i in range(t, t + size):
            emitted += 1
            if rejected[drafter][i]:
                break
        step, block = (COSTS.write, COSTS.check) if drafter == "teacher" else (COSTS.student, COSTS.read)
        found.append(size * step + block[size] + emitted * COSTS.decide + slow_bound_s(rejected, t + emitted))
    return min(found)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_equals_an_exhaustive_search(seed: int) -> None:
    """Dynamic programming gives the cost that a search over all sequences of rounds gives."""
    rng = np.random.default_rng(seed)
    rejected = {drafter: rng.random(8) < 0.3 for drafter in ("student", "teacher")}
    assert row_bound_s(rollout(8), rejected, COSTS, switching.jsd_threshold()) == pytest.approx(slow_bound_s(rejected))


@pytest.mark.parametrize(
    ("drafter", "by_hand"),
    [
        ("student", (4 * 1.0 + 2.1 + 3 * 0.1) + (2 * 1.0 + 1.7 + 2 * 0.1) + (1.0 + 1.5 + 0.1)),
        ("teacher", (4 * 1.5 + 1.6 + 3 * 0.1) + (2 * 1.5 + 1.2 + 2 * 0.1) + (1.5 + 1.0 + 0.1)),
    ],
)
def test_a_fixed_draft_costs_what_a_hand_calculation_gives(drafter: str, by_hand: float) -> None:
    """Rounds of 4 with a rejection at the third token, then rounds of the rest, cost what a hand calculation gives."""
    rejected = {"student": np.zeros(6, bool), "teacher": np.zeros(6, bool)}
    rejected[drafter][2] = True
    found = row_steady_s(rollout(6), rejected, COSTS, switching.jsd_threshold(), drafter, 4)
    assert found == pytest.approx(by_hand)
    assert found >= row_bound_s(rollout(6), rejected, COSTS, switching.jsd_threshold())


@pytest.mark.parametrize("drafter", ["student", "teacher"])
@pytest.mark.parametrize("rule", ["switch", "skd"])
def test_drafts_are_rejected_where_the_generator_rejects_them(rule: str, drafter: str, engines: Engines) -> None:
    """The rejections that the bound reads are those of a generator with that drafter, for every rollout."""
    params = engines.params(RULES[rule][0]())
    _, rollouts = engines.timed(engines.generator(drafter), params)
    found = [int(read.rejected[drafter].sum()) for read in agreements(engines, rollouts, params)]
    assert found == [rollout.stats.num_rejections for rollout in rollouts] and sum(found) > 5


def test_a_teacher_only_row_has_no_checks() -> None:
    """A row that only the teacher writes costs its steps and no check."""
    found = row_bound_s(rollout(8, threshold=-np.inf), {}, COSTS, switching.kl_spike())
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
