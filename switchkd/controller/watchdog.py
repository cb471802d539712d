"""Ends a run that makes no progress, and reports what the run waits for.

In: what the loop waits for, and the actors' heartbeats. Out: a `Stalled` in the loop, whose message names the actor and
what it waits for, and a file with the stacks of all threads. A thread does the checks; if the loop does not raise even
then, the thread ends the process. Progress is a result that the loop waited for, or a progress counter that grows
while an actor is in one long call.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from switchkd.config.errors import with_type
from switchkd.controller.handles import Heartbeat
from switchkd.data.atomic_files import redact

START_S = 300.0
"""Smallest limit for the time between two actors that become ready; `run.watchdog_s` may be longer."""
POLL_S = 0.5
"""Interval at which a wait checks whether the run has stalled."""
FIRST_NOTE_S, NOTE_S = 20.0, 60.0
"""Seconds until a line says which actors are still starting, and between two such lines."""
EXIT_CODE = 1


class Stalled(RuntimeError):
    """The run made no progress for `run.watchdog_s`."""


class Watchdog:
    """Watches a run from `start` to `stop`."""

    def __init__(
        self,
        limit_s: float,
        run_dir: Path,
        log: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self.limit_s, self.run_dir, self.log = limit_s, run_dir, log
        self.heartbeats: Callable[[], list[Heartbeat]] = list  # replaced once there are actors
        self.stalled = ""  # the reason, once the run has stalled
        self._clock, self._exit_process = clock, exit_process
        self.waits_for = "the start"
        self._last, self._beats = clock(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching, with more time until the first `progress`: models are loaded now."""
        self._last += 2 * max(self.limit_s, START_S)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def progress(self, waits_for: str) -> None:
        """Record progress; from now on the run waits for `waits_for`."""
        self._last, self.waits_for = self._clock(), waits_for

    def waiting(self, waits_for: str) -> None:
        """Record what the run waits for, without recording progress."""
        self.waits_for = waits_for

    def wait_for(self, future: Future[Any], waits_for: str) -> Any:
        """Return the future's result. Raises Stalled."""
        self.progress(waits_for)
        self.check()
        while not future.done():
            wait([future], timeout=POLL_S)
            self.check()
        self.progress("the loop itself")
        return future.result()

    def check(self) -> None:
        if self.stalled:
            raise Stalled(self.stalled)

    def reset(self) -> None:
        """Begin a new interval, in which the run saves its state."""
        self.progress("saving")
        self.stalled = ""

    def detect_stall(self) -> bool:
        """Whether the run has stalled; reports it once."""
        idle = self._clock() - self._last
        if idle < self.limit_s / 2:
            return False
        try:  # calls into other processes, which may be failing
            heartbeats = self.heartbeats()
        except Exception as error:
            heartbeats = [Heartbeat(name="actors", where=f"cannot be asked ({with_type(error)})")]
        progress_counter = sum(heartbeat.progress_counter for heartbeat in heartbeats)
        if progress_counter != self._beats:
            self._beats, self._last = progress_counter, self._clock()
            return False
        if idle < self.limit_s:
            return False
        self._report(heartbeats)
        return True

    def _run(self) -> None:
        step = min(max(self.limit_s / 20, 0.05), 15.0)
        while not self._stop.wait(step):
            if self.detect_stall() and not self._loop_ends():
                self.log(f"the run did not end by itself; ending it with exit code {EXIT_CODE}")
                self._exit_process(EXIT_CODE)

    def _loop_ends(self) -> bool:
        """Wait another `limit_s` for the loop to raise; progress restarts the interval."""
        self.progress(self.waits_for)
        while self._clock() - self._last < self.limit_s:
            if self._stop.wait(POLL_S / 10) or not self.stalled:
                return True
        return False

    def _report(self, heartbeats: list[Heartbeat]) -> None:
        path = self.run_dir / "logs" / f"stall-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        lines = [f"  {heartbeat.name} {heartbeat.where or 'has no work'}" for heartbeat in heartbeats]
        reason = f"no progress for {self.limit_s:g} s (run.watchdog_s), waiting for {self.waits_for}"
        busy = "; ".join(f"{heartbeat.name} {heartbeat.where}" for heartbeat in heartbeats if heartbeat.where)
        self.log("\n".join([reason, *lines, f"stacks of all threads: {path}"]))
        try:  # the disk may be what the run waits for
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write("\n".join([reason, *lines]) + "\n\n== this process\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.writelines(redact(f"\n== {heartbeat.name}\n{heartbeat.stacks}\n") for heartbeat in heartbeats)
        except OSError as error:
            self.log(f"the stacks could not be written: {error}")
        self.stalled = f"{reason}{f' ({busy})' if busy else ''}; stacks in {path}; --resume goes on from the checkpoint"


def wait_for_all(awaited: Mapping[str, Future[Any]], limit_s: float, log: Callable[[str], None]) -> None:
    """Wait until all actors are ready; after FIRST_NOTE_S log those that are not. Raises the first error, or Stalled
    where none became ready for `limit_s`."""
    left = dict(awaited)
    started = last_ready = time.monotonic()
    note_at = started + FIRST_NOTE_S
    while left:
        now = time.monotonic()
        if now >= last_ready + limit_s:
            raise Stalled(
                f"no actor became ready for {limit_s:g} s; still starting: {', '.join(left)}; either "
                "the cluster has no room for them (see `ray status`), or their logs say what they are doing"
            )
        if now >= note_at:
            log(f"still starting after {now - started:.0f} s: {', '.join(left)}")
            note_at = now + NOTE_S
        done, _ = wait(left.values(), timeout=min(last_ready + limit_s, note_at) - now, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        if done:
            last_ready = time.monotonic()
            left = {name: future for name, future in left.items() if future not in done}
