"""One vLLM engine in this process, its arguments checked."""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import gc
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from switchkd.config.errors import ConfigError
from switchkd.config.teacher_backend import SPLITS

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process: it starts and steps faster
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise all engines of a machine run on its first core
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with used OpenMP threads hangs
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning OpenMP threads stall a busy machine
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_CPU_CACHE_BYTES = 2**30


class Engine:
    """vLLM itself, one per process. `arguments` are vLLM's engine arguments, passed unchanged. Without the workers'
    extension (`extended` False) only its public log-probs are available."""

    def __init__(self, path: str, *, dtype: str, max_len: int, max_sessions: int, revision: str | None = None,
                 trust_remote_code: bool = False, extended: bool = True,
                 arguments: dict[str, Any] | None = None) -> None:  # fmt: skip
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, SamplingParams

        self.path, self.revision, self.trust_remote_code = path, revision, trust_remote_code
        self.dtype, self.max_len, self.extended = getattr(torch, dtype), max_len, extended
        self.num_positions_read = 0
        arguments = dict(arguments or {})
        _check_arguments(arguments)
        settings = {
            "model": path, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
            "max_model_len": max_len + 1,  # vLLM always generates one token
            "max_num_seqs": min(max_sessions, 256), "max_logprobs": -1, "skip_tokenizer_init": True,
            "enable_prefix_caching": True, "load_format": "safetensors",
            **_cpu_defaults(arguments), **_executor_default(arguments), **arguments,
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
        """Call a method of the workers' extension. Returns one answer per worker."""
        return self._llm.collective_rpc(method, args=args)

    def run(self, jobs: Sequence[RowRequest], *, cached: bool = True, **options: Any) -> list[tuple[str, Any]]:
        """Key and vLLM's output of each job. `cached` allows prefix cache hits; `options` are fields of
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
                    **skip, **options,
                )
            )  # fmt: skip
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        for job, output in zip(jobs, outputs, strict=True):
            written = len(output.outputs[0].token_ids)
            self.num_positions_read += len(job.tokens) - (output.num_cached_tokens or 0) + written - 1
        return list(zip(keys, outputs, strict=True))

    def close(self) -> None:
        """End the engine and the workers that it started. A second call does nothing."""
        atexit.unregister(self.close)
        if self._llm is None:
            return
        if self.extended:
            self.call("switchkd_leave")
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()  # vLLM's state of the process is freed with its engine, which must precede the next engine


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ConfigError for a name that vLLM does not know."""
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"teacher.engine.{name} is no argument of this vLLM; {hint}see vLLM's engine arguments")


def _cpu_defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments for a CPU: small blocks (a cut prefix is read again from its last whole block), no compilation,
    and a bounded cache. Empty on other platforms."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    settings: dict[str, Any] = {"block_size": 32, "enforce_eager": True}
    if "gpu_memory_utilization" not in arguments and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        settings["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    return settings


def _executor_default(arguments: dict[str, Any]) -> dict[str, Any]:
    """Make several workers child processes of this one, on its node. By default vLLM would see the replica's placement
    group and start one Ray actor per bundle; all of the replica's GPUs are one bundle, which vLLM refuses."""
    several = any((arguments.get(name) or 1) > 1 for name in SPLITS)
    return {"distributed_executor_backend": "mp"} if several else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRequest:
    """One request to vLLM: read tokens, then generate."""

    tokens: np.ndarray  # int64 [P]
    first: int  # first requested row; the rows end with that of the last token read
    count: int = 1  # tokens to write; vLLM writes at least 1, which is ignored where there is no draw
    draw: dict[str, Any] | None = None
    stop_ids: tuple[int, ...] = ()
