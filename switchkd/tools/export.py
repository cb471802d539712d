"""`switchkd export`: find a run's student, copy it, push it to the model hub.

In: a run folder, and where its student goes. Out: the path of a transformers folder. $HF_TOKEN goes to the hub only.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from switchkd.config.errors import ConfigError, first_line, one_line
from switchkd.config.loader import parse
from switchkd.config.schema import FORMAT
from switchkd.controller.metrics import read_rows
from switchkd.controller.model_card import model_card
from switchkd.controller.resume import written_format
from switchkd.data.atomic_files import CONFIG, METRICS, holds_run, write_text_atomic
from switchkd.engines.models.origin import CARD
from switchkd.engines.models.sources import new_folder


def export_run(run_dir: Path, *, step: int | None = None, out: Path | None = None, push: str | None = None) -> Path:
    """Copy a run's student (`student/`, or that of checkpoint `step`) to `out`, and push it to the hub repository
    `push`, where given. Returns the student's folder. Raises ConfigError."""
    folder = find_student(run_dir) if step is None else _student_of_step(run_dir, step)
    config = _stored_config(run_dir)
    if config is not None and written_format(config) != FORMAT:
        print(
            f"switchkd: {run_dir} was written in format {written_format(config)}, this is format {FORMAT}: the student "
            "is exported, a model card is not made",
            file=sys.stderr,
        )
    token = os.environ.get("HF_TOKEN")
    if push and not token:
        raise ConfigError(f"--push {push} needs a token; set HF_TOKEN in the environment")
    if out is not None:
        out = out.expanduser()
        if out.resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(f"--out {out} lies in the run folder {run_dir}; choose a folder outside of it")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} exists and is not empty; remove it or choose another folder")
        try:  # the disk
            with new_folder(out) as partial:  # renamed when it is whole
                shutil.copytree(folder, partial, dirs_exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written ({one_line(error)}); choose another folder") from None
        folder = out
        if config is not None and step is not None:
            _add_card(folder, run_dir, config, step)
    if push:
        _push(folder, push, str(token))
    return folder


def _stored_config(run_dir: Path) -> dict[str, Any] | None:
    """Read the run's config.yaml; None without one, since any folder with a student may be exported."""
    try:
        stored = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return stored if isinstance(stored, dict) else None


def find_student(run_dir: Path) -> Path:
    """Return `student/` of a run folder. Raises ConfigError."""
    if not run_dir.is_dir():
        state = "is a file" if run_dir.exists() else "does not exist"
        raise ConfigError(f"run folder {run_dir} {state}; give the run.dir of a run")
    folder = run_dir / "student"
    if not (folder / "config.json").is_file():
        if not holds_run(run_dir):
            raise ConfigError(f"{run_dir} holds no run; give the run.dir of a run")
        steps = _steps(run_dir)
        hint = f"take --step {max(steps)}" if steps else "train it to the end, or resume it"
        raise ConfigError(f"run folder {run_dir} has no student yet; {hint}")
    return folder


def _student_of_step(run_dir: Path, step: int) -> Path:
    steps = _steps(run_dir)
    if step not in steps:
        available = f"there are {', '.join(map(str, sorted(steps)))}" if steps else "there is none"
        raise ConfigError(f"run folder {run_dir} has no checkpoint of step {step} with a student; {available}")
    return steps[step]


def _steps(run_dir: Path) -> dict[int, Path]:
    """Map each checkpoint's step to its student folder. Half-written checkpoints have another name."""
    students = [path.parent for path in (run_dir / "checkpoints").glob("step-*/student/config.json")]
    numbers = [student.parent.name.removeprefix("step-") for student in students]
    return {int(number): student for number, student in zip(numbers, students, strict=True) if number.isdigit()}


def _add_card(folder: Path, run_dir: Path, stored: dict[str, Any], step: int) -> None:
    """Write the model card of a checkpoint's student, from the run's metrics before `step`."""
    try:
        config = parse(stored)
        rows = read_rows(run_dir / METRICS)
    except (OSError, ConfigError):
        return  # the card is optional
    scores = [(row["stage_end"], row) for row in rows if row["step"] < step and "stage_end" in row]
    write_text_atomic(folder / CARD, model_card(run_dir, config, scores, step))


def _push(folder: Path, repo: str, token: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:  # the network, and the user's rights on the hub
        api.create_repo(repo, exist_ok=True, private=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a student trained with switchkd")
    except Exception as error:
        raise ConfigError(f"--push {repo} failed: {first_line(error).replace(token, '***')}") from None
