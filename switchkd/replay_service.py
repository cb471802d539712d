"""The replay with its books: what was trained on goes to rollouts.jsonl, what waits goes into checkpoints.

In: the calls of `house.ReplayHandle` and, from workers and learners, `put` and `fetch`. An actor or `local.py` wraps it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from switchkd.engines.loading import load_tokenizer
from switchkd.replay import Entry, Replay
from switchkd.rollout_io import load_replay_state, rollout_to_row, save_replay_state
from switchkd.sections import Config
from switchkd.types import Rollout


class ReplayService:
    def __init__(self, replay: Replay, rollouts_file: Path | None, decode: Callable[[Sequence[int]], str]) -> None:
        self.replay = replay
        self.rollouts_file = rollouts_file
        self.decode = decode

    def put(self, rollouts: Sequence[Rollout]) -> list[int]:
        return self.replay.put(rollouts)

    def fetch(self, rollout_ids: Sequence[int]) -> list[Rollout]:
        return self.replay.fetch(rollout_ids)

    def take(self, step: int, num: int, version: int, stage: int) -> list[Entry] | None:
        return self.replay.take(step, num, version, stage)

    def commit(self, step: int, rollout_ids: Sequence[int]) -> None:
        """The step is trained: one line per rollout, then the store lets them rest until a checkpoint is durable."""
        if self.rollouts_file is not None:
            with self.rollouts_file.open("a", encoding="utf-8") as file:
                for rollout in self.replay.fetch(rollout_ids):
                    row = rollout_to_row(rollout, self.decode(rollout.prompt_ids.tolist()), self.decode, step)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.replay.commit(step, rollout_ids)

    def durable(self, step: int) -> None:
        self.replay.durable(step)

    def save(self, path: Path, step: int) -> None:
        """What a run resumed at `step` needs."""
        save_replay_state(path, self.replay.state(step))

    def restore(self, path: Path) -> list[int]:
        """Take over a checkpoint's state; ids of the rollouts that are there."""
        state = load_replay_state(path)
        self.replay.restore(state)
        return [rollout.rollout_id for rollout in state["rollouts"]]

    def stats(self) -> dict[str, float]:
        return self.replay.stats()


def make_replay(config: Config, run_dir: Path) -> ReplayService:
    """The replay of one run."""
    section = config.replay
    replay = Replay(capacity=section.capacity, policy=section.policy, lease_s=section.lease_s, seed=config.run.seed)
    tokenizer = load_tokenizer(config.student.model, trust_remote_code=config.student.trust_remote_code)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    return ReplayService(replay, run_dir / "rollouts.jsonl" if config.rollout.save else None, decode)
