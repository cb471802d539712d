"""When a pool of processes grows and when it shrinks: a pure function of what was measured lately.

In: a few `Load`s of a pool, oldest first, all since its size last changed. Out: +1, -1 or 0.

One is added when requests both queue (at least half a request waits per process) and spend a quarter of their time
waiting, three measurements in a row. One is drained when requests hardly wait and the others would be busy at most 60%
of the time with its work too, ten measurements in a row. Between the two lies a wide band in which nothing happens, and
every change starts the count anew, so that a pool settles and does not swing.
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

    num: int  # processes that work in it
    busy_frac: float  # of their time, in which they computed
    queue: float  # requests that wait, on average, per process
    wait_frac: float  # of the time until a request's answer, in which it waited

    @classmethod
    def from_calls(cls, *, num: int, elapsed_s: float, busy_s: float, calls: int, wait_s: float) -> Load:
        """The load of servers that answer one call at a time: `busy_s` and `calls` of all together, `wait_s` the mean
        time that a call queued. The queue is as long as their rate times that (Little)."""
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
        """The load of rollout workers: `tasks` of each call, of which `rows` are written at the same time and the
        others wait; `waited_s` the time that the learner waited for them."""
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
