"""Faults at set moments of a run, and checks of what a run on Ray leaves behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import NUM_ROLLOUTS, descendants, rollouts, steps

from switchkd.controller.metrics import MetricsLog

Action = str | Callable[[], None]
"""A role whose first process is killed, or a function to call."""


class FaultInjector:
    """Acts just after tasks of a batch were dispatched (`at_batch`), or kills a worker after the evaluation of a weight
    version began (`at_evaluation`); each once. The only teacher is killed while a worker waits for its answer about a
    block: `in_flight` says where the worker was."""

    def __init__(
        self, patch: pytest.MonkeyPatch, at_batch: dict[int, Action], at_evaluation: int | None = None
    ) -> None:
        from switchkd.actors.worker_pool import RayWorkerHandle

        self.at_batch, self.at_evaluation = dict(at_batch), at_evaluation
        self.generate, self.evaluate = RayWorkerHandle.generate, RayWorkerHandle.evaluate
        self.victims: list[str] = []
        self.in_flight: list[str] = []
        patch.setattr(RayWorkerHandle, "generate", lambda worker, *args: self._generate(worker, *args))
        patch.setattr(RayWorkerHandle, "evaluate", lambda worker, *args: self._evaluate(worker, *args))

    def _generate(self, worker: Any, tasks: Any, weights: Any) -> Any:
        future = self.generate(worker, tasks, weights)
        if action := self.at_batch.pop(tasks[0].batch, None):
            self._strike(action, worker)
        return future

    def _evaluate(self, worker: Any, shard: Any, weights: Any) -> Any:
        future = self.evaluate(worker, shard, weights)
        if self.at_evaluation == (weights.version if weights else 0):
            self.at_evaluation = None
            self._strike("RolloutActor", worker)
        return future

    def _strike(self, action: Action, worker: Any) -> None:
        if action == "TeacherActor" and len(actors(action)) == 1:
            self.in_flight.append(stop_within_a_block(worker))
        else:
            time.sleep(0.05)  # let it begin
        if callable(action):
            action()
        else:
            kill(action)
            self.victims.append(action)


def stop_within_a_block(worker: Any) -> str:
    """Stop the only teacher while the worker waits for its answer about a block. Returns where the worker is."""
    import ray

    (teacher,) = actors("TeacherActor")
    os.kill(teacher, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while "_ask_once" not in (where := ray.get(worker.actor.heartbeat.remote())[1]):
        assert time.monotonic() < deadline, f"no block was asked about; the worker stands at {where!r}"
        if "teacher_router.py" in where:  # another call, such as one that opens sessions: let it end
            os.kill(teacher, signal.SIGCONT)
            time.sleep(0.01)
            os.kill(teacher, signal.SIGSTOP)
    return where


def after_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Call `act(step)` just after a step's line was written."""
    log_step = MetricsLog.step

    def step(self: MetricsLog, number: int, row: Any) -> None:
        log_step(self, number, row)
        act(number)

    monkeypatch.setattr(MetricsLog, "step", step)


def report_at_once(patch: pytest.MonkeyPatch) -> None:
    """Wait for the teacher pool's events after every step; otherwise the run may end before they arrive."""
    from switchkd.actors.shared_teacher import TeacherPoolHandle

    events = TeacherPoolHandle.events

    def reported(pool: Any) -> list[str]:
        import ray

        pool._events = pool._events or pool.actor.events.remote(pool._cursor)
        ray.wait([pool._events], timeout=60)
        return events(pool)

    patch.setattr(TeacherPoolHandle, "events", reported)


# --- processes and what they hold ------------------------------------------------------------------------------------


def actors(role: str = r"\w+Actor") -> list[int]:
    """Ids of this process's actor processes of a role. Ray names them `ray::RolloutActor`, with the running method."""
    return sorted(pid for pid, name in descendants(os.getpid()).items() if re.match(f"ray::{role}", name))


def kill(role: str) -> None:
    os.kill(actors(role)[0], signal.SIGKILL)


def wait_until(true: Callable[[], bool], otherwise: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def nothing_left(num_cpus: int = 9) -> None:
    """Assert that a run on the session's cluster left no process and no placement."""
    import ray

    wait_until(lambda: not actors(), "the run left actors behind")
    wait_until(lambda: ray.available_resources().get("CPU", 0) >= num_cpus, "the run left placements behind")


def free_ports(num: int) -> list[int]:
    probes = [socket.socket() for _ in range(num)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- comparisons -----------------------------------------------------------------------------------------------------


def same_rollouts(run: Path, other: Path, num: int | None = NUM_ROLLOUTS) -> None:
    """Assert equal ids, each once, with equal tokens, token sources and steps; `num`: the ids are range(num)."""
    ours, theirs = rollouts(run), rollouts(other)
    assert sorted(ours) == sorted(theirs)
    assert num is None or sorted(ours) == list(range(num))
    assert [i for i in ours if ours[i] != theirs[i]] == []


def same_losses(run: Path, other: Path, tolerance: float = 0) -> None:
    losses = [[row["loss/total"] for row in steps(folder)] for folder in (run, other)]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
