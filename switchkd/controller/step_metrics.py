"""What a step's line in metrics.jsonl says, put together from those who took part in it.

In: the learner's result, the batch's entries, the workers' reports. Out: one flat dict of numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from switchkd.types import CompletionSource, Entry, StepResult, WorkReport


def step_row(
    result: StepResult, entries: Sequence[Entry], reports: Sequence[WorkReport], staleness: Sequence[int]
) -> dict[str, float]:
    """`entries` are what the step trained on, `reports` what the workers did since the last step (under asynchrony that
    is other work), `staleness` the ages in versions of the rollouts that the student wrote at."""
    tokens = sum(report.num_tokens for report in reports)
    return {
        "weight_version": result.version,
        "lr": result.lr,
        **result.metrics,
        **rollout_metrics(entries),
        "rollout/tokens": tokens,
        "rollout/student_tokens": sum(report.num_student_tokens for report in reports),
        "rollout/teacher_tokens": sum(report.num_teacher_tokens for report in reports),
        "rollout/tokens_per_s": tokens / max(sum(report.time_s for report in reports), 1e-9),
        "rollout/near_ties": sum(report.num_near_ties for report in reports),
        **_blocks(reports),
        "teacher/calls": sum(report.num_teacher_calls for report in reports),
        "teacher/output_bytes": sum(report.output_bytes for report in reports),
        **_output_metrics(reports),
        "replay/staleness_mean": sum(staleness) / len(staleness) if staleness else 0.0,
        "replay/staleness_max": max(staleness, default=0),
        "time/learn_s": result.time_s,
        "time/rollout_s": sum(report.time_s for report in reports),
        "time/rollout_idle_s": sum(report.idle_s for report in reports),
        "time/wait_teacher_s": sum(report.wait_teacher_s for report in reports),
        "time/wait_replay_s": sum(report.wait_replay_s for report in reports),
    }


def _blocks(reports: Sequence[WorkReport]) -> dict[str, float]:
    """How many tokens a block settles; nothing where no block was proposed."""
    blocks = sum(report.num_blocks for report in reports)
    tokens = sum(report.num_block_tokens for report in reports)
    return {"rollout/emitted_per_round": tokens / blocks} if blocks else {}


def _output_metrics(reports: Sequence[WorkReport]) -> dict[str, float]:
    """Bytes that the teacher sent, and (`teacher.output: top_logprobs`) the mean mass outside the top k."""
    rows, tokens = sum(report.num_scored_rows for report in reports), sum(report.num_tokens for report in reports)
    bytes_sent = sum(report.output_bytes for report in reports)
    found = {}
    if rows:
        found = {"teacher/bytes_per_row": bytes_sent / rows, "teacher/bytes_per_token": bytes_sent / max(tokens, 1)}
    num = sum(report.num_topk_tokens for report in reports)
    if num:
        found["teacher/tail_mass"] = sum(report.tail_mass for report in reports) / num
    return found


def rollout_metrics(entries: Sequence[Entry]) -> dict[str, float]:
    """Means over completions, each counting once; NaN where none has the number. `rollout/teacher_token_frac` is the
    teacher's share of all tokens of the completions that both models generated together; absent without any."""
    together = [entry for entry in entries if entry.completion_source == CompletionSource.ROLLOUT]
    num_tokens = sum(entry.num_tokens for entry in together)
    num_teacher_tokens = sum(entry.num_teacher_tokens for entry in together)
    return {
        **({"rollout/teacher_token_frac": num_teacher_tokens / num_tokens} if num_tokens else {}),
        "rollout/len_mean": _mean([entry.num_tokens for entry in entries]),
        "rollout/eos_frac": _mean([entry.finish_reason == "eos" for entry in entries]),
        "rollout/repeat_frac": _mean([entry.repeat_frac for entry in entries]),
        "rollout/divergence_mean": _mean([e.divergence_mean for e in entries if not math.isnan(e.divergence_mean)]),
    }


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
