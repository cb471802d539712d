"""What a teacher remembers of its callers: their sessions, with a lease each, and the rows that it answered last.

In: the calls of `base.Teacher`. Out: the sessions that a call is about, every claim of the call checked before anything
is computed. How rows are made is the backend's affair.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.types import Blocks, Sessions, WriteRequest

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Session:
    slot: int  # 0 .. max_sessions - 1; of those that live at one time, each has its own
    tokens: np.ndarray  # int64, all that the caller ever appended and did not cut
    touched: float
    num_read: int = 0  # so many of them are in the cache of the slot, where a backend has one
    first: int = 0  # position of the first of `rows`
    rows: torch.Tensor | None = None  # [n, D], what was last answered

    def kept(self, first: int, end: int) -> torch.Tensor | None:
        """Rows of positions first .. end - 1 as far as they are here, if the first one is."""
        if self.rows is None or not self.first <= first < self.first + len(self.rows):
            return None
        return self.rows[first - self.first : end - self.first]

    def become(self, tokens: np.ndarray) -> None:
        """Hold these tokens; what was read and answered of a common beginning stays true."""
        common = _common(self.tokens, tokens)
        self.tokens, self.num_read = tokens, min(self.num_read, common)
        if self.rows is not None:
            self.rows = self.rows[: max(common - self.first, 0)]


class SessionTable:
    """Sessions by id. Every method first forgets those whose lease has run out."""

    def __init__(self, *, max_sessions: int, max_len: int, lease_s: float, clock: Callable[[], float]) -> None:
        self.max_sessions, self.max_len, self.lease_s = max_sessions, max_len, lease_s
        self._clock = clock
        self._sessions: dict[int, Session] = {}
        self._free = list(range(max_sessions))  # a heap: low slots first, so that the used ones lie together

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, sessions: Sessions) -> None:
        """See base.Teacher. A beginning of what is held changes nothing (a late repeat), anything else replaces it."""
        now = self._evict()
        parts = [part.astype(np.int64) for part in sessions.tokens.split()]  # copies: views would keep the message
        prompts = dict(zip(sessions.session_ids.tolist(), parts, strict=True))
        for session_id, tokens in prompts.items():
            if not 0 < len(tokens) <= self.max_len:
                raise ValueError(f"session {session_id} has {len(tokens)} tokens; a session takes 1 to {self.max_len}")
        if len(new := prompts.keys() - self._sessions.keys()) > len(self._free):
            raise TeacherBusy(f"{len(new)} sessions asked for, {len(self._free)} of {self.max_sessions} are free")
        for session_id, tokens in prompts.items():
            held = self._sessions.get(session_id)
            if held is None:
                held = self._sessions[session_id] = Session(heapq.heappop(self._free), tokens, now)
            if _common(held.tokens, tokens) < len(tokens):
                held.become(tokens)
            held.touched = now

    def of_blocks(self, blocks: Blocks) -> list[Session]:
        """The sessions of a score. Raises UnknownSession (also for one that does not reach its base length), ValueError
        for what no session can hold."""
        now = self._evict()
        ids = blocks.session_ids.tolist()
        held = [len(self._sessions[i].tokens) if i in self._sessions else -1 for i in ids]
        if unknown := [i for i, num, base in zip(ids, held, blocks.base_lens, strict=True) if num < max(base, 0)]:
            raise UnknownSession(unknown)
        if len(set(ids)) != len(ids):
            raise ValueError(f"sessions {ids} are named twice in one call")
        rows = zip(ids, blocks.base_lens, blocks.first_rows, blocks.base_lens + blocks.tokens.lengths, strict=True)
        for session_id, base, first, end in rows:
            if not 0 <= first < end or base < 0:
                raise ValueError(f"session {session_id}: first row {first} of {end} positions, {base} kept")
            if end > self.max_len:
                raise ValueError(f"session {session_id} would have {end} tokens; it takes {self.max_len}")
        return self._touched(ids, now)

    def check_write(self, request: WriteRequest) -> None:
        """ValueError for counts that no session can hold."""
        ends = request.blocks.base_lens + request.blocks.tokens.lengths + request.counts - 1
        for session_id, count, end in zip(request.blocks.session_ids, request.counts, ends, strict=True):
            if count < 1:
                raise ValueError(f"session {session_id} is asked to write {count} tokens; ask for 1 or more")
            if end > self.max_len:
                raise ValueError(f"session {session_id} would have {end} tokens; it takes {self.max_len}")

    def close(self, session_ids: np.ndarray) -> None:
        """Forget sessions; unknown ones are ignored."""
        self._evict()
        for session_id in session_ids.tolist():
            self._forget(session_id)

    def _touched(self, ids: list[int], now: float) -> list[Session]:
        sessions = [self._sessions[i] for i in ids]
        for session in sessions:
            session.touched = now
        return sessions

    def _evict(self) -> float:
        """Forget the sessions whose lease has run out. Returns the time."""
        now = self._clock()
        for session_id in [i for i, s in self._sessions.items() if now - s.touched > self.lease_s]:
            self._forget(session_id)
        return now

    def _forget(self, session_id: int) -> None:
        if (session := self._sessions.pop(session_id, None)) is not None:
            heapq.heappush(self._free, session.slot)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How long the common beginning of two sequences is."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size
