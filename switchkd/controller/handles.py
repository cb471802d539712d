"""The loop's view of the actors: every method of a handle returns a `concurrent.futures.Future`.

`local.py` implements the handles in this process, `actors/launch.py` on a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from switchkd.types import BatchAssignment, Entry, EvalRow, EvalShard, RolloutTask, StepResult, WeightRef, WorkReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """The state of an actor."""

    name: str
    progress_counter: int = 0  # grows while the actor makes progress
    where: str = ""  # where its current call is; empty without one
    stacks: str = ""  # of all its threads


class WorkerHandle(Protocol):
    """A rollout worker. With weights None it keeps those that it has (at first the student's folder)."""

    def generate(self, tasks: list[RolloutTask], weights: WeightRef | None) -> Future[WorkReport]:
        """Write rollouts and put them into the replay. Safe to repeat."""

    def push_weights(self, weights: WeightRef) -> None:
        """Send newer weights for the rollouts in flight (`rollout.on_new_weights: reprefill`)."""

    def evaluate(self, shard: EvalShard, weights: WeightRef | None) -> Future[list[EvalRow]]: ...

    def back(self) -> Future[None]:
        """Wait until a lost worker can work again."""


class ReplayHandle(Protocol):
    """The replay. Every call may be repeated. StateLost: it died and restarted empty; `restore` it."""

    def take(self, step: int, num: int, version: int, stage: int) -> Future[list[Entry] | None]:
        """Lease a step's rollouts; None while some are missing."""

    def draw(self, step: int, num: int, version: int) -> Future[list[Entry]]:
        """Draw a step's rollouts from those that were trained on before (`replay.policy: adaptive`)."""

    def commit(self, step: int, rollout_ids: list[int]) -> Future[None]:
        """Begin to write trained rollouts, which can be taken again until `release_before`. OSError: those of the step
        before could not be written; commit again."""

    def flush(self) -> Future[None]:
        """Wait until the rollouts of all committed steps are written."""

    def release_before(self, step: int) -> Future[None]: ...

    def save(self, path: Path, step: int) -> Future[None]:
        """Write the state that a run resumed at `step` needs, after `flush`."""

    def save_batch(self, path: Path, rollout_ids: list[int]) -> Future[None]:
        """Write these rollouts for inspection (`rollout_io.load_rollouts`)."""

    def restore(self, path: Path | None, num_started: int) -> Future[list[int]]:
        """Load what `save` wrote (None: empty). Returns the started ids that must be generated again."""

    def rewind(self, step: int, num_started: int) -> Future[bool]:
        """Let rollouts that were trained from `step` on wait again, for the same steps. False: some are forgotten, or
        this replay is new; `restore` it, which also reads those that are on disk."""

    def missing(self, num_started: int) -> Future[list[int]]:
        """Ids of started rollouts that never arrived."""

    def quarantine(self, rollout_ids: list[int]) -> Future[None]:
        """Mark rollouts that will never arrive."""

    def stats(self) -> Future[dict[str, float]]: ...


class LearnerHandle(Protocol):
    """The learner. StateLost: a rank died; call `restart`, then `load`."""

    def step(self, assignment: BatchAssignment, lr: float) -> Future[StepResult]: ...

    def publish(self, version: int) -> Future[Any]:
        """Pack the weights once. The result goes to the workers as `WeightRef.ref`."""

    def save(self, folder: Path, tag: str) -> Future[None]: ...

    def load(self, folder: Path, tag: str) -> Future[None]: ...

    def export(self, folder: Path) -> Future[None]:
        """Write a transformers folder, tokenizer included."""

    def restart(self) -> Future[None]:
        """End all ranks and start new ones, with the student's initial weights."""


Autoscale = Callable[[float, float], list[str]]
"""(Seconds that the learner waited for rollouts, seconds of the step) -> messages. Lets pools grow or shrink."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorHandles:
    workers: Sequence[WorkerHandle]  # may grow and shrink at its end, in `autoscale` only
    replay: ReplayHandle
    learner: LearnerHandle
    heartbeats: Callable[[], list[Heartbeat]]  # of every actor, also during a call
    close: Callable[[], None]
    autoscale: Autoscale = field(default=lambda waited_s, elapsed_s: [])
