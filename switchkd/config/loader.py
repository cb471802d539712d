"""Loads one YAML file with dotted overrides into one checked `Config`.

In: a path and overrides such as `rollout.num_workers=2`. Out: a frozen tree of sections (`schema.py`), or a ConfigError
whose text names the key, the value and the remedy. Imports nothing heavy, so that errors come at once. Defaults from a
paper depend on the rule (see `SAMPLING_OF_RULE`); `resolved()` has them filled in.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from switchkd.config.errors import ConfigError, one_line
from switchkd.config.renamed import replacement
from switchkd.config.schema import AdaptiveScheduleConfig, Config, ModelConfig, SamplingConfig, Section, StageConfig
from switchkd.config.secret_keys import check_no_secrets

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


def read_yaml(path: Path, what: str, example: str) -> dict[str, Any]:
    """Read the keys of a file. The ConfigError calls the file a `what` and names `example` as a valid one."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist; give a path such as {example}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{what} {path} cannot be read as YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{what} {path} holds no keys; see {example} for an example")
    return raw


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
    _check_across(config)
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
    value = yaml.safe_load(text) if text.strip() else ""
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
        key = _key_of(config.rollout.rule.type, rule.type, "rollout.rule.type", index, "rule.type")
        raise ConfigError(_unknown(key, rule.type, (*RULES, *ALIASES), "my_file:my_rule"))
    if ":" not in stage.loss.type and stage.loss.type not in LOSSES:
        key = _key_of(config.learner.loss.type, stage.loss.type, "learner.loss.type", index, "loss.type")
        raise ConfigError(_unknown(key, stage.loss.type, LOSSES, "my_file:my_loss"))
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


def _key_of(shared_value: Any, value: Any, shared_key: str, index: int, key: str) -> str:
    """Return the key that a stage's value comes from: the shared one, or the stage's own."""
    return shared_key if shared_value == value else f"train.stages.{index}.{key}"


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _check_across(config: Config) -> None:
    stages, ranks = config.train.stages, config.learner.num_ranks
    names = [stage.name for stage in stages]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"train.stages: two stages have the name {repeated[0]!r}; give each its own")
    for i, stage in enumerate(stages):
        key = _key_of(config.train.batch_size, stage.batch_size, "train.batch_size", i, "batch_size")
        if stage.batch_size % ranks:
            larger = -(-stage.batch_size // ranks) * ranks
            raise ConfigError(f"{key}={stage.batch_size} is no multiple of learner.num_ranks={ranks}; take {larger}")
        if stage.horizon and not stage.horizon.start <= stage.horizon.end <= stage.max_new_tokens:
            key = _key_of(config.rollout.horizon, stage.horizon, "rollout.horizon", i, "horizon")
            start, end = stage.horizon.start, stage.horizon.end
            raise ConfigError(
                f"{key} (start {start}, end {end}): the length grows to max_new_tokens={stage.max_new_tokens} at most; "
                "take start <= end <= max_new_tokens"
            )
        if stage.batch_size > config.replay.capacity:
            raise ConfigError(
                f"{key}={stage.batch_size} is above replay.capacity={config.replay.capacity}; raise the capacity"
            )
    _check_teachers(config)
    _check_adaptive(config)
    _check_fakes(config)
    models: list[tuple[str, ModelConfig]] = [("student", config.student), ("teacher", config.teacher)]
    models += [(f"teachers.{name}", teacher) for name, teacher in config.teachers.items()]
    for role, model in models:
        if model.graphs == "on" and model.device == "cpu":
            raise ConfigError(
                f"{role}.graphs=on needs a CUDA device, {role}.device is cpu; set {role}.graphs: auto or another device"
            )
    if config.learner.zero_stage == 0 and config.learner.dtype == "bfloat16":
        raise ConfigError("learner.zero_stage=0 with learner.dtype=bfloat16 has a wrong first Adam step; take stage 1")
    metric = config.train.select_by
    if (metric or config.train.early_stop) and not config.eval.data:
        raise ConfigError("train.select_by and train.early_stop need eval.data; name a file or remove them")
    if config.train.early_stop and not metric:
        raise ConfigError("train.early_stop needs train.select_by; name a metric such as rouge_l")
    if metric and metric not in config.eval.metrics:
        raise ConfigError(_unknown("train.select_by", metric, config.eval.metrics, "one of eval.metrics"))
    _check_test_selection(config)


def _check_test_selection(config: Config) -> None:
    """Refuse to select on the test split of a hub data set: the score on it is then no longer an unbiased one."""
    evaluation, parts = config.eval, config.eval.split.split("+")
    is_test = any(part.partition("[")[0].strip() == "test" for part in parts)
    selects = f"train.select_by={config.train.select_by}" if config.train.select_by else ""
    if config.replay.policy == "adaptive":
        selects = selects or "replay.policy=adaptive"
    if selects and is_test and is_hub_name(evaluation.data) and not evaluation.allow_test_selection:
        raise ConfigError(
            f"eval.split={evaluation.split}: {selects} would select on the test split of {evaluation.data}; hold out "
            "other rows (eval.split: train[-500:], data.split: train[:-500]), or set eval.allow_test_selection: true"
        )


def _check_adaptive(config: Config) -> None:
    """Check `replay.policy: adaptive`, which needs evaluations and chooses between rollouts and the data set."""
    replay, policy = config.replay, "replay.policy=adaptive"
    if replay.policy != "adaptive":
        if replay.adaptive != AdaptiveScheduleConfig():
            raise ConfigError(f"replay.adaptive belongs to replay.policy=adaptive, this is {replay.policy}; remove one")
        return
    if not config.eval.data or not config.eval.every:
        missing = "eval.every=0" if config.eval.data else "eval.data is empty"
        raise ConfigError(f"{policy} follows the validation loss, but {missing}; set eval.data and eval.every")
    if "loss" not in config.eval.metrics:
        raise ConfigError(f"{policy} follows eval/loss; add loss to eval.metrics={list(config.eval.metrics)}")
    for i, stage in enumerate(config.train.stages):
        mix = stage.mix
        if mix.rollout and (not mix.dataset or mix.teacher):
            key = _key_of(config.train.mix, mix, "train.mix", i, "mix")
            shares = f"rollout {mix.rollout:g}, dataset {mix.dataset:g}, teacher {mix.teacher:g}"
            raise ConfigError(
                f"{key} ({shares}): {policy} draws between rollouts and the data set; take {{rollout: 1, dataset: 1}} "
                "(phi decides), or a mix without rollouts for a stage of its own"
            )
    if not any(stage.mix.rollout and stage.steps for stage in config.train.stages):
        raise ConfigError(f"{policy}, but no stage has rollouts; take mix {{rollout: 1, dataset: 1}} or policy fifo")


def _check_fakes(config: Config) -> None:
    """All models are fake, or none."""
    backends = {"student": config.student.backend, "learner": config.learner.backend, "teacher": config.teacher.backend}
    backends |= {f"teachers.{name}": teacher.backend for name, teacher in config.teachers.items()}
    if config.teachers or not config.needs_teacher:
        del backends["teacher"]
    fakes = [role for role, backend in backends.items() if backend == "fake"]
    if fakes and len(fakes) < len(backends):
        others = ", ".join(f"{role}.backend={backend}" for role, backend in backends.items() if backend != "fake")
        raise ConfigError(f"{fakes[0]}.backend=fake, but {others}: fake and real models do not mix; set all to fake")


def _check_teachers(config: Config) -> None:
    shared = config.teacher
    for name, teacher in config.teachers.items():
        if not name or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"teachers: the name {name!r} is not made of letters, digits, - and _; choose another")
        for key in ("temperature", "top_p", "top_k"):
            if getattr(teacher, key) != getattr(shared, key):
                raise ConfigError(
                    f"teachers.{name}.{key}={getattr(teacher, key)}: all teachers of a run sample alike; set "
                    f"teacher.{key} or rollout.rule.teacher"
                )
    for name in config.resources.teachers:
        if name not in config.teachers:
            known = ", ".join(config.teachers) or "none"
            raise ConfigError(f"resources.teachers.{name}: there is no such teacher; teachers has {known}")
    if any(config.of_teacher(name).teacher.attach for name in config.teacher_names) and config.run.mode != "ray":
        raise ConfigError(f"teacher.attach needs a cluster, run.mode is {config.run.mode}; set run.mode: ray")


def is_hub_name(name: str) -> bool:
    """Whether data is named as a data set of the hub, which has splits; any other name is that of one file."""
    is_file = name.startswith((".", "/", "~", "hf://")) or Path(name).suffix in (".jsonl", ".json", ".parquet")
    return not is_file


def _anchor_data(config: Config, folder: Path) -> Config:
    """Make relative paths of files absolute, from `folder`."""

    def anchored(name: str) -> str:
        if is_hub_name(name) or name.startswith("hf://"):
            return name
        return str((folder / Path(name).expanduser()).resolve())

    data = config.data.model_copy(update={"path": anchored(config.data.path)})
    evaluation = config.eval.model_copy(update={"data": anchored(config.eval.data)})
    return config.model_copy(update={"data": data, "eval": evaluation})


def _unknown(key: str, value: str, known: tuple[str, ...], other: str) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{key}={value!r} is not known; {hint}choose one of {', '.join(known)}, or {other}"


_STAGES = ("train", "stages")
_TAGS = ("<number>", "<span>")  # of sections.Count
_KINDS = {"tuple_type": "give a list", "model_type": "give a group of keys", "dict_type": "give a group of keys"}


def explain(error: ValidationError, root: type[Section] = Config) -> str:
    """Format the first mistake in one line: key, value, remedy. `root` is the section that was read."""
    # a wrong value that stages inherit is one mistake
    shared = [repr(mistake["input"]) for mistake in error.errors() if mistake["loc"][:2] != _STAGES]
    errors = [m for m in error.errors() if m["loc"][:2] != _STAGES or repr(m["input"]) not in shared]
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"] if part not in _TAGS)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if renamed := replacement(key, first["input"]):
        return renamed + more
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"], root)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key (value {_short(first['input'])}); {hint}{more}"
    if first["type"] == "missing":
        return f"{key}: this key is required; add it{more}"
    message = _KINDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    return f"{key}={_short(first['input'])}: {message[0].lower()}{message[1:]}{more}"


def _known_keys(loc: tuple[Any, ...], root: type[Section]) -> list[str]:
    section: Any = root
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        section = _section_in(section.model_fields[part].annotation) if part in section.model_fields else section
    return list(section.model_fields)


def _section_in(annotation: Any) -> Any:
    """The Section inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = [_section_in(arg) for arg in getattr(annotation, "__args__", ())]
    return next((section for section in inner if section is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
