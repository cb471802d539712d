"""`teacher.output: top_logprobs`: the tokens are those of whole rows, and what is asked for is counted."""

from __future__ import annotations

import numpy as np
import pytest
import test_exact
import torch
from test_rollout import MAX_NEW, RULES, SAMPLINGS, params
from test_rollout import write as write_full
from tiny import EOS, NUM_TOKENS
from toy import STOP, ToyStudent, ToyTeacher, pair, rows_of, task

from switchkd.algo import switching
from switchkd.algo.losses import uncertainty
from switchkd.algo.switching import Rule
from switchkd.algo.topk import compress, pack, unpack
from switchkd.engines.base import UnknownSession
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import RolloutParams
from switchkd.types import Blocks, CompletionSource, Positions, Rollout, Sessions, TeacherOutput, Written

torch.set_num_threads(1)


class BriefTeacher(ToyTeacher):
    """Sends the top k, and whole rows where it is asked."""

    def __init__(self, chain: torch.Tensor, k: int) -> None:
        super().__init__(chain)
        self.k, self.asked = k, 0

    def score(self, blocks: Blocks) -> TeacherOutput:
        return self._brief(super().score(blocks))

    def write(self, request) -> Written:  # type: ignore[no-untyped-def]
        whole = ToyTeacher(self.chain)
        whole.sessions = self.sessions
        written = whole.write(request)
        return Written(
            token_ids=written.token_ids, lengths=written.lengths, margins=written.margins,
            teacher_output=self._brief(written.teacher_output),
        )  # fmt: skip

    def exact(self, question: Positions) -> TeacherOutput:
        self.asked += len(question.positions)
        parts = np.split(question.positions, np.cumsum(question.lengths)[:-1])
        rows = []
        for session, positions in zip(question.session_ids.tolist(), parts, strict=True):
            assert len(set(positions.tolist())) == len(positions), "nothing is asked for twice"
            rows.append(rows_of(self.chain, self.sessions[session])[torch.from_numpy(positions.astype(np.int64))])
        return TeacherOutput(kind="logits", dtype="float32", values=torch.cat(rows).numpy(), lengths=question.lengths)

    def _brief(self, output: TeacherOutput) -> TeacherOutput:
        words = pack(compress(torch.from_numpy(output.values), self.k)).numpy()
        return TeacherOutput(kind="top_logprobs", dtype="int32", values=words, lengths=output.lengths)


def write(a_mode: RolloutParams, ids, *, k: int, max_draft_tokens: int = 4, slots: int = 4, **more):  # type: ignore[no-untyped-def]
    """Rollouts by id from compressed rows, and the teacher that was asked."""
    p, q = pair()
    teacher = BriefTeacher(p, k)
    worker = SwitchingGenerator(
        student=ToyStudent(q, slots), teacher=teacher, head=None, stop_ids=frozenset({STOP}),
        max_draft_tokens=max_draft_tokens, **more,
    )  # fmt: skip
    found: dict[int, Rollout] = {}
    worker.run(
        [GenerationRequest(task=task(i), params=a_mode) for i in ids],
        lambda done: found.update({r.rollout_id: r for r in done}),
    )
    return found, teacher


def assert_equal(wanted: dict[int, Rollout], found: dict[int, Rollout]) -> None:
    for i, rollout in wanted.items():
        assert found[i].token_ids.tolist() == rollout.token_ids.tolist()
        assert found[i].sources.tolist() == rollout.sources.tolist()
        assert not found[i].approximate


MORE_RULES: dict[str, Rule] = {
    **{name: rule for name, rule in RULES.items() if name != "adaswitch-available"},  # the reverse KL has no upper end
    "ada-available": switching.kl_spike(K=1.5, L=3, warm_up="available"),
    "ada-jsd": switching.kl_spike(K=1.2, L=2, divergence="jsd", warm_up="available"),
    "ada-long": switching.kl_spike(K=2.0, L=10),
    "scheduled": switching.with_step_schedule(RULES["switch-constant"], start=0.5, end=1.5, steps=3),
}


@pytest.mark.parametrize("k", [1, 6, 24])
@pytest.mark.parametrize("name", MORE_RULES)
def test_decisions_equal_those_of_full_rows(name: str, k: int) -> None:
    """Owners and tokens are those of whole rows for every rule, k, block size, batch, sampling and lead."""
    for sampling in SAMPLINGS:
        a_mode = params(MORE_RULES[name], sampling)
        wanted, _ = write_full(a_mode, range(6), max_draft_tokens=4, slots=6)
        ways = [(1, 6, "none"), (5, 3, "student"), (4, 6, "teacher"), (8, 3, "auto")]
        for max_draft_tokens, slots, drafter in ways if sampling == "sampled" else ways[1:3]:
            found, _ = write(a_mode, range(6), k=k, max_draft_tokens=max_draft_tokens, slots=slots, drafter=drafter)
            assert_equal(wanted, found)


@pytest.mark.parametrize("drafter", ["student", "teacher"])
def test_same_in_two_half_batches(drafter: str) -> None:
    """Questions wait for the flight that is up; the tokens stay the same."""
    for name in ("switch", "ada-available", "skd"):
        wanted, _ = write_full(params(MORE_RULES[name]), range(9), max_draft_tokens=4, slots=4)
        found, _ = write(params(MORE_RULES[name]), range(9), k=6, drafter=drafter, overlap=True)
        assert_equal(wanted, found)


def test_what_is_asked_is_counted() -> None:
    """Rows that were asked for add up to what the teacher was asked; bytes to what it sent; tails to their mean."""
    k = 8
    found, teacher = write(params(RULES["switch-constant"]), range(12), k=k)
    stats = [rollout.stats for rollout in found.values()]
    assert sum(s.num_undecided + s.num_asked for s in stats) == teacher.asked > 0
    assert 0 < sum(s.num_undecided for s in stats) < sum(r.num_tokens for r in found.values())
    for rollout in found.values():
        s = rollout.stats
        assert s.output_bytes == s.num_scored_rows * (8 * k + 8) + (s.num_undecided + s.num_asked) * 24 * 4
        assert rollout.teacher_output is not None and rollout.teacher_output.values.shape == (
            rollout.num_tokens,
            2 * k + 2,
        )
        tail = unpack(torch.from_numpy(rollout.teacher_output.values)).tail_mass
        assert s.tail_mass == pytest.approx(float(tail.mean()), rel=1e-6)


def test_fewer_questions_with_more_ids() -> None:
    """All ids leave nothing open; few ids leave more open than many."""
    asked = {}
    for k in (2, 8, 16, 24):
        found, _ = write(params(RULES["switch-constant"]), range(12), k=k)
        asked[k] = sum(rollout.stats.num_undecided for rollout in found.values())
    assert asked[24] == 0 and asked[2] > asked[8] > asked[16]


def test_skd_needs_no_question_to_decide() -> None:
    """Whether an id is among the first K is certain where at least K ids travel; with the paper's sampling the
    replacement can be drawn from them too."""
    rule = switching.outside_top_k(k=5)
    found, _ = write(params(rule), range(12), k=8)
    assert sum(r.stats.num_undecided for r in found.values()) == 0
    found, teacher = write(params(rule, "greedy"), range(12), k=8)
    assert teacher.asked == 0


def test_teacher_leads_without_questions_to_draw() -> None:
    """Its own tokens come with its text."""
    found, teacher = write(params(RULES["random"]), range(8), k=4, drafter="teacher")
    assert teacher.asked == 0
    found, teacher = write(params(RULES["random"]), range(8), k=4, drafter="student")
    assert teacher.asked == sum(int((r.sources == 1).sum()) for r in found.values())


def test_coarse_asks_nothing_to_decide_and_says_so() -> None:
    """`decide: coarse`: no question to decide, tokens near those of full rows, every rollout marked."""
    a_mode = params(RULES["switch-constant"])
    wanted, _ = write_full(a_mode, range(12), max_draft_tokens=4, slots=4)
    found, _ = write(a_mode, range(12), k=16, coarse=True)
    assert all(r.approximate and r.stats.num_undecided == 0 for r in found.values())
    same = [found[i].sources[0] == wanted[i].sources[0] for i in wanted]
    assert np.mean(same) > 0.7
    for name in ("random", "student", "teacher"):  # nothing is decided from rows
        assert not any(r.approximate for r in write(params(RULES[name]), range(4), k=4, coarse=True)[0].values())
    reverse = switching.kl_spike(K=1.5, L=3, divergence="reverse_kl")  # has no interval form
    assert all(r.approximate for r in write(params(reverse), range(4), k=8, coarse=True)[0].values())


@pytest.mark.parametrize("drafter", ["student", "teacher"])
@pytest.mark.parametrize("name", ["switch", "ada-available", "student", "teacher"])
def test_uncertainty_is_exact(name: str, drafter: str) -> None:
    """ATKD's UnC is that of full rows for every token, also where the token lies in the tail."""
    p, _ = pair()
    found, _ = write(params(MORE_RULES[name], wants_uncertainty=True), range(8), k=3, drafter=drafter)
    for rollout in found.values():
        whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        rows = rows_of(p, whole)[len(rollout.prompt_ids) - 1 : -1]
        exact = uncertainty(rows.double(), torch.from_numpy(rollout.token_ids.astype(np.int64)))
        np.testing.assert_allclose(rollout.uncertainty, exact.numpy(), rtol=2e-6)


def test_references_and_their_uncertainty() -> None:
    """A data-set answer carries compressed rows; UnC outside the top k is asked for where the loss wants it."""
    p, q = pair()
    teacher = BriefTeacher(p, 3)
    worker = SwitchingGenerator(
        student=ToyStudent(q, 2), teacher=teacher, head=None, stop_ids=frozenset({STOP}), max_draft_tokens=4
    )
    references = [np.array(ids, np.int32) for ids in ([5, 6, 11, STOP], [4], [9, 9, 9, 9, STOP])]
    tasks = [task(i, completion_source=CompletionSource.DATASET, reference_ids=ids) for i, ids in enumerate(references)]
    found: list[Rollout] = []
    worker.run([GenerationRequest(task=t, params=None, wants_uncertainty=False) for t in tasks], found.extend)
    assert teacher.asked == 0
    worker.run([GenerationRequest(task=t, params=None) for t in tasks], found.extend)
    assert teacher.asked == sum(r.stats.num_asked for r in found) > 0
    for rollout in found[3:]:
        whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        rows = rows_of(p, whole)[len(rollout.prompt_ids) - 1 : -1]
        exact = uncertainty(rows.double(), torch.from_numpy(rollout.token_ids.astype(np.int64)))
        np.testing.assert_allclose(rollout.uncertainty, exact.numpy(), rtol=2e-6)
    exact = worker.reference_scorer.exact(tasks[0])
    whole = [*tasks[0].prompt.token_ids.tolist(), *references[0].tolist()]
    assert torch.equal(torch.from_numpy(exact.values), rows_of(p, whole)[len(tasks[0].prompt.token_ids) - 1 : -1])


# --- real (tiny) models ----------------------------------------------------------------------------------------------


def write_real(models, a_mode: RolloutParams, *, k: int, max_draft_tokens: int, slots: int, drafter: str = "student"):  # type: ignore[no-untyped-def]
    """As test_exact.write, from compressed rows."""
    teacher, student = models
    served = HFTeacher(teacher, vocab_size=NUM_TOKENS, max_sessions=8, max_len=100, output="top_logprobs", top_k=k)
    worker = SwitchingGenerator(
        student=HFStudent(student, num_slots=slots, max_len=100, vocab_size=NUM_TOKENS), teacher=served,
        head=served.head(), stop_ids=frozenset({EOS}), max_draft_tokens=max_draft_tokens, drafter=drafter,
    )  # fmt: skip
    found: list[Rollout] = []
    worker.run([GenerationRequest(task=task, params=a_mode) for task in test_exact.tasks()], found.extend)
    return {rollout.rollout_id: rollout for rollout in found}


@pytest.fixture(scope="module")
def real():  # type: ignore[no-untyped-def]
    return {family: test_exact.pair(family) for family in ("llama", "gpt2")}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "name", ["switch", "switch-constant", "adaswitch", "ada-available", "ada-jsd", "skd", "random"]
)
def test_decisions_equal_on_real_rows(real, name: str, family: str) -> None:  # type: ignore[no-untyped-def]
    """The same for transformers models, whoever leads: tokens and owners of `teacher.output: hidden_states`."""
    student, teacher = SAMPLINGS["papers" if name in ("skd", "adaswitch") else "sampled"]
    a_mode = RolloutParams(rule=MORE_RULES[name], student=student, teacher=teacher, max_new_tokens=MAX_NEW, seed=11)
    wanted = test_exact.write(real[family], a_mode, max_draft_tokens=4, slots=5)
    excused = 0
    for k, max_draft_tokens, slots, drafter in [(16, 5, 3, "student"), (40, 4, 5, "teacher")]:
        found = write_real(real[family], a_mode, k=k, max_draft_tokens=max_draft_tokens, slots=slots, drafter=drafter)
        excused += test_exact.assert_same(wanted, found)
    assert excused <= 1


def test_questions_cost_no_forward_pass(real) -> None:  # type: ignore[no-untyped-def]
    """The rows last answered are kept: they come back exactly, at once, as often as asked; older ones are read again,
    lost sessions named, impossible positions refused."""
    teacher = HFTeacher(
        real["llama"][0], vocab_size=NUM_TOKENS, max_sessions=2, max_len=100, output="top_logprobs", top_k=8
    )
    whole = HFTeacher(real["llama"][0], vocab_size=NUM_TOKENS, max_sessions=2, max_len=100)
    ids = np.random.default_rng(0).integers(5, NUM_TOKENS, 90).astype(np.int32)
    rows = []
    for one in (teacher, whole):
        one.open(Sessions(session_ids=np.array([3]), token_ids=ids[:80], lengths=np.array([80], np.int32)))
        for base, first, stop in ((80, 75, 85), (83, 82, 90)):
            block = Blocks(
                session_ids=np.array([3]), base_lens=np.array([base], np.int32), first_rows=np.array([first], np.int32),
                token_ids=ids[base:stop], lengths=np.array([stop - base], np.int32),
            )  # fmt: skip
            rows.append(one.score(block))
    assert rows[0].kind == "top_logprobs" and rows[0].values.shape == (10, 18)
    read = teacher.num_positions_read

    def ask(*positions: int) -> np.ndarray:
        answer = teacher.exact(
            Positions(session_ids=np.array([3]), positions=np.array(positions), lengths=np.array([len(positions)]))
        )
        assert answer.kind == "hidden_states"
        return answer.values

    for _ in range(2):
        np.testing.assert_allclose(ask(89, 83, 76), np.stack([rows[3].values[i] for i in (7, 1)] + [rows[2].values[1]]),
                                   atol=1e-5)  # fmt: skip
    assert teacher.num_positions_read == read, "no forward pass"
    assert ask(10).shape == (1, 32) and teacher.num_positions_read == read + 80
    with pytest.raises(ValueError, match="no row"):
        ask(90)
    with pytest.raises(UnknownSession):
        teacher.exact(Positions(session_ids=np.array([4]), positions=np.array([1]), lengths=np.array([1])))
