"""The replay with its books: what was trained on goes to rollouts.jsonl, what waits goes into checkpoints.

In: the calls of `house.ReplayHandle` and, from workers and learners, `put` and `fetch`. Wrapped by an actor or
`local.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.config.schema import Config
from switchkd.controller.resume import SIGNAL
from switchkd.data import recorded
from switchkd.data.recorded import RecordedRollouts
from switchkd.data.replay import Entry, Replay, entry_of
from switchkd.data.reuse_buffer import Buffer
from switchkd.data.rollout_io import append_rows, load_replay_state, save_replay_state, save_rollouts
from switchkd.engines.models.loading import load_tokenizer
from switchkd.types import Rollout

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
        signal_dir: Path | None = None,
        buffer: Buffer | None = None,
    ) -> None:
        self.replay = replay
        self.rollouts_file = rollouts_file
        self.decode = decode
        self.signal_dir = signal_dir
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
        if self.signal_dir is not None:
            save_rollouts(recorded.shard(self.signal_dir, step), rollouts)
        self.replay.commit(step, [] if drawn else rollout_ids)
        if self.buffer is not None:
            self.buffer.add(step, rollouts)

    def durable(self, step: int) -> None:
        self.replay.durable(step)
        if self.buffer is not None:
            self.buffer.durable(step)

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

    def set_aside(self, rollout_ids: Sequence[int]) -> None:
        self.replay.set_aside(rollout_ids)

    def stats(self) -> dict[str, float]:
        return {**self.replay.stats(), **({} if self.buffer is None else {"num_buffered": len(self.buffer)})}


def make_replay(config: Config, run_dir: Path) -> ReplayService | RecordedRollouts:
    """The replay of one run, or what another run recorded in its place."""
    section = config.replay
    adaptive = section.policy == "adaptive"
    policy = "fifo" if adaptive else section.policy
    replay = Replay(capacity=section.capacity, policy=policy, lease_s=section.lease_s, seed=config.seed)
    buffer = Buffer(section.capacity, config.seed) if adaptive else None
    tokenizer = load_tokenizer(config.student.path, trust_remote_code=config.student.trust_remote_code)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    rollouts_file = run_dir / "rollouts.jsonl" if config.rollout.save else None
    if config.rollout.recorded:
        sizes = [stage.batch_size for stage in config.train.stages for _ in range(stage.steps)]
        return RecordedRollouts(Path(config.rollout.recorded), sizes, rollouts_file, decode)
    signal_dir = run_dir / SIGNAL if config.rollout.save_signal else None
    return ReplayService(replay, rollouts_file, decode, signal_dir, buffer)
