"""The simulation: it runs the production classes, and repeats the order of events of a run in wall time."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from switchkd import train
from switchkd.actors.ray_futures import run_in_thread
from switchkd.actors.teacher_router import TeacherRouter
from switchkd.controller.dispatcher import TaskDispatcher
from switchkd.data.replay import Replay
from switchkd.rollout.speculation import SpeculationPolicy
from switchkd.rollout.worker import RolloutWorker
from switchkd.tools.bench import simulate, simulated_actors, trainer_harness
from switchkd.tools.bench.simulate import Size, config_of
from switchkd.tools.bench.simulated_actors import SimulatedWorkerHandle, TimedReplay, start_simulated
from switchkd.tools.bench.simulated_teachers import Costs
from switchkd.tools.bench.virtual_time import VirtualClock
from switchkd.types import Prompt

# with these costs no two events of NUM_EVENTS whose order matters lie within 25 ms of each other
COSTS = Costs(
    student_s=0.031, teacher_s=0.025, teacher_token_s=0.03, learner_s=0.214, learner_token_s=0.0, weights_s=0.01,
    row_bytes=64, median_len=6, sigma=0.8, reject_frac=0.1,
)  # fmt: skip
NUM_EVENTS = 14
SIZE = Size(workers=2, teachers=2, ranks=1, slots=2, max_new_tokens=12, teacher_frac=0.3)
Events = list[tuple[Any, ...]]


class WallClock:
    """The clock of a run in wall time: processes are threads that sleep."""

    now = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)
    call = start = staticmethod(run_in_thread)


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch) -> None:
    monkeypatch.setattr(simulate, "PROMPT_TOKENS", 4)


@pytest.fixture
def events(monkeypatch) -> Events:
    """Which worker gets which rollouts, and which arrive together, in order."""
    found: Events = []
    generate, put = SimulatedWorkerHandle.generate, SimulatedWorkerHandle._put

    def recorded_generate(self: Any, tasks: Any, weights: Any) -> Future[Any]:
        version = weights.version if weights else 0
        found.append((self.name, "gets", [task.rollout_id for task in tasks], version))
        return generate(self, tasks, weights)

    def recorded_put(self: Any, rollouts: Any) -> None:
        found.append((self.name, "puts", [(one.rollout_id, one.num_tokens, one.oldest_version) for one in rollouts]))
        put(self, rollouts)

    monkeypatch.setattr(SimulatedWorkerHandle, "generate", recorded_generate)
    monkeypatch.setattr(SimulatedWorkerHandle, "_put", recorded_put)
    return found


def in_wall_time(config: Any, num_steps: int) -> None:
    rows: list[Any] = []

    def on_step(row: Any) -> None:
        rows.append(row)
        if len(rows) == num_steps:
            raise trainer_harness.StopTraining

    prompt = Prompt(prompt_id="", text="", token_ids=np.ones(simulate.PROMPT_TOKENS, np.int32))
    trainer_harness.run(
        config, [prompt], lambda config, *_: start_simulated(config, COSTS, WallClock()).handles, on_step
    )


@pytest.mark.parametrize("mode", ["finish", "reprefill"])
def test_events_in_virtual_time_are_those_in_wall_time(events, mode):
    """Two workers get and put the same rollouts in the same order as in a run whose processes really sleep."""
    config = config_of(SIZE, on_new_weights=mode, max_staleness=1, num_steps=10, drafter="student")
    simulate.simulate(config, COSTS, num_steps=1)
    simulated = list(events)
    events.clear()
    in_wall_time(config, simulate.UNMEASURED + 1)
    assert events[:NUM_EVENTS] == simulated[:NUM_EVENTS]
    assert {event[3] for event in simulated[:NUM_EVENTS] if event[1] == "gets"} >= {0, 1}  # weight versions


def test_control_is_the_production_code(monkeypatch):
    """The simulation's dispatcher, replay, router, worker, drafting policy and loop are the production classes."""
    made: list[Any] = []
    policies: list[SpeculationPolicy] = []
    for owner, name in (
        (train, "TaskDispatcher"), (trainer_harness, "run"), (simulated_actors, "TeacherRouter"),
        (simulated_actors, "RolloutWorker"), (simulated_actors, "SpeculationPolicy"),
    ):  # fmt: skip
        original = getattr(owner, name)

        def record(*args: Any, original: Any = original, **options: Any) -> Any:
            made.append(original)
            result = original(*args, **options)
            if isinstance(result, SpeculationPolicy):
                policies.append(result)
            return result

        monkeypatch.setattr(owner, name, record)
    simulate.simulate(config_of(SIZE, on_new_weights="finish", max_staleness=0, num_steps=9), COSTS, num_steps=1)
    assert {TaskDispatcher, TeacherRouter, RolloutWorker, SpeculationPolicy} <= set(made)
    assert all(
        np.isfinite(policy.costs.of(f"verify {who}", 4)) for policy in policies for who in ("student", "teacher")
    )
    assert TimedReplay.__mro__[1] is Replay
    assert not {"put", "take", "commit", "release_before", "stats"} & set(vars(TimedReplay))


def test_simulation_repeats_and_costs_no_time():
    """Two simulations give the same figures, and simulated minutes take seconds."""
    slow = replace(COSTS, student_s=3.0, teacher_s=5.0, learner_s=60.0)
    config = config_of(SIZE, on_new_weights="reprefill", max_staleness=2, num_steps=12)
    since = time.monotonic()
    first, second = (simulate.simulate(config, slow, num_steps=2) for _ in range(2))
    assert time.monotonic() - since < 10
    assert replace(first, load={}) == replace(second, load={})
    assert 0 < first.occupancy <= 1
    assert first.staleness_max <= 2


def test_virtual_clock_orders_sleeps():
    """Processes run in the order of time, those of one time in the order in which they asked."""
    clock, seen = VirtualClock(), list[tuple[str, float]]()

    def process(name: str, seconds: float) -> None:
        for _ in range(2):
            clock.sleep(seconds)
            seen.append((name, clock.now()))

    ends = [clock.start(lambda name=name, s=s: process(name, s)) for name, s in (("a", 2.0), ("b", 1.0))]
    clock.advance_until(lambda: all(end.done() for end in ends))
    assert seen == [("b", 1.0), ("a", 2.0), ("b", 2.0), ("a", 4.0)]
    with pytest.raises(RuntimeError, match="no process is left"):
        clock.advance_until(lambda: False)


def test_slow_teachers_are_the_limit():
    """Where teachers are slow, workers wait for them and they are the fullest resource."""
    slow = replace(COSTS, teacher_s=5.0)
    one = simulate.simulate(
        config_of(replace(SIZE, teachers=1), on_new_weights="finish", max_staleness=2, num_steps=12), slow, num_steps=2
    )
    assert max(one.load, key=lambda name: one.load[name]) == "teachers"
    assert one.teacher_waits > 0.8
