"""Serves the rollouts that a run recorded (`rollout.save_teacher_output`) to another run without workers or teacher.

In: `<run>/teacher_output/`: a shard per optimizer step (tokens, their sources, the teacher's output) and the teachers'
LM heads. Out: the heads, and a replay with the methods of `replay.Replay`. The rollouts are in the order in which they
were trained on, and repeat when they run out (`rollout.repeat_recorded`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from switchkd.config.errors import ConfigError, one_line
from switchkd.config.schema import Config
from switchkd.data.atomic_files import TEACHER_OUTPUT, write_atomic
from switchkd.data.replay import EMPTY, Replay
from switchkd.data.rollout_io import load_rollouts, read_records, save_replay_state
from switchkd.data.trained import TrainedRollouts, find_shards
from switchkd.types import Entry

if TYPE_CHECKING:
    from switchkd.engines.models.lm_head import LMHeadState

HEADS = "heads.safetensors"


def heads_for(config: Config, run_dir: Path, heads: dict[str, LMHeadState]) -> dict[str, LMHeadState]:
    """Return the LM heads for the learner: those of the recorded run, else `heads`, saved with the teacher's output."""
    if config.rollout.recorded:
        return load_heads(Path(config.rollout.recorded) / TEACHER_OUTPUT / HEADS)
    if config.rollout.save_teacher_output:
        (run_dir / TEACHER_OUTPUT).mkdir(parents=True, exist_ok=True)
        save_heads(run_dir / TEACHER_OUTPUT / HEADS, heads)
    return heads


def save_heads(path: Path, heads: dict[str, LMHeadState]) -> None:
    tensors, records = {}, {}
    for i, (name, head) in enumerate(heads.items()):
        fields = asdict(head)
        tensors[f"{i}.weight"] = fields.pop("weight")
        tensors[f"{i}.bias"] = fields.pop("bias")
        records[str(i)] = {"name": name, **fields}
    metadata = {"heads": json.dumps(records)}
    write_atomic(path, lambda beside: save_file(tensors, beside, metadata=metadata))


def load_heads(path: Path) -> dict[str, LMHeadState]:
    """Read the LM heads by teacher. Raises ConfigError where the file is missing or damaged."""
    from switchkd.engines.models.lm_head import LMHeadState

    if not path.is_file():
        raise ConfigError(f"--from-rollouts: {path} is missing, without it hidden states cannot be read; record again")
    try:  # a file of another run
        with safe_open(path, framework="numpy") as file:
            records = json.loads(file.metadata()["heads"])
            return {
                fields.pop("name"): LMHeadState(
                    weight=file.get_tensor(f"{i}.weight"), bias=file.get_tensor(f"{i}.bias"), **fields
                )
                for i, fields in records.items()
            }
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--from-rollouts: {path} cannot be read ({one_line(error)}); record again") from None


class RecordedRollouts(Replay):
    """A replay filled by another run. Step s of this run gets the next `batch_sizes[s]` rollouts, with this run's ids,
    stages and weight versions (their age is unchanged)."""

    def __init__(
        self,
        run_dir: Path,
        batch_sizes: Sequence[int],
        trained: TrainedRollouts,
    ) -> None:
        self._order = [(step, path, i) for step, path in find_shards(run_dir) for i in range(len(read_records(path)))]
        self._first_ids = [0, *accumulate(batch_sizes)]
        super().__init__(capacity=len(self._order), trained=trained)

    def take(self, step: int, num: int, version: int, stage: int) -> list[Entry] | None:
        ids = range(self._first_ids[step], self._first_ids[step] + num)
        places = [self._order[i % len(self._order)] for i in ids]
        shards = {path: load_rollouts(path) for path in dict.fromkeys(path for _, path, _ in places)}
        rollouts = [
            replace(
                rollout := shards[path][i],
                rollout_id=rollout_id,
                batch=step,
                stage=stage,
                weight_versions=(rollout.weight_versions + (version - recorded_at)).astype(np.int32),
            )
            for rollout_id, (recorded_at, path, i) in zip(ids, places, strict=True)
        ]
        self.load_state_dict({**EMPTY, "rollouts": rollouts, "durable_step": step})
        return super().take(step, num, version, stage)

    def save(self, path: Path, step: int) -> None:
        """Write an empty state: a resumed run reads the shards again."""
        self.flush()
        save_replay_state(path, EMPTY)

    def restore(self, path: Path | None, num_started: int) -> list[int]:
        """Begin empty: any step may be taken again from the shards."""
        self.load_state_dict(EMPTY)
        return []

    def rewind(self, step: int, num_started: int) -> bool:
        self.load_state_dict(EMPTY)
        return True

    def missing(self, num_started: int) -> list[int]:
        return []
