"""The loop. START HERE.

    tasks ─► workers write rollouts ─► replay ─► plan a batch ─► learner steps ─► new weights ─► workers
      ▲ admission: no task whose batch lies more than `max_staleness` versions ahead                 │
      └──────────────────────────────────────────────────────────────────────────────────────────────┘

In: a checked config and a House of handles. Out: a run folder with metrics, rollouts, checkpoints and the student.
The loop waits for whatever ends first: a worker's call or the learner's step. It touches no tensor.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from types import FrameType
from typing import Any

from switchkd.batching import plan_batch
from switchkd.checkpoint import Checkpoint, RunFolder, TrainState
from switchkd.examination import Examiner
from switchkd.house import House, WorkerLost
from switchkd.metrics import MetricsLog
from switchkd.replay import Entry
from switchkd.schedule import RunPlan
from switchkd.sections import Config
from switchkd.types import Origin, StepResult, Task, WorkReport

PREFETCH = 2
"""Steps that completions which do not need the student (data set, teacher) may run ahead."""
MAX_TRIES = 3
"""Times that a task is given out again after its worker died."""


class Trainer:
    """One run. All state that outlives a crash is in `state`; the rest is rebuilt from it."""

    def __init__(
        self, config: Config, plan: RunPlan, house: House, folder: RunFolder, log: MetricsLog, examiner: Examiner
    ) -> None:
        self.config, self.plan, self.house, self.folder = config, plan, house, folder
        self.log, self.examiner = log, examiner
        self.state = TrainState()
        self.next_id = 0
        self.missing: deque[int] = deque()  # started before a resume, never finished
        self.again: deque[list[Task]] = deque()  # tasks of dead workers
        self.tries: dict[int, int] = {}
        self.working: dict[int, tuple[Future[WorkReport], list[Task]]] = {}
        self.weights: Any = None  # what publish answered for state.version
        self.worker_version = [0] * len(house.workers)
        self.reports: list[WorkReport] = []
        self.stop_signal = 0
        self.saved_step = -1
        self.started = time.monotonic()
        self.last_step_end = self.started

    # ── start and end ──────────────────────────────────────────────────────────────────────────────────────────────

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint: weights and optimizer, waiting rollouts, counters."""
        state = checkpoint.state
        self.house.learner.load(checkpoint.learner_folder, checkpoint.tag).result()
        self.next_id = state.extra["num_started"]
        self.missing.extend(self.house.replay.restore(checkpoint.replay_file, self.next_id).result())
        self.state = replace(state, incarnation=state.incarnation + 1)
        self.saved_step = state.step
        self.started -= state.elapsed_s

    def run(self) -> TrainState:
        """Train to the last step (or to early stop, or to SIGTERM: then the state is saved first)."""
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            if self.state.step == 0:
                self._examine("start")
            while self.state.step < self.plan.num_steps and not self.stop_signal and not self.state.stopped_early:
                self._one_step()
            self._drain()
            self._checkpoint()
            if not self.stop_signal:
                self._export_last()
        finally:
            signal.signal(signal.SIGTERM, previous)
        return self.state

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number

    # ── one step ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _one_step(self) -> None:
        """Gather one step's rollouts, train on them, hand out the new weights, look and save where it is time."""
        waited = time.monotonic()
        entries = self._gather()
        if entries is None:
            return
        waited = time.monotonic() - waited
        staleness = self._staleness(entries)
        result = self._learn(entries)
        self.house.replay.commit(self.state.step, [entry.rollout_id for entry in entries]).result()
        step = self.state.step
        self.state = replace(
            self.state, step=step + 1, version=result.version, elapsed_s=time.monotonic() - self.started
        )
        self.weights = None
        self._log_step(step, entries, staleness, result, waited)
        last_of_stage = self.state.step in self.plan.stage_ends
        every = self.config.eval.every
        if last_of_stage or (every and self.state.step % every == 0):
            self._examine(self.plan.stage(step).name if last_of_stage else "")
        if not self.config.checkpoint.every:
            self.house.replay.durable(self.state.step).result()  # nobody will go back: let the rollouts rest
        elif self.state.step % self.config.checkpoint.every == 0:
            self._checkpoint()

    def _gather(self) -> list[Entry] | None:
        """Keep the workers busy until this step's rollouts are all in the replay; None when told to stop."""
        step = self.state.step
        stage = self.plan.stage_index(step)
        num = self.plan.batch_size(step)
        while not self.stop_signal:
            self._feed()
            entries = self.house.replay.take(step, num, self.state.version, stage).result()
            if entries is not None:
                self._check_staleness(entries)
                return entries
            if not self.working:
                raise RuntimeError(
                    f"step {step} lacks rollouts, but no worker has a task; this is a bug, please report"
                )
            self._wait([])
        return None

    def _learn(self, entries: list[Entry]) -> StepResult:
        """One optimizer step; workers go on meanwhile as far as admission lets them."""
        step = self.state.step
        loss = self.plan.stage(step).loss
        hard_frac = loss.params.get("hard_frac", 0.5) if loss.type == "atkd" else None
        batch = plan_batch(step, self.plan.stage_index(step), entries, self.config.learner.num_ranks, hard_frac)
        learning = self.house.learner.step(batch, self.plan.lr_at(step))
        while not learning.done():
            self._feed()
            self._wait([learning])
        return learning.result()

    def _staleness(self, entries: list[Entry]) -> list[int]:
        """Ages, in versions, of the rollouts that the student wrote at: data-set and teacher text does not age."""
        written = [entry for entry in entries if self.plan.origin(entry.rollout_id) == Origin.ROLLOUT]
        return [self.state.version - entry.oldest_version for entry in written]

    def _check_staleness(self, entries: list[Entry]) -> None:
        """Admission bounds it; a violation is our error, and a wrong number in a paper would be worse than a stop."""
        worst, limit = max(self._staleness(entries), default=0), self.config.train.max_staleness
        if self.config.replay.policy == "fifo" and worst > limit:
            raise RuntimeError(f"staleness {worst} above train.max_staleness={limit}; please report this")

    # ── workers ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _feed(self) -> None:
        """Give every idle worker the next tasks that may start now."""
        for index in range(len(self.house.workers)):
            if index in self.working:
                continue
            tasks = self.again.popleft() if self.again else self._next_tasks()
            if not tasks:
                return
            if any(task.origin == Origin.ROLLOUT for task in tasks):
                self._give_weights(index)
            self.working[index] = (self.house.workers[index].generate(tasks), tasks)

    def _next_tasks(self) -> list[Task]:
        """What one worker may start now: at most its share of a batch."""
        tasks: list[Task] = []
        while (rollout_id := self._next_admitted()) is not None:
            share = -(-self.plan.batch_size(self.plan.step_of(rollout_id)) // len(self.house.workers))
            if len(tasks) >= share:
                break
            tasks.append(self.plan.task(rollout_id))
            if self.missing:
                self.missing.popleft()
            else:
                self.next_id += 1
        return tasks

    def _next_admitted(self) -> int | None:
        """Admission bounds staleness: a rollout for step s may start once s - version <= max_staleness."""
        rollout_id = self.missing[0] if self.missing else self.next_id
        if rollout_id >= self.plan.num_tasks or self.stop_signal:
            return None
        limit = self.config.train.max_staleness
        if self.plan.origin(rollout_id) != Origin.ROLLOUT:
            limit = max(limit, PREFETCH)
        return rollout_id if self.plan.step_of(rollout_id) - self.state.step <= limit else None

    def _give_weights(self, index: int) -> None:
        if self.worker_version[index] == self.state.version:
            return
        if self.weights is None:
            self.weights = self.house.learner.publish(self.state.version).result()
        self.house.workers[index].load_weights(self.weights)
        self.worker_version[index] = self.state.version

    def _wait(self, others: list[Future[Any]]) -> None:
        """Until something ends, at most a second (so that a signal is seen); finished work is taken in."""
        wait([*others, *(future for future, _ in self.working.values())], timeout=1.0, return_when=FIRST_COMPLETED)
        for index, (future, tasks) in list(self.working.items()):
            if not future.done():
                continue
            del self.working[index]
            try:
                self.reports.append(future.result())
            except WorkerLost:
                self._give_again(index, tasks)

    def _give_again(self, index: int, tasks: list[Task]) -> None:
        """A worker died: its tasks go out again (puts are idempotent), and its successor needs the weights."""
        tries = self.tries[tasks[0].rollout_id] = self.tries.get(tasks[0].rollout_id, 0) + 1
        if tries >= MAX_TRIES:
            raise RuntimeError(f"rollouts {tasks[0].rollout_id}.. lost their worker {tries} times; see its log")
        self.log.note(f"rollout worker {index} died; its {len(tasks)} rollouts are written again")
        self.worker_version[index] = 0  # the successor starts from the student's folder
        self.again.append(tasks)

    def _drain(self) -> None:
        while self.working:
            self._wait([])

    # ── look and save ──────────────────────────────────────────────────────────────────────────────────────────────

    def _log_step(
        self, step: int, entries: list[Entry], staleness: list[int], result: StepResult, waited: float
    ) -> None:
        now = time.monotonic()
        reports, self.reports = self.reports, []
        tokens = sum(report.num_tokens for report in reports)
        row = {
            "stage": self.plan.stage(step).name,
            "weight_version": result.version,
            "lr": result.lr,
            **result.metrics,
            "rollout/teacher_frac": _mean([entry.teacher_frac for entry in entries]),
            "rollout/length": _mean([entry.num_tokens for entry in entries]),
            "rollout/stopped_frac": _mean([entry.finish_reason == "stop" for entry in entries]),
            "rollout/tokens": tokens,
            "rollout/tokens_per_s": tokens / max(sum(report.time_s for report in reports), 1e-9),
            "rollout/near_ties": sum(report.num_near_ties for report in reports),
            "teacher/calls": sum(report.num_teacher_calls for report in reports),
            "teacher/signal_bytes": sum(report.signal_bytes for report in reports),
            "replay/staleness_mean": _mean(staleness),
            "replay/staleness_max": max(staleness, default=0),
            "time/step_s": now - self.last_step_end,
            "time/learn_s": result.time_s,
            "time/wait_rollouts_s": waited,
        }
        self.last_step_end = now
        self.log.step(step, row)

    def _examine(self, stage_end: str) -> None:
        """Evaluate the published weights. A barrier: what runs is finished first, so that numbers repeat."""
        if not self.examiner.prompts:
            return
        self._drain()
        for index in range(len(self.house.workers)):
            self._give_weights(index)
        scores = self.examiner.examine(self.house.workers)
        self.log.evaluation(self.state.step, stage_end, scores)
        self.last_step_end = time.monotonic()
        self._select(scores)
        if stage_end:
            self.state = replace(self.state, stage_scores=(*self.state.stage_scores, (stage_end, scores)))

    def _select(self, scores: dict[str, float]) -> None:
        """Keep the best student so far, by `train.select_by`, and stop early when it no longer improves."""
        by = self.config.train.select_by
        if not by or self.state.step == 0:
            return
        score = scores[f"eval/{by}"] * (-1 if by == "kl" else 1)
        if self.state.best is None or score > self.state.best:
            self.house.learner.export(self.folder.path / "student").result()
            self.state = replace(self.state, best=score, best_step=self.state.step, evals_since_best=0)
            return
        since = self.state.evals_since_best + 1
        stop = self.config.train.early_stop is not None and since >= self.config.train.early_stop
        self.state = replace(self.state, evals_since_best=since, stopped_early=stop)

    def _checkpoint(self) -> None:
        """Learner, replay and counters as of now, whole or not at all."""
        if self.saved_step == self.state.step:
            return
        extra = {"num_started": self.next_id}
        self.state = replace(self.state, elapsed_s=time.monotonic() - self.started, extra=extra)
        draft = self.folder.begin(self.state.step)
        self.house.learner.save(draft.learner_folder, draft.tag).result()
        self.house.learner.export(draft.student_folder).result()
        self.house.replay.save(draft.replay_file, self.state.step).result()
        self.folder.finish(draft, self.state)
        self.house.replay.durable(self.state.step).result()
        self.saved_step = self.state.step

    def _export_last(self) -> None:
        best = self.config.train.select_by and self.state.best is not None
        self.house.learner.export(self.folder.path / ("student-last" if best else "student")).result()


def _mean(values: list[Any]) -> float:
    return float(sum(values)) / len(values) if values else 0.0
