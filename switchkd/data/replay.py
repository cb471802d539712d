"""Rollouts wait here between the workers that make them and the learner that trains on them.

In: finished Rollouts, in any order, any number of times. Out: for each optimizer step its entries, leased until the
step is committed. A rollout is `waiting`, `leased`, `committed` (trained, kept until a checkpoint is durable, so that
a restarted learner can have it again) or `retired` (only its id is remembered). Plain Python, one thread.

A rollout's id is its position in the run's start order. The `capacity` earliest untrained ids have room, whether they
have arrived or not: the store is bounded, and the rollout that a step waits for is never refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from switchkd.data.reuse_buffer import Buffer
from switchkd.data.rollout_io import append_rows, load_replay_state, save_replay_state, save_rollouts, shard
from switchkd.types import Entry, ReplayFull, Rollout, TokenSource


class _Retired:
    """A set of ids that is dense at its lower end: every id below `floor`, and `above`."""

    def __init__(self, floor: int = 0, above: Iterable[int] = ()) -> None:
        self.floor, self.above = floor, set(above)

    def add(self, rollout_id: int) -> None:
        if rollout_id >= self.floor:
            self.above.add(rollout_id)
        while self.floor in self.above:
            self.above.remove(self.floor)
            self.floor += 1

    def __contains__(self, rollout_id: int) -> bool:
        return rollout_id < self.floor or rollout_id in self.above


@dataclass(frozen=True, slots=True)
class _Lease:
    rollout_ids: tuple[int, ...]
    deadline: float


class Replay:
    """The store. `policy` says which rollouts a step gets:

    `fifo`: exactly those of batch == step, sorted by id. Deterministic, staleness bounded by admission.
    `completion`: the first finished of the stage. Faster, leans to short answers, staleness unbounded.
    `uniform`: a sample of what is there, drawn from (seed, step); trained rollouts stay until newer ones push them out.
    """

    def __init__(
        self,
        *,
        capacity: int,
        policy: str = "fifo",
        lease_s: float = 3600.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity, self._policy, self._lease_s, self._seed, self._clock = capacity, policy, lease_s, seed, clock
        self._kept = policy == "uniform"  # trained rollouts may be drawn again
        self._rollouts: dict[int, Rollout] = {}  # in order of arrival
        self._waiting: set[int] = set()  # under `uniform`: whatever may be drawn, leased or not
        self._leases: dict[int, _Lease] = {}  # by step
        self._committed: dict[int, tuple[int, ...]] = {}  # by step
        self._again: dict[int, tuple[int, ...]] = {}  # by step: a rewound step gets the same rollouts
        self._retired = _Retired()
        self._room_below = 0
        self._durable_step = 0
        self._last_staleness: list[int] = []

    def put(self, rollouts: Sequence[Rollout]) -> list[int]:
        """Take in finished rollouts; return the ids that are new here. Putting one again changes nothing.

        Raises ReplayFull, after taking what has room.
        """
        self._expire()
        accepted: list[int] = []
        refused: list[int] = []
        for rollout in sorted(rollouts, key=lambda rollout: rollout.rollout_id):
            rollout_id = rollout.rollout_id
            if rollout_id in self._rollouts or rollout_id in self._retired:
                continue
            if not self._make_room(rollout_id):
                refused.append(rollout_id)
                continue
            self._rollouts[rollout_id] = rollout
            self._waiting.add(rollout_id)
            accepted.append(rollout_id)
        if refused:
            raise ReplayFull(accepted, refused, self._capacity)
        return accepted

    def take(self, step: int, num: int, version: int, stage: int) -> list[Entry] | None:
        """Lease `num` rollouts to a step and return their entries, sorted by id; None when they are not there yet.

        Asked again for the same step, it gives the same rollouts and a new lease. `version` is the learner's weight
        version; `stats` reports its distance to each rollout's oldest token.
        """
        self._expire()
        if step in self._committed:
            raise ValueError(f"step {step} is committed; rewind({step}) before taking it again")
        lease = self._leases.get(step)
        rollout_ids = lease.rollout_ids if lease else self._choose(step, num, stage)
        if rollout_ids is None:
            return None
        self._leases[step] = _Lease(rollout_ids, self._clock() + self._lease_s)
        if not self._kept:
            self._waiting.difference_update(rollout_ids)
        taken = self.fetch(rollout_ids)
        self._last_staleness = [version - rollout.oldest_version for rollout in taken]
        return [entry_of(rollout) for rollout in taken]

    def fetch(self, rollout_ids: Sequence[int]) -> list[Rollout]:
        """The rollouts themselves, in the order asked for. KeyError for one that is not here."""
        missing = [rollout_id for rollout_id in rollout_ids if rollout_id not in self._rollouts]
        if missing:
            raise KeyError(f"rollouts {missing} are not in replay (never put, or trained and retired)")
        return [self._rollouts[rollout_id] for rollout_id in rollout_ids]

    def commit(self, step: int, rollout_ids: Sequence[int]) -> bool:
        """The step is trained on all that it took. A repeated commit changes nothing and answers False.

        It may come after the lease ran out, unless another step was given the rollouts meanwhile (ValueError).
        """
        ids = tuple(sorted(rollout_ids))
        if step < self._durable_step or self._committed.get(step) == ids:
            return False
        lease = self._leases.get(step)
        if step in self._committed or (lease and lease.rollout_ids != ids):
            raise ValueError(f"step {step} took other rollouts than the {len(ids)} to be committed")
        self.fetch(ids)
        if not (lease or self._kept or self._waiting.issuperset(ids)):
            raise ValueError(f"step {step}: its lease ran out and another step has its rollouts; raise replay.lease_s")
        self._leases.pop(step, None)
        self._again.pop(step, None)
        self._committed[step] = ids
        if not self._kept:
            self._waiting.difference_update(ids)
        return True

    def trained(self, step: int) -> bool:
        return step in self._committed or step < self._durable_step

    @property
    def durable_step(self) -> int:
        """What was trained before it is forgotten."""
        return self._durable_step

    def release_before(self, step: int) -> None:
        """A checkpoint that begins with `step` is safe: rollouts trained in earlier steps are forgotten."""
        self._durable_step = max(self._durable_step, step)
        for done in [done for done in self._committed if done < step]:
            for rollout_id in self._committed.pop(done):
                if not self._kept:
                    self._retired.add(rollout_id)
        self._drop_unused()

    def rewind(self, step: int) -> list[int]:
        """The learner went back to its checkpoint: what was leased to or trained in steps >= `step` waits again.

        Those steps will be given the same rollouts. Returns the ids of the rollouts that were trained already.
        """
        if step < self._durable_step:
            raise ValueError(f"rewind to step {step}: what was trained before step {self._durable_step} is forgotten")
        for leased in [leased for leased in self._leases if leased >= step]:
            self._give_back(self._leases.pop(leased).rollout_ids)
        trained = {done: self._committed.pop(done) for done in list(self._committed) if done >= step}
        self._again.update(trained)
        back = [rollout_id for ids in trained.values() for rollout_id in ids]
        self._give_back(back)
        return sorted(set(back))

    def make_room(self, num_started: int) -> None:
        """The learner went back: what was started before keeps its room, though less is trained now."""
        self._room_below = max(self._room_below, num_started)

    def quarantine(self, rollout_ids: Iterable[int]) -> None:
        """These will never arrive, and are missed by nobody."""
        for rollout_id in rollout_ids:
            if rollout_id not in self._rollouts:
                self._retired.add(rollout_id)

    def missing(self, num_started: int) -> list[int]:
        """Started ids that never arrived: what a resumed run has to make again."""
        ids = range(self._retired.floor, num_started)
        return [i for i in ids if i not in self._rollouts and i not in self._retired]

    def state(self, step: int = 0) -> dict[str, Any]:
        """All that `restore` needs: "rollouts" and, in plain JSON values, who is where. Leased ones count as waiting.

        A checkpoint that begins with `step` needs nothing that was trained before: it is left out.
        """
        committed = {done: ids for done, ids in self._committed.items() if done >= step}
        retired = _Retired(self._retired.floor, self._retired.above)
        for done, ids in self._committed.items():
            for rollout_id in () if done >= step or self._kept else ids:
                retired.add(rollout_id)
        again = {done: ids for done, ids in self._again.items() if done >= step}
        held = self._waiting.union(self._leased(), *committed.values(), *again.values())
        return {
            "rollouts": [rollout for rollout_id, rollout in self._rollouts.items() if rollout_id in held],
            "committed": sorted([done, list(ids)] for done, ids in committed.items()),
            "again": sorted([done, list(ids)] for done, ids in again.items()),
            "drawable": sorted(self._waiting) if self._kept else [],
            "retired_below": retired.floor,
            "retired": sorted(retired.above),
            "durable_step": max(step, self._durable_step),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` described, whatever was here before."""
        self._rollouts = {rollout.rollout_id: rollout for rollout in state["rollouts"]}
        self._committed = {done: tuple(ids) for done, ids in state["committed"]}
        self._again = {done: tuple(ids) for done, ids in state["again"]}
        self._leases = {}
        self._retired = _Retired(state["retired_below"], state["retired"])
        self._durable_step = state["durable_step"]
        trained = {rollout_id for ids in self._committed.values() for rollout_id in ids}
        self._waiting = set(state["drawable"]) if self._kept else set(self._rollouts) - trained
        self._last_staleness = []

    def stats(self) -> dict[str, float]:
        """Counts, bytes held, the oldest version that still waits, and the staleness of what was taken last."""
        self._expire()
        leased = self._leased()
        waiting = self._waiting - leased
        stale = self._last_staleness
        return {
            "num_waiting": len(waiting),
            "num_leased": len(leased),
            "num_committed": sum(len(ids) for ids in self._committed.values()),
            "bytes": sum(_num_bytes(rollout) for rollout in self._rollouts.values()),
            "oldest_version": min((self._rollouts[i].oldest_version for i in waiting), default=math.nan),
            "mean_staleness": sum(stale) / len(stale) if stale else math.nan,
            "max_staleness": max(stale, default=math.nan),
        }

    def _choose(self, step: int, num: int, stage: int) -> tuple[int, ...] | None:
        """Sorted ids for a step, or None when too few are there."""
        if step in self._again:
            return self._again[step]
        if self._policy == "fifo":
            own = sorted(i for i in self._waiting if self._rollouts[i].batch == step)
            if len(own) > num:
                raise ValueError(f"step {step} asks for {num} rollouts but {len(own)} were started for it")
            return tuple(own) if len(own) == num else None
        promised = set() if self._kept else {i for ids in self._again.values() for i in ids}
        pool = [i for i, r in self._rollouts.items() if i in self._waiting and r.stage == stage and i not in promised]
        if len(pool) < num:
            return None
        if self._policy == "first_finished":
            return tuple(sorted(pool[:num]))
        drawn = np.random.default_rng((self._seed, step)).choice(sorted(pool), size=num, replace=False)
        return tuple(sorted(drawn.tolist()))

    def _make_room(self, rollout_id: int) -> bool:
        if self._kept:
            return self._evict_oldest()
        if rollout_id < max(self._room_below, self._retired.floor + self._capacity):
            return True
        trained_before = self._retired.floor + sum(i < rollout_id for i in self._retired.above)
        trained_before += sum(i < rollout_id for ids in self._committed.values() for i in ids)
        return rollout_id - trained_before < self._capacity

    def _evict_oldest(self) -> bool:
        if len(self._waiting) < self._capacity:
            return True
        if not (free := self._waiting - self._leased()):
            return False
        self._waiting.remove(min(free))
        self._retired.add(min(free))
        self._drop_unused()
        return True

    def _expire(self) -> None:
        now = self._clock()
        for step in [step for step, lease in self._leases.items() if lease.deadline <= now]:
            self._give_back(self._leases.pop(step).rollout_ids)

    def _give_back(self, rollout_ids: Iterable[int]) -> None:
        if not self._kept:  # else they never left, or were pushed out meanwhile
            self._waiting.update(rollout_ids)

    def _leased(self) -> set[int]:
        return {rollout_id for lease in self._leases.values() for rollout_id in lease.rollout_ids}

    def _drop_unused(self) -> None:
        used = self._waiting.union(self._leased(), *self._committed.values(), *self._again.values())
        self._rollouts = {rollout_id: rollout for rollout_id, rollout in self._rollouts.items() if rollout_id in used}


def allowed_until(version: int, max_staleness: int, batch_ends: Sequence[int]) -> int:
    """Rollouts with an id below this number may be started: all that steps <= version + max_staleness will train on.

    `batch_ends[s]` is how many rollouts steps 0..s train on together. A rollout started by this rule and trained in
    its own step, at weight version == step, lags at most `max_staleness` behind.
    """
    if not batch_ends:
        return 0
    return batch_ends[min(version + max_staleness, len(batch_ends) - 1)]


def entry_of(rollout: Rollout) -> Entry:
    return Entry(
        rollout_id=rollout.rollout_id,
        batch=rollout.batch,
        stage=rollout.stage,
        completion_source=rollout.completion_source,
        num_tokens=rollout.num_tokens,
        num_teacher_tokens=int((rollout.sources == TokenSource.TEACHER).sum()),
        oldest_version=rollout.oldest_version,
        repeat_frac=rollout.repeat_frac,
        divergence_mean=rollout.divergence_mean,
        finish_reason=rollout.finish_reason,
        uncertainty=rollout.uncertainty,
    )


def _num_bytes(rollout: Rollout) -> int:
    arrays = (getattr(rollout, field.name) for field in fields(rollout))
    own = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    return own + (rollout.teacher_output.nbytes if rollout.teacher_output is not None else 0)


EMPTY: dict[str, Any] = {
    "rollouts": [], "buffer": [], "committed": [], "again": [], "drawable": [], "retired_below": 0, "retired": [],
    "durable_step": 0,
}  # fmt: skip
"""The state of a store that has seen nothing."""


class ReplayService:
    """`rollouts_file` and `signal_dir`: what was trained on goes there, as lines and with the teacher's signal. With a
    `buffer` it can be drawn again."""

    def __init__(
        self,
        replay: Replay,
        rollouts_file: Path | None,
        decode: Callable[[Sequence[int]], str],
        teacher_output_dir: Path | None = None,
        buffer: Buffer | None = None,
    ) -> None:
        self.replay = replay
        self.rollouts_file = rollouts_file
        self.decode = decode
        self.teacher_output_dir = teacher_output_dir
        self.buffer = buffer

    def put(self, rollouts: Sequence[Rollout]) -> list[int]:
        return self.replay.put(rollouts)

    def fetch(self, rollout_ids: Sequence[int]) -> list[Rollout]:
        if self.buffer is not None and self.buffer.holds(rollout_ids):
            return self.buffer.fetch(rollout_ids)
        return self.replay.fetch(rollout_ids)

    def take(self, step: int, num: int, version: int, stage: int) -> list[Entry] | None:
        return self.replay.take(step, num, version, stage)

    def draw(self, step: int, num: int, version: int) -> list[Entry]:
        """Of what earlier steps were trained on, for another time."""
        assert self.buffer is not None, "only replay.policy=adaptive draws"
        return [entry_of(rollout) for rollout in self.buffer.draw(step, num)]

    def commit(self, step: int, rollout_ids: Sequence[int]) -> None:
        """The step is trained: one line per rollout, then the store lets them rest until a checkpoint is durable.
        Raises OSError, and can be repeated, where the lines could not be written."""
        if self.replay.trained(step):
            return
        drawn = self.buffer is not None and self.buffer.holds(rollout_ids)
        rollouts = self.fetch(rollout_ids)
        if self.rollouts_file is not None:
            append_rows(self.rollouts_file, rollouts, self.decode, step)
        if self.teacher_output_dir is not None:
            save_rollouts(shard(self.teacher_output_dir, step), rollouts)
        self.replay.commit(step, [] if drawn else rollout_ids)
        if self.buffer is not None:
            self.buffer.add(step, rollouts)

    def release_before(self, step: int) -> None:
        self.replay.release_before(step)
        if self.buffer is not None:
            self.buffer.release_before(step)

    def save(self, path: Path, step: int) -> None:
        """What a run resumed at `step` needs."""
        state = self.replay.state(step)
        if self.buffer is not None:
            kept = self.buffer.state(step)
            state |= {"rollouts": [*state["rollouts"], *kept["rollouts"]], "buffer": kept["buffer"]}
        save_replay_state(path, state)

    def save_batch(self, path: Path, rollout_ids: Sequence[int]) -> None:
        save_rollouts(path, self.fetch(rollout_ids))

    def restore(self, path: Path | None, num_started: int) -> list[int]:
        """Take over a checkpoint's state (None: of the start); of the rollouts 0 to num_started - 1, those to be made
        again."""
        state = load_replay_state(path) if path else EMPTY
        waiting = state["rollouts"] if self.buffer is None else self.buffer.restore(state)
        self.replay.restore({**state, "rollouts": waiting})
        self.replay.make_room(num_started)
        return self.replay.missing(num_started)

    def rewind(self, step: int, num_started: int) -> bool:
        if step < self.replay.durable_step:
            return False
        self.replay.rewind(step)
        if self.buffer is not None:
            self.buffer.rewind(step)
        self.replay.make_room(num_started)
        return True

    def missing(self, num_started: int) -> list[int]:
        return self.replay.missing(num_started)

    def quarantine(self, rollout_ids: Sequence[int]) -> None:
        self.replay.quarantine(rollout_ids)

    def stats(self) -> dict[str, float]:
        return {**self.replay.stats(), **({} if self.buffer is None else {"num_buffered": len(self.buffer)})}
