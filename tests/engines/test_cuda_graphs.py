"""Recorded steps with fixed shapes and buffers give the hidden states of ragged rows.

No GPU is needed: `tape.Tape` stands for a CUDA graph. Real CUDA graphs are tested in test_gpu.py.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import teacher_contract as contract
import torch
from tape import Tape
from test_exact import assert_same, pair, tasks
from test_hf_engine import bench
from test_rollout import MAX_NEW, RULES, SAMPLINGS
from test_slot_cache import FAMILIES, check_random_history, clean, extend
from tiny import EOS, NUM_TOKENS, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from switchkd.algo.sampling import draw_on_device
from switchkd.config.errors import ConfigError
from switchkd.engines.hf import cuda_graphs, model_runner
from switchkd.engines.hf.cuda_graphs import StepGraphs, capture_for, few_lengths, few_rows, few_widths
from switchkd.engines.hf.model_runner import ModelRunner
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.lm_head import LMHead, final_hidden
from switchkd.engines.weights import pack
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import RolloutParams

torch.set_num_threads(1)


@pytest.fixture
def at_once(monkeypatch):
    """Record a shape at its first use."""
    monkeypatch.setattr(model_runner, "StepGraphs", lambda *args, **kwargs: StepGraphs(*args, **kwargs, capture_at=1))


def refusing(step):
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_histories_equal_clean_forwards(family, attn, at_once):
    """Random extends and cuts over random slots equal clean forward passes through replays with other lengths, slots
    and padding rows."""
    tape = Tape()
    engine = ModelRunner(tiny_model(family, attn=attn), num_slots=6, max_len=96, capture=tape)
    check_random_history(engine, tiny_model(family, attn=attn), turns=50, atol=2e-5)
    assert tape.num_replays > tape.num_records > 10, "shapes repeat"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral"])
def test_padded_shapes_equal_the_ragged_path(family):
    """Padded to fixed shapes without recording, the hidden states equal those of the ragged path."""
    rng = np.random.default_rng(1)
    ragged = ModelRunner(tiny_model(family), num_slots=5, max_len=120)
    padded = ModelRunner(tiny_model(family), num_slots=5, max_len=120, capture=refusing)
    ends = np.zeros(5, np.int64)
    for _ in range(12):
        slots = rng.permutation(5)[: rng.integers(1, 6)]
        rows = [rng.integers(0, 128, rng.integers(1, 8)) for _ in slots]
        wanted, found = (extend(engine, slots, ends[slots], rows) for engine in (ragged, padded))
        torch.testing.assert_close(torch.cat(found), torch.cat(wanted), atol=1e-5, rtol=0)
        ends[slots] += [len(row) for row in rows]


def test_recorded_steps_keep_the_teacher_contract(at_once):
    """A teacher with recorded steps keeps the teacher contract."""
    tape = Tape()
    for claim in contract.CLAIMS:
        claim(bench(capture=tape))
    assert tape.num_replays > 20


def test_stale_buffers_are_detected(at_once):
    """A recorded step that reads a Python number or a replaced tensor is detected."""
    lens, row = {"now": 3}, {"now": torch.zeros(8)}
    recorded = StepGraphs(Tape(), num_inputs=4, device=torch.device("cpu"), capture_at=1)
    for step in (lambda: recorded.inputs.float() + lens["now"], lambda: recorded.inputs[:1].float() + row["now"]):
        recorded.run(step, step)
        recorded.load(np.array([5, 6, 7, 8]))
        lens["now"], row["now"] = 4, torch.ones(8)
        with pytest.raises(RuntimeError, match="does not repeat the model"):
            recorded.run(step, step)
        lens["now"], row["now"] = 3, torch.zeros(8)


def test_recordings_compute_with_new_weights(at_once):
    """New weights are copied in place, so earlier recordings compute with them."""
    tape = Tape()
    student = HFStudent(tiny_model("llama"), num_slots=2, max_len=64, vocab_size=NUM_TOKENS, capture=tape)
    ids = np.random.default_rng(0).integers(5, NUM_TOKENS, 30)
    places = [tensor.data_ptr() for tensor in (*student.model.state_dict().values(), student.head.weight)]
    for seed in (1, 2):
        new = tiny_model("llama", seed=seed)
        student.load_weights(pack(new.state_dict().items(), seed))
        num_records = tape.num_records
        one, slot = np.array([1]), np.array([1])
        got = torch.cat([student.extend(slot, np.array([i]), ids[i : i + 1], one) for i in range(30)])
        torch.testing.assert_close(got, clean(new, ids), atol=2e-5, rtol=0)
        want = new(input_ids=torch.from_numpy(ids)[None]).logits[0, :, :NUM_TOKENS]
        torch.testing.assert_close(student.head.logits(got), want, atol=5e-5, rtol=0)
    assert tape.num_records == num_records, "the second version needed no recording of its own"
    assert places == [tensor.data_ptr() for tensor in (*student.model.state_dict().values(), student.head.weight)]


@pytest.mark.parametrize("name", ["switch", "skd"])
def test_recorded_rollouts_equal_unrecorded_ones(name, at_once):
    """Rollouts with recorded steps of both models equal those without."""
    student, teacher = SAMPLINGS["sampled"]
    params = RolloutParams(rule=RULES[name], student=student, teacher=teacher, max_new_tokens=MAX_NEW, seed=11)
    models = pair("llama")

    def write(capture, max_draft_tokens, drafter):
        served = HFTeacher(models[0], vocab_size=NUM_TOKENS, max_sessions=8, max_len=100, capture=capture)
        worker = SwitchingGenerator(
            student=HFStudent(models[1], num_slots=3, max_len=100, vocab_size=NUM_TOKENS, capture=capture),
            teacher=served,
            head=LMHead.from_state(served.head().to_state(), device="cpu"),
            stop_ids=frozenset({EOS}),
            max_draft_tokens=max_draft_tokens,
            drafter=drafter,
        )
        found = []
        worker.run([GenerationRequest(task=task, params=params) for task in tasks()], found.extend)
        return {rollout.rollout_id: rollout for rollout in found}

    wanted = write(None, 1, "none")
    for max_draft_tokens, drafter in ((4, "student"), (8, "teacher")):
        tape = Tape()
        assert assert_same(wanted, write(tape, max_draft_tokens, drafter)) == 0
        assert tape.num_replays > tape.num_records


def test_a_step_that_cannot_be_recorded_runs_unrecorded(caplog):
    """A step that cannot be recorded runs unrecorded after one warning line."""
    plain = tiny_model("llama")
    with caplog.at_level(logging.WARNING, logger=cuda_graphs.__name__):
        engine = ModelRunner(tiny_model("llama"), num_slots=2, max_len=128, capture=Tape(refuse="embedding"))
        ids = np.random.default_rng(0).integers(0, 128, 100)
        got = torch.cat([extend(engine, [0], [i], [ids[i : i + 1]])[0] for i in range(100)])
    torch.testing.assert_close(got, clean(plain, ids), atol=2e-5, rtol=0)
    (record,) = caplog.records
    assert "cannot be recorded (RuntimeError: operation not permitted" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert engine._graphs is not None and len(engine._graphs._graphs) == 0


def test_only_frequent_shapes_are_recorded(caplog):
    """A shape is recorded at its third use, up to `max_graphs` shapes."""
    tape = Tape()
    recorded = StepGraphs(tape, num_inputs=1, device=torch.device("cpu"), max_graphs=2)
    for use in range(6):
        for shape in range(4):
            recorded.load(np.array([use]))
            assert recorded.run(shape, lambda: recorded.inputs.float() + 1).item() == use + 1
        assert len(recorded._graphs) == (0 if use < 2 else 2)
    assert tape.num_records == 2 and len(caplog.records) == 1


def test_shapes_are_rounded_to_few_values():
    """Sizes are rounded up to few values, below twice the rows and tokens and at most 1.5 times the length."""
    assert [few_rows(n) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert [few_widths(n) for n in (1, 2, 3, 4, 5, 6, 8, 9, 10, 17, 18)] == [1, 2, 3, 4, 5, 8, 8, 9, 16, 17, 32]
    assert [few_lengths(n) for n in (1, 64, 65, 96, 97, 128, 129, 200)] == [64, 64, 96, 96, 128, 128, 192, 256]
    for n in range(1, 4000):
        assert n <= few_rows(n) < 2 * n or n == few_rows(n)
        assert n <= few_widths(n) < 2 * n or n == few_widths(n)
        assert n <= few_lengths(n) <= max(64, 1.5 * n) and few_lengths(n) % 32 == 0


def test_on_without_a_gpu_is_refused():
    """Without a GPU `auto` and `off` record nothing, and `on` is refused with the key to change."""
    model = tiny_model("llama")
    assert capture_for(model, "auto", key="student.graphs") is None
    assert capture_for(model, "off", key="student.graphs") is None
    with pytest.raises(ConfigError, match=r"student.graphs=on, but the model is on cpu .* set student.graphs: auto"):
        capture_for(model, "on", key="student.graphs")


class _DeviceOnly(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert devices <= {"meta"}, f"{func} touches {devices}"
        return out


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "gpt_neox", "cohere", "granite"])
def test_a_step_stays_on_its_device(family, attn, monkeypatch):
    """A step on the `meta` device uses no host tensor and reads no value."""
    monkeypatch.setattr(ModelRunner, "_check_model", lambda self: None)
    engine = ModelRunner(tiny_model(family, attn=attn, dtype=torch.bfloat16).to("meta"), num_slots=4, max_len=90)
    inputs = torch.zeros(200, dtype=torch.int64, device="meta")
    for first in (0, -1):
        shape = model_runner._Shape(rows=4, width=5, length=64, first=first)
        with torch.inference_mode(), _DeviceOnly():
            hidden = final_hidden(engine.model, **engine._begin(shape, inputs))
        assert hidden.shape[:2] == (4, 5) and hidden.is_meta


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draw_stays_on_its_device(sampling):
    """A draw on the `meta` device uses no host tensor and reads no value."""
    keys = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    with _DeviceOnly():
        logits = torch.zeros(3, 50, device="meta")
        tokens, drafter = draw_on_device(logits, 1, keys[0], keys[1], purpose=0, sampling=SAMPLINGS[sampling][0])
    assert tokens.shape == drafter.shape == (3,)
