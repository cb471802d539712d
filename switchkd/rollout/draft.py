"""The student's part of a round: it drafts a block token by token, or reads the one that the teacher drafted.

In: rows. Out: a `DraftBlock` (verify.py) with both models' distributions at every drafted position, made on request.

Shapes: R rows, K drafted positions, D hidden width, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from switchkd.engines.base import StudentEngine
from switchkd.rollout.speculation import LatencyModel
from switchkd.rollout.state import RolloutState
from switchkd.rollout.teacher_logits import TeacherLogits, lazy
from switchkd.rollout.top_logprobs import TopTokens
from switchkd.rollout.verify import DraftBlock, draws
from switchkd.types import Blocks, TokenSource, WriteRequest, Written


@dataclass(slots=True)
class Draft:
    """The student's draft: tokens int64 [R, K] (-1 beyond counts [R]), q_logits float32 [R, K, V] or None."""

    tokens: np.ndarray
    counts: np.ndarray
    q_logits: torch.Tensor | None
    read: np.ndarray  # int [R], tokens of each row that the student's cache holds now


class Drafter:
    def __init__(
        self, student: StudentEngine, reader: TeacherLogits, stop_ids: frozenset[int], costs: LatencyModel
    ) -> None:
        self.student, self.reader, self.stop_ids, self.costs = student, reader, stop_ids, costs
        self._stops = np.array(sorted(stop_ids))

    def draft(self, rows: list[RolloutState], size: int) -> Draft:
        """The student writes up to `size` tokens a row with its keyed draws; nothing is drafted past a stop."""
        limits = np.array([min(size, row.max_new_tokens - row.t) for row in rows])
        keep = any((row.params.rule.needs_rows and row.params.scored) or row.params.top_logprobs for row in rows)
        tokens = np.full((len(rows), int(limits.max())), -1, np.int64)
        counts = np.zeros(len(rows), np.int64)
        read = np.array([row.student_len for row in rows])
        pending = [row.tokens[row.student_len :] for row in rows]
        q_logits: torch.Tensor | None = None
        alive = np.arange(len(rows))
        for k in range(tokens.shape[1]):
            with self.costs.timed("student", sum(len(pending[r]) for r in alive)):
                hidden = self._read([rows[r] for r in alive], read[alive], [pending[r] for r in alive])
                lasts = np.cumsum([len(pending[r]) for r in alive]) - 1
                logits = self.student.head.logits(_taken(hidden, lasts))
                read[alive] += [len(pending[r]) for r in alive]
                tokens[alive, k] = self._draws(rows, alive, k, logits)
            if keep:
                if len(alive) == len(rows) and tokens.shape[1] == 1:
                    q_logits = logits[:, None]
                else:
                    q_logits = logits.new_empty((*tokens.shape, logits.shape[-1])) if q_logits is None else q_logits
                    q_logits[torch.from_numpy(alive).to(logits.device), k] = logits
            counts[alive] += 1
            for r in alive:
                pending[r] = [int(tokens[r, k])]
            alive = alive[(limits[alive] > k + 1) & ~np.isin(tokens[alive, k], self._stops)]
            if len(alive) == 0:
                break
        return Draft(tokens=tokens, counts=counts, q_logits=q_logits, read=read)

    def step_alone(self, rows: list[RolloutState], version: int) -> None:
        """One token for rows that the student generates alone."""
        draft = self.draft(rows, 1)
        for r, row in enumerate(rows):
            row.student_len = int(draft.read[r])
            row.accept(int(draft.tokens[r, 0]), TokenSource.STUDENT, version, self.stop_ids)
            if row.params.top_logprobs and draft.q_logits is not None:
                row.student_top.append(TopTokens.of(draft.q_logits[r], row.params.top_logprobs))

    def student_block(self, draft: Draft, row_pieces: Sequence[np.ndarray]) -> DraftBlock:
        """The student drafted; `row_pieces` are the teacher's rows [>= counts[r], D] from its next position on."""

        def q_rows(rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
            assert draft.q_logits is not None, "the rule reads rows, so the draft has kept them"
            device = draft.q_logits.device
            return draft.q_logits[torch.from_numpy(rows).to(device), torch.from_numpy(positions).to(device)]

        return DraftBlock(
            tokens=draft.tokens,
            counts=draft.counts,
            by_teacher=False,
            **self._teacher_rows(row_pieces, draft.counts),
            q_rows=q_rows,
        )

    def teacher_block(self, rows: list[RolloutState], written: Written, row_pieces: Sequence[np.ndarray]) -> DraftBlock:
        """The teacher drafted; the student reads all but the last token, in one pass."""
        counts = written.tokens.lengths.astype(np.int64)
        tokens = np.full((len(rows), int(counts.max())), -1, np.int64)
        for r, part in enumerate(written.tokens.split()):
            tokens[r, : len(part)] = part
        unread = [row.tokens[row.student_len :] + tokens[r, : counts[r] - 1].tolist() for r, row in enumerate(rows)]
        lengths = np.array([len(part) for part in unread])
        ends = np.cumsum(lengths)
        with self.costs.timed("check", int(lengths.sum())):
            hidden = self._read(rows, np.array([row.student_len for row in rows]), unread)
        return DraftBlock(
            tokens=tokens,
            counts=counts,
            by_teacher=True,
            **self._teacher_rows(row_pieces, counts),
            q_rows=lambda r, k: self.student.head.logits(_taken(hidden, ends[r] - counts[r] + k)),
        )

    def _teacher_rows(self, row_pieces: Sequence[np.ndarray], counts: np.ndarray) -> dict[str, Any]:
        """The teacher's side of a `DraftBlock`."""
        brief = self.reader.kind == "top_logprobs"
        return {
            "p_rows": lazy(self.reader.logits, row_pieces, counts),
            "top_rows": lazy(self.reader.top_rows, row_pieces, counts) if brief else None,
        }

    def _read(self, rows: Sequence[RolloutState], starts: np.ndarray, tokens: Sequence[list[int]]) -> torch.Tensor:
        """Read tokens into the rows' slots: the hidden state after each, [N, D]."""
        return self.student.extend(
            np.array([row.slot for row in rows], np.int64),
            starts.astype(np.int32),
            np.concatenate([np.asarray(part, np.int32) for part in tokens]),
            np.array([len(part) for part in tokens], np.int32),
        )

    @staticmethod
    def _draws(rows: list[RolloutState], alive: np.ndarray, k: int, logits: torch.Tensor) -> np.ndarray:
        tokens = np.zeros(len(alive), np.int64)
        for members in grouped(alive, lambda r: (rows[r].params.student, rows[r].params.seed, rows[r].params.purpose)):
            params = rows[alive[members[0]]].params
            row_logits = logits if len(members) == len(alive) else logits[members]
            ahead = np.full(len(members), k)
            tokens[members] = draws(rows, alive[members], ahead, row_logits, params.student, params.purpose)
        return tokens


def write_request(
    rows: list[RolloutState], blocks: Blocks, counts: np.ndarray, stop_ids: frozenset[int]
) -> WriteRequest:
    """The teacher reads `blocks` and continues with its own keyed draws; all rows share `RolloutParams`."""
    params = rows[0].params
    return WriteRequest(
        blocks=blocks,
        counts=counts.astype(np.int32),
        rollout_ids=np.array([row.task.rollout_id for row in rows], np.int64),
        positions=np.array([row.t for row in rows], np.int32),
        run_seed=params.seed,
        purpose=int(params.purpose),
        temperature=params.teacher.temperature,
        top_p=params.teacher.top_p,
        top_k=params.teacher.top_k,
        stop_ids=np.array(sorted(stop_ids), np.int64),
    )


def grouped(items: Sequence[Any] | np.ndarray, key: Callable[[Any], object]) -> list[list[int]]:
    """Indices of items that share a key, in order of first appearance."""
    groups: dict[object, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(key(item), []).append(i)
    return list(groups.values())


def _taken(hidden: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    if len(index) == len(hidden) and (index == np.arange(len(index))).all():
        return hidden
    return hidden[torch.from_numpy(index).to(hidden.device)]
