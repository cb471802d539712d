"""From a prepared run to its plan and its examiner."""

from __future__ import annotations

from switchkd.config.schema import Stage
from switchkd.controller.adaptive import Adaptive
from switchkd.controller.evaluation import Examiner
from switchkd.controller.preflight import Ready
from switchkd.controller.schedule import RunPlan
from switchkd.data.prompts import PromptStream


def _plan(ready: Ready, stages: tuple[Stage, ...] | None = None) -> RunPlan:
    """Of the run's stages, or of others."""
    config = ready.config
    stream = PromptStream(ready.prompts.prompts, seed=config.seed, shuffle=config.data.shuffle)
    samples, replay, adaptive = config.rollout.samples_per_prompt, config.replay, None
    if replay.policy == "adaptive" and stages is None:  # other stages are looked at, not trained
        adaptive = Adaptive(numbers=replay.phi, capacity=replay.capacity, every=config.eval.every)
    return RunPlan(
        stages or config.train.stages, stream, seed=config.seed, samples_per_prompt=samples, adaptive=adaptive
    )


def _examiner(ready: Ready) -> Examiner:
    prompts = ready.eval_prompts.prompts if ready.eval_prompts else ()
    return Examiner(ready.config.eval, prompts, has_teacher=ready.config.needs_teacher)
