"""Makes the config of `switchkd eval`.

In: a model folder, hub name or run folder, and options. Out: a checked Config whose student is that model. Options and
overrides take precedence over the config of a run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.loader import apply_override, load, parse, resolved
from switchkd.config.schema import Config
from switchkd.controller.evaluation import WITH_TEACHER
from switchkd.tools.export import find_student

_NO_TEACHER = {"name": "evaluation", "steps": 0, "mix": {"dataset": 1.0}, "loss": {"type": "cross_entropy"}}
_WITH_TEACHER = {"name": "evaluation", "steps": 0, "mix": {"rollout": 1.0}, "loss": {"type": "forward_kl"}}


def eval_config(
    *,
    model: str,
    data: str | None = None,
    teacher: str | None = None,
    metrics: Sequence[str] | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the config; without a teacher (option or config) with the metrics that need none. Raises ConfigError."""
    folder = Path(model).expanduser()
    is_run = (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()
    if folder.is_dir() and not is_run and not (folder / "config.json").is_file():
        raise ConfigError(f"{model} is neither a model's folder (config.json) nor a run's (config.yaml)")
    file = config or (folder / "config.yaml" if is_run else None)
    # an evaluation selects nothing: the config of a run that did may be tested on the test split
    base = load(file, [*overrides, "eval.allow_test_selection=true"]) if file else _minimal(model, overrides)
    if is_run and base.is_fake:
        raise ConfigError(f"{model} is a run of fake models: its student writes no text; evaluate a run of real ones")
    compared = bool(teacher) or (file is not None and any(stage.needs_teacher for stage in base.train.stages))
    raw = resolved(base)
    raw["student"] |= {"path": str(find_student(folder) if is_run else model), "prune": None}
    raw |= {"learner": {}, "replay": {}}
    raw["rollout"] |= {"rule": {"type": "student"}, "recorded": ""}
    raw["train"] = {"stages": [_WITH_TEACHER if compared else _NO_TEACHER]}
    if teacher:
        raw["teacher"] |= {"path": teacher, "attach": ""}
        raw["teachers"], raw["resources"]["teachers"] = {}, {}
    if data:
        raw["eval"]["data"] = str(Path(data).expanduser().resolve()) if Path(data).expanduser().exists() else data
    if not raw["eval"]["data"]:
        raise ConfigError("eval needs data; give --data FILE, or eval.data=FILE")
    raw["data"] |= {"path": raw["eval"]["data"], "split": raw["eval"]["split"]}  # no other data is read
    raw["eval"]["metrics"] = _metrics(metrics, raw["eval"]["metrics"], compared)
    return parse(raw)


def _metrics(requested: Sequence[str] | None, default: Sequence[str], compared: bool) -> list[str]:
    if requested is None:
        return [name for name in default if compared or name not in WITH_TEACHER]
    with_teacher = [name for name in requested if name in WITH_TEACHER]
    if with_teacher and not compared:
        raise ConfigError(f"--metric {with_teacher[0]} compares with a teacher; give --teacher MODEL")
    return list(requested)


def _minimal(model: str, overrides: Sequence[str]) -> Config:
    raw: dict[str, Any] = {"run": {"dir": "."}, "student": {"path": model}, "train": {"stages": [_WITH_TEACHER]}}
    for override in overrides:
        apply_override(raw, override)
    return parse(raw)
