"""Who is in a pool of teacher replicas, who leaves it, and how many sessions each of them has.

In: what becomes of replicas, and what routers report. Out: `ReplicaView`, as a router sees them. Handles are opaque
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

FORGET_S = 60.0
"""A router that has not reported for so long has died: its sessions no longer count."""
DRAIN_S = 60.0
"""How long the sessions of a draining replica may take to finish before they are moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaView:
    """What a router needs to know. Replicas are numbered; a number is never used again."""

    ready: Mapping[int, Any]  # take new sessions
    draining: Mapping[int, Any]  # finish those that they have
    sessions: Mapping[int, int]  # of all routers but the one that asks
    num_starting: int = 0
    broken: str = ""  # why no replica can be started any more


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(slots=True)
class Replica:
    handle: Any
    state: State
    since: float


@dataclass(slots=True)
class Report:
    sessions: Mapping[int, int]
    at: float


@dataclass(slots=True)
class ReplicaRegistry:
    """The book of one pool."""

    broken: str = ""
    replicas: dict[int, Replica] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    num_ever: int = 0

    def add(self, handle: Any, now: float) -> int:
        """Its number. It takes no session before it is ready."""
        number = self.num_ever
        self.num_ever += 1
        self.replicas[number] = Replica(handle, State.STARTING, now)
        return number

    def set_state(self, number: int, state: State, now: float) -> None:
        self.replicas[number].state, self.replicas[number].since = state, now

    def remove(self, number: int) -> None:
        """Sessions that it still has are opened elsewhere by their routers."""
        del self.replicas[number]

    def within(self, *states: State) -> dict[int, Any]:
        return {number: replica.handle for number, replica in self.replicas.items() if replica.state in states}

    def report(self, router: str, sessions: Mapping[int, int], now: float) -> None:
        """How many sessions a router has at each replica."""
        self.reports[router] = Report(dict(sessions), now)

    def members(self, router: str, now: float) -> ReplicaView:
        """As that router should see them."""
        return ReplicaView(
            ready=self.within(State.READY),
            draining=self.within(State.DRAINING),
            sessions={number: self.sessions(number, now, without=router) for number in self.replicas},
            num_starting=len(self.within(State.STARTING)),
            broken=self.broken,
        )

    def sessions(self, number: int, now: float, without: str = "") -> int:
        alive = [each for name, each in self.reports.items() if name != without and now - each.at <= FORGET_S]
        return sum(each.sessions.get(number, 0) for each in alive)

    def drained(self, now: float, seen_s: float) -> list[int]:
        """Draining replicas that may end: nobody has a session there, and every router had `seen_s` to hear of the
        drain and to say so; or their time is up."""
        found = []
        for number, replica in self.replicas.items():
            if replica.state is not State.DRAINING:
                continue
            age = now - replica.since
            if age > DRAIN_S or (age > seen_s and not self.sessions(number, now)):
                found.append(number)
        return found

    def to_drain(self, now: float) -> int:
        """The ready replica with the fewest sessions, the youngest of equal ones."""
        return min(self.within(State.READY), key=lambda number: (self.sessions(number, now), -number))
