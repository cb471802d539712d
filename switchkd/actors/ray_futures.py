"""Ray's object references as plain futures, so that `train.py` need not know them, and Ray's errors as the house's own.

What broke decides: a worker that died (WorkerLost), somebody whom a worker asked (Unreachable), state that only a dead
process held (StateLost). Everything else is what the actor itself raised.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread, Timer
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RaySystemError, RayTaskError

from switchkd.config.errors import first_line, last_line, with_type
from switchkd.types import StateLost, Unreachable, WorkerLost

RESTART_S = 600.0
"""How long a dead worker or replay may take to come back before the run ends, and a teacher before it is replaced."""
GRACE_S = 10.0
"""When a rank fails, so long is waited for the news that another one died: survivors notice before Ray does."""
ASKING_S = 5.0
"""Asking takes milliseconds."""


class _Gate:
    """Nobody asks a Ray that goes down: from within C++ it would end this process at once, with exit code 1."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._closed = False

    def ask(self, question: Callable[[], Any]) -> Future[Any]:
        """Raises RaySystemError where there is no Ray, or soon none."""
        with self._lock:
            if self._closed or not ray.is_initialized():
                raise RaySystemError("Ray was shut down")
            answer: Future[Any] = question().future()
            return answer

    def close(self) -> None:
        """Waits a moment for whoever is asking now; a question that hangs keeps no process from its end."""
        held = self._lock.acquire(timeout=ASKING_S)
        self._closed = True
        if held:
            self._lock.release()

    def open(self) -> None:
        self._closed = False


_GATE = _Gate()
atexit.register(_GATE.close)  # behind Ray's own registration, so before its shutdown


def shut_down() -> None:
    """`ray.shutdown()`, with nobody asking meanwhile."""
    _GATE.close()
    try:
        ray.shutdown()
    finally:
        _GATE.open()


def cause_of(error: BaseException) -> BaseException:
    """What the actor raised, not Ray's wrapping of it, where it can be told apart."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return error.cause
    if isinstance(error, ActorDiedError) and "creation task" in first_line(error):
        return RuntimeError(f"an actor could not start: {last_line(error)}")
    if isinstance(error, RayActorError):
        return RuntimeError(f"an actor was lost; --resume goes on from the last checkpoint ({first_line(error)})")
    return error


def _is_death(error: BaseException) -> bool:
    """Of the actor that was called, not of one which it asked; and not of one that never lived."""
    lost = isinstance(error, RayActorError) and not isinstance(error, RayTaskError)
    return lost and "creation task" not in first_line(error)


def worker_future(ref: Any) -> Future[Any]:
    """The answer of a rollout worker. Raises WorkerLost, Unreachable, or what its work raised."""

    def translated(error: BaseException) -> BaseException:
        if _is_death(error):
            return WorkerLost(first_line(error))
        cause = cause_of(error)
        # what is not in this process's hands: actors, the object store, the network, the disk
        if isinstance(cause, RayError | StateLost | OSError):
            return Unreachable(with_type(cause))
        return cause

    return _translated(ref.future(), translated)


def _translated(future: Future[Any], translate: Callable[[BaseException], BaseException]) -> Future[Any]:
    answer: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        else:
            answer.set_exception(translate(error))

    future.add_done_callback(settle)
    return answer


def retry_until_alive(ask: Callable[[], Any], wait_s: float = RESTART_S) -> Future[Any]:
    """The answer of an actor that Ray starts again when it dies: asked again, ever more slowly, until it answers."""
    answer: Future[Any] = Future()
    deadline = time.monotonic() + wait_s

    def settle(done: Future[Any], pause_s: float) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        elif _is_death(error) and time.monotonic() < deadline:
            timer = Timer(pause_s, attempt, [min(2 * pause_s, 5.0)])
            timer.daemon = True
            timer.start()
        else:
            answer.set_exception(cause_of(error))

    def attempt(pause_s: float) -> None:
        try:
            future = _GATE.ask(ask)
        except Exception as error:  # Ray itself was shut down meanwhile
            answer.set_exception(error)
        else:
            future.add_done_callback(lambda done: settle(done, pause_s))

    attempt(0.1)
    return answer


def run_in_thread(function: Callable[[], None]) -> Future[None]:
    """For a call that waits. The thread does not keep the process alive."""
    answer: Future[None] = Future()

    def work() -> None:
        try:
            function()
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    return answer


def gather_ranks(refs: list[Any]) -> Future[Any]:
    """The answer of rank 0, once all have answered. Ranks live and die together: StateLost when one of them died, or
    could not reach what it needs; the survivors' errors that come of it tell nothing new."""
    answer: Future[Any] = Future()
    futures = [ref.future() for ref in refs]
    lock = Lock()  # callbacks come on Ray's threads
    failed = False

    def settle(done: Future[Any]) -> None:
        nonlocal failed
        with lock:
            if failed or answer.done():
                return
            error = done.exception()
            if error is not None:
                failed = True
                _fail_ranks(error, answer, futures)
            elif all(future.done() and future.exception() is None for future in futures):
                answer.set_result(futures[0].result())

    for future in futures:
        future.add_done_callback(settle)
    return answer


def _fail_ranks(error: BaseException, answer: Future[Any], futures: list[Future[Any]]) -> None:
    if _spoils(error):
        answer.set_exception(StateLost(_reason(error)))
        return

    def wait_for_others() -> None:
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and not answer.done():
            found = [future.exception() for future in futures if future.done()]
            lost = [one for one in found if one is not None and _spoils(one)]
            if lost:
                answer.set_exception(StateLost(_reason(lost[0])))
            elif len(found) == len(futures):
                break
            else:
                time.sleep(0.1)
        if answer.done():
            return
        stuck = isinstance(cause_of(error), OSError) and not all(future.done() for future in futures)
        answer.set_exception(StateLost(_reason(error)) if stuck else cause_of(error))

    Thread(target=wait_for_others, daemon=True).start()


def _spoils(error: BaseException) -> bool:
    return _is_death(error) or isinstance(cause_of(error), RayError | StateLost)


def _reason(error: BaseException) -> str:
    if _is_death(error):
        return "a learner rank died"
    return f"a learner rank failed ({with_type(cause_of(error))})"
