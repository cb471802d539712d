"""The production teacher: vLLM behind the Teacher protocol, with paged caches, tensor parallelism and its own kernels.

In: sessions and blocks. Out: `teacher.output: hidden_states` or `top_logprobs`. A session is nothing but its tokens:
vLLM's prefix cache holds what was read, by content, so a block at the end of a long prefix costs its own tokens and at
most one cache block more.

Rows come from final hidden states, which the workers' extension takes out of vLLM (`worker.py`). An engine without the
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
    """A teacher (see base.Teacher) on one vLLM engine. Opening is free: the first score reads the prompt. One caller at
    a time; the sequences of one call share vLLM's batches."""

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
        """Positions that the model has read, prompts and repetitions included."""
        return self.engine.num_positions_read

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def lm_head_state(self) -> LMHeadState | None:
        """The head as it travels to every process that rebuilds rows; None unless hidden states travel."""
        return self._rows.lm_head_state()

    def open(self, sessions: Sessions) -> None:
        """See Teacher. A session that is already held keeps what was answered of a common beginning."""
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
        """See Teacher. The draws are made inside vLLM, see vllm_worker.KeyedDraws."""
        self._sessions.check_write(request)
        sessions = self._appended(request.blocks)
        sampling = SamplingParams(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k)
        if self._output == "top_logprobs":
            sampling = within_top(sampling, self._top_k)
        law = {"run_seed": request.run_seed, "purpose": request.purpose, **asdict(sampling)}
        jobs = [
            RowRequest(
                tokens=s.tokens, first=int(first), count=int(count), stop_ids=tuple(request.stop_ids.tolist()),
                draw={**law, "rollout_id": int(rollout_id), "position": int(position), "num_prompt": len(s.tokens),
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
        """The blocks' sessions with their new tokens."""
        sessions = self._sessions.of_blocks(blocks)
        for session, base, new in zip(sessions, blocks.base_lens, blocks.tokens.split(), strict=True):
            session.become(np.concatenate([session.tokens[:base], new]))
        return sessions

    def _answered(self, sessions: list[Session], jobs: list[RowRequest]) -> list[Answer]:
        """Rows from `job.first` on, kept ones and new ones; only what is missing is asked for."""
        kept = [session.kept(job.first, len(job.tokens)) for session, job in zip(sessions, jobs, strict=True)]
        rest = [
            job if part is None else replace(job, first=job.first + len(part))
            for job, part in zip(jobs, kept, strict=True)
        ]
        open_jobs = [i for i, job in enumerate(rest) if job.draw is not None or job.first < len(job.tokens)]
        fresh = dict(zip(open_jobs, self._rows.ask([rest[i] for i in open_jobs]) if open_jobs else [], strict=True))
        answers = []
        for i, (session, job) in enumerate(zip(sessions, jobs, strict=True)):
            answer = fresh.get(i) or Answer(first=len(job.tokens), rows=_none_of(kept[i]), token_ids=[], margins=[])
            rows = answer.rows[rest[i].first - answer.first :] if i in fresh else answer.rows
            rows = rows if kept[i] is None else torch.cat([kept[i], rows])  # type: ignore[list-item]
            session.first, session.rows = job.first, rows
            answers.append(replace(answer, first=job.first, rows=rows))
        return answers


def _none_of(rows: torch.Tensor | None) -> torch.Tensor:
    assert rows is not None
    return rows[:0]
