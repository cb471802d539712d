"""Ray's object references as plain futures, so that `train.py` need not know them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from switchkd.house import WorkerLost


def _cause(error: BaseException) -> BaseException:
    """What the actor raised, not Ray's wrapping of it, where it can be told apart."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return error.cause
    lines = str(error).strip().splitlines()
    if isinstance(error, ActorDiedError) and lines and "creation task" in lines[0]:
        return RuntimeError(f"an actor could not start: {lines[-1]}")
    if isinstance(error, RayActorError):
        return RuntimeError(f"an actor was lost; --resume goes on from the last checkpoint ({lines[0]})")
    return error


def of_worker(ref: Any) -> Future[Any]:
    """The answer of a rollout worker; its death (not that of an actor which it asked) is a WorkerLost."""
    answer: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        elif isinstance(error, RayActorError) and not isinstance(error, RayTaskError):
            answer.set_exception(WorkerLost(str(error)))
        else:
            answer.set_exception(_cause(error))

    ref.future().add_done_callback(settle)
    return answer


def in_thread(function: Callable[[], None]) -> Future[None]:
    """For a call that waits. The thread does not keep the process alive."""
    answer: Future[None] = Future()

    def work() -> None:
        try:
            function()
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(_cause(error))

    Thread(target=work, daemon=True).start()
    return answer


def gathered(refs: list[Any]) -> Future[Any]:
    """The answer of the first of several calls, once all have answered; the first error as soon as it comes."""
    answer: Future[Any] = Future()
    futures = [ref.future() for ref in refs]

    lock = Lock()  # callbacks come on Ray's threads

    def settle(done: Future[Any]) -> None:
        with lock:
            if answer.done():
                return
            error = done.exception()
            if error is not None:
                answer.set_exception(_cause(error))
            elif all(future.done() for future in futures):
                answer.set_result(futures[0].result())

    for future in futures:
        future.add_done_callback(settle)
    return answer
