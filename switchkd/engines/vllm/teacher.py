"""The production teacher: vLLM behind the Teacher protocol, with paged caches, tensor parallelism and its own kernels.

In: sessions and blocks. Out: `teacher.output: hidden_states` or `top_logprobs`. A session has no state but its tokens:
vLLM's prefix cache finds what was read by content, so a block after a long prefix costs its own tokens and at most one
cache block more.

Rows come from final hidden states, which the workers' extension (`worker.py`) reads in vLLM. An engine without the
extension gives the top k of its public `prompt_logprobs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Literal

import numpy as np
import torch

from switchkd.algo.sampling import SamplingParams, within_top
from switchkd.engines.models.lm_head import LMHeadState
from switchkd.engines.sessions import Session, SessionTable
from switchkd.engines.vllm.engine import Engine, RowRequest
from switchkd.engines.vllm.outputs import Answer, HiddenRows, PublicRows, Rows
from switchkd.types import Blocks, Ragged, Sessions, TeacherOutput, WriteRequest, Written


class VLLMTeacher:
    """A teacher (see base.Teacher) on one vLLM engine, for one caller at a time. `open` computes nothing: the first
    score reads the prompt. The sequences of one call share vLLM's batches."""

    def __init__(self, engine: Engine, *, vocab_size: int, max_sessions: int, max_len: int, lease_s: float = 600.0,
                 output: Literal["hidden_states", "top_logprobs"] = "hidden_states", top_k: int = 64,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.engine, self.vocab_size = engine, vocab_size
        self._output, self._top_k = output, top_k
        self._sessions = SessionTable(max_sessions=max_sessions, max_len=max_len, lease_s=lease_s, clock=clock)
        self._rows: Rows = (
            HiddenRows(engine, vocab_size=vocab_size, kind=output, top_k=top_k)
            if engine.extended
            else PublicRows(engine, vocab_size=vocab_size, top_k=top_k)
        )

    @property
    def num_positions_read(self) -> int:
        """Positions that the model has read, with prompts and repetitions."""
        return self.engine.num_positions_read

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def lm_head_state(self) -> LMHeadState | None:
        """The LM head for the processes that rebuild rows; None unless the teacher sends hidden states."""
        return self._rows.lm_head_state()

    def open(self, sessions: Sessions) -> None:
        """See Teacher. An open session keeps the rows of the common prefix."""
        self._sessions.open(sessions)

    def score(self, blocks: Blocks) -> TeacherOutput:
        """See Teacher. A session that does not reach `base_lens` counts as unknown."""
        sessions = self._appended(blocks)
        jobs = [
            RowRequest(tokens=s.tokens, first=int(first)) for s, first in zip(sessions, blocks.first_rows, strict=True)
        ]
        answers = self._answered(sessions, jobs)
        lengths = np.array([len(answer.rows) for answer in answers])
        return self._rows.teacher_output(torch.cat([answer.rows for answer in answers]), lengths)

    def write(self, request: WriteRequest) -> Written:
        """See Teacher. vLLM makes the draws, see worker.KeyedDraws."""
        self._sessions.check_write(request)
        sessions = self._appended(request.blocks)
        sampling = SamplingParams(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k)
        if self._output == "top_logprobs":
            sampling = within_top(sampling, self._top_k)
        common = {"run_seed": request.run_seed, "purpose": request.purpose, **asdict(sampling)}
        jobs = [
            RowRequest(
                tokens=s.tokens, first=int(first), count=int(count), stop_ids=tuple(request.stop_ids.tolist()),
                draw={**common, "rollout_id": int(rollout_id), "position": int(position), "num_prompt": len(s.tokens),
                      "vocab_size": self.vocab_size},
            )
            for s, first, count, rollout_id, position in zip(
                sessions, request.blocks.first_rows, request.counts, request.rollout_ids, request.positions, strict=True
            )
        ]  # fmt: skip
        answers = self._answered(sessions, jobs)
        for session, answer in zip(sessions, answers, strict=True):
            session.tokens = np.concatenate([session.tokens, answer.token_ids])
        lengths = np.array([len(answer.rows) for answer in answers])
        return Written(
            tokens=Ragged.concat([answer.token_ids for answer in answers], np.int32),
            margins=Ragged.concat([answer.margins for answer in answers], np.float32),
            teacher_output=self._rows.teacher_output(torch.cat([answer.rows for answer in answers]), lengths),
        )

    def close(self, session_ids: np.ndarray) -> None:
        """See Teacher."""
        self._sessions.close(session_ids)

    def _appended(self, blocks: Blocks) -> list[Session]:
        """Append the blocks to their sessions and return the sessions."""
        sessions = self._sessions.named_by(blocks)
        for session, base, new in zip(sessions, blocks.base_lens, blocks.tokens.split(), strict=True):
            session.replace_tokens(np.concatenate([session.tokens[:base], new]))
        return sessions

    def _answered(self, sessions: list[Session], jobs: list[RowRequest]) -> list[Answer]:
        """Answers with the rows from `job.first` on, kept and new ones; the engine computes the missing rows only."""
        kept = [session.kept_rows(job.first, len(job.tokens)) for session, job in zip(sessions, jobs, strict=True)]
        rest = [
            job if part is None else replace(job, first=job.first + len(part))
            for job, part in zip(jobs, kept, strict=True)
        ]
        open_jobs = [i for i, job in enumerate(rest) if job.draw is not None or job.first < len(job.tokens)]
        fresh = dict(zip(open_jobs, self._rows.ask([rest[i] for i in open_jobs]) if open_jobs else [], strict=True))
        answers = []
        for i, (session, job, part) in enumerate(zip(sessions, jobs, kept, strict=True)):
            parts = [] if part is None else [part]
            answer = fresh.get(i, Answer(first=job.first, rows=torch.empty(0), token_ids=[], margins=[]))
            if i in fresh:
                parts.append(answer.rows[rest[i].first - answer.first :])
            session.first, session.rows = job.first, torch.cat(parts)
            answers.append(replace(answer, first=job.first, rows=session.rows))
        return answers
