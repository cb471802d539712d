"""Teacher replicas for a simulation, and the client of their pool.

In: the calls of `TeacherRouter`. Out: rows without meaning, after the stated seconds. Sessions are kept in the table
that real teachers use.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from switchkd.actors.pool_client import POLL_S
from switchkd.actors.replicas import ReplicaView, SessionReports
from switchkd.controller.local import completed
from switchkd.engines.sessions import SessionTable
from switchkd.types import Blocks, Ragged, Sessions, TeacherOutput, WriteRequest, Written


class Clock(Protocol):
    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
    def call(self, function: Callable[[], Any]) -> Future[Any]: ...
    def start(self, function: Callable[[], Any]) -> Future[Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds of calls, and the law of the completions."""

    student_s: float  # a pass, whatever the number of rows
    teacher_s: float  # a call or a written token, ...
    teacher_token_s: float  # ... and each token that it reads
    learner_s: float  # an optimizer step, ...
    learner_token_s: float  # ... and each token of the rank that has the most
    weights_s: float  # to publish, and again to load a version
    row_bytes: int  # teacher output of a token
    median_len: float  # of a log-normal completion length in tokens, ...
    sigma: float  # ... with this deviation of its logarithm
    reject_frac: float  # positions at which the two models draw different tokens


class SimulatedReplica:
    """A teacher replica as an actor's handle: calls are served one after the other."""

    def __init__(self, costs: Costs, clock: Clock, max_sessions: int, max_len: int) -> None:
        self.costs, self.clock = costs, clock
        self.sessions = SessionTable(max_sessions=max_sessions, max_len=max_len, lease_s=3600.0, clock=clock.now)
        self.num_calls, self.busy_s = 0, 0.0
        self._free_at = 0.0
        self._lock = Lock()  # in wall time several workers call at once

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda argument: self._serve(name, argument))

    def _serve(self, name: str, argument: Any) -> tuple[float, Future[Any]]:
        """Return when the answer arrives, and the answer."""
        with self._lock:
            answer = completed(getattr(self, f"_{name}"), argument)
            seconds = 0.0 if answer.exception() else self._seconds(name, argument)
            self._free_at = max(self._free_at, self.clock.now()) + seconds
            self.busy_s += seconds
            self.num_calls += name in ("score", "write")
            return self._free_at, answer

    def _seconds(self, name: str, argument: Any) -> float:
        call_s, token_s = self.costs.teacher_s, self.costs.teacher_token_s
        match name:
            case "open":
                return token_s * len(argument.tokens.values)
            case "score":
                return call_s + token_s * len(argument.tokens.values)
            case "write":
                return call_s * int(argument.counts.max()) + token_s * int(argument.counts.sum())
        return 0.0

    def _open(self, sessions: Sessions) -> None:
        self.sessions.open(sessions)

    def _close(self, session_ids: np.ndarray) -> None:
        self.sessions.close(session_ids)

    def _score(self, blocks: Blocks) -> TeacherOutput:
        ends = blocks.base_lens + blocks.tokens.lengths
        for session, end in zip(self.sessions.named_by(blocks), ends.tolist(), strict=True):
            session.tokens = np.zeros(end, np.int8)
        return self._rows(ends - blocks.first_rows)

    def _write(self, request: WriteRequest) -> Written:
        self._score(request.blocks)
        num = request.counts
        tokens = Ragged(np.zeros(int(num.sum()), np.int32), num)
        return Written(tokens=tokens, margins=tokens, teacher_output=self._rows(num))

    @staticmethod
    def _rows(lengths: np.ndarray) -> TeacherOutput:
        rows = Ragged(np.zeros((int(lengths.sum()), 1), np.float32), lengths)
        return TeacherOutput(kind="hidden_states", dtype="float32", rows=rows)


class SimulatedPool:
    """The client of a pool whose replicas are all ready: the other routers' sessions are POLL_S seconds old."""

    def __init__(
        self, replicas: dict[int, SimulatedReplica], reports: SessionReports, router: str, clock: Clock
    ) -> None:
        self._replicas, self._reports, self._router, self._clock = replicas, reports, router, clock
        self._next = 0.0

    def ask(self, sessions: Any) -> ReplicaView:
        now = self._clock.now()
        self._next = now + POLL_S
        self._reports.add(self._router, sessions, now)
        others = {number: self._reports.count(number, now, self._router) for number in self._replicas}
        return ReplicaView(ready=self._replicas, draining={}, sessions=others)

    def poll(self, sessions: Any) -> ReplicaView | None:
        return self.ask(sessions) if self._clock.now() >= self._next else None
