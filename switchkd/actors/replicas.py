"""A router's view of a pool of teacher replicas, and the number of sessions at each replica.

In: the routers' reports. Out: `ReplicaView`. Handles are opaque here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORGET_S = 60.0
"""Time after which a router without a report counts as dead, and its sessions no longer count."""
DRAIN_S = 60.0
"""Time limit for the sessions of a draining replica to finish; then they are moved."""
NOTICE_S = 5.0
"""Time within which every router learns of a drain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaView:
    """The replicas of a pool by number. A number is never reused."""

    ready: Mapping[int, Any]  # take new sessions
    draining: Mapping[int, Any]  # finish their sessions
    sessions: Mapping[int, int]  # of all other routers
    num_starting: int = 0
    broken: str = ""  # the reason why no replica can start


class SessionReports:
    """The last reported number of sessions of each router at each replica."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, Mapping[int, int]]] = {}

    def add(self, router: str, sessions: Mapping[int, int], now: float) -> None:
        self._reports[router] = now, dict(sessions)

    def count(self, number: int, now: float, without: str = "") -> int:
        """Sessions at a replica, of all routers but `without`."""
        others = [report for router, report in self._reports.items() if router != without]
        return sum(sessions.get(number, 0) for at, sessions in others if now - at <= FORGET_S)

    def is_drained(self, number: int, since: float, now: float) -> bool:
        """Whether a replica that drains since `since` may end: no router has a session there and NOTICE_S have passed
        for routers to learn of the drain and report; or DRAIN_S have passed."""
        return now - since > DRAIN_S or (now - since > NOTICE_S and not self.count(number, now))
