"""Shares one teacher among runs: a named pool that outlives the command that starts it, and a run's handle of it.

In: a config whose teacher is shared, or a run's config with `teacher.attach`. Out: a pool on the joined cluster, or the
handle of an existing one. Each run has its own number, which separates its sessions from those of other runs.
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
    check_possible,
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
from switchkd.engines.build import make_tokenizer, max_len
from switchkd.engines.models.lm_head import LMHeadState
from switchkd.engines.models.loading import shared_vocab

LEAVE_S = 10.0
"""Time limit for a pool to close the sessions of a run, or to end."""
ANSWER_S = 60.0
"""Time limit for a shared pool to answer a new run: enough for a pool that is restarting."""


class TeacherPoolHandle:
    """A run's handle of a pool: the run's own (namespace 0), or a shared one that outlives the run."""

    def __init__(self, actor: Any, name: str, namespace: int = 0, cursor: EventCursor = NO_EVENTS) -> None:
        self.actor = actor
        self.name = name
        self.namespace = namespace
        self._cursor = cursor
        self._events: Any = None  # the pending call
        self._client = PoolClient(actor, "driver")
        self._view: ReplicaView | None = None

    @property
    def role(self) -> str:
        return f"teacher {self.name}".strip()

    def lm_head_state(self) -> LMHeadState | None:
        """Return the LM head once the pool is ready. Raises RuntimeError where it cannot start."""
        retry_until_alive(self.actor.ready.remote).result()
        return TeacherRouter(self._client).lm_head_state()

    def replicas(self) -> dict[str, Any]:
        """Return the last known handles of the working replicas by name. Never waits."""
        self._view = self._client.poll({}) or self._view
        handles = {**self._view.ready, **self._view.draining} if self._view else {}
        return {f"{self.role} {number}": handle for number, handle in handles.items()}

    def events(self) -> list[str]:
        """Return the pool's events since the last answer. Never waits."""
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
        """End the run's own pool; close the run's sessions in a shared one."""
        leave = self.actor.detach.remote(self.namespace) if self.namespace else self.actor.stop.remote()
        with suppress(RayError):  # it has died
            ray.get(leave, timeout=LEAVE_S)
        if not self.namespace:
            ray.kill(self.actor)
            free_all(replica_name(self.actor._actor_id.hex(), ""))  # of a pool that died


def teacher_identity(config: Config, vocab_size: int) -> dict[str, Any]:
    """Return the settings that a teacher's rows depend on, and `max_len`, for comparison with another config's."""
    teacher = config.teacher
    path = os.path.realpath(os.path.expanduser(teacher.path))
    identity = {
        "path": path if os.path.isdir(path) else teacher.path,
        "revision": teacher.revision,
        "dtype": teacher.dtype,
        "backend": teacher.backend,
        "output": teacher.output,
        "vocabulary": vocab_size,
        "max_len": max_len(config),
        **engine_facts(teacher),
    }
    if teacher.output == "top_logprobs":
        identity["num_top_logprobs"] = teacher.num_top_logprobs
    return identity


def attach(config: Config, key: str) -> TeacherPoolHandle:
    """Attach to the shared teacher that `config.teacher` names. `key`: its section. Raises ConfigError."""
    name = config.teacher.attach
    pool = _require_pool(name, f"{key}.attach={name}", f"; start it with `switchkd serve-teacher CONFIG --name {name}`")
    namespace, identity = _answer(pool.attach.remote(), key, name)
    try:
        _check_identity(config, key, identity)
        cursor, _ = _answer(pool.events.remote(NO_EVENTS), key, name)
    except BaseException:
        pool.detach.remote(namespace)
        raise
    return TeacherPoolHandle(pool, name, namespace, cursor)


def _answer(ref: Any, key: str, name: str) -> Any:
    try:
        return ray.get(ref, timeout=ANSWER_S)
    except RayError as error:
        late = isinstance(error, GetTimeoutError)
        reason = f"nothing in {ANSWER_S:g} s" if late else first_line(cause_of(error))
        raise ConfigError(
            f"{key}.attach={name}: it does not answer ({reason}); end it with `switchkd serve-teacher --stop {name}` "
            "and serve it anew"
        ) from None


def _check_identity(config: Config, key: str, served: dict[str, Any]) -> None:
    teacher = config.teacher
    needed = teacher_identity(config, shared_vocab(make_tokenizer(teacher)))
    for name in {**needed, **served}:
        if name != "max_len" and served.get(name) != needed.get(name):
            raise ConfigError(
                f"{key}.attach={teacher.attach}: its {name} is {served.get(name)!r}, this run's is "
                f"{needed.get(name)!r}; set {key} as the config that it serves has it, or serve another"
            )
    if needed["max_len"] > served["max_len"]:
        raise ConfigError(
            f"{key}.attach={teacher.attach} holds {served['max_len']} tokens a session, this run needs "
            f"{needed['max_len']}; lower data.max_prompt_tokens or max_new_tokens, or serve it with a config that has "
            "them"
        )


def find_pool(name: str) -> Any | None:
    try:
        return ray.get_actor(_pool_name(name), namespace=NAMESPACE)
    except ValueError:
        return None


def _require_pool(name: str, key: str, remedy: str = "") -> Any:
    """Return the pool of this name. Raises ConfigError, which begins with `key`."""
    if (pool := find_pool(name)) is None:
        names = ", ".join(list_shared()) or "none"
        raise ConfigError(f"{key}: no teacher of this name is served on the cluster (there: {names}){remedy}")
    return pool


def list_shared() -> list[str]:
    """Names of the teachers that are served on the cluster."""
    return sorted(actor_suffixes(_pool_name("")))


def _pool_name(name: str) -> str:
    return f"teacher-pool/{name}"


def _start(config: Config, name: str, vocab_size: int, log: Callable[[str], None]) -> int:
    """Start the named pool on the joined cluster. Returns the number of replicas, once ready; raises ConfigError."""
    if find_pool(name) is not None:
        raise ConfigError(
            f"--name {name}: a teacher of this name is served already; attach to it (teacher.attach={name}), take "
            f"another name, or end it with `switchkd serve-teacher --stop {name}`"
        )
    config = resolve_resources(config)
    patience = max(config.run.watchdog_s, START_S)
    each = resources.of_role(config, "teacher")
    span = ReplicaRange.of(config.teacher.replicas)
    check_possible(config, {"teacher": span.min}, log)
    placements = [ProcessPlacement(each, name=replica_name(name, i), detached=True) for i in range(span.min)]
    pool = None
    try:
        wait_for_placements(config, {"teacher": placements}, log)
        identity, pickled = teacher_identity(config, vocab_size), cloudpickle.dumps(placements)
        actor = cast(Any, TeacherPoolActor).options(name=_pool_name(name), namespace=NAMESPACE, lifetime="detached")
        pool = actor.remote(config.model_dump(), pickled, Secrets.of_this_process(), os.getcwd(), name, identity)
        return ray.get(pool.ready.remote(), timeout=patience)
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


def _end(pool: Any, name: str) -> None:
    """End the pool, and its replicas where the pool's own process has died."""
    with suppress(RayError):  # it has died
        ray.get(pool.stop.remote(), timeout=LEAVE_S)
    ray.kill(pool)
    prefix = replica_name(name, "")
    for number in actor_suffixes(prefix):
        with suppress(ValueError):  # it is ending
            ray.kill(ray.get_actor(f"{prefix}{number}", namespace=NAMESPACE))
    free_all(prefix)


def serve_teacher(config: Config, name: str) -> int:
    """Start a named teacher on the cluster of the config. Returns the number of its replicas; raises ConfigError."""
    if "/" in name or not name:  # replicas are found by the name and a slash
        raise ConfigError(f"--name {name!r}: choose a name without a slash")
    config, vocab_size = prepare_teacher(config)
    if resources.is_private(config):
        raise ConfigError(
            "serve-teacher needs a cluster that outlives it: set cluster.address (auto, host:port) or start it as a job"
        )
    log = MetricsLog(config.metrics)
    try:
        connect(config.cluster.address)
        return _start(config, name, vocab_size, log.info)
    finally:
        log.close()


def stop_teacher(name: str, address: str) -> None:
    """End a teacher that `serve_teacher` started on the cluster at this address. Raises ConfigError."""
    connect(address)
    _end(_require_pool(name, f"--stop {name}"), name)
