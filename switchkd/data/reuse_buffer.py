"""Keeps trained rollouts to train on them again (`replay.policy: adaptive`).

In: the rollouts of each trained step. Out: for a step that draws from the buffer, a sample of the last `capacity`
rollouts of the student, a function of (seed, step, rollouts trained before). Plain Python, one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from switchkd.algo.noise import Purpose, noise_bits
from switchkd.types import CompletionSource, Rollout


class ReuseBuffer:
    """A FIFO buffer. Rollouts that a rewound step may draw are kept until a later checkpoint is durable."""

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity, self._seed = capacity, seed
        self._rollouts: dict[int, Rollout] = {}
        self._added: list[tuple[int, int]] = []  # step that first trained on it, rollout id; in order

    def __len__(self) -> int:
        return min(len(self._added), self._capacity)

    def add(self, step: int, rollouts: Iterable[Rollout]) -> None:
        """Add a trained step's rollouts, without those that the data set or the teacher alone wrote."""
        for rollout in sorted(rollouts, key=lambda rollout: rollout.rollout_id):
            if rollout.completion_source == CompletionSource.ROLLOUT and rollout.rollout_id not in self._rollouts:
                self._rollouts[rollout.rollout_id] = rollout
                self._added.append((step, rollout.rollout_id))

    def draw(self, step: int, num: int) -> list[Rollout]:
        """Draw `num` different rollouts (fewer where it holds fewer), sorted by id; the same at every call."""
        ids = self._as_of(step)
        words = noise_bits(self._seed, step, 0, Purpose.REUSE, len(ids))
        drawn = np.argsort(words, kind="stable")[:num]
        return self.fetch(sorted(ids[place] for place in drawn.tolist()))

    def holds(self, rollout_ids: Sequence[int]) -> bool:
        """Whether the buffer holds all of them."""
        return all(rollout_id in self._rollouts for rollout_id in rollout_ids)

    def fetch(self, rollout_ids: Sequence[int]) -> list[Rollout]:
        return [self._rollouts[rollout_id] for rollout_id in rollout_ids]

    def release_before(self, step: int) -> None:
        """Forget rollouts that only steps before `step` could draw: these are never trained again."""
        first = set(self._as_of(step))
        self._keep([(done, i) for done, i in self._added if done >= step or i in first])

    def rewind(self, step: int) -> None:
        self._keep([(done, i) for done, i in self._added if done < step])

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that a run resumed at `step` needs: "rollouts", and "buffer" in plain JSON values."""
        ids = set(self._as_of(step))
        return {
            "rollouts": [rollout for i, rollout in self._rollouts.items() if i in ids],
            "buffer": [[done, i] for done, i in self._added if i in ids],
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[Rollout]:
        """Replace the state by one of `state_dict`. Returns the rollouts that are not buffered."""
        self._added = [(done, i) for done, i in state.get("buffer", ())]
        ids = {i for _, i in self._added}
        self._rollouts = {rollout.rollout_id: rollout for rollout in state["rollouts"] if rollout.rollout_id in ids}
        return [rollout for rollout in state["rollouts"] if rollout.rollout_id not in ids]

    def _as_of(self, step: int) -> list[int]:
        """Ids of the buffered rollouts at the start of a step."""
        return [i for done, i in self._added if done < step][-self._capacity :]

    def _keep(self, added: list[tuple[int, int]]) -> None:
        self._added = added
        self._rollouts = {i: self._rollouts[i] for _, i in added}
