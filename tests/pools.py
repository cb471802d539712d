"""Doubles for the router's tests: a pool client whose view a test sets, and replicas in this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from switchkd.actors.replicas import ReplicaView


class FixedPool:
    """A pool client that returns `members` at every look."""

    def __init__(self, ready: dict[int, Any]) -> None:
        self.members = ReplicaView(ready=ready, draining={}, sessions={})
        self.reported: list[dict[int, int]] = []  # by the router
        self.num_lost = 0

    def ask(self, sessions: Any) -> ReplicaView:
        self.reported.append(dict(sessions))
        return self.members

    def poll(self, sessions: Any) -> ReplicaView:
        return self.ask(sessions)

    def lost(self) -> None:
        self.num_lost += 1


class ThunkReplica:
    """A replica whose calls are thunks, which `fetch` runs in place of ray.get; each raises the next of `faults`."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        self.faults: list[Exception] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name == "close":  # no caller waits for it
            return SimpleNamespace(remote=lambda *args: self._run(name, args))
        return SimpleNamespace(remote=lambda *args: lambda: self._run(name, args))

    def _run(self, name: str, args: tuple[Any, ...]) -> Any:
        self.calls.append(name)
        if self.faults:
            raise self.faults.pop(0)
        return getattr(self.teacher, name)(*args)


def fetch(thunk: Any, timeout: float | None = None) -> Any:
    return thunk()
