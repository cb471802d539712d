"""Computes the least time in which a set of rollouts could be generated: the bound of `bench switching`.

In: finished rollouts with, for every token, whether a draft of either model is rejected there; the measured costs of
steps and blocks. Out: seconds. Each row costs its share of a full batch; partly filled batches, mixed drafts,
admissions and bookkeeping are losses against the bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import numpy as np
import torch

from switchkd.algo import divergence
from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams, draw
from switchkd.algo.switching import Rule
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.rollout.speculation import SIZES
from switchkd.types import Blocks, Prompt, Ragged, Rollout, Sessions, WriteRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCosts:
    """Seconds per row of a full batch."""

    student: float  # one step, LM head and draw included
    write: float  # one step of the teacher's `write`
    read: dict[int, float]  # the teacher's block of K
    check: dict[int, float]  # the student's block of K, its head included
    decide: float  # one token
    prompt: float  # one token of both models

    @classmethod
    def mean(cls, several: Sequence[StepCosts]) -> StepCosts:
        """Average field by field, block by block."""

        def average(values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                return {size: fmean(value[size] for value in values) for size in values[0]}
            return fmean(values)

        return cls(**{field.name: average([getattr(costs, field.name) for costs in several]) for field in fields(cls)})

    def as_ms(self) -> dict[str, Any]:
        """Return rounded milliseconds."""

        def rounded(value: Any) -> Any:
            if isinstance(value, dict):
                return {size: round(1e3 * seconds, 2) for size, seconds in value.items()}
            return round(1e3 * value, 3)

        return {field.name: rounded(getattr(self, field.name)) for field in fields(self)}


def measure_costs(
    student: HFStudent, teacher: HFTeacher, head: Any, prompt: Prompt, batch: int, block: int
) -> StepCosts:
    """Measure full batches at the position of a half-written completion."""
    base = len(prompt.token_ids) + 24
    rng = np.random.default_rng(0)
    ids = rng.integers(5, student.head.vocab_size, (batch, base + block + 1)).astype(np.int32)
    slots, bases = np.arange(batch), np.full(batch, base, np.int32)
    sessions = Sessions(session_ids=slots, tokens=Ragged.concat(list(ids[:, :base])))
    teacher.open(sessions)
    sizes = [size for size in SIZES if size <= block]
    prefill = _median(lambda: student.extend(slots, np.zeros(batch), ids[:, :base].ravel(), bases), 2)
    start = time.perf_counter()
    teacher.score(_blocks(slots, ids, base, 0))
    prefill += time.perf_counter() - start

    def read(size: int) -> Callable[[], Any]:
        return lambda: teacher.score(_blocks(slots, ids, base, size))

    def check(size: int) -> Callable[[], Any]:
        part = ids[:, base : base + size].ravel()
        return lambda: student.head.logits(student.extend(slots, bases, part, np.full(batch, size, np.int32)))

    sampling = SamplingParams()

    def step() -> Any:
        logits = check(1)()
        return draw(logits, run_seed=0, rollout_ids=slots, positions=slots, purpose=Purpose.GUMBEL, sampling=sampling)

    def write() -> Any:
        return teacher.write(
            WriteRequest(
                blocks=_blocks(slots, ids, base, 0, again=True), counts=np.full(batch, 4, np.int32), rollout_ids=slots,
                positions=np.zeros(batch, np.int32), run_seed=0, purpose=int(Purpose.GUMBEL), temperature=1.0,
                top_p=1.0, top_k=0, stop_ids=np.zeros(0, np.int64),
            )
        )  # fmt: skip

    hidden = torch.randn(4 * batch, head.weight.shape[1], device=head.weight.device)

    def decide() -> None:
        rows = head.logits(hidden)
        divergence.per_row(divergence.jsd, rows, rows.roll(1, 0))

    costs = StepCosts(
        student=_median(step) / batch,
        write=_median(write) / batch / 4,
        read={size: _median(read(size)) / batch for size in sizes},
        check={size: _median(check(size)) / batch for size in sizes},
        decide=_median(decide) / (4 * batch),
        prompt=prefill / batch / base,
    )
    teacher.close(slots)
    return costs


def _blocks(slots: np.ndarray, ids: np.ndarray, base: int, size: int, again: bool = False) -> Blocks:
    """Return `size` tokens from `base` on; `again` reads the token before `base` once more."""
    batch = len(slots)
    kept = base - 1 if again else base
    part = ids[:, kept : base + size]
    return Blocks(
        session_ids=slots,
        base_lens=np.full(batch, kept, np.int32),
        first_rows=np.full(batch, base - (size == 0), np.int32),
        tokens=Ragged.concat(list(part)),
    )


def _median(call: Callable[[], Any], repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def bound_s(rollouts: Sequence[Rollout], reads: Sequence[Any], costs: StepCosts, rule: Rule) -> float:
    """Seconds if every round of every row had been the best one, known in hindsight."""
    return sum(
        len(rollout.prompt_ids) * costs.prompt + row_bound_s(rollout, read.rejected, costs, rule)
        for rollout, read in zip(rollouts, reads, strict=True)
    )


def row_bound_s(rollout: Rollout, rejected: Mapping[str, np.ndarray], costs: StepCosts, rule: Rule) -> float:
    """Minimize over the three kinds of the next round, by dynamic programming from the last token to the first.
    `rejected`: by drafter, whether its token of a position is not the rollout's, bool [T]."""
    num = rollout.num_tokens
    teacher_only, ends = _course(rollout, rejected, rule)
    best = np.zeros(num + 1)
    for t in range(num - 1, -1, -1):
        if teacher_only[t]:
            best[t] = best[t + 1] + costs.write
            continue
        ways = [costs.student + costs.read[1] + costs.decide + best[t + 1]]
        for size in costs.read:
            if size > num - t:
                continue
            for drafter, block, step in (("student", costs.read, costs.student), ("teacher", costs.check, costs.write)):
                emitted = min(ends[drafter][t] - t + 1, size)
                ways.append(size * step + block[size] + emitted * costs.decide + best[t + emitted])
        best[t] = min(ways)
    return float(best[0])


def steady_s(rollouts: Sequence[Rollout], reads: Sequence[Any], costs: StepCosts, rule: Rule) -> float:
    """Return the seconds without hindsight: every round drafts the same way, the best one for all rows."""
    prompts = sum(len(rollout.prompt_ids) for rollout in rollouts) * costs.prompt
    ways = [("student", size) for size in costs.read] + [("teacher", size) for size in costs.check]
    pairs = list(zip(rollouts, reads, strict=True))
    return prompts + min(
        sum(row_steady_s(rollout, read.rejected, costs, rule, drafter, most) for rollout, read in pairs)
        for drafter, most in ways
    )


def row_steady_s(
    rollout: Rollout, rejected: Mapping[str, np.ndarray], costs: StepCosts, rule: Rule, drafter: str, most: int
) -> float:
    """Return one row's seconds where `drafter` drafts every round, with blocks of `most` tokens or of those left."""
    teacher_only, ends = _course(rollout, rejected, rule)
    step, block = (costs.write, costs.check) if drafter == "teacher" else (costs.student, costs.read)
    t, seconds = 0, 0.0
    while t < rollout.num_tokens:
        if teacher_only[t]:
            return seconds + (rollout.num_tokens - t) * costs.write
        size = max(size for size in block if size <= min(most, rollout.num_tokens - t))
        emitted = min(int(ends[drafter][t]) - t + 1, size)
        seconds += size * step + block[size] + emitted * costs.decide
        t += emitted
    return seconds


def _course(
    rollout: Rollout, rejected: Mapping[str, np.ndarray], rule: Rule
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return, for each token, whether only the teacher writes from it on, and where each drafter's block ends."""
    num = rollout.num_tokens
    teacher_only = np.isneginf(rollout.threshold) if rule.teacher_only is not None else np.zeros(num, bool)
    return teacher_only, {drafter: _next(tokens) for drafter, tokens in rejected.items()}


def _next(rejected: np.ndarray) -> np.ndarray:
    """Return for every position the first rejection at or after it, or the last position. bool [T] -> int [T]."""
    last = len(rejected) - 1
    positions = np.where(rejected, np.arange(len(rejected)), last)
    return np.minimum.accumulate(positions[::-1])[::-1]
