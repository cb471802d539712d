"""Puts together a step's line of metrics.jsonl.

In: the learner's result, the batch's entries, the workers' reports. Out: one flat dict of numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from switchkd.types import CompletionSource, Entry, StepResult, WorkReport


def step_row(
    result: StepResult,
    entries: Sequence[Entry],
    reports: Sequence[WorkReport],
    staleness: Sequence[int],
    step_s: float,
) -> dict[str, float]:
    """Return a step's numbers. `entries` are the rollouts that it trained on, `reports` the workers' calls in the
    `step_s` seconds since the last step (under asynchrony for other steps), `staleness` the ages in versions of the
    student's rollouts."""
    work = sum(reports, WorkReport())
    generated = work.num_student_tokens + work.num_teacher_tokens
    return {
        "weight_version": result.version,
        "lr": result.lr,
        **result.metrics,
        **rollout_metrics(entries),
        "rollout/tokens": generated,
        "rollout/student_tokens": work.num_student_tokens,
        "rollout/teacher_tokens": work.num_teacher_tokens,
        "rollout/reference_tokens": work.num_tokens - generated,
        **({"rollout/tokens_per_s": generated / max(step_s, 1e-9)} if generated else {}),
        "rollout/near_ties": work.stats.num_near_ties,
        "teacher/calls": work.num_teacher_calls,
        "teacher/output_bytes": work.stats.output_bytes,
        **_ratios(work),
        "replay/staleness_mean": sum(staleness) / len(staleness) if staleness else 0.0,
        "replay/staleness_max": max(staleness, default=0),
        "time/step_s": step_s,
        "time/learn_s": result.time_s,
        "time/rollout_s": work.time_s,
        "time/rollout_idle_s": work.idle_s,
        "time/wait_teacher_s": work.wait_teacher_s,
        "time/wait_replay_s": work.wait_replay_s,
    }


def _ratios(work: WorkReport) -> dict[str, float]:
    """Ratios whose denominator is not 0; it is 0 where no token was drafted or the teacher sent no (top) rows."""
    stats = work.stats
    pairs = {
        "rollout/acceptance_rate": (stats.num_accepted, stats.num_drafted),
        "rollout/emitted_per_round": (sum(stats.block_lengths), len(stats.block_lengths)),
        "teacher/bytes_per_row": (stats.output_bytes, stats.num_scored_rows),
        "teacher/bytes_per_token": (stats.output_bytes, work.num_tokens if stats.num_scored_rows else 0),
        "teacher/tail_mass": (stats.tail_mass, stats.num_top_rows),
    }
    return {name: part / whole for name, (part, whole) in pairs.items() if whole}


def rollout_metrics(entries: Sequence[Entry]) -> dict[str, float]:
    """Means over completions, NaN where none has the number. `rollout/teacher_token_frac` is the teacher's share of all
    tokens of the completions that both models generated, `rollout/shared_tokens`; both are absent where there are
    none."""
    together = [entry for entry in entries if entry.completion_source == CompletionSource.ROLLOUT]
    num_tokens = sum(entry.num_tokens for entry in together)
    num_teacher_tokens = sum(entry.num_teacher_tokens for entry in together)
    return {
        **(
            {"rollout/teacher_token_frac": num_teacher_tokens / num_tokens, "rollout/shared_tokens": num_tokens}
            if num_tokens
            else {}
        ),
        "rollout/len_mean": _mean([entry.num_tokens for entry in entries]),
        "rollout/eos_frac": _mean([entry.finish_reason == "eos" for entry in entries]),
        "rollout/repeat_frac": _mean([entry.repeat_frac for entry in entries]),
        "rollout/divergence_mean": _mean([e.divergence_mean for e in entries if not math.isnan(e.divergence_mean)]),
    }


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
