"""Going back to a checkpoint in one process: learner or replay lose their state, and the run repeats steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from faults import after_step, same_losses, same_rollouts
from runs import NUM_ROLLOUTS, STAGES, config, rollouts, steps, weights
from test_broken_prompts import failed

from switchkd.controller import local, recovery
from switchkd.controller.local import LocalWorkerHandle, completed
from switchkd.data.replay import EMPTY
from switchkd.engines import fake
from switchkd.train import train
from switchkd.types import StateLost


class Mortal:
    """A handle of an object that loses its state in `die`; until `revive` is called every call raises StateLost."""

    def __init__(self, target: Any, revive: str, lose: Callable[[], None]) -> None:
        self.target, self.revive, self.lose, self.dead = target, revive, lose, False

    def die(self) -> None:
        self.dead = True
        self.lose()

    def __getattr__(self, name: str) -> Callable[..., Future[Any]]:
        if name == self.revive:
            self.dead = False
        if not self.dead:
            return lambda *args: completed(getattr(self.target, name, lambda: None), *args)
        if name in ("rewind", "flush"):  # of a replay that restarted empty
            return lambda *args: completed(lambda: False)
        return lambda *args: failed(StateLost(f"the {self.revive} is missing"))


@pytest.fixture
def actors(monkeypatch) -> dict[str, Mortal]:
    """The learner and the replay of the run that starts next."""
    found: dict[str, Mortal] = {}
    start = local.start_actors

    def started(*args: Any) -> Any:
        handles = start(*args)
        learner, replay = handles.learner._target, handles.replay._target
        found["learner"] = Mortal(learner, "restart", lambda: setattr(learner, "weights", fake.FIRST_WEIGHTS))
        found["replay"] = Mortal(replay, "restore", lambda: replay.load_state_dict(EMPTY))
        return replace(handles, learner=found["learner"], replay=found["replay"])

    monkeypatch.setattr(local, "start_actors", started)
    monkeypatch.setattr(recovery.RestartPolicy, "begin", slept(recovery.RestartPolicy.begin))
    return found


def slept(begin: Callable[..., None]) -> Callable[..., None]:
    def without_pause(policy: Any, lost: StateLost) -> None:
        policy._sleep = lambda seconds: None
        begin(policy, lost)

    return without_pause


def test_deaths_of_learner_and_replay_change_nothing(fake_place, fake_alone, actors, monkeypatch, notes):
    """After three deaths of the learner and two of the replay the run has the rollouts, losses and weights of a run
    without faults; the count of restarts starts again after a checkpoint; checkpoints free the trained rollouts."""
    dies_after = {1: "learner", 4: "replay", 5: "learner", 7: "learner", 9: "replay"}
    held: list[float] = []

    def strike(step: int) -> None:
        if name := dies_after.pop(step, None):
            actors[name].die()
        if step in (3, 6):  # just after a checkpoint
            held.append(actors["replay"].target.stats()["num_committed"])

    after_step(monkeypatch, strike)
    assert train(config(fake_place, STAGES, fake=True)).finished and not dies_after
    same_rollouts(fake_place / "run", fake_alone)
    same_losses(fake_place / "run", fake_alone)
    ours, theirs = weights(fake_place / "run" / "student"), weights(fake_alone / "student")
    assert all((ours[name] == theirs[name]).all() for name in ours)
    counts = [note.partition("(restart ")[2] for note in notes if "going back" in note]
    assert counts == ["1 of 8)", "1 of 8)", "2 of 8)", "1 of 8)", "1 of 8)"]
    assert max(held) <= 4, "rollouts trained before the checkpoint are gone"


def test_a_replay_that_died_knows_the_quarantined_rollouts(fake_place, actors, monkeypatch):
    """A rollout that was quarantined after the checkpoint takes no room in a replay that died since: with room for one
    batch only, the run goes on."""
    generate = LocalWorkerHandle.generate

    def broken(worker: LocalWorkerHandle, tasks: Any, weights: Any) -> Future[Any]:
        if any(task.rollout_id == 13 for task in tasks):
            return failed(ValueError("cannot write 13"))
        return generate(worker, tasks, weights)

    monkeypatch.setattr(LocalWorkerHandle, "generate", broken)
    deaths = [4]
    after_step(monkeypatch, lambda step: deaths and step == deaths[0] and deaths.pop() and actors["replay"].die())
    data = {"path": "./data.jsonl", "max_quarantined_frac": 0.1}
    small = {"data": data, "replay": {"capacity": 4}, "run": {"dir": "run", "mode": "inprocess", "watchdog_s": 20}}
    assert train(config(fake_place, STAGES, fake=True, **small)).finished and not deaths
    assert sorted(rollouts(fake_place / "run")) == sorted(set(range(NUM_ROLLOUTS)) - {13})
    assert [row["step"] for row in steps(fake_place / "run")] == list(range(10))
