"""Reports a training step: its row in metrics.jsonl, alerts, changes of the actor pools, skipped steps.

In: the step's entries and the learner's result. Out: rows and lines; a RuntimeError when the loss stays non-finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from switchkd.config.schema import ReplayConfig
from switchkd.controller.alerts import MetricAlerts
from switchkd.controller.dispatcher import TaskDispatcher
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.step_metrics import step_row
from switchkd.types import Entry, StepResult

MAX_SKIPPED = 3
"""Steps in a row without a finite loss that end a run."""


class StepReporter:
    """Writes rows and warnings; compares each step with those since the last `restart`."""

    def __init__(
        self,
        replay: ReplayConfig,
        dispatcher: TaskDispatcher,
        log: MetricsLog,
        run_dir: Path,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        # rollouts from the reuse buffer are old on purpose
        self.max_staleness = math.inf if replay.policy == "adaptive" else replay.max_staleness
        self.dispatcher = dispatcher
        self.schedule = dispatcher.schedule
        self.handles = dispatcher.handles
        self.watchdog = dispatcher.watchdog
        self.log = log
        self.run_dir = run_dir
        self.now = now
        self.last_end = now()
        self.restart([])

    def restart(self, evaluations: Iterable[Mapping[str, float]]) -> None:
        """Forget all steps; `evaluations` are the scores so far."""
        self.num_skipped = 0
        self.alerts = MetricAlerts(self.max_staleness)
        for scores in evaluations:
            self.alerts.evaluation(scores)

    def step(
        self, step: int, entries: Sequence[Entry], staleness: Sequence[int], result: StepResult, wait_s: float
    ) -> None:
        """Write the row of a step, for whose rollouts the learner waited `wait_s`."""
        now = self.now()
        step_s, self.last_end = now - self.last_end, now
        stage, num_quarantined = self.schedule.stage(step), len(self.dispatcher.quarantine.ids)
        row = {
            "stage": stage.name,
            **step_row(result, entries, self.dispatcher.take_reports(), staleness, step_s),
            **self._queue_metrics(),
            **self._adaptive_metrics(step),
            "time/wait_rollouts_s": wait_s,
            **({"rollout/num_quarantined": num_quarantined} if num_quarantined else {}),
        }
        self.log.step(step, row)
        self._warn(self.alerts.step(row, entries, stage.rule))
        for line in self.handles.autoscale(wait_s, step_s):
            self.log.info(line)
        self._count_skipped(step, entries, result)

    def evaluation(self, num_done: int, stage_end: str, scores: Mapping[str, float], sample: Mapping[str, str]) -> None:
        """Write the scores after `num_done` steps. The evaluation's time counts towards no step."""
        self.log.evaluation(num_done, stage_end, scores, sample)
        self._warn(self.alerts.evaluation(scores))
        self.last_end = self.now()

    def _queue_metrics(self) -> dict[str, float]:
        """Rollouts that wait for the learner, and rollouts in flight."""
        stats = self.watchdog.wait_for(self.handles.replay.stats(), "the replay")
        return {
            "replay/waiting": stats["num_waiting"],
            "replay/bytes": stats["bytes"],
            **({"replay/buffered": stats["num_buffered"]} if "num_buffered" in stats else {}),
            "rollout/in_flight": sum(map(len, self.dispatcher.in_flight)),
        }

    def _adaptive_metrics(self, step: int) -> dict[str, float]:
        """DistiLLM's phi, and whether this step trained on the reuse buffer."""
        if self.schedule.adaptive is None:
            return {}
        return {"replay/phi": self.schedule.adaptive.phi, "replay/reused": float(self.schedule.reuses(step))}

    def _count_skipped(self, step: int, entries: Sequence[Entry], result: StepResult) -> None:
        """Count a skipped step. After MAX_SKIPPED in a row save its batch and raise RuntimeError."""
        self.num_skipped = self.num_skipped + 1 if result.skipped else 0
        if not result.skipped:
            return
        what = "gradient" if math.isfinite(result.loss) else "loss"
        self._warn([f"step {step}: {what} is not finite; step skipped ({self.num_skipped} of {MAX_SKIPPED})"])
        if self.num_skipped < MAX_SKIPPED:
            return
        path = self.run_dir / f"bad-batch-{step}.safetensors"
        saving = self.handles.replay.save_batch(path, [entry.rollout_id for entry in entries])
        self.watchdog.wait_for(saving, "the replay to save a batch")
        raise RuntimeError(
            f"step {step}: {what} is not finite, as in the {MAX_SKIPPED - 1} steps before; its rollouts are in {path} "
            "(read them with switchkd.data.rollout_io.load_rollouts); fix the data or the loss and go on with "
            "--resume, or start anew with a smaller learner.lr"
        )

    def _warn(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.log.info(f"warning: {line}")
