"""A pool of teacher replicas as a router sees it, and how many sessions each replica has.

In: what routers report. Out: `ReplicaView`. Handles are opaque here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORGET_S = 60.0
"""A router that has not reported for so long has died: its sessions no longer count."""
DRAIN_S = 60.0
"""How long the sessions of a draining replica may take to finish before they are moved."""
NOTICE_S = 5.0
"""By then every router knows of a drain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaView:
    """What a router needs to know. Replicas are numbered; a number is never used again."""

    ready: Mapping[int, Any]  # take new sessions
    draining: Mapping[int, Any]  # finish those that they have
    sessions: Mapping[int, int]  # of all routers but the one that asks
    num_starting: int = 0
    broken: str = ""  # why no replica can be started any more


class SessionReports:
    """How many sessions each router has at each replica, as it last reported."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, Mapping[int, int]]] = {}

    def add(self, router: str, sessions: Mapping[int, int], now: float) -> None:
        self._reports[router] = now, dict(sessions)

    def count(self, number: int, now: float, without: str = "") -> int:
        """Sessions of all routers but one at a replica."""
        reports = ((router, at, sessions) for router, (at, sessions) in self._reports.items())
        return sum(
            sessions.get(number, 0) for router, at, sessions in reports if router != without and now - at <= FORGET_S
        )

    def is_drained(self, number: int, since: float, now: float) -> bool:
        """A replica that is draining since then may end: no router has a session there, and every one had NOTICE_S to
        know of the drain and to report; or its time is up."""
        return now - since > DRAIN_S or (now - since > NOTICE_S and not self.count(number, now))
