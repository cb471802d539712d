"""Keeps trained rollouts to train on them again (`replay.policy: adaptive`).

In: the rollouts of each trained step. Out: for a step that draws from the buffer, a sample of the last `capacity`
rollouts of the student, a function of (seed, step, rollouts trained before). Plain Python, one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from switchkd.algo.noise import Purpose, noise_bits
from switchkd.types import CompletionSource, Rollout


class ReuseBuffer:
    """A FIFO buffer. In memory are the rollouts that the step after the last durable checkpoint may draw. Those that
    later steps trained on are read with `load`, which gets the step by rollout id, when a step draws them."""

    def __init__(self, capacity: int, seed: int, load: Callable[[Mapping[int, int]], dict[int, Rollout]]) -> None:
        self._capacity, self._seed, self._load = capacity, seed, load
        self._held: dict[int, Rollout] = {}
        self._drawn: dict[int, Rollout] = {}  # by the last draw
        self._added: dict[int, int] = {}  # step that first trained on it, by rollout id; in order

    def __len__(self) -> int:
        return min(len(self._added), self._capacity)

    @property
    def in_memory(self) -> list[Rollout]:
        return [*self._held.values(), *self._drawn.values()]

    def add(self, step: int, rollouts: Iterable[Rollout]) -> None:
        """Add a trained step's rollouts, without those that the data set or the teacher alone wrote."""
        for rollout in sorted(rollouts, key=lambda rollout: rollout.rollout_id):
            if rollout.completion_source == CompletionSource.ROLLOUT:
                self._added.setdefault(rollout.rollout_id, step)

    def draw(self, step: int, num: int) -> list[Rollout]:
        """Draw `num` different rollouts (fewer where it holds fewer), sorted by id; the same at every call."""
        ids = self._as_of(step)
        words = noise_bits(self._seed, step, 0, Purpose.REUSE, len(ids))
        places = np.argsort(words, kind="stable")[:num]
        drawn = self.fetch(sorted(ids[place] for place in places.tolist()))
        self._drawn = {rollout.rollout_id: rollout for rollout in drawn}
        return drawn

    def holds(self, rollout_ids: Sequence[int]) -> bool:
        """Whether the buffer holds all of them."""
        return all(rollout_id in self._added for rollout_id in rollout_ids)

    def fetch(self, rollout_ids: Sequence[int]) -> list[Rollout]:
        found = {**self._held, **self._drawn}
        found.update(self._load({i: self._added[i] for i in rollout_ids if i not in found}))
        return [found[rollout_id] for rollout_id in rollout_ids]

    def release_before(self, step: int) -> None:
        """Forget rollouts that only steps before `step` could draw: these are never trained again. `load` needs those
        of steps before `step` no more."""
        first = self._as_of(step)
        self._held = {rollout.rollout_id: rollout for rollout in self.fetch(first)}
        self._added = {i: done for i, done in self._added.items() if done >= step or i in self._held}

    def rewind(self, step: int) -> None:
        self._added = {i: done for i, done in self._added.items() if done < step}

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that a run resumed at `step` needs: "rollouts", and "buffer" in plain JSON values."""
        ids = self._as_of(step)
        return {"rollouts": self.fetch(ids), "buffer": [[self._added[i], i] for i in ids]}

    def load_state_dict(self, state: dict[str, Any]) -> list[Rollout]:
        """Replace the state by one of `state_dict`. Returns the rollouts that are not buffered."""
        self._added = {i: done for done, i in state.get("buffer", ())}
        self._held = {one.rollout_id: one for one in state["rollouts"] if one.rollout_id in self._added}
        self._drawn = {}
        return [rollout for rollout in state["rollouts"] if rollout.rollout_id not in self._added]

    def _as_of(self, step: int) -> list[int]:
        """Ids of the buffered rollouts at the start of a step."""
        return [i for i, done in self._added.items() if done < step][-self._capacity :]
