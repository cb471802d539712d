"""Fake models: rollouts are equal for each block size, batch and recovery, and session errors change them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from runs import STAGES, SWITCH, command, rollouts

from switchkd.config.errors import ConfigError
from switchkd.config.loader import load
from switchkd.config.schema import FakeConfig
from switchkd.controller.metrics import MetricsLog
from switchkd.engines import fake
from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.engines.fake import FakeTeacher
from switchkd.learner.fake import FakeRank
from switchkd.rollout.build import make_worker
from switchkd.rollout.worker import RolloutWorker
from switchkd.train import train
from switchkd.types import (
    BatchAssignment,
    Blocks,
    CompletionSource,
    EvalShard,
    Prompt,
    Ragged,
    Rollout,
    RolloutTask,
    TokenSource,
    WeightRef,
    WorkReport,
)

STOPS = frozenset([fake.END])


def teacher(max_sessions: int = 64) -> FakeTeacher:
    return FakeTeacher("one", FakeConfig(), max_sessions=max_sessions, max_len=200, lease_s=60)


def tasks(num: int, source: CompletionSource = CompletionSource.ROLLOUT) -> list[RolloutTask]:
    return [
        RolloutTask(
            rollout_id=i, batch=0, stage=0, completion_source=source,
            prompt=Prompt(
                prompt_id=str(i), text="", token_ids=np.frombuffer(f"say {i}".encode(), np.uint8).astype(np.int32),
                reference_ids=np.array([*b"word", fake.END], np.int32),
            ),
        )
        for i in range(num)
    ]  # fmt: skip


def worker(place: Path, served: Any = None, seed: int = 0, **rollout: Any) -> RolloutWorker:
    config = runs.config(place, [{**SWITCH, "mix": {"rollout": 1}}], fake=True, rollout=rollout, seed=seed)
    return make_worker(config, {"": (served or teacher(), None)}, STOPS)


def written(by: RolloutWorker, wanted: Sequence[RolloutTask]) -> tuple[list[Rollout], WorkReport]:
    out: list[Rollout] = []
    report = by.generate(wanted, out.extend)
    return sorted(out, key=lambda rollout: rollout.rollout_id), report


def same(one: Sequence[Rollout], other: Sequence[Rollout]) -> bool:
    """Whether tokens, sources, versions and teacher rows are equal."""
    return [_content(rollout) for rollout in one] == [_content(rollout) for rollout in other]


def _content(rollout: Rollout) -> tuple[Any, ...]:
    rows = rollout.teacher_output.rows.values.tolist() if rollout.teacher_output else None
    parts = (rollout.token_ids, rollout.sources, rollout.weight_versions)
    return (rollout.rollout_id, *(part.tolist() for part in parts), rollout.finish_reason, rows)


def test_rollouts_do_not_depend_on_blocks_and_batches(fake_place):
    """Rollouts are equal for each block size and batch size; both models write, and their draws agree at most
    positions."""
    first, report = written(worker(fake_place, max_draft_tokens=4, batch_size=4), tasks(16))
    for size, rows in ((1, 1), (12, 16), (5, 3)):
        assert same(first, written(worker(fake_place, max_draft_tokens=size, batch_size=rows), tasks(16))[0])
    assert {rollout.finish_reason for rollout in first} == {"eos", "length"}
    assert 0.3 < report.num_teacher_tokens / report.num_tokens < 0.7
    assert 0 < report.stats.num_rejections < report.num_teacher_tokens
    assert report.stats.num_accepted == report.num_tokens - report.stats.num_rejections
    assert all(len(r.teacher_output.rows.values) == r.num_tokens for r in first if r.teacher_output)


HORIZON = {"start": 2, "end": 8, "steps": 3}


def test_a_horizon_ends_rollouts_at_the_limit_of_their_step(fake_place):
    """With a horizon a rollout is the first tokens of the one without, up to the limit of its own step, for each block
    size and batch size."""
    wanted = [replace(one, batch=one.rollout_id % 6) for one in tasks(24)]
    whole, _ = written(worker(fake_place), wanted)
    limits = [2, 4, 6, 8, 8, 8]
    for size, rows in ((4, 4), (1, 1), (12, 24)):
        cut, _ = written(worker(fake_place, horizon=HORIZON, max_draft_tokens=size, batch_size=rows), wanted)
        for short, long in zip(cut, whole, strict=True):
            assert short.token_ids.tolist() == long.token_ids[: limits[short.rollout_id % 6]].tolist()
    assert sum(a.num_tokens < b.num_tokens for a, b in zip(cut, whole, strict=True)) > 12


def test_a_resumed_run_keeps_its_horizon(fake_place, monkeypatch):
    """A run with a horizon that SIGTERM stops and that is resumed has the rollouts of an undisturbed run; the limit
    counts each stage's steps and does not cut references."""
    sections = {"fake": True, "rollout": {"horizon": HORIZON}, "replay": {"max_staleness": 2}}
    train(runs.config(fake_place, STAGES, **sections, run={"dir": "whole"}))
    whole, log_step = rollouts(fake_place / "whole"), MetricsLog.step

    def stop(self, step, row):
        log_step(self, step, row)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "step", stop)
        assert not train(runs.config(fake_place, STAGES, **sections)).finished
    assert train(runs.config(fake_place, STAGES, **sections), resume=True).finished
    assert rollouts(fake_place / "run") == whole
    of_step = [0, 0, 0, 2, 4, 6, 8, 2, 4, 6]  # the first stage has references only
    lengths = [(len(ids), of_step[step], dict(sources)) for ids, sources, step in whole.values()]
    generated = [(num, limit) for num, limit, sources in lengths if "data" not in sources]
    assert all(num <= limit for num, limit in generated)
    assert {limit for num, limit in generated if num == limit} == {2, 4, 6, 8}
    assert any(num > limit for num, limit, sources in lengths if "data" in sources and limit)


def test_completions_follow_their_source(fake_place):
    """Data-set completions are the references; teacher completions do not depend on the student's weights."""
    ours = worker(fake_place)
    references, _ = written(ours, tasks(3, CompletionSource.DATASET))
    assert all(
        r.token_ids.tolist() == [*b"word", fake.END] and set(r.sources) == {TokenSource.DATA} for r in references
    )
    alone, _ = written(ours, tasks(3, CompletionSource.TEACHER))
    ours.student.weights = 7
    assert same(alone, written(ours, tasks(3, CompletionSource.TEACHER))[0])
    assert all(set(r.sources) == {TokenSource.TEACHER} and r.teacher_output for r in alone)


def test_an_evaluation_draws_by_seed(fake_place):
    """Each seed of an evaluation has completions of its own, the same in any shard."""
    prompts = tuple((i, task.prompt) for i, task in enumerate(tasks(6)))

    def texts(prompts: Any, *seeds: int) -> dict[tuple[int, int], str]:
        shard = EvalShard(prompts=prompts, seeds=seeds, temperature=1.0, max_new_tokens=20, with_teacher=False)
        return {(row.seed, row.index): row.text for row in worker(fake_place).evaluate(shard)}

    together = texts(prompts, 0, 1, 7)
    assert len(set(together.values())) == len(together) == 18
    assert together == texts(prompts, 7) | texts(prompts[::2], 0, 1) | texts(prompts[1::2], 1, 0)


def test_weights_a_seed_and_the_teacher_change_rollouts(fake_place):
    first, _ = written(worker(fake_place), tasks(8))
    other = worker(fake_place)
    other.student.weights = 2
    assert not same(first, written(other, tasks(8))[0])
    named = FakeTeacher("two", FakeConfig(), max_sessions=64, max_len=200, lease_s=60)
    assert not same(first, written(worker(fake_place, named), tasks(8))[0])
    assert not same(first, written(worker(fake_place, seed=1), tasks(8))[0])


def test_rows_of_a_batch_share_a_pass(fake_place, monkeypatch):
    """A round sleeps once, for its longest draft."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    config = runs.config(fake_place, [{**SWITCH, "mix": {"rollout": 1}}], fake={"student_s": 0.5})
    made = make_worker(config, {"": (teacher(), None)}, STOPS)
    written(made, tasks(4))
    rounds = [seconds for seconds in slept if seconds]
    assert len(rounds) == made.generators[""].num_rounds
    assert max(rounds) == 0.5 * config.rollout.max_draft_tokens


class WrongFirstToken:
    """Passes calls on with the first token of each block changed."""

    def __init__(self, inner: FakeTeacher) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def score(self, blocks: Blocks) -> Any:
        parts = [part.copy() for part in blocks.tokens.split()]
        for part in parts:
            part[:1] += 1
        return self.inner.score(replace(blocks, tokens=Ragged.concat(parts, np.int32)))


def test_a_wrong_session_changes_rollouts(fake_place):
    """A session with a wrong token changes the rollouts."""
    first, _ = written(worker(fake_place), tasks(8))
    assert not same(first, written(worker(fake_place, WrongFirstToken(teacher())), tasks(8))[0])


def test_a_full_teacher_is_waited_for(fake_place):
    """A worker waits for a full teacher, and an unknown session is an error."""
    first, _ = written(worker(fake_place, batch_size=8), tasks(8))
    small = teacher(max_sessions=3)
    assert same(first, written(worker(fake_place, small, batch_size=8), tasks(8))[0])
    lone = Ragged.concat([[5]], np.int32)
    with pytest.raises(UnknownSession):
        one = np.array([9], np.int64)
        small.score(Blocks(session_ids=one, base_lens=np.array([1]), first_rows=np.array([0]), tokens=lone))
    with pytest.raises(TeacherBusy):
        ids = np.arange(4)
        small.open(sessions(ids))


def sessions(ids: np.ndarray) -> Any:
    from switchkd.types import Sessions

    return Sessions(session_ids=ids, tokens=Ragged.concat([[1]] * len(ids), np.int32))


def test_ranks_agree_and_workers_load_their_weights(fake_place):
    """Ranks hold the same weights for any number of ranks; a worker loads newer undamaged ones; a checkpoint restores
    them."""
    config = runs.config(fake_place, STAGES, fake=True)
    made = {rollout.rollout_id: rollout for rollout in written(worker(fake_place), tasks(4))[0]}
    ranks = [FakeRank(config, rank, lambda ids: [made[i] for i in ids]) for rank in (0, 1)]
    batch = BatchAssignment(step=0, stage=0, rollout_ids=((0, 3), (1, 2)), num_loss_tokens=9)
    losses = [rank.step(batch, 1e-3).loss for rank in ranks]
    alone = FakeRank(config, 0, lambda ids: [made[i] for i in ids])
    losses.append(alone.step(replace(batch, rollout_ids=((2, 1, 0, 3),)), 1e-3).loss)
    assert len(set(losses)) == 1 and ranks[0].weights == ranks[1].weights == alone.weights != fake.FIRST_WEIGHTS
    packed = ranks[0].publish(1)
    assert packed and ranks[1].publish(1) is None
    reader = worker(fake_place)
    reader.load_weights(WeightRef(version=1, ref=packed), lambda ref: ref.ref)
    assert (reader.student.weights, reader.order) == (alone.weights, (0, 1))
    damaged = replace(packed, version=2, buckets=(packed.buckets[0] + 1,))
    with pytest.raises(ValueError, match="weights of version 2 are damaged"):
        reader.load_weights(WeightRef(version=2, ref=damaged), lambda ref: ref.ref)
    reader.load_weights(WeightRef(version=0, ref=damaged), lambda ref: ref.ref)  # older: not fetched
    ranks[0].save(fake_place / "checkpoint", "tag")
    fresh = FakeRank(config, 1, lambda ids: [])
    fresh.load(fake_place / "checkpoint", "tag")
    assert fresh.weights == alone.weights


def test_a_run_repeats_and_another_seed_differs(fake_place, fake_alone):
    """A run gives the same rollouts again, and another seed gives others."""
    train(runs.config(fake_place, STAGES, fake=True))
    assert rollouts(fake_place / "run") == rollouts(fake_alone)
    train(runs.config(fake_place, STAGES, fake=True, seed=1, run={"dir": "other"}))
    assert rollouts(fake_place / "other") != rollouts(fake_alone)


def test_fake_and_real_backends_do_not_mix(fake_place, monkeypatch, capsys):
    """A mix of fake and real backends is refused in one line."""
    mixed = {"teacher": {"backend": "fake"}, "learner": {"backend": "fake"}}
    with pytest.raises(ConfigError, match=r"^learner.backend=fake, but student.backend=hf: fake and real"):
        runs.config(fake_place, STAGES, **mixed)
    file = runs.config_file(fake_place, STAGES, fake=True)
    code, _, err = command(monkeypatch, capsys, "plan", file)
    assert code == 2 and "student.backend=fake: a plan is about models" in err
    code, out, _ = command(monkeypatch, capsys, "doctor", file)
    assert code == 0 and "30 prompts" in out and "dry pass" not in out


def test_the_shipped_config_is_fake():
    config = load(Path(__file__).parents[2] / "configs" / "fake.yaml")
    assert config.is_fake and config.fake.teacher_s > 0


NO_TORCH = """
import sys
import switchkd.actors.learner_actor, switchkd.actors.replay_actor, switchkd.actors.rollout_actor
import switchkd.actors.teacher_actor, switchkd.actors.teacher_pool
from pathlib import Path
from switchkd.config.loader import load
from switchkd.data.build import make_replay
from switchkd.engines.build import make_teacher
from switchkd.learner.rank import RankInfo, make_rank
from switchkd.rollout.build import make_worker

config = load("config.yaml")
teacher = make_teacher(config)
replay = make_replay(config, Path("run"))
worker = make_worker(config, {"": (teacher, teacher.lm_head_state())}, frozenset())
make_rank(config, RankInfo(), {}, replay.fetch)
print([name for name in ("torch", "transformers", "deepspeed", "datasets") if name in sys.modules])
"""


def test_actors_with_fakes_import_no_torch(fake_place):
    """The processes of all actors, built with fakes, import no heavy package."""
    runs.config_file(fake_place, STAGES, fake=True)
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]
