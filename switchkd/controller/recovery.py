"""Nothing is lost when a part dies: the run saves its state, and goes back to it.

In: the house, the run's folder. Out: checkpoints, whole or not at all; after a StateLost the state to go on from. What
fails is tried again, ever more slowly, and not for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from switchkd.config.errors import with_type
from switchkd.controller.checkpoint import RunFolder, TrainState
from switchkd.controller.dispatcher import TaskDispatcher
from switchkd.controller.handles import ActorHandles
from switchkd.controller.watchdog import Stalled, Watchdog
from switchkd.types import StateLost

RETRY_S = (1.0, 4.0, 16.0)
"""Pauses before each new try to write; after the last one the run ends."""
MAX_PAUSE_S = 60.0

T = TypeVar("T")


class RestartPolicy:
    """How often in a row, and how fast, a run goes back to the same checkpoint."""

    def __init__(self, limit: int, log: Callable[[str], None], sleep: Callable[[float], None] = time.sleep) -> None:
        self.limit, self._log, self._sleep = limit, log, sleep
        self.num = 0

    def begin(self, lost: StateLost) -> None:
        """Raises RuntimeError beyond the limit."""
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
        """A checkpoint further: the next loss is a new one."""
        self.num = 0


def retry(
    description: str,
    call: Callable[[], T],
    log: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Return the result of `call`, which may be repeated: a full disk may have room later. Raises its last error."""
    for pause in RETRY_S:
        try:
            return call()
        except (StateLost, Stalled):
            raise
        except Exception as error:
            log(f"warning: {description} failed ({with_type(error)}); trying again in {pause:g} s")
        sleep(pause)
    return call()


def save_checkpoint(
    handles: ActorHandles, folder: RunFolder, state: TrainState, watchdog: Watchdog, log: Callable[[str], None]
) -> None:
    """Learner, replay and counters, whole or not at all. Raises what the last try raised."""

    def attempt() -> None:
        folder.check()
        draft = folder.begin(state.step)
        try:
            watchdog.wait_for(handles.learner.save(draft.learner_folder, draft.tag), "the learner to save its state")
            watchdog.wait_for(handles.learner.export(draft.student_folder), "the learner to write the student")
            watchdog.wait_for(handles.replay.save(draft.replay_file, state.step), "the replay to save its state")
            folder.finish(draft, state)
        except Exception:
            folder.drop(draft)
            raise

    retry(f"saving checkpoint {state.step} under {folder.path}", attempt, log)
    watchdog.wait_for(handles.replay.release_before(state.step), "the replay")


def restore_last_checkpoint(
    handles: ActorHandles, folder: RunFolder, dispatcher: TaskDispatcher, watchdog: Watchdog
) -> TrainState:
    """A new gang, and the state of the last checkpoint everywhere (without one: of the start). A replay that lives
    keeps what was written, and gives each step since the same rollouts again; one that died is filled from the
    checkpoint. Raises StateLost when another part dies meanwhile."""
    watchdog.wait_for(handles.learner.restart(), "the learner to start again")
    checkpoint = folder.load_latest()
    state = checkpoint.state if checkpoint else TrainState()
    if checkpoint:
        watchdog.wait_for(
            handles.learner.load(checkpoint.learner_folder, checkpoint.tag), "the learner to load its state"
        )
    started = dispatcher.next_id
    if not watchdog.wait_for(handles.replay.rewind(state.step, started), "the replay to go back"):
        path = checkpoint.replay_file if checkpoint else None
        missing = watchdog.wait_for(handles.replay.restore(path, started), "the replay to load its state")
        dispatcher.reset(missing)
    dispatcher.quarantine.load_state_dict(state.extra, keep=True)
    watchdog.wait_for(handles.replay.quarantine(sorted(dispatcher.quarantine.ids)), "the replay")
    return state
