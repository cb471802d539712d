"""What all rollouts of a run say together: the teacher's share and the rule's numbers by position, and block lengths.

In: rows of rollouts.jsonl, one after the other. Out: plain lists for charts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_POINTS = 160
"""Of a curve over positions: longer completions are taken together in bins."""


@dataclass(slots=True)
class ByPosition:
    """Sums over completions, by token position."""

    tokens: list[int] = field(default_factory=list)
    by_teacher: list[int] = field(default_factory=list)
    looked: list[int] = field(default_factory=list)  # where the rule measured
    statistic: list[float] = field(default_factory=list)
    threshold: list[float] = field(default_factory=list)

    def grow(self, num: int) -> None:
        more = num - len(self.tokens)
        if more > 0:
            self.tokens += [0] * more
            self.by_teacher += [0] * more
            self.looked += [0] * more
            self.statistic += [0.0] * more
            self.threshold += [0.0] * more


@dataclass(slots=True)
class RolloutStatistics:
    stages: dict[int, ByPosition] = field(default_factory=dict)
    blocks: Counter[int] = field(default_factory=Counter)

    def add(self, row: dict[str, Any]) -> bool:
        """Count one rollout; False where the row is none."""
        try:  # a line of a file that anybody may have written
            num = len(row["token_ids"])
            if not isinstance(row["prompt"], str) or not isinstance(row["step"], int) or row["num_tokens"] != num:
                return False
            if sum(part["num_tokens"] for part in row["segments"]) != num:
                return False
            sources = [part["source"] for part in row["segments"] for _ in range(part["num_tokens"])]
            if row["origin"] == "rollout":
                self._count(int(row["stage"]), sources, row["statistic"], row["threshold"])
            self.blocks.update(int(length) for length in row["stats"].get("block_lengths", ()))
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        return True

    def _count(self, stage: int, sources: Sequence[str], statistic: Sequence[Any], threshold: Sequence[Any]) -> None:
        sums = self.stages.setdefault(stage, ByPosition())
        sums.grow(len(sources))
        for t, source in enumerate(sources):
            sums.tokens[t] += 1
            sums.by_teacher[t] += source == "teacher"
        for t, (measured, limit) in enumerate(zip(statistic, threshold, strict=False)):
            if t < len(sources) and _finite(measured) and _finite(limit):
                sums.looked[t] += 1
                sums.statistic[t] += measured
                sums.threshold[t] += limit

    def share_by_position(self) -> dict[int, list[list[float]]]:
        """By stage: [position, the teacher's share there]."""
        return {stage: _ratio(sums.by_teacher, sums.tokens) for stage, sums in sorted(self.stages.items())}

    def student_share(self) -> dict[int, float]:
        """By stage: the share of all tokens of its rollouts that the student wrote."""
        return {
            stage: 1 - sum(sums.by_teacher) / sum(sums.tokens) for stage, sums in self.stages.items() if sums.tokens
        }

    def rule_by_position(self) -> dict[int, dict[str, list[list[float]]]]:
        """By stage: [position, mean] of the statistic and of its threshold, where the rule looked."""
        return {
            stage: {"statistic": _ratio(sums.statistic, sums.looked), "threshold": _ratio(sums.threshold, sums.looked)}
            for stage, sums in sorted(self.stages.items())
            if any(sums.looked)
        }

    def block_lengths(self) -> list[list[float]]:
        """[length, share of all blocks]."""
        total = sum(self.blocks.values())
        return [[length, count / total] for length, count in sorted(self.blocks.items())]


def _ratio(top: Sequence[float], bottom: Sequence[int]) -> list[list[float]]:
    width = max(1, math.ceil(len(bottom) / MAX_POINTS))
    points = []
    for start in range(0, len(bottom), width):
        num = sum(bottom[start : start + width])
        if num:
            points.append([start + (width - 1) / 2, sum(top[start : start + width]) / num])
    return points


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
