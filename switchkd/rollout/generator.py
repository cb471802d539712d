"""Tasks become rollouts: draft, verify, accept, until every completion has ended.

In: tasks (prompt, completion source, stage) and how each is generated (`RolloutParams`). Out: finished `Rollout`s,
handed to `emit` as soon as they end. The worker owns the tokens; the student engine and the teacher only hold caches of
them, so either can be lost and rebuilt without changing a token.

    admit ─► draft: the student or the teacher, K tokens ─► the other model reads them ─► verify, accept ─► finish
      ▲                                                                                                       │
      └────────────────────────── a finished row's slot takes the next task ◄─────────────────────────────────┘

A row (`RolloutState`) is generated in one of three ways. Where both models matter, one of them drafts and the other
reads, as above; `speculation.py` chooses the drafter. Where only the student writes, it generates alone, and the
teacher reads the finished completion once. Where only the teacher writes from now on, a row gives up its slot and waits
until the teacher can write for a whole batch of such rows.

One teacher call is a `PendingCall`. With `overlap`, half of the rows draft while the call of the other half is pending.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from switchkd.algo.sampling import NEAR_TIE
from switchkd.engines.base import OutputHead, StudentEngine, Teacher, TeacherBusy
from switchkd.rollout.draft import Drafter, grouped, write_request
from switchkd.rollout.request import Emit, GenerationRequest
from switchkd.rollout.score_references import ReferenceScorer
from switchkd.rollout.speculation import NO_DRAFT, DraftPlan, SpeculationPolicy
from switchkd.rollout.state import RolloutState
from switchkd.rollout.teacher_client import BUSY_S, TeacherClient, blocks_of
from switchkd.rollout.teacher_logits import TeacherLogits
from switchkd.rollout.top_logprobs import TopTokens
from switchkd.rollout.verify import DraftBlock, verify
from switchkd.types import CompletionSource, PackedWeights, TeacherOutput, Written

WRITE_SPAN = 8
"""Tokens that the teacher writes alone between two looks at which rows are waiting for it."""


@dataclass(slots=True)
class PendingCall:
    """A pending teacher call, the rows that wait for it, and what to do with its answer."""

    rows: list[RolloutState]
    answer: Future
    on_result: Callable[[Any], None]


class SwitchingGenerator:
    """Generates completions with a student engine and a teacher, local or remote."""

    def __init__(
        self,
        *,
        student: StudentEngine,
        teacher: Teacher | None,
        head: OutputHead | None,
        stop_ids: frozenset[int],
        max_draft_tokens: int,
        drafter: str = "student",
        overlap: bool = False,
        device: str = "cpu",
        new_weights: Callable[[], PackedWeights | None] | None = None,
    ) -> None:
        self.student = student
        self.reader = TeacherLogits(head, device, student.head.vocab_size)
        self.calls = TeacherClient(teacher, self.reader)
        self.reference_scorer = ReferenceScorer(self.calls, at_once=student.num_slots, stop_ids=stop_ids)
        self.stop_ids = stop_ids
        self.overlap = overlap
        self.parks = drafter != "none"  # one token of each model at a time, whatever the rule says
        self.num_rounds = 0
        self.speculation = SpeculationPolicy(drafter, max_draft_tokens)
        self.drafter = Drafter(student, self.reader, stop_ids, self.speculation.costs)
        self._new_weights = new_weights  # given: versions are taken in mid-rollout (`reprefill`)

    @property
    def version(self) -> int:
        """The number of the weights in use."""
        return self.student.order[1]

    def run(self, requests: Sequence[GenerationRequest], emit: Emit) -> None:
        """Serve all requests; `emit` gets each rollout once, in the order in which they finish."""
        references = [r for r in requests if r.task.completion_source == CompletionSource.DATASET]
        for members in grouped(references, lambda request: id(request.params)):
            tasks, params = [references[i].task for i in members], references[members[0]].params
            self.reference_scorer.score(tasks, params, version=self.version, emit=emit)
        waiting = deque(r for r in requests if r.task.completion_source != CompletionSource.DATASET)
        rows: list[RolloutState] = []
        pending: deque[PendingCall] = deque()
        if self.overlap:
            self.calls.start_thread()
        try:
            while waiting or rows:
                self.num_rounds += 1
                self._refresh(rows, pending)
                self._admit(waiting, rows)
                call = self._launch([row for row in rows if not row.pending], bool(pending))
                if call is not None:
                    pending.append(call)
                if pending and (call is None or len(pending) > self.overlap):
                    self._complete(pending.popleft())
                done = [row for row in rows if row.done]
                self.calls.close([row.task.rollout_id for row in done if row.opened])
                rows = [row for row in rows if not row.done]
                if done:
                    emit([row.rollout(self.reader.kind, self.reader.dtype) for row in done])
        finally:
            self.calls.end_thread()
            self.calls.close([row.task.rollout_id for row in rows if row.opened])

    # ── admit ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, waiting: deque[GenerationRequest], rows: list[RolloutState]) -> None:
        """Give free slots to waiting requests. A busy teacher is back-pressure: wait, and continue with these rows."""
        free = sorted(set(range(self.student.num_slots)) - {row.slot for row in rows if self.needs_slot(row)})
        new = [
            RolloutState.start(request.task, request.params, slot) for request, slot in zip(waiting, free, strict=False)
        ]
        while new:
            try:
                self.calls.open([row.task for row in new if not row.student_only])
                break
            except TeacherBusy:
                if len(new) > 1:
                    new = new[: len(new) // 2]
                elif rows:
                    new = []
                else:
                    time.sleep(BUSY_S)
        for row in new:
            row.opened = not row.student_only
            waiting.popleft()
        rows.extend(new)

    def _waits_for_teacher(self, row: RolloutState) -> bool:
        return self.parks and row.teacher_only and not row.finish_reason

    def needs_slot(self, row: RolloutState) -> bool:
        return not row.finish_reason and not self._waits_for_teacher(row)

    def _refresh(self, rows: Sequence[RolloutState], pending: deque[PendingCall]) -> None:
        """`reprefill`: a newer version replaces the one in use, and every row's cache is read anew."""
        packed = self._new_weights() if self._new_weights else None
        if packed is not None:
            while pending:  # they are verified with the version that drafted
                self._complete(pending.popleft())
            self.student.load_weights(packed)
            for row in rows:
                row.student_len = 0

    # ── next call ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _launch(self, rows: list[RolloutState], others_fly: bool) -> PendingCall | None:
        """Start the next work on rows without a pending call; None where it needs no teacher, or there is none."""
        width = self.student.num_slots
        waiting_for_teacher = [row for row in rows if self._waits_for_teacher(row)]
        unscored = [row for row in rows if row.finish_reason and not row.done]
        student_only = [row for row in rows if row.student_only and not row.finish_reason]
        both = [row for row in rows if not row.student_only and self.needs_slot(row)]
        if len(waiting_for_teacher) >= width or (waiting_for_teacher and not (student_only or both or others_fly)):
            return self._write_on(waiting_for_teacher[:width])
        if len(unscored) >= width or (unscored and not (student_only or both or others_fly)):
            return self._score_finished(unscored[:width])
        if student_only:
            self.drafter.step_alone(student_only, self.version)
        if not both:
            return None
        (first, *_) = grouped(both, lambda row: id(row.params))
        half = -(-width // 2) if self.overlap else width
        return self._switch([both[i] for i in first[:half]])

    def _call_teacher(
        self,
        rows: list[RolloutState],
        kind: str,
        tokens: int,
        on_result: Callable[[Any], None],
        request: Any,
        plan: DraftPlan | None,
    ) -> PendingCall:
        """Call the teacher: "read" scores a `Blocks`, "write" generates tokens. `plan` is the chosen one."""
        teacher = self.calls.teacher
        function: Callable[..., Any] = teacher.write if kind == "write" else teacher.score
        # a row's first call also reads its prompt: it says nothing about the next one
        typical = all(row.stats.num_rounds for row in rows)

        def timed() -> Any:
            start = time.perf_counter()
            answer = function(request)
            if plan is not None and typical:
                steps = int(answer.tokens.lengths.max()) if kind == "write" else 1
                self.speculation.observe_call(plan, kind, tokens, (time.perf_counter() - start) / steps)
            return answer

        self.calls.num_calls += 1
        for row in rows:
            row.pending = True
            row.stats.num_rounds += 1
        return PendingCall(rows, self.calls.submit(timed), on_result)

    def _complete(self, call: PendingCall) -> None:
        answer = self.calls.result(call.answer)
        for row in call.rows:
            row.pending = False
        call.on_result(answer)

    def _switch(self, rows: list[RolloutState]) -> PendingCall:
        """Both models matter: one of them drafts, the other reads, and `verify` decides."""
        plan = self.speculation.choose(rows)
        return self._teacher_drafts(rows, plan) if plan.drafter == "teacher" else self._student_drafts(rows, plan)

    # ── who drafts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _student_drafts(self, rows: list[RolloutState], plan: DraftPlan) -> PendingCall:
        draft = self.drafter.draft(rows, plan.num_tokens)
        # without a draft it sends only accepted tokens, unless the teacher has read them already
        sent = draft.counts * np.array([plan != NO_DRAFT or row.lookahead_row is not None for row in rows])
        new_tokens = [row.tokens[row.teacher_len :] + draft.tokens[r, : sent[r]].tolist() for r, row in enumerate(rows)]
        first_positions = [len(row.tokens) - (row.lookahead_row is None) for row in rows]

        def on_result(teacher_output: TeacherOutput) -> None:
            self._count(rows, new_tokens, teacher_output)
            row_pieces = [
                teacher_rows if row.lookahead_row is None else np.concatenate([row.lookahead_row, teacher_rows])
                for row, teacher_rows in zip(rows, teacher_output.rows.split(), strict=True)
            ]
            prev_lens = [len(row.tokens) for row in rows]
            num_accepted = self._walk(rows, self.drafter.student_block(draft, row_pieces))
            for r, row in enumerate(rows):
                settled = len(row.tokens) - prev_lens[r]
                row.student_len = min(prev_lens[r] + int(num_accepted[r]), int(draft.read[r]))
                row.teacher_len = prev_lens[r] + min(int(num_accepted[r]), int(sent[r]))
                row.lookahead_row = (
                    row_pieces[r][settled : settled + 1] if num_accepted[r] == settled == sent[r] else None
                )
                row.stats.num_drafted += int(draft.counts[r])
                row.stats.num_accepted += int(num_accepted[r])
                row.stats.block_lengths.append(settled)
                row.append_teacher_rows(row_pieces[r][:settled])

        return self._call_teacher(
            rows, "read", sum(map(len, new_tokens)), on_result, blocks_of(rows, new_tokens, first_positions), plan
        )

    def _teacher_drafts(self, rows: list[RolloutState], plan: DraftPlan) -> PendingCall:
        counts = np.array([min(plan.num_tokens, row.max_new_tokens - row.t) for row in rows], np.int32)
        new_tokens, request = self._write_request(rows, counts)

        def on_result(written: Written) -> None:
            self._count(rows, new_tokens, written.teacher_output)
            self._count_ties(rows, written)
            row_pieces, prev_lens = written.teacher_output.rows.split(), [len(row.tokens) for row in rows]
            block = self.drafter.teacher_block(rows, written, row_pieces)
            num_accepted = self._walk(rows, block)
            for r, row in enumerate(rows):
                # neither model has read the last drafted token
                read = prev_lens[r] + min(int(num_accepted[r]), int(block.counts[r]) - 1)
                row.student_len = row.teacher_len = read
                row.stats.num_drafted += int(block.counts[r])
                row.stats.num_accepted += int(num_accepted[r])
                row.stats.block_lengths.append(len(row.tokens) - prev_lens[r])
                row.append_teacher_rows(row_pieces[r][: len(row.tokens) - prev_lens[r]])

        return self._call_teacher(rows, "write", len(rows), on_result, request, plan)

    def _walk(self, rows: list[RolloutState], block: DraftBlock) -> np.ndarray:
        num_accepted = np.zeros(len(rows), np.int64)
        kind = "walk teacher" if block.by_teacher else "walk student"
        with self.speculation.costs.timed(kind, int(block.counts.sum())):
            for members in grouped(rows, lambda row: id(row.params)):
                group = [rows[r] for r in members]
                rule = group[0].params.rule.name
                record_outcome = None
                if self.speculation.drafter == "auto":
                    record_outcome = partial(self.speculation.record_outcome, rule, block.by_teacher)
                num_accepted[members] = verify(
                    group,
                    block.of(members),
                    version=self.version,
                    stop_ids=self.stop_ids,
                    record_outcome=record_outcome,
                )
        return num_accepted

    # ── only one of the models writes ──────────────────────────────────────────────────────────────────────────────

    def _write_on(self, rows: list[RolloutState]) -> PendingCall:
        """The teacher writes all later tokens of these rows: it generates alone, without verification."""
        (first, *_) = grouped(rows, lambda row: id(row.params))
        rows = [rows[r] for r in first]
        counts = np.array([min(WRITE_SPAN, row.max_new_tokens - row.t) for row in rows], np.int32)
        new_tokens, request = self._write_request(rows, counts)

        def on_result(written: Written) -> None:
            self._count(rows, new_tokens, written.teacher_output)
            self._count_ties(rows, written)
            for row, tokens, teacher_rows in zip(
                rows, written.tokens.split(), written.teacher_output.rows.split(), strict=True
            ):
                row.write(tokens.tolist(), self.version, self.stop_ids)
                row.teacher_len = len(row.tokens) - 1
                self._read_alone(row, tokens, teacher_rows)

        return self._call_teacher(rows, "write", len(rows), on_result, request, None)

    def _score_finished(self, rows: list[RolloutState]) -> PendingCall:
        """The student wrote these rows alone; now the teacher reads each of them once."""
        pending = rows[: self.calls.open_some([row.task for row in rows])]
        for row in pending:
            row.opened = True
        new_tokens = [row.tokens[row.prompt_len : -1] for row in pending]

        def on_result(teacher_output: TeacherOutput) -> None:
            self._count(pending, new_tokens, teacher_output)
            for row, teacher_rows in zip(pending, teacher_output.rows.split(), strict=True):
                self._read_alone(row, np.array(row.tokens[row.prompt_len :]), teacher_rows)

        first_positions = [row.prompt_len - 1 for row in pending]
        return self._call_teacher(
            pending, "read", sum(map(len, new_tokens)), on_result, blocks_of(pending, new_tokens, first_positions), None
        )

    def _read_alone(self, row: RolloutState, tokens: np.ndarray, teacher_rows: np.ndarray) -> None:
        """Append the teacher's rows of tokens that are not verified."""
        row.append_teacher_rows(teacher_rows)
        if row.params.wants_uncertainty:
            row.uncertainty.extend(self.reader.uncertainty(teacher_rows, tokens).tolist())
        if row.params.top_logprobs:
            row.teacher_top.append(self.reader.top(teacher_rows, row.params.top_logprobs))
            if not row.student_only:  # the student never read them
                row.student_top.append(TopTokens.unknown(len(teacher_rows), row.params.top_logprobs))

    # ── teacher calls ──────────────────────────────────────────────────────────────────────────────────────────────

    def _write_request(self, rows: list[RolloutState], counts: np.ndarray) -> tuple[list[list[int]], Any]:
        """The tokens that the teacher has not read, at least the last one, and the request to continue from there."""
        for row in rows:
            row.lookahead_row = None
            row.teacher_len = min(row.teacher_len, max(len(row.tokens) - 1, 0))
        new_tokens = [row.tokens[row.teacher_len :] for row in rows]
        blocks = blocks_of(rows, new_tokens, [len(row.tokens) - 1 for row in rows])
        return new_tokens, write_request(rows, blocks, counts, self.stop_ids)

    def _count(
        self, rows: Sequence[RolloutState], new_tokens: Sequence[list[int]], teacher_output: TeacherOutput
    ) -> None:
        self.reader.set_format(teacher_output)
        for row, part, teacher_rows in zip(rows, new_tokens, teacher_output.rows.split(), strict=True):
            row.stats.teacher_positions += max(len(part), len(teacher_rows))
            row.stats.output_bytes += teacher_rows.nbytes
            row.stats.num_scored_rows += len(teacher_rows)

    @staticmethod
    def _count_ties(rows: Sequence[RolloutState], written: Written) -> None:
        for row, margins in zip(rows, written.margins.split(), strict=True):
            row.stats.num_near_ties += int((margins < NEAR_TIE).sum())
