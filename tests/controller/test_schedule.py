"""The run's plan is pure: ids, stages, origins and learning rates follow from the config and the seed."""

import numpy as np
import pytest

from switchkd.config.schema import MixConfig, StageConfig
from switchkd.controller.schedule import Schedule
from switchkd.data.prompts import PromptStream
from switchkd.types import CompletionSource, Prompt

PROMPTS = [Prompt(prompt_id=str(i), text="", token_ids=np.ones(1, np.int32)) for i in range(7)]


def plan(*stages: StageConfig, seed: int = 0, samples_per_prompt: int = 1) -> Schedule:
    return Schedule(stages, PromptStream(PROMPTS, seed=seed), seed=seed, samples_per_prompt=samples_per_prompt)


def test_ids_steps_and_stages():
    """Ids run on over the stages; each belongs to one step; a stage of no steps is passed over."""
    run = plan(
        StageConfig(steps=2, batch_size=4), StageConfig(steps=0, batch_size=9), StageConfig(steps=3, batch_size=2)
    )
    assert (run.num_steps, run.num_tasks, run.stage_ends) == (5, 14, [2, 2, 5])
    assert [run.stage_index(step) for step in range(5)] == [0, 0, 2, 2, 2]
    assert [run.batch_size(step) for step in range(5)] == [4, 4, 2, 2, 2]
    assert [list(run.rollout_ids(step)) for step in (0, 1, 2, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [12, 13]]
    assert [run.first_id(step) for step in (0, 1, 5)] == [0, 4, 14]
    for step in range(5):
        assert {run.step_of(i) for i in run.rollout_ids(step)} == {step}
        tasks = [run.task(i) for i in run.rollout_ids(step)]
        assert {(task.batch, task.stage) for task in tasks} == {(step, run.stage_index(step))}


@pytest.mark.parametrize("index", [-1, 14])
def test_outside(index):
    """An id or a step outside the run is an error, not a wrapped index."""
    run = plan(StageConfig(steps=2, batch_size=7))
    for ask in (run.step_of, run.task):
        with pytest.raises(IndexError, match="outside"):
            ask(index)
    with pytest.raises(IndexError, match="outside"):
        run.lr_at(2)


def test_longer_last_stage_changes_no_task():
    """Extending the last stage's steps leaves every earlier task as it was."""
    mix = MixConfig(rollout=0.4, dataset=0.3, teacher=0.3)
    first = StageConfig(steps=3, batch_size=5, mix=mix)
    short, long = (plan(first, StageConfig(steps=n, batch_size=4, mix=mix), seed=5) for n in (4, 40))
    assert [short.task(i) for i in range(short.num_tasks)] == [long.task(i) for i in range(short.num_tasks)]


def test_origins_follow_the_fractions():
    """Origins are drawn per rollout with the (normalised) fractions, independent of each other; zero means never."""
    run = plan(StageConfig(steps=500, batch_size=8, mix=MixConfig(rollout=2, dataset=1, teacher=1)))
    origins = np.array([run.completion_source(i) for i in range(run.num_tasks)])
    shares = [float((origins == completion_source).mean()) for completion_source in CompletionSource]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    repeats = float((origins[1:] == origins[:-1]).mean())
    assert repeats == pytest.approx(0.25 + 2 / 16, abs=0.03)
    only = plan(StageConfig(steps=100, batch_size=8, mix=MixConfig(dataset=0.1)))
    assert {only.completion_source(i) for i in range(800)} == {CompletionSource.DATASET}


def test_per_batch_origins():
    """`per_batch` gives a whole step one origin, with the same fractions over the steps."""
    run = plan(StageConfig(steps=2000, batch_size=2, mix=MixConfig(rollout=0.5, dataset=0.5, drawn="per_batch")))
    by_step = [{run.completion_source(i) for i in run.rollout_ids(step)} for step in range(2000)]
    assert all(len(origins) == 1 for origins in by_step)
    assert sum(origins == {CompletionSource.ROLLOUT} for origins in by_step) == pytest.approx(1000, abs=80)


def test_origins_are_stable_for_ever():
    """What a resumed run draws may not depend on a library's version: pinned."""
    run = plan(StageConfig(steps=4, batch_size=4, mix=MixConfig(rollout=1, dataset=1)), seed=1)
    assert [int(run.completion_source(i)) for i in range(16)] == [1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]


def test_learning_rate():
    """Warm-up rises linearly from above 0, the schedule falls towards min_lr_frac, each stage begins anew."""
    flat = StageConfig(steps=3, lr=1.0, scheduler="constant")
    falling = {"steps": 10, "lr": 2.0, "warmup_steps": 2, "min_lr_frac": 0.1}
    run = plan(flat, StageConfig(scheduler="linear", **falling), StageConfig(scheduler="cosine", **falling))
    assert [run.lr_at(step) for step in range(3)] == [1, 1, 1]
    linear = [run.lr_at(step) for step in range(3, 13)]
    assert linear[:3] == [1.0, 2.0, 2.0] and linear[-1] == pytest.approx(2 * (0.1 + 0.9 / 8))
    assert np.diff(linear[2:]) == pytest.approx([-2 * 0.9 / 8] * 7)
    cosine = [run.lr_at(step) for step in range(13, 23)]
    assert cosine[:3] == [1.0, 2.0, 2.0] and cosine[6] == pytest.approx(2 * 0.55) and cosine[-1] > 0.2


def test_warm_up_longer_than_the_stage():
    """A warm-up that does not end within its stage still rises, to `lr` at the stage's last step."""
    run = plan(StageConfig(steps=4, lr=1.0, warmup_steps=100))
    assert [run.lr_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_samples_per_prompt():
    """So many rollouts in a row, across steps and stages, have the same prompt; then the next one's turn comes."""
    stages = StageConfig(steps=2, batch_size=4), StageConfig(steps=1, batch_size=7)
    single = [plan(*stages, seed=3).task(i).prompt.prompt_id for i in range(15)]
    run = plan(*stages, seed=3, samples_per_prompt=3)
    assert [run.task(i).prompt.prompt_id for i in range(15)] == [single[i // 3] for i in range(15)]
    assert len(set(single[:5])) == 5 and [task.rollout_id for task in map(run.task, range(15))] == list(range(15))
