"""The rollout workers as a sequence of handles that grows and shrinks at its end, between two steps.

In: a function that starts worker i, and the config. Out: handles. A drained worker gets no new task, finishes its call,
and ends; its number is valid until then. Completions depend on tasks alone, so resizing changes no token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from switchkd.actors.autoscaling import Load
from switchkd.actors.placement_group import ProcessPlacement
from switchkd.actors.pool import Member, ProcessPool, State
from switchkd.actors.ray_futures import retry_until_alive, worker_future
from switchkd.config import resources
from switchkd.config.schema import Config, ReplicaRange
from switchkd.controller.handles import WorkerHandle
from switchkd.controller.local import completed
from switchkd.types import EvalShard, RolloutTask, WeightRef


class RayWorkerHandle:
    """A rollout actor's handle. Ray restarts a dead one by itself; its calls in flight end with WorkerLost."""

    def __init__(self, member: Member) -> None:
        self.actor = member.handle
        self.was_idle = False  # at the last check, while it drains
        self._member = member
        self._busy_s = 0.0  # since the last measurement
        self._num_tasks = list[int]()  # of each call since the last measurement
        self._call: Future[Any] | None = None
        self._since = 0.0

    def generate(self, tasks: list[RolloutTask], weights: WeightRef | None) -> Future[Any]:
        self._num_tasks.append(len(tasks))
        return self._timed(worker_future(self.actor.generate.remote(tasks, weights)))

    def push_weights(self, weights: WeightRef) -> None:
        self.actor.push_weights.remote(weights)

    def evaluate(self, shard: EvalShard, weights: WeightRef | None) -> Future[Any]:
        return self._timed(worker_future(self.actor.evaluate.remote(shard, weights)))

    def back(self) -> Future[None]:
        if self._member.state is State.DRAINING:  # its restart is not awaited
            return completed(lambda: None)
        return self._timed(retry_until_alive(self.actor.ready.remote))

    @property
    def idle(self) -> bool:
        return self._call is None or self._call.done()

    def measure(self) -> tuple[float, list[int]]:
        """Busy seconds, and the numbers of tasks of its calls, since the last measurement."""
        if not self.idle:
            self._count()
        measured = self._busy_s, self._num_tasks
        self._busy_s, self._num_tasks = 0.0, []
        return measured

    def _timed(self, future: Future[Any]) -> Future[Any]:
        self._call, self._since = future, time.monotonic()
        future.add_done_callback(lambda _: self._count())
        return future

    def _count(self) -> None:
        now = time.monotonic()
        self._busy_s, self._since = self._busy_s + now - self._since, now


class WorkerPool(Sequence[WorkerHandle]):
    """`len` and iteration cover the workers that take new tasks; draining ones follow, by number. `create` starts a
    worker with its number and an actor's options; one for each of `placements` is started at once."""

    def __init__(
        self, config: Config, placements: Sequence[ProcessPlacement], create: Callable[[int, dict[str, Any]], Any]
    ) -> None:
        self.create = create
        self._config = config
        self._step = (0.0, 0.0)  # seconds that the learner waited, and that the step took
        limits = ReplicaRange.of(config.rollout.num_workers)
        self._pool = ProcessPool(self, "rollout worker", limits, placements=placements, wait_s=config.cluster.wait_s)
        for _ in placements:
            self._pool.start(time.monotonic(), State.READY)
        self._handles = {number: RayWorkerHandle(member) for number, member in self._pool.members.items()}

    def __len__(self) -> int:
        return len(self._pool.within(State.READY))

    def __getitem__(self, index: Any) -> Any:
        return self._handles[index]

    def __iter__(self) -> Iterator[WorkerHandle]:
        return iter([self._handles[number] for number in self._pool.within(State.READY)])

    @property
    def actors(self) -> list[Any]:
        return [member.handle for member in self._pool.within(State.READY, State.DRAINING).values()]

    def autoscale(self, waited_s: float, elapsed_s: float) -> list[str]:
        """Resize after a step of `elapsed_s`, in which the learner waited `waited_s`. Returns messages."""
        pool = self._pool
        if pool.limits.min == pool.limits.max or not pool.members:
            return []
        self._step = waited_s, max(elapsed_s, 1e-6)
        pool.reconcile(time.monotonic())
        pool.next_number = len(pool.members)  # numbers are positions
        self._handles = {i: self._handles.get(i) or RayWorkerHandle(member) for i, member in pool.members.items()}
        events, pool.events = pool.events, []
        return events

    def close(self) -> None:
        self._pool.close()

    def place(self, number: int) -> ProcessPlacement:
        return ProcessPlacement(resources.of_role(self._config, "rollout"))

    def measure(self, now: float) -> Load | None:
        """The load; None while one is draining: a new worker would be placed behind it."""
        waited_s, elapsed_s = self._step
        measured = [self._handles[number].measure() for number in self._pool.within(State.READY, State.DRAINING)]
        if self._pool.within(State.DRAINING):
            return None
        return Load.from_tasks(
            num=len(self),
            elapsed_s=elapsed_s,
            busy_s=sum(busy_s for busy_s, _ in measured),
            waited_s=waited_s,
            tasks=[num for _, sizes in measured for num in sizes],
            rows=self._config.rollout.batch_size,
        )

    def num_sessions(self, number: int, now: float) -> int:
        """Zero for all, so that the last worker is drained."""
        return 0

    def is_drained(self, number: int, now: float) -> bool:
        """Whether the worker was idle at the last check already, so that its answer has been collected."""
        handle = self._handles[number]
        was_idle, handle.was_idle = handle.was_idle, handle.idle
        return was_idle
