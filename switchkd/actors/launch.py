"""Starts a run's actors on Ray: joins or starts a cluster, reserves every process's placement, starts the actors.

In: a checked config. Out: `ActorHandles` for `train.py`. A run that does not fit is an error before any actor starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, cast

import ray
from ray import cloudpickle

from switchkd.actors.cluster import connect, start_private
from switchkd.actors.heartbeat import heartbeats
from switchkd.actors.learner_actor import LearnerActor, LearnerGroup
from switchkd.actors.placement_group import (
    ProcessPlacement,
    beside_driver,
    check_possible,
    resolve_resources,
    wait_for_placements,
)
from switchkd.actors.process_setup import Secrets
from switchkd.actors.prometheus import Exporter
from switchkd.actors.ray_futures import CALL_S, retry_until_alive
from switchkd.actors.replay_actor import RayReplayHandle, ReplayActor
from switchkd.actors.rollout_actor import RolloutActor
from switchkd.actors.shared_teacher import TeacherPoolHandle, attach
from switchkd.actors.teacher_pool import TeacherPoolActor
from switchkd.actors.worker_pool import WorkerPool
from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.controller.checkpoint import latest_step
from switchkd.controller.handles import ActorHandles
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.watchdog import START_S, wait_for_all
from switchkd.data.recorded import heads_for


def join(config: Config, log: MetricsLog) -> None:
    """Join the job's or the named cluster, and check that it has room and the shared teachers. Raises ConfigError."""
    connect(config.cluster.address)
    with ExitStack() as rehearsal:
        _reserve(resolve_resources(config), rehearsal, log)
        for name in config.teacher_names:
            if (teacher_config := config.of_teacher(name)).teacher.attach:
                rehearsal.callback(attach(teacher_config, resources.role_of(name)).close)


def start_actors(config: Config, run_dir: Path, stop_ids: frozenset[int], log: MetricsLog) -> ActorHandles:
    """Start all actors on the joined cluster, else on a private one. Where one cannot start, all are ended."""
    config = resolve_resources(config)
    config_dict = config.model_dump()
    setup = (Secrets.of_this_process(), os.getcwd())
    log.info("starting actors")
    with ExitStack() as opened:
        if not ray.is_initialized():
            opened.callback(start_private(config, _end_process(run_dir, log)))
        placements = _reserve(config, opened, log)
        replay = cast(Any, ReplayActor).options(**beside_driver()).remote(config_dict, str(run_dir), *setup)
        opened.callback(ray.kill, replay)
        pools = {name: _start_pool(opened, config, name, placements, *setup) for name in config.teacher_names}
        # trap: unpickled handles would go into the object store, where a restarted worker may not find them
        handles = cloudpickle.dumps(({name: (pool.actor, pool.namespace) for name, pool in pools.items()}, replay))

        def create_worker(index: int, options: dict[str, Any]) -> Any:
            return cast(Any, RolloutActor).options(**options).remote(config_dict, index, handles, stop_ids, *setup)

        workers = WorkerPool(config, placements.get("rollout", []), create_worker)
        opened.callback(workers.close)
        # restarted ranks reuse the placements of the first ones
        ranks = [cast(Any, LearnerActor).options(**placement.options()) for placement in placements["learner"]]
        learner = LearnerGroup(lambda: [rank.remote(config_dict, replay, *setup) for rank in ranks])
        opened.callback(learner.close)

        def actors() -> dict[str, Any]:
            groups = {"rollout worker": workers.actors, "learner rank": learner.ranks}
            numbered = {f"{role} {i}": actor for role, group in groups.items() for i, actor in enumerate(group)}
            teachers = {name: actor for pool in pools.values() for name, actor in pool.replicas().items()}
            return {"replay": replay, **teachers, **numbered}

        def autoscale(waited_s: float, elapsed_s: float) -> list[str]:
            pool_events = [event for pool in pools.values() for event in pool.events()]
            return [*workers.autoscale(waited_s, elapsed_s), *pool_events]

        patience = max(config.run.watchdog_s, START_S)
        # without retries of Ray's: it prints a line for each call of a killed actor that it would repeat
        ready_calls = {pool.role: pool.actor.ready.options(max_task_retries=0).remote for pool in pools.values()}
        starting = {role: retry_until_alive(call) for role, call in ready_calls.items()}
        wait_for_all(starting, patience, log.info)
        teacher_heads = {name: pool.lm_head_state() for name, pool in pools.items()}
        heads = heads_for(config, run_dir, {name: head for name, head in teacher_heads.items() if head is not None})
        others = {"replay": replay, **{f"rollout worker {i}": actor for i, actor in enumerate(workers.actors)}}
        ready = {name: retry_until_alive(actor.ready.remote) for name, actor in others.items()}
        wait_for_all({**ready, "learner": learner.start(heads)}, patience, log.info)
        replay_handle = RayReplayHandle(replay)
        replay_handle.restore(None, 0).result()
        opened.callback(lambda: wait([replay_handle.close()], timeout=CALL_S))  # it may have lines to write
        if config.metrics.prometheus:
            log.export(Exporter(run_dir.resolve().name))
        return ActorHandles(
            workers=workers,
            replay=replay_handle,
            learner=learner,
            heartbeats=lambda: heartbeats(actors()),
            close=opened.pop_all().close,
            autoscale=autoscale,
        )


def _end_process(run_dir: Path, log: MetricsLog) -> Callable[[str], None]:
    """Return the function that ends this process because its private cluster is lost."""

    def lost(reason: str) -> None:
        try:
            log.stop_live()
            step = latest_step(run_dir)
            goes_on = "at step 0, as there is no checkpoint" if step is None else f"from checkpoint {step}"
            print(f"switchkd: error: {reason}; --resume goes on {goes_on}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:
            os._exit(1)  # calls to Ray no longer return

    return lost


def _reserve(config: Config, opened: ExitStack, log: MetricsLog) -> dict[str, list[ProcessPlacement]]:
    """Reserve a placement for every initial process of the run. Raises ConfigError."""
    num = {role: span.min for role, span in resources.spans(config).items()}
    check_possible(config, num, log.info)
    placements = {
        role: [ProcessPlacement(resources.of_role(config, role)) for _ in range(each)] for role, each in num.items()
    }
    for placement in chain.from_iterable(placements.values()):
        opened.callback(placement.free)
    wait_for_placements(config, placements, log.info)
    return placements


def _start_pool(
    opened: ExitStack,
    config: Config,
    name: str,
    placements: dict[str, list[ProcessPlacement]],
    secrets: Secrets,
    working_dir: str,
) -> TeacherPoolHandle:
    """Start the run's own pool of this teacher, or attach to a shared one."""
    config = config.of_teacher(name)
    role = resources.role_of(name)
    if config.teacher.attach:
        pool = attach(config, role)
    else:
        actor = cast(Any, TeacherPoolActor).options(**beside_driver())
        pickled = cloudpickle.dumps(placements[role])
        pool = TeacherPoolHandle(actor.remote(config.model_dump(), pickled, secrets, working_dir, "", {}), name)
    opened.callback(pool.close)
    return pool
