"""DistiLLM's adaptive replay: phi follows the validation loss, and each step's batch follows phi."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import DIE_AFTER, WARM_UP, command, config, config_file, descendants, distance, lines, steps
from test_replay import rollout

from switchkd.config.errors import ConfigError
from switchkd.config.schema import AdaptiveScheduleConfig, MixConfig, StageConfig
from switchkd.controller.adaptive import BUFFERED, FIXED, GENERATED, AdaptiveSchedule
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.schedule import Schedule
from switchkd.data.prompts import PromptStream
from switchkd.data.reuse_buffer import ReuseBuffer
from switchkd.train import train
from switchkd.types import CompletionSource, Prompt

# --- the schedule ----------------------------------------------------------------------------------------------------


def algorithm_1(T: int, B: int, coins: list[float], losses: dict[int, float], *, eps: float, N_phi: int, capacity: int):
    """The authors' loop in the paper's notation: phi before each iteration and the source of its batch."""
    phi, L_prev, stored = 0.0, losses[0], 0
    for t in range(T):
        if t in losses and t > 0 and losses[t] >= L_prev + eps:
            phi, L_prev = min(phi + 1 / N_phi, 1.0), losses[t]
        u = coins[t]
        if u < phi * (1 - t / T) or (u < phi and stored < capacity):
            stored = min(stored + B, capacity)
            yield phi, "generate"
        elif u < phi:
            yield phi, "replay"
        else:
            yield phi, "fixed"


@pytest.mark.parametrize("seed", range(5))
def test_schedule_equals_algorithm_1(seed):
    """phi and the source of each step equal those of the paper's loop, for any losses and coins."""
    rng = random.Random(seed)
    T, B, every, capacity = 400, 4, 10, 40
    coins = [rng.random() for _ in range(T)]
    losses = {t: 2.0 + 1.5 * t / T + rng.uniform(-0.1, 0.1) for t in range(0, T, every)}
    expected = list(algorithm_1(T, B, coins, losses, eps=0.1, N_phi=10, capacity=capacity))
    ours = AdaptiveSchedule(settings=AdaptiveScheduleConfig(), capacity=capacity, every=every)
    names = {GENERATED: "generate", BUFFERED: "replay", FIXED: "fixed"}
    for t in range(T):
        if t in losses:
            ours.record_loss(losses[t], counts=t > 0)
        ours.decide(coins[t], t / T, B)
        assert (pytest.approx(ours.phi), names[ours.sources[t]]) == expected[t]
    assert {source for _, source in expected} == set(names.values()) and expected[-1][0] > 0.5


def test_phi_rises_without_a_better_loss():
    """Under `no_better`, phi rises up to 1 at each loss that is not `margin` below the best one."""
    phi = AdaptiveSchedule(settings=AdaptiveScheduleConfig(rises="no_better", step=0.4), capacity=1, every=1)
    found = [(phi.record_loss(loss, counts=True), phi.phi) for loss in (3.0, 2.9, 2.85, 2.7, 2.0, 2.1, 2.1)]
    assert found == [
        (False, 0.0), (False, 0.0), (True, 0.4), (False, 0.4), (False, 0.4), (True, 0.8), (True, 1.0),
    ]  # fmt: skip
    assert not phi.record_loss(5.0, counts=True) and phi.phi == 1.0


def plan(adaptive: AdaptiveSchedule | None, *stages: StageConfig) -> Schedule:
    prompts = [Prompt(prompt_id=str(i), text="", token_ids=np.ones(1, np.int32)) for i in range(7)]
    return Schedule(stages, PromptStream(prompts, seed=0), seed=0, adaptive=adaptive)


BOTH = MixConfig(rollout=1, dataset=1)


def test_shares_follow_phi_over_a_long_run():
    """At a constant phi, a share phi of the steps uses student text; the share of new rollouts falls linearly to 0."""
    run = plan(
        AdaptiveSchedule(settings=AdaptiveScheduleConfig(start=0.6), capacity=8, every=4),
        StageConfig(steps=4000, batch_size=2, mix=BOTH),
    )
    kinds = ["b" if run.reuses(step) else run.completion_source(2 * step).name for step in range(4000)]
    assert kinds.count("DATASET") / 4000 == pytest.approx(0.4, abs=0.03)
    for quarter in range(4):
        part = kinds[1000 * quarter : 1000 * (quarter + 1)]
        assert part.count("ROLLOUT") / 1000 == pytest.approx(0.6 * (1 - (quarter + 0.5) / 4), abs=0.05)


def test_a_step_opens_with_the_evaluations_before_it():
    """A step is open until the next evaluation; a stage without rollouts keeps its own mix; decisions survive a
    restored state, also with more steps."""
    stages = StageConfig(steps=3, batch_size=2, mix=MixConfig(dataset=1)), StageConfig(steps=9, batch_size=2, mix=BOTH)
    run = plan(AdaptiveSchedule(settings=AdaptiveScheduleConfig(start=0.9), capacity=2, every=4), *stages)
    assert [run.open_until(step) for step in range(12)] == [3, 3, 3, 4, 8, 8, 8, 8, 12, 12, 12, 12]
    assert not run.reuses(2) and run.adaptive.sources == "---"
    run.reuses(7)
    state = run.adaptive.state_dict()
    run.adaptive.record_loss(1.0, counts=True)
    run.reuses(11)
    decided = run.adaptive.sources
    run.adaptive.load_state_dict(state)
    assert run.adaptive.sources == decided and run.adaptive.reference is None
    longer = plan(
        AdaptiveSchedule(settings=AdaptiveScheduleConfig(start=0.9), capacity=2, every=4),
        stages[0],
        StageConfig(**{**dict(stages[1]), "steps": 99}),
    )
    longer.adaptive.load_state_dict(state)
    longer.reuses(11)
    assert longer.adaptive.sources.startswith(state["sources"]) and set(decided[3:]) <= set("gbf")


# --- the buffer ------------------------------------------------------------------------------------------------------


def read(steps: Mapping[int, int]) -> dict[int, Any]:
    """The trained rollouts, as from disk."""
    return {i: rollout(i) for i in steps}


def ids(rollouts: list[Any]) -> list[int]:
    return [one.rollout_id for one in rollouts]


def test_buffer_draws_repeatably_from_the_last_rollouts():
    """A draw is `num` different rollouts of the last `capacity` from earlier steps, a function of (seed, step)."""
    buffer = ReuseBuffer(6, seed=3, load=read)
    for step in range(4):
        buffer.add(step, [rollout(3 * step + i) for i in range(3)])
    assert len(buffer) == 6 and ids(buffer.draw(2, 9)) == [0, 1, 2, 3, 4, 5]
    assert ids(buffer.draw(4, 9)) == [6, 7, 8, 9, 10, 11]
    drawn = {step: ids(buffer.draw(step, 2)) for step in range(4, 30)}
    assert drawn == {step: ids(buffer.draw(step, 2)) for step in drawn}
    assert {i for own in drawn.values() for i in own} == set(range(6, 12))
    assert all(len(set(own)) == 2 for own in drawn.values())
    assert ids(ReuseBuffer(6, seed=4, load=read).draw(4, 2)) == []


def test_buffer_keeps_rollouts_only():
    """The buffer keeps rollouts only, not completions of the data set or of the teacher alone."""
    from dataclasses import replace

    buffer = ReuseBuffer(6, seed=0, load=read)
    buffer.add(
        0,
        [
            replace(rollout(i), completion_source=completion_source)
            for i, completion_source in enumerate(CompletionSource)
        ],
    )
    assert ids(buffer.draw(1, 9)) == [0] and buffer.holds([0]) and not buffer.holds([0, 1])


def test_buffer_rewinds_and_restores():
    """After a rewind, and after a restored state, each step draws what it drew before."""
    buffer = ReuseBuffer(4, seed=1, load=read)
    before = {}
    for step in range(6):
        before[step] = ids(buffer.draw(step, 3))
        buffer.add(step, [rollout(2 * step), rollout(2 * step + 1)])
        if step == 3:
            state = buffer.state_dict(4)
    buffer.release_before(4)
    buffer.rewind(4)
    assert buffer.holds([4, 5, 6, 7]) and not buffer.holds([3]) and not buffer.holds([8])
    other = ReuseBuffer(4, seed=1, load=read)
    assert ids(other.load_state_dict({**state, "rollouts": [*state["rollouts"], rollout(99)]})) == [99]
    for again in (buffer, other):
        for step in (4, 5):
            assert ids(again.draw(step, 3)) == before[step]
            again.add(step, [rollout(2 * step), rollout(2 * step + 1)])


# --- whole runs ------------------------------------------------------------------------------------------------------

EVAL = {"data": "./data.jsonl", "num_prompts": 4, "max_new_tokens": 4, "every": 2, "metrics": ["loss"]}
PHI = {"start": 0.4, "step": 0.2, "rises": "no_better", "margin": 9.0}
REPLAY = {"policy": "adaptive", "capacity": 8, "adaptive": PHI}
STAGES = [
    {**WARM_UP, "steps": 2},
    {"name": "adapt", "steps": 12, "mix": {"rollout": 1, "dataset": 1}, "rule": {"type": "student"},
     "loss": {"type": "skew_kl"}},
]  # fmt: skip
SECTIONS: dict[str, Any] = {"eval": EVAL, "replay": REPLAY, "train": {"checkpoint_every": 3, "stages": STAGES}}


def by_step(run: Path) -> dict[int, list[tuple[Any, ...]]]:
    found: dict[int, list[tuple[Any, ...]]] = {}
    for row in lines(run / "rollouts.jsonl"):
        found.setdefault(row["step"], []).append((row["rollout_id"], row["token_ids"], row["origin"], row["batch"]))
    return {step: sorted(rows) for step, rows in found.items()}


@pytest.fixture(scope="module")
def whole(models) -> Path:
    """The run without interruptions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        assert train(config(models, STAGES, name="adaptive.yaml", **{**SECTIONS, "run": {"dir": "adaptive"}})).finished
    return models / "adaptive"


def test_a_runs_batches_follow_a_rising_phi(whole):
    """phi rises at each evaluation of its stage, each batch has one source, and reused rollouts equal earlier ones."""
    expected = steps(whole)
    phi = [0.4] * 4 + [0.6] * 2 + [0.8] * 2 + [1.0] * 6
    assert [row["replay/phi"] for row in expected] == pytest.approx(phi)
    written = by_step(whole)
    reused = [step for step, row in enumerate(expected) if row["replay/reused"]]
    assert all(len(rows) == 4 for rows in written.values()) and sorted(written) == list(range(14))
    seen: dict[int, Any] = {}
    for step, rows in written.items():
        if step in reused:
            assert all(seen[row[0]] == row and row[2] == "rollout" for row in rows)
        else:
            assert {(row[3], row[0] // 4) for row in rows} == {(step, step)} and len({row[2] for row in rows}) == 1
            seen |= {row[0]: row for row in rows}
    kinds = ["reused" if step in reused else rows[0][2] for step, rows in written.items()]
    assert kinds[:2] == ["dataset"] * 2 and {"reused", "rollout", "dataset"} <= set(kinds[2:])
    ages = [expected[step]["replay/staleness_max"] for step in reused]
    assert max(ages) > 1 and all(row["replay/buffered"] <= 8 for row in expected)
    assert all(row["replay/staleness_max"] == 0 for step, row in enumerate(expected) if step not in reused)


def test_evaluation_loss_is_the_plain_models(whole, monkeypatch):
    """eval/loss is the student's cross-entropy per reference token, end tokens included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from switchkd.controller.preflight import prepare

    monkeypatch.chdir(whole.parent)
    ready = prepare(config(whole.parent, STAGES, name="again.yaml", **SECTIONS))
    model = AutoModelForCausalLM.from_pretrained(whole / "student")
    assert len(AutoTokenizer.from_pretrained(whole / "student")) == 120
    total = num = 0.0
    for prompt in ready.eval_prompts.prompts[:4]:
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, prompt.reference_ids])).long()[None]
        rows = model(ids).logits.detach()[0, len(prompt.token_ids) - 1 : -1, :120].log_softmax(-1)
        total -= float(rows.gather(1, torch.from_numpy(prompt.reference_ids).long()[:, None]).sum())
        num += len(prompt.reference_ids)
    scored = [row for row in lines(whole / "metrics.jsonl") if "eval/loss" in row]
    assert scored[-1]["eval/loss"] == pytest.approx(total / num, abs=1e-4)
    assert len(scored) == 8 and all(math.isfinite(row["eval/loss"]) for row in scored)


@pytest.mark.parametrize("step", [4, 10])
def test_resume_after_sigkill_equals_the_whole_run(whole, place, monkeypatch, capsys, step):
    """After SIGKILL, before or after the buffer's first draw, --resume gives the same rollouts, phi and weights."""
    config_file(place, STAGES, **SECTIONS)
    script = DIE_AFTER.format(step=step, signal="SIGKILL")
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    assert by_step(place / "run") == by_step(whole)
    for name in ("replay/phi", "replay/reused", "loss/total"):
        assert [row[name] for row in steps(place / "run")] == [row[name] for row in steps(whole)]
    assert distance(place / "run" / "student", whole / "student") == 0


def test_resume_with_another_eval_every_is_refused(whole, place):
    """`eval.every` may not change on a resume with adaptive replay."""
    config_file(place, STAGES, **SECTIONS)
    (place / "run").symlink_to(whole)
    with pytest.raises(ConfigError, match=r"eval\.every was 2 and is now 5"):
        train(config(place, STAGES, **{**SECTIONS, "eval": {**EVAL, "every": 5}}), resume=True)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.every=0", "replay.policy=adaptive follows the validation loss, but eval.every=0; set eval.data"),
        ("eval.data=", "but eval.data is empty; set eval.data and eval.every"),
        ("eval.metrics=[kl]", "follows eval/loss; add loss to eval.metrics=['kl']"),
        ("train.stages.1.mix={rollout: 1}", "mix (rollout 1, dataset 0, teacher 0): replay.policy=adaptive draws"),
        ("train.stages.1.mix={rollout: 1, dataset: 1, teacher: 1}", "draws between rollouts and the data set"),
        ("train.stages.1.mix={dataset: 1}", "no stage has rollouts"),
        ("replay.policy=fifo", "replay.adaptive belongs to replay.policy=adaptive, this is fifo"),
        ("replay.policy=adaptiv", "replay.policy='adaptiv'"),
        ("replay.adaptive.start=1.5", "replay.adaptive.start=1.5"),
        ("replay.adaptive.when=always", "replay.adaptive.when: unknown key"),
        ("replay.capacity=3", "is above replay.capacity=3"),
    ],
)
def test_invalid_configs_are_refused_in_one_line(place, monkeypatch, capsys, override, message):
    """An invalid config for adaptive replay is refused in one line with exit code 2; nothing is written."""
    config_file(place, STAGES, **SECTIONS)
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", override)
    said = [line for line in err.splitlines() if line.startswith("switchkd: error:")]
    assert code == 2 and len(said) == 1 and message in said[0], err
    assert not (place / "run").exists()


def test_an_evaluation_set_needs_references(place, monkeypatch, capsys):
    """An evaluation set without references is refused: it has no validation loss."""
    (place / "bare.jsonl").write_text('{"prompt": "say it", "reference": ""}\n')
    config_file(place, STAGES, **{**SECTIONS, "eval": {**EVAL, "data": "./bare.jsonl"}})
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml")
    assert code == 2 and "no reference" in err and not (place / "run").exists()


# --- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_ray_with_a_killed_replay_equals_one_process(cluster, fake_place, monkeypatch):
    """Two workers on Ray train on the rollouts of a run in one process, though the replay is killed while it holds a
    buffer."""
    train(config(fake_place, STAGES, fake=True, **{**SECTIONS, "run": {"dir": "whole"}}))
    log_step, killed = MetricsLog.step, []

    def die(self, step, row):
        log_step(self, step, row)
        if step == 9 and not killed:
            killed.extend(pid for pid, name in descendants(os.getpid()).items() if name.startswith("ray::ReplayActor"))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(MetricsLog, "step", die)
    sections = {**SECTIONS, "run": {"mode": "ray"}}
    sections["rollout"] = {"num_workers": 2}
    assert train(config(fake_place, STAGES, fake=True, **sections)).finished
    run, whole = fake_place / "run", fake_place / "whole"
    assert killed and by_step(run) == by_step(whole)
    assert [row["replay/phi"] for row in steps(run)] == [row["replay/phi"] for row in steps(whole)]
