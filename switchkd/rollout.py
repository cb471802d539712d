"""Tasks become rollouts: draft, score, decide, accept, until every completion has ended.

In: tasks (prompt, origin, stage) and how each is written (`Mode`). Out: finished `Rollout`s, handed to `emit` as soon
as they end. The worker owns the tokens; the student engine and the teacher only hold caches of them, so either can be
lost and rebuilt without changing a token.

    admit ─► draft: student writes K tokens ─► score: one teacher call for all rows ─► walk (walk.py) ─► finish
      ▲                                                                                               │
      └───────────────────────────── a finished row's slot takes the next prompt ◄────────────────────┘
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from switchkd.algo.sampling import draw
from switchkd.engines.base import OutputHead, StudentEngine, Teacher, TeacherBusy
from switchkd.rows import Mode, Row
from switchkd.signal_rows import SignalReader, TeacherRows
from switchkd.types import Blocks, Rollout, Sessions, Signal, Source, Task, WeightBundle
from switchkd.walk import NEAR_TIE, walk

Emit = Callable[[list[Rollout]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A task and how it is written; `mode` None takes the data set's reference as it stands."""

    task: Task
    mode: Mode | None
    scored: bool = True


@dataclass(slots=True)
class Draft:
    """What the student proposes: drafted int64 [R, K] (-1 beyond counts [R]), q_logits float32 [R, K, V] or None."""

    drafted: np.ndarray
    counts: np.ndarray
    q_logits: torch.Tensor | None
    read: np.ndarray  # int [R], tokens of each row that the student's cache holds now


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
        new_weights: Callable[[], WeightBundle | None] | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.reader = SignalReader(head)
        self.stop_ids = stop_ids
        self.block_size = block_size
        self.lead = lead
        self.version = 0
        self.num_teacher_calls = 0
        self._new_weights = new_weights  # given: versions are taken in mid-rollout (`reprefill`)

    def load_weights(self, bundle: WeightBundle) -> None:
        self.student.load_weights(bundle)
        self.version = bundle.version

    def run(self, jobs: Iterable[Job], emit: Emit) -> None:
        """Write all jobs; `emit` gets each rollout once, in the order in which they finish."""
        jobs = list(jobs)
        self._take_references([job for job in jobs if job.mode is None], emit)
        waiting = deque(job for job in jobs if job.mode is not None)
        rows: list[Row] = []
        try:
            while waiting or rows:
                self._refresh(rows)
                self._admit(waiting, rows)
                self._round(rows)
                done = [row for row in rows if row.finish_reason]
                self._close([row.task.rollout_id for row in done if row.mode.scored])
                rows = [row for row in rows if not row.finish_reason]
                if done:
                    emit([row.rollout(self.reader.kind, self.reader.dtype) for row in done])
        finally:
            self._close([row.task.rollout_id for row in rows if row.mode.scored])

    # ── admit ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, waiting: deque[Job], rows: list[Row]) -> None:
        """Give free slots to waiting jobs. A busy teacher is back-pressure: wait, and go on with what runs."""
        free = sorted(set(range(self.student.num_slots)) - {row.slot for row in rows})
        new = [self._start(waiting[i], free[i]) for i in range(min(len(free), len(waiting)))]
        while new:
            try:
                self._open([row for row in new if row.mode.scored])
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

    @staticmethod
    def _start(job: Job, slot: int) -> Row:
        assert job.mode is not None
        return Row.start(job.task, job.mode, slot)

    def _open(self, rows: Sequence[Row]) -> None:
        if rows:
            self._need_teacher().open(_sessions([row.task for row in rows]))

    def _close(self, session_ids: Sequence[int]) -> None:
        if session_ids:
            self._need_teacher().close(np.array(session_ids, np.int64))

    def _need_teacher(self) -> Teacher:
        if self.teacher is None:
            raise RuntimeError("this run has no teacher, but a task needs its signal")
        return self.teacher

    def _refresh(self, rows: Sequence[Row]) -> None:
        """`reprefill`: a newer version replaces the one in use, and every row's cache is read anew."""
        bundle = self._new_weights() if self._new_weights else None
        if bundle is not None and bundle.version != self.version:
            self.load_weights(bundle)
            for row in rows:
                row.student_len = 0

    # ── one round ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _round(self, rows: list[Row]) -> None:
        for alone in (True, False):
            group = [row for row in rows if row.mode.scored != alone]
            if not group:
                continue
            draft = self._draft(group, 1 if alone else self.block_size)
            if alone:
                self._accept_alone(group, draft)
            else:
                self._settle(group, draft)

    def _draft(self, rows: list[Row], block_size: int) -> Draft:
        """The student writes up to `block_size` tokens a row with its keyed draws; nothing is drafted past a stop."""
        size = 1 if self.lead == "lockstep" else block_size
        limits = np.array([min(size, row.mode.max_new_tokens - row.t) for row in rows])
        keep = any(row.mode.rule.needs_rows and row.mode.scored for row in rows)
        drafted = np.full((len(rows), int(limits.max())), -1, np.int64)
        counts = np.zeros(len(rows), np.int64)
        read = np.array([row.student_len for row in rows])
        pending = [row.tokens[row.student_len :] for row in rows]
        q_logits: torch.Tensor | None = None
        alive = np.arange(len(rows))
        for k in range(drafted.shape[1]):
            logits = self._student_logits([rows[int(r)] for r in alive], read[alive], [pending[r] for r in alive])
            if keep and q_logits is None:
                q_logits = logits.new_empty((*drafted.shape, logits.shape[-1]))
            if q_logits is not None:
                q_logits[alive, k] = logits
            read[alive] += [len(pending[r]) for r in alive]
            drafted[alive, k] = self._student_draws([rows[int(r)] for r in alive], k, logits)
            counts[alive] += 1
            for r in alive:
                pending[r] = [int(drafted[r, k])]
            stopped = np.isin(drafted[alive, k], list(self.stop_ids))
            alive = alive[(limits[alive] > k + 1) & ~stopped]
            if len(alive) == 0:
                break
        return Draft(drafted=drafted, counts=counts, q_logits=q_logits, read=read)

    def _student_logits(self, rows: Sequence[Row], starts: np.ndarray, tokens: Sequence[list[int]]) -> torch.Tensor:
        """Read tokens into the rows' slots; the student's distribution after the last one: float32 [R, V]."""
        lengths = np.array([len(part) for part in tokens], np.int32)
        hidden = self.student.extend(
            np.array([row.slot for row in rows], np.int64),
            starts.astype(np.int32),
            np.concatenate([np.asarray(part, np.int32) for part in tokens]),
            lengths,
        )
        return self.student.head.logits(hidden[torch.from_numpy(np.cumsum(lengths) - 1).to(hidden.device)])

    @staticmethod
    def _student_draws(rows: Sequence[Row], k: int, logits: torch.Tensor) -> np.ndarray:
        tokens = np.zeros(len(rows), np.int64)
        for members in _grouped(rows, lambda row: (row.mode.student, row.mode.seed, row.mode.purpose)):
            mode = rows[members[0]].mode
            tokens[members], margins = draw(
                logits if len(members) == len(rows) else logits[members],
                run_seed=mode.seed,
                rollout_ids=[rows[r].task.rollout_id for r in members],
                positions=[rows[r].t + k for r in members],
                purpose=mode.purpose,
                sampling=mode.student,
                return_margin=True,
            )
            for r, margin in zip(members, margins, strict=True):
                rows[r].num_near_ties += int(margin < NEAR_TIE)
        return tokens

    def _accept_alone(self, rows: Sequence[Row], draft: Draft) -> None:
        for r, row in enumerate(rows):
            row.student_len = int(draft.read[r])
            row.accept(int(draft.drafted[r, 0]), Source.STUDENT, self.version, self.stop_ids)

    def _settle(self, rows: Sequence[Row], draft: Draft) -> None:
        """Score the drafted blocks with one teacher call, walk them, and set both caches back to what held."""
        before = [len(row.tokens) for row in rows]
        sent = draft.counts * (self.lead != "lockstep")  # lockstep sends only what is settled
        pieces = self._score(rows, draft.drafted, sent)
        held = np.zeros(len(rows), np.int64)
        for members in _grouped(rows, lambda row: (id(row.mode), row.step if row.mode.scheduled else 0)):
            group = [rows[r] for r in members]
            q_logits = draft.q_logits
            held[members] = walk(
                group,
                draft.drafted[members],
                draft.counts[members],
                q_logits if q_logits is None or len(members) == len(rows) else q_logits[members],
                TeacherRows(self.reader, [pieces[r] for r in members], draft.counts[members], group[0].mode.rule),
                version=self.version,
                stop_ids=self.stop_ids,
            )
        for r, row in enumerate(rows):
            settled = len(row.tokens) - before[r]
            row.signal.append(pieces[r][:settled])
            row.student_len = min(before[r] + int(held[r]), int(draft.read[r]))
            row.teacher_len = before[r] + min(int(held[r]), int(sent[r]))
            row.carry = pieces[r][settled : settled + 1] if held[r] == settled == sent[r] else None
            row.num_rounds += 1
            row.num_drafted += int(draft.counts[r])

    def _score(self, rows: Sequence[Row], drafted: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        """The teacher's signal at the last settled token and at every drafted one: a piece [counts + 1, D] per row."""
        fed = [row.tokens[row.teacher_len :] + drafted[r, : counts[r]].tolist() for r, row in enumerate(rows)]
        lasts = [len(row.tokens) - (row.carry is None) for row in rows]
        blocks = Blocks(
            session_ids=np.array([row.task.rollout_id for row in rows], np.int64),
            base_lens=np.array([row.teacher_len for row in rows], np.int32),
            first_rows=np.array(lasts, np.int32),
            token_ids=np.concatenate([np.asarray(part, np.int32) for part in fed]),
            lengths=np.array([len(part) for part in fed], np.int32),
        )
        answers = self._ask(blocks)
        for row, part, answer in zip(rows, fed, answers, strict=True):
            row.teacher_positions += len(part)
            row.signal_bytes += answer.nbytes
        return [
            answer if row.carry is None else np.concatenate([row.carry, answer])
            for row, answer in zip(rows, answers, strict=True)
        ]

    def _ask(self, blocks: Blocks) -> list[np.ndarray]:
        signal: Signal = self._need_teacher().score(blocks)
        self.num_teacher_calls += 1
        self.reader.learn(signal)
        return np.split(signal.values, np.cumsum(signal.lengths)[:-1])

    # ── completions that the data set wrote ────────────────────────────────────────────────────────────────────────

    def _take_references(self, jobs: Sequence[Job], emit: Emit) -> None:
        """References become rollouts: scored in one block each, as many at a time as the worker has slots."""
        for first in range(0, len(jobs), self.student.num_slots):
            part = jobs[first : first + self.student.num_slots]
            pieces: list[np.ndarray | None] = [None] * len(part)
            if part[0].scored:
                pieces = list(self.score_references([job.task for job in part]))
            emit([self._reference_rollout(job, piece) for job, piece in zip(part, pieces, strict=True)])

    def score_references(self, tasks: Sequence[Task]) -> list[np.ndarray]:
        """The teacher's signal for every reference token of every task: pieces [R, D]."""
        sessions = _sessions(tasks)
        while True:
            try:
                self._need_teacher().open(sessions)
                break
            except TeacherBusy:
                if len(tasks) > 1:
                    half = len(tasks) // 2
                    return self.score_references(tasks[:half]) + self.score_references(tasks[half:])
                time.sleep(0.05)
        answers = self._ask(
            Blocks(
                session_ids=sessions.session_ids,
                base_lens=sessions.lengths,
                first_rows=sessions.lengths - 1,
                token_ids=np.concatenate([task.prompt.reference_ids for task in tasks]).astype(np.int32),
                lengths=np.array([len(task.prompt.reference_ids) for task in tasks], np.int32),
            )
        )
        self._close(sessions.session_ids.tolist())
        return [answer[:-1] for answer in answers]

    def _reference_rollout(self, job: Job, piece: np.ndarray | None) -> Rollout:
        ids = job.task.prompt.reference_ids
        num = len(ids)
        nan = np.full(num, np.nan, np.float32)
        unc = nan if piece is None else self.reader.uncertainty(piece, ids)
        return Rollout(
            rollout_id=job.task.rollout_id,
            batch=job.task.batch,
            stage=job.task.stage,
            prompt_id=job.task.prompt.prompt_id,
            origin=job.task.origin,
            prompt_ids=job.task.prompt.token_ids.astype(np.int32),
            token_ids=ids.astype(np.int32),
            sources=np.full(num, Source.DATA, np.uint8),
            weight_versions=np.full(num, self.version, np.int32),
            statistic=nan,
            threshold=nan,
            uncertainty=unc,
            signal=None if piece is None else self.reader.signal(piece),
            finish_reason="eos" if num and int(ids[-1]) in self.stop_ids else "length",
            teacher=job.task.prompt.teacher,
        )


def _sessions(tasks: Sequence[Task]) -> Sessions:
    return Sessions(
        session_ids=np.array([task.rollout_id for task in tasks], np.int64),
        token_ids=np.concatenate([task.prompt.token_ids for task in tasks]).astype(np.int32),
        lengths=np.array([len(task.prompt.token_ids) for task in tasks], np.int32),
    )


def _grouped(rows: Sequence[Row], key: Callable[[Row], object]) -> list[list[int]]:
    """Indices of rows that share a key, in order of first appearance."""
    groups: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    return list(groups.values())
