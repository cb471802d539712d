"""Compares the memory that a run needs on this machine with what is free, and names the changes that save some.

In: a config with model folders. Out: a `MemoryFit`. The formulas are those of `memory.py`; only roles on the CPU count,
because a GPU that is full raises an error, while a host that is full kills processes of other users. With several
teachers the copies of all but the largest output matrix are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from switchkd.config import resources
from switchkd.config.schema import Config, LoraConfig, ModelConfig
from switchkd.controller.memory import GIB, memory
from switchkd.engines.build import device_of, max_len
from switchkd.engines.cpu_dtype import SLOW, bfloat16_slowdown
from switchkd.engines.models.shape import Shape, read_shape, shapes

LIBRARIES = 0.6 * GIB
"""Memory of torch, transformers and Ray in every process."""
MIN_SAVING = 0.1
"""Share of the missing memory that a change must save to be named."""
MAX_CHANGES = 4

Sizes = dict[str, dict[str, Shape]]
"""By a teacher's name: the shapes of `student` and `teacher`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFit:
    needed: dict[str, float]  # bytes of all processes of a role, and of their libraries
    free: float
    remedy: str  # empty where it fits

    @property
    def fits(self) -> bool:
        return sum(self.needed.values()) <= self.free

    @property
    def text(self) -> str:
        by_role = ", ".join(f"{role} {size / GIB:.3g}" for role, size in self.needed.items())
        return f"about {sum(self.needed.values()) / GIB:.3g} GiB ({by_role}) of {self.free / GIB:.3g} free"


def memory_fit(config: Config) -> MemoryFit:
    """Return whether the processes of a private cluster, or of a run in one process, fit. Raises ConfigError."""
    free = free_bytes()
    if not any(_on_host(config, role) for role in resources.counts(config)):
        return MemoryFit(needed={}, free=free, remedy="")
    sizes = shapes_by_teacher(config)
    needed = _needed(config, sizes)
    missing = sum(needed.values()) - free
    return MemoryFit(needed=needed, free=free, remedy="" if missing <= 0 else _remedy(config, sizes, missing))


def in_one_process(config: Config) -> Config:
    """Return the config of a run with one worker and one learner rank in this process, as `doctor` tries it."""
    changed = {
        "run": config.run.model_copy(update={"mode": "inprocess"}),
        "learner": config.learner.model_copy(update={"num_ranks": 1}),
    }
    return config.model_copy(update=changed)


def free_bytes() -> float:
    """Return the host's available memory; infinity where it is not known."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return float(kilobytes[0]) * 1024 if kilobytes else float("inf")


def shapes_by_teacher(config: Config) -> Sizes:
    """Return the shapes of `student` and `teacher` for each teacher's name; "" where there is none."""
    sizes = shapes(config)
    names = config.teacher_names or ("",)
    others = {name: read_shape(config.of_teacher(name).teacher, f"teachers.{name}.path") for name in names[1:]}
    return {name: sizes | ({"teacher": others[name]} if name in others else {}) for name in names}


def _needed(config: Config, sizes: Sizes) -> dict[str, float]:
    """Return the bytes of all processes of each role on this machine's CPU."""
    each: dict[str, float] = {}
    for name, shapes_of_run in sizes.items():
        for role, parts in memory(config.of_teacher(name), shapes_of_run).items():
            key = resources.role_of(name) if role == "teacher" else role
            each[key] = max(each.get(key, 0.0), sum(parts.values()))
    single = config.run.mode == "inprocess"
    numbers = {role: 1 if single else num for role, num in resources.counts(config).items() if _on_host(config, role)}
    needed = {role: each[role] * num for role, num in numbers.items()}
    return needed | {"libraries": LIBRARIES * (1 if single else sum(numbers.values()))}


def _on_host(config: Config, role: str) -> bool:
    if config.run.mode == "ray":
        return not resources.of_role(config, role).num_gpus
    section = config.student if role in ("rollout", "learner") else _teacher(config, role)
    return device_of(section) == "cpu"


def _teacher(config: Config, role: str) -> ModelConfig:
    return config.of_teacher(role.removeprefix("teachers.")).teacher


def _remedy(config: Config, sizes: Sizes, missing: float) -> str:
    """Name the changes that save a part of the missing memory, largest first, and the models that take as much."""
    needed = _needed(config, sizes)
    saved = []
    for text, changed in _changes(config):
        changes_shape = changed.learner.lora != config.learner.lora
        rest = _needed(changed, shapes_by_teacher(changed) if changes_shape else sizes)
        saved.append((sum(needed.values()) - sum(rest.values()), text))
    helpful = sorted(((size, text) for size, text in saved if size >= MIN_SAVING * missing), reverse=True)
    parts = [f"set {text} (saves {size / GIB:.2g} GiB)" for size, text in helpful[:MAX_CHANGES]]
    teachers = sum(size for role, size in needed.items() if role.startswith("teacher"))
    students = needed.get("rollout", 0.0) + needed.get("learner", 0.0)
    models = [name for name, size in (("teacher", teachers), ("student", students)) if size >= MIN_SAVING * missing]
    return ", or ".join([*parts, *(f"take a smaller {name}" for name in models)]) or "end other programs"


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield changes that may save memory, each with its effect on the config; `_remedy` measures them."""
    teacher, student, learner, rollout = config.teacher, config.student, config.learner, config.rollout
    fast = bfloat16_slowdown() < SLOW
    if learner.lora is None:
        yield _changed(config, "learner", "lora", LoraConfig(), "{}")
    if not learner.gradient_checkpointing:
        yield _changed(config, "learner", "gradient_checkpointing", True)
    if learner.micro_batch_tokens > max_len(config):
        yield _changed(config, "learner", "micro_batch_tokens", max_len(config))
    if learner.dtype == "float32" and fast:
        yield _changed(config, "learner", "dtype", "bfloat16")
    for role, section in (("teacher", teacher), ("student", student)):
        if role == "teacher" and config.teachers:
            continue
        if section.prepack != "off":
            yield _changed(config, role, "prepack", "off")
        if section.dtype == "float32" and fast:
            yield _changed(config, role, "dtype", "bfloat16")
    if rollout.batch_size > 1:
        yield _changed(config, "rollout", "batch_size", rollout.batch_size // 2)
    if teacher.max_sessions > rollout.batch_size:
        yield _changed(config, "teacher", "max_sessions", rollout.batch_size)
    if config.run.mode == "ray" and resources.counts(config).get("rollout", 0) > 1:
        yield _changed(config, "rollout", "num_workers", 1)


def _changed(config: Config, section: str, key: str, value: object, text: str = "") -> tuple[str, Config]:
    changed = getattr(config, section).model_copy(update={key: value})
    shown = text or str(value).lower()
    return f"{section}.{key}={shown}", config.model_copy(update={section: changed})
