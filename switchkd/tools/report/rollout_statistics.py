"""Sums over all rollouts of a run: the teacher's share and the rule's numbers by position, and block lengths.

In: rows of rollouts.jsonl. Out: plain lists for charts. T: tokens of a completion.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from switchkd.controller.metrics import is_number

MAX_POINTS = 160
"""Most points of a curve over positions: longer completions are averaged in bins."""
TOKENS, BY_TEACHER, MEASURED, STATISTIC, THRESHOLD = range(5)
"""Rows of a stage's sums; `MEASURED` counts the positions at which the rule has numbers."""


@dataclass(slots=True)
class RolloutStatistics:
    stages: dict[int, np.ndarray] = field(default_factory=dict)  # sums over completions [5, T], by stage
    blocks: Counter[int] = field(default_factory=Counter)

    def add(self, row: dict[str, Any]) -> bool:
        """Count one rollout; False where the row is not a rollout."""
        try:  # the file may have been edited
            num = len(row["token_ids"])
            if not isinstance(row["prompt"], str) or not isinstance(row["step"], int) or row["num_tokens"] != num:
                return False
            if sum(part["num_tokens"] for part in row["segments"]) != num:
                return False
            blocks = [int(length) for length in row["stats"].get("block_lengths", ())]
            if row["origin"] == "rollout":
                self._add(int(row["stage"]), _by_position(row, num))
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        self.blocks.update(blocks)
        return True

    def _add(self, stage: int, columns: np.ndarray) -> None:
        before = self.stages.get(stage, np.zeros((5, 0)))
        sums = np.zeros((5, max(before.shape[1], columns.shape[1])))
        for part in (before, columns):
            sums[:, : part.shape[1]] += part
        self.stages[stage] = sums

    def share_by_position(self) -> dict[int, list[list[float]]]:
        """Return [position, teacher's share] points by stage."""
        return {stage: _ratio(sums[BY_TEACHER], sums[TOKENS]) for stage, sums in sorted(self.stages.items())}

    def rule_by_position(self) -> dict[int, dict[str, list[list[float]]]]:
        """Return [position, mean] points of the statistic and of its threshold, by stage."""
        rows = {"statistic": STATISTIC, "threshold": THRESHOLD}
        return {
            stage: {name: _ratio(sums[row], sums[MEASURED]) for name, row in rows.items()}
            for stage, sums in sorted(self.stages.items())
            if sums[MEASURED].any()
        }

    def block_lengths(self) -> list[list[float]]:
        """Return [length, share of all blocks] points."""
        return [[length, count / self.blocks.total()] for length, count in sorted(self.blocks.items())]


def _by_position(row: dict[str, Any], num: int) -> np.ndarray:
    """Return one completion's addends [5, T]."""
    sources = [part["source"] for part in row["segments"] for _ in range(part["num_tokens"])]
    numbers = np.full((2, num), np.nan)
    for column, key in zip(numbers, ("statistic", "threshold"), strict=True):
        values = [value if is_number(value) else math.nan for value in row[key]]
        column[: len(values)] = values
    measured = np.isfinite(numbers).all(axis=0)
    by_teacher = np.array([source == "teacher" for source in sources], dtype=float)
    return np.stack([np.ones(num), by_teacher, measured, *np.where(measured, numbers, 0.0)])


def _ratio(top: np.ndarray, bottom: np.ndarray) -> list[list[float]]:
    width = max(1, math.ceil(len(bottom) / MAX_POINTS))
    starts = np.arange(0, len(bottom), width)
    bins = zip(starts, np.add.reduceat(top, starts), np.add.reduceat(bottom, starts), strict=True)
    return [[float(start) + (width - 1) / 2, float(above / below)] for start, above, below in bins if below]
