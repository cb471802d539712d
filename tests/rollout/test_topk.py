"""`teacher.output: top_logprobs`: rows cut to their top k, and rollouts decided and drawn from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import test_exact
import torch
from test_rollout import MAX_NEW, RULES, SAMPLINGS, _pick, params
from test_rollout import write as write_full
from tiny import NUM_TOKENS
from toy import STOP, VOCAB, ToyStudent, ToyTeacher, pair, rows_of, task

from switchkd.algo import divergence, switching
from switchkd.algo.losses import uncertainty
from switchkd.algo.noise import Purpose, coin, gumbel, noise_bits
from switchkd.algo.sampling import SamplingParams
from switchkd.algo.topk import compress, kept, pack, spread, unpack
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import RolloutParams
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import (
    Blocks,
    CompletionSource,
    EvalShard,
    Ragged,
    Rollout,
    TeacherOutput,
    TokenSource,
    WriteRequest,
    Written,
)

torch.set_num_threads(1)


# --- rows ------------------------------------------------------------------------------------------------------------


def cases(seed: int = 0, num: int = 400, vocab: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of float32 rows [num, vocab]: peaked, flat, near each other, equal, far apart, with flat tails."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    p = normal(num, vocab) * (6 * torch.rand(num, 1, generator=generator) ** 2)
    near = torch.rand(num, 1, generator=generator) ** 2
    q = p * (1 - near) + near * normal(num, vocab) * 3
    kind = torch.arange(num) % 8
    q[kind == 1] = p[kind == 1]  # equal
    p[kind == 2], q[kind == 2] = 30 * normal(vocab), 30 * normal(vocab)  # one-hot, on different ids
    p[kind == 3] = 0.01 * normal(int((kind == 3).sum()), vocab)  # flat
    q[kind == 4] = 0.01 * normal(int((kind == 4).sum()), vocab)
    p[kind == 5, 20:] = -1.0  # flat tails, with ties
    half = vocab // 2  # (nearly) disjoint
    p[kind == 6, :half] -= 12
    q[kind == 6, half:] -= 12
    return p, q


@pytest.mark.parametrize("k", [1, 5, 24, 30])
def test_top_k_equals_a_full_sort(k: int) -> None:
    """The top k are ordered by value, then id, and the tail's sums equal float64's."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randint(0, 6, (200, 24), generator=generator).float()  # full of ties
    row = compress(logits, k)
    log_p = logits.double().log_softmax(-1)
    for n in range(len(logits)):
        order = np.lexsort((np.arange(24), -logits[n].numpy()))
        assert row.ids[n].tolist() == order[:k].tolist()
        rest = log_p[n][torch.from_numpy(order[k:].copy())]
        assert float(row.tail_mass[n]) == pytest.approx(float(rest.exp().sum()), rel=1e-6, abs=1e-12)
        assert float(row.tail_entropy[n]) == pytest.approx(float(-(rest.exp() * rest).sum()), rel=1e-6, abs=1e-12)
        assert torch.allclose(row.logprobs[n].double(), log_p[n][row.ids[n]], atol=1e-6)


def test_packing_is_bit_equal() -> None:
    """Packed rows are bit-equal after unpacking, also through NumPy."""
    row = compress(cases()[0], 16)
    words = pack(row)
    assert words.dtype == torch.int32 and words.shape == (400, 2 * 16 + 2)
    back = unpack(torch.from_numpy(words.numpy().copy()))
    for name in ("ids", "logprobs", "tail_mass", "tail_entropy"):
        assert torch.equal(getattr(back, name), getattr(row, name))


@pytest.mark.parametrize("k", [1, 8, 299, 300])
def test_spread_and_kept_rebuild_rows(k: int) -> None:
    """`spread` gives the tail one equal probability below the kept ids'; `kept` gives the kept ids alone."""
    p, _ = cases()
    row = compress(p, k)
    whole, alone = spread(row, 300), kept(row)
    torch.testing.assert_close(whole.exp().sum(1), torch.ones(400), atol=1e-4, rtol=0)
    for n in range(400):
        tail = np.setdiff1d(np.arange(300), row.ids[n].numpy())
        assert torch.equal(whole[n, row.ids[n]], row.logprobs[n]) and torch.equal(alone[n, row.ids[n]], row.logprobs[n])
        assert len(set(whole[n, tail].tolist())) <= 1 and (whole[n, tail] < row.logprobs[n, -1]).all()
        assert torch.isneginf(alone[n, tail[tail < alone.shape[1]]]).all()


# --- rollouts on toy chains ------------------------------------------------------------------------------------------


class TopKTeacher(ToyTeacher):
    """Sends the top k and draws from them."""

    def __init__(self, chain: torch.Tensor, k: int) -> None:
        super().__init__(chain)
        self.k = k

    def score(self, blocks: Blocks) -> TeacherOutput:
        return self._brief(super().score(blocks))

    def write(self, request: WriteRequest) -> Written:
        whole = ToyTeacher(self.chain)
        whole.sessions = self.sessions
        top_k = min(request.top_k or self.k, self.k)
        fields = {name: getattr(request, name) for name in WriteRequest.__slots__}
        written = whole.write(WriteRequest(**fields | {"top_k": top_k}))
        return Written(
            tokens=written.tokens, margins=written.margins, teacher_output=self._brief(written.teacher_output)
        )

    def _brief(self, output: TeacherOutput) -> TeacherOutput:
        words = pack(compress(torch.from_numpy(output.rows.values), self.k)).numpy()
        return TeacherOutput(kind="top_logprobs", dtype="int32", rows=Ragged(words, output.rows.lengths))


def generator(k: int, *, slots: int = 4, max_draft_tokens: int = 4, **more) -> SwitchingGenerator:  # type: ignore[no-untyped-def]
    p, q = pair()
    return SwitchingGenerator(
        student=ToyStudent(q, slots), teacher=TopKTeacher(p, k), head=None, stop_ids=frozenset({STOP}),
        max_draft_tokens=max_draft_tokens, **more,
    )  # fmt: skip


def write(a_mode: RolloutParams, ids, *, k: int, **more) -> dict[int, Rollout]:  # type: ignore[no-untyped-def]
    """Rollouts by id from top-k rows."""
    done: list[Rollout] = []
    generator(k, **more).run([GenerationRequest(task=task(i), params=a_mode) for i in ids], done.extend)
    return {rollout.rollout_id: rollout for rollout in done}


def slow_rollout(a_mode: RolloutParams, rollout_id: int, k: int) -> tuple[list[int], list[int]]:
    """Slow reference in float64: the statistic reads the teacher's k first ids and one bin for all others, and the
    teacher draws from those k ids."""
    p, q = pair()
    rule = a_mode.rule
    tokens, sources = task(rollout_id).prompt.token_ids.tolist(), []
    num_prompt, memory = len(tokens), switching.init_memory(rule, 1)
    while len(tokens) - num_prompt < MAX_NEW:
        t = len(tokens) - num_prompt
        p_row, q_row = rows_of(p, tokens)[-1].double(), rows_of(q, tokens)[-1].double()
        first = np.lexsort((np.arange(VOCAB), -p_row.numpy()))[:k].copy()
        drafted = _pick(q_row, a_mode.student, gumbel(noise_bits(a_mode.seed, rollout_id, t, Purpose.GUMBEL, VOCAB)))
        p_bins, q_bins = (_bins(row.softmax(0).numpy(), first) for row in (p_row, q_row))
        if rule.needs_draft:  # the rank: behind all kept ids where the id is not one of them
            rank = int(np.flatnonzero(first == drafted)[0]) + 1 if drafted in first else k + 1
            statistic = torch.tensor([float(rank)])
        else:
            statistic = rule.statistic(
                p_logits=torch.from_numpy(p_bins).log()[None],
                q_logits=torch.from_numpy(q_bins).log()[None],
                drafted=torch.tensor([drafted]),
                coins=torch.from_numpy(coin(a_mode.seed, [rollout_id], [t])),
            )
        threshold = rule.threshold(torch.tensor([t]), torch.tensor([0]), memory)
        memory = rule.update(memory, statistic, threshold)
        owner = TokenSource.TEACHER if bool(statistic > threshold) else TokenSource.STUDENT
        token = drafted
        if owner == TokenSource.TEACHER:
            noise = gumbel(noise_bits(a_mode.seed, rollout_id, t, rule.replacement, VOCAB))
            alone = torch.full_like(p_row, -math.inf)
            alone[first] = p_row[first]
            token = _pick(alone, a_mode.teacher, noise)
        tokens.append(token)
        sources.append(owner)
        if token == STOP:
            break
    return tokens[num_prompt:], sources


def _bins(law: np.ndarray, first: np.ndarray) -> np.ndarray:
    rest = np.delete(law, first).sum()
    return np.append(law[first], rest) if len(first) < VOCAB else law[first]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("k", [6, 12])
@pytest.mark.parametrize("name", RULES)
def test_rollouts_equal_a_slow_loop_with_one_tail_bin(name: str, k: int, sampling: str) -> None:
    """Tokens and sources equal a float64 loop with one bin for the tail, for each rule and sampling."""
    a_mode = params(RULES[name], sampling)
    for rollout_id, rollout in write(a_mode, range(6), k=k).items():
        tokens, sources = slow_rollout(a_mode, rollout_id, k)
        assert rollout.token_ids.tolist() == tokens
        assert rollout.sources.tolist() == sources


def test_all_ids_give_the_rollouts_of_full_rows() -> None:
    """With all ids in the top k rollouts equal those of full rows; SKD needs only its own k."""
    for name, k, sampling in (("switch", VOCAB, "sampled"), ("adaswitch", VOCAB, "mixed"), ("skd", 5, "greedy")):
        exact, _ = write_full(params(RULES[name], sampling), range(8), max_draft_tokens=4, slots=4)
        assert_equal(exact, write(params(RULES[name], sampling), range(8), k=k))


def assert_equal(some: dict[int, Rollout], others: dict[int, Rollout]) -> None:
    for i, rollout in some.items():
        assert others[i].token_ids.tolist() == rollout.token_ids.tolist()
        assert others[i].sources.tolist() == rollout.sources.tolist()


@pytest.mark.parametrize("sampling", ["sampled", "mixed"])
@pytest.mark.parametrize("name", RULES)
def test_rollouts_are_equal_for_each_block_batch_and_drafter(name: str, sampling: str) -> None:
    """Rollouts from the same top-k rows are equal for each block size, batch, drafter and overlap."""
    a_mode = params(RULES[name], sampling)
    single = write(a_mode, range(8), k=4, max_draft_tokens=1, slots=2, drafter="none")
    for max_draft_tokens, slots, drafter, overlap in [
        (5, 3, "student", False),
        (4, 6, "student", True),
        (4, 6, "teacher", False),
        (8, 3, "auto", True),
    ]:
        how = {"max_draft_tokens": max_draft_tokens, "slots": slots, "drafter": drafter, "overlap": overlap}
        assert_equal(single, write(a_mode, range(8), k=4, **how))


def test_rollouts_of_top_k_rows_are_marked() -> None:
    """Each rollout with top-k rows is marked approximate, unscored rollouts and those of full rows are not."""
    for name in ("random", "student", "teacher", "switch", "skd"):
        assert all(rollout.approximate for rollout in write(params(RULES[name]), range(4), k=4).values())
    assert not any(r.approximate for r in write(params(RULES["student"], scored=False), range(4), k=4).values())
    exact, _ = write_full(params(RULES["switch"]), range(4), max_draft_tokens=4, slots=4)
    assert not any(rollout.approximate for rollout in exact.values())


def test_stats_count_bytes_and_tail_mass() -> None:
    """A rollout's stats have the bytes of its top-k rows and the sum of its tail masses."""
    k = 8
    for rollout in write(params(RULES["switch-constant"]), range(12), k=k).values():
        assert rollout.stats.output_bytes == rollout.stats.num_scored_rows * (8 * k + 8)
        assert rollout.teacher_output is not None
        assert rollout.teacher_output.rows.values.shape == (rollout.num_tokens, 2 * k + 2)
        tail = unpack(torch.from_numpy(rollout.teacher_output.rows.values)).tail_mass
        assert rollout.stats.num_top_rows == rollout.num_tokens
        assert rollout.stats.tail_mass == pytest.approx(float(tail.sum()), rel=1e-6)


def check_uncertainty(rollout: Rollout, k: int) -> bool:
    """UnC is exact for a kept id and that of an even tail for another; return whether there was another."""
    p, _ = pair()
    whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
    rows = rows_of(p, whole)[len(rollout.prompt_ids) - 1 : -1]
    exact = uncertainty(rows.double(), torch.from_numpy(rollout.token_ids.astype(np.int64)))
    top = compress(rows, k)
    inside = (top.ids.numpy() == rollout.token_ids[:, None]).any(1)
    np.testing.assert_allclose(rollout.uncertainty[inside], exact.numpy()[inside], rtol=2e-5)
    even = 1 - top.tail_mass.numpy() / (VOCAB - k)
    np.testing.assert_allclose(rollout.uncertainty[~inside], even[~inside], rtol=2e-5)
    return bool((~inside).any())


@pytest.mark.parametrize("drafter", ["student", "teacher"])
@pytest.mark.parametrize("name", ["switch", "adaswitch", "student", "teacher"])
def test_uncertainty_comes_from_top_k_rows(name: str, drafter: str) -> None:
    """The UnC of each token comes from its top-k row."""
    done = write(params(RULES[name], wants_uncertainty=True), range(8), k=3, drafter=drafter)
    outside = [check_uncertainty(rollout, 3) for rollout in done.values()]
    assert any(outside) == (name != "teacher"), "the teacher draws no token outside of what it sends"


def test_references_carry_top_k_rows() -> None:
    """A data-set completion has top-k rows, UnC, byte counts and the mark."""
    ids = [np.array(each, np.int32) for each in ([5, 6, 11, STOP], [4], [9, 9, 9, 9, STOP])]
    tasks = [task(i, completion_source=CompletionSource.DATASET, reference_ids=each) for i, each in enumerate(ids)]
    done: list[Rollout] = []
    a_mode = params(RULES["student"], wants_uncertainty=True)
    generator(3, slots=2).run([GenerationRequest(task=each, params=a_mode) for each in tasks], done.extend)
    for rollout in done:
        check_uncertainty(rollout, 3)
        assert rollout.approximate and rollout.stats.output_bytes == rollout.num_tokens * 32
        assert rollout.stats.tail_mass > 0


def test_evaluation_uses_top_k_rows() -> None:
    """Agreement equals that of full rows, and KL is that of rows with one bin for the tail."""
    p, q = pair()
    prompts = tuple((i, task(i, reference_ids=np.array([5, 6, 11, STOP], np.int32)).prompt) for i in range(4))
    shard = EvalShard(prompts=prompts, seeds=(), temperature=0.0, max_new_tokens=MAX_NEW, with_teacher=True)
    whole = SwitchingGenerator(
        student=ToyStudent(q, 4), teacher=ToyTeacher(p), head=None, stop_ids=frozenset({STOP}), max_draft_tokens=4
    )
    exact, brief = (RolloutWorker({"": each}, [], str).evaluate(shard) for each in (whole, generator(4)))
    for one, other, (_, prompt) in zip(exact, brief, prompts, strict=True):
        assert one.reference_agree == other.reference_agree and one.greedy_agree == other.greedy_agree
        assert 0 < other.reference_kl < one.reference_kl and 0 < other.greedy_kl < one.greedy_kl
        tokens = [*prompt.token_ids.tolist(), *prompt.reference_ids.tolist()]
        kl = 0.0
        for row, other_row in zip(rows_of(p, tokens)[1:-1], rows_of(q, tokens)[1:-1], strict=True):
            first = row.topk(4).indices.numpy()
            a, b = (_bins(each.double().softmax(0).numpy(), first) for each in (row, other_row))
            kl += float((a * np.log(a / b)).sum())
        assert other.reference_kl == pytest.approx(kl, rel=1e-5)


def test_saved_top_logprobs_are_limited_to_k() -> None:
    """`rollout.save_top_logprobs` saves at most the teacher's k ids."""
    a_mode = params(RULES["switch-constant"], top_logprobs=5)
    for rollout in write(a_mode, range(4), k=3).values():
        seen = rollout.top_logprobs
        assert seen is not None and (seen.teacher_ids[:, 3:] == -1).all() and (seen.student_ids >= 0).all()
        whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        rows = rows_of(pair()[0], whole)[len(rollout.prompt_ids) - 1 : -1]
        assert (seen.teacher_ids[:, :3] == rows.topk(3).indices.numpy()).all()


def test_a_custom_rule_gets_binned_rows() -> None:
    """A custom rule gets rows with one bin for the tail, or rows of the whole vocabulary if it reads the draft."""
    shapes = []

    def statistic(*, p_logits, q_logits, drafted, coins):  # type: ignore[no-untyped-def]
        shapes.append(p_logits.shape[1])
        return divergence.per_row(divergence.tvd, p_logits, q_logits)

    for needs_draft in (False, True):
        rule = switching.Rule(
            name="own", statistic=statistic, needs_draft=needs_draft,
            threshold=lambda t, step, memory: torch.full(t.shape, 0.4, dtype=torch.float64),
        )  # fmt: skip
        write(params(rule), range(3), k=6)
    assert set(shapes) == {7, VOCAB}


# --- real (tiny) models ----------------------------------------------------------------------------------------------


def write_real(models, a_mode: RolloutParams, k: int, **more) -> dict[int, Rollout]:  # type: ignore[no-untyped-def]
    """test_exact.write with top-k rows."""
    teacher = HFTeacher(models[0], vocab_size=NUM_TOKENS, max_sessions=8, max_len=100, output="top_logprobs", top_k=k)
    return test_exact.write(models, a_mode, served=teacher, **more)


@pytest.mark.parametrize("name", ["switch-constant", "adaswitch", "skd", "random", "teacher"])
def test_rollouts_of_transformers_are_equal_for_each_drafter(name: str) -> None:
    """Rollouts from the top 16 are equal for each drafter; those from all ids equal those of hidden states."""
    models = test_exact.pair("llama")
    a_mode = RolloutParams(
        rule=RULES[name], student=SamplingParams(), teacher=SamplingParams(), max_new_tokens=MAX_NEW, seed=11
    )
    single = write_real(models, a_mode, 16, max_draft_tokens=1, slots=1, drafter="none")
    excused = 0
    for max_draft_tokens, slots, drafter in [(5, 3, "student"), (4, 5, "teacher")]:
        how = {"max_draft_tokens": max_draft_tokens, "slots": slots, "drafter": drafter}
        excused += test_exact.assert_same(single, write_real(models, a_mode, 16, **how))
    exact = test_exact.write(models, a_mode, max_draft_tokens=4, slots=5)
    every = write_real(models, a_mode, NUM_TOKENS, max_draft_tokens=4, slots=5)
    assert excused + test_exact.assert_same(exact, every) <= 1
    assert all(rollout.approximate for rollout in [*single.values(), *every.values()])
