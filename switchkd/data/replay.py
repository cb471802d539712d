"""Stores rollouts between the workers that generate them and the learner that trains on them.

In: finished Rollouts, in any order, any number of times. Out: for each optimizer step its entries, leased until the
step is committed, and the state that a checkpoint needs. A rollout is `waiting`, `leased`, `committed` (trained, and
on disk for a restarted learner until a checkpoint is durable) or `retired` (only its id is kept). In memory are the
waiting and leased ones, at most `capacity`, and the last trained step. Plain Python, one thread (`data/trained.py` has
its own).

A rollout's id is its position in the run's start order. The `capacity` earliest untrained ids are accepted, whether
they have arrived or not: the store is bounded, and the rollout that a step waits for is never refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from switchkd.data.reuse_buffer import ReuseBuffer
from switchkd.data.rollout_io import load_replay_state, save_replay_state, save_rollouts
from switchkd.data.trained import TrainedRollouts
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


EMPTY: dict[str, Any] = {
    "rollouts": [],
    "buffer": [],
    "committed": [],
    "again": [],
    "retired_below": 0,
    "retired": [],
    "durable_step": 0,
}
"""The state of a store that has received nothing."""


class Replay:
    """The store. `policy` says which rollouts a step gets:

    `fifo`: exactly those of batch == step, sorted by id. Deterministic, staleness bounded by admission.
    `first_finished`: the first finished of the stage. Faster, biased to short completions, staleness unbounded.

    Trained rollouts go to `trained`. With a `buffer` later steps can draw them again.
    """

    def __init__(
        self,
        *,
        capacity: int,
        policy: str = "fifo",
        lease_s: float = 3600.0,
        trained: TrainedRollouts | None = None,
        buffer: ReuseBuffer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._policy = policy
        self._lease_s = lease_s
        self._trained = trained or TrainedRollouts()
        self._buffer = buffer
        self._clock = clock
        self.num_put = 0
        self.load_state_dict(EMPTY)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state by one of `state_dict`."""
        rollouts = state["rollouts"] if self._buffer is None else self._buffer.load_state_dict(state)
        # in memory, in order of arrival
        self._rollouts: dict[int, Rollout] = {rollout.rollout_id: rollout for rollout in rollouts}
        self._entries: dict[int, Entry] = {}  # of those that were put: `take` answers while the writer needs the lock
        self._on_disk: dict[int, int] = {}  # step that trained on it, by rollout id
        self._leases: dict[int, _Lease] = {}  # by step
        self._committed: dict[int, tuple[int, ...]] = {done: tuple(ids) for done, ids in state["committed"]}
        # by step; a rewound step gets the same rollouts
        self._again: dict[int, tuple[int, ...]] = {done: tuple(ids) for done, ids in state["again"]}
        self._waiting: set[int] = set(self._rollouts).difference(*self._committed.values())
        self._retired = _Retired(state["retired_below"], state["retired"])
        self._accepted_below = 0  # ids that are accepted whatever the capacity
        self._durable_step: int = state["durable_step"]
        self._last_staleness: list[int] = []

    def put(self, rollouts: Sequence[Rollout]) -> list[int]:
        """Store finished rollouts; return the ids that are new. Putting one again changes nothing. Raises ReplayFull,
        after storing those that fit."""
        self._expire()
        accepted: list[int] = []
        refused: list[int] = []
        for rollout in sorted(rollouts, key=lambda rollout: rollout.rollout_id):
            rollout_id = rollout.rollout_id
            if self._arrived(rollout_id) or rollout_id in self._retired:
                continue
            if not self._fits(rollout_id):
                refused.append(rollout_id)
                continue
            self._rollouts[rollout_id] = rollout
            self._entries[rollout_id] = entry_of(rollout)
            self._waiting.add(rollout_id)
            accepted.append(rollout_id)
        self.num_put += len(accepted)
        if refused:
            raise ReplayFull(accepted, refused, self._capacity)
        return accepted

    def take(self, step: int, num: int, version: int, stage: int) -> list[Entry] | None:
        """Lease `num` rollouts to a step and return their entries, sorted by id; None while some are missing. A
        repeated call for the same step returns the same rollouts and renews the lease.

        `version` is the learner's weight version; `stats` reports its distance to each rollout's oldest token.
        """
        self._expire()
        if step in self._committed:
            raise ValueError(f"step {step} is committed; rewind({step}) before taking it again")
        lease = self._leases.get(step)
        rollout_ids = lease.rollout_ids if lease else self._choose(step, num, stage)
        if rollout_ids is None:
            return None
        self._leases[step] = _Lease(rollout_ids, self._clock() + self._lease_s)
        self._waiting.difference_update(rollout_ids)
        rollouts = self.fetch(rollout_ids)
        self._rollouts.update((rollout.rollout_id, rollout) for rollout in rollouts)
        entries = [self._entries.get(rollout.rollout_id) or entry_of(rollout) for rollout in rollouts]
        self._last_staleness = [version - entry.oldest_version for entry in entries]
        return entries

    def draw(self, step: int, num: int, version: int) -> list[Entry]:
        """Draw `num` rollouts that earlier steps trained on (`replay.policy: adaptive`)."""
        assert self._buffer is not None, "only replay.policy=adaptive draws"
        return [entry_of(rollout) for rollout in self._buffer.draw(step, num)]

    def fetch(self, rollout_ids: Sequence[int]) -> list[Rollout]:
        """Return the rollouts in the order of the ids. Raises KeyError for one that is not stored."""
        if self._buffer is not None and self._buffer.holds(rollout_ids):
            return self._buffer.fetch(rollout_ids)
        if missing := [rollout_id for rollout_id in rollout_ids if not self._arrived(rollout_id)]:
            raise KeyError(f"rollouts {missing} are not in replay (never put, or trained and retired)")
        read = self._trained.load({i: self._on_disk[i] for i in rollout_ids if i not in self._rollouts})
        return [read[i] if i in read else self._rollouts[i] for i in rollout_ids]

    def commit(self, step: int, rollout_ids: Sequence[int]) -> bool:
        """Mark a step's rollouts as trained and begin to write them. A repeated commit changes nothing and returns
        False.

        It may come after the lease ran out, unless another step got the rollouts in between (ValueError). It can be
        repeated where those of the step before could not be written (OSError).
        """
        if step < self._durable_step or step in self._committed:
            return False
        drawn = self._buffer is not None and self._buffer.holds(rollout_ids)
        ids = () if drawn else tuple(sorted(rollout_ids))
        lease = self._leases.get(step)
        if lease and lease.rollout_ids != ids:
            raise ValueError(f"step {step} took other rollouts than the {len(ids)} to be committed")
        rollouts = self.fetch(rollout_ids)
        if not (lease or self._waiting.issuperset(ids)):
            raise ValueError(f"step {step}: its lease ran out and another step has its rollouts; raise replay.lease_s")
        self._trained.add(step, rollouts)
        self._leases.pop(step, None)
        self._again.pop(step, None)
        self._committed[step] = ids
        self._waiting.difference_update(ids)
        for rollout_id in ids:
            self._on_disk[rollout_id] = step
            self._rollouts.pop(rollout_id, None)
            self._entries.pop(rollout_id, None)
        if self._buffer is not None:
            self._buffer.add(step, rollouts)
        return True

    def release_before(self, step: int) -> None:
        """Forget rollouts trained before `step`, from which a durable checkpoint goes on."""
        self._durable_step = max(self._durable_step, step)
        if self._buffer is not None:
            self._buffer.release_before(step)
        released = [done for done in self._committed if done < step]
        for rollout_id in chain.from_iterable(self._committed.pop(done) for done in released):
            self._retired.add(rollout_id)
            self._rollouts.pop(rollout_id, None)
            self._on_disk.pop(rollout_id, None)
        self._trained.release(released)

    def flush(self) -> None:
        """Wait until the rollouts of all committed steps are written. Raises OSError."""
        self._trained.flush()

    def close(self) -> None:
        """Write what is not written yet. No step can be committed any more."""
        self._trained.close()

    def rewind(self, step: int, num_started: int) -> bool:
        """Go back to `step` with the learner: rollouts leased to or trained in steps >= `step` wait again, for the same
        steps. The `num_started` started ones still fit, though fewer are trained now. Returns False where some of these
        rollouts are forgotten already."""
        again = {done: ids for done, ids in self._committed.items() if done >= step}
        read_again = {self._on_disk[i] for ids in again.values() for i in ids if i not in self._rollouts}
        if step < self._durable_step or not all(map(self._trained.holds, read_again)):
            return False
        for leased in [leased for leased in self._leases if leased >= step]:
            self._waiting.update(self._leases.pop(leased).rollout_ids)
        for done, ids in again.items():
            del self._committed[done]
            self._again[done] = ids
            self._waiting.update(ids)
        if self._buffer is not None:
            self._buffer.rewind(step)
        self._accepted_below = num_started
        return True

    def quarantine(self, rollout_ids: Iterable[int]) -> None:
        """Mark rollouts that will never arrive, so that they are not missing."""
        for rollout_id in rollout_ids:
            if not self._arrived(rollout_id):
                self._retired.add(rollout_id)

    def missing(self, num_started: int) -> list[int]:
        """Started ids that never arrived, which a resumed run must generate again."""
        ids = range(self._retired.floor, num_started)
        return [i for i in ids if not self._arrived(i) and i not in self._retired]

    def save(self, path: Path, step: int) -> None:
        """Write the state that a run resumed at `step` needs, once all lines of the steps before are written."""
        self.flush()
        save_replay_state(path, self.state_dict(step))

    def save_batch(self, path: Path, rollout_ids: Sequence[int]) -> None:
        """Write these rollouts, for `rollout_io.load_rollouts`."""
        save_rollouts(path, self.fetch(rollout_ids))

    def restore(self, path: Path | None, num_started: int) -> list[int]:
        """Load what `save` wrote (None: the start); steps after it whose rollouts are on disk get those. Returns those
        of the `num_started` started ids that must be generated again."""
        self.load_state_dict(load_replay_state(path) if path else EMPTY)
        if num_started and self._buffer is None:  # with a buffer a step's file may hold rollouts of earlier steps
            for done, ids in self._trained.find(self._durable_step).items():
                self._again[done] = ids
                self._waiting.update(ids)
                self._on_disk.update(dict.fromkeys(ids, done))
        self._accepted_below = num_started
        return self.missing(num_started)

    def state_dict(self, step: int = 0) -> dict[str, Any]:
        """Return the state for `load_state_dict`: "rollouts" and, in plain JSON values, their states. Leased rollouts
        count as waiting; those trained before `step` are left out."""
        committed = {done: ids for done, ids in self._committed.items() if done >= step}
        retired = _Retired(self._retired.floor, self._retired.above)
        for done, ids in self._committed.items():
            for rollout_id in () if done >= step else ids:
                retired.add(rollout_id)
        again = {done: ids for done, ids in self._again.items() if done >= step}
        needed = self._waiting.union(self._leased(), *committed.values(), *again.values())
        buffered = {"rollouts": [], "buffer": []} if self._buffer is None else self._buffer.state_dict(step)
        in_memory = [rollout for rollout_id, rollout in self._rollouts.items() if rollout_id in needed]
        read = self.fetch(sorted(needed.difference(self._rollouts)))
        return {
            "rollouts": [*in_memory, *read, *buffered["rollouts"]],
            "buffer": buffered["buffer"],
            "committed": sorted([done, list(ids)] for done, ids in committed.items()),
            "again": sorted([done, list(ids)] for done, ids in again.items()),
            "retired_below": retired.floor,
            "retired": sorted(retired.above),
            "durable_step": max(step, self._durable_step),
        }

    def stats(self) -> dict[str, float]:
        """Counts, bytes in memory, the oldest version in memory that waits, and the staleness of the rollouts taken
        last."""
        self._expire()
        waiting = self._waiting - self._leased()
        stale = self._last_staleness
        buffered = () if self._buffer is None else self._buffer.in_memory
        in_memory = {id(one): one for one in chain(self._rollouts.values(), self._trained.last, buffered)}
        return {
            "num_waiting": len(waiting),
            "num_leased": len(self._leased()),
            "num_committed": sum(len(ids) for ids in self._committed.values()),
            "bytes": sum(_num_bytes(rollout) for rollout in in_memory.values()),
            "oldest_version": min(
                (self._rollouts[i].oldest_version for i in waiting if i in self._rollouts), default=math.nan
            ),
            "mean_staleness": sum(stale) / len(stale) if stale else math.nan,
            "max_staleness": max(stale, default=math.nan),
            **({} if self._buffer is None else {"num_buffered": len(self._buffer)}),
        }

    def _choose(self, step: int, num: int, stage: int) -> tuple[int, ...] | None:
        """Sorted ids for a step, or None where there are too few."""
        if step in self._again:
            return self._again[step]
        if self._policy == "fifo":
            batch = sorted(i for i in self._waiting if i in self._rollouts and self._rollouts[i].batch == step)
            if len(batch) > num:
                raise ValueError(f"step {step} asks for {num} rollouts but {len(batch)} were started for it")
            return tuple(batch) if len(batch) == num else None
        free = self._waiting.difference(*self._again.values())
        pool = [i for i, rollout in self._rollouts.items() if i in free and rollout.stage == stage]
        return tuple(sorted(pool[:num])) if len(pool) >= num else None

    def _arrived(self, rollout_id: int) -> bool:
        return rollout_id in self._rollouts or rollout_id in self._on_disk

    def _fits(self, rollout_id: int) -> bool:
        if rollout_id < max(self._accepted_below, self._retired.floor + self._capacity):
            return True
        trained_before = self._retired.floor + sum(i < rollout_id for i in self._retired.above)
        trained_before += sum(i < rollout_id for ids in self._committed.values() for i in ids)
        return rollout_id - trained_before < self._capacity

    def _expire(self) -> None:
        now = self._clock()
        for step in [step for step, lease in self._leases.items() if lease.deadline <= now]:
            self._waiting.update(self._leases.pop(step).rollout_ids)

    def _leased(self) -> set[int]:
        return {rollout_id for lease in self._leases.values() for rollout_id in lease.rollout_ids}


def entry_of(rollout: Rollout) -> Entry:
    finite = rollout.statistic[np.isfinite(rollout.statistic)]
    return Entry(
        rollout_id=rollout.rollout_id,
        batch=rollout.batch,
        stage=rollout.stage,
        completion_source=rollout.completion_source,
        num_tokens=rollout.num_tokens,
        num_teacher_tokens=int((rollout.sources == TokenSource.TEACHER).sum()),
        oldest_version=rollout.oldest_version,
        repeat_frac=rollout.repeat_frac,
        divergence_mean=float(finite.mean(dtype=np.float64)) if len(finite) else math.nan,
        finish_reason=rollout.finish_reason,
        uncertainty=rollout.uncertainty,
    )


def _num_bytes(rollout: Rollout) -> int:
    top = () if rollout.top_logprobs is None else (rollout.top_logprobs,)
    values = (getattr(record, field.name) for record in (rollout, *top) for field in fields(record))
    num = sum(array.nbytes for array in values if isinstance(array, np.ndarray))
    return num + (rollout.teacher_output.nbytes if rollout.teacher_output is not None else 0)
