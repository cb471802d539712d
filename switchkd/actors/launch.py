"""The house on a Ray cluster: join or start one, check that the run fits, start every actor, hand out the handles.

In: a resolved config. Out: a House for `train.py`. What does not fit is said before anything starts.
"""

from __future__ import annotations

import logging
import os
import socket
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray import cloudpickle
from ray.exceptions import RayError

from switchkd.actors.environment import Secrets
from switchkd.actors.futures import gathered, of_worker, patient
from switchkd.actors.health import pulses
from switchkd.actors.learner_actor import LearnerActor, LearnerGroup
from switchkd.actors.placement import options, settled, wait_for_resources
from switchkd.actors.prometheus import Exporter
from switchkd.actors.replay_actor import ReplayActor
from switchkd.actors.rollout_actor import RolloutActor
from switchkd.actors.teacher_actor import TeacherActor
from switchkd.config import ConfigError
from switchkd.engines.heads import HeadArrays
from switchkd.house import House, Weights
from switchkd.metrics import MetricsLog
from switchkd.recorded import heads_for
from switchkd.resources import counts
from switchkd.sections import Config
from switchkd.types import Exam, Task
from switchkd.watchdog import all_of

CONNECT_S = 10.0


def join(config: Config, log: MetricsLog) -> None:
    """Join the job's or the named cluster and wait until it is large enough. Raises ConfigError."""
    if not ray.is_initialized():
        _join(os.environ.get("RAY_ADDRESS") or config.cluster.address)
    wait_for_resources(config, ray.cluster_resources, log.note)


def _join(address: str) -> None:
    # Ray by itself would try for a quarter of an hour
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:  # the network
        host, _, port = address.rpartition(":")
        if port.isdigit() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, RuntimeError, RayError) as error:
        told = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the Ray cluster at cluster.address={address} cannot be joined ({told}); start one with `ray start "
            "--head`, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as it has them, or leave cluster.address empty for a "
            "private one"
        ) from None


def _start_private(config: Config) -> None:
    """A cluster of this process alone (`environment.for_private_cluster` went before), without a dashboard."""
    ray.init(
        address="local",
        num_cpus=os.cpu_count() or 1,
        include_dashboard=False,
        object_store_memory=int(config.cluster.object_store_gb * 1e9),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


class RayWorker:
    """A rollout actor's handle. Ray restarts a dead one by itself; its calls in flight end with WorkerLost."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def generate(self, tasks: list[Task], weights: Weights | None) -> Future[Any]:
        return of_worker(self.actor.generate.remote(tasks, weights))

    def offer(self, weights: Weights) -> None:
        self.actor.offer.remote(weights)

    def examine(self, exam: Exam, weights: Weights | None) -> Future[Any]:
        return of_worker(self.actor.examine.remote(exam, weights))

    def back(self) -> Future[None]:
        return patient(self.actor.ready.remote)


class RayReplay:
    """The replay actor's handle: while Ray starts it again its calls wait."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.actor, name)
        return lambda *args: patient(lambda: method.remote(*args))


def build_house(config: Config, run_dir: Path, stop_ids: frozenset[int], log: MetricsLog) -> House:
    """Start all actors of the run: on the cluster that was joined, else on a private one. Where one cannot start, all
    are ended again."""
    config = settled(config)
    plain, common = config.model_dump(), (Secrets.of_this_process(), os.getcwd())
    log.note("starting actors")
    with ExitStack() as opened:
        if not ray.is_initialized():
            _start_private(config)
            opened.callback(ray.shutdown)
        start = partial(_start, opened)
        replay = start(ReplayActor, {}, plain, str(run_dir), *common)
        teachers = [
            start(TeacherActor, options(config, "teacher"), plain, *common)
            for _ in range(config.teacher.replicas if config.needs_teacher else 0)
        ]
        # trap: as they are, handles would go into the object store, where the restart of a worker may not find them
        handles = cloudpickle.dumps((teachers, replay))
        workers = [
            start(RolloutActor, options(config, "rollout"), plain, i, handles, stop_ids, *common)
            for i in range(counts(config)["rollout"])
        ]
        rank = cast(Any, LearnerActor).options(**options(config, "learner"))
        learner = LearnerGroup(lambda: [rank.remote(plain, replay, *common) for _ in range(config.learner.num_ranks)])
        opened.callback(learner.close)

        ranks = learner.ranks  # they are ready when they have met

        def actors() -> dict[str, Any]:
            groups = {"teacher": teachers, "rollout worker": workers, "learner rank": learner.ranks}
            named = {f"{role} {i}": actor for role, group in groups.items() for i, actor in enumerate(group)}
            return {"replay": replay, **named}

        awaited = {name: gathered([actor.ready.remote()]) for name, actor in actors().items() if actor not in ranks}
        head: HeadArrays | None = None
        if teachers:
            asked = gathered([teachers[0].head.remote()])
            all_of({"teacher 0": asked}, config.run.watchdog_s)
            head = asked.result()
        awaited["learner"] = learner.start(heads_for(config, run_dir, {} if head is None else {"": head}))
        all_of(awaited, config.run.watchdog_s)
        patient(lambda: replay.restore.remote(None, 0)).result()
        if config.metrics.prometheus:
            log.export(Exporter(run_dir.resolve().name))
        return House(
            workers=[RayWorker(actor) for actor in workers],
            replay=RayReplay(replay),
            learner=learner,
            pulses=lambda: pulses(actors()),
            close=opened.pop_all().close,
        )


def _start(opened: ExitStack, actor: Any, options: dict[str, float], *args: Any) -> Any:
    handle = actor.options(**options).remote(*args)
    opened.callback(ray.kill, handle)
    return handle
