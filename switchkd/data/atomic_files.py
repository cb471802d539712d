"""Writes files that a crash leaves complete or absent.

In: a path and its content. Out: the file, written beside, fsynced, renamed: a reader sees the old one or the new one. A
killed writer leaves `<name>.tmp`, which the next write of that file replaces. `seal` protects a whole folder: one file
in it lists the sizes and checksums of all others.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")
"""Environment variables whose values are never written to a file."""

CONFIG = "config.yaml"
PROMPTS = "prompts.sha256"
METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
HISTORY = (METRICS, ROLLOUTS)
QUARANTINED = "quarantined.jsonl"
TEACHER_OUTPUT = "teacher_output"
"""Folder of trained rollouts: a file per step, `step-00000012.safetensors`, until a checkpoint deletes them; with
`rollout.save_teacher_output` of all steps, and the teachers' LM heads."""


def holds_run(folder: Path) -> bool:
    """Whether a folder has a file of a run, whatever its state."""
    return any((folder / name).exists() for name in (CONFIG, "checkpoints", *HISTORY))


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place. One writer per path."""
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    fsync_file(beside)
    os.replace(beside, path)
    fsync_dir(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    write_atomic(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write JSON; NaN and infinity become null, NumPy values plain ones."""
    write_text_atomic(path, json.dumps(json_safe(obj), indent=1, allow_nan=False) + "\n")


def append_whole(path: Path, text: str) -> None:
    """Append all of `text` or nothing: an OSError, for instance of a full disk, leaves the file unchanged."""
    rest = memoryview(text.encode("utf-8"))
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:  # the disk
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def replace_dir(new: Path, path: Path) -> None:
    """Replace a folder by a finished one. After a kill in between, the older one is `<name>.old`."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(new, path)
    fsync_dir(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable: a rename alone may be lost in a power failure."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def seal(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Fsync all files of a folder and write `name`: `content`, and each file's size and checksum."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != name]
    files = {}
    for path in paths:
        if path.is_file():
            fsync_file(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    for path in (*(path for path in paths if path.is_dir()), folder):
        fsync_dir(path)
    sealed = {**json_safe(content), "files": files}
    write_json_atomic(folder / name, {**sealed, "checksum": _checksum(sealed)})


def unseal(folder: Path, name: str) -> dict[str, Any]:
    """Return the content that `seal` wrote. Raises ValueError or OSError where a file of the folder changed."""
    sealed = json.loads((folder / name).read_text(encoding="utf-8"))
    if not isinstance(sealed, dict) or sealed.pop("checksum", "") != _checksum(sealed):
        raise ValueError(f"{name} was changed")
    for file, expected in sealed.pop("files").items():
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{file} is missing")
        if path.stat().st_size != expected["size"]:
            raise ValueError(f"{file} has {path.stat().st_size} of {expected['size']} bytes")
        if _sha256(path) != expected["sha256"]:
            raise ValueError(f"{file} does not have the checksum it was saved with")
    return sealed


def json_safe(obj: Any) -> Any:
    """Return the same tree in values of strict JSON."""
    if isinstance(obj, dict):
        return {str(key): json_safe(value) for key, value in obj.items()}
    if isinstance(obj, np.ndarray):
        return json_safe(obj.tolist())
    if isinstance(obj, list | tuple):
        return [json_safe(value) for value in obj]
    if isinstance(obj, np.generic):
        return json_safe(obj.item())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """One line of strict JSON per row."""
    return "".join(json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def redact(text: str) -> str:
    """Replace the values of SECRETS, and strings of the form of a hub token, by ***."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        text = text.replace(value, "***") if len(value) >= 8 else text
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(sealed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
