"""The loop. START HERE.

    tasks ─► workers write rollouts ─► replay ─► plan a batch ─► learner steps ─► new weights ─► workers
      ▲ admission: no task whose batch lies more than `max_staleness` versions ahead                 │
      └──────────────────────────────────────────────────────────────────────────────────────────────┘

In: a checked config and a House of handles. Out: a run folder with metrics, rollouts, checkpoints and the student.
The loop waits for whatever ends first: a worker's call or the learner's step. It touches no tensor.
"""

from __future__ import annotations

import math
import shutil
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
from switchkd.files import replace_dir
from switchkd.house import House, Weights, WorkerLost
from switchkd.metrics import MetricsLog
from switchkd.replay import Entry
from switchkd.schedule import RunPlan
from switchkd.sections import Config
from switchkd.step_row import step_row
from switchkd.types import Origin, StepResult, Task, WorkReport
from switchkd.watch import Watch

PREFETCH = 2
"""Steps that completions which do not need the student (data set, teacher) may run ahead."""
MAX_TRIES = 3
"""Times that a task is given out again after its worker died."""
MAX_SKIPPED = 3
"""Steps in a row without a finite loss that end a run."""


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
        self.working: dict[int, tuple[Future[Any], list[Task]]] = {}  # a lost worker has no tasks
        self.weights: Weights | None = None  # of state.version, once somebody needed them
        self.reports: list[WorkReport] = []
        self.watch = Watch(config.replay.max_staleness)
        self.num_skipped = 0  # steps in a row
        self.stop_signal = 0
        self.saved_step = -1
        self.started = time.monotonic()
        self.last_step_end = self.started

    # ── start and end ──────────────────────────────────────────────────────────────────────────────────────────────

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint: weights and optimizer, waiting rollouts, counters."""
        state = checkpoint.state
        enough = self.config.train.early_stop  # may have changed
        stopped = enough is not None and state.evals_since_best >= enough
        self.house.learner.load(checkpoint.learner_folder, checkpoint.tag).result()
        self.next_id = state.extra["num_started"]
        self.missing.extend(self.house.replay.restore(checkpoint.replay_file, self.next_id).result())
        self.state = replace(state, incarnation=state.incarnation + 1, stopped_early=stopped)
        self.saved_step = state.step
        self.started -= state.elapsed_s
        for _, scores in state.stage_scores:
            self.watch.evaluation(scores)

    def run(self) -> TrainState:
        """Train to the last step (or to early stop, or to SIGTERM: then the state is saved first)."""
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            if self.state.step == 0 and not self.state.stage_scores:
                self._examine("start")
            while not self.finished and not self.stop_signal:
                self._one_step()
            self._checkpoint()
            if self.finished:
                best = self.config.train.select_by and self.state.best is not None
                self._export("student-last" if best else "student")
        finally:
            signal.signal(signal.SIGTERM, previous)
        return self.state

    @property
    def finished(self) -> bool:
        return self.state.step >= self.plan.num_steps or self.state.stopped_early

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
        if self.config.rollout.on_new_weights == "reprefill":
            self._offer_weights()
        self._log_step(step, entries, staleness, result, waited)
        self._count_skipped(step, entries, result)
        last_of_stage = self.state.step in self.plan.stage_ends
        every = self.config.eval.every
        if last_of_stage or (every and self.state.step % every == 0):
            self._examine(self.plan.stage(step).name if last_of_stage else "")
        if not self.config.train.checkpoint_every:
            self.house.replay.durable(self.state.step).result()  # nobody will go back: let the rollouts rest
        elif self.state.step % self.config.train.checkpoint_every == 0:
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
        hard_frac = (0.5 if loss.hard_frac is None else loss.hard_frac) if loss.type == "atkd" else None
        batch = plan_batch(step, self.plan.stage_index(step), entries, self.config.learner.num_ranks, hard_frac)
        learning = self.house.learner.step(batch, self.plan.lr_at(step))
        while not learning.done():
            self._feed()
            self._wait([learning])
        return learning.result()

    def _staleness(self, entries: list[Entry]) -> list[int]:
        """Ages, in versions, of the rollouts that the student wrote at: data-set and teacher text does not age."""
        return [self.state.version - entry.oldest_version for entry in self._written(entries)]

    def _written(self, entries: list[Entry]) -> list[Entry]:
        return [entry for entry in entries if self.plan.origin(entry.rollout_id) == Origin.ROLLOUT]

    def _check_staleness(self, entries: list[Entry]) -> None:
        """Admission bounds it; a violation is our error, and a wrong number in a paper would be worse than a stop."""
        worst, limit = max(self._staleness(entries), default=0), self.config.replay.max_staleness
        if self.config.replay.policy == "fifo" and worst > limit:
            raise RuntimeError(f"staleness {worst} above replay.max_staleness={limit}; please report this")

    # ── workers ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _feed(self) -> None:
        """Give every idle worker the next tasks that may start now."""
        for index in range(len(self.house.workers)):
            if index in self.working:
                continue
            tasks = self.again.popleft() if self.again else self._next_tasks()
            if not tasks:
                return
            student_writes = any(task.origin == Origin.ROLLOUT for task in tasks)
            weights = self._current_weights() if student_writes else None
            self.working[index] = (self.house.workers[index].generate(tasks, weights), tasks)

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
        limit = self.config.replay.max_staleness
        if self.plan.origin(rollout_id) != Origin.ROLLOUT:
            limit = max(limit, PREFETCH)
        return rollout_id if self.plan.step_of(rollout_id) - self.state.step <= limit else None

    def _current_weights(self) -> Weights | None:
        """The learner's, packed once per version; None while the student's folder is all there is."""
        version = self.state.version
        if self.weights is None and version > 0:
            self.weights = Weights(version=version, packed=self.house.learner.publish(version).result())
        return self.weights

    def _offer_weights(self) -> None:
        for index, (_, tasks) in self.working.items():
            if any(task.origin == Origin.ROLLOUT for task in tasks) and (weights := self._current_weights()):
                self.house.workers[index].offer(weights)

    def _wait(self, others: list[Future[Any]]) -> None:
        """Until something ends, at most a second (so that a signal is seen); finished work is taken in."""
        wait([*others, *(future for future, _ in self.working.values())], timeout=1.0, return_when=FIRST_COMPLETED)
        self._collect()

    def _collect(self) -> None:
        for index, (future, tasks) in list(self.working.items()):
            if not future.done():
                continue
            del self.working[index]
            try:
                report: WorkReport | None = future.result()
            except WorkerLost:
                self._give_again(index, tasks)
            else:
                self.reports += [report] if report else []

    def _give_again(self, index: int, tasks: list[Task]) -> None:
        """A worker died: its tasks go out again (puts are idempotent), to whoever is free first."""
        tries = self.tries[tasks[0].rollout_id] = self.tries.get(tasks[0].rollout_id, 0) + 1
        if tries >= MAX_TRIES:
            raise RuntimeError(f"rollouts {tasks[0].rollout_id}.. lost their worker {tries} times; see its log")
        self.log.note(f"rollout worker {index} died; its {len(tasks)} rollouts are written again")
        self.again.append(tasks)
        self.working[index] = (self.house.workers[index].back(), [])

    def _drain(self) -> None:
        while self.working:
            self._wait([])

    # ── look and save ──────────────────────────────────────────────────────────────────────────────────────────────

    def _log_step(
        self, step: int, entries: list[Entry], staleness: list[int], result: StepResult, waited: float
    ) -> None:
        self._collect()
        now = time.monotonic()
        reports, self.reports = self.reports, []
        row = {
            "stage": self.plan.stage(step).name,
            **step_row(result, entries, reports, staleness),
            "time/step_s": now - self.last_step_end,
            "time/wait_rollouts_s": waited,
        }
        self.last_step_end = now
        self.log.step(step, row)
        self._warn(self.watch.step(row, self._written(entries), self.plan.stage(step).rule))

    def _warn(self, lines: list[str]) -> None:
        for line in lines:
            self.log.note(f"warning: {line}")

    def _count_skipped(self, step: int, entries: list[Entry], result: StepResult) -> None:
        """A step that the learner had to skip is let go; after a few in a row their batch is kept and the run ends."""
        self.num_skipped = self.num_skipped + 1 if result.skipped else 0
        if not result.skipped:
            return
        what = "gradient" if math.isfinite(result.loss) else "loss"
        self._warn([f"step {step}: {what} is not finite; step skipped ({self.num_skipped} of {MAX_SKIPPED})"])
        if self.num_skipped < MAX_SKIPPED:
            return
        path = self.folder.path / f"bad-batch-{step}.safetensors"
        self.house.replay.save_batch(path, [entry.rollout_id for entry in entries]).result()
        raise RuntimeError(
            f"step {step}: {what} is not finite, as in the {MAX_SKIPPED - 1} steps before; its rollouts are in {path} "
            "(read them with switchkd.rollout_io.load_rollouts); mend the data or the loss and go on with --resume, or "
            "start anew with a smaller learner.lr"
        )

    def _examine(self, stage_end: str) -> None:
        """Evaluate the published weights. A barrier: what runs is finished first, so that numbers repeat."""
        if not self.examiner.prompts:
            return
        self._drain()
        scores = self._scores()
        self.log.evaluation(self.state.step, stage_end, scores)
        self._warn(self.watch.evaluation(scores))
        self.last_step_end = time.monotonic()
        self._select(scores)
        if stage_end:
            self.state = replace(self.state, stage_scores=(*self.state.stage_scores, (stage_end, scores)))

    def _scores(self) -> dict[str, float]:
        for _ in range(MAX_TRIES):
            try:
                return self.examiner.examine(self.house.workers, self._current_weights())
            except WorkerLost:
                self.log.note("a rollout worker died; the evaluation begins again")
                for worker in self.house.workers:
                    worker.back().result()
        raise RuntimeError(f"{MAX_TRIES} evaluations lost a rollout worker; see its log")

    def _select(self, scores: dict[str, float]) -> None:
        """Keep the best student so far, by `train.select_by`, and stop early when it no longer improves."""
        by = self.config.train.select_by
        if not by or self.state.step == 0:
            return
        score = scores[f"eval/{by}"] * (-1 if by == "kl" else 1)
        if self.state.best is None or score > self.state.best:
            self._export("student")
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

    def _export(self, name: str) -> None:
        """Beside, then renamed: who reads the folder meets a whole student."""
        beside = self.folder.path / f"{name}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        self.house.learner.export(beside).result()
        replace_dir(beside, self.folder.path / name)
