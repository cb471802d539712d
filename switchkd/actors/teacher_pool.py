"""A pool of teacher replicas as an actor: it starts them, replaces dead ones, adds and drains by load, and says who is
there.

In: the config of one teacher, and how many. Out: `Members` for every router that asks (`PoolDirectory`, in the rollout
workers). No session and no row passes through here. A run's own pool lives and dies with the run, its replicas with the
pool; a served one (`serve.py`) is detached, its replicas have names, and a restarted pool finds them again.
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
from ray.exceptions import ActorUnavailableError, RayError

from switchkd.actors import autoscaling
from switchkd.actors.autoscaling import Probe, ReplicaMonitor, load_of
from switchkd.actors.placement_group import ProcessPlacement, free_all
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.actors.ray_futures import RESTART_S, cause_of
from switchkd.actors.replicas import ReplicaRegistry, State
from switchkd.actors.teacher_actor import ReplicaLoad, TeacherActor
from switchkd.actors.teacher_router import SESSION_BITS
from switchkd.config.errors import first_line
from switchkd.config.resources import of_role
from switchkd.config.schema import Config, ReplicaRange

TICK_S = 0.5
"""How often the pool looks after its replicas."""
LOOK_S = 2.0
"""How long one look at the load takes."""
SEEN_S = 5.0
"""By then every router has heard of a drain."""
ROOM_S = 60.0
"""How long an additional replica may wait for its place before the pool gives up on it."""
MAX_FAILURES = 3
"""Replicas in a row that could not start, after which the pool is broken."""
NAMESPACE = "switchkd"
"""Of the names of served teachers."""


class EventCursor(NamedTuple):
    """So many lines of a pool's log, in one of its lives: one that was started again begins a new log."""

    epoch: str
    num: int


NO_EVENTS = EventCursor("", 0)


@ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0, max_concurrency=32)
class TeacherPoolActor:
    """`placements`: for the first replicas, pickled. `served`: the pool's name where it is detached."""

    def __init__(
        self,
        config: dict[str, Any],
        placements: bytes,
        secrets: Secrets,
        working_dir: str,
        served: str,
        facts: dict[str, Any],
    ) -> None:
        prepare(secrets, working_dir)
        self.config = Config.model_validate(config)
        self.to_replicas = (config, secrets, working_dir)
        self.span = ReplicaRange.of(self.config.teacher.replicas)
        self.placements: list[ProcessPlacement] = [
            placement for placement in cloudpickle.loads(placements) if placement.alive()
        ]
        self.served, self.facts = served, facts
        self.roster, self.watches = ReplicaRegistry(), dict[int, ReplicaMonitor]()
        self.lock, self.wake, self.stopped = RLock(), Event(), False
        self.epoch = random_tokens.token_hex(4)
        itself = ray.get_runtime_context()
        self.key = served or itself.get_actor_id()
        self.log: list[str] = []
        if itself.was_current_actor_reconstructed:
            self.log.append("the teacher pool died and is started again")
            if not served:  # its replicas died with it, their places did not
                free_all(self._name(""))
        self.ever_ready, self.num_failed, self.hold_until = False, 0, 0.0
        self.runs: set[int] = set()
        self.loads: list[autoscaling.Load] = []
        self.looked = time.monotonic()
        self._reattach()
        Thread(target=self._run, daemon=True).start()

    # ── what the driver asks ───────────────────────────────────────────────────────────────────────────────────────

    def ready(self) -> int:
        """Replicas that work, once there are as many as it starts with. Raises RuntimeError where they cannot start."""
        while True:
            with self.lock:
                if self.roster.broken:
                    raise RuntimeError(self.roster.broken)
                if (num := len(self.roster.within(State.READY))) >= self.span.min:
                    return num
            time.sleep(0.1)

    def attach(self) -> tuple[int, dict[str, Any]]:
        """A number for a run, which no other run has, and what is served here."""
        with self.lock:
            number = 1 + random_tokens.randbelow((1 << 20) - 1)
            while number in self.runs:
                number = 1 + random_tokens.randbelow((1 << 20) - 1)
            self.runs.add(number)
            return number, self.facts

    def detach(self, namespace: int) -> None:
        """The run of this number has ended."""
        first = namespace << SESSION_BITS
        with self.lock:
            self.runs.discard(namespace)
            handles = self.roster.within(State.READY, State.DRAINING)
        for handle in handles.values():
            handle.close_within.remote(first, first + (1 << SESSION_BITS))

    def events(self, told: EventCursor) -> tuple[EventCursor, list[str]]:
        """What happened since, and what has been told with it."""
        with self.lock:
            num = told.num if told.epoch == self.epoch else 0
            return EventCursor(self.epoch, len(self.log)), self.log[num:]

    def stop(self) -> None:
        """End all replicas."""
        with self.lock:
            self.stopped = True
            for number in list(self.watches):
                self._end(number)
            for placement in self.placements:
                placement.free()

    # ── what routers ask ───────────────────────────────────────────────────────────────────────────────────────────

    def members(self, router: str, sessions: Mapping[int, int]) -> bytes:
        """Pickled: as they are, handles would go into the object store, where a restart may not find them."""
        now = time.monotonic()
        with self.lock:
            self.roster.report(router, sessions, now)
            return cloudpickle.dumps(self.roster.members(router, now))

    def lost(self) -> None:
        """A router met a dead replica: look at once."""
        self.wake.set()

    # ── looking after the replicas ─────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while not self.stopped:
            try:
                with self.lock:
                    self._reconcile(time.monotonic())
            except Exception:  # the pool must outlive whatever its replicas do
                logging.getLogger(__name__).error("the teacher pool stumbled: %s", traceback.format_exc())
            self.wake.wait(TICK_S)
            self.wake.clear()

    def _reconcile(self, now: float) -> None:
        if self.stopped:
            return
        for number in list(self.watches):
            self._poll(number, now)
        for number in self.roster.drained(now, SEEN_S):
            self._end(number)
            self._say(f"teacher replica {number} is drained and has ended")
        while len(self.roster.within(State.STARTING, State.READY)) < self.span.min and not self.roster.broken:
            self._start(now)
        self._scale(now)

    def _poll(self, number: int, now: float) -> None:
        """Take in what a replica answered, and ask again."""
        watch = self.watches[number]
        if not watch.probe.answered:
            self._give_up(number, now)
            return
        try:
            answer = ray.get(watch.probe.ref)
        except ActorUnavailableError:
            self._restarting(number, now)
        except RayError as error:
            self._lost(number, _reason(error))
        else:
            self._answered(number, answer, now)

    def _answered(self, number: int, answer: Any, now: float) -> None:
        watch, replica = self.watches[number], self.roster.replicas[number]
        if isinstance(answer, ReplicaLoad):
            watch.waits.append(watch.probe.waited_s)
            watch.now = answer
        if replica.state is State.STARTING:
            self.roster.set_state(number, State.READY, now)
            self.ever_ready, self.num_failed, self.loads = True, 0, []
            if watch.told:
                self._say(f"teacher replica {number} works")
        watch.probe = Probe(replica.handle.load.remote())

    def _restarting(self, number: int, now: float) -> None:
        """Ray starts it again by itself; it is asked until it answers, or for RESTART_S."""
        watch, replica = self.watches[number], self.roster.replicas[number]
        if replica.state is State.STARTING and now - replica.since > RESTART_S:
            self._lost(number, f"it dies whenever it is started, for {RESTART_S:g} s now; see its log")
            return
        if replica.state is State.DRAINING:
            self._end(number)
            return
        if replica.state is State.READY:
            self.roster.set_state(number, State.STARTING, now)
            watch.told, watch.now, watch.before, watch.waits = True, None, None, []
            self._say(f"teacher replica {number} died and is started again")
        watch.probe = Probe(replica.handle.ready.remote())

    def _lost(self, number: int, told: str) -> None:
        """It will not come back: another takes its place."""
        starting = self.roster.replicas[number].state is State.STARTING
        self._end(number)
        self._say(f"teacher replica {number} is lost: {told}")
        self.num_failed += starting
        if self.num_failed >= (MAX_FAILURES if self.ever_ready else 1):
            self.roster.broken = told

    def _give_up(self, number: int, now: float) -> None:
        """On an additional replica that finds no room."""
        watch, replica = self.watches[number], self.roster.replicas[number]
        beyond = len(self.roster.within(State.STARTING, State.READY)) > self.span.min
        patience = max(ROOM_S, self.config.cluster.wait_s)
        if (
            replica.state is State.STARTING
            and beyond
            and now - replica.since > patience
            and not watch.placement.wait(0)
        ):
            self._end(number)
            self.hold_until = now + 10 * patience
            self._say("the cluster has no room for one more teacher replica")

    # ── more, fewer ────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, now: float) -> None:
        name = self._name(self.roster.num_ever)
        if self.placements:
            placement = self.placements.pop(0)
        else:
            placement = ProcessPlacement(of_role(self.config, "teacher"), name=name, detached=bool(self.served))
        options = placement.options()
        if self.served:
            options |= {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
        self._register(cast(Any, TeacherActor).options(**options).remote(*self.to_replicas), placement, now)

    def _register(self, handle: Any, placement: ProcessPlacement, now: float) -> None:
        number = self.roster.add(handle, now)
        told = self.ever_ready
        self.watches[number] = ReplicaMonitor(placement=placement, probe=Probe(handle.ready.remote()), told=told)

    def _reattach(self) -> None:
        """Replicas of a served pool whose own process died."""
        prefix, now = self._name(""), time.monotonic()
        if not self.served:
            return
        numbers = sorted(map(int, actor_suffixes(prefix)))
        for number in numbers:
            self.roster.num_ever = number
            placement = ProcessPlacement.named(of_role(self.config, "teacher"), self._name(number))
            self._register(ray.get_actor(self._name(number), namespace=NAMESPACE), placement, now)
        if numbers:
            held = {watch.placement.key for watch in self.watches.values()}
            for placement in self.placements:
                if placement.key not in held:
                    placement.free()
            self.placements = []

    def _end(self, number: int) -> None:
        handle, placement = self.roster.replicas[number].handle, self.watches.pop(number).placement
        self.roster.remove(number)
        self.loads = []
        ray.kill(handle)
        placement.free()

    def _scale(self, now: float) -> None:
        """Once a look: measure, remember, decide."""
        elapsed = now - self.looked
        if elapsed < LOOK_S:
            return
        self.looked = now
        ready = self.roster.within(State.READY)
        looks = [self.watches[number].look(elapsed) for number in ready]
        if not ready or self.roster.within(State.STARTING) or None in looks:
            return
        load = load_of([look for look in looks if look], elapsed)
        self.loads = [*self.loads, load][-autoscaling.DRAIN_LOOKS :]
        step = autoscaling.decide(self.loads, self.span)
        if step > 0 and now >= self.hold_until:
            self.loads = []
            self._say(f"{load.queue:.1f} calls wait for each of {load.num} teacher replicas: one is added")
            self._start(now)
        elif step < 0:
            self._drain(self.roster.to_drain(now), now, f"{load.num} teacher replicas are busy {load.busy_frac:.0%}")

    def drain(self, number: int) -> None:
        """Let one go by hand. It is replaced where fewer than the smallest number are left."""
        with self.lock:
            self._drain(number, time.monotonic(), "asked for")

    def _drain(self, number: int, now: float, why: str) -> None:
        self.loads = []
        self.roster.set_state(number, State.DRAINING, now)
        self._say(f"{why}: replica {number} is drained")

    # ── small things ───────────────────────────────────────────────────────────────────────────────────────────────

    def _name(self, number: int | str) -> str:
        return replica_name(self.key, number)

    def _say(self, text: str) -> None:
        self.log.append(text)


def _reason(error: RayError) -> str:
    """What a replica's start raised; else Ray's first line."""
    line = first_line(error)
    return str(cause_of(error)) if "creation task" in line else line


def actor_suffixes(prefix: str) -> list[str]:
    """What follows the prefix in the names of the cluster's actors."""
    known = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    return [name.removeprefix(prefix) for name in known if name and name.startswith(prefix)]


def replica_name(served: str, number: int | str) -> str:
    """Of a replica's place, and of a served pool's replica. `served`: the pool's name, or its actor's id."""
    return f"teacher/{served}/{number}"
