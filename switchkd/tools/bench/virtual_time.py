"""Runs blocking code in virtual time: a sleep costs nothing, and processes run one at a time, in the order of time.

In: functions that sleep. Out: futures, and a clock that advances where the caller waits for them. Each process is a
thread, of which one runs at a time, so a run repeats event by event.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

from switchkd.controller.watchdog import Watchdog


class Stopped(BaseException):
    """Ends the thread of a process that still sleeps when the simulation ends."""


class VirtualClock:
    """`now` and `sleep` for processes that `call` and `start` begin; seconds."""

    def __init__(self) -> None:
        self.num_ended = 0  # of `call`
        self.scheduling_s = 0.0  # CPU seconds of the caller's thread that went into `advance_until`
        self._now = 0.0
        self._order = count()  # of events at one time
        self._events: list[tuple[float, int, threading.Lock]] = []
        self._turn = threading.Semaphore(0)  # released by a process that sleeps or ends
        self._stopped = False

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let the others run for `seconds`. For processes."""
        wake = self._at(self._now + seconds)
        self._turn.release()
        wake.acquire()
        if self._stopped:
            raise Stopped

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Begin a process that the loop waits for beside others: its end also ends `VirtualWatchdog.check`."""
        future = self.start(function)
        future.add_done_callback(self._count)
        return future

    def start(self, function: Callable[[], Any]) -> Future[Any]:
        """Begin a process now, after those that wait for this moment. Returns its result."""
        answer: Future[Any] = Future()
        wake = self._at(self._now)

        def work() -> None:
            wake.acquire()
            try:
                if not self._stopped:
                    answer.set_result(function())
            except Stopped:
                pass
            except Exception as error:
                answer.set_exception(error)
            self._turn.release()

        threading.Thread(target=work, daemon=True).start()
        return answer

    def advance_until(self, done: Callable[[], bool]) -> None:
        """Run processes in the order of time until `done`. Raises RuntimeError where none is left."""
        since = time.thread_time()
        while not done():
            if not self._events:
                raise RuntimeError(f"virtual time {self._now:.3f} s: no process is left that could end the wait")
            self._now, _, wake = heapq.heappop(self._events)
            wake.release()
            self._turn.acquire()
        self.scheduling_s += time.thread_time() - since

    def close(self) -> None:
        """End all processes."""
        self._stopped = True
        while self._events:
            heapq.heappop(self._events)[2].release()
            self._turn.acquire()

    def _at(self, when: float) -> threading.Lock:
        """Return a lock that is released when it is `when`."""
        wake = threading.Lock()
        wake.acquire()
        heapq.heappush(self._events, (when, next(self._order), wake))
        return wake

    def _count(self, _: Future[Any]) -> None:
        self.num_ended += 1


class VirtualWatchdog(Watchdog):
    """Advances the clock wherever the loop waits: a wait that follows finds its future done."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(1.0, Path(), lambda text: None, clock=clock.now)
        self._virtual = clock
        self._num_seen = 0

    def check(self) -> None:
        """Wait until a call has ended since the last check."""
        self._virtual.advance_until(lambda: self._virtual.num_ended > self._num_seen)
        self._num_seen = self._virtual.num_ended

    def wait_for(self, future: Future[Any], waits_for: str) -> Any:
        self._virtual.advance_until(future.done)
        return future.result()
