"""Checks a run before any actor starts, and prepares its models, tokenizer and prompts.

In: a parsed config. Out: a `PreparedRun`, or a ConfigError of one line that names the key, the value and the remedy.
`check` costs seconds and writes nothing; `prepare` adds models and data.
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from switchkd.algo import switching, topk_losses
from switchkd.config.errors import ConfigError
from switchkd.config.resources import role_of, spans
from switchkd.config.schema import Config, ModelConfig, ReplicaRange, StageConfig, TeacherConfig
from switchkd.config.teacher_backend import check_backend
from switchkd.config.yaml_file import read_yaml
from switchkd.controller.evaluation import WITH_TEACHER
from switchkd.controller.resume import check_format
from switchkd.controller.trial import check_stage
from switchkd.data.atomic_files import CONFIG, TEACHER_OUTPUT
from switchkd.data.prompts import PromptSet, answer_end, eval_data, layer_texts, load_prompts
from switchkd.data.recorded import HEADS, load_heads
from switchkd.data.rollout_io import read_column, read_records
from switchkd.data.trained import find_shards
from switchkd.engines.build import make_tokenizer, max_len
from switchkd.engines.fake import END
from switchkd.engines.hf.kv_cache import layer_windows
from switchkd.engines.models.demo import resolve_path
from switchkd.engines.models.layer_importance import Texts, is_measured
from switchkd.engines.models.loading import (
    check_attention,
    check_tensors,
    position_limit,
    read_config,
    read_tokenizer,
    same_tokenizer,
    shared_vocab,
    stop_ids,
)
from switchkd.engines.models.resolve import reads_teacher, resolve_models, without_pruning
from switchkd.engines.models.shape import check_adapters
from switchkd.engines.models.sources import check_model_folder
from switchkd.learner import deepspeed

_ADDRESS = re.compile(r"|auto|local|(ray://)?\S+:\d+")
_JOB_VARIABLES = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_ID")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """The results of `prepare`."""

    config: Config  # with `demo` and `student.prune` replaced by folders, and a date
    tokenizer: Any
    stop_ids: frozenset[int]  # of both models; each ends a completion
    stop_id: int  # ends the data set's references
    prompts: PromptSet
    eval_prompts: PromptSet | None


def prepare(config: Config) -> PreparedRun:
    """Run all checks that need no cluster, in the order of their cost. Raises ConfigError."""
    data = config.data.model_copy(update={"date": config.data.date or datetime.date.today()})
    config = config.model_copy(update={"data": data})
    if config.rollout.recorded:
        config = with_recorded_settings(config)
    check(config)
    if config.is_fake:
        tokenizer, ends = make_tokenizer(config.student), frozenset([END])
    else:
        config = resolve_models(config, _layer_texts(config))
        tokenizer, ends = check_models(config)
    stop_id = answer_end(config.data, tokenizer, ends)
    evaluated = None
    if config.rollout.recorded:  # with their own prompts, and without a worker that evaluates
        check_vocab(config, shared_vocab(tokenizer))
        prompts = PromptSet(prompts=(), num_rows=0, skipped={}, num_cut=0)
    else:
        needs = any(stage.mix.dataset > 0 and stage.steps for stage in config.train.stages)
        names = tuple(config.teachers) if config.needs_teacher else ()
        prompts = load_prompts(config.data, tokenizer, stop_id=stop_id, need_references=needs, teachers=names)
        if config.eval.data:
            metrics, by = config.eval.metrics, config.train.select_by
            evaluated = load_prompts(
                eval_data(config),
                tokenizer,
                stop_id=stop_id,
                need_references=not {"rouge_l", "loss"}.isdisjoint(metrics) or by in WITH_TEACHER,
                need_answers="exact_match" in metrics,
                teachers=names,
            )
    return PreparedRun(
        config=config, tokenizer=tokenizer, stop_ids=ends, stop_id=stop_id, prompts=prompts, eval_prompts=evaluated
    )


def prepare_teacher(config: Config) -> tuple[Config, int]:
    """Return the config of `serve-teacher` with the teacher's folder, and the vocabulary's size. Raises ConfigError."""
    if config.teachers:
        raise ConfigError(
            f"serve-teacher serves one: the config has teachers {', '.join(config.teachers)}; set teacher instead"
        )
    if config.teacher.attach:
        raise ConfigError(f"teacher.attach={config.teacher.attach}: serve-teacher starts a teacher; leave attach empty")
    if not config.needs_teacher:
        raise ConfigError("no stage of this config needs a teacher; there is nothing to serve")
    check_backend(config)
    if config.is_fake:
        return config, len(make_tokenizer(config.teacher))
    _check_teacher_folder(config.teacher, "teacher")
    config = resolve_models(without_pruning(config), ())
    tokenizer = read_tokenizer(config.teacher, "teacher.path")
    vocab_size = shared_vocab(tokenizer)
    _check_model(config, read_config(config.teacher, "teacher.path"), config.teacher, "teacher", vocab_size)
    return config, vocab_size


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """Upper bounds of the rollouts of a stage that both models generate at the same time."""

    slots: int  # of all workers
    admitted: int  # by staleness
    sessions: int | None  # of all teachers; None where they are served elsewhere or not needed to generate

    @property
    def limited_by(self) -> str:
        """The keys of the lowest bound."""
        keys = {
            "rollout.batch_size, rollout.num_workers": self.slots,
            "replay.max_staleness, train.batch_size": self.admitted,
            "teacher.max_sessions, teacher.replicas": math.inf if self.sessions is None else self.sessions,
        }
        return min(keys, key=lambda key: keys[key])

    def __str__(self) -> str:
        most = min(self.slots, self.admitted, self.slots if self.sessions is None else self.sessions)
        sessions = "" if self.sessions is None else f", {self.sessions} teacher sessions"
        return (
            f"at most {most} rollouts in flight: {self.slots} slots x workers, {self.admitted} admitted (batch x "
            f"(max_staleness + 1) x rollout share){sessions}; limited by {self.limited_by}"
        )


def in_flight(config: Config, stage: StageConfig) -> InFlight:
    """Return the bounds of a stage, with all pools at their largest."""
    mix, sessions = stage.mix, None
    if stage.needs_teacher and stage.rule.type != "student":  # it opens sessions when completions have ended
        teachers = [config.of_teacher(name).teacher for name in config.teacher_names]
        if not any(teacher.attach for teacher in teachers):
            sessions = sum(ReplicaRange.of(teacher.replicas).max * teacher.max_sessions for teacher in teachers)
    share = mix.rollout / (mix.rollout + mix.dataset + mix.teacher)
    return InFlight(
        slots=config.rollout.batch_size * spans(config)["rollout"].max,
        admitted=math.ceil(stage.batch_size * (config.replay.max_staleness + 1) * share),
        sessions=sessions,
    )


# --- from the config and the disk ------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Run the checks that need no model in memory. Raises ConfigError."""
    _check_run_dir(config)
    address = config.cluster.address
    if not _ADDRESS.fullmatch(address):
        raise ConfigError(f"cluster.address={address} is no address; give host:port or auto, or leave it empty")
    if config.metrics.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"metrics.wandb={config.metrics.wandb!r} needs wandb: pip install 'switchkd[wandb]'")
    for name in config.teacher_names or ("",):
        check_backend(config.of_teacher(name))
    for index, stage in enumerate(config.train.stages):
        try:
            check_stage(stage)
            for name in config.teacher_names:
                check_topk(stage, config.of_teacher(name).teacher)
        except ConfigError as error:
            raise ConfigError(f"train.stages.{index} ({stage.name}): {error}") from None
    by = config.train.select_by
    if by in WITH_TEACHER and not config.needs_teacher:
        raise ConfigError(f"train.select_by={by} compares with a teacher, and no stage has one; take rouge_l")
    if not config.rollout.recorded:
        _check_data(config)
    if config.is_fake:  # no path is read
        return
    _check_devices(config)
    if config.learner.deepspeed:
        deepspeed.check_keys(config.learner)
    for name in config.teacher_names or ("",) * reads_teacher(config):
        _check_teacher_folder(config.of_teacher(name).teacher, role_of(name))
    if config.student.prune is None and config.student.path != "demo":
        _check_folder(config.student, "student.path")


def _check_teacher_folder(teacher: TeacherConfig, role: str) -> None:
    if teacher.path != "demo" and not teacher.attach:  # a served teacher's weights may be elsewhere
        _check_folder(teacher, f"{role}.path")


def _check_folder(section: ModelConfig, key: str) -> None:
    check_model_folder(section.path, key)
    check_tensors(section, key)


def _check_devices(config: Config) -> None:
    """Without Ray, all devices are those that this process sees."""
    if config.run.mode != "inprocess":
        return
    import torch

    models: dict[str, ModelConfig] = {"student": config.student}
    models |= {role_of(name): config.of_teacher(name).teacher for name in config.teacher_names}
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for role, model in models.items():
        kind, _, number = model.device.partition(":")
        if kind == "cuda" and int(number or 0) >= seen:
            raise ConfigError(
                f"{role}.device={model.device}: there is no such GPU, torch sees {seen} here; set {role}.device: auto"
            )


def _check_run_dir(config: Config) -> None:
    path = Path(config.run.dir).expanduser()
    if not path.is_absolute() and any(os.environ.get(name) for name in _JOB_VARIABLES):
        raise ConfigError(
            f"run.dir={config.run.dir} is relative, but a submitted job's working directory is a copy that disappears; "
            "give an absolute path on storage that outlives the job"
        )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir={config.run.dir} is a file; give a folder")


def _check_data(config: Config) -> None:
    if not config.data.path:
        raise ConfigError("data.path is empty; name a JSONL or parquet file, or a data set of the hub")
    for key, name in (("data.path", config.data.path), ("eval.data", config.eval.data)):
        if name and Path(name).expanduser().is_dir():
            raise ConfigError(f"{key}={name} is a folder; give a .jsonl or .parquet file")
        if Path(name).is_absolute() and not Path(name).is_file():
            raise ConfigError(f"{key}={name}: there is no such file; relative paths start at the config file's folder")


def _layer_texts(config: Config) -> Texts:
    """Return the texts on which the student's layers are chosen; none where no choice needs them."""
    if config.student.prune is None or not is_measured(config.student.prune):
        return ()
    teacher = config.teacher.model_copy(update={"path": resolve_path(config.teacher.path)})
    return layer_texts(config.data, teacher)


# --- models ----------------------------------------------------------------------------------------------------------


def check_models(config: Config) -> tuple[Any, frozenset[int]]:
    """Return the student's tokenizer and the stop ids of both models, without reading weights. Raises ConfigError where
    tokenizers differ or the run needs more positions than a model has."""
    student = read_tokenizer(config.student, "student.path")
    ends: frozenset[int] = frozenset()
    roles: list[tuple[str, ModelConfig]] = [("student", config.student)]
    for name in config.teacher_names:
        role, teacher = role_of(name), config.of_teacher(name).teacher
        roles.append((role, teacher))
        difference = same_tokenizer(read_tokenizer(teacher, f"{role}.path"), student)
        if difference:
            raise ConfigError(
                f"{role}.path={teacher.path} and student.path={config.student.path} need one tokenizer: "
                f"{difference}; choose models of one family"
            )
    for role, section in roles:
        model = read_config(section, f"{role}.path")
        _check_model(config, model, section, role, shared_vocab(student))
        ends |= stop_ids(model, student)
    if lora := config.learner.lora:
        check_adapters(config.student, "student.path", lora)
    return student, ends


def _check_model(config: Config, model: Any, section: ModelConfig, role: str, vocab_size: int) -> None:
    on_vllm = isinstance(section, TeacherConfig) and section.backend == "vllm"
    (limit, positions), prompt = position_limit(model.config, slots=not on_vllm), config.data.max_prompt_tokens
    needed = max_len(config) + on_vllm  # vLLM needs a position for a generated token
    if limit and needed > limit:
        raise ConfigError(
            f"{role}.path={section.path} has {limit} {positions}, but data.max_prompt_tokens={prompt} and the longest "
            f"completion ({needed - prompt}) need {needed}; lower data.max_prompt_tokens, data.max_reference_tokens or "
            "max_new_tokens"
        )
    rows = getattr(model.config.get_text_config(decoder=True), "vocab_size", vocab_size)
    if rows < vocab_size:
        raise ConfigError(
            f"{role}.path={section.path}: the tokenizer has {vocab_size} ids and the embedding table {rows} rows; add "
            f"rows with model.resize_token_embeddings({vocab_size}) and save it, or save the tokenizer of its training "
            "there"
        )
    if not on_vllm:
        check_attention(model.config, section.attn, section.path, f"{role}.attn")
        try:
            layer_windows(model.config)
        except ConfigError as error:
            raise ConfigError(f"{role}.path={section.path}: {error}") from None


def check_topk(stage: StageConfig, teacher: TeacherConfig) -> None:
    """Raise ConfigError for rules and losses that `teacher.output: top_logprobs` cannot serve."""
    if teacher.output != "top_logprobs" or not stage.needs_teacher:
        return
    loss, num_ids = stage.loss, teacher.num_top_logprobs
    if stage.rule.type == "outside_top_k" and (stage.rule.top_k or switching.SKD_TOP_K) > num_ids:
        raise ConfigError(
            f"rule outside_top_k asks for the teacher's first {stage.rule.top_k or switching.SKD_TOP_K} ids, "
            f"teacher.num_top_logprobs={num_ids} sends fewer; raise it, or take teacher.output=hidden_states"
        )
    bounded = loss.type in topk_losses.BOUNDED or (loss.type == "atkd" and loss.direction != "reverse")
    if not loss.approximate and not bounded:
        detail = f" (direction {loss.direction})" if loss.direction else ""
        raise ConfigError(
            f"teacher.output=top_logprobs with loss {loss.type}{detail}: what the tail leaves out has no small bound; "
            "take teacher.output=hidden_states, another loss (forward_kl, skew_kl, jsd, tvd, atkd), or set "
            "loss.approximate=true"
        )


def with_recorded_settings(config: Config) -> Config:
    """Return the config with teacher output and staleness of the recorded rollouts. Raises ConfigError."""
    if config.train.select_by:
        raise ConfigError(
            f"train.select_by={config.train.select_by} evaluates during training, but --from-rollouts starts no worker "
            "to do it; remove it, and run `switchkd eval` afterwards"
        )
    if config.replay.policy == "adaptive":
        raise ConfigError(
            "replay.policy=adaptive follows evaluations, but --from-rollouts starts no worker to do them; take fifo"
        )
    stored = Path(config.rollout.recorded) / CONFIG
    if stored.is_file():
        remedy = "train on it with the version that wrote it, or record it again"
        raw = read_yaml(stored, "config file", "configs/quickstart.yaml")
        check_format(raw, f"--from-rollouts: {stored.parent}", remedy)
    kinds: set[str] = set()
    age = config.replay.max_staleness
    num_rollouts, shards = 0, find_shards(Path(config.rollout.recorded))
    for step, path in shards:
        try:  # files of another run
            records = read_records(path)
            num_rollouts += len(records)
            kinds |= {record["teacher_output"]["kind"] for record in records if record["teacher_output"]}
            age = max(age, step - int(read_column(path, "weight_versions").min(initial=step)))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ConfigError(f"--from-rollouts: {path} cannot be read ({error}); record it again") from None
    _check_recorded(config, [step for step, _ in shards], num_rollouts)
    if not kinds and any(stage.needs_teacher for stage in config.train.stages):
        raise ConfigError(
            f"--from-rollouts {config.rollout.recorded}: its rollouts carry no teacher output, but the loss needs one; "
            "record them with a loss that has a teacher, or take learner.loss.type=cross_entropy"
        )
    teacher = config.teacher.model_copy(update={"output": min(kinds)} if kinds else {})
    replay = config.replay.model_copy(update={"max_staleness": age})
    return config.model_copy(update={"teacher": teacher, "replay": replay})


def _check_recorded(config: Config, steps: list[int], num_rollouts: int) -> None:
    """Raise ConfigError where recorded steps are missing, or rollouts would be trained on twice unasked."""
    what = f"--from-rollouts {config.rollout.recorded}"
    if missing := sorted(set(range(steps[0], steps[-1])) - set(steps)):
        raise ConfigError(
            f"{what}: its {TEACHER_OUTPUT}/ has no file of step {missing[0]} ({len(missing)} missing between steps "
            f"{steps[0]} and {steps[-1]}); bring it back, or record the run again"
        )
    needed = sum(stage.steps * stage.batch_size for stage in config.train.stages)
    if num_rollouts < needed and not config.rollout.repeat_recorded:
        raise ConfigError(
            f"{what}: it has {num_rollouts} rollouts, {config.num_steps} steps need {needed}; lower train.num_steps or "
            "the stages' steps, or set rollout.repeat_recorded=true to begin with the first again"
        )


def check_vocab(config: Config, vocab_size: int) -> None:
    """Raise ConfigError where the recorded token ids are not those of the student's tokenizer."""
    for head in load_heads(Path(config.rollout.recorded) / TEACHER_OUTPUT / HEADS).values():
        if len(head.weight) != vocab_size:
            raise ConfigError(
                f"--from-rollouts {config.rollout.recorded}: its teacher has {len(head.weight)} token ids, the "
                f"tokenizer of student.path={config.student.path} has {vocab_size}; take a student of its family"
            )
