"""Errors of runs that do not fit a cluster: which role lacks what, and what is free. (Placements are doubles.)"""

from __future__ import annotations

import math

import pytest

from switchkd.actors import placement_group
from switchkd.actors.placement_group import Node, check_possible, wait_for_placements
from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.loader import parse
from switchkd.config.schema import Config

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
    return Node(name="n", labels=labels, total={"CPU": cpu, "GPU": gpu}, free={"CPU": left[0], "GPU": left[1]})


class Placement:
    """Reserved from the start, never, or after so many calls of `wait`."""

    def __init__(self, after: float = 0) -> None:
        self.left = after

    def wait(self, timeout_s: float) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def there(monkeypatch) -> list[Node]:
    """The nodes of the cluster, which tests add. The time limits are 0."""
    found: list[Node] = []
    monkeypatch.setattr(placement_group, "nodes", lambda: found)
    monkeypatch.setattr(placement_group, "RELEASE_S", 0.0)
    return found


def refused(wanted: Config, placements: dict[str, list[Placement]]) -> tuple[str, list[str]]:
    """The error, which has one line, and the lines logged before."""
    notes: list[str] = []
    with pytest.raises(ConfigError) as error:
        check_possible(wanted, {role: len(each) for role, each in placements.items()}, notes.append)
        wait_for_placements(wanted, placements, notes.append)
    assert "\n" not in str(error.value)
    return str(error.value), notes


def placements(**never: int) -> dict[str, list[Placement]]:
    """One for the teacher, two for workers and one for the learner; `never`: how many are never reserved."""
    num = {"teacher": 1, "rollout": 2, "learner": 1}
    return {role: [Placement(math.inf if i < never.get(role, 0) else 0) for i in range(num[role])] for role in num}


def test_a_run_that_fits_logs_nothing(there):
    """Processes that get their placements raise and log nothing."""
    there.append(node(4))
    notes: list[str] = []
    wait_for_placements(config(workers=2), placements(), notes.append)
    wait_for_placements(config(workers=2), {"teacher": [Placement(0)], "learner": [Placement(0)]}, notes.append)
    assert notes == []


def test_the_error_names_a_role_and_the_table_all_requests(there):
    """The error names a role, its needs, what is free and the remedies; the table lists the requests of all roles and
    what each node has free."""
    there += [node(8, free=(0, 0)), node(8, 1, free=(0.5, 1), pool="write")]
    line, (shown,) = refused(config(workers=2), placements(rollout=1, learner=1))
    assert line == (
        "rollout.num_workers=2: 1 cannot be placed, each needs 1 CPUs on one node, and beside the rest of the run at "
        "most 0.5 CPUs are free on one; wait until other runs end, ask for less (resources.rollout), add nodes, or "
        "raise cluster.wait_s=0"
    )
    assert [row.split() for row in shown.splitlines()] == [
        ["role", "number", "CPUs", "each", "GPUs", "each", "labels", "not", "placed"],
        ["teacher.replicas", "1", "1", "0", "0"],
        ["rollout.num_workers", "2", "1", "0", "1"],
        ["learner.num_ranks", "1", "1", "0", "1"],
        ["node", "CPUs", "free", "GPUs", "free", "labels"],
        ["n", "0", "of", "8", "0", "of", "0"],
        ["n", "0.5", "of", "8", "1", "of", "1", "pool=write"],
    ]


def test_gpus_of_one_process_are_on_one_node(there):
    """Two nodes of four GPUs do not fit a process of eight; the error counts the free GPUs of one node."""
    there += [node(8, 4), node(8, 4)]
    line, _ = refused(config(resources={"teacher": {"num_gpus": 8}}), placements(teacher=1))
    assert "teacher.replicas=1: 1 cannot be placed, each needs 1 CPUs and 8 GPUs on one node, and beside" in line
    assert "at most 8 CPUs and 4 GPUs are free on one" in line


def test_a_process_larger_than_every_node_is_refused_at_once(there):
    """A process that fits no empty node is refused without waiting for the end of other runs."""
    there += [node(8, 4), node(2, 8)]
    asked = placements()
    line, (shown,) = refused(config(resources={"learner": {"num_gpus": 8, "num_cpus": 4}}), asked)
    assert line.startswith("learner.num_ranks=1: 1 cannot be placed, each needs 4 CPUs and 8 GPUs on one node")
    assert "learner.num_ranks" in shown and asked["teacher"][0].left == 0, "it waited for a placement"


def test_fractions_are_of_one_gpu(there):
    """A share of a GPU is one of a single GPU, and a number above 1 is whole."""
    there.append(node(8, 2, free=(5, 0.8)))
    line, _ = refused(config(resources={"teacher": {"num_gpus": 0.6}}), placements(teacher=1))
    assert "each needs 1 CPUs and 0.6 of one GPU on one node" in line and "5 CPUs and 0.8 GPUs are free on one" in line
    with pytest.raises(ConfigError, match=r"resources.teacher.num_gpus=1.5: above 1 it must be a whole number"):
        config(resources={"teacher": {"num_gpus": 1.5}})


def test_labels_that_no_node_has_are_an_error(there):
    """Labels that no node has are an error, also after `cluster.wait_s`; only nodes with the labels count as free."""
    wanted = {"resources": {"rollout": {"labels": {"pool": "write"}}}}
    there += [node(4), node(4, pool="train")]
    line, notes = refused(config(**wanted), placements())
    assert line.startswith(
        "resources.rollout.labels=pool=write: no node of the cluster has these (labels there: none; pool=train); start "
        "one with `ray start --labels=...`, or raise cluster.wait_s=0"
    )
    assert notes == []
    late = config(**wanted, cluster={"address": "1.2.3.4:6379", "wait_s": 0.01})
    line, notes = refused(late, placements(rollout=1))
    assert "no node of the cluster has these" in line
    assert notes[0].startswith("waiting up to 0.01 s: rollout.num_workers=2: 1 cannot be placed")
    there.append(node(2, pool="write"))
    line, _ = refused(config(workers=2, **wanted), placements(rollout=1))
    assert "each needs 1 CPUs on one node with labels pool=write, and beside the rest of the run at most 2 CPUs" in line


def test_a_joined_cluster_must_fit_the_smallest_pools():
    """On a joined cluster a run requests the smallest size of each pool, on a private one the largest."""
    spans = {"teacher": {"replicas": {"min": 2, "max": 6}}, "workers": {"max": 3}}
    assert resources.counts(config(**spans)) == {"teacher": 2, "rollout": 1, "learner": 1}
    assert resources.counts(config(**spans, cluster={})) == {"teacher": 6, "rollout": 3, "learner": 1}


def test_each_teacher_is_a_role_with_its_own_resources(there):
    """Each of several teachers is a role with its own resources; an attached teacher requests none."""
    wanted = config(
        teachers={"math": {"path": "m", "replicas": 2}, "chat": {"path": "c"}, "far": {"path": "f", "attach": "big"}},
        resources={"teacher": {"num_cpus": 2}, "teachers": {"math": {"num_gpus": 1, "labels": {"gen": "b"}}}},
    )
    assert resources.counts(wanted) == {"teachers.math": 2, "teachers.chat": 1, "rollout": 1, "learner": 1}
    assert resources.of_role(wanted, "teachers.chat").num_cpus == 2
    assert resources.of_role(wanted, "teachers.math").labels == {"gen": "b"}
    there.append(node(9, 1, gen="b"))
    line, _ = refused(wanted, {"teachers.math": [Placement(), Placement(math.inf)]})
    assert "teachers.math.replicas=2: 1 cannot be placed, each needs 1 CPUs and 1 GPUs on one node with labels" in line
    assert resources.counts(config({"attach": "big"})) == {"rollout": 1, "learner": 1}


def test_labels_and_attach_need_a_joined_cluster():
    """On a private cluster labels and `teacher.attach` are errors."""
    with pytest.raises(
        ConfigError, match=r"resources.learner.labels=.*pool.*: .* a private cluster has none; set cluster"
    ):
        resources.check_private(config(cluster={}, resources={"learner": {"labels": {"pool": "x"}}}))
    with pytest.raises(ConfigError, match=r"teacher.attach=big needs the cluster on which that teacher is served"):
        resources.check_private(config({"attach": "big"}, cluster={}))
