"""Quarantines tasks that keep failing.

In: which calls finished and which failed. Out: the quarantined tasks, a line each in quarantined.jsonl; how many
rollouts a step lacks; and a RuntimeError beyond the budget.

A prompt may raise in its worker, kill its worker or kill its teacher. A single call cannot tell this from an outage or
a bug. Rollouts that finish in between can:

- A failure is a strike against every task of the call if the work raised, the worker died, or the teacher died while
  the call held this one task; and only if another rollout has finished since the task's last failure.
- After such a failure each task of the call is sent alone. A task that finishes loses its strikes.
- A teacher's death in a call of several tasks is no strike, but these tasks too are sent alone. Tasks of a call that
  could not reach something are sent again together.
- MAX_STRIKES strikes quarantine a task. MAX_FAILURES failures in a row, with nothing finished in between, end the run.

A step trains on the rollouts that it has. Denominators count the tokens present, so a missing rollout does not change
the weight of another; a step without rollouts leaves the weights unchanged.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from switchkd.config.errors import with_type
from switchkd.data.atomic_files import QUARANTINED, append_whole, redact
from switchkd.types import RolloutTask

MAX_STRIKES = 3
MAX_FAILURES = 5


class Strikes:
    """Counts failures by rollout id, and failures in a row."""

    def __init__(self) -> None:
        self.num_finished = 0  # rollouts
        self.num_failures = 0  # since a rollout finished
        self.round = 0  # grows with each failure that counts; a call belongs to the round in which it was sent
        self._strikes: Counter[int] = Counter()
        self._finished_before: dict[int, int] = {}  # rollout id -> `num_finished` at its last failure

    def finish(self, rollout_ids: Iterable[int]) -> None:
        for rollout_id in rollout_ids:
            self.num_finished += 1
            self._strikes.pop(rollout_id, None)
            self._finished_before.pop(rollout_id, None)
        self.num_failures = 0

    def fail(self, call_round: int, rollout_ids: Iterable[int], *, strike: bool) -> bool:
        """Record a failed call. Returns whether one of its rollouts has MAX_STRIKES. Calls of one round count as one
        failure in a row: a lost node may end them all at once."""
        if call_round == self.round:
            self.round += 1
            self.num_failures += 1
        for rollout_id in rollout_ids:
            if strike and self.num_finished > self._finished_before.get(rollout_id, 0):
                self._strikes[rollout_id] += 1
            self._finished_before[rollout_id] = self.num_finished
        return any(self._strikes[rollout_id] >= MAX_STRIKES for rollout_id in rollout_ids)


class Quarantine:
    """The quarantined rollouts: at most `max_frac` of the run's `num_tasks`."""

    def __init__(self, run_dir: Path, max_frac: float, num_tasks: int) -> None:
        self.path, self.max_frac, self.num_tasks = run_dir / QUARANTINED, max_frac, num_tasks
        self.ids: set[int] = set()
        self.num_passed = 0  # quarantined rollouts that earlier steps lacked

    def load_state_dict(self, extra: dict[str, Any]) -> None:
        """Load a checkpoint's values. Tasks that this process quarantined stay so: they would fail again."""
        self.ids.update(extra.get("quarantined", ()))
        self.num_passed = extra.get("num_passed", 0)

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON values for a checkpoint."""
        return {"quarantined": sorted(self.ids), "num_passed": self.num_passed}

    def add(self, task: RolloutTask, error: BaseException) -> None:
        """Quarantine a task and write its line. Raises RuntimeError beyond the budget, after writing."""
        reason = redact(with_type(error))
        row = {"rollout_id": task.rollout_id, "prompt_id": task.prompt.prompt_id, "step": task.batch}
        row |= {"stage": task.stage, "reason": reason}
        self.ids.add(task.rollout_id)
        append_whole(self.path, json.dumps(row, ensure_ascii=False) + "\n")
        if len(self.ids) > self.max_frac * self.num_tasks:
            raise RuntimeError(
                f"{len(self.ids)} of the run's {self.num_tasks} rollouts could not be written, more than "
                f"data.max_quarantined_frac={self.max_frac:g} of them; the last one's prompt is "
                f"{task.prompt.prompt_id} ({reason}), all are in {self.path}; fix the data or the rule, or raise "
                "data.max_quarantined_frac, and go on with --resume"
            )

    def num_missing(self, last_batch_of: Callable[[int], int], step: int) -> int:
        """Count the rollouts that a step lacks: those of its own batch and, where earlier steps took others in their
        place (`replay.policy: first_finished`), those of earlier batches."""
        return sum(last_batch_of(i) <= step for i in self.ids) - self.num_passed
