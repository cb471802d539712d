"""The drafter is chosen by measured costs and rejection rates. (That it changes no token: test_rollout.py.)"""

from __future__ import annotations

import numpy as np
import pytest

from switchkd.algo import switching
from switchkd.rollout.speculation import NO_DRAFT, DraftPlan, LatencyModel, SpeculationPolicy, _Rates

RULE = switching.jsd_threshold()


def rows(num: int, t: int = 0, rule: switching.Rule = RULE) -> tuple[switching.Rule, np.ndarray, np.ndarray]:
    """`num` completions of at most 100 tokens, as the policy sees them."""
    return rule, np.full(num, t), np.full(num, 100 - t)


def speculation(*, student_step: float = 1.0, teacher_step: float = 1.0, per_token: float = 0.01) -> SpeculationPolicy:
    """A policy with given step costs, where a block costs a step and a little per token, and all plans measured."""
    found = SpeculationPolicy("auto", 16)
    for kind, fixed in (("student", student_step), ("check", student_step), ("write", teacher_step),
                        ("read", teacher_step)):  # fmt: skip
        for tokens in (1, 8, 256):
            found.costs.add(kind, tokens, fixed + per_token * tokens)
    for kind in ("verify student", "verify teacher"):
        found.costs.add(kind, 8, 0.0)
    found.trials = {DraftPlan("student", 4): 2, DraftPlan("teacher", 4): 2, NO_DRAFT: 2}
    return found


def see(found: SpeculationPolicy, owned: bool, differ: bool, t: int = 0, times: int = 200) -> None:
    found.record_outcome(RULE.name, False, np.full(times, t), np.full(times, owned), np.full(times, int(differ)))


def test_the_cheaper_model_drafts_without_rejections() -> None:
    """Without rejections the cheaper model drafts long blocks."""
    for cheap, who in ((0.2, "student"), (5.0, "teacher")):
        found = speculation(student_step=cheap)
        see(found, owned=True, differ=False)
        plan = found.choose(*rows(8))
        assert plan.drafter == who and plan.num_tokens >= 12


def test_the_writer_of_differing_tokens_drafts() -> None:
    """The model that writes the differing tokens drafts."""
    found = speculation()
    see(found, owned=True, differ=True)
    assert found.choose(*rows(8)).drafter == "teacher"
    found = speculation()
    see(found, owned=False, differ=True)
    assert found.choose(*rows(8)).drafter == "student"


def test_lockstep_if_every_block_is_rejected() -> None:
    """If every block is rejected, each round has one token."""
    found = speculation()
    for i in range(200):
        see(found, owned=i % 2 == 0, differ=True, times=1)
    found.costs.add("verify teacher", 8, 0.1)
    assert found.choose(*rows(8)) in (NO_DRAFT, DraftPlan("student", 1))


@pytest.mark.parametrize(("gain", "num_lockstep"), [(1.04, 60), (1.2, 3), (1.3, 0)])
def test_lockstep_if_the_gain_is_small(monkeypatch, gain: float, num_lockstep: int) -> None:
    """A gain within the clock's error is not taken, and a small gain makes lockstep be measured again every 17th
    round."""
    found, way = speculation(), DraftPlan("student", 4)
    monkeypatch.setattr(found, "_ways", lambda *rows: [NO_DRAFT, way])
    monkeypatch.setattr(found, "expected_throughput", lambda *rows: {NO_DRAFT: 1.0, way: gain})
    assert [found.choose(*rows(8)) for _ in range(60)].count(NO_DRAFT) == num_lockstep


def test_rates_are_kept_by_position() -> None:
    """Rejection rates are kept by position, so the drafter changes along the completion."""
    found = speculation()
    see(found, owned=False, differ=True, t=0)
    see(found, owned=True, differ=True, t=40)
    assert found.choose(*rows(8, t=0)).drafter == "student"
    assert found.choose(*rows(8, t=40)).drafter == "teacher"
    assert found.choose(*rows(8, t=60)).drafter == "teacher", "no data yet: as at the last known position"


def test_blocks_end_with_the_completion() -> None:
    """A block is no longer than the largest remaining length."""
    found = speculation()
    see(found, owned=True, differ=False)
    assert found.choose(*rows(8, t=97)).num_tokens <= 3


def test_the_teacher_never_drafts_under_skd() -> None:
    """The teacher never drafts under SKD, whose test needs the student's draw."""
    found = speculation(teacher_step=0.01)
    assert found.choose(*rows(8, rule=switching.outside_top_k())).drafter != "teacher"


@pytest.mark.parametrize("drafter", ["student", "teacher"])
def test_a_configured_drafter_is_kept(drafter: str) -> None:
    """A configured drafter and block size are kept, whatever was measured."""
    assert SpeculationPolicy(drafter, 5).choose(*rows(3)) == DraftPlan(drafter, 5)  # type: ignore[arg-type]
    assert SpeculationPolicy("none", 5).choose(*rows(3)) == NO_DRAFT == SpeculationPolicy("auto", 1).choose(*rows(3))


def test_each_plan_is_measured_first() -> None:
    """Each plan is measured before the first choice."""
    found = SpeculationPolicy("auto", 8)
    tried = [found.choose(*rows(4)) for _ in range(3)]
    assert len(set(tried)) == 1, "a call that also read a prompt does not count: measure again"
    for _ in range(6):
        tried.append(found.choose(*rows(4)))
        found.observe_call(tried[-1], "read", 4, 1.0)
    assert set(tried) == {DraftPlan("student", 4), DraftPlan("teacher", 4), NO_DRAFT}


def test_costs_are_medians_with_linear_interpolation() -> None:
    """Costs are medians, interpolated between sizes and extrapolated with a fixed part."""
    costs = LatencyModel()
    for seconds in (1.0, 1.1, 9.0):
        costs.add("read", 8, seconds)
    costs.add("read", 16, 2.1)
    assert costs.of("read", 8) == 1.1 and costs.of("read", 12) == pytest.approx(1.6)
    assert costs.of("read", 32) == pytest.approx(4.1) and 0.5 < costs.of("read", 4) < 1.1
    assert np.isnan(costs.of("write", 8))


def test_extrapolated_costs_are_robust() -> None:
    """Costs of larger sizes follow the trend of all sizes, so one slow measurement does not distort them."""
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


def test_a_rare_position_has_the_overall_rate() -> None:
    """A position with few observations has the overall rate."""
    rates = _Rates()
    for _ in range(500):
        rates.observe(np.array([0]), np.array([False]))
    for _ in range(3):
        rates.observe(np.array([20]), np.array([False]))
    assert rates.at(np.array([20]))[0] < 0.01 and rates.at(np.array([0]))[0] < 0.001
    for _ in range(100):
        rates.observe(np.array([20]), np.array([True]))
    assert rates.at(np.array([20]))[0] > 0.9
