"""Builds the replay of a run from its config."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from switchkd.config.schema import Config
from switchkd.data.atomic_files import ROLLOUTS, TEACHER_OUTPUT
from switchkd.data.recorded import RecordedRollouts
from switchkd.data.replay import Replay
from switchkd.data.reuse_buffer import ReuseBuffer
from switchkd.data.rollout_io import BatchDecode
from switchkd.data.trained import TrainedRollouts
from switchkd.engines.build import make_tokenizer


def make_replay(config: Config, run_dir: Path) -> Replay:
    """Build the replay, or the one with another run's recorded rollouts (`rollout.recorded`)."""
    section, keep = config.replay, config.rollout.save_teacher_output
    # without a checkpoint in between a run that goes back starts again, and reads no files
    on_disk = (keep or config.train.checkpoint_every > 0) and not config.rollout.recorded
    trained = TrainedRollouts(
        run_dir / TEACHER_OUTPUT if on_disk else None,
        rollouts_file=run_dir / ROLLOUTS if config.rollout.save else None,
        decode=batch_decode(make_tokenizer(config.student)),
        keep=keep,
    )
    if config.rollout.recorded:
        sizes = [stage.batch_size for stage in config.train.stages for _ in range(stage.steps)]
        return RecordedRollouts(Path(config.rollout.recorded), sizes, trained)
    adaptive = section.policy == "adaptive"
    return Replay(
        capacity=section.capacity,
        policy="fifo" if adaptive else section.policy,
        lease_s=section.lease_s,
        trained=trained,
        buffer=ReuseBuffer(section.capacity, config.seed, trained.load) if adaptive else None,
    )


def batch_decode(tokenizer: Any) -> BatchDecode:
    """Return the tokenizer's `batch_decode`, special tokens included. Its Rust part decodes short sequences several
    times faster, and without the interpreter's lock; it is taken where transformers changes no space of its texts."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None or (tokenizer.clean_up_tokenization_spaces and type(rust.model).__name__ != "BPE"):
        return partial(tokenizer.batch_decode, skip_special_tokens=False)
    return partial(rust.decode_batch, skip_special_tokens=False)
