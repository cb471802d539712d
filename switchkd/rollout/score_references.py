"""Completions that the data set wrote become rollouts: the teacher reads each of them once.

In: tasks with a reference. Out: rollouts whose tokens have the source `data`, or the teacher's signal alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from switchkd.rollout.questions import Reference
from switchkd.rollout.state import mean_tail_mass
from switchkd.rollout.teacher_client import TeacherClient, split
from switchkd.rollout.top_logprobs import top_logprobs
from switchkd.types import Blocks, Positions, Rollout, RolloutStats, RolloutTask, TeacherOutput, TokenSource

Emit = Callable[[list[Rollout]], None]


class ReferenceScorer:
    """`at_once`: how many the teacher reads in one call."""

    def __init__(self, calls: TeacherClient, *, at_once: int, stop_ids: frozenset[int], top_logprobs: int = 0) -> None:
        self.calls, self.at_once, self.stop_ids, self.top_logprobs = calls, at_once, stop_ids, top_logprobs
        self.version = 0

    def score(
        self, tasks: Sequence[RolloutTask], *, scored: bool, wants_uncertainty: bool, version: int, emit: Emit
    ) -> None:
        """References become rollouts: scored in one block each, as many at a time as the worker has slots."""
        self.version = version
        for first in range(0, len(tasks), self.at_once):
            part = tasks[first : first + self.at_once]
            if not scored:
                emit([self._rollout(task) for task in part])
                continue
            done: list[Rollout] = []

            def on_scored(
                some: Sequence[RolloutTask], teacher_output: TeacherOutput, done: list[Rollout] = done
            ) -> None:
                done += self._scored(some, teacher_output, wants_uncertainty)

            self.read(part, on_scored)
            emit(done)

    def exact(self, task: RolloutTask) -> TeacherOutput:
        """The teacher's exact rows for every reference token: hidden states, or whole rows."""
        found: list[TeacherOutput] = []

        def on_scored(tasks: Sequence[RolloutTask], teacher_output: TeacherOutput) -> None:
            if teacher_output.kind == "top_logprobs":
                num, first = len(teacher_output.values), len(task.prompt.token_ids) - 1
                question = Positions(
                    session_ids=np.array([task.rollout_id]),
                    positions=first + np.arange(num, dtype=np.int32),
                    lengths=np.array([num], np.int32),
                )
                teacher_output = self.calls.exact(question)
            found.append(teacher_output)

        self.read([task], on_scored)
        return found[0]

    def read(self, tasks: Sequence[RolloutTask], take: Callable[[Sequence[RolloutTask], TeacherOutput], None]) -> None:
        """The teacher reads all references; `score` gets its signal for every token while the sessions are open."""
        while tasks:
            num = self.calls.open_some(tasks)
            now, tasks = tasks[:num], tasks[num:]
            prompt_lens = np.array([len(task.prompt.token_ids) for task in now], np.int32)
            teacher_output = self.calls.score(
                Blocks(
                    session_ids=np.array([task.rollout_id for task in now], np.int64),
                    base_lens=prompt_lens,
                    first_rows=prompt_lens - 1,
                    token_ids=np.concatenate([task.prompt.reference_ids[:-1] for task in now]).astype(np.int32),
                    lengths=np.array([max(len(task.prompt.reference_ids) - 1, 0) for task in now], np.int32),
                )
            )
            take(now, teacher_output)
            self.calls.close([task.rollout_id for task in now])

    def _scored(
        self, tasks: Sequence[RolloutTask], teacher_output: TeacherOutput, wants_uncertainty: bool
    ) -> list[Rollout]:
        row_pieces, ids = split(teacher_output), [task.prompt.reference_ids for task in tasks]
        asked = [Reference(task) for task in tasks]
        unc: list[np.ndarray | None] = [None] * len(tasks)
        if wants_uncertainty:
            unc = list(
                self.calls.uncertainty(asked, row_pieces, ids, [len(task.prompt.token_ids) - 1 for task in tasks])
            )
        return [self._rollout(*each) for each in zip(tasks, row_pieces, unc, asked, strict=True)]

    def _rollout(
        self,
        task: RolloutTask,
        teacher_rows: np.ndarray | None = None,
        unc: np.ndarray | None = None,
        asked: Reference | None = None,
    ) -> Rollout:
        ids = task.prompt.reference_ids
        num = len(ids)
        nan = np.full(num, np.nan, np.float32)
        stats = RolloutStats()
        if teacher_rows is not None and asked is not None and self.calls.reader.kind == "top_logprobs":
            stats = RolloutStats(
                output_bytes=teacher_rows.nbytes + asked.output_bytes, num_scored_rows=num, num_asked=asked.num_asked,
                tail_mass=mean_tail_mass(teacher_rows),
            )  # fmt: skip
        seen = (
            []
            if teacher_rows is None or not self.top_logprobs
            else [self.calls.reader.top(teacher_rows, self.top_logprobs)]
        )
        return Rollout(
            rollout_id=task.rollout_id,
            batch=task.batch,
            stage=task.stage,
            prompt_id=task.prompt.prompt_id,
            completion_source=task.completion_source,
            prompt_ids=task.prompt.token_ids.astype(np.int32),
            token_ids=ids.astype(np.int32),
            sources=np.full(num, TokenSource.DATA, np.uint8),
            weight_versions=np.full(num, self.version, np.int32),
            statistic=nan,
            threshold=nan,
            uncertainty=nan if unc is None else unc,
            teacher_output=None if teacher_rows is None else self.calls.reader.teacher_output(teacher_rows),
            finish_reason="eos" if num and int(ids[-1]) in self.stop_ids else "length",
            teacher=task.prompt.teacher,
            stats=stats,
            top_logprobs=top_logprobs(seen, [], num, self.top_logprobs),
        )
