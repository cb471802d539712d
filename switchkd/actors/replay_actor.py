"""The replay behind Ray. It writes rollouts.jsonl and its part of the checkpoint itself.

Ray starts a dead one again, empty: until `restore` has told it what it held, every call raises StateLost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from switchkd.actors.heartbeat import GROUP, Health
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.config.schema import Config
from switchkd.data.build import make_replay
from switchkd.data.recorded import RecordedRollouts
from switchkd.data.replay import ReplayService
from switchkd.types import Entry, Rollout, StateLost


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0, concurrency_groups=GROUP)
class ReplayActor(Health):
    def __init__(self, config: dict[str, Any], run_dir: str, secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        self.kept = make_replay(Config.model_validate(config), Path(run_dir))
        self.restored = False
        self.num_put = 0

    @property
    def service(self) -> ReplayService | RecordedRollouts:
        if not self.restored:
            raise StateLost("the replay died")
        return self.kept

    def ready(self) -> bool:
        return True

    def progress_counter(self) -> int:
        return self.num_put

    def put(self, rollouts: list[Rollout]) -> list[int]:
        accepted = self.service.put(rollouts)
        self.num_put += len(accepted)
        return accepted

    def fetch(self, rollout_ids: list[int]) -> list[Rollout]:
        return self.service.fetch(rollout_ids)

    def take(self, step: int, num: int, version: int, stage: int) -> list[Entry] | None:
        return self.service.take(step, num, version, stage)

    def draw(self, step: int, num: int, version: int) -> list[Entry]:
        return self.service.draw(step, num, version)

    def commit(self, step: int, rollout_ids: list[int]) -> None:
        self.service.commit(step, rollout_ids)

    def release_before(self, step: int) -> None:
        self.service.release_before(step)

    def save(self, path: Path, step: int) -> None:
        self.service.save(path, step)

    def save_batch(self, path: Path, rollout_ids: list[int]) -> None:
        self.service.save_batch(path, rollout_ids)

    def restore(self, path: Path | None, num_started: int) -> list[int]:
        missing = self.kept.restore(path, num_started)
        self.restored = True
        return missing

    def rewind(self, step: int, num_started: int) -> bool:
        return self.restored and self.kept.rewind(step, num_started)

    def missing(self, num_started: int) -> list[int]:
        return self.service.missing(num_started)

    def quarantine(self, rollout_ids: list[int]) -> None:
        self.service.quarantine(rollout_ids)

    def stats(self) -> dict[str, float]:
        return self.service.stats()
