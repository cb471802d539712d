"""Completions that the data set wrote become rollouts: the teacher reads each of them once.

In: tasks with a reference. Out: rollouts whose tokens have the source `data`, or the teacher's signal alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from switchkd.rollout.questions import Reference
from switchkd.rollout.state import mean_tail_mass
from switchkd.rollout.teacher_client import TeacherCalls, split
from switchkd.rollout.top_logprobs import candidates
from switchkd.types import Blocks, Positions, Rollout, RolloutStats, Signal, Source, Task

Emit = Callable[[list[Rollout]], None]


class References:
    """`at_once`: how many the teacher reads in one call."""

    def __init__(self, calls: TeacherCalls, *, at_once: int, stop_ids: frozenset[int], candidates: int = 0) -> None:
        self.calls, self.at_once, self.stop_ids, self.candidates = calls, at_once, stop_ids, candidates
        self.version = 0

    def take(self, tasks: Sequence[Task], *, scored: bool, wants_uncertainty: bool, version: int, emit: Emit) -> None:
        """References become rollouts: scored in one block each, as many at a time as the worker has slots."""
        self.version = version
        for first in range(0, len(tasks), self.at_once):
            part = tasks[first : first + self.at_once]
            if not scored:
                emit([self._rollout(task) for task in part])
                continue
            done: list[Rollout] = []

            def take(some: Sequence[Task], signal: Signal, done: list[Rollout] = done) -> None:
                done += self._scored(some, signal, wants_uncertainty)

            self.read(part, take)
            emit(done)

    def exact(self, task: Task) -> Signal:
        """The teacher's exact rows for every reference token: hidden states, or whole rows."""
        found: list[Signal] = []

        def take(tasks: Sequence[Task], signal: Signal) -> None:
            if signal.kind == "topk":
                num, first = len(signal.values), len(task.prompt.token_ids) - 1
                question = Positions(
                    session_ids=np.array([task.rollout_id]),
                    positions=first + np.arange(num, dtype=np.int32),
                    lengths=np.array([num], np.int32),
                )
                signal = self.calls.exact(question)
            found.append(signal)

        self.read([task], take)
        return found[0]

    def read(self, tasks: Sequence[Task], take: Callable[[Sequence[Task], Signal], None]) -> None:
        """The teacher reads all references; `take` gets its signal for every token while the sessions are open."""
        while tasks:
            num = self.calls.open_some(tasks)
            now, tasks = tasks[:num], tasks[num:]
            prompt_lens = np.array([len(task.prompt.token_ids) for task in now], np.int32)
            signal = self.calls.score(
                Blocks(
                    session_ids=np.array([task.rollout_id for task in now], np.int64),
                    base_lens=prompt_lens,
                    first_rows=prompt_lens - 1,
                    token_ids=np.concatenate([task.prompt.reference_ids[:-1] for task in now]).astype(np.int32),
                    lengths=np.array([max(len(task.prompt.reference_ids) - 1, 0) for task in now], np.int32),
                )
            )
            take(now, signal)
            self.calls.close([task.rollout_id for task in now])

    def _scored(self, tasks: Sequence[Task], signal: Signal, wants_uncertainty: bool) -> list[Rollout]:
        pieces, ids = split(signal), [task.prompt.reference_ids for task in tasks]
        asked = [Reference(task) for task in tasks]
        unc: list[np.ndarray | None] = [None] * len(tasks)
        if wants_uncertainty:
            unc = list(self.calls.uncertainty(asked, pieces, ids, [len(task.prompt.token_ids) - 1 for task in tasks]))
        return [self._rollout(*each) for each in zip(tasks, pieces, unc, asked, strict=True)]

    def _rollout(
        self,
        task: Task,
        piece: np.ndarray | None = None,
        unc: np.ndarray | None = None,
        asked: Reference | None = None,
    ) -> Rollout:
        ids = task.prompt.reference_ids
        num = len(ids)
        nan = np.full(num, np.nan, np.float32)
        stats = RolloutStats()
        if piece is not None and asked is not None and self.calls.reader.kind == "topk":
            stats = RolloutStats(
                signal_bytes=piece.nbytes + asked.signal_bytes, num_scored_rows=num, num_asked=asked.num_asked,
                tail_mass=mean_tail_mass(piece),
            )  # fmt: skip
        seen = [] if piece is None or not self.candidates else [self.calls.reader.top(piece, self.candidates)]
        return Rollout(
            rollout_id=task.rollout_id,
            batch=task.batch,
            stage=task.stage,
            prompt_id=task.prompt.prompt_id,
            origin=task.origin,
            prompt_ids=task.prompt.token_ids.astype(np.int32),
            token_ids=ids.astype(np.int32),
            sources=np.full(num, Source.DATA, np.uint8),
            weight_versions=np.full(num, self.version, np.int32),
            statistic=nan,
            threshold=nan,
            uncertainty=nan if unc is None else unc,
            signal=None if piece is None else self.calls.reader.signal(piece),
            finish_reason="eos" if num and int(ids[-1]) in self.stop_ids else "length",
            teacher=task.prompt.teacher,
            stats=stats,
            candidates=candidates(seen, [], num, self.candidates),
        )
