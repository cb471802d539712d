"""A rollout worker with a fake student: generates blocks against a teacher as `rollout.generator` does, without torch.

In: tasks, and fake weights. Out: rollouts with token sources, rows and versions: a pure function of weights, prompt and
seed. The rules `student` and `teacher` are the real ones; with any other, the teacher owns the tokens at which the two
models' rows are more than a half apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from switchkd.config.schema import Config, StageConfig
from switchkd.engines import fake
from switchkd.engines.base import Teacher, TeacherBusy
from switchkd.types import (
    GREEDY,
    Blocks,
    CompletionSource,
    EvalRow,
    EvalShard,
    PackedWeights,
    Prompt,
    Ragged,
    Rollout,
    RolloutStats,
    RolloutTask,
    Sessions,
    TeacherOutput,
    TokenSource,
    WeightRef,
    WorkReport,
    WriteRequest,
)

_OWNED_FROM = 0.5
_BUSY_S = 0.05
_EVAL_IDS = 1 << 40  # sessions of evaluations: no rollout's id is as large


@dataclass(slots=True)
class _Row:
    """A completion that is being written."""

    task: RolloutTask
    stage: StageConfig
    limit: int
    tokens: list[int]
    sources: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    statistic: list[float] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)
    teacher_rows: list[int] = field(default_factory=list)
    finish_reason: str = ""
    teacher_len: int = 0  # tokens that the teacher's session shares with this row
    stats: RolloutStats = field(default_factory=RolloutStats)
    started: float = field(default_factory=time.monotonic)

    @property
    def t(self) -> int:
        return len(self.sources)

    def accept(self, token: int, source: TokenSource, version: int, stop_ids: frozenset[int]) -> None:
        self.tokens.append(token)
        self.sources.append(source)
        self.versions.append(version)
        if token in stop_ids:
            self.finish_reason = "eos"
        elif self.t >= self.limit:
            self.finish_reason = "length"


class FakeWorker:
    """The calls of `rollout.worker.RolloutWorker`. `teachers` by name; empty where no stage needs one."""

    def __init__(
        self,
        config: Config,
        teachers: Mapping[str, Teacher],
        stop_ids: frozenset[int],
        new_weights: Callable[[], PackedWeights | None] | None = None,
    ) -> None:
        time.sleep(config.fake.start_s)
        self.config, self.teachers, self.stop_ids, self.new_weights = config, dict(teachers), stop_ids, new_weights
        self.order = (0, 0)
        self.weights = fake.FIRST_WEIGHTS
        self.num_rounds = 0
        self.num_calls = 0
        self.wait_s = 0.0
        self._free_since = time.monotonic()

    @property
    def progress_counter(self) -> int:
        return self.num_rounds

    def load_weights(self, weights: WeightRef | None, fetch: Callable[[WeightRef], PackedWeights]) -> None:
        if weights is not None and weights.order > self.order:
            self._load(fetch(weights))

    def _load(self, packed: PackedWeights) -> None:
        if fake.checksum(packed.buckets) != packed.checksum:
            raise ValueError(f"weights of version {packed.version} are damaged: publish again")
        self.weights = int(packed.buckets[0][:8].view(np.uint64)[0])
        self.order = packed.order

    # ── rollouts ───────────────────────────────────────────────────────────────────────────────────────────────────

    def generate(self, tasks: Sequence[RolloutTask], put: Callable[[list[Rollout]], None]) -> WorkReport:
        started, calls, waited = time.monotonic(), self.num_calls, self.wait_s
        report = WorkReport()
        put_s = 0.0
        for name, members in _by_teacher(tasks):
            for i in range(0, len(members), self.config.rollout.batch_size):
                for row in self._write(members[i : i + self.config.rollout.batch_size], self.teachers.get(name)):
                    rollout = self._rollout(row)
                    since = time.monotonic()
                    put([rollout])
                    put_s += time.monotonic() - since
                    report += WorkReport(
                        num_rollouts=1,
                        num_tokens=rollout.num_tokens,
                        num_student_tokens=row.sources.count(TokenSource.STUDENT),
                        num_teacher_tokens=row.sources.count(TokenSource.TEACHER),
                        stats=rollout.stats,
                    )
        idle_s, self._free_since = started - self._free_since, time.monotonic()
        return replace(
            report,
            num_teacher_calls=self.num_calls - calls,
            time_s=self._free_since - started,
            idle_s=idle_s,
            wait_teacher_s=self.wait_s - waited,
            wait_replay_s=put_s,
        )

    def _write(self, tasks: Sequence[RolloutTask], teacher: Teacher | None) -> Iterator[_Row]:
        """Write completions together; each comes out when it has ended."""
        waiting = [self._row(task) for task in tasks]
        while waiting:
            scored = teacher is not None and waiting[0].stage.needs_teacher
            rows = waiting[: self._open(teacher, waiting) if teacher and scored else len(waiting)]
            waiting = waiting[len(rows) :]
            while rows:
                self._round(rows, teacher if scored else None)
                ended = [row for row in rows if row.finish_reason]
                rows = [row for row in rows if not row.finish_reason]
                if ended and teacher and scored:
                    teacher.close(np.array([row.task.rollout_id for row in ended], np.int64))
                yield from ended

    def _row(self, task: RolloutTask) -> _Row:
        stage, prompt = self.config.train.stages[task.stage], task.prompt
        given = task.completion_source == CompletionSource.DATASET
        limit = len(prompt.reference_ids) if given else stage.max_new_tokens
        return _Row(task, stage, limit, prompt.token_ids.tolist(), teacher_len=len(prompt.token_ids))

    def _open(self, teacher: Teacher, rows: Sequence[_Row]) -> int:
        """Open sessions, and return for how many of the rows the teacher has room: at least one, once it has."""
        num = len(rows)
        while True:
            ids = np.array([row.task.rollout_id for row in rows[:num]], np.int64)
            prompts = Ragged.concat([row.tokens for row in rows[:num]], np.int32)
            try:
                with self._waiting():
                    teacher.open(Sessions(session_ids=ids, tokens=prompts))
                return num
            except TeacherBusy:
                if num == 1:
                    time.sleep(_BUSY_S)
                num = max(num // 2, 1)

    def _round(self, rows: Sequence[_Row], teacher: Teacher | None) -> None:
        self.num_rounds += 1
        if self.new_weights is not None and (packed := self.new_weights()) is not None:
            self._load(packed)
        alone = [row for row in rows if teacher is not None and _teacher_only(row)]
        if teacher is not None and alone:
            self._teacher_writes(alone, teacher)
        drafting = [row for row in rows if row not in alone] if alone else list(rows)
        if not drafting:
            return
        drafts = [self._draft(row) for row in drafting]
        time.sleep(self.config.fake.student_s * max(map(len, drafts)))
        if teacher is None:
            for row, draft in zip(drafting, drafts, strict=True):
                self._settle(row, draft, [None] * len(draft))
            return
        output = self._score(drafting, drafts, teacher)
        for row, draft, part in zip(drafting, drafts, output.rows.split(), strict=True):
            row.stats.num_scored_rows += len(part)
            row.stats.output_bytes += part.nbytes
            self._settle(row, draft, part[:, 0].astype(int).tolist())

    def _draft(self, row: _Row) -> list[int]:
        """Tokens that the student would write next; of a reference, all that are left."""
        if row.task.completion_source == CompletionSource.DATASET:
            return row.task.prompt.reference_ids[row.t :].tolist()
        draft: list[int] = []
        digest = fake.context(row.tokens)
        num = min(self.config.rollout.max_draft_tokens, row.limit - row.t)
        while len(draft) < num and not self.stop_ids & set(draft[-1:]):
            key = self._key(row, len(draft))
            draft.append(self._draw(fake.row(self.weights, digest), digest, key))
            digest = fake.context(draft[-1:], digest)
        return draft

    def _settle(self, row: _Row, draft: Sequence[int], teacher_rows: Sequence[int | None]) -> None:
        """Accept drafted tokens up to the first that the teacher replaces by another one."""
        before, digest, replaced = row.t, fake.context(row.tokens), False
        for token, p_row in zip(draft, teacher_rows, strict=False):  # the row behind the draft is left
            statistic, threshold, source = np.nan, np.nan, TokenSource.STUDENT
            if row.task.completion_source == CompletionSource.DATASET:
                source = TokenSource.DATA
            elif p_row is not None and row.stage.rule.type != "student":
                statistic = fake.distance(p_row, fake.row(self.weights, digest))
                threshold = _OWNED_FROM
                source = TokenSource.TEACHER if statistic > threshold else TokenSource.STUDENT
            key = self._key(row, 0)
            kept = self._draw(p_row, digest, key) if source == TokenSource.TEACHER and p_row is not None else token
            row.accept(kept, source, self.order[1], self.stop_ids)
            row.statistic.append(statistic)
            row.threshold.append(threshold)
            if p_row is not None:
                row.teacher_rows.append(p_row)
                row.teacher_len = len(row.tokens) - (kept != token)
            digest = fake.context([kept], digest)
            replaced = kept != token
            if replaced or row.finish_reason:
                break
        row.stats.num_rounds += 1
        row.stats.num_drafted += len(draft)
        row.stats.num_accepted += row.t - before - replaced
        row.stats.num_rejections += replaced
        row.stats.block_lengths.append(row.t - before)

    def _score(self, rows: Sequence[_Row], drafts: Sequence[Sequence[int]], teacher: Teacher) -> TeacherOutput:
        """The teacher's rows behind the last token of each row and behind its drafted ones."""
        self.num_calls += 1
        with self._waiting():
            return teacher.score(_blocks(rows, drafts))

    def _teacher_writes(self, rows: Sequence[_Row], teacher: Teacher) -> None:
        counts = [min(self.config.rollout.max_draft_tokens, row.limit - row.t) for row in rows]
        request = WriteRequest(
            blocks=_blocks(rows, [[]] * len(rows)),
            counts=np.array(counts, np.int32),
            rollout_ids=np.array([row.task.rollout_id for row in rows], np.int64),
            positions=np.array([row.t for row in rows], np.int32),
            run_seed=self.config.seed,
            purpose=0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            stop_ids=np.array(sorted(self.stop_ids), np.int64),
        )
        self.num_calls += 1
        with self._waiting():
            written = teacher.write(request)
        parts = zip(rows, written.tokens.split(), written.teacher_output.rows.split(), strict=True)
        for row, tokens, teacher_rows in parts:
            row.teacher_rows += teacher_rows[:, 0].astype(int).tolist()
            for token in tokens.tolist():
                row.accept(token, TokenSource.TEACHER, self.order[1], self.stop_ids)
            row.statistic += [np.nan] * len(tokens)
            row.threshold += [-np.inf] * len(tokens)
            row.teacher_len = len(row.tokens)
            row.stats.num_rounds += 1
            row.stats.block_lengths.append(len(tokens))

    def _key(self, row: _Row, ahead: int, purpose: int = 0) -> int:
        return fake.draw_key(self.config.seed, row.task.rollout_id, row.t + ahead, purpose)

    def _draw(self, row: int, digest: int, key: int) -> int:
        return fake.draw(row, digest, key, self.config.fake.agreement)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.wait_s += time.monotonic() - started

    def _rollout(self, row: _Row) -> Rollout:
        task, num = row.task, row.t
        row.stats.teacher_positions = len(row.teacher_rows)
        row.stats.time_s = time.monotonic() - row.started
        output = None
        if row.teacher_rows:
            values = np.array(row.teacher_rows, np.float32).reshape(-1, 1)
            output = TeacherOutput(kind="hidden_states", dtype="float32", rows=Ragged.concat([values]))
        uncertainty = np.full(num, np.nan, np.float32)
        if row.stage.loss.type == "atkd" and row.teacher_rows:
            uncertainty[:] = [fake.distance(p_row, 0) for p_row in row.teacher_rows]
        return Rollout(
            rollout_id=task.rollout_id,
            batch=task.batch,
            stage=task.stage,
            prompt_id=task.prompt.prompt_id,
            completion_source=task.completion_source,
            prompt_ids=task.prompt.token_ids.astype(np.int32),
            token_ids=np.array(row.tokens[-num:], np.int32),
            sources=np.array(row.sources, np.uint8),
            weight_versions=np.array(row.versions, np.int32),
            statistic=np.array(row.statistic, np.float32),
            threshold=np.array(row.threshold, np.float32),
            uncertainty=uncertainty,
            teacher_output=output,
            finish_reason=row.finish_reason,
            teacher=task.prompt.teacher,
            stats=row.stats,
        )

    # ── evaluation ─────────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(self, shard: EvalShard) -> list[EvalRow]:
        """Texts of the student alone; where asked for, a comparison with the teacher and losses, both made up."""
        rows = [self._text(i, prompt, seed, shard) for seed in shard.seeds for i, prompt in shard.prompts]
        if shard.with_teacher:
            rows += [self._compare(i, prompt, shard) for i, prompt in shard.prompts]
        if shard.with_loss:
            for i, prompt in shard.prompts:
                num, loss = len(prompt.reference_ids), fake.distance(0, fake.row(self.weights, i))
                row = EvalRow(index=i, prompt_id=prompt.prompt_id, seed=GREEDY, text="", num_tokens=0)
                rows.append(replace(row, loss_tokens=num, reference_loss=num * loss))
        self._free_since = time.monotonic()
        return rows

    def _text(self, index: int, prompt: Prompt, seed: int, shard: EvalShard) -> EvalRow:
        self.num_rounds += 1
        tokens: list[int] = []
        digest = fake.context(prompt.token_ids)
        while len(tokens) < shard.max_new_tokens and not self.stop_ids & set(tokens[-1:]):
            key = 0 if seed == GREEDY or shard.temperature == 0 else fake.draw_key(seed, index, len(tokens), 3)
            tokens.append(self._draw(fake.row(self.weights, digest), digest, key))
            digest = fake.context(tokens[-1:], digest)
        time.sleep(self.config.fake.student_s * len(tokens))
        text = fake.FakeTokenizer().decode(tokens, skip_special_tokens=True)
        return EvalRow(index=index, prompt_id=prompt.prompt_id, seed=seed, text=text, num_tokens=len(tokens))

    def _compare(self, index: int, prompt: Prompt, shard: EvalShard) -> EvalRow:
        greedy = self._text(index, prompt, GREEDY, shard)
        ids = np.array([_EVAL_IDS + index], np.int64)
        teacher = self.teachers[prompt.teacher if prompt.teacher in self.teachers else next(iter(self.teachers))]
        first = np.array([len(prompt.token_ids) - 1], np.int32)
        teacher.open(Sessions(session_ids=ids, tokens=Ragged.concat([prompt.token_ids], np.int32)))
        reference = Ragged.concat([prompt.reference_ids], np.int32)
        blocks = Blocks(session_ids=ids, base_lens=first + 1, first_rows=first, tokens=reference)
        p_rows = teacher.score(blocks).rows.values[:-1, 0].astype(int).tolist()
        teacher.close(ids)
        digest, q_rows = fake.context(prompt.token_ids), []
        for token in prompt.reference_ids:
            q_rows.append(fake.row(self.weights, digest))
            digest = fake.context([token], digest)
        distances = [fake.distance(p, q) for p, q in zip(p_rows, q_rows, strict=True)]
        return replace(
            greedy,
            reference_tokens=len(distances),
            reference_agree=sum(value <= _OWNED_FROM for value in distances),
            reference_kl=sum(distances),
            greedy_tokens=greedy.num_tokens,
            greedy_agree=greedy.num_tokens,
        )


def _by_teacher(tasks: Sequence[RolloutTask]) -> Iterator[tuple[str, list[RolloutTask]]]:
    """The tasks of each stage and teacher, in order."""

    def kind(task: RolloutTask) -> tuple[int, str]:
        return task.stage, task.prompt.teacher

    for (_, name), members in groupby(sorted(tasks, key=kind), kind):
        yield name, list(members)


def _teacher_only(row: _Row) -> bool:
    source = row.task.completion_source
    return source == CompletionSource.TEACHER or (
        source == CompletionSource.ROLLOUT and row.stage.rule.type == "teacher"
    )


def _blocks(rows: Sequence[_Row], drafts: Sequence[Sequence[int]]) -> Blocks:
    return Blocks(
        session_ids=np.array([row.task.rollout_id for row in rows], np.int64),
        base_lens=np.array([row.teacher_len for row in rows], np.int32),
        first_rows=np.array([len(row.tokens) - 1 for row in rows], np.int32),
        tokens=Ragged.concat([[*r.tokens[r.teacher_len :], *d] for r, d in zip(rows, drafts, strict=True)], np.int32),
    )
