"""The transformers teacher keeps the teacher contract; the transformers student loads new weights."""

from __future__ import annotations

import numpy as np
import pytest
import teacher_contract as contract
import torch
from teacher_contract import Bench, ask, blocks, sessions
from tiny import NUM_TOKENS, tiny_model

from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.lm_head import final_hidden, lm_head_of
from switchkd.engines.wire import from_numpy
from switchkd.types import TeacherOutput

torch.set_num_threads(1)


def bench(family="llama", output="hidden_states", attn="sdpa", **settings) -> Bench:
    plain = tiny_model(family, attn=attn)
    head = lm_head_of(plain, NUM_TOKENS)

    def make(max_sessions: int, max_len: int) -> HFTeacher:
        return HFTeacher(
            tiny_model(family, attn=attn), vocab_size=NUM_TOKENS, max_sessions=max_sessions, max_len=max_len,
            output=output, prefill_chunk=32, **settings,
        )  # fmt: skip

    def logits(output: TeacherOutput) -> torch.Tensor:
        values = from_numpy(output.rows.values, output.dtype)
        return values if output.kind == "logits" else head.logits(values)

    return Bench(make=make, model=plain, logits=logits, vocab_size=NUM_TOKENS)


@pytest.mark.parametrize("claim", contract.CLAIMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("output", ["hidden_states", "logits"])
def test_the_teacher_contract_holds(claim, output):
    """Each claim of the contract holds for hidden states and for logits."""
    claim(bench(output=output))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "gemma2", "mistral"])
def test_rows_of_other_families_equal_clean_forwards(family, attn):
    """Rows equal clean forward passes for other architectures, with windows and soft-caps."""
    contract.rows_equal_a_clean_forward(bench(family, attn=attn))
    contract.cuts_and_continuations(bench(family, attn=attn))
    contract.rows_equal_a_clean_forward(bench(family, attn=attn, output="logits"))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def leased() -> tuple[Bench, HFTeacher, Clock]:
    clock = Clock()
    b = bench(lease_s=10.0, clock=clock)
    return b, b.make(2, 32), clock


def test_unused_leases_expire():
    """A session untouched for lease_s is dropped at the next call; use renews its lease."""
    b, teacher, clock = leased()
    ids = b.ids(4)
    teacher.open(sessions({1: ids, 2: ids}))
    clock.now = 8.0
    ask(b, teacher, (1, 4, 3, ids))
    clock.now = 11.0
    with pytest.raises(UnknownSession) as raised:
        teacher.score(blocks((1, 4, 3, ids), (2, 4, 3, ids)))
    assert raised.value.session_ids == [2] and teacher.num_sessions == 1
    clock.now = 30.0
    teacher.close(np.array([99]))
    assert teacher.num_sessions == 0


def test_expired_sessions_make_room():
    """Expired sessions make room; TeacherBusy is raised only while other leases run."""
    b, teacher, clock = leased()
    ids = b.ids(4)
    teacher.open(sessions({1: ids, 2: ids}))
    with pytest.raises(TeacherBusy, match="0 of 2"):
        teacher.open(sessions({3: ids, 4: ids}))
    clock.now = 10.5
    teacher.open(sessions({3: ids, 4: ids}))
    contract.close_to(b, ask(b, teacher, (3, 4, 0, ids[:0]))[0], b.clean(ids, 0))


def test_open_renews_a_lease():
    """A repeated `open` renews a lease."""
    b, teacher, clock = leased()
    for clock.now in (0.0, 9.0, 18.0):
        teacher.open(sessions({1: b.ids(4)}))
    clock.now = 27.0
    assert len(ask(b, teacher, (1, 4, 3, b.ids(2)))[0]) == 3


def test_positions_are_read_once():
    """Each position is read once, when it is first needed; a row before the block costs one more."""
    b = bench()
    teacher = b.make(2, 64)
    ids, block = b.ids(10), b.ids(4, seed=1)
    teacher.open(sessions({0: ids}))
    assert teacher.num_positions_read == 0
    ask(b, teacher, (0, 10, 9, block))
    assert teacher.num_positions_read == 14
    ask(b, teacher, (0, 12, 12, block))
    assert teacher.num_positions_read == 18
    ask(b, teacher, (0, 14, 13, block))
    assert teacher.num_positions_read == 23


def test_a_score_call_is_one_forward(monkeypatch):
    """Blocks of any lengths over all sessions are one forward pass, and a long prompt adds one."""
    b = bench()
    teacher = b.make(6, 256)
    teacher.open(sessions({i: b.ids(20, seed=i) for i in range(5)}))
    ask(b, teacher, *((i, 20, 19, b.ids(2)) for i in range(5)))
    calls = []
    teacher.model.register_forward_pre_hook(lambda *_: calls.append(1))
    ask(b, teacher, *((i, 22, 21, b.ids(1 + i)) for i in range(5)))
    assert len(calls) == 1
    teacher.open(sessions({9: b.ids(32)}))
    calls.clear()
    ask(b, teacher, *((i, 22, 21, b.ids(1 + i)) for i in range(5)), (9, 32, 31, b.ids(0)))
    assert len(calls) == 2


def test_a_failed_forward_leaves_nothing_stale():
    """After a failed forward pass the same call succeeds with the right rows."""
    b = bench()
    teacher = b.make(2, 64)
    ids, block = b.ids(10), b.ids(4, seed=1)
    teacher.open(sessions({0: ids}))
    ask(b, teacher, (0, 10, 9, block))
    layer = teacher.model.model.layers[1]

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        teacher.score(blocks((0, 8, 7, block)))
    handle.remove()
    got = ask(b, teacher, (0, 8, 7, block))[0]
    contract.close_to(b, got, b.clean(np.concatenate([ids[:8], block]), 7))


def test_hidden_states_have_the_teachers_dtype():
    """Hidden states of a bfloat16 teacher travel as uint16 bits; logits are float32, cut to the vocabulary."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    teacher = HFTeacher(model, vocab_size=NUM_TOKENS, max_sessions=1, max_len=32)
    ids = np.arange(5, 17)
    teacher.open(sessions({0: ids}))
    output = teacher.score(blocks((0, 12, 4, ids[:0])))
    assert (output.kind, output.dtype, output.rows.values.shape) == ("hidden_states", "bfloat16", (8, 32))
    assert output.rows.values.dtype == np.uint16
    want = final_hidden(model, input_ids=torch.from_numpy(ids)[None])[0, 4:]
    torch.testing.assert_close(from_numpy(output.rows.values, "bfloat16").float(), want.float(), atol=0.1, rtol=0.05)
    full = HFTeacher(model, vocab_size=NUM_TOKENS, max_sessions=1, max_len=32, output="logits")
    full.open(sessions({0: ids}))
    output = full.score(blocks((0, 12, 4, ids[:0])))
    assert (output.kind, output.dtype, output.rows.values.shape) == ("logits", "float32", (8, NUM_TOKENS))
    assert teacher.head().weight.dtype == torch.float32


def test_logits_serve_models_without_a_separable_head():
    """A model whose head cannot be separated is refused with `hidden_states` and served with `logits`."""
    from switchkd.config.errors import ConfigError

    def odd():
        model = tiny_model("llama")
        model.lm_head.register_forward_hook(lambda _, __, out: out + out.square() * 0.1)
        return model

    with pytest.raises(ConfigError, match="logits"):
        HFTeacher(odd(), vocab_size=NUM_TOKENS, max_sessions=1, max_len=32)
    teacher = HFTeacher(odd(), vocab_size=NUM_TOKENS, max_sessions=1, max_len=32, output="logits")
    ids = np.arange(5, 15)
    teacher.open(sessions({0: ids}))
    got = torch.from_numpy(teacher.score(blocks((0, 10, 0, ids[:0]))).rows.values)
    want = odd()(input_ids=torch.from_numpy(ids)[None]).logits[0, :, :NUM_TOKENS]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_student_loads_new_weights(family, dtype):
    """After load_weights the student and its head are the new model, and its slots are empty."""
    from switchkd.engines.weights import pack

    student = HFStudent(tiny_model(family, dtype=dtype), num_slots=2, max_len=32, vocab_size=NUM_TOKENS)
    head = student.head
    new = tiny_model(family, seed=1, dtype=dtype)
    ids = np.arange(5, 15)
    args = (np.array([0]), np.array([0]), ids, np.array([10]))
    old_logits = head.logits(student.extend(*args))
    student.load_weights(pack(new.state_dict().items(), 1))
    with pytest.raises(ValueError, match="holds 0 tokens"):
        student.extend(np.array([0]), np.array([10]), ids, np.array([10]))
    want = new(input_ids=torch.from_numpy(ids)[None]).logits[0, :, :NUM_TOKENS].float()
    atol = 2e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(head.logits(student.extend(*args)), want, atol=atol, rtol=0)
    assert student.head is head and (old_logits - want).abs().max() > 1
