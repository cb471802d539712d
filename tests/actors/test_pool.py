"""ProcessPool without a cluster: which processes it starts, adds, drains and ends, and the view that routers get."""

from __future__ import annotations

from concurrent.futures import Future
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from switchkd.actors import pool as pool_module
from switchkd.actors.autoscaling import ADD_LOOKS, DRAIN_LOOKS, Load
from switchkd.actors.pool import MAX_FAILURES, PATIENCE_S, ProcessPool, State
from switchkd.actors.ray_futures import RESTART_S
from switchkd.actors.replicas import DRAIN_S, FORGET_S, NOTICE_S, SessionReports
from switchkd.config.errors import ConfigError
from switchkd.config.schema import ReplicaRange

CROWDED = Load(num=1, busy_frac=1.0, queue=2.0, wait_frac=0.5)
IDLE = Load(num=3, busy_frac=0.1, queue=0.0, wait_frac=0.0)


class Process:
    """An actor's handle; each call is a future that a test answers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Future[Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def remote() -> Any:
            self.calls.append((name, Future()))
            future = self.calls[-1][1]
            return SimpleNamespace(future=lambda: future)

        return SimpleNamespace(remote=remote)

    def answer(self, value: Any = None, error: Exception | None = None) -> None:
        future = self.calls[-1][1]
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


class Owner:
    """Starts `Process`es and returns what a test sets. A placement is reserved unless `full`."""

    def __init__(self) -> None:
        self.load: Load | None = None
        self.full = False
        self.sessions: dict[int, int] = {}
        self.freed = 0

    def place(self, number: int) -> Any:
        return SimpleNamespace(options=dict, wait=lambda timeout_s: not self.full, free=self.free)

    def free(self) -> None:
        self.freed += 1

    def create(self, number: int, options: dict[str, Any]) -> Process:
        return Process()

    def measure(self, now: float) -> Load | None:
        return self.load

    def num_sessions(self, number: int, now: float) -> int:
        return self.sessions.get(number, 0)

    def is_drained(self, number: int, now: float) -> bool:
        return not self.sessions.get(number)


@pytest.fixture
def killed(monkeypatch) -> list[Process]:
    """The handles that the pool killed; its Ray is a double."""
    handles: list[Process] = []
    double = SimpleNamespace(get=lambda ref: ref.future().result(), kill=handles.append)
    monkeypatch.setattr(pool_module, "ray", double)
    return handles


def made(num: int, most: int) -> tuple[ProcessPool, Owner]:
    """A pool of 1 to `most` processes, of which `num` are ready, and its owner."""
    owner = Owner()
    pool = ProcessPool(owner, "teacher replica", ReplicaRange(min=1, max=most), question="load")
    for number in range(num):
        pool.start(0.0)
        pool.members[number].handle.answer(True)
    pool.reconcile(0.0)
    assert list(pool.within(State.READY)) == list(range(num))
    return pool, owner


def test_a_pool_grows_when_requests_queue(killed):
    """A process is added after ADD_LOOKS crowded measurements, up to the largest size, and counts once it is ready."""
    pool, owner = made(1, 2)
    owner.load = CROWDED
    for _ in range(ADD_LOOKS):
        assert len(pool.members) == 1
        pool.reconcile(1.0)
    assert list(pool.within(State.STARTING)) == [1] and pool.events[-1].endswith("one is added")
    assert pool.events[-1].startswith("2.0 requests wait for each of 1 teacher replicas, 50% of the time")
    pool.members[1].handle.answer(True)
    owner.load = Load(num=2, busy_frac=1.0, queue=2.0, wait_frac=0.5)
    for _ in range(2 * ADD_LOOKS):
        pool.reconcile(2.0)
    assert list(pool.within(State.READY)) == [0, 1] and pool.events[-1] == "teacher replica 1 works"


def test_an_idle_pool_drains_a_process_before_ending_it(killed):
    """The newest process with the fewest sessions is drained and ends without any; numbers are not reused."""
    pool, owner = made(3, 3)
    owner.load, owner.sessions = IDLE, {0: 3, 1: 1, 2: 1}
    for _ in range(DRAIN_LOOKS):
        assert list(pool.within(State.READY)) == [0, 1, 2]
        pool.reconcile(1.0)
    assert list(pool.within(State.DRAINING)) == [2]
    assert pool.events[-1] == "3 teacher replicas are busy 10%: teacher replica 2 is drained"
    owner.load = None
    pool.reconcile(2.0)
    assert 2 in pool.members and not killed
    handle = pool.members[2].handle
    owner.sessions = {0: 1, 1: 0}
    pool.reconcile(3.0)
    assert 2 not in pool.members and killed == [handle] and owner.freed == 1
    assert pool.events[-1] == "teacher replica 2 is drained and has ended"
    owner.load = IDLE
    for _ in range(DRAIN_LOOKS):
        pool.reconcile(4.0)
    assert list(pool.within(State.DRAINING)) == [1]
    pool.start(5.0)
    assert list(pool.within(State.STARTING)) == [3]


def test_an_additional_process_without_a_placement_is_given_up(killed):
    """An additional process without a placement ends after PATIENCE_S; no other is added for ten times as long."""
    pool, owner = made(1, 2)
    owner.load = CROWDED
    for _ in range(ADD_LOOKS):
        pool.reconcile(0.0)
    pool.reconcile(PATIENCE_S + 1)
    assert 1 in pool.members, "it has its placement and is slow to start"
    owner.full = True
    pool.reconcile(PATIENCE_S + 1)
    assert list(pool.members) == [0] and pool.events[-1] == "one more teacher replica cannot be placed on the cluster"
    for _ in range(ADD_LOOKS):
        pool.reconcile(2 * PATIENCE_S)
    assert list(pool.members) == [0]
    pool.reconcile(12 * PATIENCE_S)
    assert list(pool.members) == [0, 2]


def test_a_dead_process_is_restarted_or_replaced(killed):
    """A process that Ray restarts is not ready until it answers; one that is lost for good is replaced."""
    pool, _ = made(1, 1)
    pool.members[0].handle.answer(error=ActorUnavailableError("not now", None))
    pool.reconcile(1.0)
    assert list(pool.within(State.STARTING)) == [0]
    pool.members[0].handle.answer(True)
    pool.reconcile(2.0)
    assert pool.events == ["teacher replica 0 died and is started again", "teacher replica 0 works"]
    pool.members[0].handle.answer(error=ActorDiedError())
    pool.reconcile(3.0)
    assert list(pool.within(State.STARTING)) == [1] and pool.events[2].startswith("teacher replica 0 is lost: ")


def test_a_draining_process_that_dies_is_not_awaited(killed):
    """A draining process that Ray restarts is ended at once, although sessions are counted on it."""
    pool, owner = made(2, 2)
    owner.sessions = {1: 4}
    pool.drain(1, 1.0, "by hand")
    pool.members[1].handle.answer(error=ActorUnavailableError("not now", None))
    pool.reconcile(2.0)
    assert list(pool.members) == [0] and len(killed) == 1


def test_processes_that_die_at_each_start_break_the_pool(killed):
    """A process that dies at each start is replaced after RESTART_S; MAX_FAILURES of them break the pool."""
    pool, _ = made(1, 1)
    pool.members[0].handle.answer(error=ActorDiedError())
    now = 0.0
    for number in range(1, MAX_FAILURES + 1):
        pool.reconcile(now)
        assert list(pool.members) == [number] and not pool.broken
        for later in (RESTART_S - 1, RESTART_S + 1):
            assert number in pool.members
            pool.members[number].handle.answer(error=ActorUnavailableError("not now", None))
            pool._poll(number, now + later)
        now += RESTART_S + 1
    pool.reconcile(now)
    assert not pool.members
    assert pool.broken == "it dies whenever it is started, for 600 s now; see its log"
    assert pool.events[1] == f"teacher replica 1 is lost: {pool.broken}"


def test_a_first_process_that_cannot_start_breaks_the_pool(killed):
    """A pool whose first process cannot start is broken, with the error of that start."""
    pool = ProcessPool(Owner(), "teacher replica", ReplicaRange(min=1, max=1))
    pool.reconcile(0.0)
    raised = RayTaskError("__init__", "Traceback ...\nValueError: no such model", ValueError("no such model"))
    raised._actor_id = "0"
    pool.members[0].handle.answer(error=ActorDiedError(raised))
    pool.reconcile(1.0)
    assert not pool.members and pool.broken == "an actor could not start: ValueError: no such model"
    assert not pool.refused


def test_a_refused_config_breaks_the_pool_as_such(killed):
    """A pool whose first process refuses the config keeps the line, and that it is the user's to correct."""
    pool = ProcessPool(Owner(), "teacher replica", ReplicaRange(min=1, max=1))
    pool.reconcile(0.0)
    said = "Traceback ...\nswitchkd.config.errors.ConfigError: teacher.path=x: no; take y"
    raised = RayTaskError("__init__", said, ConfigError("teacher.path=x: no; take y"))
    raised._actor_id = "0"
    pool.members[0].handle.answer(error=ActorDiedError(raised))
    pool.reconcile(1.0)
    assert pool.refused and pool.broken == "teacher.path=x: no; take y"


# --- the view of a router --------------------------------------------------------------------------------------------


def test_a_router_gets_replicas_and_the_load_of_others(killed):
    """A router's view holds ready and draining replicas, the number that start, and other routers' sessions."""
    from switchkd.actors.teacher_pool import TeacherPoolActor

    actor = object.__new__(TeacherPoolActor.__ray_metadata__.modified_class)
    actor.lock, actor.reports = RLock(), SessionReports()
    actor.pool, _ = made(2, 3)
    actor.pool.start(0.0)
    for member, handle in zip(actor.pool.members.values(), "xyz", strict=True):
        member.handle = handle
    actor.pool.drain(1, 0.0, "by hand")
    actor.members("b", {0: 1, 1: 4})
    view = cloudpickle.loads(actor.members("a", {0: 3}))
    assert (dict(view.ready), dict(view.draining)) == ({0: "x"}, {1: "y"})
    assert dict(view.sessions) == {0: 1, 1: 4, 2: 0} and view.num_starting == 1


def test_a_replica_without_sessions_is_drained():
    """A draining replica may end without sessions once NOTICE_S have passed, and in any case after DRAIN_S."""
    reports = SessionReports()
    reports.add("a", {0: 1}, 0.0)
    assert not reports.is_drained(0, 0.0, NOTICE_S - 1) and not reports.is_drained(0, 0.0, NOTICE_S + 1)
    reports.add("a", {}, 7.0)
    assert not reports.is_drained(0, 4.0, 8.0) and reports.is_drained(0, 0.0, 8.0)
    reports.add("a", {0: 2}, DRAIN_S)
    assert not reports.is_drained(0, 0.0, DRAIN_S) and reports.is_drained(0, 0.0, DRAIN_S + 1)


def test_a_router_without_reports_counts_no_more():
    """The sessions of a router without a report for FORGET_S do not count."""
    reports = SessionReports()
    reports.add("a", {0: 7}, 0.0)
    assert reports.count(0, FORGET_S) == 7 and reports.count(0, FORGET_S + 1) == 0
