"""The watchdog: what counts as progress, what it reports, and that no wait is endless."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from runs import config_file

from switchkd.controller import watchdog as watchdog_module
from switchkd.controller.handles import Heartbeat
from switchkd.controller.recovery import RestartPolicy, retry
from switchkd.controller.watchdog import Stalled, Watchdog, wait_for_all
from switchkd.types import StateLost


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def kept(tmp_path: Path, clock: Clock) -> tuple[Watchdog, list[str]]:
    said: list[str] = []
    return Watchdog(10, tmp_path, said.append, clock=clock), said


def test_a_stall_is_reported_and_raised(tmp_path):
    """After `watchdog_s` without progress the wait and each actor's position are reported once, and waits raise
    Stalled."""
    clock = Clock()
    watchdog, said = kept(tmp_path, clock)
    watchdog.heartbeats = lambda: [
        Heartbeat(name="rollout worker 0", where="waits for a teacher"),
        Heartbeat(name="replay"),
    ]
    watchdog.progress("step 5: rollouts 20 to 23 from rollout worker 0")
    clock.now = 9.9
    assert not watchdog.detect_stall() and not said
    clock.now = 10
    assert watchdog.detect_stall()
    (report,) = said
    assert report.splitlines()[:3] == [
        "no progress for 10 s (run.watchdog_s), waiting for step 5: rollouts 20 to 23 from rollout worker 0",
        "  rollout worker 0 waits for a teacher",
        "  replay has no work",
    ]
    with pytest.raises(Stalled, match=r"rollout worker 0 waits for a teacher\).*--resume"):
        watchdog.wait_for(Future(), "anything")
    (stacks,) = (tmp_path / "logs").iterdir()
    assert "test_a_stall_is_reported_and_raised" in stacks.read_text()


def test_heartbeats_are_progress(tmp_path):
    """A heartbeat whose counter grows counts as progress; one that stands still does not."""
    clock, progress_counter = Clock(), [0]
    watchdog, _ = kept(tmp_path, clock)
    watchdog.heartbeats = lambda: [Heartbeat(name="rollout worker 0", progress_counter=progress_counter[0])]
    for _ in range(10):
        clock.now += 6
        progress_counter[0] += 1
        assert not watchdog.detect_stall()
    clock.now += 10
    assert watchdog.detect_stall()


def test_a_process_is_ended_if_no_wait_raises(tmp_path):
    """The watchdog's thread ends the process if no wait raises Stalled, and only then."""
    left: list[int] = []
    said: list[str] = []
    watchdog = Watchdog(0.2, tmp_path, said.append, exit_process=left.append)
    watchdog.start()
    watchdog.progress("the first step")
    deadline = time.monotonic() + 20
    while not left and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.stop()
    assert left[0] == 1 and "did not end by itself" in said[1]
    exits: list[int] = []
    watchdog = Watchdog(0.3, tmp_path, said.append, exit_process=exits.append)
    watchdog.start()
    with pytest.raises(Stalled):
        watchdog.wait_for(Future(), "anything")
    watchdog.stop()
    time.sleep(1)
    assert not exits


def test_actors_that_are_not_ready_are_named(tmp_path):
    """Actors that are not ready in time are named; an actor's own error is raised unchanged."""
    ready: Future[None] = Future()
    threading.Timer(0.05, ready.set_result, [None]).start()
    with pytest.raises(Stalled, match="still starting: teacher 1; either"):
        wait_for_all({"teacher 0": ready, "teacher 1": Future()}, 0.3, list[str]().append)
    broken: Future[None] = Future()
    broken.set_exception(ValueError("no such model"))
    with pytest.raises(ValueError, match="no such model"):
        wait_for_all({"teacher 0": broken, "teacher 1": Future()}, 5, list[str]().append)


def test_actors_that_start_slowly_are_logged(monkeypatch):
    """A line names the actors that are still starting, first after FIRST_NOTE_S and then every NOTE_S."""
    monkeypatch.setattr(watchdog_module, "FIRST_NOTE_S", 0.2)
    monkeypatch.setattr(watchdog_module, "NOTE_S", 0.4)
    slow: dict[str, Future[None]] = {"replay": Future(), "learner": Future()}
    for name, seconds in (("replay", 0.4), ("learner", 0.8)):
        threading.Timer(seconds, slow[name].set_result, [None]).start()
    notes: list[str] = []
    wait_for_all(slow, 60, notes.append)
    assert notes == ["still starting after 0 s: replay, learner", "still starting after 1 s: learner"]


def test_restarts_are_counted_and_pause_longer():
    """Restarts pause ever longer, a checkpoint resets the count, and beyond the limit the run ends."""
    slept: list[float] = []
    restarts = RestartPolicy(4, lambda text: None, slept.append)
    for _ in range(4):
        restarts.begin(StateLost("a learner rank died"))
    assert slept == [0, 1, 2, 4]
    with pytest.raises(RuntimeError, match=r"a learner rank died, after 4 restarts .*run.max_restarts=4.*--resume"):
        restarts.begin(StateLost("a learner rank died"))
    restarts.saved()
    restarts.begin(StateLost("a learner rank died"))
    assert slept[-1] == 0


def test_retry_repeats_os_errors_only():
    """`retry` repeats an OSError after pauses, raises it at last, and does not repeat a StateLost."""
    slept: list[float] = []
    said: list[str] = []
    left = [OSError(28, "No space left on device")] * 2

    def write() -> str:
        if left:
            raise left.pop()
        return "written"

    assert retry("saving", write, said.append, slept.append) == "written"
    assert slept == [1, 4] and "No space left on device); trying again in 4 s" in said[1]

    def never() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        retry("saving", never, said.append, slept.append)

    def lost() -> None:
        raise StateLost("the replay died")

    with pytest.raises(StateLost):
        retry("saving", lost, said.append, slept.append)
    assert slept == [1, 4, 1, 4, 16]


STUCK = """
import dataclasses, os, time
from switchkd.algo import switching

RULE = switching.jsd_threshold(half_life=6)


def hang(**given):
    if os.path.exists("run"):  # not where the rule is tried before the start
        time.sleep(1000)
    return RULE.statistic(**given)


def rule():
    return dataclasses.replace(RULE, statistic=hang)
"""


def test_a_hang_inside_the_loop_ends_the_process(place):
    """A hang inside the loop ends the process with exit code 1 and a stack dump that names the place."""
    (place / "stuck.py").write_text(STUCK)
    stage = {"name": "stuck", "steps": 1, "rule": {"type": "stuck:rule"}}
    config_file(place, [stage], run={"dir": "run", "mode": "inprocess", "watchdog_s": 2})
    code = "import sys; sys.argv = ['switchkd', 'train', 'config.yaml']; from switchkd import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "no progress for 2 s" in done.stdout and "ending it with exit code 1" in done.stdout
    (stacks,) = (place / "run" / "logs").glob("stall-*.txt")
    assert "stuck.py" in stacks.read_text()
