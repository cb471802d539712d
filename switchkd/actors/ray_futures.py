"""Converts Ray's object references into plain futures, and Ray's errors into those of this package.

A rollout worker that died becomes WorkerLost, a process that a worker cannot reach Unreachable, state that only a dead
process held StateLost. All other errors are those that the actor itself raised.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from threading import Lock, Thread, Timer
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RaySystemError, RayTaskError

from switchkd.config.errors import ConfigError, first_line, last_line, with_type
from switchkd.types import StateLost, Unreachable, WorkerLost

RESTART_S = 600.0
"""Time limit for the restart of a worker or the replay (then the run ends) or of a teacher (then it is replaced)."""
GRACE_S = 10.0
"""Time that a rank's failure waits for Ray to report that another rank died: the others notice before Ray does."""
CALL_S = 5.0
"""Time limit for starting a remote call, which takes milliseconds, and for the replay to write its last step."""


class _CallGate:
    """Refuses remote calls while Ray shuts down: from within C++ they would end this process at once, exit code 1."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._closed = False

    def start(self, call: Callable[[], Any]) -> Future[Any]:
        """Raises RaySystemError where Ray is down or shutting down."""
        with self._lock:
            if self._closed or not ray.is_initialized():
                raise RaySystemError("Ray was shut down")
            return call().future()

    def close(self) -> None:
        """Wait up to CALL_S for a call that is being started."""
        held = self._lock.acquire(timeout=CALL_S)
        self._closed = True
        if held:
            self._lock.release()

    def open(self) -> None:
        self._closed = False


_gate = _CallGate()
atexit.register(_gate.close)  # registered after Ray's own handler, so it runs before


def shut_down() -> None:
    """Call `ray.shutdown()`, and refuse remote calls until it returns."""
    _gate.close()
    try:
        ray.shutdown()
    finally:
        _gate.open()


def cause_of(error: BaseException) -> BaseException:
    """Return the error that the actor raised, without Ray's wrapping where possible."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return error.cause
    if isinstance(error, ActorDiedError) and "creation task" in first_line(error):
        name, _, text = last_line(error).partition(": ")
        if name == f"{ConfigError.__module__}.{ConfigError.__name__}":
            return ConfigError(text)
        return RuntimeError(f"an actor could not start: {last_line(error)}")
    if isinstance(error, RayActorError):
        return RuntimeError(f"an actor was lost; --resume goes on from the last checkpoint ({first_line(error)})")
    return error


def _actor_died(error: BaseException) -> bool:
    """Whether the called actor died: not an actor that it called, and not one that never started."""
    lost = isinstance(error, RayActorError) and not isinstance(error, RayTaskError)
    return lost and "creation task" not in first_line(error)


def worker_future(ref: Any) -> Future[Any]:
    """The answer of a rollout worker. Its errors are WorkerLost, Unreachable, and those of its work."""
    answer: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        elif _actor_died(error):
            answer.set_exception(WorkerLost(first_line(error)))
        else:
            cause = cause_of(error)
            # outside the worker: actors, the object store, the network, the disk
            outside = isinstance(cause, RayError | StateLost | OSError)
            answer.set_exception(Unreachable(with_type(cause)) if outside else cause)

    ref.future().add_done_callback(settle)
    return answer


def retry_until_alive(call: Callable[[], Any]) -> Future[Any]:
    """The answer of an actor that Ray restarts when it dies; the call is repeated with growing pauses until then."""
    answer: Future[Any] = Future()
    deadline = time.monotonic() + RESTART_S

    def settle(done: Future[Any], pause_s: float) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        elif _actor_died(error) and time.monotonic() < deadline:
            timer = Timer(pause_s, attempt, [min(2 * pause_s, 5.0)])
            timer.daemon = True
            timer.start()
        else:
            answer.set_exception(cause_of(error))

    def attempt(pause_s: float) -> None:
        try:
            future = _gate.start(call)
        except Exception as error:  # Ray was shut down in between
            answer.set_exception(error)
        else:
            future.add_done_callback(lambda done: settle(done, pause_s))

    attempt(0.1)
    return answer


def run_in_thread(function: Callable[[], Any]) -> Future[Any]:
    """The result of a function that waits, from a thread that does not keep the process alive."""
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(function())
        except Exception as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    return answer


def gather_ranks(refs: list[Any]) -> Future[Any]:
    """The answer of rank 0, once all ranks have answered. Raises StateLost when a rank died or could not reach what it
    needs, in place of the other ranks' errors that follow from it."""
    futures = [ref.future() for ref in refs]
    return run_in_thread(lambda: _gather(futures))


def _gather(futures: list[Future[Any]]) -> Any:
    wait(futures, return_when=FIRST_EXCEPTION)
    deadline = time.monotonic() + GRACE_S
    while True:
        done = [future for future in futures if future.done()]
        errors = [error for future in done if (error := future.exception()) is not None]
        if not errors:
            return futures[0].result()
        waiting = [future for future in futures if future not in done]
        lost = next(filter(_loses_state, errors), None)
        if lost is None and waiting and time.monotonic() < deadline:
            wait(waiting, timeout=GRACE_S / 10, return_when=FIRST_COMPLETED)
            continue
        if lost is None and waiting and isinstance(cause_of(errors[0]), OSError):
            lost = errors[0]
        if lost is None:
            raise cause_of(errors[0])
        failure = "died" if _actor_died(lost) else f"failed ({with_type(cause_of(lost))})"
        raise StateLost(f"a learner rank {failure}")


def _loses_state(error: BaseException) -> bool:
    return _actor_died(error) or isinstance(cause_of(error), RayError | StateLost)
