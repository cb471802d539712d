"""A worker's way to the teachers: each session sticks to one replica, and outlives it.

In: the calls of `engines.base.Teacher`. The router keeps every session's tokens, so that a lost replica (or a lost
session) costs one re-prefill elsewhere and nothing else. One router per rollout worker, in its process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.engines.heads import HeadArrays
from switchkd.types import Blocks, Positions, Sessions, Signal, WriteRequest, Written, ragged

Ask = Callable[[Any, list[int]], Any]
"""(replica, which blocks) -> a reference to its answer."""

RETRY_FOR_S = 300.0
"""How long a router looks for a living replica before it gives up."""
QUARANTINE_S = 5.0
"""How long a replica that failed gets no new session."""


class TeacherRouter:
    def __init__(self, replicas: Sequence[Any], first: int = 0) -> None:
        self.replicas = list(replicas)
        self._home: dict[int, int] = {}  # session id -> replica
        self._tokens: dict[int, np.ndarray] = {}  # session id -> its tokens, as last sent
        self._bad_until = [0.0] * len(self.replicas)
        self._first = first  # workers start at different replicas

    # ── the Teacher protocol ───────────────────────────────────────────────────────────────────────────────────────

    def open(self, sessions: Sessions) -> None:
        tokens = ragged(sessions.token_ids, sessions.lengths)
        wanted = {int(s): part for s, part in zip(sessions.session_ids, tokens, strict=True)}
        self._place(wanted)
        self._tokens.update(wanted)

    def score(self, blocks: Blocks) -> Signal:
        """Split by replica, ask all at once, put together in the order asked. Lost sessions are opened again."""
        parts = ragged(blocks.token_ids, blocks.lengths)
        answers = self._until_answered(blocks, lambda replica, some: replica.score.remote(_select(blocks, parts, some)))
        self._remember(blocks, parts)
        return _joined(answers)

    def exact(self, question: Positions) -> Signal:
        """As `score`; a lost session is opened elsewhere with all its tokens."""
        parts = ragged(question.positions, question.lengths)
        held = [len(self._tokens[session]) for session in question.session_ids.tolist()]
        whole = Blocks(
            session_ids=question.session_ids,
            base_lens=np.array(held, np.int32),
            first_rows=np.zeros(len(held), np.int32),
            token_ids=np.zeros(0, np.int32),
            lengths=np.zeros(len(held), np.int32),
        )

        def ask(replica: Any, some: list[int]) -> Any:
            return replica.exact.remote(
                Positions(
                    session_ids=question.session_ids[some],
                    positions=np.concatenate([parts[i] for i in some]).astype(np.int32),
                    lengths=question.lengths[some],
                )
            )

        return _joined(self._until_answered(whole, ask))

    def write(self, request: WriteRequest) -> Written:
        """As `score`. A repeated request gives the same tokens, so a lost replica costs time only."""
        blocks = request.blocks
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
            signal=_joined([(written.signal, i) for written, i in answers]),
        )

    def close(self, session_ids: np.ndarray) -> None:
        by_replica: dict[int, list[int]] = {}
        for session in session_ids.tolist():
            self._tokens.pop(session, None)
            home = self._home.pop(session, None)
            if home is not None:
                by_replica.setdefault(home, []).append(session)
        for home, ids in by_replica.items():
            self.replicas[home].close.remote(np.array(ids, np.int64))  # nobody waits for it

    def head(self) -> HeadArrays | None:
        """The teacher's output head, from whichever replica answers; None when it sends whole rows."""
        deadline = time.monotonic() + RETRY_FOR_S
        while True:
            home = self._least_loaded(0)
            try:
                return ray.get(self.replicas[home].head.remote())
            except RayActorError:
                self._bad_until[home] = time.monotonic() + QUARANTINE_S
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    # ── replicas ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _until_answered(self, blocks: Blocks, ask: Ask) -> list[tuple[Any, int]]:
        """For every block, in order: the answer that it came in, and its place there."""
        deadline = time.monotonic() + RETRY_FOR_S
        answers: dict[int, tuple[Any, int]] = {}
        missing = list(range(len(blocks.session_ids)))
        while missing:
            answers.update(self._ask_once(blocks, ask, missing))
            missing = [i for i in missing if i not in answers]
            if missing and time.monotonic() > deadline:
                raise RuntimeError(f"no teacher replica answered for {RETRY_FOR_S:g} s; see the teachers' logs")
        return [answers[i] for i in range(len(blocks.session_ids))]

    def _ask_once(self, blocks: Blocks, ask: Ask, which: list[int]) -> dict[int, tuple[Any, int]]:
        """One call per replica for the blocks `which`; what failed is missing from the answer and lives elsewhere."""
        by_replica: dict[int, list[int]] = {}
        for i in which:
            by_replica.setdefault(self._home[int(blocks.session_ids[i])], []).append(i)
        calls = {home: ask(self.replicas[home], members) for home, members in by_replica.items()}
        answers: dict[int, tuple[Any, int]] = {}
        for home, call in calls.items():
            members = by_replica[home]
            try:
                answer = ray.get(call)
            except UnknownSession as error:
                self._reopen(error.session_ids, blocks)
                continue
            except RayActorError:  # it died, or cannot be reached just now
                self._bad_until[home] = time.monotonic() + QUARANTINE_S
                self._reopen([int(blocks.session_ids[i]) for i in members], blocks)
                continue
            answers.update({i: (answer, place) for place, i in enumerate(members)})
        return answers

    def _remember(self, blocks: Blocks, parts: Sequence[np.ndarray]) -> None:
        """What each session holds now, so that it can be opened elsewhere."""
        for session, base, part in zip(blocks.session_ids.tolist(), blocks.base_lens, parts, strict=True):
            self._tokens[session] = np.concatenate([self._tokens[session][:base], part])

    def _reopen(self, session_ids: Sequence[int], blocks: Blocks) -> None:
        """Open lost sessions with the tokens that the coming block keeps of them."""
        base = dict(zip(blocks.session_ids.tolist(), blocks.base_lens.tolist(), strict=True))
        wanted = {session: self._tokens[session][: base[session]] for session in session_ids}
        for session in session_ids:
            self._home.pop(session, None)
        deadline = time.monotonic() + RETRY_FOR_S
        while True:
            try:
                return self._place(wanted)
            except TeacherBusy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _place(self, sessions: dict[int, np.ndarray]) -> None:
        """Give sessions to the replica that holds the fewest of ours. Raises TeacherBusy when none has room."""
        deadline = time.monotonic() + RETRY_FOR_S
        busy = 0
        while True:
            home = self._least_loaded(busy)
            try:
                ray.get(self.replicas[home].open.remote(_as_sessions(sessions)))
                self._home.update(dict.fromkeys(sessions, home))
                return
            except TeacherBusy:
                busy += 1
                if busy >= len(self.replicas):
                    raise
            except RayActorError:  # it died, or cannot be reached just now
                self._bad_until[home] = time.monotonic() + QUARANTINE_S
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _least_loaded(self, rank: int) -> int:
        """The replica of the given rank in order of health, load, and distance from this worker's first."""
        now, num = time.monotonic(), len(self.replicas)
        load = [0] * num
        for home in self._home.values():
            load[home] += 1
        order = sorted(range(num), key=lambda i: (self._bad_until[i] > now, load[i], (i - self._first) % num))
        return order[rank % num]


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


def _joined(places: Sequence[tuple[Signal, int]]) -> Signal:
    """One signal from pieces of several, in order."""
    pieces = [_piece(signal.values, signal.lengths, index) for signal, index in places]
    return Signal(
        kind=places[0][0].kind,
        dtype=places[0][0].dtype,
        values=np.concatenate(pieces),
        lengths=np.array([len(piece) for piece in pieces], np.int32),
    )
