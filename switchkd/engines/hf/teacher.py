"""The teacher as a transformers model that keeps sessions.

In: sessions, and token ids to append to them. Out: hidden states, logits or top log-probs, as they are sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams, draw, within_top
from switchkd.algo.topk import compress_packed
from switchkd.engines.hf.cuda_graphs import Capture
from switchkd.engines.hf.model_runner import ModelRunner
from switchkd.engines.models import cpu_prepack
from switchkd.engines.models.lm_head import LMHead, LMHeadState, lm_head_of
from switchkd.engines.sessions import Session, SessionTable
from switchkd.engines.wire import to_numpy
from switchkd.types import Blocks, Ragged, Sessions, TeacherOutput, WriteRequest, Written


class HFTeacher:
    """A teacher (see base.Teacher) on one process's devices, for one caller at a time.

    `open` computes nothing: the first score reads the prompt. The teacher keeps every session's tokens, so a call may
    request any earlier row again, also where the cache no longer holds its position.
    """

    def __init__(self, model: Any, *, vocab_size: int, max_sessions: int, max_len: int, lease_s: float = 600.0,
                 output: Literal["hidden_states", "logits", "top_logprobs"] = "hidden_states", top_k: int = 64,
                 prefill_chunk: int = 512, clock: Callable[[], float] = time.monotonic, capture: Capture | None = None,
                 prepack: str = "auto") -> None:  # fmt: skip
        self.model, self.vocab_size, self.kind = model, vocab_size, output
        self.top_k = top_k
        prepack = "off" if capture else prepack  # a graph keeps addresses, packed copies move
        self._prepack = prepack != "off"
        if output != "logits":
            lm_head_of(model, vocab_size, model.dtype)  # raises its error at the start, not at the first score
        self._slots = ModelRunner(
            model, num_slots=max_sessions, max_len=max_len, prefill_chunk=prefill_chunk,
            output="logits" if output == "logits" else "hidden_states", capture=capture,
        )  # fmt: skip
        cpu_prepack.prepack(model, prepack, key="teacher.prepack")
        self._lm_head: LMHead | None = None
        self._sessions = SessionTable(max_sessions=max_sessions, max_len=max_len, lease_s=lease_s, clock=clock)

    @property
    def num_positions_read(self) -> int:
        """Positions that the model has read, with prompts and repetitions, without padding."""
        return self._slots.num_positions_read

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def head(self) -> LMHead:
        """The float32 LM head for this teacher's hidden states."""
        return lm_head_of(self.model, self.vocab_size)

    def lm_head_state(self) -> LMHeadState | None:
        """The LM head for the processes that rebuild rows; None unless the teacher sends hidden states."""
        return self.head().to_state() if self.kind == "hidden_states" else None

    def open(self, sessions: Sessions) -> None:
        """See Teacher. An open session keeps what was read of the common prefix."""
        self._sessions.open(sessions)

    def score(self, blocks: Blocks) -> TeacherOutput:
        """See Teacher. A session that is shorter than its base length counts as unknown."""
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
        active = np.arange(len(sessions))
        hidden = [list(part.unbind(0)) for part in rows.split(lengths.tolist())]
        last = rows[torch.from_numpy(np.cumsum(lengths) - 1).to(rows.device)]
        tokens: list[list[int]] = [[] for _ in sessions]
        margins: list[list[float]] = [[] for _ in sessions]
        while True:
            drawn, drawn_margins = draw(
                self._logits(last), run_seed=request.run_seed, rollout_ids=request.rollout_ids[active],
                positions=[int(request.positions[b]) + len(tokens[b]) for b in active],
                purpose=Purpose(request.purpose), sampling=sampling, return_margin=True,
            )  # fmt: skip
            for b, token, margin in zip(active, drawn, drawn_margins, strict=True):
                tokens[b].append(int(token))
                margins[b].append(float(margin))
            continues = ~np.isin(drawn, request.stop_ids) & (counts[active] > [len(tokens[b]) for b in active])
            active, drawn = active[continues], drawn[continues]
            if len(active) == 0:
                break
            writing = [sessions[b] for b in active]
            slots, ends = np.array([s.slot for s in writing], np.int64), np.array([s.num_read for s in writing])
            last = self._slots.extend(slots, ends, drawn, np.ones(len(active), np.int64))
            for b, session, row in zip(active, writing, last, strict=True):
                session.tokens = np.append(session.tokens, tokens[b][-1])
                session.num_read += 1
                hidden[b].append(row)
        for session, part in zip(sessions, tokens, strict=True):
            session.tokens = np.append(session.tokens, part[-1])  # the last token is not read
        return Written(
            tokens=Ragged.concat(tokens, np.int32),
            margins=Ragged.concat(margins, np.float32),
            teacher_output=self._teacher_output(
                torch.stack([row for part in hidden for row in part]), [len(part) for part in hidden]
            ),
        )

    def _read(self, blocks: Blocks) -> tuple[list[Session], torch.Tensor, np.ndarray]:
        """Read the blocks. Returns their sessions, the requested rows, flat, and the number of rows by session."""
        sessions = self._sessions.named_by(blocks)
        bases, firsts = blocks.base_lens.astype(np.int64), blocks.first_rows.astype(np.int64)
        ends = bases + blocks.tokens.lengths
        starts = np.minimum(np.minimum([s.num_read for s in sessions], bases), firsts)
        for session, base, start, tokens in zip(sessions, bases, starts, blocks.tokens.split(), strict=True):
            session.tokens = np.concatenate([session.tokens[:base], tokens])
            session.num_read = int(start)  # holds also where reading fails
        slots = np.array([s.slot for s in sessions], np.int64)
        unread = np.concatenate([s.tokens[s.num_read :] for s in sessions])
        rows = self._slots.extend(slots, starts, unread, ends - starts, ends - firsts)
        for session in sessions:
            session.num_read = len(session.tokens)
        return sessions, rows, ends - firsts

    def _teacher_output(self, rows: torch.Tensor, lengths: Sequence[int] | np.ndarray) -> TeacherOutput:
        if self.kind == "top_logprobs":
            rows = compress_packed(self._logits, rows, self.top_k)
        elif self.kind == "logits":
            rows = rows[:, : self.vocab_size].contiguous()
        values, dtype = to_numpy(rows)
        return TeacherOutput(kind=self.kind, dtype=dtype, rows=Ragged(values, np.asarray(lengths, np.int32)))

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The float32 logits that a worker would rebuild from hidden states."""
        if self.kind == "logits":
            return rows[:, : self.vocab_size].float()
        if self._lm_head is None:  # made when it is needed: a model that is not float32 then has a second copy
            self._lm_head = self.head().prepack() if self._prepack else self.head()
        return self._lm_head.logits(rows)

    def close(self, session_ids: np.ndarray) -> None:
        """See Teacher."""
        self._sessions.close(session_ids)
