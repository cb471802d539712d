"""Where a router finds the members of its pool: the pool's actor, asked now and then.

In: how many sessions the router has at each replica. Out: `ReplicaView`. See `teacher_router.Directory`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayError

from switchkd.actors.replicas import ReplicaView

POLL_S = 1.0
"""How often a router looks who is there and how busy they are."""
ASK_S = 10.0
"""How long the pool may take to answer."""


class PoolClient:
    """`router`: the asker's name, one and the same after a restart."""

    def __init__(self, pool: Any, router: str) -> None:
        self._pool, self._router = pool, router
        self._out: Any = None  # a question that is out
        self._next = 0.0

    def ask(self, sessions: Mapping[int, int]) -> ReplicaView | None:
        """Waits for the answer; None where the pool is just being started again."""
        self._out, self._next = None, time.monotonic() + POLL_S
        try:
            found: ReplicaView = cloudpickle.loads(ray.get(self._question(sessions), timeout=ASK_S))
            return found
        except ActorDiedError:  # it always comes back, unless somebody ended it
            return ReplicaView(ready={}, draining={}, sessions={}, broken="their pool was ended")
        except RayError:
            return None

    def poll(self, sessions: Mapping[int, int]) -> ReplicaView | None:
        """What has come in, if anything. Never waits."""
        if self._out is None:
            if time.monotonic() >= self._next:
                self._out = self._question(sessions)
            return None
        if not ray.wait([self._out], timeout=0)[0]:
            return None
        out, self._out, self._next = self._out, None, time.monotonic() + POLL_S
        try:
            found: ReplicaView = cloudpickle.loads(ray.get(out))
            return found
        except RayError:
            return None

    def lost(self) -> None:
        self._pool.lost.remote()

    def _question(self, sessions: Mapping[int, int]) -> Any:
        return self._pool.members.remote(self._router, dict(sessions))
