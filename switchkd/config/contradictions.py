"""Refuses keys that contradict one another, from the config alone.

In: a config whose values are each valid. Out: nothing, or a ConfigError of one line that names the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.explain import unknown_value
from switchkd.config.resources import role_of
from switchkd.config.schema import AdaptiveScheduleConfig, Config, ModelConfig, ResourcesConfig, StageConfig


def check_across(config: Config) -> None:
    stages, ranks = config.train.stages, config.learner.num_ranks
    names = [stage.name for stage in stages]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"train.stages: two stages have the name {repeated[0]!r}; give each its own")
    for i, stage in enumerate(stages):
        key = stage_key(config.train.batch_size, stage.batch_size, "train.batch_size", i, "batch_size")
        if stage.batch_size % ranks:
            larger = -(-stage.batch_size // ranks) * ranks
            raise ConfigError(f"{key}={stage.batch_size} is no multiple of learner.num_ranks={ranks}; take {larger}")
        if stage.horizon and not stage.horizon.start <= stage.horizon.end <= stage.max_new_tokens:
            key = stage_key(config.rollout.horizon, stage.horizon, "rollout.horizon", i, "horizon")
            start, end = stage.horizon.start, stage.horizon.end
            raise ConfigError(
                f"{key} (start {start}, end {end}): the length grows to max_new_tokens={stage.max_new_tokens} at most; "
                "take start <= end <= max_new_tokens"
            )
        if stage.batch_size > config.replay.capacity:
            raise ConfigError(
                f"{key}={stage.batch_size} is above replay.capacity={config.replay.capacity}; raise the capacity"
            )
        _check_rule(config, i, stage)
    _check_teachers(config)
    _check_adaptive(config)
    _check_devices(config)
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
        raise ConfigError(unknown_value("train.select_by", metric, config.eval.metrics, "one of eval.metrics"))
    if config.train.early_stop and not config.eval.every:
        raise ConfigError(
            f"train.early_stop={config.train.early_stop} counts evaluations, but eval.every=0 has none within a stage; "
            "set eval.every"
        )
    if config.eval.every and not config.eval.data:
        raise ConfigError(f"eval.every={config.eval.every} needs eval.data; name a file, or set eval.every: 0")
    _check_test_selection(config)


def _check_rule(config: Config, index: int, stage: StageConfig) -> None:
    """Refuse keys of SWITCH's rule of which one would be ignored."""
    rule, shared = stage.rule, config.rollout.rule
    if rule.decay is not None and rule.half_life is not None:
        key = stage_key(shared.decay, rule.decay, "rollout.rule.decay", index, "rule.decay")
        raise ConfigError(
            f"{key}={rule.decay:g} and half_life={rule.half_life:g} both set the threshold's fall; set one to null"
        )
    for name in ("decay", "half_life"):
        if (value := getattr(rule, name)) is not None and rule.schedule in ("constant", "linear"):
            key = stage_key(getattr(shared, name), value, f"rollout.rule.{name}", index, f"rule.{name}")
            raise ConfigError(f"{key}={value:g} is not for schedule {rule.schedule}; remove it, or take exponential")


def _check_devices(config: Config) -> None:
    """Refuse a CUDA device for an actor to which Ray gives no GPU: it sees none."""
    if config.run.mode == "inprocess" or config.is_fake:
        return
    # of `resources`, of the model
    roles: list[tuple[str, ResourcesConfig, str, ModelConfig]] = []
    if not config.rollout.recorded:
        roles.append(("rollout", config.resources.rollout, "student", config.student))
    for name in config.teacher_names:
        alone = config.of_teacher(name)
        if not alone.teacher.attach and alone.teacher.backend != "vllm":
            roles.append((role_of(name), alone.resources.teacher, role_of(name), alone.teacher))
    roles.append(("learner", config.resources.learner, "student", config.student))
    for key, resources, role, model in roles:
        if model.device.startswith("cuda") and resources.num_gpus == 0:
            raise ConfigError(
                f"{role}.device={model.device}, but resources.{key}.num_gpus is 0: Ray shows its process no GPU; give "
                f"it a share (0.5) or more, or set {role}.device: auto"
            )


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
            key = stage_key(config.train.mix, mix, "train.mix", i, "mix")
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


def stage_key(shared_value: Any, value: Any, shared_key: str, index: int, key: str) -> str:
    """Return the key that a stage's value comes from: the shared one, or the stage's own."""
    return shared_key if shared_value == value else f"train.stages.{index}.{key}"
