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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from switchkd.engines.base import OutputHead, StudentEngine, Teacher, TeacherBusy
from switchkd.pace import LOCKSTEP, Lead, Pace
from switchkd.propose import Proposer, grouped, write_request
from switchkd.questions import Asker, Briefs, Reference
from switchkd.rows import Mode, Row, mean_tail_mass
from switchkd.signal_rows import SignalReader
from switchkd.types import (
    Blocks,
    Positions,
    Rollout,
    RolloutStats,
    Sessions,
    Signal,
    Source,
    Task,
    WeightBundle,
    Written,
)
from switchkd.walk import NEAR_TIE, Block, walk

Emit = Callable[[list[Rollout]], None]
WRITE_SPAN = 8
"""Tokens that the teacher writes alone between two looks at which rows are waiting for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A task and how it is written; `mode` None takes the data set's reference as it stands."""

    task: Task
    mode: Mode | None
    scored: bool = True
    wants_uncertainty: bool = True  # of a reference, `signal: topk`: ask for the tokens that the top k leave out


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
        new_weights: Callable[[], WeightBundle | None] | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.reader = SignalReader(head, device)
        self.stop_ids = stop_ids
        self.overlap = overlap
        self.coarse = coarse  # `teacher.decide`
        self.parks = lead != "lockstep"  # one token of each model at a time, whatever the rule says
        self.version = 0
        self.num_teacher_calls = 0
        self.pace = Pace(lead, block_size)
        self.proposer = Proposer(student, self.reader, stop_ids, self.pace.costs)
        self._new_weights = new_weights  # given: versions are taken in mid-rollout (`reprefill`)
        self._caller: ThreadPoolExecutor | None = None

    def load_weights(self, bundle: WeightBundle) -> None:
        self.student.load_weights(bundle)
        self.version = bundle.version

    def run(self, jobs: Iterable[Job], emit: Emit) -> None:
        """Write all jobs; `emit` gets each rollout once, in the order in which they finish."""
        jobs = list(jobs)
        self._take_references([job for job in jobs if job.mode is None], emit)
        waiting = deque(job for job in jobs if job.mode is not None)
        rows: list[Row] = []
        flights: deque[Flight] = deque()
        if self.overlap:
            self._caller = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        try:
            while waiting or rows:
                self._refresh(rows, flights)
                self._admit(waiting, rows)
                flight = self._launch([row for row in rows if not row.in_flight], bool(flights))
                if flight is not None:
                    flights.append(flight)
                if flights and (flight is None or len(flights) > self.overlap):
                    self._land(flights.popleft())
                done = [row for row in rows if row.done]
                self._close([row.task.rollout_id for row in done if row.opened])
                rows = [row for row in rows if not row.done]
                if done:
                    emit([row.rollout(self.reader.kind, self.reader.dtype) for row in done])
        finally:
            if self._caller is not None:
                self._caller.shutdown(wait=True)
                self._caller = None
            self._close([row.task.rollout_id for row in rows if row.opened])

    # ── admit ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, waiting: deque[Job], rows: list[Row]) -> None:
        """Give free slots to waiting jobs. A busy teacher is back-pressure: wait, and go on with what runs."""
        free = sorted(set(range(self.student.num_slots)) - {row.slot for row in rows if self._needs_slot(row)})
        new = [self._start(waiting[i], free[i]) for i in range(min(len(free), len(waiting)))]
        while new:
            try:
                self._open([row for row in new if row.mode.scored and not row.alone])
                break
            except TeacherBusy:
                if len(new) > 1:
                    new = new[: len(new) // 2]
                elif rows:
                    new = []
                else:
                    time.sleep(0.05)
        for _ in new:
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

    def _open(self, rows: Sequence[Row]) -> None:
        if rows:
            self._call(self._need_teacher().open, sessions_of([row.task for row in rows])).result()
            for row in rows:
                row.opened = True

    def _close(self, session_ids: Sequence[int]) -> None:
        if session_ids:
            self._call(self._need_teacher().close, np.array(session_ids, np.int64)).result()

    def _call(self, function: Callable[..., Any], *args: Any) -> Future:
        """All calls of the teacher, one after the other; at once, or in a thread of their own where flights overlap."""
        if self._caller is not None:
            return self._caller.submit(function, *args)
        answer: Future = Future()
        answer.set_result(function(*args))
        return answer

    def _need_teacher(self) -> Teacher:
        if self.teacher is None:
            raise RuntimeError("this run has no teacher, but a task needs its signal")
        return self.teacher

    def _refresh(self, rows: Sequence[Row], flights: deque[Flight]) -> None:
        """`reprefill`: a newer version replaces the one in use, and every row's cache is read anew."""
        bundle = self._new_weights() if self._new_weights else None
        if bundle is not None and bundle.version != self.version:
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
        teacher = self._need_teacher()
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

        self.num_teacher_calls += 1
        for row in rows:
            row.in_flight = True
            row.num_rounds += 1
        return Flight(rows, self._call(timed), land)

    def _land(self, flight: Flight) -> None:
        answer = flight.answer.result()
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
                for row, piece in zip(rows, _split(signal), strict=True)
            ]
            before = [len(row.tokens) for row in rows]
            held = self._walk(rows, self.proposer.student_block(draft, pieces), pieces)
            for r, row in enumerate(rows):
                settled = len(row.tokens) - before[r]
                row.student_len = min(before[r] + int(held[r]), int(draft.read[r]))
                row.teacher_len = before[r] + min(int(held[r]), int(sent[r]))
                row.carry = pieces[r][settled : settled + 1] if held[r] == settled == sent[r] else None
                row.num_drafted += int(draft.counts[r])
                row.took(pieces[r][:settled])

        return self._fly(rows, "read", sum(map(len, fed)), land, _blocks(rows, fed, firsts), lead)

    def _teacher_leads(self, rows: list[Row], lead: Lead) -> Flight:
        counts = np.array([min(lead.size, row.mode.max_new_tokens - row.t) for row in rows], np.int32)
        fed, request = self._write_request(rows, counts)

        def land(written: Written) -> None:
            self._count(rows, fed, written.signal)
            self._count_ties(rows, written)
            pieces, before = _split(written.signal), [len(row.tokens) for row in rows]
            block = self.proposer.teacher_block(rows, written, pieces)
            held = self._walk(rows, block, pieces)
            for r, row in enumerate(rows):
                # neither model has read the last proposed token
                read = before[r] + min(int(held[r]), int(block.counts[r]) - 1)
                row.student_len = row.teacher_len = read
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
        return Briefs.of_pieces(rows, pieces, firsts, self.reader, self._exact, coarse=self.coarse)

    def _exact(self, question: Positions) -> Signal:
        self.num_teacher_calls += 1
        answer: Signal = self._call(self._need_teacher().exact, question).result()
        return answer

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
            pieces, tokens_of = _split(written.signal), _split(written)
            self._take_uncertainty(rows, pieces, tokens_of)
            for row, tokens, piece in zip(rows, tokens_of, pieces, strict=True):
                row.write(tokens.tolist(), self.version, self.stop_ids)
                row.teacher_len = len(row.tokens) - 1
                row.took(piece)

        return self._fly(rows, "write", len(rows), land, request, None)

    def _score_finished(self, rows: list[Row]) -> Flight:
        """The student wrote these rows alone; now the teacher reads each of them once."""
        pending = list(rows)
        while True:
            try:
                self._open(pending)
                break
            except TeacherBusy:
                if len(pending) > 1:
                    pending = pending[: len(pending) // 2]
                else:
                    time.sleep(0.05)
        fed = [row.tokens[row.prompt_len : -1] for row in pending]

        def land(signal: Signal) -> None:
            self._count(pending, fed, signal)
            pieces = _split(signal)
            self._take_uncertainty(pending, pieces, [np.array(row.tokens[row.prompt_len :]) for row in pending], firsts)
            for row, piece in zip(pending, pieces, strict=True):
                row.took(piece)

        firsts = [row.prompt_len - 1 for row in pending]
        return self._fly(pending, "read", sum(map(len, fed)), land, _blocks(pending, fed, firsts), None)

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
            for row, part in zip(own, self._uncertainty(own, briefs, ids, starts), strict=True):
                row.uncertainty.extend(part.tolist())

    def _uncertainty(
        self, rows: Sequence[Asker], pieces: Sequence[np.ndarray], tokens: Sequence[np.ndarray], firsts: Sequence[int]
    ) -> list[np.ndarray]:
        """1 - p(token) of each row's tokens; what the top k leave out is asked for in one call."""
        if self.reader.kind != "topk":
            return [self.reader.uncertainty(piece, ids) for piece, ids in zip(pieces, tokens, strict=True)]
        briefs = Briefs.of_pieces(rows, pieces, firsts, self.reader, self._exact)
        sizes = [len(ids) for ids in tokens]
        which = np.repeat(np.arange(len(rows)), sizes)
        places = np.concatenate([np.arange(size) for size in sizes])
        unc = briefs.uncertainty(which, places, np.concatenate(tokens)).cpu().numpy().astype(np.float32)
        return np.split(unc, np.cumsum(sizes)[:-1])

    # ── teacher calls ──────────────────────────────────────────────────────────────────────────────────────────────

    def _write_request(self, rows: list[Row], counts: np.ndarray) -> tuple[list[list[int]], Any]:
        """What the teacher has not read yet, at least the last token, and the request to go on from there."""
        for row in rows:
            row.carry = None
            row.teacher_len = min(row.teacher_len, max(len(row.tokens) - 1, 0))
        fed = [row.tokens[row.teacher_len :] for row in rows]
        blocks = _blocks(rows, fed, [len(row.tokens) - 1 for row in rows])
        return fed, write_request(rows, blocks, counts, self.stop_ids)

    def _count(self, rows: Sequence[Row], fed: Sequence[list[int]], signal: Signal) -> None:
        self.reader.learn(signal)
        for row, part, piece in zip(rows, fed, _split(signal), strict=True):
            row.teacher_positions += max(len(part), len(piece))
            row.signal_bytes += piece.nbytes
            row.num_scored_rows += len(piece)

    @staticmethod
    def _count_ties(rows: Sequence[Row], written: Written) -> None:
        for row, margins in zip(rows, np.split(written.margins, np.cumsum(written.lengths)[:-1]), strict=True):
            row.num_near_ties += int((margins < NEAR_TIE).sum())

    # ── completions that the data set wrote ────────────────────────────────────────────────────────────────────────

    def _take_references(self, jobs: Sequence[Job], emit: Emit) -> None:
        """References become rollouts: scored in one block each, as many at a time as the worker has slots."""
        for first in range(0, len(jobs), self.student.num_slots):
            part = jobs[first : first + self.student.num_slots]
            if not part[0].scored:
                emit([self._reference_rollout(job.task) for job in part])
                continue
            done: list[Rollout] = []
            wants = part[0].wants_uncertainty

            def take(tasks: Sequence[Task], signal: Signal, wants: bool = wants, done: list[Rollout] = done) -> None:
                done += self._scored_references(tasks, signal, wants)

            self.read_references([job.task for job in part], take)
            emit(done)

    def exact_reference(self, task: Task) -> Signal:
        """The teacher's exact rows for every reference token: hidden states, or whole rows."""
        found: list[Signal] = []

        def take(tasks: Sequence[Task], signal: Signal) -> None:
            if signal.kind == "topk":
                num, first = len(signal.values), len(task.prompt.token_ids) - 1
                ids, positions = np.array([task.rollout_id]), first + np.arange(num, dtype=np.int32)
                signal = self._exact(Positions(session_ids=ids, positions=positions, lengths=np.array([num], np.int32)))
            found.append(signal)

        self.read_references([task], take)
        return found[0]

    def read_references(self, tasks: Sequence[Task], take: Callable[[Sequence[Task], Signal], None]) -> None:
        """The teacher reads all references; `take` gets its signal for every token while the sessions are open."""
        sessions = sessions_of(tasks)
        while True:
            try:
                self._need_teacher().open(sessions)
                break
            except TeacherBusy:
                if len(tasks) > 1:
                    half = len(tasks) // 2
                    self.read_references(tasks[:half], take)
                    return self.read_references(tasks[half:], take)
                time.sleep(0.05)
        signal: Signal = self._need_teacher().score(
            Blocks(
                session_ids=sessions.session_ids,
                base_lens=sessions.lengths,
                first_rows=sessions.lengths - 1,
                token_ids=np.concatenate([task.prompt.reference_ids[:-1] for task in tasks]).astype(np.int32),
                lengths=np.array([max(len(task.prompt.reference_ids) - 1, 0) for task in tasks], np.int32),
            )
        )
        self.num_teacher_calls += 1
        self.reader.learn(signal)
        take(tasks, signal)
        self._close(sessions.session_ids.tolist())

    def _scored_references(self, tasks: Sequence[Task], signal: Signal, wants_uncertainty: bool) -> list[Rollout]:
        pieces, ids = _split(signal), [task.prompt.reference_ids for task in tasks]
        asked = [Reference(task) for task in tasks]
        unc: list[np.ndarray | None] = [None] * len(tasks)
        if wants_uncertainty or signal.kind != "topk":
            unc = list(self._uncertainty(asked, pieces, ids, [len(task.prompt.token_ids) - 1 for task in tasks]))
        return [self._reference_rollout(*each) for each in zip(tasks, pieces, unc, asked, strict=True)]

    def _reference_rollout(
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
        if piece is not None and asked is not None and self.reader.kind == "topk":
            stats = RolloutStats(
                signal_bytes=piece.nbytes + asked.signal_bytes, num_scored_rows=num, num_asked=asked.num_asked,
                tail_mass=mean_tail_mass(piece),
            )  # fmt: skip
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
            signal=None if piece is None else self.reader.signal(piece),
            finish_reason="eos" if num and int(ids[-1]) in self.stop_ids else "length",
            teacher=task.prompt.teacher,
            stats=stats,
        )


def sessions_of(tasks: Sequence[Task]) -> Sessions:
    return Sessions(
        session_ids=np.array([task.rollout_id for task in tasks], np.int64),
        token_ids=np.concatenate([task.prompt.token_ids for task in tasks]).astype(np.int32),
        lengths=np.array([len(task.prompt.token_ids) for task in tasks], np.int32),
    )


def _blocks(rows: Sequence[Row], fed: Sequence[list[int]], firsts: Sequence[int]) -> Blocks:
    """One call: each row's session goes on after `teacher_len` with `fed`, rows are wanted from `firsts` on."""
    return Blocks(
        session_ids=np.array([row.task.rollout_id for row in rows], np.int64),
        base_lens=np.array([row.teacher_len for row in rows], np.int32),
        first_rows=np.array(firsts, np.int32),
        token_ids=np.concatenate([np.asarray(part, np.int32) for part in fed]),
        lengths=np.array([len(part) for part in fed], np.int32),
    )


def _split(ragged: Signal | Written) -> list[np.ndarray]:
    """Flat rows or tokens, by session."""
    flat = ragged.values if isinstance(ragged, Signal) else ragged.token_ids
    return np.split(flat, np.cumsum(ragged.lengths)[:-1])
