"""Pools on a cluster of several nodes: they change during a run, are placed by label, survive losses, and serve several
runs. The rollouts are those of one process."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import runs
from conftest import TEACH, WRITE
from faults import FaultInjector, actors, nothing_left, report_at_once, same_losses, same_rollouts, wait_until
from runs import STAGES, SWITCH, command

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.train import train
from switchkd.types import Blocks, Ragged, Sessions

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

config, config_file = partial(runs.config, fake=True), partial(runs.config_file, fake=True)
JOINED = {"run": {"dir": "run", "mode": "ray"}, "cluster": {"address": "auto"}}


@pytest.fixture
def place(fake_place) -> Path:
    return fake_place


@pytest.fixture
def alone(fake_alone) -> Path:
    return fake_alone


@pytest.fixture
def pools(monkeypatch) -> list[Any]:
    """The pools that runs start or attach to, in order."""
    from switchkd.actors import launch

    found: list[Any] = []
    start = launch._start_pool

    def watched(*args: Any) -> Any:
        found.append(start(*args))
        return found[-1]

    monkeypatch.setattr(launch, "_start_pool", watched)
    return found


def members(pool: Any) -> Any:
    import ray
    from ray import cloudpickle

    return cloudpickle.loads(ray.get(pool.members.remote("test", {})))


def nodes_of(role: str) -> set[str]:
    """The labels `pool` of the nodes with living actors of a class."""
    import ray

    pool_of = {node["NodeID"]: node.get("Labels", {}).get("pool", "") for node in ray.nodes()}
    known = ray._private.state.actors().values()
    alive = [each for each in known if each["State"] == "ALIVE" and each["ActorClassName"] == role]
    return {pool_of[each["Address"]["NodeID"]] for each in alive}


# --- a run whose pools change ----------------------------------------------------------------------------------------


def test_a_changing_number_of_workers_changes_no_rollout(cluster, alone, place, notes, monkeypatch):
    """A run that grows from one worker to three and shrinks to two has the rollouts and losses of a run with one. (The
    decisions are fixed here; test_autoscaling.py tests them.)"""
    from switchkd.actors import pool
    from switchkd.actors.worker_pool import WorkerPool

    sizes: list[int] = []
    plan = {1: 1, 3: 1, 6: -1}  # look -> decision
    autoscale = WorkerPool.autoscale

    def decide(loads: Any, limits: Any) -> int:
        return plan.pop(len(sizes), 0)

    def autoscale_and_wait(workers: Any, waited_s: float, elapsed_s: float) -> list[str]:
        events = autoscale(workers, waited_s, elapsed_s)
        sizes.append(len(workers))
        for member in workers._pool.within(pool.State.STARTING).values():
            # a fake step is shorter than the start of a process
            wait_until(lambda member=member: member.probe.answered, "the worker did not start", 120)
        return events

    monkeypatch.setattr(pool, "decide", decide)
    monkeypatch.setattr(WorkerPool, "autoscale", autoscale_and_wait)
    writers = {"num_workers": {"min": 1, "max": 3}, "batch_size": 4, "max_new_tokens": 12, "drafter": "student"}
    train(config(place, STAGES, **JOINED, rollout={**writers, "max_draft_tokens": 4}))
    assert sizes == [1, 1, 2, 2, 3, 3, 2, 2, 2, 2] and not plan
    assert [note for note in notes if note.endswith("one is added")] and "rollout worker 1 works" in notes
    assert "rollout worker 2 is drained and has ended" in notes
    same_rollouts(place / "run", alone)
    same_losses(place / "run", alone)
    nothing_left()


def test_lost_and_drained_replicas_change_no_rollout(cluster, alone, place, notes, pools, monkeypatch):
    """A run has the same rollouts and losses when a replica is lost for good and replaced, another is drained, and
    their pool is killed."""
    import ray

    ready: list[int] = []

    def kill_one() -> None:
        number, handle = next(iter(members(pools[0].actor).ready.items()))
        ray.kill(handle)
        ready.append(number)

    def drain_one() -> None:
        # two are ready also before the pool notices the death
        wait_until(lambda: 2 in members(pools[0].actor).ready, "the dead replica was not replaced")
        ready.extend(members(pools[0].actor).ready)
        ray.get(pools[0].actor.drain.remote(min(ready[-2:])))

    def kill_pool() -> None:
        os.kill(actors("TeacherPoolActor")[0], signal.SIGKILL)

    report_at_once(monkeypatch)
    FaultInjector(monkeypatch, {3: kill_one, 5: drain_one, 8: kill_pool})
    train(config(place, STAGES, **JOINED, teacher={"path": "teacher", "replicas": 2}))
    assert 2 in ready[1:], "the third replica replaces the one that died"
    for event in ("is lost", "is drained", "the teacher pool died"):
        assert any(event in note for note in notes), event
    same_rollouts(place / "run", alone)
    same_losses(place / "run", alone)
    nothing_left()


def test_roles_follow_their_labels_also_after_a_node_is_lost(cluster, alone, place, notes, pools, monkeypatch):
    """Each role runs on the nodes with its labels, and a run from which a node with a teacher is removed ends with the
    same rollouts."""
    import ray

    from switchkd.actors.teacher_pool import NO_EVENTS

    frail = {"num_cpus": 1, "labels": {"pool": "frail"}, "object_store_memory": 80_000_000}
    nodes = [cluster.add_node(**frail) for _ in range(2)]
    found: dict[str, set[str]] = {}

    def look_and_strike() -> None:
        found.update({role: nodes_of(role) for role in ("TeacherActor", "RolloutActor")})
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        nodes.append(cluster.add_node(**frail))

    def wait_for_event() -> None:  # the run could end before its pool notices the death
        def events() -> list[str]:
            return ray.get(pools[0].actor.events.remote(NO_EVENTS))[1]

        wait_until(lambda: any("died" in line or "lost" in line for line in events()), "the pool noticed no death")

    FaultInjector(monkeypatch, {4: look_and_strike, 6: wait_for_event})
    each = {
        "teacher": {"threads": 1, "labels": frail["labels"]},
        "rollout": {"threads": 1, "labels": WRITE},
        "learner": {"threads": 1},
    }
    train(config(place, STAGES, **JOINED, resources=each, teacher={"path": "teacher", "replicas": 2}))
    assert found == {"TeacherActor": {"frail"}, "RolloutActor": {"write"}}
    assert any("died" in note or "lost" in note for note in notes)
    same_rollouts(place / "run", alone)
    nothing_left()
    for node in nodes:
        cluster.remove_node(node)
    wait_until(lambda: ray.cluster_resources().get("CPU") == 9, "the nodes did not go")


def test_several_teachers_equal_one_process(cluster, place):
    """Two pools of different teachers, one of two replicas, give the rollouts and losses of a run in one process."""
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    named = [{**row, "source": ("near", "far")[i % 2]} for i, row in enumerate(rows)]
    (place / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    data = {"path": "./named.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32, "teacher_field": "source"}
    both = {"near": {"path": "teacher", "replicas": 2}, "far": {"path": "student"}}
    train(config(place, STAGES, **JOINED, teachers=both, data=data))
    one = {**both, "near": {"path": "teacher"}}
    train(config(place, STAGES, run={"dir": "one", "mode": "inprocess"}, teachers=one, data=data))
    same_rollouts(place / "run", place / "one")
    same_losses(place / "run", place / "one")
    nothing_left()


# --- runs that do not fit --------------------------------------------------------------------------------------------


def test_runs_that_do_not_fit_are_refused(cluster, place, notes, monkeypatch):
    """A full cluster, missing labels, processes that fit one by one but not together, and GPUs on different nodes are
    refused by a line that names the role and what is free, before any actor or folder."""
    import ray

    from switchkd.actors import placement_group

    monkeypatch.setattr(placement_group, "RELEASE_S", 1.0)

    class Holder:  # an actor: a task that is cancelled just as it begins may go on
        def here(self) -> bool:
            return True

    held = [ray.remote(Holder).options(num_cpus=2).remote() for _ in range(4)]
    ray.get([each.here.remote() for each in held], timeout=60)
    wait_until(lambda: ray.available_resources().get("CPU", 0) <= 1, "the cluster did not fill")
    full = r"teacher.replicas=1|rollout.num_workers=1|learner.num_ranks=1"
    with pytest.raises(
        ConfigError, match=rf"^({full}): 1 cannot be placed, each needs 1 CPUs on one node, .* at most 0 CPUs are free"
    ):
        train(config(place, [SWITCH], **JOINED))
    assert any("learner.num_ranks" in note and re.search(r"\b0 of 2\b", note) for note in notes)
    waiting = {**JOINED, "cluster": {"address": "auto", "wait_s": 3}}
    with pytest.raises(ConfigError, match=r"or raise cluster.wait_s=3"):
        train(config(place, [SWITCH], **waiting))
    assert [note for note in notes if re.match(rf"waiting up to 3 s: ({full}): 1 cannot be placed", note)]
    for each in held:
        ray.kill(each)
    wait_until(lambda: ray.available_resources().get("CPU", 0) >= 9, "the cluster did not empty")
    with pytest.raises(ConfigError, match=r"resources.learner.labels=pool=learn: no node of the cluster has these"):
        train(config(place, [SWITCH], **JOINED, resources={"learner": {"labels": {"pool": "learn"}}}))
    monkeypatch.setattr(placement_group, "RELEASE_S", 4.0)
    wide = {"teacher": {"num_cpus": 2, "labels": TEACH}, "rollout": {"num_cpus": 1.5, "labels": TEACH}}
    several = {"rollout": {"num_workers": 1}, "teacher": {"path": "teacher", "replicas": 2}}
    # Ray may place the worker before the second teacher: then the teacher lacks a node
    lacks = r"(rollout.num_workers=1: 1 cannot be placed, each needs 1.5|teacher.replicas=2: 1 cannot .*, each needs 2)"
    with pytest.raises(ConfigError, match=rf"^{lacks} CPUs .* with labels pool=teach"):
        train(config(place, [SWITCH], **JOINED, resources=wide, **several))
    gpus = [cluster.add_node(num_cpus=0, num_gpus=1, object_store_memory=80_000_000) for _ in range(2)]
    monkeypatch.setattr(placement_group, "RELEASE_S", 3.0)
    with pytest.raises(ConfigError, match=r"each needs 2 GPUs on one node, .* at most 1 GPUs are free on one"):
        train(config(place, [SWITCH], **JOINED, resources={"teacher": {"num_cpus": 0, "num_gpus": 2}}))
    thirds = {"teacher": {"num_cpus": 0, "num_gpus": 0.6}}
    with pytest.raises(ConfigError, match=r"teacher.replicas=3: 1 cannot be placed, each needs 0.6 of one GPU on one"):
        train(config(place, [SWITCH], **JOINED, resources=thirds, teacher={"path": "teacher", "replicas": 3}))
    for node in gpus:
        cluster.remove_node(node)
    assert not actors() and not (place / "run").exists()


# --- one teacher for many runs ---------------------------------------------------------------------------------------


REFUSED = (
    ({"attach": "small"}, r"teacher.attach=small: no teacher of this name is served on the cluster \(there: big\)"),
    ({"attach": "big", "path": "student"}, r"teacher.attach=big: its path is '.*teacher', this run's is '.*student'"),
    (
        {"attach": "big", "output": "logits"},
        r"its output is 'hidden_states', this run's is 'logits'; set teacher as the config",
    ),
)


def test_a_served_teacher_serves_runs_until_stopped(cluster, alone, place, notes, pools, monkeypatch, capsys, request):
    """A served teacher outlives its command, serves two runs with one replica although its pool is killed, refuses runs
    that do not match, and ends at `--stop`."""
    import ray

    from switchkd.actors import shared_teacher

    file = config_file(place, STAGES, **JOINED, teacher={"path": "teacher", "max_sessions": 12})
    request.addfinalizer(lambda: shared_teacher.find_pool("big") and shared_teacher.stop_teacher("big", "auto"))
    code, out, _ = command(monkeypatch, capsys, "serve-teacher", file, "--name", "big")
    assert (code, out) == (0, "big is served by 1 replica: teacher.attach=big\n")
    replica = actors("TeacherActor")
    code, _, err = command(monkeypatch, capsys, "serve-teacher", file, "--name", "big")
    assert code == 2 and "--name big: a teacher of this name is served already; attach to it" in err
    code, _, err = command(monkeypatch, capsys, "serve-teacher", file, "--name", "big/one")
    assert code == 2 and "--name 'big/one': choose a name without a slash" in err

    attached = {"path": "teacher", "attach": "big"}
    FaultInjector(monkeypatch, {4: lambda: os.kill(actors("TeacherPoolActor")[0], signal.SIGKILL)})
    train(config(place, STAGES, **JOINED, teacher=attached))
    same_rollouts(place / "run", alone)
    assert actors("TeacherActor") == replica, "the restarted pool kept its replica"
    assert not actors("RolloutActor")
    again = {**JOINED, "run": {"dir": "again", "mode": "ray"}}
    train(config(place, STAGES, **again, teacher=attached))
    same_rollouts(place / "again", alone)
    assert pools[0].namespace != pools[1].namespace
    assert actors("TeacherActor") == replica

    no = {**JOINED, "run": {"dir": "no", "mode": "ray"}}
    for teacher, expected in REFUSED:
        with pytest.raises(ConfigError, match=expected):
            train(config(place, STAGES, **no, teacher={"path": "teacher", **teacher}))
    longer = {"path": "./data.jsonl", "max_prompt_tokens": 200, "max_reference_tokens": 32}
    with pytest.raises(
        ConfigError, match=r"holds 96 tokens a session, this run needs 232; lower data.max_prompt_tokens"
    ):
        train(config(place, STAGES, **no, teacher=attached, data=longer))
    assert not (place / "no").exists()

    code, out, _ = command(monkeypatch, capsys, "serve-teacher", "--stop", "big")
    assert (code, out) == (0, "big is no longer served\n") and shared_teacher.list_shared() == []
    nothing_left()
    code, _, err = command(monkeypatch, capsys, "serve-teacher", "--stop", "big")
    assert code == 2 and "--stop big: no teacher of this name is served on the cluster (there: none)" in err
    wait_until(lambda: ray.available_resources().get("CPU", 0) >= 9, "its placements were not freed")


def test_a_served_pool_that_does_not_answer_is_an_error(cluster, place, monkeypatch, capsys):
    """A run ends with one line if the served pool does not answer; `--stop` ends the pool and its replicas."""
    import ray

    from switchkd.actors import shared_teacher
    from switchkd.actors.teacher_pool import NAMESPACE, replica_name

    @ray.remote(num_cpus=0)
    class Frozen:
        def attach(self) -> None:
            Event().wait()

        def stop(self) -> None:
            Event().wait()

    monkeypatch.setattr(shared_teacher, "ANSWER_S", 1.0)
    monkeypatch.setattr(shared_teacher, "LEAVE_S", 1.0)
    names = [shared_teacher._pool_name("still"), replica_name("still", 0)]
    kept = [Frozen.options(name=name, namespace=NAMESPACE, lifetime="detached").remote() for name in names]
    file = config_file(place, STAGES, **JOINED, teacher={"path": "teacher", "attach": "still"})
    code, _, err = command(monkeypatch, capsys, "train", file)
    assert code == 2 and (
        "teacher.attach=still: it does not answer (nothing in 1 s); end it with `switchkd serve-teacher --stop "
        "still` and serve it anew" in err
    )
    assert not (place / "run").exists()
    code, out, _ = command(monkeypatch, capsys, "serve-teacher", "--stop", "still")
    assert (code, out) == (0, "still is no longer served\n")
    for name in names:
        wait_until(lambda name=name: not _is_named(name), f"{name} was left behind")
    del kept


def _is_named(name: str) -> bool:
    import ray

    return name in [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]


def test_serving_and_attaching_need_a_joined_cluster(place, monkeypatch, capsys):
    """Without a joined cluster `serve-teacher` and `teacher.attach` are errors."""
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    file = config_file(place, STAGES, run={"dir": "run", "mode": "ray"})
    code, _, err = command(monkeypatch, capsys, "serve-teacher", file, "--name", "big")
    assert code == 2 and "serve-teacher needs a cluster that outlives it: set cluster.address" in err
    with pytest.raises(ConfigError, match=r"teacher.attach=big needs the cluster on which that teacher is served"):
        train(config(place, STAGES, run={"dir": "run", "mode": "ray"}, teacher={"path": "teacher", "attach": "big"}))


# --- autoscaling of a running pool -----------------------------------------------------------------------------------


def start_pool(wanted: Config) -> Any:
    from ray import cloudpickle

    from switchkd.actors.placement_group import resolve_resources
    from switchkd.actors.process_setup import Secrets
    from switchkd.actors.shared_teacher import TeacherPoolHandle
    from switchkd.actors.teacher_pool import TeacherPoolActor

    plain = resolve_resources(wanted).model_dump()
    actor = TeacherPoolActor.remote(plain, cloudpickle.dumps([]), Secrets({}), os.getcwd(), "", {})
    return TeacherPoolHandle(actor, "")


def test_a_running_pool_grows_under_load_and_shrinks_without(cluster, place):
    """While six callers keep one replica busy the pool adds another, which gets new sessions; without calls it drains
    back to one."""
    import ray

    from switchkd.actors.pool_client import PoolClient
    from switchkd.actors.teacher_router import TeacherRouter

    teacher = {"path": "teacher", "replicas": {"min": 1, "max": 2}}
    pool = start_pool(config(place, STAGES, **JOINED, teacher=teacher, fake={"teacher_s": 0.05}))
    try:
        assert ray.get(pool.actor.ready.remote()) == 1

        def look_often(actor: Any) -> None:
            # trap: Ray wraps an actor's methods and pickles its class with a copy of the module's globals
            inspect.unwrap(type(actor).measure).__globals__["MEASURE_S"] = 0.5

        ray.get(pool.actor.__ray_call__.remote(look_often))
        enough = Event()

        def call(index: int) -> None:
            client = PoolClient(pool.actor, f"0/{index}")
            router = TeacherRouter(client, first=index)
            turn = 0
            while not enough.is_set():
                turn += 1
                session = np.array([1000 * index + turn])
                prompt = np.full(40, 5 + index, np.int32)
                router.open(Sessions(session_ids=session, tokens=Ragged.concat([prompt])))
                for i in range(5):
                    router.score(
                        Blocks(
                            session_ids=session, base_lens=np.array([40 + i], np.int32),
                            first_rows=np.array([39 + i], np.int32), tokens=Ragged.concat([[7]], np.int32),
                        )
                    )  # fmt: skip
                router.close(session)
            client.ask({})  # the pool's last report of this router would count its sessions for a minute

        threads = [Thread(target=call, args=(i,), daemon=True) for i in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(members(pool.actor).ready) == 2, "the pool did not grow", 120)
        wait_until(lambda: all(members(pool.actor).sessions.values()), "the new replica got no session")
        enough.set()
        for thread in threads:
            thread.join(30)
        wait_until(lambda: not (seen := members(pool.actor)).draining and len(seen.ready) == 1, "it did not shrink", 90)
        from switchkd.actors.teacher_pool import NO_EVENTS

        events = ray.get(pool.actor.events.remote(NO_EVENTS))[1]
        assert "one is added" in events[0] and any("is drained" in line for line in events)
    finally:
        pool.close()
    nothing_left()
