"""The loop. START HERE.

    tasks ─► workers write rollouts ─► replay ─► plan a batch ─► learner steps ─► new weights ─► workers
      ▲ admission: no task whose batch lies more than `max_staleness` versions ahead                 │
      └──────────────────────────────────────────────────────────────────────────────────────────────┘

In: a checked config and a House of handles. Out: a run folder with metrics, rollouts, checkpoints and the student.
The loop waits for whatever ends first: a worker's call or the learner's step. It touches no tensor. Who works on what
stands in `dispatch.py`, what becomes of a run that loses a part in `recovery.py`.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.controller import local
from switchkd.controller.alerts import MetricAlerts
from switchkd.controller.build import build_evaluator, build_schedule
from switchkd.controller.checkpoint import Checkpoint, RunFolder, TrainState, open_run
from switchkd.controller.dispatcher import NothingFinishes, TaskDispatcher, id_range
from switchkd.controller.evaluation import Evaluator
from switchkd.controller.handles import ActorHandles
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.model_card import write_card
from switchkd.controller.preflight import PreparedRun, prepare
from switchkd.controller.quarantine import Quarantine
from switchkd.controller.recovery import RestartPolicy, restore_last_checkpoint, retry, save_checkpoint
from switchkd.controller.schedule import Schedule
from switchkd.controller.step_metrics import step_row
from switchkd.controller.summary import Summary, student_step, summarize
from switchkd.controller.watchdog import POLL_S, Stalled, Watchdog
from switchkd.data.atomic_files import replace_dir, write_json_atomic
from switchkd.learner.batching import assign_batch
from switchkd.types import CompletionSource, Entry, StateLost, StepResult, Unreachable, WeightRef, WorkerLost

MAX_SKIPPED = 3
"""Steps in a row without a finite loss that end a run."""
MAX_EVALUATIONS = 5
"""Times that one evaluation may begin again because a rollout worker was lost."""


class Trainer:
    """One run. All state that outlives a crash is in `state`; the rest is rebuilt from it."""

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        handles: ActorHandles,
        folder: RunFolder,
        log: MetricsLog,
        evaluator: Evaluator,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.schedule, self.handles, self.folder = config, schedule, handles, folder
        self.log, self.evaluator, self.watchdog = log, evaluator, watchdog
        self.state = TrainState()
        self.quarantine = Quarantine(folder.path, config.data.max_quarantined_frac, schedule.num_tasks)
        self.dispatcher = TaskDispatcher(config, schedule, handles, log, watchdog, self.quarantine)
        self.restarts = RestartPolicy(config.run.max_restarts, log.info)
        self.weights: WeightRef | None = None  # of state.version, where a call needs them
        self.consistent = True  # learner and replay stand where `state` says
        self.alerts = self._new_alerts()
        self.num_skipped = 0  # steps in a row
        self.stop_signal = 0
        self.saved_step = -1
        self.started = time.monotonic()
        self.last_step_end = self.started

    # ── start and end ──────────────────────────────────────────────────────────────────────────────────────────────

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint: weights and optimizer, waiting rollouts, counters."""
        state = checkpoint.state
        load = self.handles.learner.load(checkpoint.learner_folder, checkpoint.tag)
        self.watchdog.wait_for(load, "the learner to load its state")
        self.quarantine.load_state_dict(state.extra)
        started = self.dispatcher.next_id = state.extra["num_started"]
        missing = self.handles.replay.restore(checkpoint.replay_file, started)
        self.dispatcher.missing.extend(self.watchdog.wait_for(missing, "the replay to load its state"))
        self._load_state(state, state.incarnation + 1)
        self.started -= state.elapsed_s

    def _load_state(self, state: TrainState, incarnation: int) -> None:
        enough = self.config.train.early_stop  # may have changed
        stopped = enough is not None and state.evals_since_best >= enough
        self.state = replace(state, incarnation=incarnation, stopped_early=stopped)
        self.saved_step = state.step if "num_started" in state.extra else -1
        self.consistent, self.num_skipped = True, 0
        self.alerts = self._new_alerts()
        if self.schedule.adaptive:
            self.schedule.adaptive.load_state_dict(state.extra.get("adaptive"))
        for _, scores in state.stage_scores:
            self.alerts.evaluation(scores)

    def _new_alerts(self) -> MetricAlerts:
        """Text from the replay buffer is old by intention."""
        replay = self.config.replay
        return MetricAlerts(math.inf if replay.policy == "adaptive" else replay.max_staleness)

    def run(self) -> TrainState:
        """Train to the last step (or to early stop, or to SIGTERM: then the state is saved first). A lost part sends
        the loop back to the last checkpoint; a stalled run saves what it can and raises Stalled."""
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        lost: StateLost | None = None
        try:
            while True:
                try:
                    if lost is not None:
                        self._restore_last_checkpoint(lost)
                    self._run_to_end()
                    return self.state
                except StateLost as error:
                    lost = error
                    if self.stop_signal:
                        raise RuntimeError(f"{lost} while the run was stopping; --resume goes on") from None
        except (Stalled, NothingFinishes):
            self._save_if_consistent()
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
        self._checkpoint()
        if self.finished:
            best = self.config.train.select_by and self.state.best is not None
            self._export("student-last" if best else "student")

    def _restore_last_checkpoint(self, lost: StateLost) -> None:
        """To the last checkpoint, in this process: as a resume does it, but what lives goes on living."""
        self.restarts.begin(lost)
        began, step = time.monotonic(), self.state.step
        self.consistent = False
        self.log.close()
        state = restore_last_checkpoint(self.handles, self.folder, self.dispatcher, self.watchdog)
        self.log.open(self.folder.path, self.schedule.num_steps, state)
        self._load_state(state, self.state.incarnation + 1)
        again = step - state.step
        self.log.info(
            f"back at step {state.step} after {time.monotonic() - began:.1f} s; "
            f"{again} step{'s are' if again != 1 else ' is'} trained again"
        )

    def _save_if_consistent(self) -> None:
        """Before the run ends: an actor that it waits for in vain cannot be asked; the others may still answer."""
        if not self.consistent or "the learner" in self.watchdog.waits_for:
            self.log.info("the state of the step at hand cannot be saved; the last checkpoint stands")
            return
        self.watchdog.reset()
        try:
            self._checkpoint()
        except Exception as error:
            self.log.info(f"the state could not be saved ({error}); the last checkpoint stands")
        else:
            self.log.info(f"saved checkpoint {self.state.step}")

    @property
    def finished(self) -> bool:
        return self.state.step >= self.schedule.num_steps or self.state.stopped_early

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number

    # ── one step ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _one_step(self) -> None:
        """Gather one step's rollouts, train on them, hand out the new weights, look and save where it is time."""
        waited = time.monotonic()
        entries = self._next_batch()
        if entries is None:
            return
        waited = time.monotonic() - waited
        staleness = self._staleness(entries)
        result = self._learn(entries)
        step = self.state.step
        self._commit(step, [entry.rollout_id for entry in entries])
        if self.schedule.reuses(step):  # nobody waits for rollouts of its own
            self._wait_for_replay(self.handles.replay.quarantine(list(self.schedule.rollout_ids(step))))
        else:
            self.quarantine.num_passed += self.schedule.batch_size(step) - len(entries)
        self.state = replace(
            self.state, step=step + 1, version=result.version, elapsed_s=time.monotonic() - self.started
        )
        self.consistent = True
        self._log_step(step, entries, staleness, result, waited)
        self._count_skipped(step, entries, result)
        last_of_stage = self.state.step in self.schedule.stage_ends
        every = self.config.eval.every
        due = last_of_stage or (every > 0 and self.state.step % every == 0)
        evaluates = bool(self.evaluator.prompts) and due
        self._publish(evaluates=evaluates)
        if evaluates:
            self._evaluate(self.schedule.stage(step).name if last_of_stage else "")
        if not self.config.train.checkpoint_every:
            # no checkpoint is to come before the end: to go back is to begin anew, without these rollouts
            self.watchdog.wait_for(self.handles.replay.release_before(self.state.step), "the replay")
        elif self.state.step % self.config.train.checkpoint_every == 0:
            self._checkpoint()

    def _next_batch(self) -> list[Entry] | None:
        """Keep the workers busy until this step's rollouts are all in the replay; None when told to stop."""
        step = self.state.step
        stage = self.schedule.stage_index(step)
        self.log.now(learner=f"waits for the rollouts of step {step + 1}", replay=f"gathers step {step + 1}")
        while not self.stop_signal:
            if self.dispatcher.failure:
                raise self.dispatcher.failure
            self.dispatcher.feed(self.state.step, self.weights)
            num, version = self.schedule.batch_size(step), self.state.version
            if self.schedule.reuses(step):
                return self._wait_for_replay(self.handles.replay.draw(step, num, version))
            num -= self.quarantine.num_missing(self.schedule.step_of, step)
            entries = self._wait_for_replay(self.handles.replay.take(step, num, version, stage))
            if entries is not None:
                self._check_staleness(entries)
                return entries
            if self.dispatcher.working:
                self.dispatcher.wait([])
            else:
                self._requeue_missing(step)
        return None

    def _wait_for_replay(self, answer: Future[Any]) -> Any:
        """Of the replay, whom the loop asks all the time: its answers alone do not mean that the run gets on."""
        waits_for = f"step {self.state.step}: {self.dispatcher.describe() or 'the replay'}"
        self.watchdog.waiting(waits_for)
        while not answer.done():
            self.watchdog.check()
            wait([answer], timeout=POLL_S)
        return answer.result()

    def _requeue_missing(self, step: int) -> None:
        """All that was started was written, but some of it went down with a replay that died."""
        missing = self.dispatcher.unwritten(self._wait_for_replay(self.handles.replay.missing(self.dispatcher.next_id)))
        if not missing:
            raise RuntimeError(f"step {step} lacks rollouts, but no worker has a task; this is a bug, please report")
        self.log.info(f"rollouts {id_range(missing)} never arrived; they are written again")
        self.dispatcher.missing.extend(i for i in missing if i not in self.dispatcher.missing)

    def _commit(self, step: int, rollout_ids: list[int]) -> None:
        commit = self.handles.replay.commit
        retry(
            f"writing the rollouts of step {step}",
            lambda: self.watchdog.wait_for(commit(step, rollout_ids), "the replay to note the step"),
            self.log.info,
        )

    def _learn(self, entries: list[Entry]) -> StepResult:
        """One optimizer step; workers go on meanwhile as far as admission lets them."""
        step = self.state.step
        if not entries:  # all are quarantined
            return StepResult(
                step=step,
                version=step + 1,
                loss=math.nan,
                grad_norm=0.0,
                lr=self.schedule.lr_at(step),
                num_loss_tokens=0,
                time_s=0.0,
            )
        loss = self.schedule.stage(step).loss
        hard_frac = (0.5 if loss.hard_frac is None else loss.hard_frac) if loss.type == "atkd" else None
        batch = assign_batch(step, self.schedule.stage_index(step), entries, self.config.learner.num_ranks, hard_frac)
        self.consistent = False
        self.log.now(learner=f"trains on step {step + 1}")
        learning = self.handles.learner.step(batch, self.schedule.lr_at(step))
        waits_for = f"the learner at step {step}"
        self.watchdog.progress(waits_for)
        while not learning.done():
            if not self.stop_signal:
                self.dispatcher.feed(self.state.step, self.weights)
            self.dispatcher.wait([learning], waits_for)
        return self.watchdog.wait_for(learning, waits_for)

    def _staleness(self, entries: list[Entry]) -> list[int]:
        """Ages, in versions, of the rollouts that the student wrote at: data-set and teacher text does not age."""
        return [self.state.version - entry.oldest_version for entry in self._written_by_rule(entries)]

    def _written_by_rule(self, entries: list[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.completion_source == CompletionSource.ROLLOUT]

    def _check_staleness(self, entries: list[Entry]) -> None:
        """Admission bounds it; a violation is our error, and a wrong number in a paper would be worse than a stop."""
        worst, limit = max(self._staleness(entries), default=0), self.config.replay.max_staleness
        if self.config.replay.policy == "fifo" and worst > limit:
            raise RuntimeError(f"staleness {worst} above replay.max_staleness={limit}; please report this")

    def _publish(self, *, evaluates: bool) -> None:
        """Publish the current weights if a call before the next step needs them. At first the student's folder will do.

        Without room for them the run ends, but not without what it has learnt.
        """
        self.weights = None
        version, incarnation = self.state.version, self.state.incarnation
        needed = evaluates or (not self.stop_signal and self.dispatcher.needs_weights(self.state.step))
        if version == incarnation == 0 or not needed:
            return
        publish, waits_for = self.handles.learner.publish, f"the learner to publish version {version}"
        try:
            ref = retry(
                f"publishing version {version}",
                lambda: self.watchdog.wait_for(publish(version), waits_for),
                self.log.info,
            )
        except OSError:
            self._checkpoint()
            self.log.info(f"saved checkpoint {self.state.step}; --resume goes on from there")
            raise
        self.weights = WeightRef(version=version, ref=ref, incarnation=incarnation)
        if self.config.rollout.on_new_weights == "reprefill":
            self.dispatcher.push_weights(self.weights)

    # ── look and save ──────────────────────────────────────────────────────────────────────────────────────────────

    def _log_step(
        self, step: int, entries: list[Entry], staleness: list[int], result: StepResult, waited: float
    ) -> None:
        self.dispatcher.collect()
        now = time.monotonic()
        step_s = now - self.last_step_end
        reports, self.dispatcher.reports = self.dispatcher.reports, []
        row = {
            "stage": self.schedule.stage(step).name,
            **step_row(result, entries, reports, staleness),
            **self._queue_metrics(),
            **self._adaptive_metrics(step),
            "time/step_s": step_s,
            "time/wait_rollouts_s": waited,
            **({"rollout/num_quarantined": len(self.quarantine.ids)} if self.quarantine.ids else {}),
        }
        self.last_step_end = now
        self.log.step(step, row)
        self._warn(self.alerts.step(row, self._written_by_rule(entries), self.schedule.stage(step).rule))
        for told in self.handles.autoscale(waited, step_s):
            self.log.info(told)

    def _adaptive_metrics(self, step: int) -> dict[str, float]:
        """What DistiLLM's replay decided on, and whether this step was one of the buffer's."""
        if self.schedule.adaptive is None:
            return {}
        return {"replay/phi": self.schedule.adaptive.phi, "replay/reused": float(self.schedule.reuses(step))}

    def _update_adaptive_schedule(self, loss: float) -> None:
        adaptive, step = self.schedule.adaptive, self.state.step
        if adaptive is None:
            return
        before, counts = adaptive.reference, step > 0 and self.schedule.stage(step - 1).mix.rollout > 0
        if adaptive.record_loss(loss, counts=counts):
            self.log.info(f"validation loss {loss:.4g}, {before:.4g} before: phi rises to {adaptive.phi:g}")

    def _queue_metrics(self) -> dict[str, float]:
        """What waits for the learner, and what is being written."""
        stats = self._wait_for_replay(self.handles.replay.stats())
        return {
            "replay/waiting": stats["num_waiting"],
            "replay/bytes": stats["bytes"],
            **({"replay/buffered": stats["num_buffered"]} if "num_buffered" in stats else {}),
            "rollout/in_flight": sum(map(len, self.dispatcher.in_flight)),
        }

    def _warn(self, lines: list[str]) -> None:
        for line in lines:
            self.log.info(f"warning: {line}")

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
        kept = self.handles.replay.save_batch(path, [entry.rollout_id for entry in entries])
        self.watchdog.wait_for(kept, "the replay to save a batch")
        raise RuntimeError(
            f"step {step}: {what} is not finite, as in the {MAX_SKIPPED - 1} steps before; its rollouts are in {path} "
            "(read them with switchkd.data.rollout_io.load_rollouts); mend the data or the loss and go on with "
            "--resume, or start anew with a smaller learner.lr"
        )

    def _evaluate(self, stage_end: str) -> None:
        """Evaluate the published weights. A barrier: what runs is finished first, so that numbers repeat."""
        self.dispatcher.drain()
        self.log.now(rollout=f"examination on {len(self.evaluator.prompts)} prompts", learner="waits for it")
        scores = self._scores()
        self.log.now(rollout="", learner="")
        self.log.evaluation(self.state.step, stage_end, scores)
        self._warn(self.alerts.evaluation(scores))
        self._update_adaptive_schedule(scores.get("eval/loss", math.nan))
        self.last_step_end = time.monotonic()
        self._select(scores)
        if stage_end:
            self.state = replace(self.state, stage_scores=(*self.state.stage_scores, (stage_end, scores)))

    def _scores(self) -> dict[str, float]:
        for _ in range(MAX_EVALUATIONS):
            try:
                return self.evaluator.evaluate(
                    self.handles.workers,
                    self.weights,
                    lambda future: self.watchdog.wait_for(future, "an evaluation by the rollout workers"),
                )
            except (WorkerLost, Unreachable) as error:
                what = "died" if isinstance(error, WorkerLost) else f"could not go on ({error})"
                self.log.info(f"a rollout worker {what}; the evaluation begins again")
                for worker in self.handles.workers:
                    self.watchdog.wait_for(worker.back(), "a rollout worker to come back")
                if isinstance(error, Unreachable):
                    self._publish(evaluates=True)  # the weights may be what could not be reached
        raise RuntimeError(f"{MAX_EVALUATIONS} evaluations lost a rollout worker; see its log")

    def _select(self, scores: dict[str, float]) -> None:
        """Keep the best student so far, by `train.select_by`, and stop early when it no longer improves."""
        by = self.config.train.select_by
        if not by or self.state.step == 0:
            return
        score = scores[f"eval/{by}"] * (-1 if by in ("kl", "loss") else 1)
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
        self.log.now(learner=f"saves checkpoint {self.state.step}")
        extra = {"num_started": self.dispatcher.next_id, **self.quarantine.state_dict()}
        if self.schedule.adaptive:
            extra["adaptive"] = self.schedule.adaptive.state_dict()
        self.state = replace(self.state, elapsed_s=time.monotonic() - self.started, extra=extra)
        save_checkpoint(self.handles, self.folder, self.state, self.watchdog, self.log.info)
        self.saved_step = self.state.step
        self.restarts.saved()

    def _export(self, name: str) -> None:
        """Beside, then renamed: who reads the folder meets a whole student."""
        beside = self.folder.path / f"{name}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        self.watchdog.wait_for(self.handles.learner.export(beside), "the learner to write the student")
        replace_dir(beside, self.folder.path / name)


def train(config: Config, *, resume: bool = False) -> Summary:
    """Run a config to its end, or to SIGTERM. Raises ConfigError before anything is started or overwritten."""
    ready = prepare(config)
    log = MetricsLog(ready.config.metrics)
    try:
        return _train(ready, log, resume)
    finally:
        log.close()


def _train(ready: PreparedRun, log: MetricsLog, resume: bool) -> Summary:
    config = ready.config
    log.info(f"data: {config.rollout.recorded or ready.prompts.report()}")
    _check_capacity(config, log)
    with open_run(config, resume) as folder:
        schedule = build_schedule(ready)
        checkpoint = folder.checkpoint
        log.open(folder.path, schedule.num_steps, checkpoint.state if checkpoint else TrainState())
        with ExitStack() as opened:
            watchdog = Watchdog(config.run.watchdog_s, folder.path, log.info)
            opened.callback(watchdog.stop)
            watchdog.start()
            handles = _start_actors(ready, folder, log)
            opened.callback(handles.close)
            opened.callback(watchdog.progress, "the actors to end")
            watchdog.heartbeats = handles.heartbeats
            watchdog.progress("the first step")
            trainer = Trainer(config, schedule, handles, folder, log, build_evaluator(ready), watchdog)
            if checkpoint is not None:
                trainer.resume(checkpoint)
            state = trainer.run()
        summary = summarize(folder, state, schedule, told_to_stop=bool(trainer.stop_signal))
        if summary.student:
            write_card(Path(summary.student), folder.path, config, summary.stage_scores, student_step(summary))
        write_json_atomic(folder.path / "summary.json", asdict(summary))
    log.summary(summary.stage_scores, summary.student, summary.finished)
    return summary


def _check_capacity(config: Config, log: MetricsLog) -> None:
    """ConfigError when the machine, or the cluster that is joined here, is too small. Starts nothing."""
    from switchkd.actors import process_setup

    if config.run.mode == "inprocess":
        local.check_single(config)
    elif resources.is_private(config):
        _check_private(config)
        process_setup.for_private_cluster()
    else:
        from switchkd.actors import launch

        launch.join(config, log)
        return
    resources.check(config, _this_machine())


def _check_private(config: Config) -> None:
    """ConfigError for what only a joined cluster has."""
    for role in resources.counts(config):
        if labels := resources.of_role(config, role).labels:
            raise ConfigError(
                f"resources.{role}.labels={labels}: nodes of a joined cluster have labels, a private cluster has none; "
                "set cluster.address or remove them"
            )
    for name in config.teacher_names:
        if wanted := config.of_teacher(name).teacher.attach:
            raise ConfigError(
                f"{resources.role_of(name)}.attach={wanted} needs the cluster on which that teacher is served: set "
                "cluster.address (auto, host:port) or start the run there as a job"
            )


def _this_machine() -> dict[str, float]:
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def _start_actors(ready: PreparedRun, folder: RunFolder, log: MetricsLog) -> ActorHandles:
    if ready.config.run.mode == "inprocess":
        return local.start_actors(ready.config, folder.path, ready.stop_ids)
    from switchkd.actors import launch

    return launch.start_actors(ready.config, folder.path, ready.stop_ids, log)
