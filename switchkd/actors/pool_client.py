"""Polls a pool's actor for its replicas.

In: the number of the router's sessions at each replica. Out: `ReplicaView`.
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
"""Interval at which a router polls the replicas and their load."""
ASK_S = 10.0
"""Time limit for the pool's answer."""


class PoolClient:
    """`router`: the router's name, the same after a restart."""

    def __init__(self, pool: Any, router: str) -> None:
        self._pool = pool
        self._router = router
        self._pending: Any = None  # the call in flight
        self._next = 0.0

    def ask(self, sessions: Mapping[int, int]) -> ReplicaView | None:
        """Wait for the answer; None where the pool is restarting."""
        self._pending, self._next = None, time.monotonic() + POLL_S
        try:
            return cloudpickle.loads(ray.get(self._question(sessions), timeout=ASK_S))
        except ActorDiedError:  # Ray restarts it unless it was ended
            return ReplicaView(ready={}, draining={}, sessions={}, broken="their pool was ended")
        except RayError:
            return None

    def poll(self, sessions: Mapping[int, int]) -> ReplicaView | None:
        """Return the answer to the last call, where it has arrived; call again after POLL_S. Never waits."""
        if self._pending is None:
            if time.monotonic() >= self._next:
                self._pending = self._question(sessions)
            return None
        if not ray.wait([self._pending], timeout=0)[0]:
            return None
        answer, self._pending, self._next = self._pending, None, time.monotonic() + POLL_S
        try:
            return cloudpickle.loads(ray.get(answer))
        except RayError:
            return None

    def lost(self) -> None:
        """Report a replica that died."""
        self._pool.lost.remote()

    def _question(self, sessions: Mapping[int, int]) -> Any:
        return self._pool.members.remote(self._router, dict(sessions))
