"""Ray's references as plain futures: calls while Ray shuts down, and errors of ranks. (No cluster: Ray is a double.)"""

from __future__ import annotations

from concurrent.futures import Future
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from switchkd.types import StateLost


@pytest.fixture
def ray(monkeypatch) -> Any:
    """A double that is up until `shutdown`, during which `meanwhile` runs in a thread and a call would be an error."""
    from switchkd.actors import ray_futures

    double = SimpleNamespace(up=True, going=False, meanwhile=lambda: None)

    def shutdown() -> None:
        double.going = True
        thread = Thread(target=double.meanwhile)
        thread.start()
        thread.join()
        double.up = double.going = False

    double.shutdown, double.is_initialized = shutdown, lambda: double.up
    monkeypatch.setattr(ray_futures, "ray", double)
    return double


def call(ray: Any) -> Any:
    answered: Future[int] = Future()
    answered.set_result(7)
    assert ray.up and not ray.going, "Ray is down"
    return SimpleNamespace(future=lambda: answered)


def test_no_call_reaches_a_ray_that_shuts_down(ray):
    """During and after a shutdown calls give RaySystemError and do not reach Ray; a Ray that is up again answers."""
    from ray.exceptions import RaySystemError

    from switchkd.actors.ray_futures import retry_until_alive, shut_down

    late: list[Future[Any]] = []
    ray.meanwhile = lambda: late.append(retry_until_alive(lambda: call(ray)))
    assert retry_until_alive(lambda: call(ray)).result(1) == 7
    shut_down()
    late.append(retry_until_alive(lambda: call(ray)))
    assert [type(one.exception(1)) for one in late] == [RaySystemError] * 2
    ray.up = True
    assert retry_until_alive(lambda: call(ray)).result(1) == 7


def test_shutdown_waits_for_a_call_that_is_being_started(ray):
    """Ray shuts down only once a call that another thread is starting was sent."""
    from switchkd.actors.ray_futures import retry_until_alive, shut_down

    starting, order = Event(), []

    def slowly() -> Any:
        starting.set()
        Event().wait(0.3)
        order.append("sent")
        return call(ray)

    ray.meanwhile = lambda: order.append("down")
    thread = Thread(target=lambda: order.append(retry_until_alive(slowly).result(1)))
    thread.start()
    assert starting.wait(5)
    shut_down()
    thread.join()
    assert order.index("sent") < order.index("down") and 7 in order


def test_a_call_that_hangs_does_not_block_shutdown(ray, monkeypatch):
    """Ray shuts down after CALL_S although a call is still being started."""
    from switchkd.actors import ray_futures

    monkeypatch.setattr(ray_futures, "CALL_S", 0.1)
    starting, end = Event(), Event()
    thread = Thread(target=lambda: ray_futures.retry_until_alive(lambda: (starting.set(), end.wait(30))), daemon=True)
    thread.start()
    assert starting.wait(5)
    ray_futures.shut_down()
    assert not ray.up and not end.is_set()
    end.set()
    thread.join()


# --- the ranks of a learner ------------------------------------------------------------------------------------------


class TestRanks:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch) -> None:
        from switchkd.actors import ray_futures

        monkeypatch.setattr(ray_futures, "GRACE_S", 0.3)

    def gathered(self) -> tuple[list[Future[Any]], Future[Any]]:
        from switchkd.actors.ray_futures import gather_ranks

        ranks: list[Future[Any]] = [Future() for _ in range(3)]
        return ranks, gather_ranks([SimpleNamespace(future=lambda rank=rank: rank) for rank in ranks])

    def test_rank_0_answers_once_all_have(self):
        """The answer is that of rank 0, once all ranks have answered."""
        ranks, answer = self.gathered()
        for i in (0, 2):
            ranks[i].set_result(i)
        Event().wait(0.1)
        assert not answer.done()
        ranks[1].set_result(1)
        assert answer.result(5) == 0

    def test_the_loss_of_a_rank_is_raised_at_once(self):
        """The death of a rank is raised at once as StateLost, whatever error another rank raised before."""
        from ray.exceptions import ActorDiedError

        ranks, answer = self.gathered()
        ranks[2].set_exception(RuntimeError("connection closed by peer"))
        Event().wait(0.1)
        assert not answer.done()
        ranks[1].set_exception(ActorDiedError())
        assert str(answer.exception(5)) == "a learner rank died" and type(answer.exception()) is StateLost

    def test_an_error_of_a_rank_is_raised_unchanged(self):
        """A rank's own error is raised unchanged, once all ranks have ended or after GRACE_S."""
        for rest in ([], [0, 1]):
            ranks, answer = self.gathered()
            ranks[2].set_exception(ValueError("no such loss"))
            for i in rest:
                ranks[i].set_result(None)
            assert type(answer.exception(5)) is ValueError

    def test_an_os_error_of_one_rank_loses_the_state(self):
        """An OSError for which other ranks wait becomes StateLost; one that all ranks raise is raised unchanged."""
        ranks, answer = self.gathered()
        ranks[0].set_exception(OSError(28, "no space"))
        assert type(answer.exception(5)) is StateLost and "a learner rank failed (OSError" in str(answer.exception())
        ranks, answer = self.gathered()
        for rank in ranks:
            rank.set_exception(OSError(28, "no space"))
        assert type(answer.exception(5)) is OSError
