"""Builds the schedule and the evaluator of a prepared run."""

from __future__ import annotations

from switchkd.config.schema import StageConfig
from switchkd.controller.adaptive import AdaptiveSchedule
from switchkd.controller.evaluation import Evaluator
from switchkd.controller.preflight import PreparedRun
from switchkd.controller.schedule import Schedule
from switchkd.data.prompts import PromptStream


def build_schedule(ready: PreparedRun, stages: tuple[StageConfig, ...] | None = None) -> Schedule:
    """Build the schedule of the run's stages, or of `stages`."""
    config = ready.config
    stream = PromptStream(ready.prompts.prompts, seed=config.seed, shuffle=config.data.shuffle)
    samples, replay, adaptive = config.rollout.samples_per_prompt, config.replay, None
    if replay.policy == "adaptive" and stages is None:  # `stages` are inspected, not trained
        adaptive = AdaptiveSchedule(settings=replay.adaptive, capacity=replay.capacity, every=config.eval.every)
    return Schedule(
        stages or config.train.stages, stream, seed=config.seed, samples_per_prompt=samples, adaptive=adaptive
    )


def build_evaluator(ready: PreparedRun) -> Evaluator:
    prompts = ready.eval_prompts.prompts if ready.eval_prompts else ()
    return Evaluator(ready.config.eval, prompts, has_teacher=ready.config.needs_teacher)
