"""Rollouts of toy models: block switching is exact for each block size, batch and order of work."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from toy import STOP, VOCAB, ToyStudent, ToyTeacher, pair, rows_of, task

from switchkd.algo import divergence, switching
from switchkd.algo.noise import Purpose, coin, gumbel, noise_bits
from switchkd.algo.sampling import SamplingParams
from switchkd.config.loader import parse
from switchkd.config.schema import HorizonConfig
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.rules import build_rollout_params
from switchkd.rollout.state import RolloutParams
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import CompletionSource, Rollout, RolloutStats, TokenSource

MAX_NEW = 20
RULES = {
    "student": switching.student(),
    "teacher": switching.teacher(),
    "random": switching.random(prob=0.5),
    "mixture": switching.mixture(alpha=0.2),
    "switch": switching.jsd_threshold(max_new_tokens=MAX_NEW),
    "switch-linear": switching.jsd_threshold(schedule="linear", max_new_tokens=MAX_NEW),
    "switch-constant": switching.jsd_threshold(schedule="constant", tau_0=0.2, max_new_tokens=MAX_NEW),
    "switch-growth": switching.jsd_threshold(schedule="exponential_growth", max_new_tokens=MAX_NEW),
    "adaswitch": switching.kl_spike(K=1.5, L=3),
    "adaswitch-available": switching.kl_spike(K=1.5, L=3, divergence="reverse_kl", warm_up="available"),
    "skd": switching.outside_top_k(k=5),
}
SAMPLINGS = {
    "greedy": (SamplingParams(temperature=0.0), SamplingParams(temperature=0.0)),
    "sampled": (SamplingParams(), SamplingParams()),
    "papers": (SamplingParams(temperature=0.5, top_p=0.5), SamplingParams(temperature=0.2, top_p=0.5)),
    "mixed": (SamplingParams(temperature=0.7, top_k=8), SamplingParams(temperature=1.0, top_p=0.9)),
}


def params(rule: switching.Rule, sampling: str = "sampled", seed: int = 7, **more) -> RolloutParams:  # type: ignore[no-untyped-def]
    student, teacher = SAMPLINGS[sampling]
    return RolloutParams(rule=rule, student=student, teacher=teacher, max_new_tokens=MAX_NEW, seed=seed, **more)


def write(  # type: ignore[no-untyped-def]
    a_mode: RolloutParams,
    ids,
    *,
    max_draft_tokens: int,
    slots: int,
    drafter: str = "student",
    distance: float = 1.0,
    overlap: bool = False,
    step_of=lambda rollout_id: 0,
):
    """Rollouts by id, and their generator."""
    p, q = pair(distance)
    worker = SwitchingGenerator(
        student=ToyStudent(q, slots),
        teacher=ToyTeacher(p),
        head=None,
        stop_ids=frozenset({STOP}),
        max_draft_tokens=max_draft_tokens,
        drafter=drafter,
        overlap=overlap,
    )
    found: dict[int, Rollout] = {}

    def emit(rollouts: list[Rollout]) -> None:
        for rollout in rollouts:
            assert rollout.rollout_id not in found
            found[rollout.rollout_id] = rollout

    tasks = [replace(task(i), batch=step_of(i)) for i in ids]
    worker.run([GenerationRequest(task=each, params=a_mode) for each in tasks], emit)
    return found, worker


def slow_rollout(
    a_mode: RolloutParams, rollout_id: int, distance: float = 1.0, step: int = 0
) -> tuple[list[int], list[int]]:
    """Slow reference in float64: decide the writer token by token, then draw with the writer's own key."""
    p, q = pair(distance)
    rule = a_mode.rule
    tokens, sources = task(rollout_id).prompt.token_ids.tolist(), []
    num_prompt, memory = len(tokens), switching.init_memory(rule, 1)
    while len(tokens) - num_prompt < MAX_NEW:
        t = len(tokens) - num_prompt
        p_row, q_row = rows_of(p, tokens)[-1].double(), rows_of(q, tokens)[-1].double()
        noise = gumbel(noise_bits(a_mode.seed, rollout_id, t, Purpose.GUMBEL, VOCAB))
        drafted = _pick(q_row, a_mode.student, noise)
        statistic = rule.statistic(
            p_logits=p_row[None],
            q_logits=q_row[None],
            drafted=torch.tensor([drafted]),
            coins=torch.from_numpy(coin(a_mode.seed, [rollout_id], [t])),
        )
        threshold = rule.threshold(torch.tensor([t]), torch.tensor([step]), memory)
        memory = rule.update(memory, statistic, threshold)
        owner = TokenSource.TEACHER if bool(statistic > threshold) else TokenSource.STUDENT
        if a_mode.teacher_budget is not None and sources.count(TokenSource.TEACHER) >= a_mode.teacher_budget:
            owner = TokenSource.STUDENT
        token = drafted
        if owner == TokenSource.TEACHER:
            own = gumbel(noise_bits(a_mode.seed, rollout_id, t, rule.replacement, VOCAB))
            token = _pick(p_row, a_mode.teacher, own)
        tokens.append(token)
        sources.append(owner)
        if token == STOP:
            break
    return tokens[num_prompt:], sources


def _pick(row: torch.Tensor, sampling: SamplingParams, noise: np.ndarray) -> int:
    """Temper, truncate, and take the arg max with the noise; float64, sorted in full."""
    if sampling.temperature == 0:
        return int(np.argmax(row.numpy()))
    scores = row.numpy() / sampling.temperature
    order = np.lexsort((np.arange(VOCAB), -scores))
    if sampling.top_k:
        order = order[: sampling.top_k]
    mass = np.exp(scores[order] - scores[order].max())
    mass /= mass.sum()
    kept = order[np.cumsum(mass) - mass < sampling.top_p]
    return int(kept[np.argmax(scores[kept] + noise[kept])])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", RULES)
def test_rollouts_equal_a_slow_loop(name: str, sampling: str) -> None:
    """Block switching gives the tokens and sources of a token-by-token float64 loop."""
    a_mode = params(RULES[name], sampling)
    found, _ = write(a_mode, range(12), max_draft_tokens=5, slots=4)
    for rollout_id, rollout in found.items():
        tokens, sources = slow_rollout(a_mode, rollout_id)
        assert rollout.token_ids.tolist() == tokens
        assert rollout.sources.tolist() == sources


@pytest.mark.parametrize("name", RULES)
def test_rollouts_are_equal_for_each_block_batch_and_drafter(name: str) -> None:
    """Block size, batch size, order of work and drafter do not change tokens, sources or statistics."""
    a_mode = params(RULES[name])
    wanted, _ = write(a_mode, range(9), max_draft_tokens=1, slots=1)
    for max_draft_tokens, slots, drafter, ids in [
        (1, 4, "none", range(9)),
        (2, 3, "student", range(9)),
        (5, 8, "student", reversed(range(9))),
        (8, 2, "student", [4, 0, 8, 1, 3, 2, 7, 5, 6]),
        (32, 9, "student", range(9)),
        (1, 3, "teacher", range(9)),
        (5, 4, "teacher", range(9)),
        (32, 9, "teacher", reversed(range(9))),
        (8, 4, "auto", range(9)),
    ]:
        found, _ = write(a_mode, ids, max_draft_tokens=max_draft_tokens, slots=slots, drafter=drafter)
        for i, rollout in wanted.items():
            assert found[i].token_ids.tolist() == rollout.token_ids.tolist()
            assert found[i].sources.tolist() == rollout.sources.tolist()
            assert np.allclose(found[i].statistic, rollout.statistic, atol=1e-6, equal_nan=True)
            np.testing.assert_array_equal(found[i].threshold, rollout.threshold)


@pytest.mark.parametrize("name", ["student", "teacher", "switch-linear", "switch-growth", "adaswitch", "skd"])
def test_a_horizon_ends_each_rollout_at_the_limit_of_its_own_step(name: str) -> None:
    """With a horizon a rollout is the slow loop's up to round(start + (end - start) min(1, s / steps)) tokens, s = its
    own step in its stage, for each block size, batch size, order of work and drafter."""
    limits = [3, 7, 10, 14, 18, 18]  # 3, 6.75, 10.5 (to even), 14.25, 18 and no more
    a_mode = params(RULES[name], horizon=HorizonConfig(start=3, end=18, steps=4), first_step=2)
    wanted = {i: slow_rollout(a_mode, i) for i in range(12)}
    num_cut = 0
    for max_draft_tokens, slots, drafter, ids in [
        (1, 1, "none", range(12)),
        (5, 8, "student", reversed(range(12))),
        (32, 12, "student", range(12)),
        (8, 5, "teacher", range(12)),
        (8, 4, "auto", [4, 0, 8, 1, 11, 3, 2, 7, 10, 5, 6, 9]),
    ]:
        ways = {"max_draft_tokens": max_draft_tokens, "slots": slots, "drafter": drafter}
        found, _ = write(a_mode, ids, step_of=lambda i: 2 + i % 6, **ways)
        for i, (tokens, sources) in wanted.items():
            limit = limits[i % 6]
            assert found[i].token_ids.tolist() == tokens[:limit] and found[i].sources.tolist() == sources[:limit]
            assert found[i].finish_reason == ("eos" if STOP in tokens[:limit] else "length")
            num_cut += len(tokens) > limit
    assert num_cut >= 20


def test_a_horizon_leaves_schedules_alone() -> None:
    """The models' completions have their stage's horizon; a linear threshold falls to 0 at `max_new_tokens` still."""
    horizon = HorizonConfig(start=4, end=8, steps=5)
    rollout = {"max_new_tokens": 10, "horizon": horizon.model_dump(), "rule": {"type": "switch", "schedule": "linear"}}
    stages = [{"steps": 7, "horizon": None}, {"steps": 3}]
    first, second = build_rollout_params(
        parse({"run": {"dir": "run"}, "rollout": rollout, "train": {"stages": stages}})
    )
    for source in (CompletionSource.ROLLOUT, CompletionSource.TEACHER):
        assert (first[source].horizon, second[source].horizon, second[source].first_step) == (None, horizon, 7)
    memory, t = switching.init_memory(second[CompletionSource.ROLLOUT].rule, 2), torch.tensor([5, 10])
    assert second[CompletionSource.ROLLOUT].rule.threshold(t, 0, memory).tolist() == [0.5, 0]


@pytest.mark.parametrize("drafter", ["student", "teacher", "auto"])
@pytest.mark.parametrize("name", ["switch", "adaswitch", "skd", "teacher", "student"])
def test_half_batches_give_the_same_rollouts(name: str, drafter: str) -> None:
    """Two half-batches with overlap give the same tokens and sources."""
    wanted, _ = write(params(RULES[name]), range(9), max_draft_tokens=4, slots=4)
    found, _ = write(params(RULES[name]), range(9), max_draft_tokens=4, slots=4, drafter=drafter, overlap=True)
    for i, rollout in wanted.items():
        assert found[i].token_ids.tolist() == rollout.token_ids.tolist()
        assert found[i].sources.tolist() == rollout.sources.tolist()


@pytest.mark.parametrize("overlap", [False, True])
def test_half_batches_overlap(overlap: bool) -> None:
    """The student drafts during a teacher call in half-batches only."""
    events: list[str] = []

    class Slow(ToyTeacher):
        def score(self, blocks):  # type: ignore[no-untyped-def]
            events.append("begin")
            time.sleep(0.01)
            events.append("end")
            return super().score(blocks)

    class Busy(ToyStudent):
        def extend(self, *args):  # type: ignore[no-untyped-def]
            events.append("draft")
            return super().extend(*args)

    p, q = pair(1.0)
    worker = SwitchingGenerator(
        student=Busy(q, 4), teacher=Slow(p), head=None, stop_ids=frozenset({STOP}), max_draft_tokens=4, overlap=overlap
    )
    worker.run([GenerationRequest(task=task(i), params=params(RULES["switch"])) for i in range(8)], lambda _: None)
    assert overlap == any(pair == ("begin", "draft") for pair in itertools.pairwise(events))


@pytest.mark.parametrize("name", ["switch", "adaswitch", "skd", "teacher"])
@pytest.mark.parametrize("max_draft_tokens", [1, 3, 8])
def test_teacher_output_belongs_to_its_token(name: str, max_draft_tokens: int) -> None:
    """Row t of the teacher output is the teacher's distribution of token t after the prompt and earlier tokens."""
    p, _ = pair()
    found, _ = write(params(RULES[name]), range(8), max_draft_tokens=max_draft_tokens, slots=3)
    for rollout in found.values():
        whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        first = len(rollout.prompt_ids) - 1
        assert rollout.teacher_output is not None
        assert torch.equal(torch.from_numpy(rollout.teacher_output.rows.values), rows_of(p, whole)[first:-1])


def test_statistic_is_the_divergence_of_the_rows() -> None:
    """The statistic of a rollout is the base-2 JSD of both models' rows at each token."""
    p, q = pair()
    found, _ = write(params(RULES["switch"]), range(4), max_draft_tokens=4, slots=4)
    for rollout in found.values():
        whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        first = len(rollout.prompt_ids) - 1
        want = divergence.jsd(rows_of(p, whole)[first:-1].double(), rows_of(q, whole)[first:-1].double(), log_base=2)
        assert np.allclose(rollout.statistic, want.numpy(), atol=1e-6)
        assert np.allclose(rollout.threshold, [math.exp(-0.1 * t) for t in range(rollout.num_tokens)])


@pytest.mark.parametrize(("name", "sampling"), [("random", "sampled"), ("skd", "sampled"), ("switch", "mixed")])
def test_first_token_follows_its_writers_distribution(name: str, sampling: str) -> None:
    """Over many rollouts the first token follows its writer's distribution, SKD's replacement included (chi-square)."""
    a_mode = params(switching.outside_top_k(k=5) if name == "skd" else RULES[name], sampling, seed=3)
    if name == "switch":  # by itself SWITCH starts with the student: force the teacher
        a_mode = params(switching.jsd_threshold(schedule="constant", tau_0=1e-9, max_new_tokens=MAX_NEW), sampling)
    ids = [7 * i for i in range(6000)]  # all have the same prompt
    short = RolloutParams(**{name: getattr(a_mode, name) for name in RolloutParams.__slots__} | {"max_new_tokens": 1})
    found, _ = write(short, ids, max_draft_tokens=1, slots=512)
    p, q = pair()
    prompt = task(0).prompt.token_ids.tolist()
    laws = {TokenSource.TEACHER: (p, a_mode.teacher), TokenSource.STUDENT: (q, a_mode.student)}
    for source, (chain, sampling_of) in laws.items():
        drawn = [int(r.token_ids[0]) for r in found.values() if r.sources[0] == source]
        if not drawn:
            continue
        law = _law(rows_of(chain, prompt)[-1].double(), sampling_of)
        if name == "skd" and source == TokenSource.STUDENT:  # accepted drafts: q given that the teacher allows it
            allowed = torch.topk(rows_of(p, prompt)[-1], 5).indices.numpy()
            law = np.where(np.isin(np.arange(VOCAB), allowed), law, 0)
            law /= law.sum()
        counts = np.bincount(drawn, minlength=VOCAB)
        assert counts[law == 0].sum() == 0
        common = law * len(drawn) >= 5
        seen = np.append(counts[common], counts[~common].sum())
        expected = np.append(law[common], law[~common].sum()) * len(drawn)
        kept = expected > 0
        assert stats.chisquare(seen[kept], expected[kept]).pvalue > 1e-3


def _law(row: torch.Tensor, sampling: SamplingParams) -> np.ndarray:
    probs = torch.softmax(row / sampling.temperature, -1).numpy()
    order = np.lexsort((np.arange(VOCAB), -probs))
    if sampling.top_k:
        order = order[: sampling.top_k]
    mass = probs[order] / probs[order].sum()
    kept = order[np.cumsum(mass) - mass < sampling.top_p]
    law = np.zeros(VOCAB)
    law[kept] = probs[kept] / probs[kept].sum()
    return law


def test_teacher_budget_limits_teacher_tokens() -> None:
    """After `teacher_budget` teacher tokens the student writes, as in the slow reference."""
    a_mode = params(RULES["random"], teacher_budget=3)
    found, _ = write(a_mode, range(10), max_draft_tokens=4, slots=4)
    spent = 0
    for rollout_id, rollout in found.items():
        tokens, sources = slow_rollout(a_mode, rollout_id)
        assert rollout.token_ids.tolist() == tokens and rollout.sources.tolist() == sources
        spent = max(spent, int((rollout.sources == TokenSource.TEACHER).sum()))
    assert spent == 3


def test_blocks_save_teacher_calls() -> None:
    """For a close pair, blocks of four need less than half of lockstep's teacher calls."""
    a_mode = params(RULES["switch"])
    blocks, fast = write(a_mode, range(8), max_draft_tokens=4, slots=8, distance=0.2)
    single, slow = write(a_mode, range(8), max_draft_tokens=1, slots=8, drafter="none", distance=0.2)
    assert all(blocks[i].token_ids.tolist() == single[i].token_ids.tolist() for i in blocks)
    assert fast.calls.num_calls < 0.5 * slow.calls.num_calls


@pytest.mark.parametrize("drafter", ["student", "teacher", "none"])
def test_accepted_and_rejected_tokens_add_up(drafter: str) -> None:
    """Block lengths, accepted tokens and rejections add up for each drafter."""
    rollouts, _ = write(params(RULES["switch"]), range(8), max_draft_tokens=4, slots=4, drafter=drafter)
    for rollout in rollouts.values():
        counts = rollout.stats
        assert sum(counts.block_lengths) == rollout.num_tokens == counts.num_accepted + counts.num_rejections
        assert counts.num_accepted <= counts.num_drafted <= 4 * len(counts.block_lengths)
    total = sum((rollout.stats for rollout in rollouts.values()), RolloutStats())
    assert total.num_rejections > 0
    assert total.num_drafted == sum(rollout.stats.num_drafted for rollout in rollouts.values())
    assert total.block_lengths == [n for rollout in rollouts.values() for n in rollout.stats.block_lengths]


def test_a_worker_reports_the_sum_of_its_rollouts() -> None:
    """A worker's report sums tokens by source, teacher calls and counters over all rollouts of a call."""
    p, q = pair()
    generator = SwitchingGenerator(
        student=ToyStudent(q, 3), teacher=ToyTeacher(p), head=None, stop_ids=frozenset({STOP}), max_draft_tokens=4
    )
    stage = {
        CompletionSource.ROLLOUT: params(RULES["switch"]),
        CompletionSource.DATASET: params(RULES["student"]),
    }
    tasks = [task(i) for i in range(5)]
    tasks += [task(5, completion_source=CompletionSource.DATASET, reference_ids=np.array([5, 6, STOP], np.int32))]
    rollouts: list[Rollout] = []
    report = RolloutWorker({"": generator}, [stage], str).generate(tasks, rollouts.extend)
    assert sorted(rollout.rollout_id for rollout in rollouts) == list(range(6))
    sources = np.concatenate([rollout.sources for rollout in rollouts])
    assert report.num_rollouts == 6 and report.num_tokens == len(sources)
    assert report.num_student_tokens == (sources == TokenSource.STUDENT).sum()
    assert report.num_teacher_tokens == (sources == TokenSource.TEACHER).sum()
    assert report.num_teacher_calls == generator.calls.num_calls
    assert report.stats == sum((rollout.stats for rollout in rollouts), RolloutStats())
    assert (report + report).stats.output_bytes == 2 * report.stats.output_bytes > 0


def test_references_are_scored_unchanged() -> None:
    """A data-set completion keeps its tokens and gets the teacher's row for each."""
    p, q = pair()
    worker = SwitchingGenerator(
        student=ToyStudent(q, 2), teacher=ToyTeacher(p), head=None, stop_ids=frozenset({STOP}), max_draft_tokens=4
    )
    found: list[Rollout] = []
    references = [np.array(ids, np.int32) for ids in ([5, 6, STOP], [4], [9, 9, 9, 9, STOP])]
    tasks = [task(i, completion_source=CompletionSource.DATASET, reference_ids=ids) for i, ids in enumerate(references)]
    worker.run([GenerationRequest(task=t, params=params(RULES["student"])) for t in tasks], found.extend)
    assert [r.token_ids.tolist() for r in found] == [ids.tolist() for ids in references]
    for rollout in found:
        whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        assert rollout.teacher_output is not None
        assert torch.equal(
            torch.from_numpy(rollout.teacher_output.rows.values), rows_of(p, whole)[len(rollout.prompt_ids) - 1 : -1]
        )
        assert set(rollout.sources.tolist()) == {TokenSource.DATA}


def test_reprefill_stamps_new_weights() -> None:
    """Under `reprefill` tokens after new weights have the new version and the new student's draws."""

    class Bundle:
        version = 5

        def __init__(self, chain: torch.Tensor) -> None:
            self.chain = chain

    p, q = pair()
    calls = {"n": 0}
    bundle = Bundle(pair(2.0)[1])

    def offered() -> Bundle | None:
        calls["n"] += 1
        return bundle if calls["n"] > 3 else None

    worker = SwitchingGenerator(
        student=ToyStudent(q, 2),
        teacher=ToyTeacher(p),
        head=None,
        stop_ids=frozenset(),
        max_draft_tokens=2,
        new_weights=offered,  # type: ignore[arg-type]
    )
    found: list[Rollout] = []
    worker.run([GenerationRequest(task=task(0), params=params(RULES["student"]))], found.extend)
    versions = found[0].weight_versions.tolist()
    assert versions == sorted(versions) and set(versions) == {0, 5}
    whole = [*found[0].prompt_ids.tolist(), *found[0].token_ids.tolist()]
    for t, version in enumerate(versions):
        chain = bundle.chain if version == 5 else q
        noise = gumbel(noise_bits(7, 0, t, Purpose.GUMBEL, VOCAB))
        row = rows_of(chain, whole[: len(found[0].prompt_ids) + t])[-1].double()
        assert found[0].token_ids[t] == _pick(row, SamplingParams(), noise)
