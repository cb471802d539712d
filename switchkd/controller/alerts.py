"""Warns of problems that raise no error, such as collapsing completions or a teacher that never writes.

In: the entries of a step's batch, rows of metrics.jsonl, evaluations. Out: lines that name a number and a likely
remedy. A warning is given when its condition begins to hold, and again only after the condition ceased to hold.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from switchkd.config.schema import RuleConfig
from switchkd.controller.step_metrics import rollout_metrics
from switchkd.types import CompletionSource, Entry

STUCK_STEPS = 10
"""Steps in a row, with rollouts, after which a constant teacher share is reported."""
STUCK_FRAC = 0.005
"""Teacher shares this close to 0 or 1 count as 0 or 1."""
LENGTH_STEPS = 5
"""Smallest number of steps whose mean length is compared with."""
MAX_REPEAT_FRAC = 0.5
MAX_AGREEMENT_LOSS = 0.05

LEVERS = {
    "jsd_threshold": ("tau0", "smaller", "larger"),
    "kl_spike": ("factor", "smaller", "larger"),
    "outside_top_k": ("top_k", "smaller", "larger"),
    "random": ("prob", "larger", "smaller"),
    "mixture": ("prob", "larger", "smaller"),
}
"""By rule: the key that changes the teacher's share, and the direction for more teacher, or student, tokens."""


class MetricAlerts:
    """Keeps the recent steps and the best score of one run. After a resume, pass the earlier scores to `evaluation`."""

    def __init__(self, max_staleness: float) -> None:
        self._max_staleness = max_staleness
        self._best_agreement = -math.inf
        self._open: set[str] = set()  # warnings that were given and still hold
        self._begin_stage("")

    def step(self, row: Mapping[str, Any], entries: Sequence[Entry], rule: RuleConfig) -> list[str]:
        """Check a step's `row` of metrics.jsonl, and the completions of its batch that were generated under `rule`."""
        if row["stage"] != self._stage:
            self._begin_stage(row["stage"])
        staleness = row["replay/staleness_max"]
        lines = self._once(
            "staleness",
            staleness > self._max_staleness,
            f"trained on rollouts {staleness:.0f} versions old, above replay.max_staleness={self._max_staleness}: "
            "replay.policy=fifo keeps to it, a smaller replay.capacity comes nearer",
        )
        generated = [entry for entry in entries if entry.completion_source == CompletionSource.ROLLOUT]
        if not generated:
            return lines
        metrics = rollout_metrics(generated)
        lines += self._share(metrics["rollout/teacher_token_frac"], rule)
        lines += self._length(metrics["rollout/len_mean"])
        repeat_frac = metrics["rollout/repeat_frac"]
        return lines + self._once(
            "repeats",
            repeat_frac > MAX_REPEAT_FRAC,
            f"{repeat_frac:.0%} of the completions' tokens repeat earlier 4-grams: the student runs in circles; try "
            "more steps on the data set before, or a student.temperature nearer to 1",
        )

    def evaluation(self, scores: Mapping[str, float]) -> list[str]:
        now = scores.get("eval/agreement")
        if now is None:
            return []
        best = self._best_agreement = max(self._best_agreement, now)
        return self._once(
            "agreement",
            now < best - MAX_AGREEMENT_LOSS,
            f"agreement with the teacher fell to {now:.3f}, its best was {best:.3f}: try a smaller learner.lr; "
            "train.select_by=agreement keeps the best student of the last stage",
        )

    def _begin_stage(self, name: str) -> None:
        """Forget shares and lengths: a new stage may change them on purpose."""
        self._stage = name
        self._shares: deque[float] = deque(maxlen=STUCK_STEPS)
        self._lengths: list[float] = []
        self._open -= {"share", "length"}

    def _share(self, share: float, rule: RuleConfig) -> list[str]:
        self._shares.append(share)
        never = all(share <= STUCK_FRAC for share in self._shares)
        always = all(share >= 1 - STUCK_FRAC for share in self._shares)
        may_switch = rule.type not in ("student", "teacher") and rule.prob not in (0, 1) and rule.teacher_budget != 0
        key, for_teacher, for_student = LEVERS.get(rule.type, ("params", "other", "other"))
        who, other = ("teacher", for_teacher) if never else ("student", for_student)
        return self._once(
            "share",
            may_switch and len(self._shares) == STUCK_STEPS and (never or always),
            f"the teacher's share was {share:.1%} for {STUCK_STEPS} steps: under {rule.type} the {who} writes nothing; "
            f"try {other} rollout.rule.{key} (the stage's, if it has a rule of its own)",
        )

    def _length(self, length: float) -> list[str]:
        before = statistics.fmean(self._lengths) if self._lengths else length
        short = len(self._lengths) >= LENGTH_STEPS and length < before / 4
        if not short:  # a collapsed length must not lower the mean
            self._lengths.append(length)
        return self._once(
            "length",
            short,
            f"completions shrank to {length:.1f} tokens, from {before:.1f} before: the student ends too early; try a "
            "smaller learner.lr, or a stage on the data set before",
        )

    def _once(self, name: str, holds: bool, line: str) -> list[str]:
        new = holds and name not in self._open
        if holds:
            self._open.add(name)
        else:
            self._open.discard(name)
        return [line] if new else []
