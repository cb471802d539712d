"""The same runs on Ray: any number of processes, some of them killed, write the rollouts that one process writes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runs import (
    BASE,
    NUM_ROLLOUTS,
    STAGES,
    SWITCH,
    config,
    config_file,
    descendants,
    distance,
    lines,
    linked,
    processes,
    rollouts,
    seconds_beyond,
    small_ray,
    steps,
)

from switchkd.config.errors import ConfigError
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.summary import Summary
from switchkd.train import train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

EVAL = {"data": "./data.jsonl", "num_prompts": 6, "max_new_tokens": 12}
ON_RAY = {"dir": "run", "mode": "ray"}
TWO_OF_ALL = {
    "rollout": {"num_workers": 2, "batch_size": 4, "max_new_tokens": 12},
    "teacher": {"path": "teacher", "replicas": 2},
    "learner": {"lr": 1e-3, "num_ranks": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with small_ray(8, num_gpus=2) as folder:  # for Ray's books only: nobody asks what these GPUs can do
        yield folder


@pytest.fixture(scope="module")
def alone(models) -> tuple[Path, Summary]:
    """The run without Ray that the others are held against."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        summary = train(config(models, STAGES, name="alone.yaml", run={"dir": "alone"}, eval=EVAL))
    return models / "alone", summary


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    """A working directory of one's own with the models in it."""
    monkeypatch.chdir(tmp_path)
    return linked(models, tmp_path)


def actors(role: str = r"\w+Actor") -> list[int]:
    """Process ids of our own actors of a role. Ray names them `ray::RolloutActor`, with the method that runs."""
    return sorted(pid for pid, name in descendants(os.getpid()).items() if re.match(f"ray::{role}", name))


def kill(role: str) -> None:
    os.kill(actors(role)[0], signal.SIGKILL)


class Murder:
    """Kills at set moments: just after tasks of a batch were given out, or an examination began; each once. The only
    teacher dies while a worker waits for its answer about a block: `in_flight`."""

    def __init__(self, patch: pytest.MonkeyPatch, *, at_batch: dict[int, str], at_examination: int | None) -> None:
        from switchkd.actors.worker_pool import RayWorkerHandle

        self.at_batch, self.at_examination = dict(at_batch), at_examination
        self.generate, self.evaluate = RayWorkerHandle.generate, RayWorkerHandle.evaluate
        self.victims: list[str] = []
        self.in_flight: list[str] = []  # where the asker stood
        patch.setattr(
            RayWorkerHandle, "generate", lambda worker, tasks, weights: self._generate(worker, tasks, weights)
        )
        patch.setattr(RayWorkerHandle, "evaluate", lambda worker, *args: self._evaluate(worker, *args))

    def _generate(self, worker: Any, tasks: Any, weights: Any) -> Any:
        future = self.generate(worker, tasks, weights)
        self._strike(self.at_batch.pop(tasks[0].batch, ""), worker)
        return future

    def _evaluate(self, worker: Any, shard: Any, weights: Any) -> Any:
        future = self.evaluate(worker, shard, weights)
        if self.at_examination == (weights.version if weights else 0):
            self.at_examination = None
            self._strike("RolloutActor", worker)
        return future

    def _strike(self, role: str, worker: Any) -> None:
        if not role:
            return
        if role == "TeacherActor" and len(actors(role)) == 1:
            self.in_flight.append(stopped_within_a_block(worker))
        else:
            time.sleep(0.05)  # let it begin
        kill(role)
        self.victims.append(role)


def stopped_within_a_block(worker: Any) -> str:
    """The only teacher stands still, and the worker waits for its answer about a block: where."""
    import ray

    (teacher,) = actors("TeacherActor")
    os.kill(teacher, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while "_ask_once" not in (where := ray.get(worker.actor.heartbeat.remote())[1]):
        assert time.monotonic() < deadline, f"no block was asked about; the worker stands at {where!r}"
        if "teacher_router.py" in where:  # it opens sessions, or the like: let that be done
            os.kill(teacher, signal.SIGCONT)
            time.sleep(0.01)
            os.kill(teacher, signal.SIGSTOP)
    return where


def hear_at_once(patch: pytest.MonkeyPatch) -> None:
    """What the teachers' pool tells is waited for after every step; else the last steps may be over before."""
    from switchkd.actors.shared_teacher import TeacherPoolHandle

    events = TeacherPoolHandle.events

    def heard(pool: Any) -> list[str]:
        import ray

        pool._events = pool._events or pool.actor.events.remote(pool._cursor)
        ray.wait([pool._events], timeout=60)
        return events(pool)

    patch.setattr(TeacherPoolHandle, "events", heard)


def same_rollouts(run: Path, other: Path) -> None:
    ours, theirs = rollouts(run), rollouts(other)
    assert sorted(ours) == sorted(theirs) == list(range(NUM_ROLLOUTS))
    assert [i for i in ours if ours[i] != theirs[i]] == []


def same_numbers(run: Path, other: Path, tolerance: float) -> None:
    losses = [[row["loss/total"] for row in steps(folder)] for folder in (run, other)]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)


def test_one_of_each_and_all_of_them_die(cluster, alone, place, monkeypatch, notes):
    """With one worker, one teacher and one rank the run equals the one without Ray, its losses and evaluations too,
    though its worker is killed while it writes and while it is examined, and its only teacher while a call about a
    block waits for its answer. The user is told of each death."""
    hear_at_once(monkeypatch)
    murder = Murder(monkeypatch, at_batch={4: "RolloutActor", 5: "TeacherActor"}, at_examination=3)
    summary = train(config(place, STAGES, run=ON_RAY, eval=EVAL))
    assert sorted(murder.victims) == ["RolloutActor", "RolloutActor", "TeacherActor"]
    assert summary.finished and "waits for a teacher" in murder.in_flight[0]
    wait_until(lambda: not actors(), "the run left actors behind")
    assert [note for note in notes if " died" in note] == [
        "a rollout worker died; the evaluation begins again",
        "rollout worker 0 died; its 4 rollouts are written again, each alone",
        "teacher replica 0 died and is started again",
    ]
    assert "teacher replica 0 works" in notes
    same_rollouts(place / "run", alone[0])
    assert steps(place / "run")[0]["loss/total"] == steps(alone[0])[0]["loss/total"]
    same_numbers(place / "run", alone[0], 1e-5)
    assert distance(place / "run" / "student", alone[0] / "student") < 1e-4
    for (name, ours), (same, theirs) in zip(summary.stage_scores, alone[1].stage_scores, strict=True):
        assert name == same and ours == pytest.approx(theirs, abs=1e-4)


def test_two_of_each_and_one_of_them_dies(cluster, alone, place, monkeypatch, notes):
    """Two workers, two teachers and two ranks write the same rollouts and compute the same losses, though a worker and
    a teacher are killed at their work."""
    murder = Murder(monkeypatch, at_batch={4: "TeacherActor", 6: "RolloutActor"}, at_examination=None)
    summary = train(config(place, STAGES, run=ON_RAY, **TWO_OF_ALL))
    assert murder.victims == ["TeacherActor", "RolloutActor"] and summary.finished
    assert [note for note in notes if re.match(r"rollout worker \d died; its 2 rollouts are written again", note)]
    same_rollouts(place / "run", alone[0])
    same_numbers(place / "run", alone[0], 1e-5)


def test_shares_of_gpus(cluster, alone, place, monkeypatch):
    """Each process takes its share of a GPU, as Ray counts: two teachers with halves, two workers with quarters, a
    learner with one eighth. Afterwards both GPUs are whole again."""
    import ray

    from switchkd.actors.worker_pool import RayWorkerHandle

    free: list[float] = []
    generate = RayWorkerHandle.generate

    def watched(worker: Any, tasks: Any, weights: Any) -> Any:
        free.append(ray.available_resources().get("GPU", 0.0))
        return generate(worker, tasks, weights)

    monkeypatch.setattr(RayWorkerHandle, "generate", watched)
    shares = {"teacher": {"num_gpus": 0.5}, "rollout": {"num_gpus": 0.25}, "learner": {"num_gpus": 0.125}}
    two = {key: TWO_OF_ALL[key] for key in ("rollout", "teacher")}
    taken = {role: {"threads": 1, **share} for role, share in shares.items()}
    train(config(place, STAGES, run=ON_RAY, cluster={"address": "auto"}, resources=taken, **two))
    assert set(free) == {2 - 2 * 0.5 - 2 * 0.25 - 0.125}
    wait_until(lambda: ray.available_resources().get("GPU") == 2, "the GPUs were not given back")
    same_rollouts(place / "run", alone[0])


OWN_RULE = """
import os
from switchkd.algo import switching


def guarded():
    '''Fails in a process that was not given the token.'''
    in_actor = "RAY_JOB_ID" in os.environ
    assert not in_actor or os.environ.get("HF_TOKEN", "").startswith("hf_"), "no token here"
    return switching.jsd_threshold(half_life=6)
"""


def test_stale_weights_and_a_secret(cluster, place, monkeypatch):
    """With max_staleness 1 and weights taken in mid-rollout the run ends, no token ever older than one version. Its
    actors know HF_TOKEN, which Ray was started without (and say why they cannot start without it), and no file of the
    run or of Ray's logs holds it."""
    token = "hf_" + "abcDEF0123456789" * 2
    assert "HF_TOKEN" not in os.environ
    (place / "my_rule.py").write_text(OWN_RULE)
    monkeypatch.setattr(sys, "path", sys.path[:])
    writers = {"num_workers": 2, "batch_size": 4, "max_new_tokens": 12, "on_new_weights": "reprefill"}
    stage = {**SWITCH, "steps": 6, "mix": {"rollout": 1}, "rule": {"type": "my_rule:guarded"}}
    with pytest.raises(RuntimeError, match="an actor could not start: AssertionError: no token here"):
        train(config(place, [stage], run={**ON_RAY, "dir": "without"}))
    wait_until(lambda: not actors(), "the failed run left actors behind")
    monkeypatch.setenv("HF_TOKEN", token)
    assert train(config(place, [stage], run=ON_RAY, rollout=writers, replay={"max_staleness": 1})).finished
    ages = [row["replay/staleness_max"] for row in steps(place / "run")]
    assert max(ages) == 1 and sorted(rollouts(place / "run")) == list(range(24))
    files = [path for folder in (place / "run", Path(cluster)) for path in folder.rglob("*") if path.is_file()]
    assert any("logs" in path.parts for path in files) and len(files) > 20
    assert [path for path in files if token.encode() in path.read_bytes()] == []


def test_kill_everything_and_resume(cluster, alone, place, monkeypatch, done_at):
    """SIGKILL of the driver and its private Ray leaves no process behind. The resumed run loses its learner, goes back
    to its last checkpoint by itself, and completes: no rollout lost, none twice, the same weights bit for bit."""
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
        murder = Murder(patch, at_batch={8: "LearnerActor"}, at_examination=None)
        assert train(config(place, STAGES, run=ON_RAY), resume=True).finished
    print("a step beyond, after the driver's death:", seconds_beyond(4, died, done_at))
    assert murder.victims == ["LearnerActor"]
    same_rollouts(place / "run", alone[0])
    same_numbers(place / "run", alone[0], 0)
    assert distance(place / "run" / "student", alone[0] / "student") == 0
    assert [row["step"] for row in lines(place / "run" / "lost" / "metrics.jsonl")] == [3, 4, 6, 7]


def test_the_driver_dies_on_a_joined_cluster(cluster, alone, place, done_at):
    """On a cluster that others use too the actors of a driver that was killed go by themselves, and --resume completes
    its run there."""
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
    same_rollouts(place / "run", alone[0])
    assert distance(place / "run" / "student", alone[0] / "student") == 0
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


def test_more_than_the_cluster_has(cluster, place, monkeypatch):
    """A joined cluster that is too small is refused by one line that names what is missing, after `cluster.wait_s`;
    no actor was started and no run folder made."""
    from switchkd.actors import placement_group

    monkeypatch.setattr(placement_group, "RELEASE_S", 2.0)
    notes: list[str] = []
    monkeypatch.setattr(MetricsLog, "info", lambda self, text: notes.append(text))
    too_many = {"rollout": {"num_workers": 9}, "cluster": {"address": "auto"}}
    started = time.monotonic()
    lacking = r"(rollout.num_workers=9: [23]|learner.num_ranks=1: 1|teacher.replicas=1: 1) cannot be placed"
    with pytest.raises(ConfigError, match=rf"^{lacking}, each needs 1 CPUs on one node, .* at most 0 CPUs are free"):
        train(config(place, STAGES, run=ON_RAY, **too_many))
    assert time.monotonic() - started < 10 and not any("waiting" in note for note in notes)
    (table,) = [note for note in notes if note.startswith("role")]
    assert all(role in table for role in ("rollout.num_workers", "teacher.replicas", "learner.num_ranks", "0 of 8"))
    too_many["cluster"]["wait_s"] = 2.5
    with pytest.raises(ConfigError, match=r"or raise cluster.wait_s=2.5$"):
        train(config(place, STAGES, run=ON_RAY, **too_many))
    (waiting,) = [note for note in notes if "waiting" in note]
    assert re.match(rf"waiting up to 2.5 s: {lacking}", waiting)
    assert not actors() and not (place / "run").exists()


def test_no_cluster_to_join(place):
    """An address where no Ray answers is refused at once, by one line and with exit code 2; nothing is made."""
    config_file(place, STAGES, run=ON_RAY, cluster={"address": f"127.0.0.1:{free_ports(1)[0]}"})
    command = [sys.executable, "-m", "switchkd.cli", "train", "config.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("switchkd: error:")]
    assert done.returncode == 2 and "cannot be joined ([Errno 111] Connection refused); start one" in said
    assert not (place / "run").exists()


# --- a submitted job -------------------------------------------------------------------------------------------------


@pytest.fixture
def head(monkeypatch) -> Iterator[str]:
    """`ray start --head` with a token, on loopback, with ports and a folder of its own: the dashboard's address."""
    folder = tempfile.mkdtemp(prefix="skd-", dir="/tmp")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # A job's entrypoint is looked up in the head's PATH: whoever starts a head has activated the environment.
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


def test_submitted_job(head, alone, place, tmp_path_factory):
    """`ray job submit` of a config on a cluster with a token ends with exit code 0, a line per step, and the run folder
    that the same config leaves elsewhere."""
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
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in alone[0].iterdir())
    same_rollouts(run, alone[0])
    same_numbers(run, alone[0], 1e-5)


def ray_command() -> str:
    return str(Path(sys.executable).with_name("ray"))


def free_ports(num: int) -> list[int]:
    probes = [socket.socket() for _ in range(num)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true: Callable[[], bool], otherwise: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


NOBODY = """
from switchkd.actors.ray_futures import retry_until_alive
import ray

@ray.remote
def one():
    return 1

answer = retry_until_alive(one.remote)
print(type(answer.exception(timeout=60)).__name__, ray.is_initialized())
"""


def test_a_late_question_starts_no_ray():
    """Whoever asks a Ray that is gone hears so; Ray's own answer would be to start another one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", NOBODY],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["RaySystemError", "False"], done.stdout + done.stderr[-2000:]
