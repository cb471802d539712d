"""`signal: topk`: the tokens are those of whole rows, and what is asked for is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_rollout import RULES, SAMPLINGS, mode
from test_rollout import write as write_full
from toy import STOP, ToyStudent, ToyTeacher, pair, rows_of, task

from switchkd.algo import switching
from switchkd.algo.compressed import compress, pack, unpack
from switchkd.algo.losses import uncertainty
from switchkd.algo.switching import Rule
from switchkd.rollout import Job, RolloutWorker
from switchkd.rows import Mode
from switchkd.types import Blocks, Origin, Positions, Rollout, Signal, Written

torch.set_num_threads(1)


class BriefTeacher(ToyTeacher):
    """Sends the top k, and whole rows where it is asked."""

    def __init__(self, chain: torch.Tensor, k: int) -> None:
        super().__init__(chain)
        self.k, self.asked = k, 0

    def score(self, blocks: Blocks) -> Signal:
        return self._brief(super().score(blocks))

    def write(self, request) -> Written:  # type: ignore[no-untyped-def]
        whole = ToyTeacher(self.chain)
        whole.sessions = self.sessions
        written = whole.write(request)
        return Written(
            token_ids=written.token_ids, lengths=written.lengths, margins=written.margins,
            signal=self._brief(written.signal),
        )  # fmt: skip

    def exact(self, question: Positions) -> Signal:
        self.asked += len(question.positions)
        parts = np.split(question.positions, np.cumsum(question.lengths)[:-1])
        rows = []
        for session, positions in zip(question.session_ids.tolist(), parts, strict=True):
            assert len(set(positions.tolist())) == len(positions), "nothing is asked for twice"
            rows.append(rows_of(self.chain, self.sessions[session])[torch.from_numpy(positions.astype(np.int64))])
        return Signal(kind="full", dtype="float32", values=torch.cat(rows).numpy(), lengths=question.lengths)

    def _brief(self, signal: Signal) -> Signal:
        words = pack(compress(torch.from_numpy(signal.values), self.k)).numpy()
        return Signal(kind="topk", dtype="int32", values=words, lengths=signal.lengths)


def write(a_mode: Mode, ids, *, k: int, block_size: int = 4, slots: int = 4, **more):  # type: ignore[no-untyped-def]
    """Rollouts by id from compressed rows, and the teacher that was asked."""
    p, q = pair()
    teacher = BriefTeacher(p, k)
    worker = RolloutWorker(
        student=ToyStudent(q, slots), teacher=teacher, head=None, stop_ids=frozenset({STOP}),
        block_size=block_size, **more,
    )  # fmt: skip
    found: dict[int, Rollout] = {}
    worker.run(
        [Job(task=task(i), mode=a_mode) for i in ids], lambda done: found.update({r.rollout_id: r for r in done})
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
        a_mode = mode(MORE_RULES[name], sampling)
        wanted, _ = write_full(a_mode, range(6), block_size=4, slots=6)
        ways = [(1, 6, "lockstep"), (5, 3, "student"), (4, 6, "teacher"), (8, 3, "auto")]
        for block_size, slots, lead in ways if sampling == "sampled" else ways[1:3]:
            found, _ = write(a_mode, range(6), k=k, block_size=block_size, slots=slots, lead=lead)
            assert_equal(wanted, found)


@pytest.mark.parametrize("lead", ["student", "teacher"])
def test_same_in_two_half_batches(lead: str) -> None:
    """Questions wait for the flight that is up; the tokens stay the same."""
    for name in ("switch", "ada-available", "skd"):
        wanted, _ = write_full(mode(MORE_RULES[name]), range(9), block_size=4, slots=4)
        found, _ = write(mode(MORE_RULES[name]), range(9), k=6, lead=lead, overlap=True)
        assert_equal(wanted, found)


def test_what_is_asked_is_counted() -> None:
    """Rows that were asked for add up to what the teacher was asked; bytes to what it sent; tails to their mean."""
    k = 8
    found, teacher = write(mode(RULES["switch-constant"]), range(12), k=k)
    stats = [rollout.stats for rollout in found.values()]
    assert sum(s.num_undecided + s.num_asked for s in stats) == teacher.asked > 0
    assert 0 < sum(s.num_undecided for s in stats) < sum(r.num_tokens for r in found.values())
    for rollout in found.values():
        s = rollout.stats
        assert s.signal_bytes == s.num_scored_rows * (8 * k + 8) + (s.num_undecided + s.num_asked) * 24 * 4
        assert rollout.signal is not None and rollout.signal.values.shape == (rollout.num_tokens, 2 * k + 2)
        tail = unpack(torch.from_numpy(rollout.signal.values)).tail_mass
        assert s.tail_mass == pytest.approx(float(tail.mean()), rel=1e-6)


def test_fewer_questions_with_more_ids() -> None:
    """All ids leave nothing open; few ids leave more open than many."""
    asked = {}
    for k in (2, 8, 16, 24):
        found, _ = write(mode(RULES["switch-constant"]), range(12), k=k)
        asked[k] = sum(rollout.stats.num_undecided for rollout in found.values())
    assert asked[24] == 0 and asked[2] > asked[8] > asked[16]


def test_skd_needs_no_question_to_decide() -> None:
    """Whether an id is among the first K is certain where at least K ids travel; with the paper's sampling the
    replacement can be drawn from them too."""
    rule = switching.outside_top_k(k=5)
    found, _ = write(mode(rule), range(12), k=8)
    assert sum(r.stats.num_undecided for r in found.values()) == 0
    found, teacher = write(mode(rule, "greedy"), range(12), k=8)
    assert teacher.asked == 0


def test_teacher_leads_without_questions_to_draw() -> None:
    """Its own tokens come with its text."""
    found, teacher = write(mode(RULES["random"]), range(8), k=4, lead="teacher")
    assert teacher.asked == 0
    found, teacher = write(mode(RULES["random"]), range(8), k=4, lead="student")
    assert teacher.asked == sum(int((r.sources == 1).sum()) for r in found.values())


def test_coarse_asks_nothing_to_decide_and_says_so() -> None:
    """`decide: coarse`: no question to decide, tokens near those of full rows, every rollout marked."""
    a_mode = mode(RULES["switch-constant"])
    wanted, _ = write_full(a_mode, range(12), block_size=4, slots=4)
    found, _ = write(a_mode, range(12), k=16, coarse=True)
    assert all(r.approximate and r.stats.num_undecided == 0 for r in found.values())
    same = [found[i].sources[0] == wanted[i].sources[0] for i in wanted]
    assert np.mean(same) > 0.7
    for name in ("random", "student", "teacher"):  # nothing is decided from rows
        assert not any(r.approximate for r in write(mode(RULES[name]), range(4), k=4, coarse=True)[0].values())
    reverse = switching.kl_spike(K=1.5, L=3, divergence="reverse_kl")  # has no interval form
    assert all(r.approximate for r in write(mode(reverse), range(4), k=8, coarse=True)[0].values())


@pytest.mark.parametrize("lead", ["student", "teacher"])
@pytest.mark.parametrize("name", ["switch", "ada-available", "student", "teacher"])
def test_uncertainty_is_exact(name: str, lead: str) -> None:
    """ATKD's UnC is that of full rows for every token, also where the token lies in the tail."""
    p, _ = pair()
    found, _ = write(mode(MORE_RULES[name], wants_uncertainty=True), range(8), k=3, lead=lead)
    for rollout in found.values():
        whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        rows = rows_of(p, whole)[len(rollout.prompt_ids) - 1 : -1]
        exact = uncertainty(rows.double(), torch.from_numpy(rollout.token_ids.astype(np.int64)))
        np.testing.assert_allclose(rollout.uncertainty, exact.numpy(), rtol=2e-6)


def test_references_and_their_uncertainty() -> None:
    """A data-set answer carries compressed rows; UnC outside the top k is asked for where the loss wants it."""
    p, q = pair()
    teacher = BriefTeacher(p, 3)
    worker = RolloutWorker(
        student=ToyStudent(q, 2), teacher=teacher, head=None, stop_ids=frozenset({STOP}), block_size=4
    )
    references = [np.array(ids, np.int32) for ids in ([5, 6, 11, STOP], [4], [9, 9, 9, 9, STOP])]
    tasks = [task(i, origin=Origin.DATASET, reference_ids=ids) for i, ids in enumerate(references)]
    found: list[Rollout] = []
    worker.run([Job(task=t, mode=None, wants_uncertainty=False) for t in tasks], found.extend)
    assert teacher.asked == 0
    worker.run([Job(task=t, mode=None) for t in tasks], found.extend)
    assert teacher.asked == sum(r.stats.num_asked for r in found) > 0
    for rollout in found[3:]:
        whole = [*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]
        rows = rows_of(p, whole)[len(rollout.prompt_ids) - 1 : -1]
        exact = uncertainty(rows.double(), torch.from_numpy(rollout.token_ids.astype(np.int64)))
        np.testing.assert_allclose(rollout.uncertainty, exact.numpy(), rtol=2e-6)
    exact = worker.exact_reference(tasks[0])
    whole = [*tasks[0].prompt.token_ids.tolist(), *references[0].tolist()]
    assert torch.equal(torch.from_numpy(exact.values), rows_of(p, whole)[len(tasks[0].prompt.token_ids) - 1 : -1])
