"""Keeps a pool of processes of one role (rollout workers, teacher replicas) running, and sizes it by load.

In: a `PoolOwner`: how to start a process, the load of the pool, when a drained process may end. Out: the members and
their states, and a line for every change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, RayError

from switchkd.actors.autoscaling import DRAIN_LOOKS, Load, decide
from switchkd.actors.placement_group import ProcessPlacement
from switchkd.actors.ray_futures import RESTART_S, cause_of
from switchkd.config.errors import ConfigError, first_line
from switchkd.config.schema import ReplicaRange

PATIENCE_S = 60.0
"""Time limit for the placement of an additional process."""
MAX_FAILURES = 3
"""Processes in a row that fail to start, after which the pool is broken."""


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # gets no new work


class Probe:
    """A pending call, and when it was answered. It queues with all other calls of the process."""

    def __init__(self, ref: Any) -> None:
        self.ref = ref
        self.sent = time.monotonic()
        self.answered = 0.0
        ref.future().add_done_callback(self._done)

    def _done(self, _: Any) -> None:
        self.answered = time.monotonic()

    @property
    def waited_s(self) -> float:
        """Seconds until the answer, or until now."""
        return (self.answered or time.monotonic()) - self.sent


@dataclass(slots=True)
class Member:
    """One process of a pool."""

    handle: Any
    placement: ProcessPlacement
    state: State
    since: float
    announced: bool  # an event reports when it becomes ready
    probe: Probe | None = None  # of `ready` while it starts, then of the pool's `question`
    answer: Any = None  # the last one to `question` ...
    waits: list[float] = field(default_factory=list)  # ... and how long calls queued since the last measurement
    measured: Any = None  # the answer at the last measurement


class PoolOwner(Protocol):
    """Interface of a pool's owner. `number` counts processes from 0."""

    def place(self, number: int) -> ProcessPlacement: ...

    def create(self, number: int, options: dict[str, Any]) -> Any:
        """Start the actor with these options; return its handle."""

    def measure(self, now: float) -> Load | None:
        """The load since the last measurement; None where it is too early to measure."""

    def num_sessions(self, number: int, now: float) -> int:
        """Number of sessions that must move if this process is drained."""

    def is_drained(self, number: int, now: float) -> bool:
        """Whether a draining process may end."""


class ProcessPool:
    """`question`: the method that is polled on ready processes. `placements`: for the first processes."""

    def __init__(
        self,
        owner: PoolOwner,
        role: str,
        limits: ReplicaRange,
        *,
        placements: Sequence[ProcessPlacement] = (),
        wait_s: float = 0.0,
        question: str = "",
    ) -> None:
        self.role = role
        self.limits = limits
        self.members: dict[int, Member] = {}
        self.next_number = 0
        self.placements = list(placements)
        self.events: list[str] = []
        self.broken = ""  # the reason why no process can start
        self.refused = False  # that reason is a ConfigError
        self._owner = owner
        self._question = question
        self._patience_s = max(PATIENCE_S, wait_s)
        self._ever_ready = False
        self._num_failed = 0
        self._hold_until = 0.0  # earliest time to add a process
        self._loads: list[Load] = []

    def within(self, *states: State) -> dict[int, Member]:
        return {number: member for number, member in self.members.items() if member.state in states}

    def reconcile(self, now: float) -> None:
        """Process the answers, end drained members, replace lost ones, and add or drain one by load."""
        for number in list(self.members):
            self._poll(number, now)
        for number in reversed(self.within(State.DRAINING)):
            if self._owner.is_drained(number, now):
                self.end(number)
                self.events.append(f"{self.role} {number} is drained and has ended")
        while len(self.within(State.STARTING, State.READY)) < self.limits.min and not self.broken:
            self.start(now)
        self._scale(now)

    def start(self, now: float, state: State = State.STARTING) -> None:
        """Start one more process. With READY the caller waits until it is ready."""
        number = self.next_number
        placement = self.placements.pop(0) if self.placements else self._owner.place(number)
        self.register(number, self._owner.create(number, placement.options()), placement, now, state)

    def register(
        self, number: int, handle: Any, placement: ProcessPlacement, now: float, state: State = State.STARTING
    ) -> None:
        """Add a started process to the pool."""
        member = Member(handle=handle, placement=placement, state=state, since=now, announced=self._ever_ready)
        if state is State.STARTING:
            member.probe = Probe(handle.ready.remote())
        self._ever_ready |= state is State.READY
        self.members[number] = member
        self.next_number = number + 1

    def drain(self, number: int, now: float, reason: str) -> None:
        """Give a process no new work, and end it once it has none."""
        self._loads = []
        self.members[number].state, self.members[number].since = State.DRAINING, now
        self.events.append(f"{reason}: {self.role} {number} is drained")

    def end(self, number: int) -> None:
        member = self.members.pop(number)
        self._loads = []
        ray.kill(member.handle)
        member.placement.free()

    def close(self) -> None:
        for number in list(self.members):
            self.end(number)
        for placement in self.placements:
            placement.free()

    def _poll(self, number: int, now: float) -> None:
        """Process a member's answer, and poll it again."""
        member = self.members[number]
        if member.probe is None:
            return
        if not member.probe.answered:
            self._check_placement(number, now)
            return
        try:
            answer = ray.get(member.probe.ref)
        except ActorUnavailableError:
            self._restarted(number, now)
        except RayError as error:
            cause = cause_of(error) if "creation task" in first_line(error) else error
            self.refused = isinstance(cause, ConfigError)
            self._lost(number, first_line(cause), now)
        else:
            self._answered(number, answer, now)

    def _answered(self, number: int, answer: Any, now: float) -> None:
        member = self.members[number]
        if member.state is State.STARTING:
            member.state, member.since = State.READY, now
            self._ever_ready, self._num_failed, self._loads = True, 0, []
            if member.announced:
                self.events.append(f"{self.role} {number} works")
        elif member.probe is not None:
            member.waits.append(member.probe.waited_s)
            member.answer = answer
        member.probe = Probe(getattr(member.handle, self._question).remote()) if self._question else None

    def _restarted(self, number: int, now: float) -> None:
        """Poll a member that Ray restarts until it answers, for RESTART_S at most."""
        member = self.members[number]
        if member.state is State.DRAINING:
            self.end(number)
            return
        if member.state is State.STARTING and now - member.since > RESTART_S:
            self._lost(number, f"it dies whenever it is started, for {RESTART_S:g} s now; see its log", now)
            return
        if member.state is State.READY:
            self.events.append(f"{self.role} {number} died and is started again")
            member.state, member.since, member.announced = State.STARTING, now, True
            member.answer, member.measured, member.waits = None, None, []
        member.probe = Probe(member.handle.ready.remote())

    def _lost(self, number: int, reason: str, now: float) -> None:
        """Remove a member that does not come back. `reconcile` replaces it where too few are left."""
        starting = self.members[number].state is State.STARTING
        self.end(number)
        self.events.append(f"{self.role} {number} is lost: {reason}")
        if not starting:
            return
        self._num_failed += 1
        self._hold_until = now + 10 * self._patience_s
        if self._num_failed >= (MAX_FAILURES if self._ever_ready else 1):
            self.broken = reason

    def _check_placement(self, number: int, now: float) -> None:
        """Give up on an additional process that gets no placement."""
        member = self.members[number]
        overdue = member.state is State.STARTING and now - member.since > self._patience_s
        additional = len(self.within(State.STARTING, State.READY)) > self.limits.min
        if overdue and additional and not member.placement.wait(0):
            self.end(number)
            self._hold_until = now + 10 * self._patience_s
            self.events.append(f"one more {self.role} cannot be placed on the cluster")

    def _scale(self, now: float) -> None:
        load = self._owner.measure(now)
        if load is None or self.within(State.STARTING):
            return
        self._loads = [*self._loads, load][-DRAIN_LOOKS:]
        change = decide(self._loads, self.limits)
        if change > 0 and now >= self._hold_until:
            self._loads = []
            waiting = f"{load.queue:.1f} requests wait for each of {load.num} {self.role}s"
            self.events.append(f"{waiting}, {load.wait_frac:.0%} of the time: one is added")
            self.start(now)
        elif change < 0:
            ready = self.within(State.READY)
            emptiest = min(ready, key=lambda number: (self._owner.num_sessions(number, now), -number))
            self.drain(emptiest, now, f"{load.num} {self.role}s are busy {load.busy_frac:.0%}")
