"""transformers models behind the house's two promises: the student that drafts, the teacher that keeps sessions.

In: slots or sessions, and token ids to append to them. Out: final hidden states, as tensors (`HFStudent`) or as they
travel (`HFTeacher`). One caller at a time.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from switchkd.algo.compressed import compress, pack
from switchkd.algo.sampling import Sampling, draw
from switchkd.engines import prepacked
from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.engines.graphs import Capture
from switchkd.engines.heads import HeadArrays, LinearHead, head_of, signal_from_hidden
from switchkd.engines.slot_model import SlotModel
from switchkd.types import Blocks, Positions, Sessions, Signal, WeightBundle, WriteRequest, Written, ragged

_KEPT_ROWS = 64
"""Of each session, besides the last answer: AdaSwitch asks about the tokens of its window."""
_ROWS_AT_ONCE = 64
"""Whole rows that exist at the same time while they are compressed."""


class HFStudent:
    """The student (a StudentEngine): a SlotModel with its float32 output head and replaceable weights."""

    def __init__(self, model: Any, *, num_slots: int, max_len: int, vocab_size: int, prefill_chunk: int = 512,
                 capture: Capture | None = None, prepack: str = "auto") -> None:  # fmt: skip
        self._slots = SlotModel(
            model, num_slots=num_slots, max_len=max_len, prefill_chunk=prefill_chunk, capture=capture
        )
        self.model, self.num_slots, self.max_len = model, num_slots, max_len
        self.head = head_of(model, vocab_size)
        self._refresh = prepacked.prepack(model, prepack, key="student.prepack")
        if prepack != "off":
            self.head.prepack()

    def extend(self, slots: np.ndarray, starts: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """See StudentEngine."""
        return self._slots.extend(slots, starts, token_ids, lengths)

    def load_weights(self, bundle: WeightBundle) -> None:
        """See StudentEngine. Every slot is empty afterwards; `head` stays the same object."""
        from switchkd.weights import unpack_into

        unpack_into(self.model, bundle)
        self._refresh()
        self.head.copy_from(self.model)
        self._slots.reset()


@dataclass(slots=True)
class _Session:
    slot: int
    tokens: np.ndarray  # int64, all that the caller ever appended and did not cut
    num_read: int  # so many of them are in the cache
    touched: float
    first: int = 0  # position of the first of `rows`
    rows: torch.Tensor | None = None  # [n, D], what was last answered, for questions about it (`signal: topk`)

    def keep(self, first: int, rows: torch.Tensor) -> None:
        """Rows from position `first` on were answered; earlier ones that adjoin them stay."""
        num = len(rows)
        if self.rows is not None and self.first <= first <= self.first + len(self.rows):
            rows, first = torch.cat([self.rows[: first - self.first], rows]), self.first
        surplus = max(len(rows) - max(_KEPT_ROWS, num), 0)
        self.first, self.rows = first + surplus, rows[surplus:]

    def take(self, tokens: np.ndarray) -> None:
        """Opened again: a beginning of what is held changes nothing (a late repeat), anything else replaces it."""
        size = min(len(tokens), len(self.tokens))
        differ = np.flatnonzero(tokens[:size] != self.tokens[:size])
        common = int(differ[0]) if len(differ) else size
        if common < len(tokens):
            self.tokens, self.num_read, self.rows = tokens, min(self.num_read, common), None


class HFTeacher:
    """A teacher (see base.Teacher) on one process's devices. Opening is free: the first score reads the prompt.

    It keeps every session's tokens, so rows may be asked for again, and before what the cache holds.
    """

    def __init__(self, model: Any, *, vocab_size: int, max_sessions: int, max_len: int, lease_s: float = 600.0,
                 signal: Literal["hidden", "full", "topk"] = "hidden", top_k: int = 64, prefill_chunk: int = 512,
                 clock: Callable[[], float] = time.monotonic, capture: Capture | None = None,
                 prepack: str = "auto") -> None:  # fmt: skip
        self.model, self.vocab_size, self.lease_s, self.kind = model, vocab_size, lease_s, signal
        self.top_k = top_k
        self._prepack = prepack != "off"
        if signal != "full":
            head_of(model, vocab_size, model.dtype)  # an error belongs to the start, not to the first score
        self._slots = SlotModel(
            model, num_slots=max_sessions, max_len=max_len, prefill_chunk=prefill_chunk,
            output="logits" if signal == "full" else "hidden", capture=capture,
        )  # fmt: skip
        prepacked.prepack(model, prepack, key="teacher.prepack")
        self._clock = clock
        self._head: LinearHead | None = None
        self._sessions: dict[int, _Session] = {}
        self._free = list(range(max_sessions))  # a heap: low slots first, so that the used ones lie together

    @property
    def num_positions_read(self) -> int:
        """Positions that the model has read, prompts and repetitions included, padding not."""
        return self._slots.num_positions_read

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def head(self) -> LinearHead:
        """The float32 output head that belongs to hidden states."""
        return head_of(self.model, self.vocab_size)

    def head_arrays(self) -> HeadArrays | None:
        """The head as it travels to everybody who rebuilds rows; None where whole rows travel."""
        return None if self.kind == "full" else self.head().to_arrays()

    def open(self, sessions: Sessions) -> None:
        """See Teacher. A session that is already held keeps what was read of a common beginning."""
        now = self._evict()
        prompts = dict(zip(sessions.session_ids.tolist(), _split(sessions.token_ids, sessions.lengths), strict=True))
        for session_id, tokens in prompts.items():
            if not 0 < len(tokens) <= self._slots.max_len:
                raise ValueError(
                    f"session {session_id} has {len(tokens)} tokens; a session takes 1 to {self._slots.max_len}"
                )
        if len(new := prompts.keys() - self._sessions.keys()) > len(self._free):
            raise TeacherBusy(f"{len(new)} sessions asked for, {len(self._free)} of {self._slots.num_slots} are free")
        for session_id, tokens in prompts.items():
            held = self._sessions.get(session_id)
            if held is None:
                held = _Session(heapq.heappop(self._free), tokens, 0, now)
                self._sessions[session_id] = held
            held.take(tokens)
            held.touched = now

    def score(self, blocks: Blocks) -> Signal:
        """See Teacher. A session that does not reach `base_lens` counts as unknown."""
        sessions, rows, lengths = self._read(blocks)
        self._keep(sessions, rows, lengths, blocks)
        return self._signal(rows, lengths)

    def exact(self, question: Positions) -> Signal:
        """See Teacher. What was answered last is still here; older rows are read again."""
        now = self._evict()
        ids = question.session_ids.tolist()
        if unknown := [i for i in ids if i not in self._sessions]:
            raise UnknownSession(unknown)
        found = []
        for session_id, positions in zip(ids, _split(question.positions, question.lengths), strict=True):
            session = self._sessions[session_id]
            session.touched = now
            if positions.min() < 0 or positions.max() >= len(session.tokens):
                raise ValueError(f"session {session_id} has {len(session.tokens)} tokens, no row {positions.tolist()}")
            last = session.first + (0 if session.rows is None else len(session.rows))
            if session.rows is None or positions.min() < session.first or positions.max() >= last:
                self._read_again(session_id, int(positions.min()))
            assert session.rows is not None
            found.append(session.rows[torch.from_numpy(positions - session.first).to(session.rows.device)])
        rows = torch.cat(found)
        if self.kind == "full":
            return self._signal(rows, question.lengths)
        values, dtype = signal_from_hidden(rows)
        return Signal(kind="hidden", dtype=dtype, values=values, lengths=question.lengths.astype(np.int32))

    def _read_again(self, session_id: int, first: int) -> None:
        """All rows from `first` on, of the session as it stands."""
        num = len(self._sessions[session_id].tokens)
        blocks = Blocks(
            session_ids=np.array([session_id]), base_lens=np.array([num]), first_rows=np.array([first]),
            token_ids=np.zeros(0, np.int32), lengths=np.array([0]),
        )  # fmt: skip
        sessions, rows, _ = self._read(blocks)
        sessions[0].first, sessions[0].rows = first, rows

    def _keep(
        self, sessions: list[_Session], rows: torch.Tensor, lengths: Sequence[int] | np.ndarray, blocks: Blocks
    ) -> None:
        """Questions come for compressed rows only, and mostly for what was just answered."""
        if self.kind != "topk":
            return
        parts = rows.split(list(map(int, lengths)))
        for session, part, first in zip(sessions, parts, blocks.first_rows, strict=True):
            session.keep(int(first), part)

    def write(self, request: WriteRequest) -> Written:
        """See Teacher."""
        blocks, counts = request.blocks, request.counts.astype(np.int64)
        self._check_write(request)
        sessions, rows, lengths = self._read(blocks)
        sampling = Sampling(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k)
        alive = np.arange(len(sessions))
        hidden = [list(part.unbind(0)) for part in rows.split(lengths.tolist())]
        last = rows[torch.from_numpy(np.cumsum(lengths) - 1).to(rows.device)]
        tokens: list[list[int]] = [[] for _ in sessions]
        margins: list[list[float]] = [[] for _ in sessions]
        while True:
            drawn, margin = draw(
                self._logits(last), run_seed=request.run_seed, rollout_ids=request.rollout_ids[alive],
                positions=[int(request.positions[b]) + len(tokens[b]) for b in alive], purpose=request.purpose,
                sampling=sampling, return_margin=True,
            )  # fmt: skip
            for b, token, lead in zip(alive, drawn, margin, strict=True):
                tokens[b].append(int(token))
                margins[b].append(float(lead))
            go_on = ~np.isin(drawn, request.stop_ids) & (counts[alive] > [len(tokens[b]) for b in alive])
            alive, drawn = alive[go_on], drawn[go_on]
            if len(alive) == 0:
                break
            held = [sessions[b] for b in alive]
            slots, ends = np.array([s.slot for s in held], np.int64), np.array([s.num_read for s in held])
            last = self._slots.extend(slots, ends, drawn, np.ones(len(alive), np.int64))
            for b, session, row in zip(alive, held, last, strict=True):
                session.tokens = np.append(session.tokens, tokens[b][-1])
                session.num_read += 1
                hidden[b].append(row)
        for session, part in zip(sessions, tokens, strict=True):
            session.tokens = np.append(session.tokens, part[-1])  # not read
        answered, sizes = torch.stack([row for part in hidden for row in part]), [len(part) for part in hidden]
        self._keep(sessions, answered, sizes, blocks)
        signal = self._signal(answered, sizes)
        return Written(
            token_ids=np.concatenate([np.array(part, np.int32) for part in tokens]),
            lengths=np.array([len(part) for part in tokens], np.int32),
            margins=np.concatenate([np.array(part, np.float32) for part in margins]),
            signal=signal,
        )

    def _read(self, blocks: Blocks) -> tuple[list[_Session], torch.Tensor, np.ndarray]:
        """Read the blocks: their sessions, the rows asked for, flat, and how many of each session."""
        now = self._evict()
        ids = blocks.session_ids.tolist()
        bases, firsts = blocks.base_lens.astype(np.int64), blocks.first_rows.astype(np.int64)
        ends = bases + blocks.lengths
        self._check_blocks(ids, bases, firsts, ends)
        sessions = [self._sessions[i] for i in ids]
        starts = np.minimum(np.minimum([s.num_read for s in sessions], bases), firsts)
        new = _split(blocks.token_ids, blocks.lengths)
        for session, base, start, tokens in zip(sessions, bases, starts, new, strict=True):
            session.tokens = np.concatenate([session.tokens[:base], tokens])
            if session.rows is not None:
                session.rows = session.rows[: max(int(base) - session.first, 0)]
            session.num_read, session.touched = int(start), now  # true even if reading fails
        slots = np.array([s.slot for s in sessions], np.int64)
        unread = np.concatenate([s.tokens[s.num_read :] for s in sessions])
        rows = self._slots.extend(slots, starts, unread, ends - starts, ends - firsts)
        for session in sessions:
            session.num_read = len(session.tokens)
        return sessions, rows, ends - firsts

    def _signal(self, rows: torch.Tensor, lengths: Sequence[int] | np.ndarray) -> Signal:
        if self.kind == "topk":
            words = [pack(compress(self._logits(part), self.top_k)) for part in rows.split(_ROWS_AT_ONCE)]
            values, dtype = signal_from_hidden(torch.cat(words))
            return Signal(kind=self.kind, dtype=dtype, values=values, lengths=np.asarray(lengths, np.int32))
        values, dtype = signal_from_hidden(rows if self.kind == "hidden" else rows[:, : self.vocab_size].contiguous())
        return Signal(kind=self.kind, dtype=dtype, values=values, lengths=np.asarray(lengths, np.int32))

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The float32 rows that a worker would rebuild from the signal."""
        if self.kind == "full":
            return rows[:, : self.vocab_size].float()
        if self._head is None:  # where the model is not float32 this is a second head, for those who use it
            self._head = self.head().prepack() if self._prepack else self.head()
        return self._head.logits(rows)

    def close(self, session_ids: np.ndarray) -> None:
        """See Teacher."""
        self._evict()
        for session_id in session_ids.tolist():
            self._forget(session_id)

    def _check_blocks(self, ids: list[int], bases: np.ndarray, firsts: np.ndarray, ends: np.ndarray) -> None:
        held = [len(self._sessions[i].tokens) if i in self._sessions else -1 for i in ids]
        if unknown := [i for i, num, base in zip(ids, held, bases, strict=True) if num < base or num < 0]:
            raise UnknownSession(unknown)
        if len(set(ids)) != len(ids):
            raise ValueError(f"sessions {ids} are named twice in one call")
        for session_id, base, first, end in zip(ids, bases, firsts, ends, strict=True):
            if not 0 <= first < end or base < 0:
                raise ValueError(f"session {session_id}: first row {first} of {end} positions, {base} kept")
            if end > self._slots.max_len:
                raise ValueError(f"session {session_id} would have {end} tokens; it takes {self._slots.max_len}")

    def _check_write(self, request: WriteRequest) -> None:
        ends = request.blocks.base_lens + request.blocks.lengths + request.counts - 1
        for session_id, count, end in zip(request.blocks.session_ids, request.counts, ends, strict=True):
            if count < 1:
                raise ValueError(f"session {session_id} is asked to write {count} tokens; ask for 1 or more")
            if end > self._slots.max_len:
                raise ValueError(f"session {session_id} would have {end} tokens; it takes {self._slots.max_len}")

    def _evict(self) -> float:
        """Forget the sessions whose lease has run out. Returns the time."""
        now = self._clock()
        for session_id in [i for i, s in self._sessions.items() if now - s.touched > self.lease_s]:
            self._forget(session_id)
        return now

    def _forget(self, session_id: int) -> None:
        if (session := self._sessions.pop(session_id, None)) is not None:
            heapq.heappush(self._free, session.slot)


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return ragged(flat.astype(np.int64), lengths)
