"""Defines each step of a run: its rollout ids, the source of each completion, and the learning rate.

In: the stages and a PromptStream. Out: tasks and numbers, pure functions of (config, seed, index), so that a resumed
run gets the same ones. Rollout ids are start indices and continue over stages; more steps in the last stage change no
earlier task. With `adaptive`, the source of a step's batch depends on the evaluations before it, and may be read only
once those are known (`open_until`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from switchkd.algo.noise import Purpose, coin
from switchkd.config.schema import MixConfig, StageConfig
from switchkd.controller.adaptive import BUFFERED, GENERATED, MIXED, AdaptiveSchedule
from switchkd.data.prompts import PromptStream
from switchkd.types import CompletionSource, RolloutTask


def stage_after(stages: Sequence[StageConfig], num_done: int) -> str:
    """Name of the stage that the last of `num_done` steps belongs to; empty before the first step."""
    ends = accumulate(stage.steps for stage in stages)
    return next((stage.name for stage, end in zip(stages, ends, strict=True) if 0 < num_done <= end), "")


class Schedule:
    """The order of a run's rollouts (ids 0 to `num_tasks` - 1) over its steps (0 to `num_steps` - 1) and stages."""

    def __init__(
        self,
        stages: tuple[StageConfig, ...],
        prompts: PromptStream,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        adaptive: AdaptiveSchedule | None = None,
    ) -> None:
        self.stages, self.prompts, self.seed = stages, prompts, seed
        self.samples_per_prompt, self.adaptive = samples_per_prompt, adaptive
        self.stage_ends = list(accumulate(stage.steps for stage in stages))
        """First step after each stage."""
        self.batch_ends = list(accumulate(stage.batch_size for stage in stages for _ in range(stage.steps)))
        """First rollout id after each step."""

    @property
    def num_steps(self) -> int:
        return self.stage_ends[-1]

    @property
    def num_tasks(self) -> int:
        return self.batch_ends[-1] if self.batch_ends else 0

    def stage_index(self, step: int) -> int:
        """Index of the stage that a step belongs to."""
        self._check_step(step)
        return bisect_right(self.stage_ends, step)

    def stage(self, step: int) -> StageConfig:
        return self.stages[self.stage_index(step)]

    def batch_size(self, step: int) -> int:
        return self.stage(step).batch_size

    def step_of(self, rollout_id: int) -> int:
        """The step that trains on a rollout under `fifo`."""
        if not 0 <= rollout_id < self.num_tasks:
            raise IndexError(f"rollout id {rollout_id} is outside this run's 0 to {self.num_tasks - 1}")
        return bisect_right(self.batch_ends, rollout_id)

    def first_id(self, step: int) -> int:
        """The first rollout that a step trains on under `fifo`; for the step after the last, one beyond the last."""
        return self.batch_ends[step - 1] if step else 0

    def rollout_ids(self, step: int) -> range:
        """The rollouts that a step trains on under `fifo`."""
        self._check_step(step)
        return range(self.first_id(step), self.batch_ends[step])

    def task(self, rollout_id: int) -> RolloutTask:
        """The task of one rollout id."""
        step, source = self.step_of(rollout_id), self.completion_source(rollout_id)
        _, prompt = self.prompts[rollout_id // self.samples_per_prompt]
        stage = self.stage_index(step)
        return RolloutTask(rollout_id=rollout_id, batch=step, stage=stage, completion_source=source, prompt=prompt)

    def completion_source(self, rollout_id: int) -> CompletionSource:
        """The source of a completion, drawn from its id or (`per_batch`) from its step."""
        step = self.step_of(rollout_id)
        mix = self.stage(step).mix
        source = self._source(step)
        if source != MIXED:
            return CompletionSource.ROLLOUT if source == GENERATED else CompletionSource.DATASET
        if mix.drawn == "per_batch":
            return _draw_source(mix, self._coin(step, Purpose.BATCH_SOURCE))
        return _draw_source(mix, self._coin(rollout_id, Purpose.ROLLOUT_SOURCE))

    def student_writes(self, step: int) -> bool:
        """Whether the student writes a part of any completion of a step."""
        if not self.stage(step).mix.rollout:
            return False
        return any(self.completion_source(i) == CompletionSource.ROLLOUT for i in self.rollout_ids(step))

    def reuses(self, step: int) -> bool:
        """Whether a step trains on the reuse buffer. The ids of such a step are never written."""
        return self._source(step) == BUFFERED

    def open_until(self, step: int) -> int:
        """The first step whose batch has no known source yet at the time of `step`."""
        if self.adaptive is None:
            return self.num_steps
        every = self.adaptive.every
        return min((step // every + 1) * every, self.stage_ends[self.stage_index(step)])

    def _source(self, step: int) -> str:
        """The source of a step's batch (see `adaptive.py`). Steps are decided once, in order."""
        if self.adaptive is None:
            return MIXED
        for undecided in range(len(self.adaptive.sources), step + 1):
            stage = self.stage(undecided)
            if not stage.mix.rollout:
                self.adaptive.skip()
                continue
            done = undecided - (self.stage_ends[self.stage_index(undecided)] - stage.steps)
            self.adaptive.decide(self._coin(undecided, Purpose.ADAPTIVE_SOURCE), done / stage.steps, stage.batch_size)
        return self.adaptive.sources[step]

    def record_validation_loss(self, step: int, loss: float) -> str:
        """Pass the evaluation before `step` to an adaptive schedule; return a message where phi rises, else ""."""
        adaptive = self.adaptive
        if adaptive is None:
            return ""
        before, counts = adaptive.reference, step > 0 and self.stage(step - 1).mix.rollout > 0
        if not adaptive.record_loss(loss, counts=counts):
            return ""
        return f"validation loss {loss:.4g}, {before:.4g} before: phi rises to {adaptive.phi:g}"

    def lr_at(self, step: int) -> float:
        """A step's learning rate: warm-up from above 0 to the stage's `lr`, then its schedule down to `min_lr_frac`."""
        stage = self.stage(step)
        done = step - (self.stage_ends[self.stage_index(step)] - stage.steps)
        warm_up = min(stage.warmup_steps, stage.steps)
        if done < warm_up:
            return stage.lr * (done + 1) / warm_up
        progress = (done - warm_up) / (stage.steps - warm_up)
        falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return stage.lr * (stage.min_lr_frac + (1 - stage.min_lr_frac) * falling[stage.scheduler])

    def _coin(self, index: int, purpose: Purpose) -> float:
        return float(coin(self.seed, [index], [0], purpose)[0])

    def _check_step(self, step: int) -> None:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside this run's 0 to {self.num_steps - 1}")


def _draw_source(mix: MixConfig, coin: float) -> CompletionSource:
    shares = {
        CompletionSource.ROLLOUT: mix.rollout,
        CompletionSource.DATASET: mix.dataset,
        CompletionSource.TEACHER: mix.teacher,
    }
    present = [source for source, share in shares.items() if share > 0]
    ends = accumulate(shares[source] / sum(shares.values()) for source in present)
    # rounding may leave the last end below 1: the last source takes the rest
    return next((source for source, end in zip(present[:-1], ends, strict=False) if coin < end), present[-1])
