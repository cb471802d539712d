"""Tasks become rollouts: propose, score, decide, accept, until every completion has ended.

In: tasks (prompt, origin, stage) and how each is written (`Mode`). Out: finished `Rollout`s, handed to `emit` as soon
as they end. The worker owns the tokens; the student engine and the teacher only hold caches of them, so either can be
lost and rebuilt without changing a token.

    admit ─► propose: the student drafts K tokens (or the teacher writes K) ─► the other reads them ─► walk ─► finish
      ▲                                                                                                       │
      └──────────────────────── a finished row's slot takes the next prompt ◄─────────────────────────────────┘

Rows go on in one of three lanes. Where both models matter they take the way above, the faster one (`pace.py`). Where
only the student writes it goes on alone, and the teacher reads the finished text once. Where only the teacher writes
from now on, a row leaves the student's slot and waits until the teacher can write for a whole batch of such rows.

One teacher call is a `Flight`. With `overlap`, half of the rows draft while the other half's flight is up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from switchkd.engines.base import OutputHead, StudentEngine, Teacher, TeacherBusy
from switchkd.rollout.draft import Proposer, grouped, write_request
from switchkd.rollout.questions import Briefs
from switchkd.rollout.score_references import References
from switchkd.rollout.speculation import LOCKSTEP, Lead, Pace
from switchkd.rollout.state import Mode, Row
from switchkd.rollout.teacher_client import BUSY_S, TeacherCalls, blocks_of, split
from switchkd.rollout.top_logprobs import Top
from switchkd.rollout.verify import NEAR_TIE, Block, walk
from switchkd.types import Rollout, Signal, Task, WeightBundle, Written, ragged

Emit = Callable[[list[Rollout]], None]
WRITE_SPAN = 8
"""Tokens that the teacher writes alone between two looks at which rows are waiting for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A task and how it is written; `mode` None takes the data set's reference as it stands."""

    task: Task
    mode: Mode | None
    scored: bool = True
    wants_uncertainty: bool = True  # of a reference: ATKD's UnC of its tokens


@dataclass(slots=True)
class Flight:
    """A teacher call that is up, the rows that wait for it, and what to do with its answer."""

    rows: list[Row]
    answer: Future
    land: Callable[[Any], None]


class RolloutWorker:
    """Writes completions with a student engine and a teacher (local or remote: it cannot tell)."""

    def __init__(
        self,
        *,
        student: StudentEngine,
        teacher: Teacher | None,
        head: OutputHead | None,
        stop_ids: frozenset[int],
        block_size: int,
        lead: str = "student",
        overlap: bool = False,
        device: str = "cpu",
        coarse: bool = False,
        candidates: int = 0,
        new_weights: Callable[[], WeightBundle | None] | None = None,
    ) -> None:
        self.student = student
        self.calls = TeacherCalls(teacher, head, device)
        self.reader = self.calls.reader
        self.references = References(self.calls, at_once=student.num_slots, stop_ids=stop_ids, candidates=candidates)
        self.stop_ids = stop_ids
        self.overlap = overlap
        self.coarse = coarse  # `teacher.decide`
        self.parks = lead != "lockstep"  # one token of each model at a time, whatever the rule says
        self.version = 0
        self.num_rounds = 0
        self.pace = Pace(lead, block_size)
        self.proposer = Proposer(student, self.reader, stop_ids, self.pace.costs)
        self._new_weights = new_weights  # given: versions are taken in mid-rollout (`reprefill`)

    def load_weights(self, bundle: WeightBundle) -> None:
        self.student.load_weights(bundle)
        self.version = bundle.version

    def run(self, jobs: Iterable[Job], emit: Emit) -> None:
        """Write all jobs; `emit` gets each rollout once, in the order in which they finish."""
        jobs = list(jobs)
        for same in _alike([job for job in jobs if job.mode is None]):
            tasks, first = [job.task for job in same], same[0]
            self.references.take(
                tasks, scored=first.scored, wants_uncertainty=first.wants_uncertainty, version=self.version, emit=emit
            )
        waiting = deque(job for job in jobs if job.mode is not None)
        rows: list[Row] = []
        flights: deque[Flight] = deque()
        if self.overlap:
            self.calls.start_thread()
        try:
            while waiting or rows:
                self.num_rounds += 1
                self._refresh(rows, flights)
                self._admit(waiting, rows)
                flight = self._launch([row for row in rows if not row.in_flight], bool(flights))
                if flight is not None:
                    flights.append(flight)
                if flights and (flight is None or len(flights) > self.overlap):
                    self._land(flights.popleft())
                done = [row for row in rows if row.done]
                self.calls.close([row.task.rollout_id for row in done if row.opened])
                rows = [row for row in rows if not row.done]
                if done:
                    emit([row.rollout(self.reader.kind, self.reader.dtype) for row in done])
        finally:
            self.calls.end_thread()
            self.calls.close([row.task.rollout_id for row in rows if row.opened])

    # ── admit ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, waiting: deque[Job], rows: list[Row]) -> None:
        """Give free slots to waiting jobs. A busy teacher is back-pressure: wait, and go on with what runs."""
        free = sorted(set(range(self.student.num_slots)) - {row.slot for row in rows if self._needs_slot(row)})
        new = [self._start(waiting[i], free[i]) for i in range(min(len(free), len(waiting)))]
        while new:
            try:
                self.calls.open([row.task for row in new if not row.alone])
                break
            except TeacherBusy:
                if len(new) > 1:
                    new = new[: len(new) // 2]
                elif rows:
                    new = []
                else:
                    time.sleep(BUSY_S)
        for row in new:
            row.opened = not row.alone
            waiting.popleft()
        rows.extend(new)

    def _parked(self, row: Row) -> bool:
        return self.parks and row.settled and not row.finish_reason

    def _needs_slot(self, row: Row) -> bool:
        return not row.finish_reason and not self._parked(row)

    @staticmethod
    def _start(job: Job, slot: int) -> Row:
        assert job.mode is not None
        return Row.start(job.task, job.mode, slot)

    def _refresh(self, rows: Sequence[Row], flights: deque[Flight]) -> None:
        """`reprefill`: a newer version replaces the one in use, and every row's cache is read anew."""
        bundle = self._new_weights() if self._new_weights else None
        if bundle is not None:
            while flights:  # they settle with the version that drafted
                self._land(flights.popleft())
            self.load_weights(bundle)
            for row in rows:
                row.student_len = 0

    # ── the lanes ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _launch(self, rows: list[Row], others_fly: bool) -> Flight | None:
        """The next piece of work on rows that wait for nothing; None where it needed no teacher, or there was none."""
        width = self.student.num_slots
        parked = [row for row in rows if self._parked(row)]
        unscored = [row for row in rows if row.finish_reason and not row.done]
        alone = [row for row in rows if row.alone and not row.finish_reason]
        both = [row for row in rows if not row.alone and self._needs_slot(row)]
        if len(parked) >= width or (parked and not (alone or both or others_fly)):
            return self._write_on(parked[:width])
        if len(unscored) >= width or (unscored and not (alone or both or others_fly)):
            return self._score_finished(unscored[:width])
        if alone:
            self.proposer.step_alone(alone, self.version)
        if not both:
            return None
        (first, *_) = grouped(both, lambda row: id(row.mode))
        half = -(-width // 2) if self.overlap else width
        return self._switch([both[i] for i in first[:half]])

    def _fly(
        self, rows: list[Row], kind: str, tokens: int, land: Callable[[Any], None], request: Any, lead: Lead | None
    ) -> Flight:
        """Ask the teacher: "read" scores a `Blocks`, "write" asks for text of its own. `lead` is what was chosen."""
        teacher = self.calls.teacher
        function: Callable[..., Any] = teacher.write if kind == "write" else teacher.score
        # a row's first call also reads its prompt: it says nothing about the next one
        typical = all(row.num_rounds for row in rows)

        def timed() -> Any:
            start = time.perf_counter()
            answer = function(request)
            if lead is not None and typical:
                steps = int(answer.lengths.max()) if kind == "write" else 1
                self.pace.saw_call(lead, kind, tokens, (time.perf_counter() - start) / steps)
            return answer

        self.calls.num_calls += 1
        for row in rows:
            row.in_flight = True
            row.num_rounds += 1
        return Flight(rows, self.calls.submit(timed), land)

    def _land(self, flight: Flight) -> None:
        answer = self.calls.result(flight.answer)
        for row in flight.rows:
            row.in_flight = False
        flight.land(answer)

    def _switch(self, rows: list[Row]) -> Flight:
        """Both models matter: one of them proposes, the other reads, and the walk settles."""
        lead = self.pace.choose(rows)
        return self._teacher_leads(rows, lead) if lead.who == "teacher" else self._student_leads(rows, lead)

    # ── who leads ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _student_leads(self, rows: list[Row], lead: Lead) -> Flight:
        draft = self.proposer.draft(rows, lead.size)
        # lockstep sends only what is settled, unless the teacher has read that already
        sent = draft.counts * np.array([lead != LOCKSTEP or row.carry is not None for row in rows])
        fed = [row.tokens[row.teacher_len :] + draft.tokens[r, : sent[r]].tolist() for r, row in enumerate(rows)]
        firsts = [len(row.tokens) - (row.carry is None) for row in rows]

        def land(signal: Signal) -> None:
            self._count(rows, fed, signal)
            pieces = [
                piece if row.carry is None else np.concatenate([row.carry, piece])
                for row, piece in zip(rows, split(signal), strict=True)
            ]
            before = [len(row.tokens) for row in rows]
            held = self._walk(rows, self.proposer.student_block(draft, pieces), pieces)
            for r, row in enumerate(rows):
                settled = len(row.tokens) - before[r]
                row.student_len = min(before[r] + int(held[r]), int(draft.read[r]))
                row.teacher_len = before[r] + min(int(held[r]), int(sent[r]))
                row.carry = pieces[r][settled : settled + 1] if held[r] == settled == sent[r] else None
                row.num_drafted += int(draft.counts[r])
                row.block_lengths.append(settled)
                row.took(pieces[r][:settled])

        return self._fly(rows, "read", sum(map(len, fed)), land, blocks_of(rows, fed, firsts), lead)

    def _teacher_leads(self, rows: list[Row], lead: Lead) -> Flight:
        counts = np.array([min(lead.size, row.mode.max_new_tokens - row.t) for row in rows], np.int32)
        fed, request = self._write_request(rows, counts)

        def land(written: Written) -> None:
            self._count(rows, fed, written.signal)
            self._count_ties(rows, written)
            pieces, before = split(written.signal), [len(row.tokens) for row in rows]
            block = self.proposer.teacher_block(rows, written, pieces)
            held = self._walk(rows, block, pieces)
            for r, row in enumerate(rows):
                # neither model has read the last proposed token
                read = before[r] + min(int(held[r]), int(block.counts[r]) - 1)
                row.student_len = row.teacher_len = read
                row.block_lengths.append(len(row.tokens) - before[r])
                row.took(pieces[r][: len(row.tokens) - before[r]])

        return self._fly(rows, "write", len(rows), land, request, lead)

    def _walk(self, rows: list[Row], block: Block, pieces: Sequence[np.ndarray]) -> np.ndarray:
        if self.reader.kind == "topk":
            briefs = self._briefs(rows, pieces)
            block = replace(block, p_rows=briefs.to_draw, briefs=briefs)
        held = np.zeros(len(rows), np.int64)
        kind = "walk teacher" if block.by_teacher else "walk student"
        with self.pace.costs.timed(kind, int(block.counts.sum())):
            for members in grouped(rows, lambda row: (id(row.mode), row.step if row.mode.scheduled else 0)):
                group = [rows[r] for r in members]
                rule = group[0].mode.rule.name
                note = None
                if self.pace.watches:
                    note = lambda t, own, differ, rule=rule: self.pace.note(rule, block.by_teacher, t, own, differ)  # noqa: E731
                held[members] = walk(group, block.of(members), version=self.version, stop_ids=self.stop_ids, note=note)
        return held

    def _briefs(self, rows: list[Row], pieces: Sequence[np.ndarray]) -> Briefs:
        """Compressed rows of each row's next tokens, and the way to the exact ones."""
        firsts = [len(row.tokens) - 1 for row in rows]
        return Briefs.of_pieces(rows, pieces, firsts, self.reader, self.calls.exact, coarse=self.coarse)

    # ── only one of the models writes ──────────────────────────────────────────────────────────────────────────────

    def _write_on(self, rows: list[Row]) -> Flight:
        """The teacher owns the rest of these rows: it goes on alone, nobody checks."""
        (first, *_) = grouped(rows, lambda row: id(row.mode))
        rows = [rows[r] for r in first]
        counts = np.array([min(WRITE_SPAN, row.mode.max_new_tokens - row.t) for row in rows], np.int32)
        fed, request = self._write_request(rows, counts)

        def land(written: Written) -> None:
            self._count(rows, fed, written.signal)
            self._count_ties(rows, written)
            pieces, tokens_of = split(written.signal), split(written)
            self._take_uncertainty(rows, pieces, tokens_of)
            for row, tokens, piece in zip(rows, tokens_of, pieces, strict=True):
                row.write(tokens.tolist(), self.version, self.stop_ids)
                row.teacher_len = len(row.tokens) - 1
                self._read_alone(row, piece)

        return self._fly(rows, "write", len(rows), land, request, None)

    def _score_finished(self, rows: list[Row]) -> Flight:
        """The student wrote these rows alone; now the teacher reads each of them once."""
        pending = rows[: self.calls.open_some([row.task for row in rows])]
        for row in pending:
            row.opened = True
        fed = [row.tokens[row.prompt_len : -1] for row in pending]

        def land(signal: Signal) -> None:
            self._count(pending, fed, signal)
            pieces = split(signal)
            self._take_uncertainty(pending, pieces, [np.array(row.tokens[row.prompt_len :]) for row in pending], firsts)
            for row, piece in zip(pending, pieces, strict=True):
                self._read_alone(row, piece)

        firsts = [row.prompt_len - 1 for row in pending]
        return self._fly(pending, "read", sum(map(len, fed)), land, blocks_of(pending, fed, firsts), None)

    def _read_alone(self, row: Row, piece: np.ndarray) -> None:
        """The teacher's rows of tokens that no walk has settled."""
        row.took(piece)
        if row.mode.candidates:
            row.teacher_top.append(self.reader.top(piece, row.mode.candidates))
            if not row.alone:  # the student never read them
                row.student_top.append(Top.unknown(len(piece), row.mode.candidates))

    def _take_uncertainty(
        self,
        rows: list[Row],
        pieces: Sequence[np.ndarray],
        tokens: Sequence[np.ndarray],
        firsts: Sequence[int] | None = None,
    ) -> None:
        """ATKD's UnC of tokens that nobody decided; `firsts` are the positions of their first rows."""
        firsts = [len(row.tokens) - 1 for row in rows] if firsts is None else firsts
        wanted = [each for each in zip(rows, pieces, tokens, firsts, strict=True) if each[0].mode.wants_uncertainty]
        if wanted:
            own, briefs, ids, starts = (list(column) for column in zip(*wanted, strict=True))
            for row, part in zip(own, self.calls.uncertainty(own, briefs, ids, starts), strict=True):
                row.uncertainty.extend(part.tolist())

    # ── teacher calls ──────────────────────────────────────────────────────────────────────────────────────────────

    def _write_request(self, rows: list[Row], counts: np.ndarray) -> tuple[list[list[int]], Any]:
        """What the teacher has not read yet, at least the last token, and the request to go on from there."""
        for row in rows:
            row.carry = None
            row.teacher_len = min(row.teacher_len, max(len(row.tokens) - 1, 0))
        fed = [row.tokens[row.teacher_len :] for row in rows]
        blocks = blocks_of(rows, fed, [len(row.tokens) - 1 for row in rows])
        return fed, write_request(rows, blocks, counts, self.stop_ids)

    def _count(self, rows: Sequence[Row], fed: Sequence[list[int]], signal: Signal) -> None:
        self.reader.learn(signal)
        for row, part, piece in zip(rows, fed, split(signal), strict=True):
            row.teacher_positions += max(len(part), len(piece))
            row.signal_bytes += piece.nbytes
            row.num_scored_rows += len(piece)

    @staticmethod
    def _count_ties(rows: Sequence[Row], written: Written) -> None:
        for row, margins in zip(rows, ragged(written.margins, written.lengths), strict=True):
            row.num_near_ties += int((margins < NEAR_TIE).sum())


def _alike(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that are scored alike."""
    return [[jobs[i] for i in group] for group in grouped(jobs, lambda job: (job.scored, job.wants_uncertainty))]
