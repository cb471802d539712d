"""Files that survive a crash: whole or not at all.

In: a path and what shall stand there. Out: the file, written beside, fsynced, renamed; a reader sees the old one or
the new one. A killed writer leaves `<name>.tmp`, which the next write of that file replaces. A whole folder is sealed:
one file in it tells the sizes and checksums of all others.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values never reach a file of ours."""


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
    """NaN and infinity become null, NumPy values plain ones."""
    write_text_atomic(path, json.dumps(json_safe(obj), indent=1, allow_nan=False) + "\n")


def append_whole(path: Path, text: str) -> None:
    """Add to a file all or nothing: OSError, for instance of a full disk, leaves it as it was."""
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
    """Put a finished folder in the place of an older one. Killed in between, the older one is `<name>.old`."""
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
    """Make the names in a folder durable: a rename alone may be lost with the power."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def seal(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Push all files of a folder to the disk and write `name`: `content`, and each file's size and checksum."""
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
    """The content that `seal` wrote. Raises ValueError or OSError when anything in the folder is not as it was."""
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
    """The same tree in values that strict JSON knows."""
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


def redact(text: str) -> str:
    """Take tokens out of a text: the values of SECRETS and whatever looks like a hub token."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        text = text.replace(value, "***") if len(value) >= 8 else text
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(sealed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


CONFIG = "config.yaml"


TEACHER_OUTPUT = "teacher_output"
"""Of `rollout.save_teacher_output`: a file per step, `step-00000012.safetensors`, and the teachers' output heads."""


HISTORY = ("metrics.jsonl", "rollouts.jsonl")


QUARANTINED = "quarantined.jsonl"
