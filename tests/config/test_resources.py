"""Resources of roles: shares of one machine, sums on a cluster, and threads."""

import os

import pytest

from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.loader import parse
from switchkd.config.resources import check, counts, is_private, of_role, total
from switchkd.config.schema import Config

ROLES = ("teacher", "rollout", "learner")
CLUSTER = {"cluster": {"address": "1.2.3.4:6379"}}
NO_TEACHER = {"train": {"num_steps": 1, "mix": {"dataset": 1}}, "learner": {"loss": {"type": "cross_entropy"}}}


@pytest.fixture(autouse=True)
def outside_of_jobs(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def config(**sections) -> Config:
    return parse({"run": {"dir": "x"}, "train": {"num_steps": 1, "batch_size": 12}, **sections})


def shape(num_workers: int, num_ranks: int, replicas: int = 1, **sections) -> Config:
    return config(
        rollout={"num_workers": num_workers},
        learner={"num_ranks": num_ranks},
        teacher={"replicas": replicas},
        **sections,
    )


def threads(wanted: Config, cores: int | None = None) -> tuple[int | None, ...]:
    return tuple(of_role(wanted, role, cores).threads for role in ROLES)


def refused(message: str, wanted: Config, available: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check(wanted, available)
    assert "\n" not in str(error.value), "one line"


def test_counts_are_the_processes_of_each_role():
    """`counts` gives each role's processes; a run without a teacher has no teacher process."""
    assert counts(shape(3, 2, 2)) == {"teacher": 2, "rollout": 3, "learner": 2}
    assert counts(config(**NO_TEACHER)) == {"rollout": 1, "learner": 1}


def test_a_cluster_is_private_unless_one_is_named(monkeypatch):
    """A cluster is private unless an address or a submitted job names one; `inprocess` always is."""
    here = config(run={"dir": "x", "mode": "inprocess"}, **CLUSTER)
    assert is_private(config()) and not is_private(config(**CLUSTER)) and is_private(here)
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        with monkeypatch.context() as job:
            job.setenv(name, "1")
            assert not is_private(config()) and is_private(here)


class TestOneMachine:
    """On one machine the roles share the cores."""

    def test_two_cores_are_shared(self):
        """On two cores teacher and workers get one thread each and a learner that works alone gets both."""
        assert threads(config()) == (1, 1, 2)
        assert threads(shape(2, 2)) == (1, 1, 1)
        assert threads(config(replay={"max_staleness": 1})) == (1, 1, 1)
        assert threads(config(**NO_TEACHER))[1:] == (2, 2)

    def test_more_cores_are_divided(self):
        """Teacher and workers divide the cores; a learner that runs at the same time takes its part of them."""
        assert threads(config(), 16) == (8, 8, 16)
        assert threads(shape(3, 2), 16) == (4, 4, 8)
        assert threads(shape(3, 2, replay={"max_staleness": 2}), 18) == (4, 4, 3)

    def test_one_process_has_all_cores(self):
        """In one process each role has all cores."""
        assert threads(config(run={"dir": "x", "mode": "inprocess"}, replay={"max_staleness": 1}), 6) == (6, 6, 6)

    @pytest.mark.parametrize("cores", [1, 2, 3, 4, 7, 64])
    @pytest.mark.parametrize(("workers", "ranks", "replicas"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2), (5, 3, 1)])
    def test_shares_never_exceed_the_machine(self, cores, workers, ranks, replicas):
        """The shares of all roles add up to at most the machine's CPUs, with at most one CPU a process."""
        wanted = shape(workers, ranks, replicas)
        shares = [of_role(wanted, role, cores).num_cpus for role in ROLES]
        assert all(share is not None and 0 < share <= 1 for share in shares)
        assert sum(part["CPU"] for part in total(wanted, cores).values()) <= cores + 1e-9
        if max(workers, ranks, replicas) <= cores:
            check(wanted, {"CPU": float(cores)})

    def test_given_resources_come_first(self):
        """A role with given CPUs and threads gets them; the others share the rest."""
        wanted = config(resources={"teacher": {"num_cpus": 1.5, "threads": 7}})
        assert (of_role(wanted, "teacher").num_cpus, of_role(wanted, "teacher").threads) == (1.5, 7)
        assert [of_role(wanted, role).num_cpus for role in ("rollout", "learner")] == [0.25, 0.25]
        check(wanted, {"CPU": 2.0})
        refused(r"needs 3 CPUs \(3 for teacher.replicas=1\) and the machine has 2", config(
            resources={"teacher": {"num_cpus": 3}}), {"CPU": 2.0})  # fmt: skip

    @pytest.mark.parametrize(
        ("sections", "who"),
        [
            ({"num_workers": 3, "num_ranks": 1}, "3 CPUs (3 for rollout.num_workers=3)"),
            ({"num_workers": 1, "num_ranks": 3}, "3 CPUs (3 for learner.num_ranks=3)"),
            ({"num_workers": 1, "num_ranks": 1, "replicas": 9}, "9 CPUs (9 for teacher.replicas=9)"),
        ],
    )
    def test_a_role_larger_than_the_machine_is_refused(self, sections, who):
        """A role with more processes than cores is refused with the numbers that were requested."""
        with pytest.raises(ConfigError) as error:
            check(shape(**sections), {"CPU": 2.0})
        assert f"needs {who} and the machine has 2; lower them, or resources.*.num_cpus" in str(error.value)
        check(shape(2, 2, 2), {"CPU": 2.0})


class TestCluster:
    """On a cluster nothing is shared; placement groups decide whether a run fits (test_placement_group.py)."""

    def test_each_process_gets_one_cpu(self):
        """Each process gets one CPU and one thread."""
        wanted = config(**CLUSTER)
        assert threads(wanted) == (1, 1, 1)
        assert total(wanted) == {role: {"CPU": 1.0, "GPU": 0.0} for role in ROLES}

    def test_threads_follow_cpus(self):
        """A process has as many threads as CPUs, at least one."""
        each = {"teacher": {"num_cpus": 4}, "rollout": {"num_cpus": 0.5}, "learner": {"num_cpus": 4, "threads": 2}}
        assert threads(config(**CLUSTER, resources=each)) == (4, 1, 2)

    def test_gpus_are_fractions_and_must_suffice(self):
        """GPUs count in fractions; a run that needs more than there are is refused, on one machine too."""
        each = {"teacher": {"num_gpus": 0.5}, "rollout": {"num_gpus": 0.5}, "learner": {"num_gpus": 1}}
        assert [share["GPU"] for share in total(config(resources=each, **CLUSTER)).values()] == [0.5, 0.5, 1]
        wanted = config(resources=each)
        check(wanted, {"CPU": 4.0, "GPU": 2.0})
        asked = r"0.5 for teacher.replicas=1, 0.5 for rollout.num_workers=1, 1 for learner.num_ranks=1"
        refused(rf"needs 2 GPUs \({asked}\) .* has 1; .*num_gpus", wanted, {"CPU": 4.0, "GPU": 1.0})
        refused(r"has 0", wanted, {"CPU": 4.0})


def test_total_sums_the_processes_of_a_role():
    """`total` is the request to Ray for all processes of a role."""
    wanted = shape(2, 1, resources={"rollout": {"num_cpus": 0.5, "num_gpus": 0.25}})
    assert resources.total(wanted)["rollout"] == {"CPU": 1.0, "GPU": 0.5}
