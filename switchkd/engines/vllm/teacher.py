"""The production teacher: vLLM behind the Teacher protocol, with paged caches, tensor parallelism and its own kernels.

In: sessions and blocks. Out: `signal: hidden` or `topk`. A session is nothing but its tokens: vLLM's prefix cache holds
what was read, by content, so a block at the end of a long prefix costs its own tokens and at most one cache block more.

`interface: extension` (exact) takes final hidden states out of vLLM's workers, see vllm_worker.py. `public` reads the
top k from `prompt_logprobs`, for a vLLM whose workers cannot be extended: the tail's entropy is not known there.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import gc
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from switchkd.config.loader import ConfigError
from switchkd.config.teacher_backend import SPLITS
from switchkd.engines.models.lm_head import HeadArrays
from switchkd.engines.sessions import Session, SessionTable, split
from switchkd.engines.vllm.outputs import Answer, HiddenRows, Job, PublicRows, Rows
from switchkd.types import Blocks, Positions, Sessions, Signal, WriteRequest, Written

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process: it starts and steps faster
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise every engine of a machine sits on its first core
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process whose OpenMP threads have worked hangs
    "OMP_WAIT_POLICY": "PASSIVE",  # OpenMP threads that spin bring a busy machine to a halt
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_CPU_CACHE_BYTES = 2**30


class Engine:
    """vLLM itself, one per process. `arguments` are vLLM's own and pass through as they are."""

    def __init__(self, path: str, *, dtype: str, max_len: int, max_sessions: int, revision: str | None = None,
                 trust_remote_code: bool = False, interface: Literal["extension", "public"] = "extension",
                 arguments: dict[str, Any] | None = None) -> None:  # fmt: skip
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams

        self.path, self.revision, self.trust_remote_code = path, revision, trust_remote_code
        self.dtype, self.max_len, self.extended = getattr(torch, dtype), max_len, interface == "extension"
        self.num_positions_read = 0
        given = dict(arguments or {})
        _check_arguments(given)
        settings = {
            "model": path, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
            "max_model_len": max_len + 1,  # vLLM wants room for one token to write
            "max_num_seqs": min(max_sessions, 256), "max_logprobs": -1, "skip_tokenizer_init": True,
            "enable_prefix_caching": True, "load_format": "safetensors", **_of_platform(given), **_of_workers(given),
            **given,
            "async_scheduling": False,  # a draw counts the tokens that were written before it
            "logits_processors": ["switchkd.engines.vllm.worker:KeyedDraws"],
        }  # fmt: skip
        if self.extended:
            settings["worker_extension_cls"] = "switchkd.engines.vllm.worker.RowReader"
        self._keys = (f"switchkd-{i}" for i in itertools.count())
        self._params = SamplingParams
        self._can_skip_cache = hasattr(SamplingParams(), "skip_reading_prefix_cache")
        self._llm: Any = LLM(**settings)
        atexit.register(self.close)
        if self.extended:
            try:
                self.call("switchkd_watch")
            except BaseException:
                self.close()
                raise

    def call(self, method: str, *args: Any) -> list[Any]:
        """Of every worker, its answer."""
        return self._llm.collective_rpc(method, args=args)

    def run(self, jobs: Sequence[Job], *, cached: bool = True, **wanted: Any) -> list[tuple[str, Any]]:
        """Key and vLLM's output of each job. `cached` may read what earlier requests left; `wanted` are fields of
        SamplingParams."""
        keys = [next(self._keys) for _ in jobs]
        prompts, params = [], []
        for key, job in zip(keys, jobs, strict=True):
            salt = {} if cached or self._can_skip_cache else {"cache_salt": key}
            prompts.append({"prompt_token_ids": job.tokens.tolist(), **salt})
            skip = {"skip_reading_prefix_cache": not cached} if self._can_skip_cache else {}
            params.append(
                self._params(
                    temperature=0.0, max_tokens=job.count, stop_token_ids=list(job.stop_ids), ignore_eos=True,
                    detokenize=False, extra_args={"switchkd": {"key": key, "first": job.first, "draw": job.draw}},
                    **skip, **wanted,
                )
            )  # fmt: skip
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        for job, output in zip(jobs, outputs, strict=True):
            written = len(output.outputs[0].token_ids)
            self.num_positions_read += len(job.tokens) - (output.num_cached_tokens or 0) + written - 1
        return list(zip(keys, outputs, strict=True))

    def close(self) -> None:
        """End the engine and the workers that it started. Twice is harmless."""
        atexit.unregister(self.close)
        if self._llm is None:
            return
        if self.extended:
            self.call("switchkd_leave")
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()  # what vLLM keeps for the process goes with its engine, which must be before the next one comes


class VLLMTeacher:
    """A teacher (see base.Teacher) on one vLLM engine. Opening is free: the first score reads the prompt. One caller at
    a time; the sequences of one call share vLLM's batches."""

    def __init__(self, engine: Engine, *, vocab_size: int, max_sessions: int, max_len: int, lease_s: float = 600.0,
                 signal: Literal["hidden", "topk"] = "hidden", top_k: int = 64,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.engine, self.vocab_size = engine, vocab_size
        self._sessions = SessionTable(max_sessions=max_sessions, max_len=max_len, lease_s=lease_s, clock=clock)
        self._rows: Rows = (
            HiddenRows(engine, vocab_size=vocab_size, kind=signal, top_k=top_k)
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

    def head_arrays(self) -> HeadArrays | None:
        """The head as it travels to everybody who rebuilds rows; None where no hidden states travel."""
        return self._rows.head_arrays()

    def open(self, sessions: Sessions) -> None:
        """See Teacher. A session that is already held keeps what was answered of a common beginning."""
        self._sessions.open(sessions)

    def score(self, blocks: Blocks) -> Signal:
        """See Teacher. A session that does not reach `base_lens` counts as unknown."""
        sessions = self._appended(blocks)
        jobs = [Job(tokens=s.tokens, first=int(first)) for s, first in zip(sessions, blocks.first_rows, strict=True)]
        answers = self._answered(sessions, jobs)
        lengths = np.array([len(answer.rows) for answer in answers])
        return self._rows.signal(torch.cat([answer.rows for answer in answers]), lengths)

    def write(self, request: WriteRequest) -> Written:
        """See Teacher. The draws are made inside vLLM, see vllm_worker.KeyedDraws."""
        self._sessions.check_write(request)
        sessions = self._appended(request.blocks)
        law = {name: getattr(request, name) for name in ("run_seed", "purpose", "temperature", "top_p", "top_k")}
        jobs = [
            Job(
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
            token_ids=np.concatenate([np.array(answer.token_ids, np.int32) for answer in answers]),
            lengths=np.array([len(answer.token_ids) for answer in answers], np.int32),
            margins=np.concatenate([np.array(answer.margins, np.float32) for answer in answers]),
            signal=self._rows.signal(torch.cat([answer.rows for answer in answers]), lengths),
        )

    def exact(self, question: Positions) -> Signal:
        """See Teacher. What was answered last is still here; older rows are read again."""
        found = [(session, positions) for _, session, positions in self._sessions.of_question(question)]
        return self._rows.exact(found, question.lengths)

    def close(self, session_ids: np.ndarray) -> None:
        """See Teacher."""
        self._sessions.close(session_ids)

    def _appended(self, blocks: Blocks) -> list[Session]:
        """The blocks' sessions with their new tokens."""
        sessions = self._sessions.of_blocks(blocks)
        for session, base, new in zip(sessions, blocks.base_lens, split(blocks.token_ids, blocks.lengths), strict=True):
            session.become(np.concatenate([session.tokens[:base], new]))
        return sessions

    def _answered(self, sessions: list[Session], jobs: list[Job]) -> list[Answer]:
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
            session.keep(job.first, rows)
            answers.append(replace(answer, first=job.first, rows=rows))
        return answers


def _check_arguments(given: dict[str, Any]) -> None:
    """ConfigError for a name that vLLM does not know."""
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"teacher.engine.{name} is no argument of this vLLM; {hint}see vLLM's engine arguments")


def _of_platform(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults that suit a CPU: small blocks (a cut prefix is read again from the last whole one), no compilation, and
    a cache that leaves the machine its memory."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    settings: dict[str, Any] = {"block_size": 32, "enforce_eager": True}
    if "gpu_memory_utilization" not in given and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        settings["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    return settings


def _of_workers(given: dict[str, Any]) -> dict[str, Any]:
    """Several workers are processes of this one, on its node. Left to itself, vLLM would see the replica's placement
    group and start Ray actors, one in a bundle each; all of the replica's GPUs are one bundle, which it refuses."""
    several = any((given.get(name) or 1) > 1 for name in SPLITS)
    return {"distributed_executor_backend": "mp"} if several else {}


def _none_of(rows: torch.Tensor | None) -> torch.Tensor:
    assert rows is not None
    return rows[:0]
