"""The student's part of a round: it drafts a block token by token, or reads the one that the teacher drafted.

In: slots. Out: a `DraftBlock` (verify.py) with both models' distributions at every drafted position, made on request.

Shapes: R slots, K drafted positions, D hidden width, V shared vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from switchkd.algo.transfer import to_device
from switchkd.engines.base import StudentEngine
from switchkd.rollout.speculation import LatencyModel
from switchkd.rollout.state import RolloutParams, RolloutSlots, ragged_index
from switchkd.rollout.teacher_logits import TeacherLogits
from switchkd.rollout.top_logprobs import TopTokens
from switchkd.rollout.verify import DraftBlock, Draw, keyed_draws
from switchkd.types import Blocks, TokenSource, WriteRequest, Written


@dataclass(slots=True)
class Draft:
    """The student's draft: tokens int64 [R, K] (-1 beyond counts [R]), q_logits float32 [R, K, V] or None."""

    tokens: np.ndarray
    counts: np.ndarray
    q_logits: torch.Tensor | None
    read: np.ndarray  # int [R], tokens of each slot that the student's cache holds now


class Drafter:
    """`draw`: `algo.sampling.draw`, or a function that draws the same tokens."""

    def __init__(
        self, student: StudentEngine, reader: TeacherLogits, stop_ids: np.ndarray, costs: LatencyModel, draw: Draw
    ) -> None:
        self.student = student
        self.reader = reader
        self.stop_ids = stop_ids
        self.costs = costs
        self.draw = draw
        self.on_device = reader.device.type != "cpu"

    def draft(self, state: RolloutSlots, slots: np.ndarray, size: int) -> Draft:
        """The student writes up to `size` tokens a slot with its keyed draws; nothing is drafted past a stop."""
        starts = state.lens[slots]
        limits = np.minimum(size, state.max_lens[slots] - starts)
        groups = list(state.groups(slots))
        keep = any((params.rule.needs_rows and params.scored) or params.top_logprobs for params, _ in groups)
        tokens = np.full((len(slots), int(limits.max())), -1, np.int64)
        counts, read = np.zeros(len(slots), np.int64), state.student_lens[slots]
        q_logits: torch.Tensor | None = None
        alive = np.arange(len(slots))
        for k in range(tokens.shape[1]):
            if k == 0:
                unread = state.unread(slots, read, starts)
                ids, lengths = unread.values, unread.lengths
            else:
                ids, lengths = tokens[alive, k - 1], np.ones(len(alive), np.int32)
            with self.costs.timed("student", len(ids)):
                hidden = self._read(state.cache_slots[slots[alive]], read[alive], ids, lengths)
                logits = self.student.head.logits(_taken(hidden, np.cumsum(lengths) - 1))
                read[alive] += lengths
                tokens[alive, k] = self._draws(state, slots, groups, alive, k, logits)
            if keep and len(alive) == len(slots) and tokens.shape[1] == 1:
                q_logits = logits[:, None]
            elif keep:
                q_logits = logits.new_empty((*tokens.shape, logits.shape[-1])) if q_logits is None else q_logits
                q_logits[to_device(alive, logits.device), k] = logits
            counts[alive] += 1
            alive = alive[(limits[alive] > k + 1) & ~np.isin(tokens[alive, k], self.stop_ids)]
            if len(alive) == 0:
                break
        _store_draft(state, slots, tokens, counts)
        return Draft(tokens=tokens, counts=counts, q_logits=q_logits, read=read)

    def step_alone(self, state: RolloutSlots, slots: np.ndarray, version: int) -> None:
        """One token for slots that the student generates alone."""
        draft = self.draft(state, slots, 1)
        t = state.t(slots)
        state.student_lens[slots] = draft.read
        for params, members in state.groups(slots):
            if params.top_logprobs and draft.q_logits is not None:
                logits = draft.q_logits[to_device(members, draft.q_logits.device), 0]
                state.keep_tops(slots[members], t[members], None, TopTokens.of(logits, params.top_logprobs))
        state.emit(slots, draft.counts, sources=int(TokenSource.STUDENT), version=version, stop_ids=self.stop_ids)

    def student_block(self, state: RolloutSlots, slots: np.ndarray, draft: Draft) -> DraftBlock:
        """The student drafted; `state` holds the teacher's rows of the drafted positions."""

        def q_rows(rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
            assert draft.q_logits is not None, "the rule reads rows, so the draft has kept them"
            flat = draft.q_logits.flatten(0, 1)
            index = rows * draft.tokens.shape[1] + positions
            return _taken(flat, index)

        return DraftBlock(
            tokens=draft.tokens,
            counts=draft.counts,
            by_teacher=False,
            q_rows=q_rows,
            **self._teacher_rows(state, slots),
        )

    def teacher_block(self, state: RolloutSlots, slots: np.ndarray, written: Written) -> DraftBlock:
        """The teacher drafted; the student reads all but the last token, in one pass."""
        counts = written.tokens.lengths.astype(np.int64)
        tokens = np.full((len(slots), int(counts.max())), -1, np.int64)
        owners, positions = ragged_index(np.zeros(len(slots), np.int64), counts)
        tokens[owners, positions] = written.tokens.values
        _store_draft(state, slots, tokens, counts)
        unread = state.unread(slots, state.student_lens[slots], state.lens[slots] + counts - 1)
        lengths = unread.lengths
        ends = np.cumsum(lengths)
        with self.costs.timed("check", int(lengths.sum())):
            hidden = self._read(state.cache_slots[slots], state.student_lens[slots], unread.values, lengths)
        return DraftBlock(
            tokens=tokens,
            counts=counts,
            by_teacher=True,
            q_rows=lambda r, k: self.student.head.logits(_taken(hidden, ends[r] - counts[r] + k)),
            **self._teacher_rows(state, slots),
        )

    def _teacher_rows(self, state: RolloutSlots, slots: np.ndarray) -> dict[str, Any]:
        """The teacher's side of a `DraftBlock`. Only what is asked for meets the LM head."""
        first = state.t(slots)

        def values(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
            return state.teacher_rows[slots[rows], first[rows] + positions]

        top_rows = None
        if self.reader.kind == "top_logprobs":
            top_rows = lambda rows, positions: self.reader.top_rows(values(rows, positions))  # noqa: E731
        return {
            "p_rows": lambda rows, positions: self.reader.logits(values(rows, positions)),
            "top_rows": top_rows,
            "on_device": self.on_device,
        }

    def _read(self, cache_slots: np.ndarray, starts: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Read tokens into the student's cache: the hidden state after each, [N, D]."""
        return self.student.extend(cache_slots, starts.astype(np.int32), ids.astype(np.int32), lengths.astype(np.int32))

    def _draws(
        self,
        state: RolloutSlots,
        slots: np.ndarray,
        groups: list[tuple[RolloutParams, np.ndarray]],
        alive: np.ndarray,
        k: int,
        logits: torch.Tensor,
    ) -> np.ndarray:
        """The student's draws of position k of the live slots: int64 [n]."""
        t = state.t(slots[alive]) + k
        tokens = np.empty(len(alive), np.int64)
        for params, members in groups:
            some = np.arange(len(alive)) if len(groups) == 1 else np.flatnonzero(np.isin(alive, members))
            tokens[some] = keyed_draws(
                state,
                slots[alive[some]],
                t[some],
                _taken(logits, some),
                draw=self.draw,
                params=params,
                sampling=params.student,
                purpose=params.purpose,
            )
        return tokens


def write_request(
    state: RolloutSlots,
    slots: np.ndarray,
    *,
    params: RolloutParams,
    blocks: Blocks,
    counts: np.ndarray,
    stop_ids: np.ndarray,
) -> WriteRequest:
    """The teacher reads `blocks` and continues with its own keyed draws; all slots share `params`."""
    return WriteRequest(
        blocks=blocks,
        counts=counts.astype(np.int32),
        rollout_ids=state.rollout_ids[slots],
        positions=state.t(slots).astype(np.int32),
        run_seed=params.seed,
        purpose=int(params.purpose),
        temperature=params.teacher.temperature,
        top_p=params.teacher.top_p,
        top_k=params.teacher.top_k,
        stop_ids=stop_ids,
    )


def _store_draft(state: RolloutSlots, slots: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> None:
    """Put drafted tokens behind the completion's own."""
    rows, positions = np.nonzero(np.arange(tokens.shape[1]) < counts[:, None])
    state.tokens[slots[rows], state.lens[slots[rows]] + positions] = tokens[rows, positions]


def _taken(rows: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    if len(index) == len(rows) and (index == np.arange(len(index))).all():
        return rows
    return rows[to_device(index, rows.device)]
