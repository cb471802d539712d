"""A config becomes a rollout worker.

In: a checked config, and its teachers. Out: a `RolloutWorker`. torch is imported late: fake models do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.engines.base import Teacher
from switchkd.engines.build import device_of, load_section, make_tokenizer, max_len, set_threads
from switchkd.engines.fake import FakeStudent
from switchkd.engines.models.loading import shared_vocab
from switchkd.rollout.fake import FakeGenerator, evaluate
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import CompletionSource, PackedWeights

if TYPE_CHECKING:
    from switchkd.engines.models.lm_head import LMHead, LMHeadState
    from switchkd.rollout.generator import SwitchingGenerator

Teachers = Mapping[str, tuple[Teacher, "LMHeadState | None"]]
"""By name, each with its output head (None unless hidden states travel); empty where no stage needs one."""


def make_worker(
    config: Config,
    teachers: Teachers,
    stop_ids: frozenset[int],
    new_weights: Callable[[], PackedWeights | None] | None = None,
) -> RolloutWorker:
    """One rollout worker with the student's folder as weight version 0. `stop_ids` are those of all models."""
    newer = new_weights if config.rollout.on_new_weights == "reprefill" else None
    match config.student.backend:
        case "hf":
            return _hf_worker(config, teachers, stop_ids, newer)
        case "fake":
            return _fake_worker(config, teachers, stop_ids, newer)


def _fake_worker(
    config: Config, teachers: Teachers, stop_ids: frozenset[int], new_weights: Callable[[], PackedWeights | None] | None
) -> RolloutWorker:
    student = FakeStudent(config.fake)
    by_name: dict[str, Teacher | None] = {name: teacher for name, (teacher, _) in teachers.items()} or {"": None}
    generators = {
        name: FakeGenerator(config, student, teacher, stop_ids, new_weights) for name, teacher in by_name.items()
    }
    stage_params: list[Any] = [dict.fromkeys(CompletionSource, stage) for stage in config.train.stages]
    decode = partial(make_tokenizer(config.student).decode, skip_special_tokens=True)
    return RolloutWorker(generators, stage_params, decode, partial(evaluate, generators))


def _hf_worker(
    config: Config, teachers: Teachers, stop_ids: frozenset[int], new_weights: Callable[[], PackedWeights | None] | None
) -> RolloutWorker:
    from switchkd.engines.hf.cuda_graphs import capture_for
    from switchkd.engines.hf.student import HFStudent
    from switchkd.rollout.generator import SwitchingGenerator
    from switchkd.rollout.rules import build_rollout_params

    set_threads(resources.of_role(config, "rollout").threads)
    section = config.student
    device = device_of(section)
    tokenizer = make_tokenizer(section)
    model = load_section(section, device)
    student = HFStudent(
        model,
        num_slots=config.rollout.batch_size,
        max_len=max_len(config),
        vocab_size=shared_vocab(tokenizer),
        capture=capture_for(model, section.graphs, key="student.graphs"),
        prepack=section.prepack,
    )

    def generator(name: str, teacher: Teacher | None, head: LMHeadState | None) -> SwitchingGenerator:
        return SwitchingGenerator(
            student=student,
            teacher=teacher,
            head=None if head is None else _reading_head(head, device, section.prepack),
            stop_ids=stop_ids,
            max_draft_tokens=config.rollout.max_draft_tokens,
            drafter=config.rollout.drafter,
            overlap=_overlaps(config.of_teacher(name)),
            device=device,
            new_weights=new_weights,
        )

    generators = {name: generator(name, *pair) for name, pair in teachers.items()} or {"": generator("", None, None)}
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return RolloutWorker(generators, build_rollout_params(config), decode)


def _reading_head(arrays: LMHeadState, device: str, prepack: str) -> LMHead:
    from switchkd.engines.models.lm_head import LMHead

    head = LMHead.from_state(arrays, device=device)
    return head if prepack == "off" else head.prepack()


def _overlaps(config: Config) -> bool:
    """Two half-batches pay where a worker and its teacher compute at the same time."""
    if config.rollout.overlap is not None or config.run.mode == "inprocess":
        return bool(config.rollout.overlap)
    return config.resources.teacher.num_gpus > 0
