"""Ray's references as plain futures: whoever asks too late hears so and harms nobody. (No cluster: Ray is a double.)"""

from __future__ import annotations

from concurrent.futures import Future
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from switchkd.types import StateLost


@pytest.fixture
def ray(monkeypatch) -> Any:
    """A double that is up until it is shut down. While it goes down, a question would end this process."""
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


def question(ray: Any) -> Any:
    answered: Future[int] = Future()
    answered.set_result(7)
    assert ray.up and not ray.going, "asked a Ray that is not there"
    return SimpleNamespace(future=lambda: answered)


def test_nobody_asks_a_ray_that_goes_down(ray):
    """Before: an answer. While it goes down, from another thread, and afterwards: an error, and Ray is not touched. A
    Ray that is started again can be asked again."""
    from ray.exceptions import RaySystemError

    from switchkd.actors.ray_futures import retry_until_alive, shut_down

    late: list[Future[Any]] = []
    ray.meanwhile = lambda: late.append(retry_until_alive(lambda: question(ray)))
    assert retry_until_alive(lambda: question(ray)).result(1) == 7
    shut_down()
    late.append(retry_until_alive(lambda: question(ray)))
    assert [type(one.exception(1)) for one in late] == [RaySystemError] * 2
    ray.up = True
    assert retry_until_alive(lambda: question(ray)).result(1) == 7


def test_a_question_that_is_being_asked_is_waited_for(ray):
    """Ray goes down only when the question that a thread is just asking is out."""
    from switchkd.actors.ray_futures import retry_until_alive, shut_down

    asking, order = Event(), []

    def slowly() -> Any:
        asking.set()
        Event().wait(0.3)
        order.append("asked")
        return question(ray)

    ray.meanwhile = lambda: order.append("down")
    thread = Thread(target=lambda: order.append(retry_until_alive(slowly).result(1)))
    thread.start()
    assert asking.wait(5)
    shut_down()
    thread.join()
    assert order.index("asked") < order.index("down") and 7 in order


def test_a_question_that_hangs_keeps_nobody(ray, monkeypatch):
    """Ray goes down though somebody has been asking for too long."""
    from switchkd.actors import ray_futures

    monkeypatch.setattr(ray_futures, "CALL_S", 0.1)
    asking, end = Event(), Event()
    thread = Thread(target=lambda: ray_futures.retry_until_alive(lambda: (asking.set(), end.wait(30))), daemon=True)
    thread.start()
    assert asking.wait(5)
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
        ranks, answer = self.gathered()
        for i in (0, 2):
            ranks[i].set_result(i)
        Event().wait(0.1)
        assert not answer.done()
        ranks[1].set_result(1)
        assert answer.result(5) == 0

    def test_a_rank_that_died(self):
        """Its loss is said, at once, whatever the others raise because of it before."""
        from ray.exceptions import ActorDiedError

        ranks, answer = self.gathered()
        ranks[2].set_exception(RuntimeError("connection closed by peer"))
        Event().wait(0.1)
        assert not answer.done()
        ranks[1].set_exception(ActorDiedError())
        assert str(answer.exception(5)) == "a learner rank died" and type(answer.exception()) is StateLost

    def test_an_error_of_the_work(self):
        """It is raised as it is: when all have ended, or when the others still compute after a while."""
        for rest in ([], [0, 1]):
            ranks, answer = self.gathered()
            ranks[2].set_exception(ValueError("no such loss"))
            for i in rest:
                ranks[i].set_result(None)
            assert type(answer.exception(5)) is ValueError

    def test_a_rank_without_a_disk_whose_peers_wait_for_it(self):
        """Nothing but new ranks helps."""
        ranks, answer = self.gathered()
        ranks[0].set_exception(OSError(28, "no space"))
        assert type(answer.exception(5)) is StateLost and "a learner rank failed (OSError" in str(answer.exception())
        ranks, answer = self.gathered()
        for rank in ranks:
            rank.set_exception(OSError(28, "no space"))
        assert type(answer.exception(5)) is OSError
