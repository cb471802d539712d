"""The replay with its books: what was trained on goes to rollouts.jsonl, what waits goes into checkpoints.

In: the calls of `house.ReplayHandle` and, from workers and learners, `put` and `fetch`. Wrapped by an actor or
`local.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from switchkd.engines.loading import load_tokenizer
from switchkd.replay import Entry, Replay
from switchkd.rollout_io import load_replay_state, rollout_to_row, save_replay_state, save_rollouts
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
        rollouts = self.replay.fetch(rollout_ids)
        if not self.replay.commit(step, rollout_ids) or self.rollouts_file is None:
            return
        rows = [rollout_to_row(r, self.decode(r.prompt_ids.tolist()), self.decode, step) for r in rollouts]
        with self.rollouts_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def durable(self, step: int) -> None:
        self.replay.durable(step)

    def save(self, path: Path, step: int) -> None:
        """What a run resumed at `step` needs."""
        save_replay_state(path, self.replay.state(step))

    def save_batch(self, path: Path, rollout_ids: Sequence[int]) -> None:
        save_rollouts(path, self.replay.fetch(rollout_ids))

    def restore(self, path: Path, num_started: int) -> list[int]:
        """Take over a checkpoint's state; of the rollouts 0 to num_started - 1, those to be made again."""
        self.replay.restore(load_replay_state(path))
        return self.replay.missing(num_started)

    def stats(self) -> dict[str, float]:
        return self.replay.stats()


def make_replay(config: Config, run_dir: Path) -> ReplayService:
    """The replay of one run."""
    section = config.replay
    replay = Replay(capacity=section.capacity, policy=section.policy, lease_s=section.lease_s, seed=config.seed)
    tokenizer = load_tokenizer(config.student.path, trust_remote_code=config.student.trust_remote_code)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    return ReplayService(replay, run_dir / "rollouts.jsonl" if config.rollout.save else None, decode)
