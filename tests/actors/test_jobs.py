"""Runs as jobs: on a joined or private cluster, submitted, refused where they do not fit, and resumed after their
driver was killed. Fake models."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
from faults import FaultInjector, actors, answers, free_ports, nothing_left, same_losses, same_rollouts, wait_until
from runs import BASE, STAGES, descendants, distance, lines, processes, seconds_beyond, steps

from switchkd.config.errors import ConfigError
from switchkd.controller.metrics import MetricsLog
from switchkd.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

config, config_file = partial(runs.config, fake=True), partial(runs.config_file, fake=True)
EVAL = {"data": "./data.jsonl", "num_prompts": 6, "max_new_tokens": 12}
ON_RAY = {"dir": "run", "mode": "ray"}


@pytest.fixture
def place(fake_place) -> Path:
    return fake_place


@pytest.fixture
def alone(fake_alone) -> Path:
    return fake_alone


def test_processes_reserve_shares_of_gpus(cluster, alone, place, monkeypatch):
    """Each process reserves its share of a GPU during a run, and both GPUs are free afterwards."""
    import ray

    from switchkd.actors.worker_pool import RayWorkerHandle

    free: list[float] = []
    generate = RayWorkerHandle.generate

    def watched(worker: Any, tasks: Any, weights: Any) -> Any:
        free.append(ray.available_resources().get("GPU", 0.0))
        return generate(worker, tasks, weights)

    monkeypatch.setattr(RayWorkerHandle, "generate", watched)
    shares = {"teacher": {"num_gpus": 0.5}, "rollout": {"num_gpus": 0.25}, "learner": {"num_gpus": 0.125}}
    node = cluster.add_node(num_cpus=5, num_gpus=2, object_store_memory=80_000_000)  # in Ray's accounting only
    two = {"rollout": {"num_workers": 2}, "teacher": {"replicas": 2}}
    taken = {role: {"threads": 1, **share} for role, share in shares.items()}
    train(config(place, STAGES, run=ON_RAY, cluster={"address": "auto"}, resources=taken, **two))
    assert set(free) == {2 - 2 * 0.5 - 2 * 0.25 - 0.125}
    wait_until(lambda: ray.available_resources().get("GPU") == 2, "the GPUs were not freed")
    cluster.remove_node(node)
    same_rollouts(place / "run", alone)


def test_a_run_resumes_after_its_driver_and_ray_are_killed(cluster, alone, place, monkeypatch, done_at):
    """SIGKILL of the driver and its private Ray leaves no process; the resumed run, whose learner dies too, ends with
    the same rollouts, losses and weights."""
    config_file(place, STAGES, run=ON_RAY)
    code = DIE_AFTER.format(step=4)
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL) as driver:
        seen: dict[int, str] = {}
        while driver.poll() is None:
            seen |= descendants(driver.pid)
            time.sleep(0.3)
    died = time.time()
    assert driver.returncode == -signal.SIGKILL
    assert any(name.startswith("ray::LearnerActor") for name in seen.values())
    wait_until(lambda: not seen.keys() & processes().keys(), "processes outlived their driver")
    assert [row["step"] for row in steps(place / "run")] == [0, 1, 2, 3, 4]
    with monkeypatch.context() as patch:
        injector = FaultInjector(patch, {8: "LearnerActor"})
        assert train(config(place, STAGES, run=ON_RAY), resume=True).finished
    print("a step beyond, after the driver's death:", seconds_beyond(4, died, done_at))
    assert injector.victims == ["LearnerActor"]
    same_rollouts(place / "run", alone)
    same_losses(place / "run", alone, 0)
    assert distance(place / "run" / "student", alone / "student") == 0
    assert [row["step"] for row in lines(place / "run" / "lost" / "metrics.jsonl")] == [3, 4, 6, 7]


def test_a_run_on_a_joined_cluster_resumes_after_its_driver_is_killed(cluster, alone, place, done_at):
    """On a joined cluster the actors of a killed driver end, and --resume completes its run there."""
    import ray

    address = ray.get_runtime_context().gcs_address
    config_file(place, STAGES, run=ON_RAY, cluster={"address": address})
    code = DIE_AFTER.format(step=4)
    seen: dict[int, str] = {}
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            seen |= descendants(driver.pid)
            time.sleep(0.3)
    died = time.time()
    assert driver.returncode == -signal.SIGKILL and not any("raylet" in name for name in seen.values())
    assert [row["step"] for row in steps(place / "run")] == [0, 1, 2, 3, 4]
    wait_until(lambda: not actors(), "actors outlived their driver")
    print(f"its actors were gone after {time.time() - died:.1f} s")
    assert train(config(place, STAGES, run=ON_RAY, cluster={"address": address}), resume=True).finished
    print("a step beyond, after the driver's death:", seconds_beyond(4, died, done_at))
    same_rollouts(place / "run", alone)
    assert distance(place / "run" / "student", alone / "student") == 0
    assert [row["step"] for row in lines(place / "run" / "lost" / "metrics.jsonl")] == [3, 4]


DIE_AFTER = """
import os, signal, sys
from switchkd import cli
from switchkd.controller.metrics import MetricsLog

log_step = MetricsLog.step

def die(self, step, row):
    log_step(self, step, row)
    if step == {step}:
        os.killpg(os.getpgrp(), signal.SIGKILL)

MetricsLog.step = die
sys.argv = ["switchkd", "train", "config.yaml"]
cli.main()
"""


def test_a_run_that_does_not_fit_a_joined_cluster_is_refused(cluster, place, monkeypatch):
    """A run that does not fit a joined cluster ends after `cluster.wait_s` with a line that names a role and what it
    lacks, before any actor or run folder."""
    from switchkd.actors import placement_group

    monkeypatch.setattr(placement_group, "RELEASE_S", 2.0)
    nothing_left()  # of the run before, whose driver was killed
    notes: list[str] = []
    monkeypatch.setattr(MetricsLog, "info", lambda self, text: notes.append(text))
    too_many = {"rollout": {"num_workers": 10}, "cluster": {"address": "auto"}}
    started = time.monotonic()
    lacking = r"(rollout.num_workers=10: \d|learner.num_ranks=1: 1|teacher.replicas=1: 1) cannot be placed"
    with pytest.raises(ConfigError, match=rf"^{lacking}, each needs 1 CPUs on one node, .* at most 0 CPUs are free"):
        train(config(place, STAGES, run=ON_RAY, **too_many))
    assert time.monotonic() - started < 10 and not any("waiting" in note for note in notes)
    (table,) = [note for note in notes if note.startswith("role")]
    assert all(role in table for role in ("rollout.num_workers", "teacher.replicas", "learner.num_ranks", "0 of 2"))
    too_many["cluster"]["wait_s"] = 2.5
    with pytest.raises(ConfigError, match=r"or raise cluster.wait_s=2.5$"):
        train(config(place, STAGES, run=ON_RAY, **too_many))
    (waiting,) = [note for note in notes if "waiting" in note]
    assert re.match(rf"waiting up to 2.5 s: {lacking}", waiting)
    assert not actors() and not (place / "run").exists()


def test_an_address_without_ray_is_refused(place):
    """An address at which no Ray answers is an error in one line with exit code 2; no run folder is made."""
    config_file(place, STAGES, run=ON_RAY, cluster={"address": f"127.0.0.1:{free_ports(1)[0]}"})
    command = [sys.executable, "-m", "switchkd.cli", "train", "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("switchkd: error:")]
    assert done.returncode == 2 and "cannot be joined ([Errno 111] Connection refused); start one" in error
    assert not (place / "run").exists()


# --- a submitted job -------------------------------------------------------------------------------------------------


@pytest.fixture
def head(monkeypatch) -> Iterator[str]:
    """`ray start --head` with a token, on loopback, with ports and a folder of its own: the dashboard's address."""
    folder = tempfile.mkdtemp(prefix="skd-", dir="/tmp")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # a job's entrypoint is looked up in the head's PATH, as if the environment was active at `ray start`
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    gcs, dashboard, agent, agent_grpc, client, metrics = free_ports(6)
    command = [
        ray_command(), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=4",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", f"--temp-dir={folder}", "--object-store-memory=100000000",
        "--disable-usage-stats",
    ]  # fmt: skip
    with open(Path(folder) / "head.txt", "w") as out:
        process = subprocess.Popen(command, start_new_session=True, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until(lambda: answers(dashboard) and answers(agent), "the head did not start", 90)
        yield address
    finally:
        own = descendants(process.pid)
        for pid in (process.pid, *own):
            with suppress(ProcessLookupError):  # it ends by itself
                if processes().get(pid) == own.get(pid, processes().get(pid)):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_leaves_the_same_run_folder(head, alone, place, tmp_path_factory):
    """`ray job submit` on a cluster with a token ends with exit code 0, a line per step, and the files and rollouts of
    a run in one process."""
    shutil.copytree(place, job := tmp_path_factory.mktemp("job") / "dir", symlinks=False)
    (job / "configs").mkdir()
    moved = {"data": {**BASE["data"], "path": "../data.jsonl"}, "eval": {**EVAL, "data": "../data.jsonl"}}
    stages = config_file(job, STAGES, name="configs/tiny.yaml", run=ON_RAY, **moved)
    run = tmp_path_factory.mktemp("shared") / "run"
    entry = ["switchkd", "train", str(stages.relative_to(job)), f"run.dir={run}"]
    command = [ray_command(), "job", "submit", f"--address={head}", "--working-dir", ".", "--", *entry]
    done = subprocess.run(command, cwd=job, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(f"step {step}/10  " in done.stdout for step in range(1, 11)) and f"student: {run}/student" in done.stdout
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in alone.iterdir())
    same_rollouts(run, alone)
    same_losses(run, alone, 1e-5)


def ray_command() -> str:
    return str(Path(sys.executable).with_name("ray"))


CALL_WITHOUT_RAY = """
from switchkd.actors.ray_futures import retry_until_alive
import ray

@ray.remote
def one():
    return 1

answer = retry_until_alive(one.remote)
print(type(answer.exception(timeout=60)).__name__, ray.is_initialized())
"""


def test_a_call_without_ray_starts_none():
    """A call where Ray is down gives RaySystemError; Ray itself would start a cluster."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CALL_WITHOUT_RAY],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["RaySystemError", "False"], done.stdout + done.stderr[-2000:]
