"""The training loop. START HERE.

    tasks -> workers generate -> replay -> gather a batch -> learner steps -> publish weights -> workers
      ^ admission: no task whose batch lies more than `max_staleness` versions ahead               |
      +--------------------------------------------------------------------------------------------+

In: a checked config and handles of the actors. Out: a run folder with metrics, rollouts, checkpoints and the student.

`Trainer._one_step` is one iteration: gather, step, publish, evaluate, checkpoint. The loop waits for a worker's call or
the learner's step, whichever ends first, and handles no tensors. `controller/dispatcher.py` assigns tasks to workers,
`controller/recovery.py` saves and restores the state, `controller/step_report.py` writes the metrics.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.controller import local
from switchkd.controller.build import build_evaluator, build_schedule
from switchkd.controller.checkpoint import Checkpoint, RunFolder, TrainState, open_run
from switchkd.controller.dispatcher import NothingFinishes, TaskDispatcher, id_range
from switchkd.controller.evaluation import Evaluator, aggregate, evaluate_with_retries, stops_early, update_best
from switchkd.controller.handles import ActorHandles
from switchkd.controller.metrics import MetricsLog, StageScores
from switchkd.controller.model_card import exported_step, model_card
from switchkd.controller.preflight import PreparedRun, prepare
from switchkd.controller.quarantine import Quarantine
from switchkd.controller.recovery import Recovery, retry
from switchkd.controller.resume import with_stored_date
from switchkd.controller.schedule import Schedule
from switchkd.controller.start_lines import start_lines
from switchkd.controller.step_report import StepReporter
from switchkd.controller.summary import Summary, summarize
from switchkd.controller.watchdog import POLL_S, Stalled, Watchdog
from switchkd.data.atomic_files import write_json_atomic
from switchkd.data.prompts import prompts_digest
from switchkd.learner.batching import assign_batch
from switchkd.learner.build import build_loss
from switchkd.types import CompletionSource, Entry, StateLost, StepResult, WeightRef


class Trainer:
    """One run. All state that survives a crash is in `state`; the rest is rebuilt from it."""

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        handles: ActorHandles,
        folder: RunFolder,
        log: MetricsLog,
        evaluator: Evaluator,
        watchdog: Watchdog,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.now = now
        self.schedule = schedule
        self.handles = handles
        self.log = log
        self.evaluator = evaluator
        self.watchdog = watchdog
        self.quarantine = Quarantine(folder.path, config.data.max_quarantined_frac, schedule.num_tasks)
        self.dispatcher = TaskDispatcher(config, schedule, handles, log, watchdog, self.quarantine)
        self.recovery = Recovery(self.dispatcher, folder, log, config.run.max_restarts)
        self.reporter = StepReporter(config.replay, self.dispatcher, log, folder.path, now)
        self.hard_fracs = [build_loss(stage).hard_frac for stage in schedule.stages]  # ATKD's
        self.state = TrainState()
        self.weights: WeightRef | None = None  # of `state.version`, where a call needs them
        self.consistent = True  # learner and replay are in the state `state`
        self.stop_signal = 0

    # ── start and end ──────────────────────────────────────────────────────────────────────────────────────────────

    def resume(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint: weights, optimizer, untrained rollouts, counters."""
        self._load_state(self.recovery.resume(checkpoint))

    def _load_state(self, state: TrainState) -> None:
        if exported_step(self.recovery.folder.path / "student") > state.step:
            # a later best of steps that are trained again has replaced the student of `best_step`
            state = replace(state, best=None, best_step=None, best_stage=None, evals_since_best=0)
        stopped = stops_early(state, self.config.train)  # early_stop may differ from that of the checkpoint's run
        incarnation = max(self.state.incarnation, state.incarnation) + 1
        self.state = replace(state, incarnation=incarnation, stopped_early=stopped)
        self.consistent = True
        self.reporter.restart(scores for _, scores in state.stage_scores)

    def run(self) -> None:
        """Train to the last step, to early stop, or to SIGTERM; then save. After the loss of a learner or the replay
        continue from the last checkpoint. A run that stalls or cannot finish a rollout saves what it can and raises."""
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        lost: StateLost | None = None
        try:
            while True:
                try:
                    if lost is not None:
                        self.consistent = False
                        self._load_state(self.recovery.go_back(lost, self.state.step))
                    self._run_to_end()
                    return
                except StateLost as error:
                    lost = error
                    if self.stop_signal:
                        raise RuntimeError(f"{lost} while the run was stopping; --resume goes on") from None
        except (Stalled, NothingFinishes):
            self.recovery.save_before_exit(self.state, self.consistent)
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _run_to_end(self) -> None:
        starts = bool(self.evaluator.prompts) and self.state.step == 0 and not self.state.stage_scores
        self._publish(evaluates=starts)
        if starts:
            self._evaluate("start")
        while not self.finished and not self.stop_signal:
            self._one_step()
        self.state = self.recovery.save(self.state)
        if self.finished:
            name = "student" if self.state.best_step is None else "student-last"
            self._export(name, self.state.stage_scores)

    def _export(self, name: str, scores: StageScores) -> None:
        """Write the student of this step, with a card that has `scores`, to a folder of the run."""
        card = model_card(self.recovery.folder.path, self.config, scores, self.state.step)
        self.recovery.export(name, card)

    @property
    def finished(self) -> bool:
        return self.state.step >= self.schedule.num_steps or self.state.stopped_early

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number

    # ── one step ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _one_step(self) -> None:
        started, step = self.now(), self.state.step
        entries = self._next_batch()
        if entries is None:  # stopped
            return
        wait_s, staleness = self.now() - started, self._staleness(entries)
        result = self._learn(entries)
        self._commit(entries, result)
        self.reporter.step(step, entries, staleness, result, wait_s)
        if result.diverged:
            raise self.recovery.diverged(step)
        num_done, every = self.state.step, self.config.eval.every
        stage_end = self.schedule.stage(step).name if num_done in self.schedule.stage_ends else ""
        evaluates = bool(self.evaluator.prompts) and (stage_end != "" or (every > 0 and num_done % every == 0))
        self._publish(evaluates=evaluates)
        if evaluates:
            self._evaluate(stage_end)
        if not self.config.train.checkpoint_every:
            # there is no checkpoint before the end: a run that goes back starts again, without these rollouts
            self.watchdog.wait_for(self.handles.replay.release_before(num_done), "the replay")
        elif num_done % self.config.train.checkpoint_every == 0:
            self.state = self.recovery.save(self.state)

    def _next_batch(self) -> list[Entry] | None:
        """Assign tasks until all of this step's rollouts are in the replay. None where the run must stop."""
        step, version = self.state.step, self.state.version
        self.log.now(learner=f"waits for the rollouts of step {step + 1}", replay=f"gathers step {step + 1}")
        while not self.stop_signal:
            if self.dispatcher.failure:
                raise self.dispatcher.failure
            if self.dispatcher.weights_lost:  # with the rank that published them: publishing again raises StateLost
                self.dispatcher.weights_lost = False
                self._publish(evaluates=False)
            self.dispatcher.feed(step, self.weights)
            num = self.schedule.batch_size(step)
            if self.schedule.reuses(step):
                return self._wait_for_replay(self.handles.replay.draw(step, num, version))
            num -= self.quarantine.num_missing(self.schedule.step_of, step)
            stage = self.schedule.stage_index(step)
            entries = self._wait_for_replay(self.handles.replay.take(step, num, version, stage))
            if entries is not None:
                return entries
            if self.dispatcher.working:
                self.dispatcher.wait([])
            else:
                self._requeue_missing()
        return None

    def _wait_for_replay(self, result: Future[Any]) -> Any:
        """Wait without resetting the watchdog: replay calls are too frequent to count as progress."""
        self.watchdog.waiting(f"step {self.state.step}: {self.dispatcher.describe() or 'the replay'}")
        while not result.done():
            self.watchdog.check()
            wait([result], timeout=POLL_S)
        return result.result()

    def _requeue_missing(self) -> None:
        """Assign again the rollouts that were lost with a replay that died, after all tasks were done."""
        missing = self.dispatcher.unwritten(self._wait_for_replay(self.handles.replay.missing(self.dispatcher.next_id)))
        if not missing:
            raise RuntimeError(
                f"step {self.state.step} lacks rollouts, but no worker has a task; this is a bug, please report"
            )
        self.log.info(f"rollouts {id_range(missing)} never arrived; they are written again")
        self.dispatcher.missing.extend(i for i in missing if i not in self.dispatcher.missing)

    def _staleness(self, entries: list[Entry]) -> list[int]:
        """Staleness in versions of the rollouts that the student generated; other completions have none. Raises
        RuntimeError above `max_staleness`: admission bounds it, so this is a bug that would falsify results."""
        generated = [entry for entry in entries if entry.completion_source == CompletionSource.ROLLOUT]
        staleness = [self.state.version - entry.oldest_version for entry in generated]
        worst, limit = max(staleness, default=0), self.config.replay.max_staleness
        if self.config.replay.policy == "fifo" and worst > limit:
            raise RuntimeError(f"staleness {worst} above replay.max_staleness={limit}; please report this")
        return staleness

    def _learn(self, entries: list[Entry]) -> StepResult:
        """One optimizer step, while workers continue within admission."""
        step, lr = self.state.step, self.schedule.lr_at(self.state.step)
        if not entries:  # all are quarantined
            return StepResult(
                step=step, version=step + 1, loss=math.nan, grad_norm=0.0, lr=lr, num_loss_tokens=0, time_s=0.0
            )
        stage = self.schedule.stage_index(step)
        batch = assign_batch(step, stage, entries, self.config.learner.num_ranks, self.hard_fracs[stage])
        self.consistent = False
        self.log.now(learner=f"trains on step {step + 1}")
        learning, waits_for = self.handles.learner.step(batch, lr), f"the learner at step {step}"
        self.watchdog.progress(waits_for)
        while not learning.done():
            if not self.stop_signal:
                self.dispatcher.feed(step, self.weights)
            self.dispatcher.wait([learning], waits_for)
        return self.watchdog.wait_for(learning, waits_for)

    def _commit(self, entries: list[Entry], result: StepResult) -> None:
        """Commit a step in the replay, which writes its rollouts meanwhile, and advance the state."""
        step, rollout_ids = self.state.step, [entry.rollout_id for entry in entries]
        commit = self.handles.replay.commit
        retry(
            "writing trained rollouts",
            lambda: self.watchdog.wait_for(commit(step, rollout_ids), "the replay to note the step"),
            self.log.info,
        )
        if self.schedule.reuses(step):  # a step that reuses rollouts generates none
            self._wait_for_replay(self.handles.replay.quarantine(list(self.schedule.rollout_ids(step))))
        else:
            self.quarantine.num_passed += self.schedule.batch_size(step) - len(entries)
        self.state = replace(self.state, step=step + 1, version=result.version)
        self.consistent = True

    def _publish(self, *, evaluates: bool) -> WeightRef | None:
        """Publish the weights if a call before the next step needs them. Version 0 is the student's folder.

        Where there is no room for the weights, save the state and raise OSError.
        """
        self.weights = None
        version, incarnation = self.state.version, self.state.incarnation
        needed = evaluates or (not self.stop_signal and self.dispatcher.needs_weights(self.state.step))
        if version == incarnation == 0 or not needed:
            return None
        publish, waits_for = self.handles.learner.publish, f"the learner to publish version {version}"
        try:
            ref = retry(
                f"publishing version {version}",
                lambda: self.watchdog.wait_for(publish(version), waits_for),
                self.log.info,
            )
        except OSError:
            self.recovery.save_before_exit(self.state, self.consistent)
            raise
        self.weights = WeightRef(version=version, ref=ref, incarnation=incarnation)
        if self.config.rollout.on_new_weights == "reprefill":
            self.dispatcher.push_weights(self.weights)
        return self.weights

    def _evaluate(self, stage_end: str) -> None:
        """Evaluate the published weights, after the running rollouts have ended, so that results are reproducible."""
        self.dispatcher.drain()
        self.log.now(rollout=f"evaluation on {len(self.evaluator.prompts)} prompts", learner="waits for it")
        rows = evaluate_with_retries(
            self.evaluator,
            self.handles.workers,
            self.weights,
            lambda: self._publish(evaluates=True),
            self.watchdog,
            self.log,
            teacher_text=stage_end == "start",
        )
        scores = aggregate(rows, self.evaluator.settings.metrics, self.evaluator.prompts)
        self.log.now(rollout="", learner="")
        self.reporter.evaluation(self.state.step, stage_end, scores, self.evaluator.sample(rows) if stage_end else {})
        if phi_rises := self.schedule.record_validation_loss(self.state.step, scores.get("eval/loss", math.nan)):
            self.log.info(phi_rises)
        state = update_best(self.state, scores, self.config.train)
        if state.best_step == state.step:
            self._export("student", (*state.stage_scores, (str(state.best_stage), scores)))
        ended = ((stage_end, scores),) if stage_end else ()
        self.state = replace(state, stage_scores=(*state.stage_scores, *ended))


def train(config: Config, *, resume: bool = False) -> Summary:
    """Run a config to its end, or to SIGTERM. Raises ConfigError before the first step; the folder of a new run is then
    as it was before."""
    ready = prepare(with_stored_date(config) if resume else config)
    config, prompts = ready.config, prompts_digest(ready.prompts, ready.eval_prompts)
    log = MetricsLog(config.metrics)
    for line in start_lines(ready):
        log.info(line)
    with ExitStack() as opened:
        opened.enter_context(_sigterm_exits(config.run.dir, log))
        _check_capacity(config, log)
        folder = opened.enter_context(open_run(config, resume, prompts=prompts))
        trainer = _train(ready, folder, log)
        stopped = bool(trainer.stop_signal)
        summary = summarize(folder, trainer.state, finished=trainer.finished, told_to_stop=stopped)
        write_json_atomic(folder.path / "summary.json", asdict(summary))
    log.summary(summary.stage_scores, summary.student, summary.finished)
    return summary


@contextmanager
def _sigterm_exits(run_dir: str, log: MetricsLog) -> Iterator[None]:
    """While actors start and end, SIGTERM ends the process with exit code 143: it closes what is open. The loop has a
    handler of its own, which saves a checkpoint."""

    def end(number: int, frame: FrameType | None) -> None:
        log.info(f"stopped outside of training; --resume goes on with {run_dir}")
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _train(ready: PreparedRun, folder: RunFolder, log: MetricsLog) -> Trainer:
    """Start the actors, run to the end, end the actors."""
    schedule, checkpoint = build_schedule(ready), folder.checkpoint
    with ExitStack() as opened:
        opened.callback(log.close)
        log.open(folder.path, schedule.num_steps, checkpoint.state if checkpoint else TrainState())
        watchdog = Watchdog(ready.config.run.watchdog_s, folder.path, log.info)
        opened.callback(watchdog.stop)
        watchdog.start()
        handles = _start_actors(ready, folder, log)
        opened.callback(handles.close)
        opened.callback(watchdog.progress, "the actors to end")
        watchdog.heartbeats = handles.heartbeats
        watchdog.progress("the first step")
        trainer = Trainer(ready.config, schedule, handles, folder, log, build_evaluator(ready), watchdog)
        if checkpoint is not None:
            trainer.resume(checkpoint)
        trainer.run()
    return trainer


def _check_capacity(config: Config, log: MetricsLog) -> None:
    """Raise ConfigError when the machine, or the cluster that this joins, is too small. Starts no actors."""
    from switchkd.actors import process_setup

    if config.run.mode == "inprocess":
        local.check_single(config)
    elif resources.is_private(config):
        resources.check_private(config)
        process_setup.for_private_cluster()
    else:
        from switchkd.actors import launch

        launch.join(config, log)
        return
    resources.check(config, local.this_machine())


def _start_actors(ready: PreparedRun, folder: RunFolder, log: MetricsLog) -> ActorHandles:
    if ready.config.run.mode == "inprocess":
        return local.start_actors(ready.config, folder.path, ready.stop_ids)
    from switchkd.actors import launch

    return launch.start_actors(ready.config, folder.path, ready.stop_ids, log)
