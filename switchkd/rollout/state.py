"""One completion while it is generated: what a rollout worker knows of it between two rounds.

A `RolloutParams` says how it is generated (rule, sampling, limits), a `RolloutState` holds its tokens, what decided
them, and how much of it each model has read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams
from switchkd.algo.switching import Rule, init_memory
from switchkd.config.schema import HorizonConfig
from switchkd.rollout.top_logprobs import TopTokens, top_logprobs
from switchkd.types import CompletionSource, Ragged, Rollout, RolloutStats, RolloutTask, TeacherOutput, TokenSource


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutParams:
    """How a completion is generated. Rows with the same parameters are verified together."""

    rule: Rule
    student: SamplingParams
    teacher: SamplingParams
    max_new_tokens: int
    horizon: HorizonConfig | None = None  # replaces `max_new_tokens` as the limit, by step
    seed: int
    purpose: Purpose = Purpose.GUMBEL  # of both models' coupled draws; evaluation has its own
    teacher_budget: int | None = None  # tokens; then the student writes
    first_step: int = 0  # of the stage: a rule sees training steps counted from it
    scored: bool = True  # False: without the teacher, the student generates alone
    wants_uncertainty: bool = False  # ATKD's UnC is recorded
    top_logprobs: int = 0  # this many of each model's most likely ids are recorded


StageParams = Mapping[CompletionSource, RolloutParams]
"""How a stage's completions are generated, by where they come from."""


@dataclass(slots=True)
class RolloutState:
    """A completion in the making. `tokens` is prompt and completion; a model has read `*_len` of them."""

    task: RolloutTask
    params: RolloutParams
    slot: int
    tokens: list[int]
    memory: torch.Tensor  # float64 [1, M], the rule's
    started: float = field(default_factory=time.monotonic)
    student_len: int = 0
    teacher_len: int = 0
    lookahead_row: np.ndarray | None = None  # [1, D]: the teacher's row of the last token, when it has read it already
    sources: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    statistic: list[float] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)
    uncertainty: list[float] = field(default_factory=list)
    teacher_output: list[np.ndarray] = field(default_factory=list)  # pieces [n, D], one row per decided token
    num_teacher_rows: int = 0  # rows in `teacher_output`
    teacher_top: list[TopTokens] = field(default_factory=list)  # pieces, for `RolloutParams.top_logprobs`
    student_top: list[TopTokens] = field(default_factory=list)
    opened: bool = False  # the teacher holds a session
    pending: bool = False  # it waits for the teacher
    num_teacher: int = 0
    finish_reason: str = ""
    stats: RolloutStats = field(default_factory=RolloutStats)

    @classmethod
    def start(cls, task: RolloutTask, params: RolloutParams, slot: int) -> RolloutState:
        prompt = task.prompt.token_ids.tolist()
        return cls(
            task=task,
            params=params,
            slot=slot,
            tokens=prompt,
            memory=init_memory(params.rule, 1),
            teacher_len=len(prompt),
        )

    @property
    def prompt_len(self) -> int:
        return len(self.task.prompt.token_ids)

    @property
    def t(self) -> int:
        """Index of the next completion token."""
        return len(self.tokens) - self.prompt_len

    @property
    def student_only(self) -> bool:
        """The student generates all of it; the teacher reads it once, when it has ended."""
        return not self.params.scored or self.params.rule.student_only

    @property
    def teacher_only(self) -> bool:
        """The teacher writes all the rest of it."""
        rule = self.params.rule
        if rule.teacher_only is None or self.params.teacher_budget is not None or not self.params.scored:
            return False
        return bool(rule.teacher_only(self.memory))

    @property
    def done(self) -> bool:
        """Ended, and with the teacher's rows if they are wanted."""
        return bool(self.finish_reason) and (not self.params.scored or self.num_teacher_rows == self.t)

    @property
    def step(self) -> int:
        """Optimizer steps into its stage, for the rule."""
        return self.task.batch - self.params.first_step

    @property
    def max_new_tokens(self) -> int:
        """Length at which the completion ends: a function of its step and the config, not of what runs alongside."""
        horizon = self.params.horizon
        return horizon.at(self.step) if horizon else self.params.max_new_tokens

    @property
    def teacher_may_write(self) -> bool:
        return self.params.teacher_budget is None or self.num_teacher < self.params.teacher_budget

    def accept(self, token: int, source: TokenSource, version: int, stop_ids: frozenset[int]) -> None:
        """Append a decided token; the row is finished at a stop id or at its limit."""
        self.tokens.append(token)
        self.sources.append(source)
        self.versions.append(version)
        self.num_teacher += source == TokenSource.TEACHER
        if token in stop_ids:
            self.finish_reason = "eos"
        elif self.t >= self.max_new_tokens:
            self.finish_reason = "length"

    def write(self, tokens: Sequence[int], version: int, stop_ids: frozenset[int]) -> None:
        """Append tokens that the teacher wrote alone (`teacher_only`): the statistic is not computed."""
        memory = self.memory
        t = torch.arange(self.t, self.t + len(tokens))
        step = torch.full_like(t, self.step)
        self.threshold += self.params.rule.threshold(t, step, memory.expand(len(tokens), -1)).tolist()
        self.statistic += [math.nan] * len(tokens)
        for token in tokens:
            self.accept(token, TokenSource.TEACHER, version, stop_ids)

    def append_teacher_rows(self, teacher_rows: np.ndarray) -> None:
        """The teacher's rows [n, D] of the tokens decided last."""
        self.teacher_output.append(teacher_rows)
        self.num_teacher_rows += len(teacher_rows)

    def rollout(self, output_kind: str, output_dtype: str) -> Rollout:
        """The finished record."""
        num = self.t
        values = np.concatenate(self.teacher_output) if self.teacher_output else None
        teacher_output = None
        self.stats.time_s = time.monotonic() - self.started
        if values is not None and output_kind == "top_logprobs":
            self.stats.tail_mass, self.stats.num_top_rows = sum_tail_mass(values), num
        if values is not None:
            teacher_output = TeacherOutput(
                kind=output_kind, dtype=output_dtype, rows=Ragged(values, np.array([num], np.int32))
            )
        return Rollout(
            rollout_id=self.task.rollout_id,
            batch=self.task.batch,
            stage=self.task.stage,
            prompt_id=self.task.prompt.prompt_id,
            completion_source=self.task.completion_source,
            prompt_ids=self.task.prompt.token_ids.astype(np.int32),
            token_ids=np.array(self.tokens[self.prompt_len :], np.int32),
            sources=np.array(self.sources, np.uint8),
            weight_versions=np.array(self.versions, np.int32),
            statistic=_floats(self.statistic, num),
            threshold=_floats(self.threshold, num),
            uncertainty=_floats(self.uncertainty, num),
            teacher_output=teacher_output,
            finish_reason=self.finish_reason,
            approximate=teacher_output is not None and output_kind == "top_logprobs",
            teacher=self.task.prompt.teacher,
            stats=self.stats,
            top_logprobs=top_logprobs(self.teacher_top, self.student_top, num, self.params.top_logprobs),
        )


def sum_tail_mass(values: np.ndarray) -> float:
    """The mass that compressed rows [n, 2 k + 2] leave out, summed over them."""
    return float(np.ascontiguousarray(values[:, -2]).view(np.float32).sum(dtype=np.float64))


def _floats(values: list[float], num: int) -> np.ndarray:
    return np.array(values, np.float32) if len(values) == num else np.full(num, np.nan, np.float32)
