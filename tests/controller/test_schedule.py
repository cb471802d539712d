"""The schedule is pure: ids, stages, sources and learning rates follow from the config and the seed."""

import numpy as np
import pytest

from switchkd.config.schema import MixConfig, StageConfig
from switchkd.controller.schedule import Schedule
from switchkd.data.prompts import PromptStream
from switchkd.types import CompletionSource, Prompt

PROMPTS = [Prompt(prompt_id=str(i), text="", token_ids=np.ones(1, np.int32)) for i in range(7)]


def plan(*stages: StageConfig, seed: int = 0, samples_per_prompt: int = 1) -> Schedule:
    return Schedule(stages, PromptStream(PROMPTS, seed=seed), seed=seed, samples_per_prompt=samples_per_prompt)


def test_ids_belong_to_one_step_and_stage():
    """Ids count on over the stages, each belongs to one step, and a stage without steps has none."""
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
def test_ids_outside_the_run_are_errors(index):
    """An id or a step outside the run is an IndexError."""
    run = plan(StageConfig(steps=2, batch_size=7))
    for ask in (run.step_of, run.task):
        with pytest.raises(IndexError, match="outside"):
            ask(index)
    with pytest.raises(IndexError, match="outside"):
        run.lr_at(2)


def test_a_longer_last_stage_changes_no_task():
    """A longer last stage leaves all earlier tasks unchanged."""
    mix = MixConfig(rollout=0.4, dataset=0.3, teacher=0.3)
    first = StageConfig(steps=3, batch_size=5, mix=mix)
    short, long = (plan(first, StageConfig(steps=n, batch_size=4, mix=mix), seed=5) for n in (4, 40))
    assert [short.task(i) for i in range(short.num_tasks)] == [long.task(i) for i in range(short.num_tasks)]


def test_sources_follow_the_fractions():
    """Sources are independent draws per rollout with the normalised fractions; a fraction of 0 is never drawn."""
    run = plan(StageConfig(steps=500, batch_size=8, mix=MixConfig(rollout=2, dataset=1, teacher=1)))
    origins = np.array([run.completion_source(i) for i in range(run.num_tasks)])
    shares = [float((origins == completion_source).mean()) for completion_source in CompletionSource]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    repeats = float((origins[1:] == origins[:-1]).mean())
    assert repeats == pytest.approx(0.25 + 2 / 16, abs=0.03)
    only = plan(StageConfig(steps=100, batch_size=8, mix=MixConfig(dataset=0.1)))
    assert {only.completion_source(i) for i in range(800)} == {CompletionSource.DATASET}


def test_per_batch_gives_a_step_one_source():
    """`per_batch` gives each step one source, with the same fractions over the steps."""
    run = plan(StageConfig(steps=2000, batch_size=2, mix=MixConfig(rollout=0.5, dataset=0.5, drawn="per_batch")))
    by_step = [{run.completion_source(i) for i in run.rollout_ids(step)} for step in range(2000)]
    assert all(len(origins) == 1 for origins in by_step)
    assert sum(origins == {CompletionSource.ROLLOUT} for origins in by_step) == pytest.approx(1000, abs=80)


def test_sources_are_pinned():
    """Sources are pinned: a library's version may not change what a resumed run draws."""
    run = plan(StageConfig(steps=4, batch_size=4, mix=MixConfig(rollout=1, dataset=1)), seed=1)
    assert [int(run.completion_source(i)) for i in range(16)] == [0, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1]


def test_learning_rate_warms_up_and_decays_per_stage():
    """Warm-up rises linearly from above 0, the schedule falls to min_lr_frac, and each stage starts anew."""
    flat = StageConfig(steps=3, lr=1.0, scheduler="constant")
    falling = {"steps": 10, "lr": 2.0, "warmup_steps": 2, "min_lr_frac": 0.1}
    run = plan(flat, StageConfig(scheduler="linear", **falling), StageConfig(scheduler="cosine", **falling))
    assert [run.lr_at(step) for step in range(3)] == [1, 1, 1]
    linear = [run.lr_at(step) for step in range(3, 13)]
    assert linear[:3] == [1.0, 2.0, 2.0] and linear[-1] == pytest.approx(2 * (0.1 + 0.9 / 8))
    assert np.diff(linear[2:]) == pytest.approx([-2 * 0.9 / 8] * 7)
    cosine = [run.lr_at(step) for step in range(13, 23)]
    assert cosine[:3] == [1.0, 2.0, 2.0] and cosine[6] == pytest.approx(2 * 0.55) and cosine[-1] > 0.2


def test_a_long_warm_up_ends_at_lr():
    """A warm-up longer than its stage reaches `lr` at the stage's last step."""
    run = plan(StageConfig(steps=4, lr=1.0, warmup_steps=100))
    assert [run.lr_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_consecutive_rollouts_share_a_prompt():
    """`samples_per_prompt` consecutive rollouts share a prompt, across steps and stages."""
    stages = StageConfig(steps=2, batch_size=4), StageConfig(steps=1, batch_size=7)
    single = [plan(*stages, seed=3).task(i).prompt.prompt_id for i in range(15)]
    run = plan(*stages, seed=3, samples_per_prompt=3)
    assert [run.task(i).prompt.prompt_id for i in range(15)] == [single[i // 3] for i in range(15)]
    assert len(set(single[:5])) == 5 and [task.rollout_id for task in map(run.task, range(15))] == list(range(15))
