"""One teacher replica behind Ray: the calls of `engines.base.Teacher`, one at a time.

Sessions live in this process only. After a restart it knows none and says so (UnknownSession); the router opens them
again. Calls are never retried by Ray: `base_lens` makes the router's own retries harmless.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from switchkd.actors.environment import Secrets, prepare
from switchkd.actors.health import GROUP, Health
from switchkd.assembly import make_teacher
from switchkd.engines.heads import HeadArrays
from switchkd.sections import Config
from switchkd.types import Blocks, Positions, Sessions, Signal, WriteRequest, Written


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups=GROUP)
class TeacherActor(Health):
    def __init__(self, config: dict[str, Any], secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        self.teacher = make_teacher(Config.model_validate(config))

    def ready(self) -> bool:
        return True

    def head(self) -> HeadArrays | None:
        """The output head for everybody who rebuilds rows; None when whole rows travel."""
        return self.teacher.head_arrays()

    def open(self, sessions: Sessions) -> None:
        self.teacher.open(sessions)

    def score(self, blocks: Blocks) -> Signal:
        return self.teacher.score(blocks)

    def exact(self, question: Positions) -> Signal:
        return self.teacher.exact(question)

    def write(self, request: WriteRequest) -> Written:
        return self.teacher.write(request)

    def close(self, session_ids: np.ndarray) -> None:
        self.teacher.close(session_ids)
