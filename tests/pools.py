"""Pools that are not there: a directory whose members a test changes, and replicas of this process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from switchkd.actors.replicas import ReplicaView


class Still:
    """A router's directory: it says what `members` says, at every look."""

    def __init__(self, ready: dict[int, Any]) -> None:
        self.members = ReplicaView(ready=ready, draining={}, sessions={})
        self.heard: list[dict[int, int]] = []  # what the router reported
        self.num_lost = 0

    def ask(self, sessions: Any) -> ReplicaView:
        self.heard.append(dict(sessions))
        return self.members

    def poll(self, sessions: Any) -> ReplicaView:
        return self.ask(sessions)

    def lost(self) -> None:
        self.num_lost += 1


class Thunks:
    """A replica whose calls are thunks, run by `fetch` in the place of ray.get. `fault` is raised by the next calls."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        self.faults: list[Exception] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name == "close":  # nobody waits for it
            return SimpleNamespace(remote=lambda *args: self._run(name, args))
        return SimpleNamespace(remote=lambda *args: lambda: self._run(name, args))

    def _run(self, name: str, args: tuple[Any, ...]) -> Any:
        self.calls.append(name)
        if self.faults:
            raise self.faults.pop(0)
        return getattr(self.teacher, name)(*args)


def fetch(thunk: Any, timeout: float | None = None) -> Any:
    return thunk()
