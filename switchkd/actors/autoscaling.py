"""Decides when a pool of processes grows and when it shrinks: a pure function of the last measurements.

In: the `Load`s of a pool since its size last changed, oldest first. Out: +1, -1 or 0.

One process is added when, in three measurements in a row, requests queue (at least half a request per process) and
spend a quarter of their time waiting. One is drained when, in ten measurements in a row, requests hardly wait and the
others, with its work, would be busy at most 60% of the time. The band between the two is wide, and every change
restarts the count, so that the size of a pool does not oscillate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from switchkd.config.schema import ReplicaRange

ADD_QUEUE = 0.5
ADD_WAIT = 0.25
ADD_LOOKS = 3
DRAIN_QUEUE = 0.1
DRAIN_WAIT = 0.1
DRAIN_BUSY = 0.6
DRAIN_LOOKS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One measurement of a pool."""

    num: int  # processes that work
    busy_frac: float  # share of their time in which they computed
    queue: float  # mean number of waiting requests per process
    wait_frac: float  # share of a request's time in which it waited

    @classmethod
    def from_calls(cls, *, num: int, elapsed_s: float, busy_s: float, calls: int, wait_s: float) -> Load:
        """The load of servers that answer one call at a time: `busy_s` and `calls` of all servers, `wait_s` the mean
        time that a call queued. The queue's length is the rate of calls times `wait_s` (Little's law)."""
        call_s = busy_s / calls if calls else 0.0
        return cls(
            num=num,
            busy_frac=min(1.0, busy_s / (elapsed_s * num)),
            queue=wait_s * calls / (elapsed_s * num),
            wait_frac=wait_s / (wait_s + call_s) if calls else 0.0,
        )

    @classmethod
    def from_tasks(
        cls, *, num: int, elapsed_s: float, busy_s: float, waited_s: float, tasks: Sequence[int], rows: int
    ) -> Load:
        """The load of rollout workers: `tasks` counts each call's tasks, of which `rows` are written at the same time;
        `waited_s` is the time that the learner waited."""
        queues = [max(0, num_tasks - rows) / rows for num_tasks in tasks]
        return cls(
            num=num,
            busy_frac=min(1.0, busy_s / (elapsed_s * num)),
            queue=sum(queues) / len(queues) if queues else 0.0,
            wait_frac=min(1.0, waited_s / elapsed_s),
        )

    @property
    def crowded(self) -> bool:
        return self.queue >= ADD_QUEUE and self.wait_frac >= ADD_WAIT

    @property
    def idle(self) -> bool:
        if self.num < 2 or self.queue > DRAIN_QUEUE or self.wait_frac > DRAIN_WAIT:
            return False
        return self.busy_frac * self.num / (self.num - 1) <= DRAIN_BUSY


def decide(loads: Sequence[Load], limits: ReplicaRange) -> int:
    """+1: add a process, -1: drain one, 0: leave the pool as it is."""
    if not loads:
        return 0
    num = loads[-1].num
    if num < limits.min:
        return 1
    if num > limits.max:
        return -1
    if num < limits.max and len(loads) >= ADD_LOOKS and all(load.crowded for load in loads[-ADD_LOOKS:]):
        return 1
    if num > limits.min and len(loads) >= DRAIN_LOOKS and all(load.idle for load in loads[-DRAIN_LOOKS:]):
        return -1
    return 0
