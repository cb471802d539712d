"""The processes that train() talks to, as promises: every handle answers with a `concurrent.futures.Future`.

`local.py` keeps them in this process, `actors/launch.py` on a Ray cluster; `train.py` cannot tell which.
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
    """How an actor is."""

    name: str
    progress_counter: int = 0  # grows while it gets on
    where: str = ""  # where its work is just now; empty: it has none
    stacks: str = ""  # of all its threads


class WorkerHandle(Protocol):
    """Weights None: whatever is loaded will do (at first the student's folder)."""

    def generate(self, tasks: list[RolloutTask], weights: WeightRef | None) -> Future[WorkReport]:
        """Write rollouts and put them into the replay. Safe to repeat."""

    def push_weights(self, weights: WeightRef) -> None:
        """Newer weights for the rollouts that are being written (`rollout.on_new_weights: reprefill`)."""

    def evaluate(self, shard: EvalShard, weights: WeightRef | None) -> Future[list[EvalRow]]: ...

    def back(self) -> Future[None]:
        """Done when a lost worker can work again."""


class ReplayHandle(Protocol):
    """Every call may be repeated. StateLost: it died and came back empty; `restore` it."""

    def take(self, step: int, num: int, version: int, stage: int) -> Future[list[Entry] | None]:
        """Lease one step's rollouts; None while they are not all there."""

    def draw(self, step: int, num: int, version: int) -> Future[list[Entry]]:
        """One step's rollouts out of those that were trained on before (`replay.policy: adaptive`)."""

    def commit(self, step: int, rollout_ids: list[int]) -> Future[None]:
        """They were trained on: write them to rollouts.jsonl and keep them until `release_before`."""

    def release_before(self, step: int) -> Future[None]: ...

    def save(self, path: Path, step: int) -> Future[None]:
        """What a run resumed at `step` needs."""

    def save_batch(self, path: Path, rollout_ids: list[int]) -> Future[None]:
        """These rollouts as a file, for `rollout_io.load_rollouts`: somebody wants to look at them."""

    def restore(self, path: Path | None, num_started: int) -> Future[list[int]]:
        """Become what `save` wrote (None: empty). Ids of the started rollouts that are to be made again."""

    def rewind(self, step: int, num_started: int) -> Future[bool]:
        """The learner went back to `step`: what was trained since waits again, for the same steps. False: too much of
        it is forgotten, or this replay is a new one; `restore` it."""

    def missing(self, num_started: int) -> Future[list[int]]:
        """Started rollouts that never arrived."""

    def quarantine(self, rollout_ids: list[int]) -> Future[None]:
        """They will never arrive."""

    def stats(self) -> Future[dict[str, float]]: ...


class LearnerHandle(Protocol):
    """StateLost: a rank died; nothing but `restart` helps, then `load`."""

    def step(self, assignment: BatchAssignment, lr: float) -> Future[StepResult]: ...

    def publish(self, version: int) -> Future[Any]:
        """Pack the weights once; the answer travels to the workers as `WeightRef.ref`."""

    def save(self, folder: Path, tag: str) -> Future[None]: ...

    def load(self, folder: Path, tag: str) -> Future[None]: ...

    def export(self, folder: Path) -> Future[None]:
        """An ordinary transformers folder, tokenizer included."""

    def restart(self) -> Future[None]:
        """End what is left of it and start it anew, with the student's first weights."""


Autoscale = Callable[[float, float], list[str]]
"""Called after each step with the seconds that the learner waited for rollouts and that the step took: lets pools grow
or shrink. What happened, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorHandles:
    workers: Sequence[WorkerHandle]  # may grow and shrink at its end, in `autoscale` only
    replay: ReplayHandle
    learner: LearnerHandle
    heartbeats: Callable[[], list[Heartbeat]]
    """Of every actor, whatever it is doing."""
    close: Callable[[], None]
    autoscale: Autoscale = field(default=lambda waited_s, elapsed_s: [])
