"""Loads one YAML file with dotted overrides into one checked `Config`.

In: a path and overrides such as `rollout.num_workers=2`. Out: a frozen tree of sections (`schema.py`), or a ConfigError
whose text names the key, the value and the remedy. Imports nothing heavy, so that errors come at once. Defaults from a
paper depend on the rule (see `SAMPLING_OF_RULE`); `resolved()` has them filled in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from switchkd.config.contradictions import check_across, is_hub_name, stage_key
from switchkd.config.errors import ConfigError
from switchkd.config.explain import explain, unknown_value, value_types
from switchkd.config.schema import Config, SamplingConfig, StageConfig
from switchkd.config.secret_keys import check_no_secrets
from switchkd.config.yaml_file import read_value, read_yaml

ALIASES = {"switch": "jsd_threshold", "adaswitch": "kl_spike", "skd": "outside_top_k"}
"""Names of rules in the papers, accepted as a rule's type."""

_ADASWITCH_SAMPLING = {"student": (0.5, 0.5), "teacher": (0.2, 0.5)}
SAMPLING_OF_RULE = {"kl_spike": _ADASWITCH_SAMPLING, "outside_top_k": _ADASWITCH_SAMPLING}
"""Temperature and top-p from a rule's paper; other rules sample at temperature 1, untruncated."""

RULES = ("student", "teacher", "random", "mixture", "jsd_threshold", "kl_spike", "outside_top_k")
LOSSES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "cross_entropy", "atkd")


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides, and run all checks that need no models. Relative data paths start
    at the config file's folder. Raises ConfigError."""
    path = Path(path)
    raw = read_yaml(path, "config file", "configs/quickstart.yaml")
    for override in overrides:
        apply_override(raw, override)
    return _anchor_data(parse(raw), path.resolve().parent)


def parse(raw: dict[str, Any]) -> Config:
    """Check a tree of plain values. Raises ConfigError with one line that names the key, the value and the remedy."""
    check_no_secrets(raw)
    try:
        config = Config.model_validate(_with_stages(_with_teachers(raw)))
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    stages = tuple(_complete_stage(config, i, stage) for i, stage in enumerate(config.train.stages))
    train = config.train.model_copy(update={"stages": stages, "num_steps": None})
    config = config.model_copy(update={"train": train})
    check_across(config)
    return config


def _with_teachers(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys that each of `teachers` leaves out from `teacher`."""
    shared, teachers = raw.get("teacher") or {}, raw.get("teachers")
    if not isinstance(shared, dict) or not isinstance(teachers, dict):
        return raw
    filled = {name: {**shared, **keys} if isinstance(keys, dict) else keys for name, keys in teachers.items()}
    return {**raw, "teachers": filled}


_SHARED_KEYS = {
    "rollout": ("rule", "max_new_tokens", "horizon"),
    "learner": ("loss", "lr", "scheduler", "warmup_steps", "min_lr_frac"),
    "train": ("batch_size", "mix"),
}


def _with_stages(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys that a stage leaves out from `rollout`, `learner` and `train`; without stages there is one.
    `train.num_steps` sets the last one's steps. Wrong types are left to pydantic."""
    train = raw.get("train")
    if not isinstance(train, dict):
        return raw
    stages = train.get("stages") or [{"name": "train", "steps": train.get("num_steps")}]
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, dict) for stage in stages):
        return raw
    if train.get("num_steps") is None and stages[-1].get("steps") is None:
        raise ConfigError("train.num_steps: this key is required where train.stages does not say the steps; add it")
    shared: dict[str, Any] = {}
    for section, keys in _SHARED_KEYS.items():
        values = raw.get(section)
        shared |= {key: values[key] for key in keys if isinstance(values, dict) and key in values}
    filled = [{**shared, **{key: _merged(shared.get(key), key, stage[key]) for key in stage}} for stage in stages]
    if train.get("num_steps") is not None:
        filled[-1]["steps"] = train["num_steps"]
    return {**raw, "train": {**train, "stages": filled}}


def _merged(shared: Any, key: str, value: Any) -> Any:
    """Return a stage's value; a rule or loss without a type is merged into the shared one."""
    if key in ("rule", "loss") and isinstance(shared, dict) and isinstance(value, dict) and "type" not in value:
        return {**shared, **value}
    return value


def resolved(config: Config) -> dict[str, Any]:
    """Every key with its value, as plain values."""
    return config.model_dump(mode="json")


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)


def apply_override(raw: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *parents, last = key.strip().split(".")
    node: Any = raw
    for part in parents:
        node = _child(node, part, key)
    value = read_value(text, key)
    if not (value is None or isinstance(value, str)) and value_types(key.strip().split(".")) == {str}:
        value = text.strip()  # `Question: {prompt}` is a template
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if node.get(part) is None:
        node[part] = {}
    if not isinstance(node[part], dict | list):
        raise ConfigError(f"override {key}: {part} is a value ({node[part]!r}), not a section")
    return node[part]


def _index(node: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key}: {part!r} is not an index into a list of {len(node)}")
    return int(part)


def _complete_stage(config: Config, index: int, stage: StageConfig) -> StageConfig:
    """Fill in the stage's name and sampling (the stage's, else the model's, else the rule's)."""
    rule = stage.rule
    kind = ALIASES.get(rule.type, rule.type)
    if ":" not in kind and kind not in RULES:
        key = stage_key(config.rollout.rule.type, rule.type, "rollout.rule.type", index, "rule.type")
        raise ConfigError(unknown_value(key, rule.type, (*RULES, *ALIASES), "my_file:my_rule"))
    if ":" not in stage.loss.type and stage.loss.type not in LOSSES:
        key = stage_key(config.learner.loss.type, stage.loss.type, "learner.loss.type", index, "loss.type")
        raise ConfigError(unknown_value(key, stage.loss.type, LOSSES, "my_file:my_loss"))
    filled = {}
    for role, sampling, model in (("student", rule.student, config.student), ("teacher", rule.teacher, config.teacher)):
        temperature, top_p = SAMPLING_OF_RULE.get(kind, {}).get(role, (1.0, 1.0))
        filled[role] = SamplingConfig(
            temperature=_first(sampling.temperature, model.temperature, temperature),
            top_p=_first(sampling.top_p, model.top_p, top_p),
            top_k=_first(sampling.top_k, model.top_k, 0),
        )
    rule = rule.model_copy(update={"type": kind, **filled})
    return stage.model_copy(update={"rule": rule, "name": stage.name or f"stage-{index + 1}"})


def sampling_notes(config: Config) -> list[str]:
    """One line for each model whose temperature is given and whose top-p comes from a rule's paper."""
    notes = []
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        for stage in config.train.stages:
            paper = SAMPLING_OF_RULE.get(stage.rule.type, {}).get(role)
            sampling: SamplingConfig = getattr(stage.rule, role)
            if paper is None or sampling.temperature in (0.0, paper[0]) or sampling.top_p != paper[1]:
                continue
            if stage.mix.rollout and model.top_p is None:
                notes.append(
                    f"{role}: sampled at temperature {sampling.temperature:g} and, as in the paper of rule "
                    f"{stage.rule.type}, top-p {paper[1]:g}; {role}.top_p=1 turns that off"
                )
                break
    return notes


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _anchor_data(config: Config, folder: Path) -> Config:
    """Make relative paths of files absolute, from `folder`."""

    def anchored(name: str) -> str:
        if is_hub_name(name) or name.startswith("hf://"):
            return name
        return str((folder / Path(name).expanduser()).resolve())

    data = config.data.model_copy(update={"path": anchored(config.data.path)})
    evaluation = config.eval.model_copy(update={"data": anchored(config.eval.data)})
    return config.model_copy(update={"data": data, "eval": evaluation})
