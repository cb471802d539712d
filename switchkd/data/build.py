"""Builds the replay of a run from its config."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from switchkd.config.schema import Config
from switchkd.data.atomic_files import ROLLOUTS, TEACHER_OUTPUT
from switchkd.data.recorded import RecordedRollouts
from switchkd.data.replay import Replay
from switchkd.data.reuse_buffer import ReuseBuffer
from switchkd.engines.build import make_tokenizer


def make_replay(config: Config, run_dir: Path) -> Replay:
    """Build the replay, or the one with another run's recorded rollouts (`rollout.recorded`)."""
    section = config.replay
    decode = partial(make_tokenizer(config.student).decode, skip_special_tokens=False)
    rollouts_file = run_dir / ROLLOUTS if config.rollout.save else None
    if config.rollout.recorded:
        sizes = [stage.batch_size for stage in config.train.stages for _ in range(stage.steps)]
        return RecordedRollouts(Path(config.rollout.recorded), sizes, rollouts_file, decode)
    adaptive = section.policy == "adaptive"
    return Replay(
        capacity=section.capacity,
        policy="fifo" if adaptive else section.policy,
        lease_s=section.lease_s,
        rollouts_file=rollouts_file,
        decode=decode,
        teacher_output_dir=run_dir / TEACHER_OUTPUT if config.rollout.save_teacher_output else None,
        buffer=ReuseBuffer(section.capacity, config.seed) if adaptive else None,
    )
