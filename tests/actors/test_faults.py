"""Faults in runs of fake models: each run ends with the rollouts and the student of a run without faults.

The tests assert that no rollout is lost or duplicated (`same_rollouts`) and the line that is printed. They print the
seconds of a recovery. test_real_runs.py kills processes with real models, test_jobs.py a driver.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
from faults import (
    FaultInjector,
    actors,
    after_step,
    nothing_left,
    report_at_once,
    same_losses,
    same_rollouts,
    wait_until,
)
from runs import STAGES, command, distance, lines, rollouts, seconds_beyond, steps

from switchkd.controller import recovery
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.watchdog import Stalled
from switchkd.train import train
from switchkd.types import PackedWeights

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


config, config_file = partial(runs.config, fake=True), partial(runs.config_file, fake=True)
ON_RAY = {"dir": "run", "mode": "ray"}


@pytest.fixture
def place(fake_place) -> Path:
    return fake_place


@pytest.fixture
def alone(fake_alone) -> Path:
    return fake_alone


# --- the learner and the replay --------------------------------------------------------------------------------------


def limit_files(pid: int, num_bytes: int) -> None:
    """Limit the size of the files that a process writes; a write beyond it fails with EFBIG, as one on a full disk
    fails with ENOSPC."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


class FullDisk:
    """Fills the learner's disk after a step, until the warning is printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.after, self.pids = after, list[int]()
        monkeypatch.setattr(recovery, "RETRY_S", (0.5, 0.5, 0.5))
        log_step, info = MetricsLog.step, MetricsLog.info
        monkeypatch.setattr(MetricsLog, "step", lambda log, step, row: (log_step(log, step, row), self.fill(step)))
        monkeypatch.setattr(MetricsLog, "info", lambda log, text: (info(log, text), self.free(text)))

    def fill(self, step: int) -> None:
        if step == self.after and not self.pids:
            self.pids = actors("LearnerActor")
            for pid in self.pids:
                limit_files(pid, 10_000)

    def free(self, text: str) -> None:
        if "saving checkpoint" in text:
            for pid in self.pids:
                limit_files(pid, resource.RLIM_INFINITY)


def test_a_full_disk_and_six_killed_processes_change_no_rollout(cluster, alone, place, monkeypatch, notes, done_at):
    """A run whose disk is full once, and in which a worker, a teacher, the teacher pool, the replay and two ranks are
    killed, ends with the rollouts, losses and weights of a run without faults. It tries the checkpoint again, and goes
    back to it after the loss of a rank or of the replay."""
    report_at_once(monkeypatch)
    FullDisk(monkeypatch, after=2)
    order = ["RolloutActor", "LearnerActor", "ReplayActor", "TeacherActor", "TeacherPoolActor", "LearnerActor"]
    injector = FaultInjector(monkeypatch, dict(zip((3, 4, 5, 6, 7, 8), order, strict=True)))
    two = {"rollout": {"num_workers": 2}, "teacher": {"replicas": 2}, "learner": {"num_ranks": 2}}
    assert train(config(place, STAGES, run=ON_RAY, **two)).finished
    assert injector.victims == order
    same_rollouts(place / "run", alone)
    same_losses(place / "run", alone)
    assert distance(place / "run" / "student", alone / "student") == 0
    (warning,) = [note for note in notes if "saving checkpoint" in note]
    expected = r"warning: saving checkpoint 3 under run failed \(OSError: .*\); trying again in 0.5 s"
    assert re.match(expected, warning), warning
    assert [note for note in notes if "going back" in note] == [
        "a learner rank died; going back to the last checkpoint (restart 1 of 8)",
        "the replay died; going back to the last checkpoint (restart 2 of 8)",
        "a learner rank died; going back to the last checkpoint (restart 1 of 8)",
    ]
    assert [note for note in notes if re.match(r"rollout worker \d died; its 2 rollouts are written again", note)]
    assert any("the teacher pool died" in note for note in notes)
    (full,) = [when for step, when in done_at if step == 2]
    print(f"a step beyond, after a disk that was full once: {seconds_beyond(2, full, done_at)}")
    print([note for note in notes if note.startswith("back at step")])
    nothing_left()


def test_a_rank_that_dies_while_workers_write_costs_no_rollout(cluster, alone, place, monkeypatch, notes):
    """The death of a rank while workers write loses and repeats no rollout; none is older than `max_staleness`."""
    injector = FaultInjector(monkeypatch, {5: "LearnerActor"})
    two = {"rollout": {"num_workers": 2}, "teacher": {"replicas": 2}, "learner": {"num_ranks": 2}}
    assert train(config(place, STAGES, run=ON_RAY, replay={"max_staleness": 1}, **two)).finished
    assert injector.victims == ["LearnerActor"] and any("a learner rank" in note for note in notes)
    assert sorted(rollouts(place / "run")) == sorted(rollouts(alone))
    assert [row["step"] for row in steps(place / "run")] == list(range(10))
    assert max(row["replay/staleness_max"] for row in steps(place / "run")) <= 1


# --- the disk --------------------------------------------------------------------------------------------------------

FILL = """
import os, resource, sys
from switchkd import cli
from switchkd.controller import recovery
from switchkd.controller.metrics import MetricsLog

recovery.RETRY_S = (0.1, 0.1)
log_step = MetricsLog.step

def step(self, number, row):
    log_step(self, number, row)
    if number == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, resource.RLIM_INFINITY))

MetricsLog.step = step
sys.argv = ["switchkd", "train", "config.yaml"]
cli.main()
"""


def test_a_full_disk_leaves_the_last_complete_checkpoint(alone, place, monkeypatch, capsys):
    """On a disk that stays full a run ends with exit code 1 and its last complete checkpoint; --resume completes it."""
    config_file(place, STAGES)
    done = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1 and done.stdout.count("warning: saving checkpoint 6") == 2, done.stderr[-2000:]
    assert "switchkd: error: OSError" in done.stderr
    checkpoints = sorted(path.name for path in (place / "run" / "checkpoints").iterdir())
    assert checkpoints == ["LATEST", "step-00000003"]
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    same_rollouts(place / "run", alone)
    assert distance(place / "run" / "student", alone / "student") == 0


@pytest.mark.parametrize("times", [2, 9])
def test_a_version_without_room_is_published_again(alone, place, monkeypatch, notes, times):
    """A version that does not fit into the object store is published again; if it never fits, the run saves its state
    and ends, and --resume completes it. (No cluster: `publish` itself fails.)"""
    from switchkd.learner.fake import FakeRank

    monkeypatch.setattr(recovery, "RETRY_S", (0.01, 0.01, 0.01))
    publish, left = FakeRank.publish, [True] * times

    def full(rank: Any, version: int) -> Any:
        if version == 5 and left:
            left.pop()
            raise OSError(28, "no room in Ray's object store")
        return publish(rank, version)

    with monkeypatch.context() as patch:
        patch.setattr(FakeRank, "publish", full)
        if times > 3:
            with pytest.raises(OSError, match="no room"):
                train(config(place, STAGES))
        else:
            assert train(config(place, STAGES)).finished
    warnings = [note for note in notes if "publishing version 5 failed (OSError: " in note]
    assert len(warnings) == min(times, 3)
    if times > 3:
        assert (place / "run" / "checkpoints" / "LATEST").read_text().strip() == "step-00000005"
        assert notes[-1] == "saved checkpoint 5; --resume goes on from there"
        assert train(config(place, STAGES), resume=True).finished
        assert not (place / "run" / "lost").exists()
    same_rollouts(place / "run", alone)
    assert distance(place / "run" / "student", alone / "student") == 0


def test_a_full_object_store_is_an_os_error(monkeypatch):
    """A full object store becomes an OSError (ENOSPC) with the version's size and the remedy, and loses no state."""
    from ray.exceptions import OutOfDiskError

    from switchkd.actors import learner_actor
    from switchkd.actors.ray_futures import _loses_state

    rank = object.__new__(learner_actor.LearnerActor.__ray_metadata__.modified_class)
    buckets = (np.zeros(3_000_000, np.uint8), np.zeros(2_000_000, np.uint8))
    bundle = PackedWeights(version=1, manifest=(), buckets=buckets, checksum="")
    rank.rank = SimpleNamespace(publish=lambda version: bundle if version else None)

    def put(value: Any) -> None:
        raise OutOfDiskError("Local disk is full")

    monkeypatch.setattr(learner_actor.ray, "put", put)
    assert rank.call("publish", 0) is None  # the part of another rank, which puts nothing
    with pytest.raises(OSError, match=r"a version of 0\.005 GB.*free some, or give more memory") as caught:
        rank.call("publish", 1)
    assert caught.value.errno == errno.ENOSPC and not _loses_state(caught.value)


def test_a_checkpoint_that_is_cut_short_is_skipped(alone, place, monkeypatch, caplog, done_at):
    """A run whose newest checkpoint lost half a file resumes from the one before, logs it, and ends with the same
    rollouts and weights."""
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None)
        assert train(config(place, STAGES)).steps == 7
    newest = place / "run" / "checkpoints" / "step-00000007" / "replay.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    resumed = time.time()
    assert train(config(place, STAGES), resume=True).finished
    print(f"a step beyond, after --resume: {seconds_beyond(6, resumed, done_at)}")
    assert "step-00000007 is skipped: replay.safetensors has" in caplog.text
    assert [row["step"] for row in lines(place / "run" / "lost" / "metrics.jsonl")] == [6]
    same_rollouts(place / "run", alone)
    assert distance(place / "run" / "student", alone / "student") == 0


# --- the network, a node, the job ------------------------------------------------------------------------------------


LOST_CALLS = {
    # calls of actors, at random and the first ones always; starts of actors; objects put into the store
    "CoreWorkerService.grpc_client.PushTask": {"num_failures": 3, "req_failure_prob": 10, "resp_failure_prob": 10},
    "ray::rpc::ActorInfoGcsService.grpc_client.RegisterActor": {"num_failures": 2},
    "ray::rpc::ActorInfoGcsService.grpc_client.CreateActor": {"num_failures": 2},
    "NodeManagerService.grpc_client.PinObjectIDs": {"num_failures": 2},
    "NodeManagerService.grpc_client.RequestWorkerLease": {"num_failures": 2},
}
"""Faults in the calls of each process, by RPC."""
ALWAYS = {"num_lower_bound_req_failures": 1, "num_lower_bound_resp_failures": 1}
"""The request of the first call and the answer of the second are lost."""


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_lost_late_and_repeated_calls_change_no_rollout(alone, place):
    """With requests and answers lost, calls repeated and everything late, as Ray's logs show, a run ends with the same
    rollouts and weights."""
    config_file(place, STAGES, run={**ON_RAY, "watchdog_s": 60})
    logs = tempfile.mkdtemp(prefix="skd-", dir="/tmp")  # a socket's path must be short
    faults = {name: {**ALWAYS, **fault} for name, fault in LOST_CALLS.items()}
    chaos = {
        "RAY_testing_rpc_failure": json.dumps(faults),
        "RAY_testing_rpc_failure_avoid_intra_node_failures": "0",
        "RAY_testing_asio_delay_us": "CoreWorkerService.grpc_server.PushTask=1000:20000",
        "RAY_TMPDIR": logs,
    }
    done = subprocess.run(
        [sys.executable, "-m", "switchkd.cli", "train", "config.yaml"], env={**os.environ, **chaos},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    fired = Counter(
        (found[1], found[2])
        for path in Path(logs).glob("switchkd-*/ray/session_2*/logs/*")
        if path.is_file()
        for found in re.finditer(r"Inject RPC (request|response) failure for (\S+)", path.read_text(errors="replace"))
    )
    shutil.rmtree(logs, ignore_errors=True)
    print(done.stdout[-6000:], fired)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {(kind, name) for name in LOST_CALLS for kind in ("request", "response")} == set(fired)
    same_rollouts(place / "run", alone)
    assert distance(place / "run" / "student", alone / "student") == 0


REMOVE_NODE = """
import os
from switchkd.actors import process_setup
process_setup.for_private_cluster()
# Ray takes a node for dead after 15 s by default
os.environ.update(RAY_health_check_period_ms="1000", RAY_health_check_failure_threshold="3")
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False,
                  "object_store_memory": 100_000_000})
cluster.add_node(num_cpus=8, object_store_memory=100_000_000)
ray.init(address=cluster.address, log_to_driver=False)
from switchkd.actors.ray_futures import shut_down
from switchkd.config.loader import load
from switchkd.controller.metrics import MetricsLog
from switchkd.train import train

log_step = MetricsLog.step
frail = list(cluster.worker_nodes)

def step(self, number, row):
    log_step(self, number, row)
    if number == 4 and frail:
        old = frail.pop()
        cluster.add_node(num_cpus=8, object_store_memory=100_000_000)
        cluster.remove_node(old, allow_graceful=False)
        print("the node is gone", flush=True)

MetricsLog.step = step
summary = train(load("config.yaml"))
print("finished:", summary.finished, flush=True)
shut_down()
cluster.shutdown()
"""


def test_a_run_survives_the_loss_of_its_main_node(alone, place):
    """Actors of a node that is removed restart on another one, and the run ends with the same rollouts and weights."""
    config_file(place, STAGES, run={**ON_RAY, "watchdog_s": 90})
    done = subprocess.run(
        [sys.executable, "-c", REMOVE_NODE], capture_output=True, text=True, timeout=220, check=False
    )  # fmt: skip
    print(done.stdout[-6000:])
    assert "the node is gone" in done.stdout and "finished: True" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-3000:]
    )
    assert "going back to the last checkpoint" in done.stdout
    same_rollouts(place / "run", alone)
    assert distance(place / "run" / "student", alone / "student") == 0


def test_sigterm_on_ray_saves_the_current_step(alone, place, monkeypatch, capsys, done_at):
    """On SIGTERM a run on Ray saves the current step and ends with exit code 143 within 30 s; --resume completes it."""
    config_file(place, STAGES, run=ON_RAY)
    command_line = [sys.executable, "-m", "switchkd.cli", "train", "config.yaml"]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("step 5/10"):
                break
        run.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        rest = run.communicate(timeout=30)[0]
    ended = f"ended {time.monotonic() - sent:.1f} s after SIGTERM"
    assert run.returncode == 143 and "--resume goes on" in rest
    config_file(place, STAGES)
    resumed = time.time()
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    print(f"{ended}; a step beyond, after --resume: {seconds_beyond(5, resumed, done_at)}")
    assert not (place / "run" / "lost").exists()
    same_rollouts(place / "run", alone)
    assert distance(place / "run" / "student", alone / "student") == 0


# --- the watchdog ----------------------------------------------------------------------------------------------------


def test_a_teacher_that_does_not_answer_ends_the_run(cluster, alone, place, monkeypatch, notes):
    """A run whose teacher neither answers nor dies names the teacher and the worker that waits for it, writes all
    stacks, saves the current step and ends; --resume completes it."""

    def act(step: int) -> None:
        if step == 3:
            os.kill(actors("TeacherActor")[0], signal.SIGSTOP)

    with monkeypatch.context() as patch, pytest.raises(Stalled) as caught:
        after_step(patch, act)
        train(config(place, STAGES, run={**ON_RAY, "watchdog_s": 8}))
    error = str(caught.value)
    assert "no progress for 8 s (run.watchdog_s)" in error and "from rollout worker 0" in error and "--resume" in error
    assert re.search(r"rollout worker 0 waits for a teacher \(actors/teacher_router.py:\d+", error)
    assert "teacher 0 does not answer" in error and "\n" not in error
    (stacks,) = (place / "run" / "logs").glob("stall-*.txt")
    text = stacks.read_text()
    assert all(part in text for part in ("teacher_router.py", "== this process", "train.py", "== learner rank 0"))
    assert "saved checkpoint 4; --resume goes on from there" in notes
    wait_until(lambda: not actors(), "the run left actors behind")
    assert train(config(place, STAGES), resume=True).finished
    assert not (place / "run" / "lost").exists()
    same_rollouts(place / "run", alone)
