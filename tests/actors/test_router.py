"""TeacherRouter with replicas in this process: which replica gets a session, and what happens when one is lost."""

from __future__ import annotations

import pickle
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pools import FixedPool, ThunkReplica, fetch
from toy import ToyTeacher, pair

from switchkd.actors.replicas import ReplicaView
from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.types import Blocks, Ragged, Sessions, TeacherLost

CHAIN = pair()[0]


@pytest.fixture
def routing(monkeypatch) -> Any:
    """The module, whose ray.get runs thunks and whose pauses are short."""
    from switchkd.actors import teacher_router

    monkeypatch.setattr(teacher_router.ray, "get", fetch)
    monkeypatch.setattr(teacher_router, "PAUSE_S", 0.001)
    monkeypatch.setattr(teacher_router, "MAX_PAUSE_S", 0.01)
    return teacher_router


@pytest.fixture
def pauses(routing, monkeypatch) -> list[float]:
    """The router's pauses, recorded instead of slept."""
    found: list[float] = []
    monkeypatch.setattr(routing, "PAUSE_S", 0.2)
    monkeypatch.setattr(routing, "MAX_PAUSE_S", 3.0)
    monkeypatch.setattr(routing.time, "sleep", found.append)
    return found


def lost() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def away() -> Exception:
    from ray.exceptions import ActorUnavailableError

    return ActorUnavailableError("not now", None)


def opened(*ids: int) -> Sessions:
    """Sessions with the prompt (id, 3)."""
    return Sessions(
        session_ids=np.array(ids), tokens=Ragged.concat([[i % 20, 3] for i in ids], np.int32),
    )  # fmt: skip


def block(*ids: int, base: int = 2, tokens: tuple[int, ...] = (5, 6)) -> Blocks:
    num = len(ids)
    return Blocks(
        session_ids=np.array(ids), base_lens=np.full(num, base, np.int32),
        first_rows=np.full(num, base - 1, np.int32), tokens=Ragged.concat([tokens] * num, np.int32),
    )  # fmt: skip


def replicas(num: int) -> dict[int, ThunkReplica]:
    return {i: ThunkReplica(ToyTeacher(CHAIN)) for i in range(num)}


def alone(*blocks_and_ids: Any) -> np.ndarray:
    """The rows of a single teacher that is never lost."""
    teacher = ToyTeacher(CHAIN)
    ids, blocks = blocks_and_ids
    teacher.open(opened(*ids))
    return [teacher.score(each).rows.values for each in blocks][-1]


def held(pool: dict[int, ThunkReplica]) -> dict[int, list[int]]:
    return {i: sorted(replica.teacher.sessions) for i, replica in pool.items()}


class TestRouter:
    def test_a_new_session_goes_to_the_least_loaded_replica(self, routing):
        """A new session goes to the replica with the fewest sessions: reported ones of other workers and its own."""
        pool = replicas(3)
        pool_client = FixedPool(pool)
        pool_client.members = ReplicaView(ready=pool, draining={}, sessions={0: 2, 1: 5, 2: 3})
        router = routing.TeacherRouter(pool_client)
        for i in range(5):
            router.open(opened(i))
        assert held(pool) == {0: [0, 1, 3], 1: [], 2: [2, 4]}
        assert pool_client.reported[-1] == {0: 3, 2: 1}, "its own sessions are reported"

    def test_workers_start_at_different_replicas(self, routing):
        """Routers with different `first` open their first sessions at different replicas."""
        pool = replicas(3)
        for first in range(3):
            routing.TeacherRouter(FixedPool(pool), first=first).open(opened(first))
        assert held(pool) == {0: [0], 1: [1], 2: [2]}

    def test_a_draining_replica_keeps_its_sessions_and_gets_no_new_one(self, routing):
        """A draining replica keeps its sessions and gets no new one; once it has left they move with the same rows."""
        pool = replicas(2)
        pool_client = FixedPool(pool)
        router = routing.TeacherRouter(pool_client)
        router.open(opened(0))
        pool_client.members = ReplicaView(ready={1: pool[1]}, draining={0: pool[0]}, sessions={})
        router.open(opened(1))
        router.score(block(0, 1))
        assert held(pool) == {0: [0], 1: [1]}
        pool_client.members = ReplicaView(ready={1: pool[1]}, draining={}, sessions={})
        rows = router.score(block(0, 1, base=4, tokens=(7,))).rows.values
        assert held(pool)[1] == [0, 1]
        np.testing.assert_allclose(rows, alone((0, 1), (block(0, 1), block(0, 1, base=4, tokens=(7,)))))

    @pytest.mark.parametrize("fault", [lost, away])
    def test_sessions_of_a_lost_replica_move(self, routing, fault):
        """Sessions of a lost replica give the same rows at another one; only a dead replica is reported to the pool."""
        pool = replicas(2)
        pool_client = FixedPool(pool)
        router = routing.TeacherRouter(pool_client)
        router.open(opened(0))
        router.open(opened(1))
        router.score(block(0, 1))
        pool[0].faults = [fault()]
        rows = router.score(block(0, 1, base=4, tokens=(7,))).rows.values
        np.testing.assert_allclose(rows, alone((0, 1), (block(0, 1), block(0, 1, base=4, tokens=(7,)))))
        assert held(pool)[1] == [0, 1] and pool_client.num_lost == (fault is lost)
        router.open(opened(2))
        assert held(pool)[1] == [0, 1, 2], "a replica that failed gets no new session for a while"

    def test_a_call_over_which_three_replicas_die_is_given_up(self, routing, pauses):
        """A call over which replicas die three times raises TeacherLost, also when repeated; others are answered."""
        pool = {i: DyingReplica(deadly=1) for i in range(2)}
        router = routing.TeacherRouter(DyingPool(pool))
        router.open(opened(0))
        for num in (3, 6):
            router.open(opened(1))
            with pytest.raises(TeacherLost, match="3 times in a row its teacher died over the same call"):
                router.score(block(0, 1))
            assert sum(replica.deaths for replica in pool.values()) == num
        router.close(np.array([1]))
        np.testing.assert_allclose(router.score(block(0)).rows.values, alone((0,), (block(0),)))

    def test_an_answer_resets_the_count_of_losses(self, routing, pauses):
        """Losses with answers in between do not add up, and a replica that stays away is one loss."""
        pool = {0: DyingReplica(deadly=-1)}
        pool_client = DyingPool(pool, noticed=20)
        router = routing.TeacherRouter(pool_client)
        router.open(opened(0))
        for _ in range(4):
            pool[0].die()
            np.testing.assert_allclose(router.score(block(0)).rows.values, alone((0,), (block(0),)))
        assert pool[0].deaths == 4 and len(pool[0].calls) > 40, "it was called while it was away"

    def test_pauses_double_up_to_a_limit(self, routing, pauses):
        """Pauses between retries double, up to MAX_PAUSE_S."""
        pool = {0: DyingReplica(deadly=-1)}
        router = routing.TeacherRouter(DyingPool(pool, noticed=7))
        pool[0].die()
        router.open(opened(0))
        assert pauses[:6] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.0, 3.0])

    def test_an_unknown_session_is_opened_again(self, routing):
        """A session that its replica does not know is opened there again."""
        pool = replicas(1)
        router = routing.TeacherRouter(FixedPool(pool))
        router.open(opened(3))
        pool[0].faults = [UnknownSession([3])]
        np.testing.assert_allclose(router.score(block(3)).rows.values, alone((3,), (block(3),)))

    def test_the_wait_for_a_replica_has_a_limit_unless_one_starts(self, routing, monkeypatch):
        """Without replicas the router waits while one is starting, and for RETRY_FOR_S otherwise."""
        pool = replicas(2)
        pool_client = FixedPool(pool)
        router = routing.TeacherRouter(pool_client)
        router.open(opened(0))
        begun = time.monotonic()

        def ask(sessions):
            """One replica is starting for longer than RETRY_FOR_S, then it is ready."""
            there = time.monotonic() - begun > 0.5
            return ReplicaView(
                ready={9: pool[1]} if there else {}, draining={}, sessions={}, num_starting=int(not there)
            )

        monkeypatch.setattr(pool_client, "ask", ask)
        monkeypatch.setattr(pool_client, "poll", lambda sessions: None)
        monkeypatch.setattr(routing, "RETRY_FOR_S", 0.05)
        pool_client.members = ReplicaView(ready={}, draining={}, sessions={}, num_starting=1)
        router._view = pool_client.members
        np.testing.assert_allclose(router.score(block(0)).rows.values, alone((0,), (block(0),)))
        monkeypatch.setattr(pool_client, "ask", lambda sessions: ReplicaView(ready={}, draining={}, sessions={}))
        router._view = ReplicaView(ready={}, draining={}, sessions={})
        with pytest.raises(RuntimeError, match=r"no teacher replica answered for 0\.05 s"):
            router.score(block(0))

    def test_a_broken_pool_ends_the_wait(self, routing):
        """A pool that cannot start replicas any more ends the wait with its reason."""
        pool_client = FixedPool({})
        pool_client.members = ReplicaView(ready={}, draining={}, sessions={}, broken="no weights")
        with pytest.raises(RuntimeError, match="there is no teacher any more: no weights"):
            routing.TeacherRouter(pool_client).open(opened(0))

    def test_full_replicas_are_skipped(self, routing):
        """A full replica is skipped; when all are full the router raises TeacherBusy."""
        pool = replicas(2)
        router = routing.TeacherRouter(FixedPool(pool))
        pool[0].faults = [TeacherBusy("full")]
        router.open(opened(0))
        assert held(pool) == {0: [], 1: [0]}
        for replica in pool.values():
            replica.faults = [TeacherBusy("full")]
        with pytest.raises(TeacherBusy, match="no teacher replica has slots for 1 sessions"):
            router.open(opened(1))

    def test_runs_do_not_share_sessions(self, routing):
        """Two runs with sessions of the same numbers at one replica get the rows of their own tokens."""
        pool = replicas(1)
        routers = [routing.TeacherRouter(FixedPool(pool), namespace=n) for n in (1, 2)]
        routers[0].open(opened(0))
        other = Sessions(session_ids=np.array([0]), tokens=Ragged.concat([[9, 9]], np.int32))
        routers[1].open(other)
        assert len(pool[0].teacher.sessions) == 2
        np.testing.assert_allclose(routers[0].score(block(0)).rows.values, alone((0,), (block(0),)))
        routers[1].close(np.array([0]))
        assert list(pool[0].teacher.sessions) == [1 << routing.SESSION_BITS]
        largest = (1 << 20) - 1 << routing.SESSION_BITS
        assert largest + (1 << routing.SESSION_BITS) - 1 < 1 << 63, "every run's sessions have room in an int64"


class DyingReplica(ThunkReplica):
    """A replica whose process dies when it scores the session `deadly`, and has no sessions when it is back."""

    def __init__(self, deadly: int) -> None:
        super().__init__(ToyTeacher(CHAIN))
        self.deadly, self.deaths, self.looks = deadly, 0, 0  # looks: since its death; 0: it is alive

    def die(self) -> None:
        self.deaths, self.looks = self.deaths + 1, 1
        self.teacher = ToyTeacher(CHAIN)

    def _run(self, name: str, args: tuple[Any, ...]) -> Any:
        if not self.looks and name == "score" and self.deadly in args[0].session_ids:
            self.die()
        if self.looks and name != "close":  # no caller waits for that
            self.calls.append(name)
            raise away()
        return super()._run(name, args)


class DyingPool(FixedPool):
    """A pool of `DyingReplica`s: at the look `noticed` after its death one is missing, at the next it is back."""

    def __init__(self, ready: dict[int, DyingReplica], noticed: int = 2) -> None:
        super().__init__(ready)
        self.noticed = noticed

    def ask(self, sessions: Any) -> ReplicaView:
        ready = {}
        for number, replica in self.members.ready.items():
            if replica.looks > self.noticed:
                replica.looks = 0
            elif replica.looks:
                replica.looks += 1
            if replica.looks <= self.noticed:
                ready[number] = replica
        return ReplicaView(ready=ready, draining={}, sessions={}, num_starting=len(self.members.ready) - len(ready))

    def poll(self, sessions: Any) -> None:
        return None


def test_teacher_lost_reaches_the_driver(routing):
    """A TeacherLost in a worker reaches the driver with its type and message."""
    from ray.exceptions import RayTaskError

    from switchkd.actors.ray_futures import worker_future

    failed: Future[Any] = Future()
    raised = RayTaskError("generate", "", pickle.loads(pickle.dumps(TeacherLost("3 times"))))
    failed.set_exception(raised.as_instanceof_cause())
    found = worker_future(SimpleNamespace(future=lambda: failed)).exception()
    assert type(found) is TeacherLost and str(found) == "3 times"


class TestPoolClient:
    def test_poll_has_one_call_in_flight_and_never_waits(self, monkeypatch):
        """`poll` keeps one call in flight, never waits, and calls again after an error; an ended pool is broken."""
        from ray import cloudpickle
        from ray.exceptions import ActorUnavailableError

        from switchkd.actors import pool_client

        members = ReplicaView(ready={0: "x"}, draining={}, sessions={})
        asked: list[dict[int, int]] = []
        done: list[bool] = [False]
        fails: list[Exception] = []

        def get(ref, timeout=None):
            if fails:
                raise fails.pop()
            return cloudpickle.dumps(members)

        pool = SimpleNamespace(members=SimpleNamespace(remote=lambda router, sessions: asked.append(sessions) or "ref"))
        monkeypatch.setattr(pool_client.ray, "get", get)
        monkeypatch.setattr(pool_client.ray, "wait", lambda refs, timeout: (refs, []) if done[0] else ([], refs))
        clock = [100.0]
        monkeypatch.setattr(pool_client.time, "monotonic", lambda: clock[0])
        here = pool_client.PoolClient(pool, "0/0")
        assert here.poll({0: 1}) is None and here.poll({0: 2}) is None and asked == [{0: 1}]
        done[0] = True
        assert here.poll({0: 3}) == members
        assert here.poll({0: 4}) is None and len(asked) == 1, "not before POLL_S"
        clock[0] += 2 * pool_client.POLL_S
        fails.append(ActorUnavailableError("", None))
        assert here.poll({0: 5}) is None and here.poll({}) is None and asked[-1] == {0: 5}
        fails.append(ActorUnavailableError("", None))
        assert here.ask({}) is None and here.ask({}) == members
        fails.append(lost())
        ended = here.ask({})
        assert not ended.ready and ended.broken == "their pool was ended"
