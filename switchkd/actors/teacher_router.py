"""Routes a worker's calls to a pool of teachers: each session stays at one replica, and survives its loss.

In: the calls of `engines.base.Teacher`. The router keeps every session's tokens, so that a lost replica (or a lost
session) costs only a re-prefill elsewhere. Each rollout worker has one router per pool, in the worker's process. It
polls the pool for its replicas between calls, and waits for the answer only where no replica can be reached.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, RayActorError

from switchkd.actors.heartbeat import waiting_for
from switchkd.actors.pool_client import PoolClient
from switchkd.actors.replicas import ReplicaView
from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.types import Blocks, Ragged, Sessions, TeacherLost, TeacherOutput, WriteRequest, Written

if TYPE_CHECKING:
    from switchkd.engines.models.lm_head import LMHeadState

Ask = Callable[[Any, list[int]], Any]
"""(replica, indices of blocks) -> a reference to its answer."""

RETRY_FOR_S = 300.0
"""Time limit for finding a living replica while none is starting."""
QUARANTINE_S = 5.0
"""Time for which a replica that failed gets no new session."""
PAUSE_S = 0.2
"""First pause before a retry; each one is twice as long, up to MAX_PAUSE_S."""
MAX_PAUSE_S = 3.0
MAX_DEATHS = 3
"""Rounds of one call with a lost replica after which the call fails."""
SESSION_BITS = 42
"""Lower bits of a session's number; the run's number is above them."""


class TeacherRouter:
    """`namespace`: the run's number in a shared pool. `first`: the replica that this worker prefers at equal load.
    `get`, `now` and `sleep` replace those of Ray and of the wall clock."""

    def __init__(
        self,
        pool: PoolClient,
        *,
        namespace: int = 0,
        first: int = 0,
        get: Callable[[Any], Any] | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._pool = pool
        self._get, self._now, self._sleep = get or ray.get, now, sleep or time.sleep
        self._offset = namespace << SESSION_BITS
        self._first = first
        self._view = ReplicaView(ready={}, draining={}, sessions={})
        self._replica_of: dict[int, int] = {}  # session id -> replica
        self._tokens: dict[int, np.ndarray] = {}  # session id -> its tokens, as last sent
        self._quarantined_until: dict[int, float] = {}
        self._unreachable: set[int] = set()  # replicas that failed, until they answer or restart
        self._num_deaths = 0  # rounds of the current call with a lost replica

    # ── the Teacher protocol ───────────────────────────────────────────────────────────────────────────────────────

    @waiting_for("a teacher")
    def open(self, sessions: Sessions) -> None:
        self._begin_call()
        ids = (sessions.session_ids + self._offset).tolist()
        tokens = dict(zip(ids, sessions.tokens.split(), strict=True))
        self._open_somewhere(tokens)
        self._tokens.update(tokens)

    @waiting_for("a teacher")
    def score(self, blocks: Blocks) -> TeacherOutput:
        """Split the blocks by replica, call all replicas at once, and join the answers. Lost sessions are reopened."""
        blocks = self._in_namespace(blocks)
        answers = self._until_answered(blocks, lambda replica, some: replica.score.remote(_select(blocks, some)))
        self._remember(blocks, blocks.tokens.split())
        return _joined_output(answers)

    @waiting_for("a teacher")
    def write(self, request: WriteRequest) -> Written:
        """Split like `score`. A repeated request gives the same tokens, so a lost replica costs time only."""
        blocks = self._in_namespace(request.blocks)

        def ask(replica: Any, some: list[int]) -> Any:
            return replica.write.remote(
                replace(
                    request,
                    blocks=_select(blocks, some),
                    counts=request.counts[some],
                    rollout_ids=request.rollout_ids[some],
                    positions=request.positions[some],
                )
            )

        answers = self._until_answered(blocks, ask)
        tokens = _joined([(written.tokens, i) for written, i in answers])
        pairs = zip(blocks.tokens.split(), tokens.split(), strict=True)
        self._remember(blocks, [np.concatenate(pair) for pair in pairs])
        return Written(
            tokens=tokens,
            margins=_joined([(written.margins, i) for written, i in answers]),
            teacher_output=_joined_output([(written.teacher_output, i) for written, i in answers]),
        )

    def close(self, session_ids: np.ndarray) -> None:
        """Close sessions, without waiting for the replicas."""
        self._update(self._pool.poll(self._load()))
        by_replica: dict[int, list[int]] = {}
        for session in (session_ids + self._offset).tolist():
            self._tokens.pop(session, None)
            if (number := self._replica_of.pop(session, None)) is not None:
                by_replica.setdefault(number, []).append(session)
        for number, ids in by_replica.items():
            if (handle := self._handle(number)) is not None:
                handle.close.remote(np.array(ids, np.int64))

    @waiting_for("a teacher")
    def lm_head_state(self) -> LMHeadState | None:
        """The teacher's LM head, from any replica; None when it sends logits. Waits for the pool to start."""
        retries = self._retries()
        while True:
            number = self._least_loaded(set())
            if number is not None:
                try:
                    return self._get(self._view.ready[number].lm_head_state.remote())
                except RayActorError as error:
                    self._lose(number, error)
            next(retries)

    # ── replicas ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _in_namespace(self, blocks: Blocks) -> Blocks:
        """Return the blocks with session numbers that no other run uses."""
        return replace(blocks, session_ids=blocks.session_ids + self._offset)

    def _load(self) -> Counter[int]:
        """Sessions of this router at each replica."""
        return Counter(self._replica_of.values())

    def _begin_call(self) -> None:
        self._num_deaths = 0
        self._update(self._pool.poll(self._load()))

    def _update(self, view: ReplicaView | None) -> None:
        if view is None:
            return
        if view.broken and not view.ready:
            raise RuntimeError(f"there is no teacher any more: {view.broken}")
        self._view = view
        self._unreachable.intersection_update(view.ready)  # a replica that left and came back is another process

    def _retries(self, most_s: float = MAX_PAUSE_S) -> Iterator[None]:
        """Pause and update the view at each turn; the pause doubles up to `most_s`. Raises RuntimeError after
        RETRY_FOR_S in which no replica was starting."""
        deadline, pause, hopeful = self._now() + RETRY_FOR_S, PAUSE_S, False
        while True:
            self._sleep(pause)
            pause = min(2 * pause, most_s)
            self._update(self._pool.ask(self._load()))
            was_hopeful, hopeful = hopeful, bool(self._view.num_starting) and not self._view.ready
            if hopeful or was_hopeful:
                deadline = self._now() + RETRY_FOR_S
            if self._now() > deadline:
                raise RuntimeError(f"no teacher replica answered for {RETRY_FOR_S:g} s; see the teachers' logs")
            yield

    def _handle(self, number: int) -> Any | None:
        return self._view.ready.get(number) or self._view.draining.get(number)

    def _lose(self, number: int, error: RayActorError) -> bool:
        """Quarantine a replica that died or cannot be reached. Returns whether it could be reached before."""
        self._quarantined_until[number] = self._now() + QUARANTINE_S
        if isinstance(error, ActorDiedError):
            self._pool.lost()
        was_reachable = number not in self._unreachable
        self._unreachable.add(number)
        return was_reachable

    def _count_death(self) -> None:
        self._num_deaths += 1
        if self._num_deaths >= MAX_DEATHS:
            raise TeacherLost(f"{MAX_DEATHS} times in a row its teacher died over the same call")

    def _until_answered(self, blocks: Blocks, ask: Ask) -> list[tuple[Any, int]]:
        """Return for every block, in order, the answer that contains it, and its index there."""
        self._begin_call()
        answers: dict[int, tuple[Any, int]] = {}
        missing = list(range(len(blocks.session_ids)))
        retries = self._retries()
        at_once = True  # the first retry has no pause: a forgotten session has been reopened
        while missing:
            answers.update(self._ask_once(blocks, ask, missing))
            missing = [i for i in missing if i not in answers]
            if missing and not at_once:
                next(retries)
            at_once = False
        return [answers[i] for i in range(len(blocks.session_ids))]

    def _ask_once(self, blocks: Blocks, ask: Ask, which: list[int]) -> dict[int, tuple[Any, int]]:
        """Make one call per replica for the blocks `which`. Failed blocks are missing from the answers; their sessions
        are opened elsewhere. Raises TeacherLost after MAX_DEATHS rounds of one call with lost replicas."""
        ids = blocks.session_ids.tolist()
        self._reopen([ids[i] for i in which if self._handle(self._replica_of[ids[i]]) is None], blocks)
        by_replica: dict[int, list[int]] = {}
        for i in which:
            by_replica.setdefault(self._replica_of[ids[i]], []).append(i)
        calls = {number: ask(self._handle(number), indices) for number, indices in by_replica.items()}
        answers: dict[int, tuple[Any, int]] = {}
        lost: list[int] = []  # sessions
        died = False
        for number, call in calls.items():
            indices = by_replica[number]
            try:
                answer = self._get(call)
            except UnknownSession as error:
                lost += error.session_ids
            except RayActorError as error:
                died |= self._lose(number, error)
                lost += [ids[i] for i in indices]
            else:
                self._unreachable.discard(number)
                answers.update({i: (answer, index) for index, i in enumerate(indices)})
        if died:
            self._count_death()
        self._reopen(lost, blocks)
        return answers

    def _remember(self, blocks: Blocks, parts: Sequence[np.ndarray]) -> None:
        """Keep the tokens of each session, so that it can be opened elsewhere."""
        for session, base, part in zip(blocks.session_ids.tolist(), blocks.base_lens, parts, strict=True):
            self._tokens[session] = np.concatenate([self._tokens[session][:base], part])

    def _reopen(self, session_ids: Sequence[int], blocks: Blocks) -> None:
        """Open lost sessions with the tokens that the next block keeps of them."""
        if not session_ids:
            return
        base = dict(zip(blocks.session_ids.tolist(), blocks.base_lens.tolist(), strict=True))
        tokens = {session: self._tokens[session][: base[session]] for session in session_ids}
        retries = self._retries(PAUSE_S)  # a slot is free as soon as another rollout ends
        while True:
            try:
                return self._open_somewhere(tokens)
            except TeacherBusy:
                next(retries)

    def _open_somewhere(self, tokens: dict[int, np.ndarray]) -> None:
        """Open sessions at the replica that holds the fewest of all. Raises TeacherBusy when none has slots left."""
        sessions = Sessions(
            session_ids=np.array(list(tokens), np.int64), tokens=Ragged.concat(list(tokens.values()), np.int32)
        )
        retries = self._retries()
        busy: set[int] = set()
        while True:
            number = self._least_loaded(busy)
            if number is None:
                if busy:
                    raise TeacherBusy(f"no teacher replica has slots for {len(tokens)} sessions")
                next(retries)
                continue
            try:
                self._get(self._view.ready[number].open.remote(sessions))
                self._replica_of.update(dict.fromkeys(tokens, number))
                self._unreachable.discard(number)
                return
            except TeacherBusy:
                busy.add(number)
            except RayActorError as error:
                if self._lose(number, error):
                    self._count_death()
                next(retries)

    def _least_loaded(self, without: set[int]) -> int | None:
        """The first replica by health, load (of all workers), and distance from this worker's first replica."""
        now, load, ready = self._now(), self._load(), self._view.ready

        def order(number: int) -> tuple[bool, int, int]:
            sessions = load[number] + self._view.sessions.get(number, 0)
            return self._quarantined_until.get(number, 0.0) > now, sessions, (number - self._first) % len(ready)

        return min((number for number in ready if number not in without), key=order, default=None)


def _select(blocks: Blocks, members: list[int]) -> Blocks:
    return Blocks(
        session_ids=blocks.session_ids[members],
        base_lens=blocks.base_lens[members],
        first_rows=blocks.first_rows[members],
        tokens=blocks.tokens.select(members),
    )


def _joined_output(places: Sequence[tuple[TeacherOutput, int]]) -> TeacherOutput:
    first, _ = places[0]
    return replace(first, rows=_joined([(teacher_output.rows, i) for teacher_output, i in places]))


def _joined(places: Sequence[tuple[Ragged, int]]) -> Ragged:
    """Join part i of each pair, in order."""
    return Ragged.concat([ragged.split()[i] for ragged, i in places])
