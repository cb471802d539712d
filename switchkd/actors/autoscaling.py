"""When a pool of processes grows and when it shrinks: a pure function of what was measured lately.

In: a few `Load`s of a pool, oldest first, all since its size last changed. Out: +1, -1 or 0.

One is added when requests both queue (at least half a request waits per process) and spend a quarter of their time
waiting, three looks in a row. One is drained when requests hardly wait and the others would be busy at most 60% of the
time with its work too, ten looks in a row. Between the two lies a wide band in which nothing happens, and every change
starts the count anew, so that a pool settles and does not swing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from switchkd.actors.placement_group import ProcessPlacement
from switchkd.actors.teacher_actor import ReplicaLoad
from switchkd.config.schema import ReplicaRange

ADD_QUEUE, ADD_WAIT, ADD_LOOKS = 0.5, 0.25, 3
DRAIN_QUEUE, DRAIN_WAIT, DRAIN_BUSY, DRAIN_LOOKS = 0.1, 0.1, 0.6, 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One look at a pool."""

    num: int  # processes that work in it
    busy_frac: float  # of their time, in which they computed
    queue: float  # requests that wait, on average, per process
    wait_frac: float  # of the time until a request's answer, in which it waited


def decide(loads: Sequence[Load], span: ReplicaRange) -> int:
    """+1: add a process, -1: drain one, 0: leave the pool as it is."""
    if not loads:
        return 0
    num = loads[-1].num
    if num < span.min:
        return 1
    if num > span.max:
        return -1
    if num < span.max and len(loads) >= ADD_LOOKS and all(map(_crowded, loads[-ADD_LOOKS:])):
        return 1
    if num > span.min and len(loads) >= DRAIN_LOOKS and all(map(_idle, loads[-DRAIN_LOOKS:])):
        return -1
    return 0


def _crowded(load: Load) -> bool:
    return load.queue >= ADD_QUEUE and load.wait_frac >= ADD_WAIT


def _idle(load: Load) -> bool:
    if load.num < 2 or load.queue > DRAIN_QUEUE or load.wait_frac > DRAIN_WAIT:
        return False
    return load.busy_frac * load.num / (load.num - 1) <= DRAIN_BUSY


def of_calls(*, num: int, elapsed_s: float, busy_s: float, calls: int, wait_s: float) -> Load:
    """Of servers that answer one call at a time: `busy_s` and `calls` of all together, `wait_s` the mean time that a
    call stood in line. How many stand there is their rate times that (Little)."""
    served = busy_s / calls if calls else 0.0
    return Load(
        num=num,
        busy_frac=min(1.0, busy_s / (elapsed_s * num)),
        queue=wait_s * calls / (elapsed_s * num),
        wait_frac=wait_s / (wait_s + served) if calls else 0.0,
    )


def of_tasks(*, num: int, elapsed_s: float, busy_s: float, waited_s: float, tasks: Sequence[int], rows: int) -> Load:
    """Of rollout workers: `tasks` of each call, of which `rows` are written at the same time and the others wait;
    `waited_s` the time that the learner waited for them."""
    waiting = [max(0, given - rows) / rows for given in tasks]
    return Load(
        num=num,
        busy_frac=min(1.0, busy_s / (elapsed_s * num)),
        queue=sum(waiting) / len(waiting) if waiting else 0.0,
        wait_frac=min(1.0, waited_s / elapsed_s),
    )


class Probe:
    """A call that is out, and when it was answered. It stands in the same line as all other calls."""

    def __init__(self, ref: Any) -> None:
        self.ref, self.asked, self.answered = ref, time.monotonic(), 0.0
        ref.future().add_done_callback(self._done)

    def _done(self, _: Any) -> None:
        self.answered = time.monotonic()

    @property
    def waited_s(self) -> float:
        """So far, where it is still out."""
        return (self.answered or time.monotonic()) - self.asked


@dataclass(slots=True)
class ReplicaMonitor:
    """What the pool knows of one replica."""

    placement: ProcessPlacement
    probe: Probe  # of `ready` while it starts, then of `load`
    told: bool = False  # its coming is worth a line
    waits: list[float] = field(default_factory=list)  # of the probes since the last look
    now: ReplicaLoad | None = None
    before: ReplicaLoad | None = None  # at the last look

    def look(self, elapsed_s: float) -> tuple[ReplicaLoad, float] | None:
        """What it did since the last look, and how long calls stood in line; None at the first."""
        waits, self.waits = self.waits, []
        before, self.before = self.before, self.now
        if before is None or self.now is None:
            return None
        if not waits:  # it has been at one call all the time
            return ReplicaLoad(calls=1, busy_s=elapsed_s), self.probe.waited_s
        did = ReplicaLoad(calls=self.now.calls - before.calls, busy_s=self.now.busy_s - before.busy_s)
        return did, sum(waits) / len(waits)


def load_of(looks: Sequence[tuple[ReplicaLoad, float]], elapsed_s: float) -> Load:
    """Of replicas that did so much in `elapsed_s`, each with the mean time that calls stood in line."""
    return of_calls(
        num=len(looks),
        elapsed_s=elapsed_s,
        busy_s=sum(did.busy_s for did, _ in looks),
        calls=sum(did.calls for did, _ in looks),
        wait_s=sum(wait for _, wait in looks) / len(looks),
    )
