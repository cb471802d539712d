"""The completions of a worker while they are generated, as arrays.

A `RolloutParams` says how a completion is generated (rule, sampling, limits). `RolloutSlots` holds the tokens of all
completions, their writers and statistics, and how much of each either model has read. A round touches it with a fixed
number of vector operations; objects are made only when a completion ends.

Shapes: S slots, L tokens with the prompt, T completion tokens, M memory of the rule, D width of a teacher's row,
K most likely ids that are recorded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams
from switchkd.algo.switching import Rule
from switchkd.config.schema import HorizonConfig
from switchkd.rollout.top_logprobs import TopTokens
from switchkd.types import (
    CompletionSource,
    Ragged,
    Rollout,
    RolloutStats,
    RolloutTask,
    TeacherOutput,
    TokenSource,
    TopLogprobs,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutParams:
    """How a completion is generated. Slots with the same parameters are verified together."""

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

    def limit(self, task: RolloutTask) -> int:
        """The length at which a task's completion ends: a function of its step, not of what runs alongside."""
        return self.horizon.at(task.batch - self.first_step) if self.horizon else self.max_new_tokens

    def teacher_only(self, memory: np.ndarray) -> np.ndarray:
        """Whether the teacher writes all the rest of completions with memory [n, M]: bool [n]."""
        if self.rule.teacher_only is None or self.teacher_budget is not None or not self.scored:
            return np.zeros(len(memory), bool)
        return self.rule.teacher_only(torch.from_numpy(memory)).numpy()

    def thresholds(self, t: np.ndarray, steps: np.ndarray, memory: np.ndarray) -> np.ndarray:
        """The rule's thresholds of completion tokens t [N] with memory [N, M], float64 [N]."""
        own = torch.from_numpy(memory[:, : self.rule.memory_size])
        return self.rule.threshold(torch.from_numpy(t), torch.from_numpy(steps), own).numpy()


StageParams = Mapping[CompletionSource, RolloutParams]
"""How a stage's completions are generated, by where they come from."""


RUNNING, EOS, LENGTH = 0, 1, 2
"""Values of `RolloutSlots.finish`."""
_REASONS = ("", "eos", "length")
_FIRST_ROWS = 64
"""Rows of the teacher that are reserved per slot at first; twice as many whenever they do not suffice."""
_COUNTS = ("num_rounds", "num_drafted", "num_accepted", "num_rejections", "num_near_ties", "teacher_positions",
           "output_bytes", "num_scored_rows")  # fmt: skip
"""Fields of RolloutStats that are arrays of `RolloutSlots`."""


class RolloutSlots:
    """Completions in the making, by slot. `tokens` is prompt and completion and, beyond `lens`, the current draft.

    `teacher_rows[s, t]` is the teacher's row that decides completion token t.
    """

    # int64 [S]
    params_index: np.ndarray  # into `params`
    rollout_ids: np.ndarray
    steps: np.ndarray  # optimizer steps into the stage, for the rule
    cache_slots: np.ndarray  # of the student's engine
    prompt_lens: np.ndarray
    lens: np.ndarray
    max_lens: np.ndarray
    student_lens: np.ndarray  # tokens that the student has read
    teacher_lens: np.ndarray
    finish: np.ndarray  # RUNNING, EOS or LENGTH
    num_teacher: np.ndarray  # tokens that the teacher wrote
    num_teacher_rows: np.ndarray  # one more than the tokens where the teacher has read the last token already
    num_blocks: np.ndarray
    num_rounds: np.ndarray
    num_drafted: np.ndarray
    num_accepted: np.ndarray
    num_rejections: np.ndarray
    num_near_ties: np.ndarray
    teacher_positions: np.ndarray
    output_bytes: np.ndarray
    num_scored_rows: np.ndarray
    # bool [S]
    opened: np.ndarray  # the teacher holds a session
    pending: np.ndarray  # it waits for the teacher
    scored: np.ndarray  # the teacher's rows are wanted
    student_only: np.ndarray  # the student writes all of it; the teacher reads it once, when it has ended
    teacher_only: np.ndarray  # the teacher writes all the rest of it
    # by token
    started: np.ndarray  # float64 [S], seconds
    tokens: np.ndarray  # int32 [S, L]
    sources: np.ndarray  # uint8 [S, T], of TokenSource
    versions: np.ndarray  # int32 [S, T]
    statistic: np.ndarray  # float32 [S, T]
    threshold: np.ndarray  # float32 [S, T]
    uncertainty: np.ndarray  # float32 [S, T]
    block_lengths: np.ndarray  # int32 [S, T]
    memory: np.ndarray  # float64 [S, M], the rule's
    teacher_ids: np.ndarray  # int32 [S, T, K]
    teacher_logprobs: np.ndarray  # float32 [S, T, K]
    student_ids: np.ndarray
    student_logprobs: np.ndarray
    teacher_rows: np.ndarray  # [S, T reserved, ...] as the teacher sends them; made with its first answer

    def __init__(self, tasks: Sequence[tuple[RolloutTask, RolloutParams]], num: int) -> None:
        """Empty slots that fit each of the tasks, `num` of them at first."""
        length = max((params.limit(task) for task, params in tasks), default=0)
        prompt = max((len(task.prompt.token_ids) for task, _ in tasks), default=0)
        width = max((params.top_logprobs for _, params in tasks), default=0)
        memory = max((params.rule.memory_size for _, params in tasks), default=0)
        self.params: list[RolloutParams] = []
        self.tasks: list[RolloutTask | None] = [None] * num
        self._free = list(reversed(range(num)))
        self._initial: dict[str, float] = {}
        numbers = ("params_index", "rollout_ids", "steps", "cache_slots", "prompt_lens", "lens", "max_lens",
                   "student_lens", "teacher_lens", "finish", "num_teacher", "num_teacher_rows", "num_blocks",
                   *_COUNTS)  # fmt: skip
        for name in numbers:
            self._add(name, (num,), np.int64, 0)
        for name in ("opened", "pending", "scored", "student_only", "teacher_only"):
            self._add(name, (num,), np.bool_, False)
        self._add("started", (num,), np.float64, 0)
        self._add("tokens", (num, prompt + length), np.int32, 0)
        self._add("sources", (num, length), np.uint8, TokenSource.STUDENT)
        self._add("versions", (num, length), np.int32, 0)
        self._add("block_lengths", (num, length), np.int32, 0)
        for name in ("statistic", "threshold", "uncertainty"):
            self._add(name, (num, length), np.float32, np.nan)
        self._add("memory", (num, memory), np.float64, 0)
        for model in ("teacher", "student"):
            self._add(f"{model}_ids", (num, length, width), np.int32, -1)
            self._add(f"{model}_logprobs", (num, length, width), np.float32, np.nan)

    def _add(self, name: str, shape: tuple[int, ...], dtype: type, initial: float) -> None:
        self._initial[name] = initial
        setattr(self, name, np.full(shape, initial, dtype))

    # ── start and end of a completion ──────────────────────────────────────────────────────────────────────────────

    def add(self, task: RolloutTask, params: RolloutParams, cache_slot: int) -> int:
        """Start a completion. Returns its slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        for name, initial in self._initial.items():
            getattr(self, name)[slot] = initial
        if not any(params is known for known in self.params):
            self.params.append(params)
        prompt = task.prompt.token_ids
        self.tasks[slot] = task
        self.params_index[slot] = next(i for i, known in enumerate(self.params) if params is known)
        self.rollout_ids[slot] = task.rollout_id
        self.steps[slot] = task.batch - params.first_step
        self.cache_slots[slot] = cache_slot
        self.tokens[slot, : len(prompt)] = prompt
        self.prompt_lens[slot] = self.lens[slot] = self.teacher_lens[slot] = len(prompt)
        self.max_lens[slot] = len(prompt) + params.limit(task)
        self.started[slot] = time.monotonic()
        self.scored[slot] = params.scored
        self.student_only[slot] = not params.scored or params.rule.student_only
        self.teacher_only[slot] = params.teacher_only(self.memory[slot : slot + 1, : params.rule.memory_size])[0]
        return slot

    def free(self, slots: np.ndarray) -> None:
        """Give up slots whose completions have ended."""
        self._free += slots.tolist()

    def _grow(self) -> None:
        num = len(self.tasks)
        for name, initial in self._initial.items():
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.full_like(array, initial)]))
        if hasattr(self, "teacher_rows"):
            self.teacher_rows = np.concatenate([self.teacher_rows, np.empty_like(self.teacher_rows)])
        self.tasks += [None] * num
        self._free += reversed(range(num, 2 * num))

    def rollout(self, slot: int, output_kind: str, output_dtype: str) -> Rollout:
        """The record of a completion that has ended."""
        task, params, num = self.tasks[slot], self.params[self.params_index[slot]], int(self.t(slot))
        assert task is not None, "the slot holds a completion"
        stats = RolloutStats(
            **{name: int(getattr(self, name)[slot]) for name in _COUNTS},
            block_lengths=self.block_lengths[slot, : self.num_blocks[slot]].tolist(),
            time_s=time.monotonic() - float(self.started[slot]),
        )
        output = None
        if self.num_teacher_rows[slot]:
            values = self.teacher_rows[slot, :num].copy()
            output = TeacherOutput(kind=output_kind, dtype=output_dtype, rows=Ragged(values, np.array([num], np.int32)))
            if output_kind == "top_logprobs":
                stats.tail_mass, stats.num_top_rows = sum_tail_mass(values), num
        first = self.prompt_lens[slot]
        return Rollout(
            rollout_id=task.rollout_id,
            batch=task.batch,
            stage=task.stage,
            prompt_id=task.prompt.prompt_id,
            completion_source=task.completion_source,
            prompt_ids=task.prompt.token_ids.astype(np.int32),
            token_ids=self.tokens[slot, first : first + num].copy(),
            sources=self.sources[slot, :num].copy(),
            weight_versions=self.versions[slot, :num].copy(),
            statistic=self.statistic[slot, :num].copy(),
            threshold=self.threshold[slot, :num].copy(),
            uncertainty=self.uncertainty[slot, :num].copy(),
            teacher_output=output,
            finish_reason=_REASONS[self.finish[slot]],
            approximate=output is not None and output_kind == "top_logprobs",
            teacher=task.prompt.teacher,
            stats=stats,
            top_logprobs=self._top_logprobs(slot, num, params.top_logprobs),
        )

    def _top_logprobs(self, slot: int, num: int, width: int) -> TopLogprobs | None:
        if width == 0:
            return None
        names = ("teacher_ids", "teacher_logprobs", "student_ids", "student_logprobs")
        return TopLogprobs(**{name: getattr(self, name)[slot, :num, :width].copy() for name in names})

    # ── between two rounds ─────────────────────────────────────────────────────────────────────────────────────────

    def t(self, slots: np.ndarray | int) -> np.ndarray:
        """Index of the next completion token."""
        return self.lens[slots] - self.prompt_lens[slots]

    def done(self, slots: np.ndarray) -> np.ndarray:
        """Whether completions have ended, with the teacher's rows if they are wanted: bool [n]."""
        has_rows = self.num_teacher_rows[slots] >= self.t(slots)
        return (self.finish[slots] != RUNNING) & (~self.scored[slots] | has_rows)

    def tasks_of(self, slots: np.ndarray) -> list[RolloutTask]:
        """The tasks of slots that hold a completion."""
        return [task for task in (self.tasks[slot] for slot in slots.tolist()) if task is not None]

    def groups(self, slots: np.ndarray) -> Iterator[tuple[RolloutParams, np.ndarray]]:
        """Parameters, with the indices into `slots` that share them, in order of first appearance."""
        index = self.params_index[slots]
        members = np.arange(len(slots))
        while len(members):
            same = index[members] == index[members[0]]
            yield self.params[index[members[0]]], members[same]
            members = members[~same]

    def unread(self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Ragged:
        """Tokens from `starts` up to `ends` of each slot, int32."""
        owners, positions = ragged_index(starts, ends - starts)
        return Ragged(self.tokens[slots[owners], positions], (ends - starts).astype(np.int32))

    def keep_rows(self, slots: np.ndarray, first: np.ndarray, rows: Ragged) -> None:
        """Store the teacher's rows of the tokens from `first` [n] on."""
        owners, t = ragged_index(first, rows.lengths)
        self._reserve_rows(int(t.max(initial=-1)) + 1, rows.values)
        self.teacher_rows[slots[owners], t] = rows.values
        self.num_teacher_rows[slots] = first + rows.lengths

    def keep_tops(self, slots: np.ndarray, t: np.ndarray, teacher: TopTokens | None, student: TopTokens | None) -> None:
        """Record either model's most likely ids of completion tokens t [N] of slots [N]."""
        for name, tops in (("teacher", teacher), ("student", student)):
            if tops is not None:
                width = tops.ids.shape[1]
                getattr(self, f"{name}_ids")[slots, t, :width] = tops.ids
                getattr(self, f"{name}_logprobs")[slots, t, :width] = tops.logprobs

    def _reserve_rows(self, num: int, like: np.ndarray) -> None:
        reserved = self.teacher_rows.shape[1] if hasattr(self, "teacher_rows") else 0
        if num <= reserved:
            return
        grown = np.empty((len(self.tasks), max(num, 2 * reserved, _FIRST_ROWS), *like.shape[1:]), like.dtype)
        if reserved:
            grown[:, :reserved] = self.teacher_rows
        self.teacher_rows = grown

    def emit(
        self, slots: np.ndarray, counts: np.ndarray, *, sources: np.ndarray | int, version: int, stop_ids: np.ndarray
    ) -> None:
        """Accept the next `counts` [n] of `tokens` with their writers, flat [N]; a completion ends at a stop id or at
        its limit."""
        owners, t = ragged_index(self.t(slots), counts)
        self.sources[slots[owners], t] = sources
        self.versions[slots[owners], t] = version
        if not isinstance(sources, int):
            self.num_teacher[slots] += np.bincount(owners, sources == TokenSource.TEACHER, len(slots)).astype(np.int64)
        self.lens[slots] += counts
        stopped = np.isin(self.tokens[slots, self.lens[slots] - 1], stop_ids)
        full = self.lens[slots] >= self.max_lens[slots]
        self.finish[slots] = np.where(stopped, EOS, np.where(full, LENGTH, RUNNING))


def ragged_index(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of ranges, flat: the range [N] of each element, and starts[range], starts[range] + 1, ... [N]."""
    lengths = np.asarray(lengths, np.int64)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    return owners, np.arange(len(owners)) + (starts - np.cumsum(lengths) + lengths)[owners]


def sum_tail_mass(values: np.ndarray) -> float:
    """The mass that compressed rows [n, 2 k + 2] leave out, summed over them."""
    return float(np.ascontiguousarray(values[:, -2]).view(np.float32).sum(dtype=np.float64))
