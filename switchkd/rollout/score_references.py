"""Makes rollouts of the data set's references: the teacher reads each of them once.

In: tasks with a reference. Out: rollouts whose tokens have the source `data`, or the teacher output alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from switchkd.rollout.request import Emit
from switchkd.rollout.state import RolloutParams, sum_tail_mass
from switchkd.rollout.teacher_client import TeacherClient
from switchkd.rollout.top_logprobs import top_logprobs
from switchkd.types import Blocks, Ragged, Rollout, RolloutStats, RolloutTask, TeacherOutput, TokenSource


class ReferenceScorer:
    """`at_once` is the number of references that the teacher reads in one call."""

    def __init__(self, calls: TeacherClient, *, at_once: int, stop_ids: frozenset[int]) -> None:
        self.calls, self.at_once, self.stop_ids = calls, at_once, stop_ids

    def score(self, tasks: Sequence[RolloutTask], params: RolloutParams, *, version: int, emit: Emit) -> None:
        """Emit the references as rollouts, each scored in one block, `at_once` of them at a time."""
        for first in range(0, len(tasks), self.at_once):
            part = tasks[first : first + self.at_once]
            if not params.scored:
                emit([self._rollout(task, params, version) for task in part])
                continue
            done: list[Rollout] = []
            for some, teacher_output in self._read(part):
                pairs = zip(some, teacher_output.rows.split(), strict=True)
                done += [self._rollout(task, params, version, rows) for task, rows in pairs]
            emit(done)

    def rows(self, task: RolloutTask) -> TeacherOutput:
        """The teacher's row for every reference token of one task."""
        ((_, teacher_output),) = self._read([task])
        return teacher_output

    def _read(self, tasks: Sequence[RolloutTask]) -> Iterator[tuple[Sequence[RolloutTask], TeacherOutput]]:
        """Let the teacher read all references. Yields some tasks with the rows of their tokens, sessions still open."""
        while tasks:
            num = self.calls.open_some(tasks)
            now, tasks = tasks[:num], tasks[num:]
            prompt_lens = np.array([len(task.prompt.token_ids) for task in now], np.int32)
            teacher_output = self.calls.score(
                Blocks(
                    session_ids=np.array([task.rollout_id for task in now], np.int64),
                    base_lens=prompt_lens,
                    first_rows=prompt_lens - 1,
                    tokens=Ragged.concat([task.prompt.reference_ids[:-1] for task in now], np.int32),
                )
            )
            yield now, teacher_output
            self.calls.close([task.rollout_id for task in now])

    def _rollout(
        self, task: RolloutTask, params: RolloutParams, version: int, teacher_rows: np.ndarray | None = None
    ) -> Rollout:
        ids, reader = task.prompt.reference_ids, self.calls.reader
        num = len(ids)
        nan = np.full(num, np.nan, np.float32)
        uncertainty, tops, stats = nan, [], RolloutStats()
        if teacher_rows is not None:
            if params.wants_uncertainty:
                uncertainty = reader.uncertainty(teacher_rows, ids)
            if params.top_logprobs:
                tops.append(reader.top(teacher_rows, params.top_logprobs))
            stats.output_bytes, stats.num_scored_rows = teacher_rows.nbytes, num
            if reader.kind == "top_logprobs":
                stats.tail_mass, stats.num_top_rows = sum_tail_mass(teacher_rows), num
        return Rollout(
            rollout_id=task.rollout_id,
            batch=task.batch,
            stage=task.stage,
            prompt_id=task.prompt.prompt_id,
            completion_source=task.completion_source,
            prompt_ids=task.prompt.token_ids.astype(np.int32),
            token_ids=ids.astype(np.int32),
            sources=np.full(num, TokenSource.DATA, np.uint8),
            weight_versions=np.full(num, version, np.int32),
            statistic=nan,
            threshold=nan,
            uncertainty=uncertainty,
            teacher_output=None if teacher_rows is None else reader.teacher_output(teacher_rows),
            finish_reason="eos" if num and int(ids[-1]) in self.stop_ids else "length",
            approximate=teacher_rows is not None and reader.kind == "top_logprobs",
            teacher=task.prompt.teacher,
            stats=stats,
            top_logprobs=top_logprobs(tops, [], num, params.top_logprobs),
        )
