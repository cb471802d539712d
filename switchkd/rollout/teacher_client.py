"""A rollout worker's calls to its teacher.

In: rows or tasks. Out: teacher outputs. Calls run one after the other, in the caller's thread or, while half-batches
overlap, in a separate one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from switchkd.engines.base import Teacher, TeacherBusy
from switchkd.types import Blocks, Ragged, RolloutTask, Sessions, TeacherOutput

if TYPE_CHECKING:
    from switchkd.rollout.teacher_logits import TeacherLogits

BUSY_S = 0.05
"""Pause before a worker calls a busy teacher again."""


class TeacherClient:
    """`reader` learns the format of the teacher's output. `now` and `sleep` replace those of the wall clock."""

    def __init__(
        self,
        teacher: Teacher | None,
        reader: TeacherLogits | None,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._now, self._sleep = now, sleep
        self._teacher = teacher
        self.reader: Any = reader  # None: with fake models
        self.num_calls = 0  # calls that the teacher computes for
        self.wait_s = 0.0  # time that the caller waited for answers
        self._thread: ThreadPoolExecutor | None = None

    def start_thread(self) -> None:
        """Make `submit` return before the call ends."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")

    def end_thread(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    @property
    def teacher(self) -> Teacher:
        if self._teacher is None:
            raise RuntimeError("this run has no teacher, but a task needs its output")
        return self._teacher

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Call the teacher. Every call uses this method, so that the teacher never gets two at once."""
        if self._thread is not None:
            return self._thread.submit(function, *args)
        answer: Future = Future()
        with self._waiting():
            answer.set_result(function(*args))
        return answer

    def result(self, answer: Future) -> Any:
        """The result of a submitted call; the time until then counts as waiting."""
        with self._waiting():
            return answer.result()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.wait_s += self._now() - started

    def open(self, tasks: Sequence[RolloutTask]) -> None:
        """Open the tasks' sessions. Raises TeacherBusy when they do not all fit."""
        if tasks:
            ids = np.array([task.rollout_id for task in tasks], np.int64)
            prompts = Ragged.concat([task.prompt.token_ids for task in tasks], np.int32)
            self.result(self.submit(self.teacher.open, Sessions(session_ids=ids, tokens=prompts)))

    def open_some(self, tasks: Sequence[RolloutTask]) -> int:
        """Open as many of the first tasks as the teacher has room for, at least one. Returns their number."""
        num = len(tasks)
        while True:
            try:
                self.open(tasks[:num])
                return num
            except TeacherBusy:
                if num == 1:
                    self._sleep(BUSY_S)
                num = max(num // 2, 1)

    def close(self, session_ids: Sequence[int] | np.ndarray) -> None:
        if len(session_ids):
            self.result(self.submit(self.teacher.close, np.asarray(session_ids, np.int64)))

    def score(self, blocks: Blocks) -> TeacherOutput:
        self.num_calls += 1
        teacher_output: TeacherOutput = self.result(self.submit(self.teacher.score, blocks))
        if self.reader is not None:
            self.reader.set_format(teacher_output)
        return teacher_output
