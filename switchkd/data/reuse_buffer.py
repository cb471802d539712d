"""Rollouts that were trained on wait here to be trained on again (`replay.policy: adaptive`).

In: the rollouts of each trained step. Out: for a step that draws from the buffer a sample of the last `capacity` that
the student wrote in, a function of (seed, step, what was trained before). Plain Python, one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from switchkd.data.prompts import DRAW_OF_BUFFER, random_words
from switchkd.types import CompletionSource, Rollout


class ReuseBuffer:
    """First in, first out. What a rewound step may still draw is kept until a checkpoint beyond it is durable."""

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity, self._seed = capacity, seed
        self._rollouts: dict[int, Rollout] = {}
        self._added: list[tuple[int, int]] = []  # step that trained on it first, its id; in order

    def __len__(self) -> int:
        return min(len(self._added), self._capacity)

    def add(self, step: int, rollouts: Iterable[Rollout]) -> None:
        """A step was trained on these; what the data set or the teacher alone wrote is not kept."""
        for rollout in sorted(rollouts, key=lambda rollout: rollout.rollout_id):
            if rollout.completion_source == CompletionSource.ROLLOUT and rollout.rollout_id not in self._rollouts:
                self._rollouts[rollout.rollout_id] = rollout
                self._added.append((step, rollout.rollout_id))

    def draw(self, step: int, num: int) -> list[Rollout]:
        """`num` different rollouts, sorted by id (fewer where fewer are there); the same at every call."""
        ids = self._as_of(step)
        words = random_words(self._seed, step, DRAW_OF_BUFFER, len(ids))
        drawn = np.argsort(words, kind="stable")[:num]
        return self.fetch(sorted(ids[place] for place in drawn.tolist()))

    def holds(self, rollout_ids: Sequence[int]) -> bool:
        """Returns whether all of them are here."""
        return all(rollout_id in self._rollouts for rollout_id in rollout_ids)

    def fetch(self, rollout_ids: Sequence[int]) -> list[Rollout]:
        return [self._rollouts[rollout_id] for rollout_id in rollout_ids]

    def release_before(self, step: int) -> None:
        """No step before this one will be trained again: what no later one can draw is forgotten."""
        first = set(self._as_of(step))
        self._keep([(done, i) for done, i in self._added if done >= step or i in first])

    def rewind(self, step: int) -> None:
        self._keep([(done, i) for done, i in self._added if done < step])

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a run resumed at `step` needs: "rollouts", and "buffer" in plain JSON values."""
        ids = set(self._as_of(step))
        return {
            "rollouts": [rollout for i, rollout in self._rollouts.items() if i in ids],
            "buffer": [[done, i] for done, i in self._added if i in ids],
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[Rollout]:
        """Become what `state_dict` described, whatever was here before. Returns the rollouts that are not buffered."""
        self._added = [(done, i) for done, i in state.get("buffer", ())]
        ids = {i for _, i in self._added}
        self._rollouts = {rollout.rollout_id: rollout for rollout in state["rollouts"] if rollout.rollout_id in ids}
        return [rollout for rollout in state["rollouts"] if rollout.rollout_id not in ids]

    def _as_of(self, step: int) -> list[int]:
        """Ids of the buffered rollouts when a step began."""
        return [i for done, i in self._added if done < step][-self._capacity :]

    def _keep(self, added: list[tuple[int, int]]) -> None:
        self._added = added
        self._rollouts = {i: self._rollouts[i] for _, i in added}
