"""A worker's way to a pool of teachers: each session sticks to one replica, and outlives it.

In: the calls of `engines.base.Teacher`. The router keeps every session's tokens, so that a lost replica (or a lost
session) costs one re-prefill elsewhere and nothing else. One router per rollout worker and pool, in the worker's
process. It looks up the pool's members between calls, now and then, without waiting for the answer; only where nobody
can be reached does it wait.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import ray
from ray.exceptions import ActorDiedError, RayActorError

from switchkd.actors.heartbeat import waiting_for
from switchkd.actors.replicas import ReplicaView
from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.types import (
    MAX_DEATHS,
    Blocks,
    Sessions,
    TeacherLost,
    TeacherOutput,
    WriteRequest,
    Written,
    ragged,
)

if TYPE_CHECKING:
    from switchkd.engines.models.lm_head import LMHeadState

Ask = Callable[[Any, list[int]], Any]
"""(replica, which blocks) -> a reference to its answer."""

RETRY_FOR_S = 300.0
"""How long a router looks for a living replica, while none is being started, before it gives up."""
QUARANTINE_S = 5.0
"""How long a replica that failed gets no new session."""
PAUSE_S, MAX_PAUSE_S = 0.2, 3.0
"""How long a router waits before it asks again; each time twice as long, up to the second."""
SESSION_BITS = 42
"""Of a session's number; the run's own number stands above them."""


class Directory(Protocol):
    """Where a router finds the members of its pool. `sessions`: how many of its own it has at each."""

    def ask(self, sessions: Mapping[int, int]) -> ReplicaView | None:
        """Waits for the answer; None where the pool itself cannot be reached just now."""

    def poll(self, sessions: Mapping[int, int]) -> ReplicaView | None:
        """What has come in since the last time, if anything; asks again where it is time. Never waits."""

    def lost(self) -> None:
        """A replica is dead for good, as far as can be seen from here."""


class TeacherRouter:
    """`namespace`: of the run, where several share the pool."""

    def __init__(self, directory: Directory, *, namespace: int = 0, first: int = 0) -> None:
        self._directory = directory
        self._offset = namespace << SESSION_BITS
        self._members = ReplicaView(ready={}, draining={}, sessions={})
        self._home: dict[int, int] = {}  # session id -> replica
        self._tokens: dict[int, np.ndarray] = {}  # session id -> its tokens, as last sent
        self._quarantined_until: dict[int, float] = {}
        self._unreachable: set[int] = set()  # replicas that failed and were not seen at work, or starting, since
        self._crashes: Counter[int] = Counter()  # session id -> replicas lost over its calls since the last answer
        self._first = first  # workers start at different replicas

    # ── the Teacher protocol ───────────────────────────────────────────────────────────────────────────────────────

    @waiting_for("a teacher")
    def open(self, sessions: Sessions) -> None:
        self._refresh()
        tokens = ragged(sessions.token_ids, sessions.lengths)
        ids = (sessions.session_ids + self._offset).tolist()
        wanted = dict(zip(ids, tokens, strict=True))
        self._answered(ids)
        self._place(wanted)
        self._tokens.update(wanted)

    @waiting_for("a teacher")
    def score(self, blocks: Blocks) -> TeacherOutput:
        """Split by replica, ask all at once, put together in the order asked. Lost sessions are opened again."""
        blocks = self._own(blocks)
        parts = ragged(blocks.token_ids, blocks.lengths)
        answers = self._until_answered(blocks, lambda replica, some: replica.score.remote(_select(blocks, parts, some)))
        self._remember(blocks, parts)
        return _joined(answers)

    @waiting_for("a teacher")
    def write(self, request: WriteRequest) -> Written:
        """As `score`. A repeated request gives the same tokens, so a lost replica costs time only."""
        blocks = self._own(request.blocks)
        parts = ragged(blocks.token_ids, blocks.lengths)

        def ask(replica: Any, some: list[int]) -> Any:
            return replica.write.remote(
                replace(
                    request,
                    blocks=_select(blocks, parts, some),
                    counts=request.counts[some],
                    rollout_ids=request.rollout_ids[some],
                    positions=request.positions[some],
                )
            )

        answers = self._until_answered(blocks, ask)
        tokens = [_piece(written.token_ids, written.lengths, i) for written, i in answers]
        self._remember(blocks, [np.concatenate(pair) for pair in zip(parts, tokens, strict=True)])
        return Written(
            token_ids=np.concatenate(tokens),
            lengths=np.array([len(part) for part in tokens], np.int32),
            margins=np.concatenate([_piece(written.margins, written.lengths, i) for written, i in answers]),
            teacher_output=_joined([(written.teacher_output, i) for written, i in answers]),
        )

    def close(self, session_ids: np.ndarray) -> None:
        self._refresh()
        by_replica: dict[int, list[int]] = {}
        for session in (session_ids + self._offset).tolist():
            self._tokens.pop(session, None)
            self._crashes.pop(session, None)
            replica_of = self._home.pop(session, None)
            if replica_of is not None:
                by_replica.setdefault(replica_of, []).append(session)
        for replica_of, ids in by_replica.items():
            if (handle := self._handle(replica_of)) is not None:
                handle.close.remote(np.array(ids, np.int64))  # nobody waits for it

    @waiting_for("a teacher")
    def head(self) -> LMHeadState | None:
        """The teacher's output head, from whichever replica answers; None when it sends whole rows. Waits for the pool
        to start."""
        patience = self._patience()
        while True:
            replica_of = self._least_loaded(set())
            if replica_of is not None:
                try:
                    found: LMHeadState | None = ray.get(self._members.ready[replica_of].head.remote())
                    return found
                except RayActorError as error:
                    self._failed(replica_of, error)
            next(patience)

    # ── replicas ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _own(self, blocks: Blocks) -> Blocks:
        """With session numbers that no other run uses."""
        return replace(blocks, session_ids=blocks.session_ids + self._offset)

    def _refresh(self) -> None:
        self._take(self._directory.poll(Counter(self._home.values())))

    def _take(self, members: ReplicaView | None) -> None:
        if members is None:
            return
        if members.broken and not members.ready:
            raise RuntimeError(f"there is no teacher any more: {members.broken}")
        self._members = members
        self._unreachable.intersection_update(members.ready)  # who was seen to leave and is back is another process

    def _patience(self, most_s: float = MAX_PAUSE_S) -> Iterator[None]:
        """Each turn waits, ever longer up to `most_s`, and looks the members up. Raises RuntimeError after RETRY_FOR_S
        without anybody to wait for."""
        deadline, pause, hopeful = time.monotonic() + RETRY_FOR_S, PAUSE_S, False
        while True:
            time.sleep(pause)
            pause = min(2 * pause, most_s)
            self._take(self._directory.ask(Counter(self._home.values())))
            was_hopeful, hopeful = hopeful, bool(self._members.num_starting) and not self._members.ready
            if hopeful or was_hopeful:
                deadline = time.monotonic() + RETRY_FOR_S
            if time.monotonic() > deadline:
                raise RuntimeError(f"no teacher replica answered for {RETRY_FOR_S:g} s; see the teachers' logs")
            yield

    def _handle(self, replica_of: int) -> Any | None:
        return self._members.ready.get(replica_of) or self._members.draining.get(replica_of)

    def _failed(self, replica_of: int, error: RayActorError, sessions: Collection[int] = ()) -> None:
        """A call for these sessions got no answer. Raises TeacherLost where one of them met that MAX_DEATHS times in a
        row, each time with a replica that had been there."""
        self._quarantined_until[replica_of] = time.monotonic() + QUARANTINE_S
        if isinstance(error, ActorDiedError):
            self._directory.lost()
        if replica_of not in self._unreachable:
            self._unreachable.add(replica_of)
            self._crashes.update(list(sessions))
        if (num := max((self._crashes[session] for session in sessions), default=0)) >= MAX_DEATHS:
            self._answered(sessions)
            raise TeacherLost(f"{num} times in a row its teacher died over the same call")

    def _answered(self, sessions: Iterable[int]) -> None:
        for session in sessions:
            self._crashes.pop(session, None)

    def _until_answered(self, blocks: Blocks, ask: Ask) -> list[tuple[Any, int]]:
        """For every block, in order: the answer that it came in, and its place there."""
        self._refresh()
        answers: dict[int, tuple[Any, int]] = {}
        missing = list(range(len(blocks.session_ids)))
        patience = self._patience()
        at_once = True  # a session that was forgotten has been opened again by then
        while missing:
            answers.update(self._ask_once(blocks, ask, missing))
            missing = [i for i in missing if i not in answers]
            if missing and not at_once:
                next(patience)
            at_once = False
        return [answers[i] for i in range(len(blocks.session_ids))]

    def _ask_once(self, blocks: Blocks, ask: Ask, which: list[int]) -> dict[int, tuple[Any, int]]:
        """One call per replica for the blocks `which`; what failed is missing from the answer and lives elsewhere."""
        ids = blocks.session_ids.tolist()
        self._reopen([ids[i] for i in which if self._handle(self._home[ids[i]]) is None], blocks)
        by_replica: dict[int, list[int]] = {}
        for i in which:
            by_replica.setdefault(self._home[ids[i]], []).append(i)
        calls = {replica_of: ask(self._handle(replica_of), members) for replica_of, members in by_replica.items()}
        answers: dict[int, tuple[Any, int]] = {}
        for replica_of, call in calls.items():
            members = by_replica[replica_of]
            try:
                answer = ray.get(call)
            except UnknownSession as error:
                self._reopen(error.session_ids, blocks)
                continue
            except RayActorError as error:  # it died, or cannot be reached just now
                self._failed(replica_of, error, [ids[i] for i in members])
                self._reopen([ids[i] for i in members], blocks)
                continue
            self._unreachable.discard(replica_of)
            self._answered(ids[i] for i in members)
            answers.update({i: (answer, placement) for placement, i in enumerate(members)})
        return answers

    def _remember(self, blocks: Blocks, parts: Sequence[np.ndarray]) -> None:
        """What each session holds now, so that it can be opened elsewhere."""
        for session, base, part in zip(blocks.session_ids.tolist(), blocks.base_lens, parts, strict=True):
            self._tokens[session] = np.concatenate([self._tokens[session][:base], part])

    def _reopen(self, session_ids: Sequence[int], blocks: Blocks) -> None:
        """Open lost sessions with the tokens that the coming block keeps of them."""
        if not session_ids:
            return
        base = dict(zip(blocks.session_ids.tolist(), blocks.base_lens.tolist(), strict=True))
        wanted = {session: self._tokens[session][: base[session]] for session in session_ids}
        patience = self._patience(PAUSE_S)  # room comes as soon as a neighbour's row has ended
        while True:
            try:
                return self._place(wanted)
            except TeacherBusy:
                next(patience)

    def _place(self, sessions: dict[int, np.ndarray]) -> None:
        """Give sessions to the replica that holds the fewest of all. Raises TeacherBusy when none has room."""
        patience = self._patience()
        busy: set[int] = set()
        while True:
            replica_of = self._least_loaded(busy)
            if replica_of is None:
                if busy:
                    raise TeacherBusy(f"no teacher replica has room for {len(sessions)} sessions")
                next(patience)
                continue
            try:
                ray.get(self._members.ready[replica_of].open.remote(_as_sessions(sessions)))
                self._home.update(dict.fromkeys(sessions, replica_of))
                self._unreachable.discard(replica_of)
                return
            except TeacherBusy:
                busy.add(replica_of)
            except RayActorError as error:  # it died, or cannot be reached just now
                self._failed(replica_of, error, sessions)
                next(patience)

    def _least_loaded(self, without: set[int]) -> int | None:
        """In order of health, load (that of all workers), and distance from this worker's first."""
        now, own = time.monotonic(), Counter(self._home.values())
        num, others = max(1, len(self._members.ready)), self._members.sessions
        free = [number for number in self._members.ready if number not in without]
        order = sorted(
            free,
            key=lambda i: (
                self._quarantined_until.get(i, 0.0) > now,
                own[i] + others.get(i, 0),
                (i - self._first) % num,
            ),
        )
        return order[0] if order else None


def _as_sessions(sessions: dict[int, np.ndarray]) -> Sessions:
    return Sessions(
        session_ids=np.array(list(sessions), np.int64),
        token_ids=np.concatenate(list(sessions.values())).astype(np.int32),
        lengths=np.array([len(part) for part in sessions.values()], np.int32),
    )


def _select(blocks: Blocks, parts: Sequence[np.ndarray], members: list[int]) -> Blocks:
    return Blocks(
        session_ids=blocks.session_ids[members],
        base_lens=blocks.base_lens[members],
        first_rows=blocks.first_rows[members],
        token_ids=np.concatenate([parts[i] for i in members]).astype(np.int32),
        lengths=blocks.lengths[members],
    )


def _piece(flat: np.ndarray, lengths: np.ndarray, index: int) -> np.ndarray:
    """Entry `index` of a ragged array."""
    stop = int(lengths[: index + 1].sum())
    return flat[stop - int(lengths[index]) : stop]


def _joined(placements: Sequence[tuple[TeacherOutput, int]]) -> TeacherOutput:
    """One signal from pieces of several, in order."""
    pieces = [_piece(teacher_output.values, teacher_output.lengths, index) for teacher_output, index in placements]
    return TeacherOutput(
        kind=placements[0][0].kind,
        dtype=placements[0][0].dtype,
        values=np.concatenate(pieces),
        lengths=np.array([len(piece) for piece in pieces], np.int32),
    )
