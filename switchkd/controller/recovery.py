"""Saves a run's state, and goes back to it when the learner or the replay dies.

In: the actors' handles, the run's folder, a StateLost. Out: complete checkpoints; the state to continue from. A write
that fails is repeated, each time after a longer pause, before the run ends.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from switchkd.config.errors import with_type
from switchkd.controller.checkpoint import Checkpoint, RunFolder, TrainState, latest, load_latest
from switchkd.controller.dispatcher import TaskDispatcher
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.watchdog import Stalled
from switchkd.data.atomic_files import HISTORY, replace_dir, write_text_atomic
from switchkd.engines.models.origin import CARD
from switchkd.types import StateLost

RETRY_S = (1.0, 4.0, 16.0)
"""Pause before each repetition of a write; after the last one the run ends."""
MAX_PAUSE_S = 60.0

T = TypeVar("T")


class RestartPolicy:
    """Limits how often in a row, and how fast, a run goes back to the same checkpoint."""

    def __init__(self, limit: int, log: Callable[[str], None], sleep: Callable[[float], None] = time.sleep) -> None:
        self.limit, self._log, self._sleep = limit, log, sleep
        self.num = 0

    def begin(self, lost: StateLost) -> None:
        """Count a restart, and pause before it. Raises RuntimeError beyond the limit."""
        if self.num >= self.limit:
            raise RuntimeError(
                f"{lost}, after {self.num} restarts without another checkpoint (run.max_restarts={self.limit}); "
                "see the actors' logs for why; --resume goes on from the last checkpoint"
            )
        self.num += 1
        pause = min(2.0 ** (self.num - 2), MAX_PAUSE_S) if self.num > 1 else 0.0
        self._log(f"{lost}; going back to the last checkpoint (restart {self.num} of {self.limit})")
        self._sleep(pause)

    def saved(self) -> None:
        """Reset the count: there is a new checkpoint."""
        self.num = 0


def retry(
    description: str, call: Callable[[], T], log: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> T:
    """Return the result of `call`, repeated where it fails: a disk may have room later. Raises the last error."""
    for pause in RETRY_S:
        try:
            return call()
        except (StateLost, Stalled):
            raise
        except Exception as error:
            log(f"warning: {description} failed ({with_type(error)}); trying again in {pause:g} s")
        sleep(pause)
    return call()


class Recovery:
    """Saves checkpoints and loads them; keeps the step that was saved last."""

    def __init__(self, dispatcher: TaskDispatcher, folder: RunFolder, log: MetricsLog, max_restarts: int) -> None:
        self.dispatcher = dispatcher
        self.schedule = dispatcher.schedule
        self.handles = dispatcher.handles
        self.watchdog = dispatcher.watchdog
        self.folder = folder
        self.log = log
        self.restarts = RestartPolicy(max_restarts, log.info)
        self.saved_step = -1
        self.started = time.monotonic()  # earlier by the time that the run took before a resume

    def save(self, state: TrainState) -> TrainState:
        """Save learner, replay and counters, completely or not at all, once per step. Returns the state with the
        seconds so far; raises the error of the last try."""
        state = replace(state, elapsed_s=time.monotonic() - self.started)
        if self.saved_step == state.step:
            return state
        self.log.now(learner=f"saves checkpoint {state.step}")
        extra = self.dispatcher.state_dict()
        if self.schedule.adaptive:
            extra["adaptive"] = self.schedule.adaptive.state_dict()
        retry(
            f"saving checkpoint {state.step} under {self.folder.path}",
            lambda: self._write_checkpoint(replace(state, extra=extra)),
            self.log.info,
        )
        self.watchdog.wait_for(self.handles.replay.release_before(state.step), "the replay")
        self.saved_step = state.step
        self.restarts.saved()
        return state

    def _write_checkpoint(self, state: TrainState) -> None:
        learner, replay = self.handles.learner, self.handles.replay
        draft = self.folder.begin(state.step)
        try:
            self.watchdog.wait_for(learner.save(draft.learner_folder, draft.tag), "the learner to save its state")
            self.watchdog.wait_for(learner.export(draft.student_folder), "the learner to write the student")
            self.watchdog.wait_for(replay.save(draft.replay_file, state.step), "the replay to save its state")
            # after the replay has written its lines
            history = [path for name in HISTORY if (path := self.folder.path / name).is_file()]
            sizes = {path.name: path.stat().st_size for path in history}
            self.folder.finish(draft, replace(state, extra={**state.extra, "history": sizes}))
        except Exception:
            shutil.rmtree(draft.path, ignore_errors=True)  # the next try may need its space
            raise

    def save_before_exit(self, state: TrainState, consistent: bool) -> None:
        """Save the state of a run that must end, unless the learner does not answer."""
        if not consistent or "the learner" in self.watchdog.waits_for:
            self.log.info("the state of the current step cannot be saved; the last checkpoint stands")
            return
        self.watchdog.reset()
        try:
            self.save(state)
        except Exception as error:
            self.log.info(f"the state could not be saved ({error}); the last checkpoint stands")
        else:
            self.log.info(f"saved checkpoint {state.step}; --resume goes on from there")

    def diverged(self, step: int) -> RuntimeError:
        """The error that ends a run before the weights of `step` are saved; it names the checkpoint that stands."""
        last = latest(self.folder.path)
        stands, anew = "there is no checkpoint", "run.overwrite=true"
        if last is not None:
            stands = f"checkpoint {last.path} stands"
            anew = f"student.path={last.path / 'student'}, another run.dir"
        return RuntimeError(
            f"step {step}: the weights diverged (not finite, or too large to compute with) and were not saved; {stands}"
            f"; start anew with {anew} and a smaller learner.lr or learner.grad_clip (--resume repeats the step)"
        )

    def export(self, name: str, card: str) -> None:
        """Write the student and its card into a partial folder, then rename it: no reader sees an incomplete one."""
        partial = self.folder.path / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.watchdog.wait_for(self.handles.learner.export(partial), "the learner to write the student")
        write_text_atomic(partial / CARD, card)
        replace_dir(partial, self.folder.path / name)

    def resume(self, checkpoint: Checkpoint) -> TrainState:
        """Load a checkpoint into actors that have just started."""
        self.started -= checkpoint.state.elapsed_s
        self.dispatcher.next_id = checkpoint.state.extra["num_started"]
        return self._load(checkpoint, keep_replay=False)

    def go_back(self, lost: StateLost, step: int) -> TrainState:
        """Restart the learner and load the last checkpoint (without one: the start). Living actors go on. Raises
        StateLost when another actor dies in between, RuntimeError beyond `run.max_restarts`."""
        self.restarts.begin(lost)
        started = time.monotonic()
        self.log.close()
        self.watchdog.wait_for(self.handles.learner.restart(), "the learner to start again")
        self.folder.check()
        flush = self.handles.replay.flush  # before the history is cut
        retry("writing trained rollouts", lambda: self.watchdog.wait_for(flush(), "the replay"), self.log.info)
        state = self._load(load_latest(self.folder.path), keep_replay=True)
        self.log.open(self.folder.path, self.schedule.num_steps, state)
        again = step - state.step
        self.log.info(
            f"back at step {state.step} after {time.monotonic() - started:.1f} s; "
            f"{again} step{'s are' if again != 1 else ' is'} trained again"
        )
        return state

    def _load(self, checkpoint: Checkpoint | None, *, keep_replay: bool) -> TrainState:
        """Load a checkpoint into learner, replay and dispatcher. A kept replay rewinds and gives each step the same
        rollouts again. A replay that died is filled from the checkpoint and from trained steps on disk; what it lacks
        is written again."""
        learner, replay, wait_for = self.handles.learner, self.handles.replay, self.watchdog.wait_for
        state = checkpoint.state if checkpoint else TrainState()
        if checkpoint:
            wait_for(learner.load(checkpoint.learner_folder, checkpoint.tag), "the learner to load its state")
        self.saved_step = state.step if checkpoint else -1
        if self.schedule.adaptive:
            self.schedule.adaptive.load_state_dict(state.extra.get("adaptive"))
        quarantine, num_started = self.dispatcher.quarantine, self.dispatcher.next_id
        quarantine.load_state_dict(state.extra)
        if not (keep_replay and wait_for(replay.rewind(state.step, num_started), "the replay to go back")):
            path = checkpoint.replay_file if checkpoint else None
            missing = wait_for(replay.restore(path, num_started), "the replay to load its state")
            self.dispatcher.reset(missing)
        wait_for(replay.quarantine(sorted(quarantine.ids)), "the replay")
        return state
