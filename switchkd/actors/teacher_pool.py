"""An actor that keeps a pool of teacher replicas running.

In: the config of one teacher, and the number of replicas. Out: a `ReplicaView` for every router that polls
(`PoolClient`, in the rollout workers). No session and no row passes through it. A run's own pool ends with the run, its
replicas with the pool; a shared one (`shared_teacher.py`) is detached, its replicas are named, and a restarted pool
attaches them again.
"""

from __future__ import annotations

import logging
import secrets as random_tokens
import time
import traceback
from collections.abc import Mapping
from threading import Event, RLock, Thread
from typing import Any, NamedTuple, cast

import ray
from ray import cloudpickle

from switchkd.actors.autoscaling import Load
from switchkd.actors.placement_group import ProcessPlacement, free_all
from switchkd.actors.pool import Member, ProcessPool, State
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.actors.replicas import ReplicaView, SessionReports
from switchkd.actors.teacher_actor import ReplicaLoad, TeacherActor
from switchkd.actors.teacher_router import SESSION_BITS
from switchkd.config.errors import ConfigError
from switchkd.config.resources import of_role
from switchkd.config.schema import Config, ReplicaRange

TICK_S = 0.5
"""Interval at which the pool checks its replicas."""
MEASURE_S = 2.0
"""Duration of one measurement of the load."""
NAMESPACE = "switchkd"
"""Ray namespace of shared teachers."""


class EventCursor(NamedTuple):
    """A position in a pool's list of events; a restarted pool begins a new list, with another `epoch`."""

    epoch: str
    num: int


NO_EVENTS = EventCursor("", 0)


@ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0, max_concurrency=32)
class TeacherPoolActor:
    """`placements`: for the first replicas, pickled. `shared_name`: the name of a detached pool; `identity`: the
    settings that an attaching run compares."""

    def __init__(
        self,
        config: dict[str, Any],
        placements: bytes,
        secrets: Secrets,
        working_dir: str,
        shared_name: str,
        identity: dict[str, Any],
    ) -> None:
        prepare(secrets, working_dir)
        self.config = Config.model_validate(config)
        self.replica_args = (config, secrets, working_dir)
        self.shared_name = shared_name
        self.identity = identity
        self.epoch = random_tokens.token_hex(4)
        self.runs: set[int] = set()
        self.reports = SessionReports()
        self.lock, self.wake, self.stopped = RLock(), Event(), False
        self.measured_at = time.monotonic()
        context = ray.get_runtime_context()
        self.key = shared_name or context.get_actor_id()
        self.pool = ProcessPool(
            self,
            "teacher replica",
            ReplicaRange.of(self.config.teacher.replicas),
            placements=[placement for placement in cloudpickle.loads(placements) if placement.alive()],
            wait_s=self.config.cluster.wait_s,
            question="load",
        )
        if context.was_current_actor_reconstructed:
            self.pool.events.append("the teacher pool died and is started again")
            if not shared_name:  # its replicas died with it, their placements exist
                free_all(replica_name(self.key, ""))
        if shared_name:
            self._reattach()
        Thread(target=self._run, daemon=True).start()

    # ── what the driver asks ───────────────────────────────────────────────────────────────────────────────────────

    def ready(self) -> int:
        """Wait for the initial replicas; return how many are ready. Raises RuntimeError where they cannot start,
        ConfigError where the config is the reason."""
        while True:
            with self.lock:
                if self.pool.broken:
                    raise (ConfigError if self.pool.refused else RuntimeError)(self.pool.broken)
                if (num := len(self.pool.within(State.READY))) >= self.pool.limits.min:
                    return num
            time.sleep(0.1)

    def attach(self) -> tuple[int, dict[str, Any]]:
        """Return a new number for a run, and the identity of the teacher."""
        with self.lock:
            number = 1 + random_tokens.randbelow((1 << 20) - 1)
            while number in self.runs:
                number = 1 + random_tokens.randbelow((1 << 20) - 1)
            self.runs.add(number)
            return number, self.identity

    def detach(self, namespace: int) -> None:
        """Close the sessions of a run that has ended."""
        first = namespace << SESSION_BITS
        with self.lock:
            self.runs.discard(namespace)
            members = self.pool.within(State.READY, State.DRAINING)
        for member in members.values():
            member.handle.close_within.remote(first, first + (1 << SESSION_BITS))

    def events(self, cursor: EventCursor) -> tuple[EventCursor, list[str]]:
        """Return the next cursor, and the events since `cursor`."""
        with self.lock:
            num = cursor.num if cursor.epoch == self.epoch else 0
            return EventCursor(self.epoch, len(self.pool.events)), self.pool.events[num:]

    def drain(self, number: int) -> None:
        """Drain a replica by hand. It is replaced where fewer than the minimum are left."""
        with self.lock:
            self.pool.drain(number, time.monotonic(), "by hand")

    def stop(self) -> None:
        """End all replicas."""
        with self.lock:
            self.stopped = True
            self.pool.close()

    # ── what routers ask ───────────────────────────────────────────────────────────────────────────────────────────

    def members(self, router: str, sessions: Mapping[int, int]) -> bytes:
        """Return a pickled `ReplicaView`: unpickled handles would go into the object store and be lost at a restart."""
        now = time.monotonic()
        with self.lock:
            self.reports.add(router, sessions, now)
            view = ReplicaView(
                ready={number: member.handle for number, member in self.pool.within(State.READY).items()},
                draining={number: member.handle for number, member in self.pool.within(State.DRAINING).items()},
                sessions={number: self.reports.count(number, now, without=router) for number in self.pool.members},
                num_starting=len(self.pool.within(State.STARTING)),
                broken=self.pool.broken,
            )
            return cloudpickle.dumps(view)

    def lost(self) -> None:
        """Check the replicas at once: a router found a dead one."""
        self.wake.set()

    # ── what the pool asks ─────────────────────────────────────────────────────────────────────────────────────────

    def place(self, number: int) -> ProcessPlacement:
        name = replica_name(self.key, number)
        return ProcessPlacement(of_role(self.config, "teacher"), name=name, detached=bool(self.shared_name))

    def create(self, number: int, options: dict[str, Any]) -> Any:
        if self.shared_name:
            options |= {"name": replica_name(self.key, number), "namespace": NAMESPACE, "lifetime": "detached"}
        return cast(Any, TeacherActor).options(**options).remote(*self.replica_args)

    def num_sessions(self, number: int, now: float) -> int:
        return self.reports.count(number, now)

    def is_drained(self, number: int, now: float) -> bool:
        return self.reports.is_drained(number, self.pool.members[number].since, now)

    def measure(self, now: float) -> Load | None:
        elapsed_s = now - self.measured_at
        if elapsed_s < MEASURE_S:
            return None
        self.measured_at = now
        activity = [_activity(member, elapsed_s) for member in self.pool.within(State.READY).values()]
        known = [one for one in activity if one is not None]
        if not known or len(known) < len(activity):
            return None
        return Load.from_calls(
            num=len(known),
            elapsed_s=elapsed_s,
            busy_s=sum(load.busy_s for load, _ in known),
            calls=sum(load.calls for load, _ in known),
            wait_s=sum(wait_s for _, wait_s in known) / len(known),
        )

    def _run(self) -> None:
        while not self.stopped:
            try:
                with self.lock:
                    if not self.stopped:
                        self.pool.reconcile(time.monotonic())
            except Exception:  # the pool must survive all errors of its replicas
                logging.getLogger(__name__).error(
                    "the teacher pool failed to check its replicas: %s", traceback.format_exc()
                )
            self.wake.wait(TICK_S)
            self.wake.clear()

    def _reattach(self) -> None:
        """Register the replicas of a shared pool whose own process died."""
        numbers = sorted(map(int, actor_suffixes(replica_name(self.key, ""))))
        for number in numbers:
            name = replica_name(self.key, number)
            placement = ProcessPlacement(of_role(self.config, "teacher"), name=name, existing=True)
            self.pool.register(number, ray.get_actor(name, namespace=NAMESPACE), placement, time.monotonic())
        if numbers:
            held = {member.placement.key for member in self.pool.members.values()}
            for placement in self.pool.placements:
                if placement.key not in held:
                    placement.free()
            self.pool.placements = []


def _activity(member: Member, elapsed_s: float) -> tuple[ReplicaLoad, float] | None:
    """Return a replica's load since the last measurement, and how long calls queued; None at the first one."""
    waits, member.waits = member.waits, []
    before, member.measured = member.measured, member.answer
    if before is None or member.answer is None or member.probe is None:
        return None
    if not waits:  # busy with one call all the time
        return ReplicaLoad(calls=1, busy_s=elapsed_s), member.probe.waited_s
    calls, busy_s = member.answer.calls - before.calls, member.answer.busy_s - before.busy_s
    return ReplicaLoad(calls=calls, busy_s=busy_s), sum(waits) / len(waits)


def actor_suffixes(prefix: str) -> list[str]:
    """Suffixes of the names of the cluster's actors that begin with the prefix."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name.removeprefix(prefix) for name in names if name and name.startswith(prefix)]


def replica_name(pool: str, number: int | str) -> str:
    """The name of a replica's placement, and of a shared pool's replica. `pool`: its name, or its actor's id."""
    return f"teacher/{pool}/{number}"
