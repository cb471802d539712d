"""Rooms are furnished: from a resolved config to the teacher, the workers and the learner ranks of one run.

Every process calls the one function for its role, with nothing but the config and what it must share with the others
(the teacher's output head, ports). Whether the caller is a Ray actor or this process makes no difference here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from switchkd.config import resources
from switchkd.config.schema import Config, Model
from switchkd.engines.base import Teacher
from switchkd.engines.models.lm_head import HeadArrays, LinearHead
from switchkd.engines.models.loading import load_model, load_tokenizer, pad_id, shared_vocab
from switchkd.learner.batching import LossSpec
from switchkd.rollout.build import build_loss, build_modes
from switchkd.rollout.generator import RolloutWorker
from switchkd.rollout.worker import Worker, set_threads
from switchkd.types import BatchPlan, Rollout, StepResult, WeightBundle

if TYPE_CHECKING:
    import torch

    from switchkd.engines.hf.teacher import HFTeacher
    from switchkd.engines.vllm.teacher import VLLMTeacher
    from switchkd.learner.deepspeed import DeepSpeedLearner, LearnerSettings


def max_len(config: Config) -> int:
    """Positions that every cache must hold: the longest prompt with the longest completion of any stage."""
    longest = max(stage.max_new_tokens for stage in config.train.stages)
    longest = max(longest, config.data.max_reference_tokens, config.eval.max_new_tokens if config.eval.data else 0)
    return config.data.max_prompt_tokens + longest


def device_of(model: Model | str) -> str:
    import torch

    wanted = model if isinstance(model, str) else model.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _load(model: Model, device: str, device_map: str | None = None) -> torch.nn.Module:
    return load_model(
        model.path,
        dtype=model.dtype,
        device=device,
        attn=model.attn,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
        device_map=device_map,
    )


def make_teacher(config: Config) -> HFTeacher | VLLMTeacher:
    """The teacher service of one process. Of several, `config.of_teacher(name)` is the config."""
    set_threads(resources.of_role(config, "teacher").threads)
    match config.teacher.backend:
        case "hf":
            return _hf_teacher(config)
        case "vllm":
            return _vllm_teacher(config)


def _hf_teacher(config: Config) -> HFTeacher:
    from switchkd.engines.hf.cuda_graphs import capture_for
    from switchkd.engines.hf.teacher import HFTeacher

    section = config.teacher
    model = _load(section, device_of(section), section.device_map)
    whole_rows = section.signal == "full"
    return HFTeacher(
        model,
        vocab_size=shared_vocab(load_tokenizer(section.path, trust_remote_code=section.trust_remote_code)),
        max_sessions=section.max_sessions,
        max_len=max_len(config),
        lease_s=section.lease_s,
        signal=section.signal,
        capture=capture_for(model, section.graphs, key="teacher.graphs", whole_rows=whole_rows),
        top_k=section.signal_top_k,
        prepack=section.prepack,
    )


def _vllm_teacher(config: Config) -> VLLMTeacher:
    from switchkd.engines.vllm.teacher import Engine, VLLMTeacher

    section = config.teacher
    tokenizer = load_tokenizer(section.path, trust_remote_code=section.trust_remote_code)
    engine = Engine(
        section.path,
        dtype=section.dtype,
        max_len=max_len(config),
        max_sessions=section.max_sessions,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        interface=section.interface,
        arguments=section.engine,
    )
    return VLLMTeacher(
        engine,
        vocab_size=shared_vocab(tokenizer),
        max_sessions=section.max_sessions,
        max_len=max_len(config),
        lease_s=section.lease_s,
        signal="topk" if section.signal == "topk" else "hidden",
        top_k=section.signal_top_k,
    )


Teachers = Mapping[str, tuple[Teacher, HeadArrays | None]]
"""By name, each with its output head (None where whole rows travel); empty where no stage needs one."""


def make_worker(
    config: Config,
    index: int,
    teachers: Teachers,
    stop_ids: frozenset[int],
    new_weights: Callable[[], WeightBundle | None] | None = None,
) -> Worker:
    """One rollout worker with the student's folder as weight version 0. `stop_ids` are those of all models."""
    from switchkd.engines.hf.cuda_graphs import capture_for
    from switchkd.engines.hf.teacher import HFStudent

    set_threads(resources.of_role(config, "rollout").threads)
    section = config.student
    device = device_of(section)
    tokenizer = load_tokenizer(section.path, trust_remote_code=section.trust_remote_code)
    model = _load(section, device)
    student = HFStudent(
        model,
        num_slots=config.rollout.batch_size,
        max_len=max_len(config),
        vocab_size=shared_vocab(tokenizer),
        capture=capture_for(model, section.graphs, key="student.graphs"),
        prepack=section.prepack,
    )

    def writer(name: str, teacher: Teacher | None, head: HeadArrays | None) -> RolloutWorker:
        own = config.of_teacher(name)
        return RolloutWorker(
            student=student,
            teacher=teacher,
            head=None if head is None else _reading_head(head, device, section.prepack),
            stop_ids=stop_ids,
            block_size=config.rollout.block_size,
            lead=config.rollout.lead,
            overlap=_overlaps(own),
            device=device,
            coarse=own.teacher.decide == "coarse",
            candidates=config.rollout.save_candidates,
            new_weights=new_weights if config.rollout.on_new_weights == "reprefill" else None,
        )

    writers = {name: writer(name, *pair) for name, pair in teachers.items()} or {"": writer("", None, None)}
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return Worker(writers, build_modes(config), decode, index=index)


def _reading_head(arrays: HeadArrays, device: str, prepack: str) -> LinearHead:
    head = LinearHead.from_arrays(arrays, device=device)
    return head if prepack == "off" else head.prepack()


def _overlaps(config: Config) -> bool:
    """Two half-batches pay where a worker and its teacher compute at the same time."""
    if config.rollout.overlap is not None or config.run.mode == "inprocess":
        return bool(config.rollout.overlap)
    return config.resources.teacher.num_gpus > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """Where a learner rank stands among its peers."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0


def learner_settings(config: Config) -> LearnerSettings:
    from switchkd.learner.deepspeed import LearnerSettings

    tokenizer = load_tokenizer(config.student.path, trust_remote_code=config.student.trust_remote_code)
    learner, student = config.learner, config.student
    return LearnerSettings(
        model=student.path,
        dtype=learner.dtype,
        zero_stage=learner.zero_stage,
        micro_batch_tokens=learner.micro_batch_tokens,
        gradient_checkpointing=learner.gradient_checkpointing,
        gradient_clipping=learner.grad_clip,
        weight_decay=learner.weight_decay,
        betas=learner.betas,
        chunk_tokens=learner.chunk_tokens,
        timeout_s=learner.timeout_s,
        deepspeed=learner.deepspeed,
        lora=None if learner.lora is None else learner.lora.model_dump(),
        vocab_size=shared_vocab(tokenizer),
        pad_id=pad_id(tokenizer),
        attn=student.attn,
        revision=student.revision,
        trust_remote_code=student.trust_remote_code,
        threads=resources.of_role(config, "learner").threads or 0,
        seed=config.seed,
        device=device_of(student),
    )


Fetch = Callable[[list[int]], list[Rollout]]


class LearnerRank:
    """One rank of the learner: fetches its rollouts itself, so that the driver never touches them."""

    def __init__(self, config: Config, gang: Gang, heads: dict[str, HeadArrays], fetch: Fetch) -> None:
        from switchkd.learner.deepspeed import DeepSpeedLearner

        self.config, self.gang, self.fetch = config, gang, fetch
        self.losses: list[LossSpec] = [build_loss(stage) for stage in config.train.stages]
        self.learner: DeepSpeedLearner = DeepSpeedLearner(
            learner_settings(config),
            rank=gang.rank,
            local_rank=gang.local_rank,
            world_size=gang.world_size,
            master_addr=gang.master_addr,
            master_port=gang.master_port,
            teacher_heads=heads,
        )

    def step(self, plan: BatchPlan, lr: float) -> StepResult:
        rollouts = self.fetch(list(plan.rollout_ids[self.gang.rank]))
        return self.learner.step(plan, rollouts, loss=self.losses[plan.stage], lr=lr, version_after=plan.step + 1)

    def publish(self, version: int) -> WeightBundle | None:
        """Rank 0 answers with the packed weights, in the dtype that the rollout workers run."""
        return self.learner.publish(version, self.config.student.dtype)

    def save(self, folder: Path, tag: str) -> None:
        try:
            self.learner.save(folder, tag)
        except RuntimeError as error:  # torch's word for a disk that takes no more
            raise OSError(f"{folder} could not be written: {error}") from error

    def load(self, folder: Path, tag: str) -> None:
        self.learner.load(folder, tag)

    def export(self, folder: Path) -> None:
        """A transformers folder; rank 0 adds the tokenizer."""
        self.learner.export(folder)
        if self.gang.rank == 0:
            tokenizer = load_tokenizer(
                self.config.student.path, trust_remote_code=self.config.student.trust_remote_code
            )
            tokenizer.save_pretrained(folder)

    def close(self) -> None:
        self.learner.close()
