"""The private cluster of a run: its processes die, SIGTERM comes while actors start, its folder. Fake models."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import runs
from faults import same_losses, same_rollouts, wait_until
from runs import STAGES, descendants, distance, processes

from switchkd.actors.cluster import private_folder
from switchkd.config.errors import ConfigError
from switchkd.controller.checkpoint import latest

config_file = partial(runs.config_file, fake=True)
COMMAND = [sys.executable, "-m", "switchkd.cli", "train", "config.yaml"]
SLOW = {"student_s": 0.05}  # a step takes long enough for a signal in its middle


def start(place: Path, *args: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *args], cwd=place, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def own(driver: subprocess.Popen[str], name: str) -> list[int]:
    """Ids of the driver's processes with this in their command."""
    return [pid for pid, command in descendants(driver.pid).items() if name in command]


def wait_for_steps(place: Path, num: int) -> None:
    path = place / "run" / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_text().count("\n") >= num, "no step was done", 90)


def ended(driver: subprocess.Popen[str], number: int, pid: int, seen: dict[int, str]) -> tuple[str, str, float]:
    """Send the signal, and wait for the end of the driver and of its processes: stdout, stderr, and the driver's
    seconds."""
    sent = time.monotonic()
    os.kill(pid, number)
    try:
        out, err = driver.communicate(timeout=60)
        seconds = time.monotonic() - sent
        wait_until(lambda: not seen.keys() & processes().keys(), "processes outlived their driver", 10)
    finally:
        for left in (driver.pid, *(seen.keys() & processes().keys())):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
    return out, err, seconds


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_death_of_a_raylet_or_gcs_ends_the_run_in_one_line(fake_alone, fake_place):
    """A run whose raylet or GCS server is killed ends within 15 s with exit code 1, one line that names the process and
    the checkpoint, and no process left; resumed, it has the same rollouts."""
    place = fake_place
    # each dies between checkpoints: one that is just being saved might or might not stand
    config_file(place, STAGES, run={"dir": "run", "mode": "ray"}, train={"checkpoint_every": 4}, fake=SLOW)
    for name, called, after, args in (("raylet", "raylet", 5, ()), ("gcs_server", "GCS server", 6, ("--resume",))):
        driver = start(place, *args)
        wait_for_steps(place, after)
        (victim,) = own(driver, f"/{name} ")
        out, err, seconds = ended(driver, signal.SIGKILL, victim, descendants(driver.pid))
        print(f"{name}: {seconds:.2f} s")
        last = latest(place / "run")
        goes_on = f"from checkpoint {last.step}" if last else "at step 0, as there is no checkpoint"
        assert driver.returncode == 1 and seconds <= 15
        *before, line = err.splitlines()  # before: a resume's notes on what it cut
        killed = rf"switchkd: error: Ray's {called} was killed \(SIGKILL, .*\); logs: \S+; --resume goes on {goes_on}"
        assert re.fullmatch(killed, line) and (not before or args), err
        assert "died" not in out, out
    done = subprocess.run([*COMMAND, "--resume"], cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    same_rollouts(place / "run", fake_alone)
    same_losses(place / "run", fake_alone)
    assert distance(place / "run" / "student", fake_alone / "student") == 0


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("process", "number", "code"),
    [
        pytest.param("/raylet ", signal.SIGTERM, 143, marks=pytest.mark.slow),
        ("ray::ReplayActor", signal.SIGTERM, 143),
        pytest.param("ray::ReplayActor", signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_actors_start_ends_the_run_in_one_line(fake_place, process, number, code):
    """SIGTERM and SIGINT while Ray or actors start end the run with exit code and one line, and leave no process."""
    config_file(fake_place, STAGES, run={"dir": "run", "mode": "ray"}, fake={"start_s": 60.0})
    driver = start(fake_place)
    wait_until(lambda: own(driver, process), "the process was not started", 90)
    folder = private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert any(f"{folder}/ray/session_" in command for command in descendants(driver.pid).values())
    out, err, seconds = ended(driver, number, driver.pid, descendants(driver.pid))
    print(f"{number.name}: {seconds:.2f} s")
    line = "switchkd: error: interrupted\n" if number == signal.SIGINT else ""
    assert driver.returncode == code and err == line, err
    assert out.endswith("--resume goes on with run\n") == (number == signal.SIGTERM), out
    assert seconds < 15


def test_the_folder_of_a_private_cluster_is_the_users(tmp_path, monkeypatch):
    """Ray's folder has mode 0700 whatever was there before, a link is refused, and a long path is replaced by /tmp."""
    monkeypatch.setattr("switchkd.actors.cluster.MAX_TEMP_DIR", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = tmp_path / f"switchkd-{os.getuid()}"
    folder.mkdir(mode=0o777)
    assert private_folder() == folder and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rename(tmp_path / "other")
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="is not a folder of this user; remove it, or set RAY_TMPDIR"):
        private_folder()
    monkeypatch.undo()
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 90}")
    assert private_folder() == Path(f"/tmp/switchkd-{os.getuid()}")
