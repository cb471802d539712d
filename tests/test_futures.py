"""Ray's references as plain futures: whoever asks too late hears so and harms nobody. (No cluster: Ray is a double.)"""

from __future__ import annotations

from concurrent.futures import Future
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest


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
