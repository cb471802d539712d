"""Tasks become rollouts: draft, verify, accept, until every completion has ended.

In: tasks (prompt, completion source, stage) and how each is generated (`RolloutParams`). Out: finished `Rollout`s,
handed to `emit` as soon as they end. The worker owns the tokens; the student engine and the teacher only hold caches of
them, so either can be lost and rebuilt without changing a token.

    admit ─► draft: the student or the teacher, K tokens ─► the other model reads them ─► verify, accept ─► finish
      ▲                                                                                                       │
      └──────────────────────── a finished completion's slot takes the next task ◄────────────────────────────┘

A completion occupies a slot of `RolloutSlots` and is generated in one of three ways. Where both models matter, one of
them drafts and the other reads, as above; `speculation.py` chooses the drafter. Where only the student writes, it
generates alone, and the teacher reads the finished completion once. Where only the teacher writes from now on, a
completion gives up its place in the student's cache and waits until the teacher can write for a whole batch of such.

One teacher call is a `PendingCall`. With `overlap`, half of the slots draft while the call of the others is pending.
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

from switchkd.algo.sampling import NEAR_TIE, draw
from switchkd.engines.base import OutputHead, StudentEngine, Teacher, TeacherBusy
from switchkd.rollout.draft import Drafter, write_request
from switchkd.rollout.request import Emit, GenerationRequest
from switchkd.rollout.score_references import ReferenceScorer
from switchkd.rollout.speculation import NO_DRAFT, DraftPlan, SpeculationPolicy
from switchkd.rollout.state import RUNNING, RolloutParams, RolloutSlots, ragged_index
from switchkd.rollout.teacher_client import BUSY_S, TeacherClient
from switchkd.rollout.teacher_logits import TeacherLogits
from switchkd.rollout.verify import DraftBlock, Draw, verify
from switchkd.types import Blocks, CompletionSource, PackedWeights, Ragged, TeacherOutput, TokenSource, Written

WRITE_SPAN = 8
"""Tokens that the teacher writes alone between two looks at which slots are waiting for it."""


@dataclass(slots=True)
class PendingCall:
    """A pending teacher call, the slots that wait for it, and what to do with its answer."""

    slots: np.ndarray
    answer: Future
    on_result: Callable[[Any], None]


class SwitchingGenerator:
    """Generates completions with a student engine and a teacher, local or remote. `draw`: `algo.sampling.draw`, or a
    function that draws the same tokens."""

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
        draw: Draw = draw,
    ) -> None:
        self.student = student
        self.reader = TeacherLogits(head, device, student.head.vocab_size)
        self.calls = TeacherClient(teacher, self.reader)
        self.reference_scorer = ReferenceScorer(self.calls, at_once=student.num_slots, stop_ids=stop_ids)
        self.overlap = overlap
        self.parks = drafter != "none"  # one token of each model at a time, whatever the rule says
        self.num_rounds = 0
        self.speculation = SpeculationPolicy(drafter, max_draft_tokens)
        self.draw = draw
        self.stop_ids = np.array(sorted(stop_ids), np.int64)
        self.drafter = Drafter(student, self.reader, self.stop_ids, self.speculation.costs, draw)
        self.state = RolloutSlots((), 0)  # of a call of `run`
        self._new_weights = new_weights  # given: versions are taken in mid-rollout (`reprefill`)

    @property
    def version(self) -> int:
        """The number of the weights in use."""
        return self.student.order[1]

    def run(self, requests: Sequence[GenerationRequest], emit: Emit) -> None:
        """Serve all requests; `emit` gets each rollout once, in the order in which they finish."""
        references = [r for r in requests if r.task.completion_source == CompletionSource.DATASET]
        groups: dict[int, list[GenerationRequest]] = {}
        for request in references:
            groups.setdefault(id(request.params), []).append(request)
        for members in groups.values():
            tasks = [request.task for request in members]
            self.reference_scorer.score(tasks, members[0].params, version=self.version, emit=emit)
        waiting = deque(r for r in requests if r.task.completion_source != CompletionSource.DATASET)
        pairs = [(request.task, request.params) for request in waiting]
        self.state = state = RolloutSlots(pairs, min(self.student.num_slots, len(pairs)))
        self._running = np.zeros(0, np.int64)  # slots in the order of admission
        pending: deque[PendingCall] = deque()
        if self.overlap:
            self.calls.start_thread()
        try:
            while waiting or len(self._running):
                self.num_rounds += 1
                self._refresh(pending)
                self._admit(waiting)
                running = self._running
                call = self._launch(running[~state.pending[running]], bool(pending))
                if call is not None:
                    pending.append(call)
                if pending and (call is None or len(pending) > self.overlap):
                    self._complete(pending.popleft())
                self._finish(emit)
        finally:
            self.calls.end_thread()
            self._close(self._running)
            self.state = RolloutSlots((), 0)  # a worker that waits keeps no teacher rows

    # ── admit, finish ──────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, waiting: deque[GenerationRequest]) -> None:
        """Give free slots to waiting requests. A busy teacher is back-pressure: wait, and continue with these slots."""
        if not waiting:
            return
        state, running = self.state, self._running
        used = state.cache_slots[running[self._needs_cache(running)]]
        free = np.setdiff1d(np.arange(self.student.num_slots), used).tolist()
        pairs = list(zip(waiting, free, strict=False))
        new = np.array([state.add(request.task, request.params, place) for request, place in pairs], np.int64)
        kept = len(new)
        while kept:
            try:
                self._open(new[:kept])
                break
            except TeacherBusy:
                if kept > 1:
                    kept //= 2
                elif len(running):
                    kept = 0
                else:
                    time.sleep(BUSY_S)
        state.free(new[kept:])
        for _ in range(kept):
            waiting.popleft()
        self._running = np.concatenate([running, new[:kept]])

    def _open(self, slots: np.ndarray) -> None:
        """Open the teacher's sessions of all slots that need it from the start."""
        both = slots[~self.state.student_only[slots]]
        self.calls.open(self.state.tasks_of(both))
        self.state.opened[both] = True

    def _close(self, slots: np.ndarray) -> None:
        opened = slots[self.state.opened[slots]]
        self.calls.close(self.state.rollout_ids[opened])

    def _finish(self, emit: Emit) -> None:
        """Emit the rollouts that are done, and free their slots."""
        done = self.state.done(self._running)
        if not done.any():
            return
        slots, self._running = self._running[done], self._running[~done]
        self._close(slots)
        rollouts = [self.state.rollout(slot, self.reader.kind, self.reader.dtype) for slot in slots.tolist()]
        self.state.free(slots)
        emit(rollouts)

    def _waits_for_teacher(self, slots: np.ndarray) -> np.ndarray:
        return self.state.teacher_only[slots] & (self.state.finish[slots] == RUNNING) & self.parks

    def _needs_cache(self, slots: np.ndarray) -> np.ndarray:
        """Whether the student still extends these slots: bool [n]."""
        return (self.state.finish[slots] == RUNNING) & ~self._waits_for_teacher(slots)

    def _refresh(self, pending: deque[PendingCall]) -> None:
        """`reprefill`: a newer version replaces the one in use, and every slot's cache is read anew."""
        packed = self._new_weights() if self._new_weights else None
        if packed is not None:
            while pending:  # they are verified with the version that drafted
                self._complete(pending.popleft())
            self.student.load_weights(packed)
            self.state.student_lens[self._running] = 0

    # ── next call ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _launch(self, slots: np.ndarray, others_pending: bool) -> PendingCall | None:
        """Start the next work on slots without a pending call; None where it needs no teacher, or there is none."""
        state, width = self.state, self.student.num_slots
        waits, needs_cache = self._waits_for_teacher(slots), self._needs_cache(slots)
        waiting_for_teacher = slots[waits]
        unscored = slots[(state.finish[slots] != RUNNING) & ~state.done(slots)]
        student_only = slots[needs_cache & state.student_only[slots]]
        both = slots[needs_cache & ~state.student_only[slots]]
        others = len(student_only) or len(both) or others_pending
        if len(waiting_for_teacher) >= width or (len(waiting_for_teacher) and not others):
            return self._write_on(waiting_for_teacher[:width])
        if len(unscored) >= width or (len(unscored) and not others):
            return self._score_finished(unscored[:width])
        if len(student_only):
            self.drafter.step_alone(state, student_only, self.version)
        if not len(both):
            return None
        params, members = next(state.groups(both))
        chosen = both[members[: -(-width // 2) if self.overlap else width]]
        plan = self.speculation.choose(params.rule, state.t(chosen), state.max_lens[chosen] - state.lens[chosen])
        if plan.drafter == "teacher":
            return self._teacher_drafts(chosen, params, plan)
        return self._student_drafts(chosen, params, plan)

    def _call_teacher(
        self,
        slots: np.ndarray,
        kind: str,
        tokens: int,
        on_result: Callable[[Any], None],
        request: Any,
        plan: DraftPlan | None,
    ) -> PendingCall:
        """Call the teacher: "read" scores a `Blocks`, "write" generates tokens. `plan` is the chosen one."""
        teacher = self.calls.teacher
        function: Callable[..., Any] = teacher.write if kind == "write" else teacher.score
        # a completion's first call also reads its prompt: it says nothing about the next one
        typical = bool((self.state.num_rounds[slots] > 0).all())

        def timed() -> Any:
            start = time.perf_counter()
            answer = function(request)
            if plan is not None and typical:
                steps = int(answer.tokens.lengths.max()) if kind == "write" else 1
                self.speculation.observe_call(plan, kind, tokens, (time.perf_counter() - start) / steps)
            return answer

        self.calls.num_calls += 1
        self.state.pending[slots] = True
        self.state.num_rounds[slots] += 1
        return PendingCall(slots, self.calls.submit(timed), on_result)

    def _complete(self, call: PendingCall) -> None:
        answer = self.calls.result(call.answer)
        self.state.pending[call.slots] = False
        call.on_result(answer)

    # ── who drafts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _student_drafts(self, slots: np.ndarray, params: RolloutParams, plan: DraftPlan) -> PendingCall:
        state = self.state
        draft = self.drafter.draft(state, slots, plan.num_tokens)
        lens, t = state.lens[slots], state.t(slots)
        has_next = state.num_teacher_rows[slots] > t  # the teacher's row of the next token is here already
        # without a draft it sends only accepted tokens, unless the teacher has read them already
        sent = draft.counts if plan != NO_DRAFT else draft.counts * has_next
        blocks = self._blocks(slots, lens + sent, lens - 1 + has_next)

        def on_result(output: TeacherOutput) -> None:
            self._count(slots, blocks.tokens.lengths, output)
            state.keep_rows(slots, t + has_next, output.rows)
            num_emitted, num_accepted = self._verify(slots, params, self.drafter.student_block(state, slots, draft))
            state.student_lens[slots] = np.minimum(lens + num_accepted, draft.read)
            state.teacher_lens[slots] = lens + np.minimum(num_accepted, sent)
            all_read = (num_accepted == num_emitted) & (num_emitted == sent)
            state.num_teacher_rows[slots] = t + num_emitted + all_read

        return self._call_teacher(slots, "read", len(blocks.tokens.values), on_result, blocks, plan)

    def _teacher_drafts(self, slots: np.ndarray, params: RolloutParams, plan: DraftPlan) -> PendingCall:
        state = self.state
        lens, t = state.lens[slots], state.t(slots)
        counts = np.minimum(plan.num_tokens, state.max_lens[slots] - lens)
        request = self._write_request(slots, params, counts)

        def on_result(written: Written) -> None:
            self._count(slots, request.blocks.tokens.lengths, written.teacher_output)
            self._count_ties(slots, written)
            state.keep_rows(slots, t, written.teacher_output.rows)
            block = self.drafter.teacher_block(state, slots, written)
            num_emitted, num_accepted = self._verify(slots, params, block)
            # neither model has read the last drafted token
            read = lens + np.minimum(num_accepted, block.counts - 1)
            state.student_lens[slots] = state.teacher_lens[slots] = read
            state.num_teacher_rows[slots] = t + num_emitted

        return self._call_teacher(slots, "write", len(slots), on_result, request, plan)

    def _verify(self, slots: np.ndarray, params: RolloutParams, block: DraftBlock) -> tuple[np.ndarray, np.ndarray]:
        """See `verify`; also keeps the block's statistics."""
        state, num_drafted = self.state, int(block.counts.sum())
        record_outcome = None
        if self.speculation.drafter == "auto":
            record_outcome = partial(self.speculation.record_outcome, params.rule.name, block.by_teacher)
        with self.speculation.costs.timed("verify teacher" if block.by_teacher else "verify student", num_drafted):
            num_emitted, num_accepted = verify(
                state,
                slots,
                block,
                params=params,
                version=self.version,
                stop_ids=self.stop_ids,
                draw=self.draw,
                record_outcome=record_outcome,
            )
        state.num_drafted[slots] += block.counts
        state.num_accepted[slots] += num_accepted
        state.block_lengths[slots, state.num_blocks[slots]] = num_emitted
        state.num_blocks[slots] += 1
        return num_emitted, num_accepted

    # ── only one of the models writes ──────────────────────────────────────────────────────────────────────────────

    def _write_on(self, slots: np.ndarray) -> PendingCall:
        """The teacher writes all later tokens of these slots: it generates alone, without verification."""
        state = self.state
        params, members = next(state.groups(slots))
        slots = slots[members]
        t = state.t(slots)
        request = self._write_request(slots, params, np.minimum(WRITE_SPAN, state.max_lens[slots] - state.lens[slots]))

        def on_result(written: Written) -> None:
            self._count(slots, request.blocks.tokens.lengths, written.teacher_output)
            self._count_ties(slots, written)
            counts = written.tokens.lengths.astype(np.int64)
            owners, at = ragged_index(t, counts)
            which = slots[owners]
            state.tokens[which, state.prompt_lens[which] + at] = written.tokens.values
            state.threshold[which, at] = params.thresholds(at, state.steps[which], state.memory[which])
            sources = np.full(len(owners), TokenSource.TEACHER)
            state.emit(slots, counts, sources=sources, version=self.version, stop_ids=self.stop_ids)
            state.teacher_lens[slots] = state.lens[slots] - 1
            self._keep_unverified(slots, t, written.teacher_output.rows)

        return self._call_teacher(slots, "write", len(slots), on_result, request, None)

    def _score_finished(self, slots: np.ndarray) -> PendingCall:
        """The student wrote these completions alone; now the teacher reads each of them once."""
        state = self.state
        slots = slots[: self.calls.open_some(state.tasks_of(slots))]
        state.opened[slots] = True
        blocks = self._blocks(slots, state.lens[slots] - 1, state.prompt_lens[slots] - 1)

        def on_result(output: TeacherOutput) -> None:
            self._count(slots, blocks.tokens.lengths, output)
            self._keep_unverified(slots, np.zeros(len(slots), np.int64), output.rows)

        return self._call_teacher(slots, "read", len(blocks.tokens.values), on_result, blocks, None)

    def _keep_unverified(self, slots: np.ndarray, first: np.ndarray, rows: Ragged) -> None:
        """Keep the teacher's rows of tokens from `first` on that are not verified, and what is recorded of them."""
        state = self.state
        state.keep_rows(slots, first, rows)
        owners, t = ragged_index(first, rows.lengths)
        for params, members in state.groups(slots):
            if not (params.wants_uncertainty or params.top_logprobs):
                continue
            flat = np.flatnonzero(np.isin(owners, members))
            which, at, values = slots[owners[flat]], t[flat], rows.values[flat]
            if params.wants_uncertainty:
                tokens = state.tokens[which, state.prompt_lens[which] + at]
                state.uncertainty[which, at] = self.reader.uncertainty(values, tokens)
            if params.top_logprobs:
                state.keep_tops(which, at, self.reader.top(values, params.top_logprobs), None)

    # ── teacher calls ──────────────────────────────────────────────────────────────────────────────────────────────

    def _blocks(self, slots: np.ndarray, ends: np.ndarray, first_rows: np.ndarray) -> Blocks:
        """A call: each session continues after `teacher_lens` up to `ends`; rows are requested from `first_rows` on."""
        base_lens = self.state.teacher_lens[slots]
        return Blocks(
            session_ids=self.state.rollout_ids[slots],
            base_lens=base_lens.astype(np.int32),
            first_rows=first_rows.astype(np.int32),
            tokens=self.state.unread(slots, base_lens, ends),
        )

    def _write_request(self, slots: np.ndarray, params: RolloutParams, counts: np.ndarray) -> Any:
        """The tokens that the teacher has not read, at least the last one, and the request to continue from there."""
        state = self.state
        lens = state.lens[slots]
        state.num_teacher_rows[slots] = state.t(slots)
        state.teacher_lens[slots] = np.minimum(state.teacher_lens[slots], np.maximum(lens - 1, 0))
        blocks = self._blocks(slots, lens, lens - 1)
        return write_request(state, slots, params=params, blocks=blocks, counts=counts, stop_ids=self.stop_ids)

    def _count(self, slots: np.ndarray, num_tokens: np.ndarray, output: TeacherOutput) -> None:
        """Count what a call of `num_tokens` [n] tokens has read and sent."""
        state, lengths = self.state, output.rows.lengths
        self.reader.set_format(output)
        state.teacher_positions[slots] += np.maximum(num_tokens, lengths)
        state.num_scored_rows[slots] += lengths
        state.output_bytes[slots] += lengths * (output.nbytes // max(len(output.rows.values), 1))

    def _count_ties(self, slots: np.ndarray, written: Written) -> None:
        owners = np.repeat(np.arange(len(slots)), written.margins.lengths)
        near = written.margins.values < NEAR_TIE
        self.state.num_near_ties[slots] += np.bincount(owners, near, len(slots)).astype(np.int64)
