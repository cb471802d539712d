"""A run that no longer gets on says where it stands, and ends: it never hangs.

In: what the loop waits for, and the actors' pulses. Out: a `Stalled` in the loop, whose text names the actor and what
it waits for, and a file with the stacks of all threads. A thread looks: should the loop not come back even from that,
it ends the process.

What counts as getting on: the loop's own answers, and the beats of actors that are at one long call.
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

from switchkd.controller.handles import Heartbeat
from switchkd.data.atomic_files import redact

START_S = 300.0
"""An actor may take so long to become ready after the one before, though `run.watchdog_s` be shorter."""
POLL_S = 0.5
"""At most so long until somebody who waits hears that the run has stalled."""
EXIT_CODE = 1


class Stalled(RuntimeError):
    """The run did not get on for `run.watchdog_s`."""


class Watchdog:
    """Watches from `start` to `stop`."""

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
        self.heartbeats: Callable[[], list[Heartbeat]] = list
        """Of the actors, once there are any."""
        self.stalled = ""  # why, once it has
        self._clock, self._exit_process = clock, exit_process
        self._waits_for = "the start"
        self._last, self._beats = clock(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Models are loaded now: until the first `progress` there is more time."""
        self._last += 2 * max(self.limit_s, START_S)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def progress(self, waits_for: str) -> None:
        """Something got on; from now on it is for `waits_for` that the run waits."""
        self._last, self._waits_for = self._clock(), waits_for

    def waiting(self, waits_for: str) -> None:
        """The run waits for this; nothing has got on."""
        self._waits_for = waits_for

    def wait_for(self, future: Future[Any], waits_for: str) -> Any:
        """The future's answer. Raises Stalled."""
        self.progress(waits_for)
        self.check()
        while not future.done():
            wait([future], timeout=POLL_S)
            self.check()
        self.progress("the loop itself")
        return future.result()

    @property
    def waits_for(self) -> str:
        return self._waits_for

    def check(self) -> None:
        if self.stalled:
            raise Stalled(self.stalled)

    def reset(self) -> None:
        """One more such time, to save what can be saved."""
        self.progress("saving")
        self.stalled = ""

    def detect_stall(self) -> bool:
        """Has the run stalled? Beats of actors count as getting on."""
        idle = self._clock() - self._last
        if idle < self.limit_s / 2:
            return False
        seen = self._asked()
        progress_counter = sum(heartbeat.progress_counter for heartbeat in seen)
        if progress_counter != self._beats:
            self._beats, self._last = progress_counter, self._clock()
            return False
        if idle < self.limit_s:
            return False
        self._report(seen)
        return True

    def _asked(self) -> list[Heartbeat]:
        try:  # other processes, at a bad time
            return self.heartbeats()
        except Exception as error:
            return [Heartbeat(name="the house", where=f"cannot be asked ({type(error).__name__}: {error})")]

    def _run(self) -> None:
        step = min(max(self.limit_s / 20, 0.05), 15.0)
        while not self._stop.wait(step):
            if self.detect_stall() and not self._loop_ends():
                self.log(f"the run did not end by itself; ending it with exit code {EXIT_CODE}")
                self._exit_process(EXIT_CODE)

    def _loop_ends(self) -> bool:
        """Once told, the loop has as long again to raise, and each time that it gets on meanwhile."""
        self.progress(self._waits_for)
        while self._clock() - self._last < self.limit_s:
            if self._stop.wait(POLL_S / 10) or not self.stalled:
                return True
        return False

    def _report(self, seen: list[Heartbeat]) -> None:
        path = self.run_dir / "logs" / f"stall-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        lines = [f"  {heartbeat.name} {heartbeat.where or 'has no work'}" for heartbeat in seen]
        told = f"no progress for {self.limit_s:g} s (run.watchdog_s), waiting for {self._waits_for}"
        busy = "; ".join(f"{heartbeat.name} {heartbeat.where}" for heartbeat in seen if heartbeat.where)
        self.log("\n".join([told, *lines, f"stacks of all threads: {path}"]))
        try:  # the disk may be what the run waits for
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write("\n".join([told, *lines]) + "\n\n== this process\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.writelines(redact(f"\n== {heartbeat.name}\n{heartbeat.stacks}\n") for heartbeat in seen)
        except OSError as error:
            self.log(f"the stacks could not be written: {error}")
        self.stalled = f"{told}{f' ({busy})' if busy else ''}; stacks in {path}; --resume goes on from the checkpoint"


def wait_for_all(awaited: Mapping[str, Future[Any]], limit_s: float) -> None:
    """Wait for all actors of a start; raise the first error, or Stalled with the names of the rest when no other one
    became ready for `limit_s`."""
    left = dict(awaited)
    while left:
        done, _ = wait(left.values(), timeout=limit_s, return_when=FIRST_COMPLETED)
        if not done:
            raise Stalled(
                f"no actor became ready for {limit_s:g} s; still starting: {', '.join(left)}; either "
                "the cluster has no room for them (see `ray status`), or their logs say what they are doing"
            )
        for future in done:
            future.result()
        left = {name: future for name, future in left.items() if future not in done}
