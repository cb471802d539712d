"""Generates with fake models: blocks against a teacher, as `rollout.generator` does, without torch.

In: requests whose `params` are their stage's config. Out: rollouts with token sources, rows and versions: a pure
function of weights, prompt and seed. The rules `student` and `teacher` are the real ones; with any other, the teacher
writes the tokens at which the two models' rows are more than a half apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import inf, nan
from operator import attrgetter
from typing import cast

import numpy as np

from switchkd.algo.noise import Purpose
from switchkd.config.schema import Config, StageConfig
from switchkd.engines import fake
from switchkd.engines.base import Teacher
from switchkd.rollout.request import Emit, GenerationRequest
from switchkd.rollout.teacher_client import TeacherClient
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
    TeacherOutput,
    TokenSource,
    WriteRequest,
)

_OWNED_FROM = 0.5
_EVAL_IDS = 1 << 40  # sessions of evaluations: no rollout's id is as large


@dataclass(slots=True)
class _Row:
    """A completion that is being generated."""

    task: RolloutTask
    stage: StageConfig
    max_new_tokens: int  # at its step
    tokens: list[int]  # prompt and completion
    teacher_len: int  # tokens that the teacher's session shares with the row
    sources: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    statistic: list[float] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)
    teacher_rows: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stats: RolloutStats = field(default_factory=RolloutStats)
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, request: GenerationRequest, config: Config) -> _Row:
        task, stage = request.task, cast(StageConfig, request.params)
        step = task.batch - sum(before.steps for before in config.train.stages[: task.stage])
        max_new_tokens = stage.horizon.at(step) if stage.horizon else stage.max_new_tokens
        prompt = task.prompt.token_ids.tolist()
        return cls(task, stage, max_new_tokens, prompt, len(prompt))

    @property
    def t(self) -> int:
        return len(self.sources)

    @property
    def scored(self) -> bool:
        return self.stage.needs_teacher

    @property
    def given(self) -> list[int]:
        """The rest of a data set's completion."""
        is_given = self.task.completion_source == CompletionSource.DATASET
        return self.task.prompt.reference_ids[self.t :].tolist() if is_given else []

    @property
    def teacher_only(self) -> bool:
        source, rule = self.task.completion_source, self.stage.rule.type
        return source == CompletionSource.TEACHER or (source == CompletionSource.ROLLOUT and rule == "teacher")


class FakeGenerator:
    """The calls of `rollout.generator.SwitchingGenerator` that a worker makes."""

    def __init__(
        self,
        config: Config,
        student: fake.FakeStudent,
        teacher: Teacher | None,
        stop_ids: frozenset[int],
        new_weights: Callable[[], PackedWeights | None] | None = None,
    ) -> None:
        self.config, self.student, self.stop_ids, self.new_weights = config, student, stop_ids, new_weights
        self.calls = TeacherClient(teacher, None)
        self.num_rounds = 0

    def run(self, requests: Sequence[GenerationRequest], emit: Emit) -> None:
        """Serve all requests, `rollout.batch_size` at a time; `emit` gets each rollout once."""
        rows = sorted((_Row.start(request, self.config) for request in requests), key=attrgetter("scored"))
        for scored, members in groupby(rows, attrgetter("scored")):
            waiting = list(members)
            while waiting:
                num = min(len(waiting), self.config.rollout.batch_size)
                num = self.calls.open_some([row.task for row in waiting[:num]]) if scored else num
                running, waiting = waiting[:num], waiting[num:]
                while running:
                    self._round(running)
                    done = [row for row in running if row.finish_reason]
                    running = [row for row in running if not row.finish_reason]
                    self.calls.close([row.task.rollout_id for row in done if scored])
                    emit([_rollout(row) for row in done])

    def _round(self, rows: Sequence[_Row]) -> None:
        self.num_rounds += 1
        if self.new_weights is not None and (packed := self.new_weights()) is not None:
            self.student.load_weights(packed)
        if alone := [row for row in rows if row.teacher_only]:
            self._teacher_writes(alone)
        if not (drafting := [row for row in rows if not row.teacher_only]):
            return
        drafts = [row.given or self._draft(row) for row in drafting]
        passes = (len(draft) for row, draft in zip(drafting, drafts, strict=True) if not row.given)
        time.sleep(self.config.fake.student_s * max(passes, default=0))  # all rows share a pass
        if not drafting[0].scored:
            for row, draft in zip(drafting, drafts, strict=True):
                self._verify(row, draft, [None] * len(draft))
            return
        unread = [row.tokens[row.teacher_len :] + draft for row, draft in zip(drafting, drafts, strict=True)]
        output = self.calls.score(_blocks_of(drafting, unread, [len(row.tokens) - 1 for row in drafting]))
        for row, draft, part in zip(drafting, drafts, output.rows.split(), strict=True):
            row.stats.num_scored_rows += len(part)
            row.stats.output_bytes += part.nbytes
            self._verify(row, draft, part[:, 0].astype(int).tolist())

    def _draft(self, row: _Row) -> list[int]:
        """The student's next tokens."""
        draft: list[int] = []
        digest = fake.context(row.tokens)
        num = min(self.config.rollout.max_draft_tokens, row.max_new_tokens - row.t)
        while len(draft) < num and not self.stop_ids & set(draft[-1:]):
            draft.append(self.student.draw(digest, self._key(row, row.t + len(draft))))
            digest = fake.context(draft[-1:], digest)
        return draft

    def _verify(self, row: _Row, draft: Sequence[int], teacher_rows: Sequence[int | None]) -> None:
        """Accept drafted tokens up to the first that the teacher replaces by another one."""
        before, digest, replaced = row.t, fake.context(row.tokens), False
        for token, p_row in zip(draft, teacher_rows, strict=False):  # the row behind the draft is left
            statistic, threshold, source, kept = nan, nan, TokenSource.STUDENT, token
            if row.given:
                source = TokenSource.DATA
            elif p_row is not None and row.stage.rule.type != "student":
                statistic, threshold = fake.distance(p_row, self.student.row(digest)), _OWNED_FROM
                if statistic > threshold:
                    source = TokenSource.TEACHER
                    kept = fake.draw(p_row, digest, self._key(row, row.t), self.config.fake.agreement)
            replaced = kept != token
            self._accept(row, [kept], source, statistic, threshold)
            if p_row is not None:
                row.teacher_rows.append(p_row)
                row.teacher_len = len(row.tokens) - replaced
            digest = fake.context([kept], digest)
            if replaced or row.finish_reason:
                break
        row.stats.num_drafted += len(draft)
        row.stats.num_accepted += row.t - before - replaced
        row.stats.num_rejections += replaced
        row.stats.block_lengths.append(row.t - before)
        row.stats.num_rounds += 1

    def _teacher_writes(self, rows: Sequence[_Row]) -> None:
        num = self.config.rollout.max_draft_tokens
        request = WriteRequest(
            blocks=_blocks_of(rows, [row.tokens[row.teacher_len :] for row in rows], [len(r.tokens) - 1 for r in rows]),
            counts=np.array([min(num, row.max_new_tokens - row.t) for row in rows], np.int32),
            rollout_ids=np.array([row.task.rollout_id for row in rows], np.int64),
            positions=np.array([row.t for row in rows], np.int32),
            run_seed=self.config.seed,
            purpose=Purpose.GUMBEL,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            stop_ids=np.array(sorted(self.stop_ids), np.int64),
        )
        self.calls.num_calls += 1
        written = self.calls.result(self.calls.submit(self.calls.teacher.write, request))
        parts = zip(rows, written.tokens.split(), written.teacher_output.rows.split(), strict=True)
        for row, tokens, teacher_rows in parts:
            self._accept(row, tokens.tolist(), TokenSource.TEACHER, nan, -inf)
            row.teacher_rows += teacher_rows[:, 0].astype(int).tolist()
            row.teacher_len = len(row.tokens)
            row.stats.block_lengths.append(len(tokens))
            row.stats.num_rounds += 1

    def _accept(
        self, row: _Row, tokens: Sequence[int], source: TokenSource, statistic: float, threshold: float
    ) -> None:
        num = len(tokens)
        row.tokens += tokens
        row.sources += [source] * num
        row.versions += [self.student.order[1]] * num
        row.statistic += [statistic] * num
        row.threshold += [threshold] * num
        if source == TokenSource.DATA:
            row.finish_reason = "" if row.given else "eos"
        elif tokens[-1] in self.stop_ids:
            row.finish_reason = "eos"
        elif row.t >= row.max_new_tokens:
            row.finish_reason = "length"

    def _key(self, row: _Row, position: int) -> int:
        return fake.draw_key(self.config.seed, row.task.rollout_id, position, Purpose.GUMBEL)


def _blocks_of(rows: Sequence[_Row], new_tokens: Sequence[list[int]], first_positions: Sequence[int]) -> Blocks:
    """The blocks of one call: each row's session continues after `teacher_len` with `new_tokens`; rows are requested
    from `first_positions` on."""
    return Blocks(
        session_ids=np.array([row.task.rollout_id for row in rows], np.int64),
        base_lens=np.array([row.teacher_len for row in rows], np.int32),
        first_rows=np.array(first_positions, np.int32),
        tokens=Ragged.concat(new_tokens, np.int32),
    )


def _rollout(row: _Row) -> Rollout:
    task, num = row.task, row.t
    row.stats.teacher_positions = len(row.teacher_rows)
    row.stats.time_s = time.monotonic() - row.started
    uncertainty, output = np.full(num, nan, np.float32), None
    if row.teacher_rows:
        values = np.array(row.teacher_rows, np.float32).reshape(-1, 1)
        output = TeacherOutput(kind="hidden_states", dtype="float32", rows=Ragged.concat([values]))
        if row.stage.loss.type == "atkd":
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


def evaluate(generators: Mapping[str, FakeGenerator], shard: EvalShard) -> list[EvalRow]:
    """The student's texts; with the teacher, how near their rows are; made-up losses."""
    rows = [_text(generators, shard, i, prompt, seed) for seed in shard.seeds for i, prompt in shard.prompts]
    if shard.with_teacher:
        rows += [_compare(generators, shard, i, prompt) for i, prompt in shard.prompts]
    if shard.with_loss:
        weights = next(iter(generators.values())).student.weights
        for i, prompt in shard.prompts:
            num, loss = len(prompt.reference_ids), fake.distance(0, fake.row(weights, i))
            row = EvalRow(index=i, prompt_id=prompt.prompt_id, seed=GREEDY, text="", num_tokens=0)
            rows.append(replace(row, loss_tokens=num, reference_loss=num * loss))
    return rows


def _text(generators: Mapping[str, FakeGenerator], shard: EvalShard, index: int, prompt: Prompt, seed: int) -> EvalRow:
    generator = next(iter(generators.values()))
    generator.num_rounds += 1
    tokens: list[int] = []
    digest = fake.context(prompt.token_ids)
    while len(tokens) < shard.max_new_tokens and fake.END not in tokens:
        key = 0 if seed == GREEDY or shard.temperature == 0 else fake.draw_key(seed, index, len(tokens), Purpose.EVAL)
        tokens.append(generator.student.draw(digest, key))
        digest = fake.context(tokens[-1:], digest)
    time.sleep(generator.config.fake.student_s * len(tokens))
    text = fake.FakeTokenizer().decode(tokens, skip_special_tokens=True)
    return EvalRow(index=index, prompt_id=prompt.prompt_id, seed=seed, text=text, num_tokens=len(tokens))


def _compare(generators: Mapping[str, FakeGenerator], shard: EvalShard, index: int, prompt: Prompt) -> EvalRow:
    greedy = _text(generators, shard, index, prompt, GREEDY)
    generator = generators.get(prompt.teacher) or next(iter(generators.values()))
    task = RolloutTask(
        rollout_id=_EVAL_IDS + index, batch=0, stage=0, completion_source=CompletionSource.DATASET, prompt=prompt
    )
    request = GenerationRequest(task=task, params=generator.config.train.stages[0])  # type: ignore[arg-type]
    row = _Row.start(request, generator.config)
    generator.calls.open([task])
    output = generator.calls.score(_blocks_of([row], [row.given], [len(row.tokens) - 1]))
    generator.calls.close([task.rollout_id])
    pairs = zip(output.rows.values[:-1, 0].astype(int), _digests(row.tokens, row.given), strict=True)
    distances = [fake.distance(int(p_row), generator.student.row(digest)) for p_row, digest in pairs]
    return replace(
        greedy,
        reference_tokens=len(distances),
        reference_agree=sum(value <= _OWNED_FROM for value in distances),
        reference_kl=sum(distances),
        greedy_tokens=greedy.num_tokens,
        greedy_agree=greedy.num_tokens,
    )


def _digests(prompt: Sequence[int], tokens: Sequence[int]) -> Iterator[int]:
    """The contexts of the tokens that follow a prompt."""
    digest = fake.context(prompt)
    for token in tokens:
        yield digest
        digest = fake.context([token], digest)
