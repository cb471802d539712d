"""The training step that a rule reads: each rollout's own, counted from its stage's first."""

from __future__ import annotations

import pytest
from test_rollout import RULES, params, slow_rollout, write
from toy import STOP, ToyStudent, ToyTeacher, pair, task

from switchkd.algo import divergence, switching
from switchkd.algo.switching import Rule
from switchkd.config.loader import parse
from switchkd.controller.schedule import Schedule
from switchkd.data.prompts import PromptStream
from switchkd.rollout.generator import SwitchingGenerator
from switchkd.rollout.rules import build_rollout_params
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import Rollout


def step_rule() -> Rule:
    """A user's rule: the teacher writes where the JSD exceeds a limit that falls from step to step."""
    return Rule(
        name="step_rule",
        statistic=lambda *, p_logits, q_logits, drafted, coins: divergence.per_row(divergence.jsd, p_logits, q_logits),
        threshold=lambda t, step, memory: 0.4 / (1 + step.double()),
    )


STEP_RULES = {
    "own": step_rule(),
    "scheduled": switching.with_step_schedule(RULES["switch-constant"], start=2, end=0, steps=4),
    "spike": switching.with_step_schedule(RULES["adaswitch"], start=0.5, end=2, steps=4),
    "skd": switching.with_step_schedule(RULES["skd"], start=1, end=3, steps=4),
}


def step_of(rollout_id: int) -> int:
    """Neighbours in a batch are of different steps of a stage that begins at step 3."""
    return 3 + rollout_id % 5


@pytest.mark.parametrize("name", STEP_RULES)
def test_each_rollout_has_its_own_step(name: str) -> None:
    """Rollouts of several steps are the float64 loop's, alone or six at a time, with any drafter."""
    a_mode = params(STEP_RULES[name], first_step=3)
    by_step = set()
    for max_draft_tokens, slots, drafter in ((5, 1, "student"), (5, 6, "student"), (4, 6, "teacher"), (1, 6, "none")):
        found, _ = write(
            a_mode, range(12), max_draft_tokens=max_draft_tokens, slots=slots, drafter=drafter, step_of=step_of
        )
        for i, rollout in found.items():
            tokens, sources = slow_rollout(a_mode, i, step=step_of(i) - 3)
            assert rollout.token_ids.tolist() == tokens
            assert rollout.sources.tolist() == sources
            by_step.add((step_of(i), float(rollout.threshold[0])))
    if name != "spike":  # without a value before it, its first threshold is infinite
        assert len({threshold for _, threshold in by_step}) == len(by_step) == 5


def test_a_stage_counts_its_steps_from_its_first() -> None:
    """A schedule begins with its stage: the rollouts of a run's step s in the second stage have its step s - 3."""
    rule = {"type": "switch", "schedule": "constant", "tau0": 0.2, "step_schedule": {"start": 1, "end": 0}}
    stages = [{"name": "first", "steps": 3}, {"name": "second", "steps": 4, "rule": rule}]
    paths = {"run": {"dir": "r"}, "teacher": {"path": "t"}, "student": {"path": "s"}, "data": {"path": "./d.jsonl"}}
    config = parse({**paths, "rollout": {"max_new_tokens": 8}, "train": {"batch_size": 2, "stages": stages}})
    run = Schedule(config.train.stages, PromptStream([task(i).prompt for i in range(7)], seed=0), seed=0)
    p, q = pair()
    generator = SwitchingGenerator(
        student=ToyStudent(q, 8), teacher=ToyTeacher(p), head=None, stop_ids=frozenset({STOP}), max_draft_tokens=4
    )
    found: list[Rollout] = []
    RolloutWorker({"": generator}, build_rollout_params(config), str).generate(
        [run.task(i) for step in range(3, 7) for i in run.rollout_ids(step)], found.extend
    )
    assert sorted(rollout.batch for rollout in found) == [3, 3, 4, 4, 5, 5, 6, 6]
    for rollout in found:
        assert rollout.threshold.tolist() == pytest.approx([0.2 * (1 - (rollout.batch - 3) / 4)] * rollout.num_tokens)
