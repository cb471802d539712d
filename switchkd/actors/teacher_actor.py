"""One teacher replica behind Ray: the calls of `engines.base.Teacher`, one at a time.

Sessions exist in this process only. After a restart it raises UnknownSession, and the router opens them again. Ray
never retries calls: `base_lens` makes the router's own retries harmless.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from switchkd.actors.heartbeat import HEARTBEAT_GROUP, HeartbeatActor
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.config.schema import Config
from switchkd.types import Blocks, Sessions, TeacherOutput, WriteRequest, Written

if TYPE_CHECKING:
    from switchkd.engines.models.lm_head import LMHeadState


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLoad:
    """A replica's work since it started."""

    calls: int
    busy_s: float


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups=HEARTBEAT_GROUP)
class TeacherActor(HeartbeatActor):
    def __init__(self, config: dict[str, Any], secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        # not at the top: the pool imports this module, and needs no torch
        from switchkd.engines.build import make_teacher

        self.teacher = make_teacher(Config.model_validate(config))
        self.held: set[int] = set()  # sessions that were opened and not closed
        self.calls = 0
        self.busy_s = 0.0

    def load(self) -> ReplicaLoad:
        """Report the load. The call queues with all others, so its duration is the time that calls wait."""
        return ReplicaLoad(calls=self.calls, busy_s=self.busy_s)

    def lm_head_state(self) -> LMHeadState | None:
        """The LM head that turns hidden states into logits; None where the answers are logits."""
        return self.teacher.lm_head_state()

    def open(self, sessions: Sessions) -> None:
        self._timed(self.teacher.open, sessions)
        self.held.update(sessions.session_ids.tolist())

    def score(self, blocks: Blocks) -> TeacherOutput:
        return self._timed(self.teacher.score, blocks)

    def write(self, request: WriteRequest) -> Written:
        return self._timed(self.teacher.write, request)

    def close(self, session_ids: np.ndarray) -> None:
        self.teacher.close(session_ids)
        self.held.difference_update(session_ids.tolist())

    def close_within(self, first: int, end: int) -> None:
        """Close the open sessions of a run: first, ..., end - 1."""
        if left := [session for session in self.held if first <= session < end]:
            self.close(np.array(left, np.int64))

    def _timed(self, function: Callable[..., Any], *args: Any) -> Any:
        start = time.monotonic()
        try:
            return function(*args)
        finally:
            self.calls += 1
            self.busy_s += time.monotonic() - start
