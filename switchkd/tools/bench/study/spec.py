"""Reads a study file: one task, one student, one teacher, many methods, a few seeds; every cell is an ordinary run.

In: a YAML file (`configs/study/`). Out: a checked `Study` and its `Cell`s, each with the config of its run; or a
ConfigError of one line. A method is a name and its changes of the shared config, as nested keys.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator

from switchkd.config.errors import ConfigError
from switchkd.config.explain import explain
from switchkd.config.loader import parse
from switchkd.config.schema import Config, Section
from switchkd.config.yaml_file import read_yaml

TEACHER, WARM_UP = "teacher", "warm-up"
"""Runs before the cells, and their rows in the table."""

GROWS = {"methods", "seeds", "main", "compare"}
"""Keys of a study that may change after it has begun."""

Overrides = dict[str, Any]


class ModelSize(Section):
    """Size of a small Llama."""

    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt


class Arithmetic(Section):
    """Additions with written-out steps (`arithmetic_task.py`): data and untrained models in the study's folder."""

    type: Literal["arithmetic"]
    digits: tuple[PositiveInt, ...] = Field(min_length=1)
    num_train: PositiveInt
    num_test: PositiveInt
    num_valid: PositiveInt = 100  # for methods that need validation scores (`eval.every`)
    seed: int = 0
    teacher: ModelSize
    student: ModelSize


class Group(Section):
    """Parts of the test set that have scores of their own."""

    field: str = ""  # a field of the rows, such as `digits`: one part for each value
    reference_tokens: tuple[PositiveInt, ...] = ()  # or the lengths of the reference at which the next part begins


class Study(Section):
    name: str
    task: Arithmetic | None = None
    seeds: tuple[int, ...] = Field(min_length=1)
    base: Overrides  # the shared config, without `run.dir`
    teacher: Overrides | None = None  # changes of the run that trains the teacher; null: `base.teacher` is trained
    teacher_at_least: float = 0.0  # least `rank_by` of the teacher; below it the study ends
    warm_up: Overrides | None = None  # changes of the run from whose student a seed's cells start; else `base.student`
    methods: dict[str, Overrides] = Field(min_length=1)
    main: tuple[str, ...] = ()  # methods whose cells run first, and whose curves are in the plot
    compare: tuple[
        tuple[str, str], ...
    ] = ()  # pairs of methods that the table tests, chosen before the scores are known
    test_sets: dict[str, Overrides] = Field(default={"": {}}, min_length=1)
    """Changes of the shared config (`eval`, `data`) by test set. A score without a set's name is that of the set with
    the empty name, else the mean over all sets with equal weights."""
    rank_by: str = "exact_match"
    group: Group = Group()

    @field_validator("methods")
    @classmethod
    def _names(cls, methods: dict[str, Overrides]) -> dict[str, Overrides]:
        for name in methods:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in (TEACHER, WARM_UP):
                raise ValueError(f"the name {name!r} is taken or not made of letters, digits, dots, - and _")
        return methods

    @property
    def digest(self) -> str:
        """Return a digest without the keys that may change in a study that has begun."""
        shared = self.model_dump(mode="json", exclude=GROWS)
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Cell:
    """One method with one seed."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}"


def read_study(path: Path) -> Study:
    """Read and check a study file. Raises ConfigError, also for an invalid config of a method."""
    raw = read_yaml(path, "--study", "configs/study/arithmetic.yaml")
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Study)}") from None
    for name in study.main:
        _check_known(name, study.methods, f"{path}: main")
    for pair in study.compare:
        for name in pair:
            _check_known(name, study.methods, f"{path}: compare")
    _check_configs(study, path)
    return study


def _check_configs(study: Study, path: Path) -> None:
    """Parse every run's config and build its rule and loss before anything is trained."""
    from switchkd.controller.trial import check_stage

    runs = {f"methods.{name}": overrides for name, overrides in study.methods.items()}
    runs |= {f"test_sets.{name}": overrides for name, overrides in study.test_sets.items()}
    before = {TEACHER: study.teacher, WARM_UP: study.warm_up}
    runs |= {name: overrides for name, overrides in before.items() if overrides is not None}
    paths = {"data": "train.jsonl", "eval": "valid.jsonl"} if study.task else {}
    for name, overrides in runs.items():
        try:
            config = configured(study, overrides, Path("unused"), path.parent, **paths)
            for stage in config.train.stages:
                check_stage(stage)
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from None
        if name.startswith("test_sets.") and not study.rank_by.startswith(tuple(config.eval.metrics)):
            known = ", ".join(config.eval.metrics)
            raise ConfigError(f"{path}: {name}: rank_by={study.rank_by} is not scored; eval.metrics has {known}")


def cells(study: Study, methods: Sequence[str] = (), names: Sequence[str] = ()) -> list[Cell]:
    """Return the cells in their order: main methods first, and all methods of a seed before the next seed, so that an
    unfinished grid is balanced. `methods` and cell `names` select some. Raises ConfigError for unknown names."""
    for method in methods:
        _check_known(method, study.methods, "--methods")
    others = [name for name in study.methods if name not in study.main]
    all_cells = [Cell(name, seed) for part in (study.main, others) for seed in study.seeds for name in part]
    for name in names:
        _check_known(name, [cell.name for cell in all_cells], "--cells")
    chosen = [cell for cell in all_cells if cell.method in (methods or study.methods)]
    return [cell for cell in chosen if not names or cell.name in names]


def _check_known(name: str, known: Mapping[str, Any] | Sequence[str], key: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise ConfigError(f"{key}: {name!r} is not known; {hint}")


def configured(study: Study, overrides: Overrides, run_dir: Path, home: Path, **paths: str) -> Config:
    """Return the config of one run. Relative data paths start at `home`; `paths` replace the paths of `data`, `eval`,
    `teacher`, `student` by the study's own. Raises ConfigError."""
    raw = merged(merged(study.base, overrides), {"run": {"dir": str(run_dir), "overwrite": True}})
    for section, key in (("data", "path"), ("eval", "data"), ("teacher", "path"), ("student", "path")):
        name = raw.get(section, {}).get(key) if isinstance(raw.get(section), dict) else None
        if section in paths:
            raw = merged(raw, {section: {key: paths[section]}})
        elif section in ("data", "eval") and isinstance(name, str) and (home / name).exists():
            raw = merged(raw, {section: {key: str((home / name).resolve())}})
    if "student" in paths:  # it exists: `prune` would replace its path
        raw = merged(raw, {"student": {"prune": None}})
    return parse(raw)


def merged(base: Overrides, over: Mapping[str, Any]) -> Overrides:
    """Merge groups of keys and replace all other values; neither argument is changed."""
    result = dict(base)
    for key, value in over.items():
        group = result.get(key)
        result[key] = merged(group, value) if isinstance(group, dict) and isinstance(value, Mapping) else value
    return result


def flat(overrides: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield a method's changes as `learner.loss.type=atkd`."""
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={value}"
