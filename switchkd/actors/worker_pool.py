"""The rollout workers as `train.py` sees them: a sequence that grows and shrinks at its end, between two steps.

In: how to start worker number i, and how many there may be. Out: handles. A worker that is let go gets no new task,
ends the one it has, and is then gone; its number stays valid until that. What a worker writes depends on its tasks
alone, so neither changes a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, overload

import ray

from switchkd.actors import autoscaling
from switchkd.actors.placement_group import ProcessPlacement
from switchkd.actors.ray_futures import retry_until_alive, worker_future
from switchkd.config.errors import last_line
from switchkd.config.schema import ReplicaRange
from switchkd.controller.handles import WorkerHandle
from switchkd.types import EvalShard, RolloutTask, WeightRef

ROOM_S = 60.0
"""How long an additional worker may wait for its place before the pool gives up on it."""


class RayWorkerHandle:
    """A rollout actor's handle. Ray restarts a dead one by itself; its calls in flight end with WorkerLost."""

    def __init__(self, actor: Any, placement: ProcessPlacement) -> None:
        self.actor, self.placement = actor, placement
        self.leaving = self.seen_idle = False
        self.busy_s, self.given = 0.0, list[int]()  # since the last look
        self._out: Future[Any] | None = None
        self._since = 0.0

    def generate(self, tasks: list[RolloutTask], weights: WeightRef | None) -> Future[Any]:
        self.given.append(len(tasks))
        return self._watched(worker_future(self.actor.generate.remote(tasks, weights)))

    def push_weights(self, weights: WeightRef) -> None:
        self.actor.push_weights.remote(weights)

    def evaluate(self, shard: EvalShard, weights: WeightRef | None) -> Future[Any]:
        return self._watched(worker_future(self.actor.evaluate.remote(shard, weights)))

    def back(self) -> Future[None]:
        if self.leaving:  # nobody waits for it to come back
            gone: Future[None] = Future()
            gone.set_result(None)
            return gone
        return self._watched(retry_until_alive(self.actor.ready.remote))

    @property
    def idle(self) -> bool:
        return self._out is None or self._out.done()

    def _watched(self, future: Future[Any]) -> Future[Any]:
        self._out, self._since = future, time.monotonic()
        future.add_done_callback(lambda _: self._count())
        return future

    def _count(self) -> None:
        now = time.monotonic()
        self.busy_s, self._since = self.busy_s + now - self._since, now

    def look(self) -> tuple[float, list[int]]:
        """Seconds at work and the sizes of its calls, since the last look."""
        if not self.idle:
            self._count()
        found = self.busy_s, self.given
        self.busy_s, self.given = 0.0, []
        return found

    def end(self) -> None:
        ray.kill(self.actor)
        self.placement.free()


@dataclass(slots=True)
class StartingWorker:
    """A worker that is being started."""

    worker: RayWorkerHandle
    ready: Any
    since: float


class WorkerPool(Sequence[WorkerHandle]):
    """`len` and iteration are of those that take new tasks; those that leave stand behind them, by their number."""

    def __init__(
        self,
        workers: Sequence[RayWorkerHandle],
        span: ReplicaRange,
        start: Callable[[int], RayWorkerHandle],
        *,
        rows: int,
        wait_s: float = 0.0,
    ) -> None:
        self._workers, self._span, self._start, self._rows = list(workers), span, start, rows
        self._patience = max(ROOM_S, wait_s)
        self._coming: StartingWorker | None = None
        self._loads: list[autoscaling.Load] = []
        self._hold_until = 0.0

    def __len__(self) -> int:
        return sum(not worker.leaving for worker in self._workers)

    @overload
    def __getitem__(self, index: int) -> WorkerHandle: ...
    @overload
    def __getitem__(self, index: slice) -> list[WorkerHandle]: ...
    def __getitem__(self, index: int | slice) -> WorkerHandle | list[WorkerHandle]:
        return list(self)[index] if isinstance(index, slice) else self._workers[index]

    def __iter__(self) -> Iterator[WorkerHandle]:
        return iter(self._workers[: len(self)])

    @property
    def actors(self) -> list[RayWorkerHandle]:
        return list(self._workers)

    def autoscale(self, waited_s: float, elapsed_s: float) -> list[str]:
        """After a step that took `elapsed_s`, for `waited_s` of which the learner waited: what changed, in words."""
        if self._span.min == self._span.max or not self._workers:
            return []
        told = [*self._end_leaving(), *self._take_in()]
        load = self._load(waited_s, elapsed_s)
        if self._coming is not None:
            return told
        self._loads = [*self._loads, load][-autoscaling.DRAIN_LOOKS :]
        step = autoscaling.decide(self._loads, self._span)
        if step:
            self._loads = []
            told += self._grow(load) if step > 0 else self._shrink(load)
        return told

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        if self._coming is not None:
            self._coming.worker.end()

    def _load(self, waited_s: float, elapsed_s: float) -> autoscaling.Load:
        looks = [worker.look() for worker in self._workers]
        return autoscaling.of_tasks(
            num=len(self),
            elapsed_s=max(elapsed_s, 1e-6),
            busy_s=sum(busy for busy, _ in looks),
            waited_s=waited_s,
            tasks=[num for _, given in looks for num in given],
            rows=self._rows,
        )

    def _grow(self, load: autoscaling.Load) -> list[str]:
        why = f"the learner waits {load.wait_frac:.0%} of the time for {load.num} rollout workers"
        if len(self) < len(self._workers):
            stays = self._workers[len(self)]
            stays.leaving = stays.seen_idle = False
            return [f"{why}: the last one stays"]
        if time.monotonic() < self._hold_until:
            return []
        worker = self._start(len(self._workers))
        self._coming = StartingWorker(worker, worker.actor.ready.remote(), time.monotonic())
        return [f"{why}: one is added"]

    def _shrink(self, load: autoscaling.Load) -> list[str]:
        self._workers[len(self) - 1].leaving = True
        return [f"{load.num} rollout workers are busy {load.busy_frac:.0%}: one is let go"]

    def _take_in(self) -> list[str]:
        coming = self._coming
        if coming is None:
            return []
        if not ray.wait([coming.ready], timeout=0)[0]:
            if time.monotonic() - coming.since < self._patience or coming.worker.placement.wait(0):
                return []
            return self._give_up("the cluster has no room for one more rollout worker")
        try:
            ray.get(coming.ready)
        except ray.exceptions.RayError as error:
            return self._give_up(f"one more rollout worker could not start: {last_line(error)}")
        self._workers.append(coming.worker)
        self._coming = None
        return [f"{len(self)} rollout workers"]

    def _give_up(self, why: str) -> list[str]:
        assert self._coming is not None
        self._coming.worker.end()
        self._coming, self._hold_until = None, time.monotonic() + 10 * self._patience
        return [why]

    def _end_leaving(self) -> list[str]:
        """From the last on, so that numbers stay; one step after its last call, so that its answer has been taken."""
        told = []
        while self._workers[-1].leaving and self._workers[-1].seen_idle:
            self._workers.pop().end()
            told.append(f"{len(self._workers)} rollout workers")
        for worker in self._workers[len(self) :]:
            worker.seen_idle = worker.idle
        return told
