"""Does a run fit a cluster's nodes, ever and now: sums, labels, and what must lie on one node."""

from __future__ import annotations

import pytest

from switchkd.actors import room
from switchkd.actors.room import Node
from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.loader import parse
from switchkd.config.schema import Config
from switchkd.train import _check_private

ROLES = ("teacher", "rollout", "learner")


@pytest.fixture(autouse=True)
def outside_of_jobs(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def config(teacher: dict | None = None, workers: object = 1, **sections) -> Config:
    base = {"run": {"dir": "x"}, "train": {"num_steps": 1}, "cluster": {"address": "1.2.3.4:6379"}}
    return parse({**base, "teacher": teacher or {}, "rollout": {"num_workers": workers}, **sections})


def node(cpu: float, gpu: float = 0.0, free: tuple[float, float] | None = None, **labels: str) -> Node:
    left = (cpu, gpu) if free is None else free
    return Node(labels={"ray.io/node-id": "n", **labels}, total={"CPU": cpu, "GPU": gpu},
                free={"CPU": left[0], "GPU": left[1]})  # fmt: skip


def refused(message: str, wanted: Config, *nodes: Node) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        room.check(wanted, nodes)
    assert "\n" not in str(error.value)


def test_fits():
    """What fits is not refused, and nobody waits."""
    wanted = config(resources={"teacher": {"num_gpus": 4}, "learner": {"labels": {"pool": "train"}}})
    nodes = [node(4, 4), node(2, 0, pool="train")]
    room.check(wanted, nodes)
    assert room.waits_for(wanted, nodes) == ""


def test_sums():
    refused(r"needs 3 CPUs \(.*\) and the cluster has 2; .* or raise cluster.wait_s=0", config(), node(1), node(1))


def test_gpus_of_one_replica_lie_on_one_node():
    """Eight GPUs in two nodes are not a place for a replica of eight, though they are eight."""
    wanted = config(resources={"teacher": {"num_gpus": 8}})
    refused(
        r"teacher.replicas=1 asks for 1 CPUs and 8 GPUs on one node each, and the cluster's nodes have room for 0 of "
        r"them; lower resources.teacher or the number, add nodes, or raise cluster.wait_s=0",
        wanted, node(8, 4), node(8, 4),
    )  # fmt: skip


def test_fractions_are_of_one_gpu():
    """0.6 of a GPU fits once into each, whatever the sum; 0.5 twice."""
    refused(r"teacher.replicas=3 .* room for 2", config({"replicas": 3}, resources={"teacher": {"num_gpus": 0.6}}),
            node(8, 2))  # fmt: skip
    room.check(config({"replicas": 4}, resources={"teacher": {"num_gpus": 0.5}}), [node(8, 2)])
    with pytest.raises(ConfigError, match=r"resources.teacher.num_gpus=1.5: above 1 it must be a whole number"):
        config(resources={"teacher": {"num_gpus": 1.5}})


def test_labels():
    """Nodes that have them are named where none fits; where they are too small, the labels are told."""
    wanted = config(resources={"rollout": {"labels": {"pool": "write"}}})
    refused(r"resources.rollout.labels=pool=write: no node of the cluster has these \(labels there: none; pool=train\)",
            wanted, node(4), node(4, pool="train"))  # fmt: skip
    refused(r"rollout.num_workers=3 asks for 1 CPUs on one node each with labels pool=write, .* room for 2",
            config(workers=3, resources=wanted.resources.model_dump()), node(9), node(2, pool="write"))  # fmt: skip


def test_a_full_cluster_says_who_waits():
    """Large enough, but others are there: the sum, or the role that finds no place."""
    busy = [node(8, free=(2, 0)), node(8, free=(0.5, 0))]
    wanted = config(workers=2)
    room.check(wanted, busy)
    assert room.waits_for(wanted, busy) == (
        "the run needs 4 CPUs (1 for teacher.replicas=1, 2 for rollout.num_workers=2, 1 for learner.num_ranks=1), and "
        "of the cluster's 16 only 2.5 are free"
    )
    tall = config(resources={"teacher": {"num_cpus": 4}})
    scattered = [node(8, free=(3, 0)), node(8, free=(3, 0))]
    assert room.waits_for(tall, scattered) == (
        "teacher.replicas=1 asks for 4 CPUs on one node each, and there is room for 0 of them now"
    )
    said = str(room.full(tall, room.waits_for(tall, scattered)))
    assert said.endswith(
        "other runs or actors hold the rest; wait until they end, raise cluster.wait_s=0, or ask for less"
    )


def test_pools_ask_for_their_smallest_number():
    """A joined cluster must have room for the smallest pools; one's own machine is shared out for the largest."""
    spans = {"teacher": {"replicas": {"min": 2, "max": 6}}, "workers": {"max": 3}}
    assert resources.counts(config(**spans)) == {"teacher": 2, "rollout": 1, "learner": 1}
    assert resources.counts(config(**spans, cluster={})) == {"teacher": 6, "rollout": 3, "learner": 1}


def test_several_teachers():
    """Each is a role of its own with resources of its own; one that is served elsewhere asks for nothing."""
    wanted = config(
        teachers={"math": {"path": "m", "replicas": 2}, "chat": {"path": "c"}, "far": {"path": "f", "attach": "big"}},
        resources={"teacher": {"num_cpus": 2}, "teachers": {"math": {"num_gpus": 1, "labels": {"gen": "b"}}}},
    )
    assert resources.counts(wanted) == {"teachers.math": 2, "teachers.chat": 1, "rollout": 1, "learner": 1}
    assert resources.of_role(wanted, "teachers.chat").num_cpus == 2
    assert resources.of_role(wanted, "teachers.math").labels == {"gen": "b"}
    refused(r"needs 2 GPUs \(2 for teachers.math.replicas=2\)", wanted, node(9, 1, gen="b"))
    assert resources.counts(config({"attach": "big"})) == {"rollout": 1, "learner": 1}


def test_labels_need_a_joined_cluster():
    """A private cluster has one node without labels: said at once."""
    with pytest.raises(
        ConfigError, match=r"resources.learner.labels=.*pool.*: .* a private cluster has none; set cluster"
    ):
        _check_private(config(cluster={}, resources={"learner": {"labels": {"pool": "x"}}}))
    with pytest.raises(ConfigError, match=r"teacher.attach=big needs the cluster on which that teacher is served"):
        _check_private(config({"attach": "big"}, cluster={}))
