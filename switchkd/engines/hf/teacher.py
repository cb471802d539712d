"""The teacher as a transformers model that keeps sessions.

In: sessions, and token ids to append to them. Out: hidden states, logits or top log-probs, as they travel. One caller
at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from switchkd.algo.sampling import SamplingParams, draw, within_top
from switchkd.algo.topk import compress, pack
from switchkd.engines.hf.cuda_graphs import Capture
from switchkd.engines.hf.model_runner import ModelRunner
from switchkd.engines.models import cpu_prepack
from switchkd.engines.models.lm_head import LMHead, LMHeadState, lm_head_of
from switchkd.engines.sessions import Session, SessionTable
from switchkd.engines.wire import to_numpy
from switchkd.types import Blocks, Ragged, Sessions, TeacherOutput, WriteRequest, Written

_ROWS_AT_ONCE = 64
"""Whole rows that exist at the same time while they are compressed."""


class HFTeacher:
    """A teacher (see base.Teacher) on one process's devices. Opening is free: the first score reads the prompt.

    It keeps every session's tokens, so rows may be asked for again, and before what the cache holds.
    """

    def __init__(self, model: Any, *, vocab_size: int, max_sessions: int, max_len: int, lease_s: float = 600.0,
                 output: Literal["hidden_states", "logits", "top_logprobs"] = "hidden_states", top_k: int = 64,
                 prefill_chunk: int = 512, clock: Callable[[], float] = time.monotonic, capture: Capture | None = None,
                 prepack: str = "auto") -> None:  # fmt: skip
        self.model, self.vocab_size, self.kind = model, vocab_size, output
        self.top_k = top_k
        prepack = "off" if capture else prepack  # a recording keeps addresses, packed copies move
        self._prepack = prepack != "off"
        if output != "logits":
            lm_head_of(model, vocab_size, model.dtype)  # an error belongs to the start, not to the first score
        self._slots = ModelRunner(
            model, num_slots=max_sessions, max_len=max_len, prefill_chunk=prefill_chunk,
            output="logits" if output == "logits" else "hidden_states", capture=capture,
        )  # fmt: skip
        cpu_prepack.prepack(model, prepack, key="teacher.prepack")
        self._head: LMHead | None = None
        self._sessions = SessionTable(max_sessions=max_sessions, max_len=max_len, lease_s=lease_s, clock=clock)

    @property
    def num_positions_read(self) -> int:
        """Positions that the model has read, prompts and repetitions included, padding not."""
        return self._slots.num_positions_read

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def head(self) -> LMHead:
        """The float32 output head that belongs to hidden states."""
        return lm_head_of(self.model, self.vocab_size)

    def lm_head_state(self) -> LMHeadState | None:
        """The head as it travels to every process that rebuilds rows; None unless hidden states travel."""
        return self.head().to_arrays() if self.kind == "hidden_states" else None

    def open(self, sessions: Sessions) -> None:
        """See Teacher. A session that is already held keeps what was read of a common beginning."""
        self._sessions.open(sessions)

    def score(self, blocks: Blocks) -> TeacherOutput:
        """See Teacher. A session that does not reach `base_lens` counts as unknown."""
        _, rows, lengths = self._read(blocks)
        return self._teacher_output(rows, lengths)

    def write(self, request: WriteRequest) -> Written:
        """See Teacher."""
        blocks, counts = request.blocks, request.counts.astype(np.int64)
        self._sessions.check_write(request)
        sessions, rows, lengths = self._read(blocks)
        sampling = SamplingParams(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k)
        if self.kind == "top_logprobs":
            sampling = within_top(sampling, self.top_k)
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
        return Written(
            tokens=Ragged.concat(tokens, np.int32),
            margins=Ragged.concat(margins, np.float32),
            teacher_output=self._teacher_output(
                torch.stack([row for part in hidden for row in part]), [len(part) for part in hidden]
            ),
        )

    def _read(self, blocks: Blocks) -> tuple[list[Session], torch.Tensor, np.ndarray]:
        """Read the blocks: their sessions, the rows asked for, flat, and how many of each session."""
        sessions = self._sessions.of_blocks(blocks)
        bases, firsts = blocks.base_lens.astype(np.int64), blocks.first_rows.astype(np.int64)
        ends = bases + blocks.tokens.lengths
        starts = np.minimum(np.minimum([s.num_read for s in sessions], bases), firsts)
        for session, base, start, tokens in zip(sessions, bases, starts, blocks.tokens.split(), strict=True):
            session.tokens = np.concatenate([session.tokens[:base], tokens])
            session.num_read = int(start)  # true even if reading fails
        slots = np.array([s.slot for s in sessions], np.int64)
        unread = np.concatenate([s.tokens[s.num_read :] for s in sessions])
        rows = self._slots.extend(slots, starts, unread, ends - starts, ends - firsts)
        for session in sessions:
            session.num_read = len(session.tokens)
        return sessions, rows, ends - firsts

    def _teacher_output(self, rows: torch.Tensor, lengths: Sequence[int] | np.ndarray) -> TeacherOutput:
        if self.kind == "top_logprobs":
            words = [pack(compress(self._logits(part), self.top_k)) for part in rows.split(_ROWS_AT_ONCE)]
            rows = torch.cat(words)
        elif self.kind == "logits":
            rows = rows[:, : self.vocab_size].contiguous()
        values, dtype = to_numpy(rows)
        return TeacherOutput(kind=self.kind, dtype=dtype, rows=Ragged(values, np.asarray(lengths, np.int32)))

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The float32 rows that a worker would rebuild from hidden states."""
        if self.kind == "logits":
            return rows[:, : self.vocab_size].float()
        if self._head is None:  # where the model is not float32 this is a second head, for those who use it
            self._head = self.head().prepack() if self._prepack else self.head()
        return self._head.logits(rows)

    def close(self, session_ids: np.ndarray) -> None:
        """See Teacher."""
        self._sessions.close(session_ids)
