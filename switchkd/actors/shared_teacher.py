"""One teacher for many runs: a named pool that outlives whoever started it, and the way of a run to it.

In: a config whose teacher is served, or a run's config with `teacher.attach`. Out: a pool on the joined cluster, or the
handle of one that is there. Sessions of different runs never meet: each run has a number of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError

from switchkd.actors.cluster import connect
from switchkd.actors.placement_group import (
    ProcessPlacement,
    free_all,
    resolve_resources,
    wait_for_placements,
)
from switchkd.actors.pool_client import PoolClient
from switchkd.actors.process_setup import Secrets
from switchkd.actors.ray_futures import cause_of, retry_until_alive
from switchkd.actors.replicas import ReplicaView
from switchkd.actors.teacher_pool import (
    NAMESPACE,
    NO_EVENTS,
    EventCursor,
    TeacherPoolActor,
    actor_suffixes,
    replica_name,
)
from switchkd.actors.teacher_router import TeacherRouter
from switchkd.config import resources
from switchkd.config.errors import ConfigError, first_line
from switchkd.config.schema import Config, ReplicaRange
from switchkd.config.teacher_backend import engine_facts
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.preflight import prepare_teacher
from switchkd.controller.watchdog import START_S
from switchkd.engines.build import max_len
from switchkd.engines.models.lm_head import LMHeadState

LEAVE_S = 10.0
"""How long a pool may take to let a run go."""
ANSWER_S = 60.0
"""How long a served pool may take to answer a run that comes: enough for one that is just started again."""


class PoolHandle:
    """A run's hold on a pool: its own (namespace 0), or a served one that it leaves as it found it."""

    def __init__(self, actor: Any, name: str, namespace: int = 0, cursor: EventCursor = NO_EVENTS) -> None:
        self.actor = actor
        self.name = name
        self.namespace = namespace
        self._cursor = cursor
        self._events: Any = None  # the question that is out
        self._client = PoolClient(actor, "driver")
        self._members: ReplicaView | None = None

    @property
    def role(self) -> str:
        return f"teacher {self.name}".strip()

    def head(self) -> LMHeadState | None:
        """The output head, once the pool works. Raises RuntimeError where it cannot start."""
        retry_until_alive(self.actor.ready.remote).result()
        return TeacherRouter(self._client).head()

    def replicas(self) -> dict[str, Any]:
        """Handles of those that work, by name, as last heard. Never waits."""
        self._members = self._client.poll({}) or self._members
        there = {**self._members.ready, **self._members.draining} if self._members else {}
        return {f"{self.role} {number}": handle for number, handle in there.items()}

    def events(self) -> list[str]:
        """What happened there since the last time, as far as it has been heard of. Never waits."""
        if self._events is None:
            self._events = self.actor.events.remote(self._cursor)
        if not ray.wait([self._events], timeout=0)[0]:
            return []
        answer, self._events = self._events, None
        try:
            self._cursor, lines = ray.get(answer)
        except RayError:
            return []
        return [f"{self.name}: {line}" if self.name else line for line in lines]

    def close(self) -> None:
        """End the run's own pool; take the run's sessions out of a served one."""
        leave = self.actor.detach.remote(self.namespace) if self.namespace else self.actor.stop.remote()
        with suppress(RayError):  # it has died: there is nothing left to end
            ray.get(leave, timeout=LEAVE_S)
        if not self.namespace:
            ray.kill(self.actor)
            free_all(replica_name(self.actor._actor_id.hex(), ""))  # where it could not do so itself


def facts(config: Config, vocab_size: int) -> dict[str, Any]:
    """What a run must know of a served teacher: where these are equal (and the length is enough), so are the rows."""
    teacher = config.teacher
    path = os.path.realpath(os.path.expanduser(teacher.path))
    found = {
        "path": path if os.path.isdir(path) else teacher.path,
        "revision": teacher.revision,
        "dtype": teacher.dtype,
        "backend": teacher.backend,
        "output": teacher.output,
        "vocabulary": vocab_size,
        **engine_facts(teacher),
    }
    return {**found, "num_top_logprobs": teacher.num_top_logprobs} if teacher.output == "top_logprobs" else found


def attach(config: Config, key: str) -> PoolHandle:
    """The served teacher that `config.teacher` names. `key`: its section. Raises ConfigError."""
    name = config.teacher.attach
    pool = find(name)
    if pool is None:
        there = ", ".join(served()) or "none"
        raise ConfigError(
            f"{key}.attach={name}: no teacher of this name is served on the cluster (there: {there}); start it with "
            f"`switchkd serve-teacher CONFIG --name {name}`"
        )
    namespace, there = _answer(pool.attach.remote(), key, name)
    try:
        _check_same(config, key, there)
        cursor, _ = _answer(pool.events.remote(NO_EVENTS), key, name)
    except BaseException:
        pool.detach.remote(namespace)
        raise
    return PoolHandle(pool, name, namespace, cursor)


def _answer(asked: Any, key: str, name: str) -> Any:
    try:
        return ray.get(asked, timeout=ANSWER_S)
    except RayError as error:
        late = isinstance(error, GetTimeoutError)
        why = f"no word from it in {ANSWER_S:g} s" if late else first_line(cause_of(error))
        raise ConfigError(
            f"{key}.attach={name}: it does not answer ({why}); end it with `switchkd serve-teacher --stop {name}` and "
            "serve it anew"
        ) from None


def _check_same(config: Config, key: str, there: dict[str, Any]) -> None:
    from switchkd.engines.models.loading import load_tokenizer, shared_vocab

    teacher = config.teacher
    vocab = shared_vocab(load_tokenizer(teacher.path, trust_remote_code=teacher.trust_remote_code))
    wanted = facts(config, vocab)
    for fact in {**wanted, **there}:
        if fact != "max_len" and there.get(fact) != wanted.get(fact):
            raise ConfigError(
                f"{key}.attach={teacher.attach}: its {fact} is {there.get(fact)!r}, this run's is "
                f"{wanted.get(fact)!r}; set {key} as the config that it serves has it, or serve another"
            )
    if max_len(config) > there["max_len"]:
        raise ConfigError(
            f"{key}.attach={teacher.attach} holds {there['max_len']} tokens a session, this run needs "
            f"{max_len(config)}; lower data.max_prompt_tokens or max_new_tokens, or serve it with a config that has "
            "them"
        )


def find(name: str) -> Any | None:
    try:
        return ray.get_actor(_pool_name(name), namespace=NAMESPACE)
    except ValueError:
        return None


def served() -> list[str]:
    """Names of the teachers that are served on the cluster."""
    return sorted(actor_suffixes(_pool_name("")))


def _pool_name(name: str) -> str:
    return f"teacher-pool/{name}"


def serve(config: Config, name: str, vocab_size: int, log: Callable[[str], None]) -> int:
    """Start the named pool on the joined cluster and wait until it works: its replicas. Raises ConfigError."""
    if find(name) is not None:
        raise ConfigError(
            f"--name {name}: a teacher of this name is served already; attach to it (teacher.attach={name}), take "
            f"another name, or end it with `switchkd serve-teacher --stop {name}`"
        )
    config = resolve_resources(config)
    patience = max(config.run.watchdog_s, START_S)
    each = resources.of_role(config, "teacher")
    span = ReplicaRange.of(config.teacher.replicas)
    placements = [ProcessPlacement(each, name=replica_name(name, i), detached=True) for i in range(span.min)]
    pool = None
    try:
        wait_for_placements(config, {"teacher": placements}, log)
        known = {**facts(config, vocab_size), "max_len": max_len(config)}
        options = {"name": _pool_name(name), "namespace": NAMESPACE, "lifetime": "detached"}
        pool = cast(Any, TeacherPoolActor).options(**options).remote(
            config.model_dump(), cloudpickle.dumps(placements), Secrets.of_this_process(), os.getcwd(), name, known
        )  # fmt: skip
        num: int = ray.get(pool.ready.remote(), timeout=patience)
        return num
    except BaseException as error:
        if pool is not None:
            _end(pool, name)
        for placement in placements:
            placement.free()
        if isinstance(error, GetTimeoutError):
            raise ConfigError(
                f"--name {name}: its replicas have not started within {patience:g} s; look at what `ray logs` says of "
                "them, or raise run.watchdog_s"
            ) from None
        raise cause_of(error) from None


def stop(name: str) -> None:
    """End a served teacher. Raises ConfigError where there is none of this name."""
    pool = find(name)
    if pool is None:
        there = ", ".join(served()) or "none"
        raise ConfigError(f"--stop {name}: no teacher of this name is served on the cluster (there: {there})")
    _end(pool, name)


def _end(pool: Any, name: str) -> None:
    """The pool, and its replicas where it cannot end them itself any more."""
    with suppress(RayError):  # it has died: it is only to be removed
        ray.get(pool.stop.remote(), timeout=LEAVE_S)
    ray.kill(pool)
    prefix = replica_name(name, "")
    for number in actor_suffixes(prefix):
        with suppress(ValueError):  # it is just ending
            ray.kill(ray.get_actor(f"{prefix}{number}", namespace=NAMESPACE))
    free_all(prefix)


def serve_teacher(config: Config, name: str) -> int:
    """Start a named teacher on the cluster that the config joins; the number of its replicas. Raises ConfigError."""
    if "/" in name or not name:  # what belongs to it is found by its name and a slash
        raise ConfigError(f"--name {name!r}: choose a name without a slash")
    wanted, vocab_size = prepare_teacher(config)
    if resources.is_private(wanted):
        raise ConfigError(
            "serve-teacher needs a cluster that outlives it: set cluster.address (auto, host:port) or start it as a job"
        )
    log = MetricsLog(wanted.metrics)
    try:
        connect(wanted.cluster.address)
        return serve(wanted, name, vocab_size, log.info)
    finally:
        log.close()


def stop_teacher(name: str, address: str) -> None:
    """End a teacher that `serve_teacher` started on the cluster at this address. Raises ConfigError."""
    connect(address)
    stop(name)
