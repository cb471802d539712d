"""Rollouts that cannot be written: remembered, counted, and left out of their batch.

In: tasks that broke a sound worker, or killed theirs, also alone. Out: a line each in quarantined.jsonl, how many a
step is short of, and a RuntimeError where there are more than the budget.

A step trains on the rollouts that it has. Its denominators count the tokens that are there, so what is missing changes
no other rollout's weight; a step without any leaves the weights as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchkd.config.errors import with_type
from switchkd.data.atomic_files import QUARANTINED, append_whole, redact
from switchkd.types import MAX_DEATHS, RolloutTask, TeacherLost, WorkerLost

SPLIT_AFTER = 2
"""Deaths under the same call after which its tasks are tried one by one."""


class Quarantine:
    """`num_tasks`: of the whole run; `max_frac` of them may be set aside."""

    def __init__(self, run_dir: Path, max_frac: float, num_tasks: int) -> None:
        self.path, self.max_frac, self.num_tasks = run_dir / QUARANTINED, max_frac, num_tasks
        self.ids: set[int] = set()
        self.num_passed = 0  # of them, those that earlier steps did without

    def load_state_dict(self, extra: dict[str, Any], keep: bool = False) -> None:
        """Take a checkpoint's values. `keep` adds the ids quarantined since: they would fail again."""
        self.ids = set(extra.get("quarantined", ())) | (self.ids if keep else set())
        self.num_passed = extra.get("num_passed", 0)

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON values for a checkpoint."""
        return {"quarantined": sorted(self.ids), "num_passed": self.num_passed}

    def add(self, task: RolloutTask, error: BaseException) -> None:
        """Raises RuntimeError beyond the budget, after writing the line."""
        reason = redact(with_type(error))
        row = {"rollout_id": task.rollout_id, "prompt_id": task.prompt.prompt_id, "step": task.batch,
               "stage": task.stage, "reason": reason}  # fmt: skip
        self.ids.add(task.rollout_id)
        append_whole(self.path, json.dumps(row, ensure_ascii=False) + "\n")
        if len(self.ids) > self.max_frac * self.num_tasks:
            raise RuntimeError(
                f"{len(self.ids)} of the run's {self.num_tasks} rollouts could not be written, more than "
                f"data.max_quarantined_frac={self.max_frac:g} of them; the last one's prompt is "
                f"{task.prompt.prompt_id} ({reason}), all are in {self.path}; mend the data or the rule, or raise "
                "data.max_quarantined_frac, and go on with --resume"
            )

    def num_missing(self, last_batch_of: Callable[[int], int], step: int) -> int:
        """How many rollouts a step has to do without: those of its own batch and, where a policy let earlier steps take
        others in their place, those that are still owed."""
        return sum(last_batch_of(i) <= step for i in self.ids) - self.num_passed


class IsolationRetries:
    """Which of a call's tasks broke it: each is tried alone, and all are heard before one is blamed."""

    def __init__(self) -> None:
        self._of: dict[int, _Trial] = {}

    def begin(self, tasks: Iterable[RolloutTask]) -> None:
        tasks = list(tasks)
        trial = _Trial(len(tasks))
        self._of.update({task.rollout_id: trial for task in tasks})

    def hear(self, tasks: list[RolloutTask], error: BaseException | None) -> list[tuple[RolloutTask, BaseException]]:
        """A call ended. Those that are to blame, once all tried beside it were heard. Raises the error where none of
        several could be written: then it is not theirs."""
        trial = self._of.pop(tasks[0].rollout_id, None) if len(tasks) == 1 else None
        if trial is None:
            return [(tasks[0], error)] if error is not None else []
        trial.left -= 1
        if error is not None:
            trial.broken.append((tasks[0], error))
        if trial.left:
            return []
        if len(trial.broken) == trial.size > 1:
            raise trial.broken[0][1]
        return trial.broken

    def clear(self) -> None:
        self._of.clear()


class _Trial:
    def __init__(self, size: int) -> None:
        self.size = self.left = size
        self.broken: list[tuple[RolloutTask, BaseException]] = []


class CrashAttribution:
    """Of which tasks did workers, or teachers, die? Parts die for many reasons; a prompt is one of them only where

    - it was alone in its call, and MAX_DEATHS parts of a kind died of it, one after the other;
    - workers: on two of them at least, if there are two; and some call ended well since the first of these deaths, or,
      where there was none besides, calls before it did and no other task's call died;
    - teachers, which workers share, so that a neighbour's call dies with them: no other task's call died, and calls
      that asked teachers ended well.

    So where everything dies, or it cannot be told who is to blame, nothing is; and what dies by chance, and is then
    written, is cleared.
    """

    def __init__(self) -> None:
        self._well = {WorkerLost: 0, TeacherLost: 0}  # calls that ended well; those of them that asked teachers
        self._of: dict[int, _Deaths] = {}
        self._blamed: set[int] = set()

    def written(self, tasks: Iterable[RolloutTask], asked: bool) -> None:
        """A call ended well. `asked`: teachers."""
        self._well[WorkerLost] += 1
        self._well[TeacherLost] += asked
        self.forget(self._blamed.union(task.rollout_id for task in tasks))
        self._blamed.clear()

    def forget(self, rollout_ids: Iterable[int]) -> None:
        """Nobody died of them."""
        for rollout_id in rollout_ids:
            self._of.pop(rollout_id, None)

    def hear(self, tasks: Iterable[RolloutTask], kind: type[Exception], worker: int) -> None:
        """A call died. `kind`: WorkerLost, or TeacherLost, which stands for MAX_DEATHS teachers."""
        for task in tasks:
            own = self._of.setdefault(task.rollout_id, _Deaths(dict(self._well)))
            own.num[kind] += 1 if kind is WorkerLost else MAX_DEATHS
            own.workers.add(worker)

    def split(self, tasks: Sequence[RolloutTask], kind: type[Exception]) -> bool:
        """Is each to be tried alone from now on?"""
        if len(tasks) == 1 or self._of[tasks[0].rollout_id].num[kind] < SPLIT_AFTER:
            return False
        for task in tasks:
            self._of[task.rollout_id].num.clear()
            self._of[task.rollout_id].workers.clear()
        return True

    def blame(self, tasks: Sequence[RolloutTask], kind: type[Exception], num_workers: int) -> bool:
        """Is the call's only task to be set aside?"""
        own = self._of[tasks[0].rollout_id]
        if len(tasks) > 1 or own.num[kind] < MAX_DEATHS:
            return False
        others = sum(bool(each.num) for each in self._of.values()) > 1
        found = self._well[kind] > 0 and not others
        if kind is WorkerLost:
            found = found or self._well[kind] > own.well_before[kind]
            found = found and len(own.workers) >= min(2, num_workers)
        if found:
            self._blamed.add(tasks[0].rollout_id)
        return found

    def clear(self) -> None:
        self._of.clear()
        self._blamed.clear()


@dataclass
class _Deaths:
    """Of one task: in company, then alone."""

    well_before: dict[type[Exception], int]
    num: Counter[type[Exception]] = field(default_factory=Counter)
    workers: set[int] = field(default_factory=set)
