"""Rollouts that a run recorded with `rollout.save_teacher_output` stand in for workers and teacher in another run.

In: `<run>/teacher_output/`: a shard per optimizer step (tokens, who wrote them, the teacher's output) and the teachers'
LM heads. Out: the heads, and a replay that answers the same calls as `replay.Replay`. The rollouts come in the order in
which they were trained on, and again from the first on when they run out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.data.atomic_files import TEACHER_OUTPUT, write_atomic
from switchkd.data.replay import entry_of
from switchkd.data.rollout_io import (
    append_rows,
    find_shards,
    load_rollouts,
    read_records,
    save_replay_state,
    save_rollouts,
)
from switchkd.engines.models.lm_head import LMHeadState
from switchkd.types import Entry, Rollout

HEADS = "heads.safetensors"


def heads_for(config: Config, run_dir: Path, heads: dict[str, LMHeadState]) -> dict[str, LMHeadState]:
    """What the learner holds: `heads`, kept in the run's folder where its signal is, or those of the recorded run."""
    if config.rollout.recorded:
        return load_heads(Path(config.rollout.recorded) / TEACHER_OUTPUT / HEADS)
    if config.rollout.save_teacher_output:
        (run_dir / TEACHER_OUTPUT).mkdir(parents=True, exist_ok=True)
        save_heads(run_dir / TEACHER_OUTPUT / HEADS, heads)
    return heads


def save_heads(path: Path, heads: dict[str, LMHeadState]) -> None:
    tensors, told = {}, {}
    for i, (name, head) in enumerate(heads.items()):
        parts = asdict(head)
        tensors[f"{i}.weight"], tensors[f"{i}.bias"] = parts.pop("weight"), parts.pop("bias")
        told[str(i)] = {"name": name, **parts}
    metadata = {"heads": json.dumps(told)}
    write_atomic(path, lambda beside: save_file(tensors, beside, metadata=metadata))


def load_heads(path: Path) -> dict[str, LMHeadState]:
    """Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"--from-rollouts: {path} is missing, without it hidden states cannot be read; record again")
    with safe_open(path, framework="numpy") as file:
        told = json.loads(file.metadata()["heads"])
        return {
            parts.pop("name"): LMHeadState(
                weight=file.get_tensor(f"{i}.weight"), bias=file.get_tensor(f"{i}.bias"), **parts
            )
            for i, parts in told.items()
        }


class RecordedRollouts:
    """A replay that another run has filled. Step s of this run gets the next `batch_sizes[s]` rollouts; they take this
    run's ids, stages and weight versions (their age stays what it was)."""

    num_put = 0

    def __init__(
        self,
        run_dir: Path,
        batch_sizes: Sequence[int],
        rollouts_file: Path | None,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self.rollouts_file, self.decode = rollouts_file, decode
        self._order = [
            (step, path, place) for step, path in find_shards(run_dir) for place in range(len(read_records(path)))
        ]
        self._firsts = [0, *accumulate(batch_sizes)]
        self._held: dict[int, Rollout] = {}
        self._committed: set[int] = set()

    def take(self, step: int, num: int, version: int, stage: int) -> list[Entry]:
        ids = range(self._firsts[step], self._firsts[step] + num)
        found = [self._order[i % len(self._order)] for i in ids]
        shards = {path: load_rollouts(path) for path in dict.fromkeys(path for _, path, _ in found)}
        for rollout_id, (recorded_at, path, place) in zip(ids, found, strict=True):
            rollout = shards[path][place]
            self._held[rollout_id] = replace(
                rollout,
                rollout_id=rollout_id,
                batch=step,
                stage=stage,
                weight_versions=(rollout.weight_versions + (version - recorded_at)).astype(np.int32),
            )
        return [entry_of(self._held[rollout_id]) for rollout_id in ids]

    def fetch(self, rollout_ids: Sequence[int]) -> list[Rollout]:
        return [self._held[rollout_id] for rollout_id in rollout_ids]

    def commit(self, step: int, rollout_ids: Sequence[int]) -> None:
        """The step is trained: its rollouts get their lines and go."""
        if step in self._committed:
            return
        if self.rollouts_file is not None:
            append_rows(self.rollouts_file, self.fetch(rollout_ids), self.decode, step)
        self._committed.add(step)
        for rollout_id in rollout_ids:
            del self._held[rollout_id]

    def put(self, rollouts: Sequence[Rollout]) -> list[int]:
        raise RuntimeError("recorded rollouts take no new ones, and nobody writes any; this is a bug, please report")

    def draw(self, step: int, num: int, version: int) -> list[Entry]:
        raise RuntimeError("recorded rollouts are not drawn again; this is a bug, please report")

    def release_before(self, step: int) -> None:
        """The shards stay where they are."""

    def save(self, path: Path, step: int) -> None:
        """A resumed run reads the shards again."""
        save_replay_state(path, {"rollouts": []})

    def save_batch(self, path: Path, rollout_ids: Sequence[int]) -> None:
        save_rollouts(path, self.fetch(rollout_ids))

    def restore(self, path: Path | None, num_started: int) -> list[int]:
        """The shards are all there is to know: any step may be taken again."""
        self._held, self._committed = {}, set()
        return []

    def rewind(self, step: int, num_started: int) -> bool:
        self.restore(None, num_started)
        return True

    def missing(self, num_started: int) -> list[int]:
        return []

    def quarantine(self, rollout_ids: Sequence[int]) -> None:
        """Nobody writes rollouts that could be."""

    def stats(self) -> dict[str, float]:
        return {"num_waiting": float(len(self._order)), "bytes": 0.0}
