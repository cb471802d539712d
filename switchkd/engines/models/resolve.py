"""Replaces `demo` and `student.prune` in a config by model folders, made once in the user's cache.

In: a config. Out: the config with folders in their place, so that later processes fetch and prune nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from switchkd.config.schema import Config, DepthPruneConfig, ModelConfig
from switchkd.engines.models.demo import cache_dir, resolve_path
from switchkd.engines.models.depth_prune import prune_depth
from switchkd.engines.models.sources import looks_local


def reads_teacher(config: Config) -> bool:
    """Whether the run needs the teacher's folder, also if only to prune the student from it."""
    return config.needs_teacher or config.student.prune is not None


def resolve_models(config: Config) -> Config:
    """The config with `demo` fetched and the student pruned. Both folders are on this machine: on a cluster without a
    shared home set $SWITCHKD_CACHE to shared storage."""
    teacher, teachers, student = config.teacher, config.teachers, config.student
    if config.needs_teacher:
        teachers = {name: each.model_copy(update={"path": resolve_path(each.path)}) for name, each in teachers.items()}
    if reads_teacher(config) and (not teachers or student.prune is not None):
        teacher = teacher.model_copy(update={"path": resolve_path(teacher.path)})
    folder = resolve_path(student.path) if student.prune is None else str(prune_student(teacher, student.prune))
    student = student.model_copy(update={"path": folder, "prune": None})
    return config.model_copy(update={"teacher": teacher, "teachers": teachers, "student": student})


def prune_student(teacher: ModelConfig, prune: DepthPruneConfig) -> Path:
    """The folder of the pruned teacher, made if necessary. Its name has a digest of the teacher's files and layers."""
    from filelock import FileLock

    digest = hashlib.sha256(f"{_fingerprint(teacher)} {prune.layers} {prune.num_layers}".encode()).hexdigest()[:12]
    num = prune.num_layers or len(prune.layers or ())
    folder = cache_dir() / "cuts" / f"{Path(teacher.path).name}-{num}-layers-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            prune_depth(
                teacher.path,
                folder,
                layers=prune.layers,
                num_layers=prune.num_layers,
                revision=teacher.revision,
                trust_remote_code=teacher.trust_remote_code,
            )
    return folder


def _fingerprint(model: ModelConfig) -> str:
    """A text that changes when the model's files change."""
    if not looks_local(model.path):
        return f"{model.path}@{model.revision}"
    folder = Path(model.path).expanduser().resolve()
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".jinja")]
    return f"{folder} " + " ".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)
