"""Who leads: a choice by measured costs and break rates. That it changes no token is shown in test_rollout.py."""

from __future__ import annotations

import numpy as np
import pytest
from toy import task

from switchkd.algo import switching
from switchkd.algo.sampling import SamplingParams
from switchkd.rollout.speculation import NO_DRAFT, DraftPlan, LatencyModel, SpeculationPolicy, _Rates
from switchkd.rollout.state import RolloutParams, RolloutState

RULE = switching.jsd_threshold()


def rows(num: int, t: int = 0, rule: switching.Rule = RULE) -> list[RolloutState]:
    params = RolloutParams(rule=rule, student=SamplingParams(), teacher=SamplingParams(), max_new_tokens=100, seed=0)
    found = [RolloutState.start(task(i), params, i) for i in range(num)]
    for row in found:
        row.tokens += [1] * t
    return found


def speculation(*, student_step: float = 1.0, teacher_step: float = 1.0, per_token: float = 0.01) -> SpeculationPolicy:
    """Steps cost what is said, blocks a step and a little per token. Every way has been tried."""
    found = SpeculationPolicy("auto", 16)
    for kind, fixed in (("student", student_step), ("check", student_step), ("write", teacher_step),
                        ("read", teacher_step)):  # fmt: skip
        for tokens in (1, 8, 256):
            found.costs.add(kind, tokens, fixed + per_token * tokens)
    for kind in ("walk student", "walk teacher"):
        found.costs.add(kind, 8, 0.0)
    found.trials = {DraftPlan("student", 4): 2, DraftPlan("teacher", 4): 2, NO_DRAFT: 2}
    return found


def see(found: SpeculationPolicy, owned: bool, differ: bool, t: int = 0, times: int = 200) -> None:
    found.record_outcome(RULE.name, False, np.full(times, t), np.full(times, owned), np.full(times, int(differ)))


def test_equal_draws_call_for_long_blocks_of_the_cheaper_model() -> None:
    """Where nothing ever breaks the cheaper model goes ahead as far as it may."""
    for cheap, who in ((0.2, "student"), (5.0, "teacher")):
        found = speculation(student_step=cheap)
        see(found, owned=True, differ=False)
        plan = found.choose(rows(8))
        assert plan.drafter == who and plan.num_tokens >= 12


def test_who_owns_what_differs_decides_who_leads() -> None:
    """A student's block breaks on the teacher's tokens, a teacher's on the student's."""
    found = speculation()
    see(found, owned=True, differ=True)
    assert found.choose(rows(8)).drafter == "teacher"
    found = speculation()
    see(found, owned=False, differ=True)
    assert found.choose(rows(8)).drafter == "student"


def test_lockstep_where_every_block_breaks() -> None:
    """Draws that always differ, owners that change: one token each."""
    found = speculation()
    for i in range(200):
        see(found, owned=i % 2 == 0, differ=True, times=1)
    found.costs.add("walk teacher", 8, 0.1)
    assert found.choose(rows(8)) in (NO_DRAFT, DraftPlan("student", 1))


@pytest.mark.parametrize(("gain", "num_lockstep"), [(1.04, 60), (1.2, 3), (1.3, 0)])
def test_lockstep_where_little_is_gained(monkeypatch, gain: float, num_lockstep: int) -> None:
    """A gain that the clock's error could feign is not taken; where lockstep is nearly as good, its costs are looked at
    every 17th round; else blocks are kept to."""
    found, way = speculation(), DraftPlan("student", 4)
    monkeypatch.setattr(found, "_ways", lambda rows: [NO_DRAFT, way])
    monkeypatch.setattr(found, "expected_throughput", lambda rows, most: {NO_DRAFT: 1.0, way: gain})
    assert [found.choose(rows(8)) for _ in range(60)].count(NO_DRAFT) == num_lockstep


def test_rates_are_kept_by_place() -> None:
    """Early tokens are the student's and late ones the teacher's, so the lead changes along the way."""
    found = speculation()
    see(found, owned=False, differ=True, t=0)
    see(found, owned=True, differ=True, t=40)
    assert found.choose(rows(8, t=0)).drafter == "student"
    assert found.choose(rows(8, t=40)).drafter == "teacher"
    assert found.choose(rows(8, t=60)).drafter == "teacher", "not there yet: as at the last place that is known"


def test_a_row_near_its_end_gets_no_long_block() -> None:
    """No way goes further than the row with the most room."""
    found = speculation()
    see(found, owned=True, differ=False)
    assert found.choose(rows(8, t=97)).num_tokens <= 3


def test_skd_is_never_led_by_the_teacher() -> None:
    """Its test asks for the student's own draw, its replacement has noise of its own."""
    found = speculation(teacher_step=0.01)
    assert found.choose(rows(8, rule=switching.outside_top_k())).drafter != "teacher"


@pytest.mark.parametrize("drafter", ["student", "teacher"])
def test_a_forced_lead_is_kept(drafter: str) -> None:
    """Whatever was measured."""
    assert SpeculationPolicy(drafter, 5).choose(rows(3)) == DraftPlan(drafter, 5)  # type: ignore[arg-type]
    assert SpeculationPolicy("none", 5).choose(rows(3)) == NO_DRAFT == SpeculationPolicy("auto", 1).choose(rows(3))


def test_every_way_is_tried_first() -> None:
    """Before a choice each way has been measured."""
    found = SpeculationPolicy("auto", 8)
    tried = [found.choose(rows(4)) for _ in range(3)]
    assert len(set(tried)) == 1, "a call that read a prompt as well tells nothing: try again"
    for _ in range(6):
        tried.append(found.choose(rows(4)))
        found.observe_call(tried[-1], "read", 4, 1.0)
    assert set(tried) == {DraftPlan("student", 4), DraftPlan("teacher", 4), NO_DRAFT}


def test_costs_are_medians_on_straight_lines() -> None:
    """One slow call does not count; sizes between are interpolated, beyond them a fixed part is assumed."""
    costs = LatencyModel()
    for seconds in (1.0, 1.1, 9.0):
        costs.add("read", 8, seconds)
    costs.add("read", 16, 2.1)
    assert costs.of("read", 8) == 1.1 and costs.of("read", 12) == pytest.approx(1.6)
    assert costs.of("read", 32) == pytest.approx(4.1) and 0.5 < costs.of("read", 4) < 1.1
    assert np.isnan(costs.of("write", 8))


def test_costs_beyond_what_was_seen_do_not_hang_on_the_clocks_error() -> None:
    """Two neighbouring sizes, one of them measured while the machine was busy: the line of all larger sizes goes on.
    Falling times are their mean; one size alone says that twice the tokens take one and a half times as long."""
    costs = LatencyModel()
    for tokens in (8, 16, 24, 31):
        costs.add("read", tokens, 1.0 + 0.1 * tokens)
    costs.add("read", 32, 4.2 + 1.0)
    assert costs.of("read", 64) == pytest.approx(7.4, rel=0.25), "the last two alone say 37"
    for tokens, seconds in ((8, 3.0), (16, 2.0)):
        costs.add("write", tokens, seconds)
    assert costs.of("write", 64) == 2.5
    costs.add("check", 8, 1.0)
    assert costs.of("check", 16) == 1.5


def test_a_place_that_was_hardly_seen_has_the_rate_of_all() -> None:
    """Nothing broke in 500 tokens elsewhere: three tokens without a break are no reason for short blocks."""
    rates = _Rates()
    for _ in range(500):
        rates.observe(0, False)
    for _ in range(3):
        rates.observe(20, False)
    assert rates.at(np.array([20]))[0] < 0.01 and rates.at(np.array([0]))[0] < 0.001
    for _ in range(100):
        rates.observe(20, True)
    assert rates.at(np.array([20]))[0] > 0.9
