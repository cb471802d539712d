"""Who takes the next step, and how far: a decision about speed only, the tokens are the same under every choice.

In: what calls took, and where proposals broke. Out: a `Lead` for the coming round, the one with the most settled tokens
per second. Three ways to go on (a round of R rows):

    student   K student steps, then the teacher reads the block at once; breaks where the teacher owns a token and
              draws another one
    teacher   K teacher steps in one call, then the student reads the block at once; breaks where the student does
    lockstep  one step each: the floor
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from switchkd.algo.sampling import Purpose
from switchkd.rows import Row

Who = Literal["student", "teacher", "lockstep"]


class Lead(NamedTuple):
    who: Who
    size: int  # K


LOCKSTEP = Lead("lockstep", 1)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_TRIALS = 2
"""Each way is tried so often before any is trusted: the first call of a shape also pays for its setting up."""
_MEMORY = 0.98
"""Weight of what is known of a break rate against one more token."""
_PRIOR = {"student": 0.3, "teacher": 0.3}
_PRIOR_WEIGHT = 8.0  # tokens
_BUCKET = 8
"""Tokens of a completion that share a break rate: thresholds, and with them owners, change along the way."""


class Costs:
    """How long calls take, by kind and number of tokens: medians of the last few, straight lines between sizes."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, keep: int = 9) -> None:
        self._clock, self._keep = clock, keep
        self._seen: dict[str, dict[int, list[float]]] = {}

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

    def of(self, kind: str, tokens: float) -> float:
        """Expected seconds; NaN before anything of this kind was seen. Beyond the sizes seen a call is taken to have a
        fixed part: half the tokens cost at least 0.7 of it, twice as many at most twice."""
        seen = self._seen.get(kind)
        if not seen:
            return math.nan
        sizes = sorted(seen)
        times = [float(np.median(seen[size])) for size in sizes]
        if tokens <= sizes[0]:
            return times[0] * (tokens / sizes[0]) ** 0.5
        if tokens >= sizes[-1]:
            return times[-1] * tokens / sizes[-1]
        return float(np.interp(tokens, sizes, times))


@dataclass(slots=True)
class _Rate:
    """A break rate by place in the completion: sums of breaks and of chances, older ones fading."""

    prior: float
    breaks: dict[int, float]
    chances: dict[int, float]

    def saw(self, t: int, broke: bool) -> None:
        bucket = t // _BUCKET
        self.breaks[bucket] = self.breaks.get(bucket, 0.0) * _MEMORY + broke
        self.chances[bucket] = self.chances.get(bucket, 0.0) * _MEMORY + 1

    def at(self, t: int) -> float:
        bucket = t // _BUCKET
        if bucket not in self.chances and self.chances:  # not there yet: the last place before it
            bucket = max((b for b in self.chances if b < bucket), default=min(self.chances))
        breaks, chances = self.breaks.get(bucket, 0.0), self.chances.get(bucket, 0.0)
        return (breaks + self.prior * _PRIOR_WEIGHT) / (chances + _PRIOR_WEIGHT)


class Pace:
    """Chooses the lead of every round. `lead` "auto" measures; any other is kept, with blocks of `block_size`."""

    def __init__(self, lead: str, block_size: int, costs: Costs | None = None) -> None:
        self.lead, self.block_size = lead, block_size
        self.costs = costs or Costs()
        self.rounds: dict[Lead, int] = {}
        self._rates: dict[str, dict[str, _Rate]] = {}

    @property
    def watches(self) -> bool:
        """Whether break rates matter."""
        return self.lead == "auto"

    def choose(self, rows: Sequence[Row]) -> Lead:
        """For the coming round of rows that share a rule."""
        lead = self._choose(rows)
        self.rounds[lead] = self.rounds.get(lead, 0) + 1
        return lead

    def note(self, rule: str, by_teacher: bool, t: np.ndarray, owned: np.ndarray, differ: np.ndarray) -> None:
        """Settled positions (see walk.Note): each tells whether a student's or a teacher's proposal breaks there."""
        rates = self._of(rule)
        for place, own, other in zip(t.tolist(), owned.tolist(), differ.tolist(), strict=True):
            if other >= 0 or not own:
                rates["student"].saw(place, bool(own and other == 1))
            if other >= 0 or own:
                rates["teacher"].saw(place, bool(not own and other == 1))

    def _of(self, rule: str) -> dict[str, _Rate]:
        return self._rates.setdefault(rule, {who: _Rate(_PRIOR[who], {}, {}) for who in ("student", "teacher")})

    def _choose(self, rows: Sequence[Row]) -> Lead:
        if self.lead == "lockstep" or (self.lead == "auto" and self.block_size == 1):
            return LOCKSTEP
        if self.lead in ("student", "teacher"):
            return Lead(self.lead, self.block_size)  # type: ignore[arg-type]
        ways = self._ways(rows)
        for way in (Lead("student", min(4, self.block_size)), Lead("teacher", min(4, self.block_size)), LOCKSTEP):
            if way in ways and self.rounds.get(way, 0) < _TRIALS:
                return way
        return max(ways, key=lambda way: self.worth(rows, way))

    def _ways(self, rows: Sequence[Row]) -> list[Lead]:
        rule = rows[0].mode.rule
        most = min(self.block_size, max(row.mode.max_new_tokens - row.t for row in rows))
        sizes = [size for size in SIZES if size <= most]
        ways = [LOCKSTEP, *(Lead("student", size) for size in sizes)]
        # a teacher's block breaks under SKD wherever the two draws differ, or the replacement's noise does
        if not rule.needs_draft and rule.replacement == Purpose.GUMBEL:
            ways += [Lead("teacher", size) for size in sizes]
        return ways

    def worth(self, rows: Sequence[Row], way: Lead) -> float:
        """Expected settled tokens per second of a round."""
        num = len(rows)
        if way.who == "lockstep":
            return num / sum(self.costs.of(kind, num) for kind in ("student", "read", "walk student"))
        rate = self._of(rows[0].mode.rule.name)[way.who]
        kept = drafted = 0.0
        widths = np.zeros(way.size)
        for row in rows:
            size = min(way.size, row.mode.max_new_tokens - row.t)
            widths[:size] += 1
            drafted += size
            alive = 1.0
            for k in range(size):
                kept += alive
                alive *= 1 - rate.at(row.t + k)
        step, block = ("student", "read") if way.who == "student" else ("write", "check")
        steps = sum(self.costs.of(step, float(width)) for width in widths if width)
        # after a break the teacher also reads the token that replaced the drafted one
        read = drafted + (num * 0.5 if way.who == "student" else 0)
        return kept / (steps + self.costs.of(block, read) + self.costs.of(f"walk {way.who}", drafted))
