"""Tests that need a CUDA device: `pytest -m gpu tests/test_gpu.py`.

The references are the same models in fp32 on the CPU. Run this file alone: DeepSpeed picks one accelerator a process.
"""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import teacher_contract as contract
import torch
from learning import FORWARD_KL, NaiveLearner, distance, make_rollouts, settings_of, student_folder, teacher_lm_heads
from scipy import stats
from teacher_contract import Bench, ask, sessions
from test_exact import assert_same, pair, tasks
from test_rollout import MAX_NEW, RULES, SAMPLINGS
from test_slot_cache import check_random_history, clean, extend
from tiny import EOS, NUM_TOKENS, tiny_model

from switchkd.algo import divergence, kernels
from switchkd.algo.noise import Purpose, gumbel, noise_bits
from switchkd.algo.sampling import SamplingParams, draw
from switchkd.algo.transfer import to_host
from switchkd.engines.hf import cuda_graphs, model_runner
from switchkd.engines.hf.cuda_graphs import CudaCapture, StepGraphs, capture_for
from switchkd.engines.hf.model_runner import ModelRunner
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.lm_head import LMHead, final_hidden, lm_head_of
from switchkd.engines.weights import pack, unpack
from switchkd.engines.wire import from_numpy, to_numpy
from switchkd.learner.batching import assign_batch
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import RolloutParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
ATOL = 5e-4  # fp32 on two devices; logits of the tiny models go up to about 20
GRAPHS = pytest.mark.parametrize("with_graphs", [False, True], ids=["eager", "graphs"])
FAMILIES = ["llama", "qwen2", "gpt2", "gemma2", "mistral"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Record a shape at its first use, with full fp32 products."""
    monkeypatch.setattr(model_runner, "StepGraphs", lambda *args, **kwargs: StepGraphs(*args, **kwargs, capture_at=1))
    torch.set_float32_matmul_precision("highest")


def capture(with_graphs: bool):
    return CudaCapture(torch.device(DEVICE, 0)) if with_graphs else None


def on_gpu(family: str, **settings):
    return tiny_model(family, **settings).to(DEVICE)


def bench(family: str, with_graphs: bool) -> Bench:
    """A float32 teacher on the GPU; the reference is the model on the CPU."""
    plain = tiny_model(family)
    head = lm_head_of(plain, NUM_TOKENS)

    def make(max_sessions: int, max_len: int) -> HFTeacher:
        return HFTeacher(
            on_gpu(family), vocab_size=NUM_TOKENS, max_sessions=max_sessions, max_len=max_len, prefill_chunk=32,
            capture=capture(with_graphs),
        )  # fmt: skip

    return Bench(
        make=make, model=plain, vocab_size=NUM_TOKENS, atol=ATOL,
        logits=lambda output: head.logits(from_numpy(output.rows.values, output.dtype)),
    )  # fmt: skip


@GRAPHS
@pytest.mark.parametrize("claim", contract.CLAIMS, ids=lambda f: f.__name__)
def test_the_teacher_contract_holds(claim, with_graphs):
    """Each claim of the teacher contract holds in fp32."""
    claim(bench("llama", with_graphs))


@GRAPHS
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_other_families_equal_clean_forwards(family, with_graphs):
    """Rows equal clean forward passes on the CPU through cuts and continuations."""
    contract.rows_equal_a_clean_forward(bench(family, with_graphs))
    contract.cuts_and_continuations(bench(family, with_graphs), rounds=30)


@GRAPHS
@pytest.mark.parametrize("family", FAMILIES)
def test_random_histories_equal_clean_forwards(family, with_graphs):
    """Random extends and cuts of a student's slots equal clean forward passes, with shapes recorded."""
    engine = ModelRunner(on_gpu(family), num_slots=6, max_len=96, capture=capture(with_graphs))
    check_random_history(engine, tiny_model(family), turns=60, atol=ATOL)
    assert engine._graphs is None or len(engine._graphs._graphs) > 5, "steps were recorded"


@GRAPHS
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rows_are_near_fp32(family, with_graphs):
    """A bfloat16 teacher's hidden states are near those of the same weights in fp32."""
    model = tiny_model(family, dtype=torch.bfloat16)
    plain = copy.deepcopy(model).float()
    teacher = HFTeacher(
        model.to(DEVICE), vocab_size=NUM_TOKENS, max_sessions=2, max_len=64, capture=capture(with_graphs)
    )
    text = np.random.default_rng(0).integers(5, NUM_TOKENS, 40)
    read = Bench(
        make=lambda *_: teacher, model=plain, vocab_size=NUM_TOKENS,
        logits=lambda output: from_numpy(output.rows.values, output.dtype).float(),
    )  # fmt: skip
    teacher.open(sessions({0: text[:10]}))
    got = [ask(read, teacher, (0, end, end - 1, text[end : end + 1]))[0][1:] for end in range(10, 40)]
    want = clean(plain, text, 10)
    assert float((torch.cat(got) - want).norm() / want.norm()) < 0.1


def test_graphs_change_hidden_states_little():
    """A bfloat16 student's hidden states with graphs are near those without."""
    ids = np.random.default_rng(0).integers(0, 128, 60)
    found = []
    for with_graphs in (False, True):
        model = on_gpu("llama", dtype=torch.bfloat16)
        engine = ModelRunner(model, num_slots=4, max_len=64, capture=capture(with_graphs))
        found.append(torch.cat([extend(engine, [2], [i], [ids[i : i + 1]])[0] for i in range(60)]).float())
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.03


def test_recordings_compute_with_new_weights():
    """New weights are copied in place, so earlier recordings compute with them."""
    student = HFStudent(
        on_gpu("llama"), num_slots=2, max_len=64, vocab_size=NUM_TOKENS, capture=capture(True)
    )  # fmt: skip
    ids, one, slot = np.random.default_rng(0).integers(5, NUM_TOKENS, 30), np.array([1]), np.array([1])
    numbers = []
    for seed in (1, 2):
        new = tiny_model("llama", seed=seed)
        student.load_weights(pack(new.state_dict().items(), seed))
        got = torch.cat([student.extend(slot, np.array([i]), ids[i : i + 1], one) for i in range(30)])
        torch.testing.assert_close(got.cpu(), clean(new, ids), atol=ATOL, rtol=0)
        assert student._slots._graphs is not None
        numbers.append(len(student._slots._graphs._graphs))
    assert numbers[0] == numbers[1] > 0


def test_a_step_that_cannot_be_recorded_runs_unrecorded(caplog):
    """A model that waits for the device runs without graphs after one warning, and CUDA stays usable."""
    model = on_gpu("llama")
    model.model.norm.register_forward_hook(lambda _, __, out: out * float(out.abs().max() > 0))
    with caplog.at_level(logging.WARNING, logger=cuda_graphs.__name__):
        engine = ModelRunner(model, num_slots=2, max_len=64, capture=capture(True))
        ids = np.random.default_rng(0).integers(0, 128, 40)
        got = torch.cat([extend(engine, [0], [i], [ids[i : i + 1]])[0] for i in range(40)])
    torch.testing.assert_close(got.cpu(), clean(tiny_model("llama"), ids), atol=ATOL, rtol=0)
    assert len(caplog.records) == 1 and "cannot be recorded" in caplog.text
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(8, device=DEVICE).isfinite().all()


def test_auto_records_on_a_gpu():
    """`auto` and `on` record on a GPU; full rows of logits are never recorded."""
    model = on_gpu("llama")
    assert isinstance(capture_for(model, "auto", key="student.graphs"), CudaCapture)
    assert isinstance(capture_for(model, "on", key="student.graphs"), CudaCapture)
    assert capture_for(model, "auto", key="teacher.graphs", whole_rows=True) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_to_the_host_are_complete(dtype):
    """A copy to the host waits for the device and is complete."""
    start = torch.randn(2048, 2048, device=DEVICE, dtype=dtype)
    product = start
    for _ in range(20):
        product = (start @ product).tanh()
    values, name = to_numpy(product)
    torch.testing.assert_close(from_numpy(values, name), product.cpu(), atol=0, rtol=0)
    assert to_host(product).is_pinned()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_equal_those_of_a_cpu(sampling):
    """Equal logits give equal tokens, except at near ties, and equal margins on both devices."""
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)) * 3
    for setting in SAMPLINGS[sampling]:
        key = {"run_seed": 3, "rollout_ids": range(200), "positions": range(200), "purpose": Purpose.GUMBEL}
        tokens, margins = draw(logits, **key, sampling=setting, return_margin=True)
        there, leads = draw(logits.to(DEVICE), **key, sampling=setting, return_margin=True)
        assert ((tokens == there) | (margins < 1e-9)).all()
        finite = np.isfinite(margins)
        np.testing.assert_allclose(leads[finite], margins[finite], atol=1e-6)


@pytest.mark.parametrize("name", ["draw", "divergence"])
def test_kernels_are_found(name):
    """Triton compiles and runs the kernels here: the tests below are theirs."""
    pytest.importorskip("triton")
    assert kernels.find(name, torch.zeros(1, device=DEVICE)) is not None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kernel_scores_are_near_float64(temperature):
    """Words are NumPy's, and scores are within 4 ulp of its float64 ones (of 1 for smaller numbers)."""
    pytest.importorskip("triton")
    from noise_kernel import noise_and_scores

    logits = torch.randn(8, 8192, generator=torch.Generator().manual_seed(1)) * 3
    ids, positions = torch.arange(8, device=DEVICE) - 4, torch.arange(8, device=DEVICE)
    bits, scores = noise_and_scores(logits.to(DEVICE), -3, ids, positions, int(Purpose.SKD), temperature)
    for n in range(8):
        wanted = noise_bits(-3, n - 4, n, Purpose.SKD, 8192)
        np.testing.assert_array_equal(bits[n], wanted)
        exact = logits[n].double().numpy() / temperature + gumbel(wanted)
        assert (np.abs(scores[n].numpy() - exact) <= 4 * np.spacing(np.maximum(np.abs(exact), 1))).all()


@pytest.mark.parametrize(
    "setting",
    [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_k=40, top_p=0.9)],
    ids=str,
)
def test_kernel_draws_are_those_of_numpy(setting):
    """Tokens of 64 large rows equal NumPy's except where the margin is below 1e-12, and margins agree."""
    logits = torch.randn(64, 151_936, generator=torch.Generator().manual_seed(2)) * 3
    key = {"run_seed": 2**63 + 1, "rollout_ids": range(64), "positions": range(64), "purpose": Purpose.GUMBEL}
    tokens, margins = draw(logits, **key, sampling=setting, return_margin=True)
    there, leads = draw(logits.to(DEVICE), **key, sampling=setting, return_margin=True)
    assert ((tokens == there) | (margins < 1e-12)).all()
    finite = np.isfinite(margins)
    np.testing.assert_allclose(leads[finite], margins[finite], atol=1e-12)


@pytest.mark.parametrize(
    "function, numbers",
    [
        (divergence.forward_kl, {}),
        (divergence.reverse_kl, {}),
        (divergence.jsd, {"beta": 0.1}),
        (divergence.skew_kl, {}),
        (divergence.skew_reverse_kl, {"alpha": 0.7}),
        (divergence.tvd, {}),
    ],
)
def test_kernel_divergences_are_near_float64(function, numbers):
    """Values and gradients of large float32 rows are near those of plain float64 on the CPU."""
    p = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(3)) * 3
    q = p + torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
    want, got = p.double(), p.to(DEVICE)
    q_want, q_got = q.double().requires_grad_(), q.to(DEVICE).requires_grad_()
    values = function(want, q_want, **numbers), function(got, q_got, **numbers)
    torch.testing.assert_close(values[1].detach().cpu().double(), values[0].detach(), atol=2e-6, rtol=2e-6)
    for value in values:
        value.sum().backward()
    torch.testing.assert_close(q_got.grad.cpu().double(), q_want.grad, atol=1e-6, rtol=1e-5)


def write(models, params: RolloutParams, *, device: str, with_graphs: bool, max_draft_tokens: int, drafter: str):
    teacher, student = (copy.deepcopy(model).to(device) for model in models)
    served = HFTeacher(
        teacher, vocab_size=NUM_TOKENS, max_sessions=8, max_len=100, capture=capture(with_graphs)
    )  # fmt: skip
    worker = SwitchingGenerator(
        student=HFStudent(
            student, num_slots=3, max_len=100, vocab_size=NUM_TOKENS, capture=capture(with_graphs)
        ),
        teacher=served,
        head=LMHead.from_state(served.head().to_state(), device=device),
        stop_ids=frozenset({EOS}),
        max_draft_tokens=max_draft_tokens,
        drafter=drafter,
    )  # fmt: skip
    found: list = []
    worker.run([GenerationRequest(task=task, params=params) for task in tasks()], found.extend)
    return {rollout.rollout_id: rollout for rollout in found}


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("name", ["switch", "adaswitch", "skd"])
def test_rollouts_equal_those_of_a_cpu(name, sampling):
    """fp32 rollouts are equal for each block size and drafter, with graphs and on the CPU, except at near ties."""
    student, teacher = SAMPLINGS[sampling]
    params = RolloutParams(
        rule=RULES[name], student=student, teacher=teacher, max_new_tokens=MAX_NEW, seed=11, wants_uncertainty=True
    )
    models = pair("llama")
    wanted = write(models, params, device=DEVICE, with_graphs=False, max_draft_tokens=1, drafter="none")
    excused = 0
    for max_draft_tokens, drafter in ((1, "student"), (4, "student"), (8, "teacher"), (8, "auto")):
        for with_graphs in (False, True):
            ours = write(
                models,
                params,
                device=DEVICE,
                with_graphs=with_graphs,
                max_draft_tokens=max_draft_tokens,
                drafter=drafter,
            )
            excused += assert_same(wanted, ours)
    excused += assert_same(
        wanted, write(models, params, device="cpu", with_graphs=False, max_draft_tokens=4, drafter="student")
    )
    assert excused <= 2, "near ties are rare: more than two in 45 rollouts hide an error"


@GRAPHS
@pytest.mark.parametrize("setting", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.8)], ids=str)
def test_bfloat16_draws_follow_the_distribution(setting, with_graphs):
    """Draws of a bfloat16 student follow its own distribution (chi-square)."""
    num = 8000
    student = HFStudent(
        on_gpu("llama", dtype=torch.bfloat16), num_slots=2, max_len=64, vocab_size=NUM_TOKENS,
        capture=capture(with_graphs),
    )  # fmt: skip
    slot, ids = np.array([0]), np.random.default_rng(0).integers(5, NUM_TOKENS, 12)
    student.extend(slot, np.array([0]), ids[:11], np.array([11]))
    for _ in range(3):  # the same token again, so that a recording is made, checked and played
        hidden = student.extend(slot, np.array([11]), ids[11:], np.array([1]))
    logits = student.head.logits(hidden / 4)  # flat enough to have many likely tokens
    tempered = (logits[0].double() / setting.temperature).softmax(-1).cpu()
    prob, order = tempered.sort(descending=True)
    keep = prob.cumsum(0) - prob < setting.top_p
    law = torch.zeros_like(tempered).scatter(0, order[keep], prob[keep] / prob[keep].sum()).numpy()
    tokens = draw(
        logits.expand(num, -1), run_seed=0, rollout_ids=range(num), positions=[12] * num, purpose=Purpose.GUMBEL,
        sampling=setting,
    )  # fmt: skip
    counts = np.bincount(tokens, minlength=NUM_TOKENS)
    assert counts[law == 0].sum() == 0
    often = law * num >= 5
    seen = np.append(counts[often], counts[~often].sum())
    expected = np.append(law[often], law[~often].sum()) * num
    assert often.sum() > 5 and stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learner_steps_are_near_plain_ones(dtype, tmp_path):
    """Three steps on CUDA are near three plain PyTorch steps on the CPU in fp32."""
    from switchkd.learner.deepspeed import DeepSpeedLearner

    folder = student_folder(tmp_path)
    settings = settings_of(folder, device=DEVICE, dtype=dtype, zero_stage=1)
    learner = DeepSpeedLearner(
        settings, rank=0, local_rank=0, world_size=1, master_addr="127.0.0.1", master_port=0,
        teacher_lm_heads=teacher_lm_heads(),
    )  # fmt: skip
    naive = NaiveLearner(tiny_model("llama", seed=1))
    close, close_norm, near = (1e-3, 1e-3, 1e-2) if dtype == "float32" else (0.1, 0.3, 0.2)
    try:
        for step in range(3):
            rollouts = make_rollouts(5, seed=step)
            plan = assign_batch(step, 0, rollouts, 1, FORWARD_KL.hard_frac)
            result = learner.step(plan, rollouts, loss=FORWARD_KL, lr=1e-2, version_after=step + 1)
            loss, norm = naive.step(rollouts, FORWARD_KL)
            assert result.loss == pytest.approx(loss, rel=close)
            assert result.grad_norm == pytest.approx(norm, rel=close_norm)
        ours = {name: tensor.clone() for name, tensor in unpack(learner.publish(3, "float32"))}
        assert distance(ours, dict(naive.model.named_parameters())) < near
    finally:
        learner.close()


def test_models_agree_with_the_cpu():
    """The tiny models give the CPU's hidden states on this GPU, on which the tolerances above rest."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 128, (1, 50)))
    for family in FAMILIES:
        with torch.no_grad():
            want = final_hidden(tiny_model(family), input_ids=ids, use_cache=False)
            got = final_hidden(on_gpu(family), input_ids=ids.to(DEVICE), use_cache=False)
        torch.testing.assert_close(got.cpu(), want, atol=ATOL, rtol=0)
