"""A learner rank with a fake student: its weights are one number, which every rollout that it trains on changes.

Every rank reads the whole batch, so that all hold the same weights without talking to each other. Packed weights are
real bytes, checkpoints and the student real files. No torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from switchkd.config.schema import Config
from switchkd.engines import fake
from switchkd.types import BatchAssignment, PackedWeights, Rollout, StepResult

STATE = "weights.bin"


class FakeRank:
    """The calls of `learner.rank.LearnerRank`."""

    def __init__(self, config: Config, rank: int, fetch: Callable[[list[int]], list[Rollout]]) -> None:
        time.sleep(config.fake.start_s)
        self.config, self.rank, self.fetch = config, rank, fetch
        self.weights = fake.FIRST_WEIGHTS

    def step(self, assignment: BatchAssignment, lr: float) -> StepResult:
        started = time.monotonic()
        ids = sorted(i for rank in assignment.rollout_ids for i in rank)
        for rollout in sorted(self.fetch(ids), key=lambda rollout: rollout.rollout_id):
            output = b"" if rollout.teacher_output is None else rollout.teacher_output.rows.values.tobytes()
            digest = fake.context(rollout.token_ids, fake.context(rollout.sources))
            self.weights = fake.mix(self.weights, rollout.rollout_id, digest, fake.context(output))
        time.sleep(self.config.fake.learner_s)
        loss = fake.distance(0, fake.row(self.weights, assignment.stage))
        return StepResult(
            step=assignment.step,
            version=assignment.step + 1,
            loss=loss,
            metrics={"loss/total": loss, "loss/kl": loss},
            grad_norm=1.0,
            lr=lr,
            num_loss_tokens=assignment.num_loss_tokens,
            time_s=time.monotonic() - started,
        )

    def publish(self, version: int) -> PackedWeights | None:
        """Rank 0 answers with a bucket of `fake.weights_mb`, which begins with the weights."""
        if self.rank:
            return None
        bucket = self._bytes()
        return PackedWeights(version=version, manifest=(), buckets=(bucket,), checksum=fake.checksum((bucket,)))

    def _bytes(self) -> np.ndarray:
        bucket = np.zeros(max(int(self.config.fake.weights_mb * 2**20), 8), np.uint8)
        bucket[:8] = np.array([self.weights], np.uint64).view(np.uint8)
        return bucket

    def save(self, folder: Path, tag: str) -> None:
        """Rank 0 writes the state of all."""
        if self.rank == 0:
            (folder / tag).mkdir(parents=True, exist_ok=True)
            (folder / tag / STATE).write_bytes(self._bytes().data)

    def load(self, folder: Path, tag: str) -> None:
        self.weights = int(np.fromfile(folder / tag / STATE, np.uint64, count=1)[0])

    def export(self, folder: Path) -> None:
        """A folder with the weights and nothing that transformers could load."""
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"weights": self._bytes()}, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps({"model_type": "fake"}))

    def close(self) -> None:
        pass
