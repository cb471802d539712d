"""Chooses who drafts the next block, and how far: a decision about speed only; no choice changes a token.

In: what calls took, and where drafts were rejected. Out: a `DraftPlan` for the coming round, the one with the most
emitted tokens per second. Three kinds of plan (a round of R rows):

    student   K student steps, then the teacher reads the block at once; the block ends where the teacher writes a token
              and draws another one
    teacher   K teacher steps in one call, then the student reads the block at once; it ends where the student does
    none      one step of each model: the baseline
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean, linear_regression, median
from typing import Literal, NamedTuple

import numpy as np

from switchkd.algo.noise import Purpose
from switchkd.algo.switching import Rule

DraftedBy = Literal["student", "teacher", "none"]


class DraftPlan(NamedTuple):
    drafter: DraftedBy
    num_tokens: int  # K


NO_DRAFT = DraftPlan("none", 1)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_TRIALS = 2
"""Each way is tried so often before any is trusted: the first call of a shape also pays for its setting up."""
_MEMORY = 0.99
"""Weight of what is known of a rejection rate against one more token."""
_PRIOR = 0.3
_PRIOR_WEIGHT = 8.0  # tokens; it fades as they do, or it would count for a few percent for ever
_SURE = 1.05
"""A gain over no draft below this may be the clock's error: then nothing is drafted."""
_NEAR, _AGAIN = 1.25, 16
"""Where no draft is nearly as good, it is taken every so many rounds: what it costs would else be known from its first
calls only."""
_BUCKET = 8
"""Tokens of a completion that share a rejection rate: thresholds, and with them writers, change along the way."""


class LatencyModel:
    """How long calls take, by kind and number of tokens: medians of the last few, interpolated linearly."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, keep: int = 9) -> None:
        self._clock, self._keep = clock, keep
        self._seen: dict[str, dict[int, list[float]]] = {}
        self._lines: dict[str, tuple[list[int], list[float]]] = {}  # sizes ascending, and their medians

    @contextmanager
    def timed(self, kind: str, tokens: int) -> Iterator[None]:
        start = self._clock()
        yield
        self.add(kind, tokens, self._clock() - start)

    def add(self, kind: str, tokens: int, seconds: float) -> None:
        """One call of `kind` on `tokens` tokens."""
        recent = self._seen.setdefault(kind, {}).setdefault(tokens, [])
        recent.append(seconds)
        del recent[: -self._keep]
        known_sizes, known_medians = self._lines.get(kind, ([], []))
        sizes, medians = list(known_sizes), list(known_medians)
        place = bisect_left(sizes, tokens)
        if place == len(sizes) or sizes[place] != tokens:
            sizes.insert(place, tokens)
            medians.insert(place, 0.0)
        medians[place] = median(recent)
        self._lines[kind] = (sizes, medians)  # at once: another thread may read them

    def of(self, kind: str, tokens: float) -> float:
        """Expected seconds; NaN before anything of this kind was seen. Below the sizes seen half the tokens
        take 0.7 of the time (a call has a fixed part), above them the line continues."""
        if kind not in self._lines:
            return math.nan
        sizes, times = self._lines[kind]
        place = bisect_left(sizes, tokens)
        if place == len(sizes):
            return _beyond(sizes, times, tokens)
        if place == 0:
            return times[0] * math.sqrt(tokens / sizes[0])
        low, high = sizes[place - 1], sizes[place]
        return times[place - 1] + (times[place] - times[place - 1]) * (tokens - low) / (high - low)


def _beyond(sizes: list[int], times: list[float], tokens: float) -> float:
    """The line through the larger sizes continues, by least squares: between two neighbours the clock's error would be
    all of the slope, and a way that looks dear is never tried."""
    if len(sizes) == 1:
        return times[0] * (1 + (tokens / sizes[0] - 1) / 2)
    first = min(bisect_left(sizes, sizes[-1] / 4), len(sizes) - 2)
    slope, level = linear_regression(sizes[first:], times[first:])
    return level + slope * tokens if slope > 0 else fmean(times[first:])


class _Rates:
    """Rejection rates of one drafter, by place in the completion: sums of rejections and chances, older ones fading.
    Before a place has a rate of its own it has that of all."""

    def __init__(self) -> None:
        self._breaks, self._chances, self._prior = np.zeros(1), np.zeros(1), np.full(1, _PRIOR_WEIGHT)

    def observe(self, t: np.ndarray, broke: np.ndarray) -> None:
        """Record chances at places t [N], and whether the block ended there; those of one call have no order."""
        bucket = t // _BUCKET
        if (more := int(bucket.max(initial=0)) + 1 - len(self._breaks)) > 0:
            self._breaks, self._chances = (np.pad(x, (0, more)) for x in (self._breaks, self._chances))
            self._prior = np.pad(self._prior, (0, more), constant_values=_PRIOR_WEIGHT)
        num = np.bincount(bucket, minlength=len(self._breaks))
        left = _MEMORY**num
        weight = (1 - left) / (1 - _MEMORY)  # of `num` new chances
        self._breaks = self._breaks * left + np.bincount(bucket, broke, len(num)) * weight / np.maximum(num, 1)
        self._chances = self._chances * left + weight
        self._prior = self._prior * left

    def at(self, t: np.ndarray) -> np.ndarray:
        """The rate at places t; where nothing was seen yet that of the last place before it which was."""
        left = self._prior.min()
        overall = (self._breaks.sum() + _PRIOR * left) / (self._chances.sum() + left)
        last_known = np.maximum.accumulate(np.where(self._chances > 0, np.arange(len(self._chances)), 0))
        bucket = last_known[np.minimum(t // _BUCKET, len(last_known) - 1)]
        return (self._breaks[bucket] + overall * self._prior[bucket]) / (self._chances[bucket] + self._prior[bucket])


class SpeculationPolicy:
    """Chooses the plan of every round: measured with `drafter` "auto", else fixed with blocks of `max_draft_tokens`."""

    def __init__(self, drafter: str, max_draft_tokens: int, costs: LatencyModel | None = None) -> None:
        self.drafter, self.max_draft_tokens = drafter, max_draft_tokens
        self.costs = costs or LatencyModel()
        self.rounds: dict[DraftPlan, int] = {}  # how often each way was taken ...
        self.trials: dict[DraftPlan, int] = {}  # ... and how often its costs were measured
        self._unseen = 0  # rounds since no draft was taken
        self._rates: dict[str, dict[str, _Rates]] = {}

    def choose(self, rule: Rule, t: np.ndarray, limits: np.ndarray) -> DraftPlan:
        """For the coming round of R completions that share a rule: their next tokens t [R], and how many tokens each
        can still have, limits [R]."""
        plan = self._choose(rule, t, limits)
        self.rounds[plan] = self.rounds.get(plan, 0) + 1
        self._unseen = 0 if plan == NO_DRAFT else self._unseen + 1
        return plan

    def observe_call(self, plan: DraftPlan, kind: str, tokens: int, seconds: float) -> None:
        """Record the seconds of a teacher call: "read" as a whole, "write" by step."""
        self.costs.add(kind, tokens, seconds)
        self.trials[plan] = self.trials.get(plan, 0) + 1

    def record_outcome(self, rule: str, by_teacher: bool, t: np.ndarray, owned: np.ndarray, differ: np.ndarray) -> None:
        """Verified positions (see `verify.RecordOutcome`): whether a student's or a teacher's block ends there."""
        rates = self._of(rule)
        for model, owns in (("student", ~owned), ("teacher", owned)):
            known = (differ >= 0) | owns
            rates[model].observe(t[known], ~owns[known] & (differ[known] == 1))

    def _of(self, rule: str) -> dict[str, _Rates]:
        return self._rates.setdefault(rule, {"student": _Rates(), "teacher": _Rates()})

    def _choose(self, rule: Rule, t: np.ndarray, limits: np.ndarray) -> DraftPlan:
        if self.drafter == "none" or (self.drafter == "auto" and self.max_draft_tokens == 1):
            return NO_DRAFT
        if self.drafter in ("student", "teacher"):
            return DraftPlan(self.drafter, self.max_draft_tokens)  # type: ignore[arg-type]
        ways = self._ways(rule, limits)
        for way in (
            DraftPlan("student", min(4, self.max_draft_tokens)),
            DraftPlan("teacher", min(4, self.max_draft_tokens)),
            NO_DRAFT,
        ):
            if way in ways and self.trials.get(way, 0) < _TRIALS:
                return way
        expected_throughput = self.expected_throughput(rule, t, limits, max(way.num_tokens for way in ways))
        best = max(ways, key=lambda way: expected_throughput[way])
        gain = expected_throughput[best] / expected_throughput[NO_DRAFT]
        return NO_DRAFT if gain < _SURE or (gain < _NEAR and self._unseen >= _AGAIN) else best

    def _ways(self, rule: Rule, limits: np.ndarray) -> list[DraftPlan]:
        most = min(self.max_draft_tokens, int(limits.max()))
        sizes = [size for size in SIZES if size <= most]
        ways = [NO_DRAFT, *(DraftPlan("student", size) for size in sizes)]
        # a teacher's block ends under SKD wherever the two draws differ, or the replacement's noise does
        if not rule.needs_draft and rule.replacement == Purpose.GUMBEL:
            ways += [DraftPlan("teacher", size) for size in sizes]
        return ways

    def expected_throughput(self, rule: Rule, t: np.ndarray, limits: np.ndarray, most: int) -> dict[DraftPlan, float]:
        """Expected emitted tokens per second of a round, for every way to take it with blocks up to `most`."""
        num, cost = len(t), self.costs.of
        ahead = np.arange(most)
        live = ahead < limits[:, None]
        widths = live.sum(0)
        throughput = {NO_DRAFT: num / sum(cost(kind, num) for kind in ("student", "read", "verify student"))}
        for who, step, block in (("student", "student", "read"), ("teacher", "write", "check")):
            stays = 1 - self._of(rule.name)[who].at(t[:, None] + ahead)
            reached = np.cumprod(np.concatenate([np.ones((num, 1)), stays[:, :-1]], axis=1), axis=1) * live
            kept, drafted = reached.sum(0).cumsum(), widths.cumsum()
            steps = np.cumsum([cost(step, float(width)) for width in widths])
            for size in (size for size in SIZES if size <= most):
                # after a rejection the teacher also reads the token that replaced the drafted one
                read = drafted[size - 1] + (num * 0.5 if who == "student" else 0)
                seconds = steps[size - 1] + cost(block, read) + cost(f"verify {who}", drafted[size - 1])
                throughput[DraftPlan(who, size)] = kept[size - 1] / seconds  # type: ignore[arg-type]
        return throughput
