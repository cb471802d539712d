"""The house on a Ray cluster: join or start one, check that the run fits, start every actor, hand out the handles.

In: a resolved config. Out: a House for `train.py`. What does not fit is said before anything starts.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import ray
from ray import cloudpickle

from switchkd.actors.cluster import _start_private, connect
from switchkd.actors.heartbeat import pulses
from switchkd.actors.learner_actor import LearnerActor, LearnerGroup
from switchkd.actors.placement_group import Place, beside_driver, nodes, settled, wait_for_places, wait_for_room
from switchkd.actors.process_setup import Secrets
from switchkd.actors.prometheus import Exporter
from switchkd.actors.ray_futures import patient, shut_down
from switchkd.actors.replay_actor import ReplayActor
from switchkd.actors.rollout_actor import RolloutActor
from switchkd.actors.shared_teacher import PoolHandle, attach
from switchkd.actors.teacher_pool import TeacherPoolActor
from switchkd.actors.worker_pool import RayWorker, WorkerPool
from switchkd.config import resources
from switchkd.config.schema import Config, Span
from switchkd.controller.handles import House
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.watchdog import START_S, all_of
from switchkd.data.recorded import heads_for


def join(config: Config, log: MetricsLog) -> None:
    """Join the job's or the named cluster and wait until it has room for all at once; are the teachers there that are
    served elsewhere? Raises ConfigError."""
    connect(config.cluster.address)
    wait_for_room(config, nodes, log.note)
    with ExitStack() as rehearsal:
        _set_aside(settled(config), rehearsal)
        for name in config.teacher_names:
            if (own := config.of_teacher(name)).teacher.attach:
                rehearsal.callback(attach(own, resources.role_of(name)).close)


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
            opened.callback(shut_down)
        start = partial(_start, opened)
        places = _set_aside(config, opened)
        replay = start(ReplayActor, beside_driver(), plain, str(run_dir), *common)
        pools = {name: _pool(opened, config, name, places, *common) for name in config.teacher_names}
        # trap: as they are, handles would go into the object store, where the restart of a worker may not find them
        handles = cloudpickle.dumps(({name: (pool.actor, pool.namespace) for name, pool in pools.items()}, replay))

        def worker(index: int) -> RayWorker:
            waiting = places["rollout"]
            place = waiting.pop(0) if waiting else Place(resources.of_role(config, "rollout"))
            actor = cast(Any, RolloutActor).options(**place.options())
            return RayWorker(actor.remote(plain, index, handles, stop_ids, *common), place)

        span = Span.of(config.rollout.num_workers)
        workers = WorkerPool(
            [worker(i) for i in range(0 if config.rollout.recorded else span.min)], span, worker,
            rows=config.rollout.batch_size, wait_s=config.cluster.wait_s,
        )  # fmt: skip
        opened.callback(workers.close)
        # a gang that is started again stands where the first one stood
        ranks = [cast(Any, LearnerActor).options(**place.options()) for place in places["learner"]]
        learner = LearnerGroup(lambda: [rank.remote(plain, replay, *common) for rank in ranks])
        opened.callback(learner.close)

        def actors() -> dict[str, Any]:
            groups = {"rollout worker": [each.actor for each in workers.actors], "learner rank": learner.ranks}
            named = {f"{role} {i}": actor for role, group in groups.items() for i, actor in enumerate(group)}
            teachers = {name: actor for pool in pools.values() for name, actor in pool.replicas().items()}
            return {"replay": replay, **teachers, **named}

        patience = max(config.run.watchdog_s, START_S)
        all_of({pool.role: patient(pool.actor.ready.remote) for pool in pools.values()}, patience)
        told = {name: pool.head() for name, pool in pools.items()}
        heads = heads_for(config, run_dir, {name: head for name, head in told.items() if head is not None})
        waited_for = {"replay": replay, **{f"rollout worker {i}": each.actor for i, each in enumerate(workers.actors)}}
        awaited = {name: patient(actor.ready.remote) for name, actor in waited_for.items()}
        awaited["learner"] = learner.start(heads)
        all_of(awaited, patience)
        patient(lambda: replay.restore.remote(None, 0)).result()
        if config.metrics.prometheus:
            log.export(Exporter(run_dir.resolve().name))
        return House(
            workers=workers,
            replay=RayReplay(replay),
            learner=learner,
            pulses=lambda: pulses(actors()),
            close=opened.pop_all().close,
            tend=partial(_tend, workers, list(pools.values())),
        )


def _set_aside(config: Config, opened: ExitStack) -> dict[str, list[Place]]:
    """A place for every process that the run starts with, before any of them starts. Raises ConfigError."""
    places = {
        role: [Place(resources.of_role(config, role)) for _ in range(span.min)]
        for role, span in resources.spans(config).items()
    }
    for place in chain.from_iterable(places.values()):
        opened.callback(place.free)
    wait_for_places(config, [(role, place) for role, some in places.items() for place in some])
    return places


def _pool(
    opened: ExitStack, config: Config, name: str, places: dict[str, list[Place]], secrets: Secrets, working_dir: str
) -> PoolHandle:
    """The run's own pool of this teacher, or a served one."""
    own = config.of_teacher(name)
    if own.teacher.attach:
        pool = attach(own, resources.role_of(name))
    else:
        waiting = cloudpickle.dumps(places[resources.role_of(name)])
        actor = cast(Any, TeacherPoolActor).options(**beside_driver())
        pool = PoolHandle(actor.remote(own.model_dump(), waiting, secrets, working_dir, "", {}), name)
    opened.callback(pool.close)
    return pool


def _tend(workers: WorkerPool, pools: list[PoolHandle], waited_s: float, elapsed_s: float) -> list[str]:
    return [*workers.tend(waited_s, elapsed_s), *(told for pool in pools for told in pool.news())]


def _start(opened: ExitStack, actor: Any, options: dict[str, Any], *args: Any) -> Any:
    handle = actor.options(**options).remote(*args)
    opened.callback(ray.kill, handle)
    return handle
