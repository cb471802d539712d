"""The replay behind Ray. It writes rollouts.jsonl and its part of the checkpoint itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from switchkd.actors.environment import Secrets, prepare
from switchkd.replay import Entry
from switchkd.replay_service import ReplayService, make_replay
from switchkd.sections import Config
from switchkd.types import Rollout


@ray.remote(max_restarts=0, num_cpus=0)
class ReplayActor:
    def __init__(self, config: dict[str, Any], run_dir: str, secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        self.service: ReplayService = make_replay(Config.model_validate(config), Path(run_dir))

    def ready(self) -> bool:
        return True

    def put(self, rollouts: list[Rollout]) -> list[int]:
        return self.service.put(rollouts)

    def fetch(self, rollout_ids: list[int]) -> list[Rollout]:
        return self.service.fetch(rollout_ids)

    def take(self, step: int, num: int, version: int, stage: int) -> list[Entry] | None:
        return self.service.take(step, num, version, stage)

    def commit(self, step: int, rollout_ids: list[int]) -> None:
        self.service.commit(step, rollout_ids)

    def durable(self, step: int) -> None:
        self.service.durable(step)

    def save(self, path: Path, step: int) -> None:
        self.service.save(path, step)

    def save_batch(self, path: Path, rollout_ids: list[int]) -> None:
        self.service.save_batch(path, rollout_ids)

    def restore(self, path: Path, num_started: int) -> list[int]:
        return self.service.restore(path, num_started)

    def stats(self) -> dict[str, float]:
        return self.service.stats()
