"""Replaces `demo` and `student.prune` in a config by model folders, made once in the user's cache.

In: a config, and texts on which layers are chosen. Out: the config with folders in their place, so that later processes
fetch and prune nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from switchkd.config.schema import Config, DepthPruneConfig, ModelConfig
from switchkd.engines.models.demo import cache_dir, resolve_path
from switchkd.engines.models.depth_prune import prune_depth
from switchkd.engines.models.layer_importance import Texts, is_measured
from switchkd.engines.models.sources import fingerprint


def reads_teacher(config: Config) -> bool:
    """Whether the run needs the teacher's folder, also if only to prune the student from it."""
    return config.needs_teacher or config.student.prune is not None


def resolve_models(config: Config, texts: Texts) -> Config:
    """The config with `demo` fetched and the student pruned, its layers chosen on `texts`. Both folders are on this
    machine: on a cluster without a shared home set $SWITCHKD_CACHE to shared storage."""
    teacher, teachers, student = config.teacher, config.teachers, config.student
    if config.needs_teacher:
        teachers = {name: each.model_copy(update={"path": resolve_path(each.path)}) for name, each in teachers.items()}
    if reads_teacher(config) and (not teachers or student.prune is not None):
        teacher = teacher.model_copy(update={"path": resolve_path(teacher.path)})
    folder = resolve_path(student.path) if student.prune is None else str(prune_student(teacher, student.prune, texts))
    student = student.model_copy(update={"path": folder, "prune": None})
    return config.model_copy(update={"teacher": teacher, "teachers": teachers, "student": student})


def without_pruning(config: Config) -> Config:
    """The config with the teacher's folder, which has the same tokenizer, for a student that is still to be pruned."""
    if config.student.prune is None:
        return config
    student = config.student.model_copy(update={"path": config.teacher.path, "prune": None})
    return config.model_copy(update={"student": student})


def prune_student(teacher: ModelConfig, prune: DepthPruneConfig, texts: Texts) -> Path:
    """The folder of the pruned teacher, made if necessary. Its name has a digest of the teacher's files, of `prune`,
    and of the texts on which the layers are chosen."""
    from filelock import FileLock

    key = f"{fingerprint(teacher)} {prune} {texts if is_measured(prune) else ''}"
    num = prune.num_layers or len(prune.layers or ())
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = cache_dir() / "cuts" / f"{Path(teacher.path).name}-{num}-layers-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            prune_depth(teacher, prune, folder, texts)
    return folder
