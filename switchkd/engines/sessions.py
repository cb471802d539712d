"""The sessions of a teacher: their tokens, their leases, and the rows of the last answers.

In: the calls of `base.Teacher`. Out: the sessions that a call names, after all its arguments are checked. The backend
computes the rows.
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
    slot: int  # 0 .. max_sessions - 1, unique among the sessions that exist at one time
    tokens: np.ndarray  # int64, all tokens that the caller appended and did not cut
    touched: float  # time of the last call that named the session
    num_read: int = 0  # leading tokens that are in the slot's cache, where a backend has one
    first: int = 0  # position of the first of `rows`
    rows: torch.Tensor | None = None  # [n, D], the rows of the last answer

    def kept_rows(self, first: int, end: int) -> torch.Tensor | None:
        """Rows of positions first .. end - 1 as far as they are kept; None where the first one is not."""
        if self.rows is None or not self.first <= first < self.first + len(self.rows):
            return None
        return self.rows[first - self.first : end - self.first]

    def replace_tokens(self, tokens: np.ndarray) -> None:
        """Replace the tokens; keep what was read and answered of the common prefix."""
        common = _common_prefix_len(self.tokens, tokens)
        self.tokens, self.num_read = tokens, min(self.num_read, common)
        if self.rows is not None:
            self.rows = self.rows[: max(common - self.first, 0)]


class SessionTable:
    """Sessions by id. Every method first removes those whose lease has expired."""

    def __init__(self, *, max_sessions: int, max_len: int, lease_s: float, clock: Callable[[], float]) -> None:
        self.max_sessions, self.max_len, self.lease_s = max_sessions, max_len, lease_s
        self._clock = clock
        self._sessions: dict[int, Session] = {}
        self._free = list(range(max_sessions))  # a heap: low slots first, so that the used slots are contiguous

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, sessions: Sessions) -> None:
        """See base.Teacher. A prefix of a session's tokens changes nothing (a late repeat), other tokens replace them.

        Raises ValueError where a session is empty or longer than `max_len`.
        """
        now = self._evict()
        parts = [part.astype(np.int64) for part in sessions.tokens.split()]  # copies: a view would keep the message
        prompts = dict(zip(sessions.session_ids.tolist(), parts, strict=True))
        for session_id, tokens in prompts.items():
            if not 0 < len(tokens) <= self.max_len:
                raise ValueError(f"session {session_id} has {len(tokens)} tokens; a session takes 1 to {self.max_len}")
        if len(new := prompts.keys() - self._sessions.keys()) > len(self._free):
            raise TeacherBusy(f"{len(new)} sessions asked for, {len(self._free)} of {self.max_sessions} are free")
        for session_id, tokens in prompts.items():
            if (session := self._sessions.get(session_id)) is None:
                session = self._sessions[session_id] = Session(heapq.heappop(self._free), tokens, now)
            if _common_prefix_len(session.tokens, tokens) < len(tokens):
                session.replace_tokens(tokens)
            session.touched = now

    def named_by(self, blocks: Blocks) -> list[Session]:
        """Return the sessions of the blocks. Raises UnknownSession, also for one that is shorter than its base length,
        and ValueError for counts that no session can hold."""
        now = self._evict()
        ids = blocks.session_ids.tolist()
        lens = [len(self._sessions[i].tokens) if i in self._sessions else -1 for i in ids]
        if unknown := [i for i, num, base in zip(ids, lens, blocks.base_lens, strict=True) if num < max(base, 0)]:
            raise UnknownSession(unknown)
        if len(set(ids)) != len(ids):
            raise ValueError(f"sessions {ids} are named twice in one call")
        rows = zip(ids, blocks.base_lens, blocks.first_rows, blocks.base_lens + blocks.tokens.lengths, strict=True)
        for session_id, base, first, end in rows:
            if not 0 <= first < end or base < 0:
                raise ValueError(f"session {session_id}: first row {first} of {end} positions, {base} kept")
            if end > self.max_len:
                raise ValueError(f"session {session_id} would have {end} tokens; it takes {self.max_len}")
        sessions = [self._sessions[i] for i in ids]
        for session in sessions:
            session.touched = now
        return sessions

    def check_write(self, request: WriteRequest) -> None:
        """Raise ValueError for counts that no session can hold."""
        ends = request.blocks.base_lens + request.blocks.tokens.lengths + request.counts - 1
        for session_id, count, end in zip(request.blocks.session_ids, request.counts, ends, strict=True):
            if count < 1:
                raise ValueError(f"session {session_id} is asked to write {count} tokens; ask for 1 or more")
            if end > self.max_len:
                raise ValueError(f"session {session_id} would have {end} tokens; it takes {self.max_len}")

    def close(self, session_ids: np.ndarray) -> None:
        """Remove sessions; unknown ones are ignored."""
        self._evict()
        self._remove(session_ids.tolist())

    def _evict(self) -> float:
        """Remove the sessions whose lease has expired. Returns the current time."""
        now = self._clock()
        self._remove([i for i, s in self._sessions.items() if now - s.touched > self.lease_s])
        return now

    def _remove(self, session_ids: list[int]) -> None:
        for session_id in session_ids:
            if (session := self._sessions.pop(session_id, None)) is not None:
                heapq.heappush(self._free, session.slot)


def _common_prefix_len(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size
