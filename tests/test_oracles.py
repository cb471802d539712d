"""Losses, row shift and drafts agree with implementations in DeepSpeed, TRL and transformers, imported as installed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from learning import distance, make_rollouts, teacher_lm_heads, teacher_model
from scipy import stats
from test_exact import pair, tasks, write
from tiny import NUM_TOKENS, PAD, tiny_model
from torch import Tensor

from switchkd.algo import losses, switching
from switchkd.algo.chunked_loss import chunked_loss
from switchkd.algo.sampling import SamplingParams
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.lm_head import LMHead, final_hidden, lm_head_of
from switchkd.learner.batching import LossSpec, assign_batch, collate
from switchkd.learner.loss_module import StepLoss, StudentModule
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import RolloutParams
from switchkd.types import CompletionSource, Prompt, Rollout, RolloutTask

torch.set_num_threads(1)

BETAS: dict[float, tuple[Callable[..., Tensor], dict[str, float]]] = {
    0.0: (losses.forward_kl, {}),
    0.2: (losses.jsd, {"beta": 0.2}),
    0.5: (losses.jsd, {"beta": 0.5}),
    1.0: (losses.reverse_kl, {}),
}
"""The losses behind DeepSpeed's and TRL's `beta`: the teacher's share, as in `jsd`, and a KL at 0 and 1."""


@pytest.fixture(scope="module")
def opsd() -> Any:
    return pytest.importorskip("deepspeed.runtime.rollout.opsd", exc_type=ImportError)


@pytest.fixture(scope="module")
def trl_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    trainer: Any = pytest.importorskip("trl.trainer.distillation_trainer", exc_type=ImportError)
    return trainer._chunked_divergence_loss  # type: ignore[no-any-return]


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_losses_equal_deepspeeds(opsd: Any, beta: float) -> None:
    """The mean loss of the unmasked tokens and its gradient are those of DeepSpeed's generalized_jsd_loss."""
    torch.manual_seed(0)
    p, q = 3 * torch.randn(2, 7, 50, dtype=torch.float64), 3 * torch.randn(2, 7, 50, dtype=torch.float64)
    mask, labels = torch.rand(2, 7) < 0.6, torch.zeros(14, dtype=torch.int64)
    loss, numbers = BETAS[beta]
    ours, theirs = q.clone().requires_grad_(), q.clone().requires_grad_()
    each = loss(p.flatten(0, 1), ours.flatten(0, 1), labels, mask.flatten(), **numbers)
    total = (losses.token_weights(mask.flatten()) * each).sum()
    expected = opsd.generalized_jsd_loss(theirs, p, mask, beta=beta).loss
    total.backward(), expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)  # the weights are float32
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_loss_equals_trls(trl_loss: Any, beta: float) -> None:
    """Value, and gradients of hidden states, LM head and bias, are those of TRL's _chunked_divergence_loss."""
    torch.manual_seed(0)
    (p_states, p_weight, p_bias), q_parts = (
        [torch.randn(shape) for shape in ((4, 6, width), (30, width), (30,))] for width in (12, 8)
    )
    mask, (loss, numbers) = torch.rand(4, 6) < 0.6, BETAS[beta]
    ours, theirs = ([part.clone().requires_grad_() for part in q_parts] for _ in range(2))
    states, weight, bias = ours
    p_logits = torch.nn.functional.linear(p_states, p_weight, p_bias)[mask]
    num = int(mask.sum())
    total = chunked_loss(
        states[mask], weight, bias, lambda product: product, lambda rows: p_logits[rows],
        torch.zeros(num, dtype=torch.int64), torch.ones(num, dtype=torch.bool), torch.full((num,), 1 / num),
        partial(loss, **numbers), {}, chunk=5,
    )  # fmt: skip
    states, weight, bias = theirs
    expected, _, count = trl_loss(
        states, p_states, weight, p_weight, mask, beta, student_lm_head_bias=bias, teacher_lm_head_bias=p_bias
    )
    total.backward(), expected.backward()
    assert count == num
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


# --- rows and the learner's loss -------------------------------------------------------------------------------------


def deepspeed_batch(opsd: Any, rollouts: list[Rollout]) -> Any:
    """DeepSpeed's targets of the padded rollouts."""
    from deepspeed.runtime.rollout.base import RolloutBatch

    batch = collate(rollouts, PAD)
    starts = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts])
    return opsd.ResponseTokenBatch.from_rollout(RolloutBatch(batch.input_ids, batch.attention_mask, starts))


def learner_loss(student: Any, rollouts: list[Rollout], beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The learner's loss of a step, and the gradient of every weight."""
    head, batch, (loss, numbers) = lm_head_of(student, NUM_TOKENS), collate(rollouts, PAD), BETAS[beta]
    module = StudentModule(student, vocab_size=NUM_TOKENS, scale=head.scale, softcap=head.softcap, chunk=5)
    step_loss = StepLoss(LossSpec(name="x", per_token=loss, numbers=numbers), assign_batch(0, 0, rollouts, 1), batch)
    total = module(batch, step_loss, {name: LMHead.from_state(head) for name, head in teacher_lm_heads().items()})
    return total.detach(), gradients(student, total)


def gradients(student: Any, total: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}


def trainable(family: str = "llama") -> Any:
    return tiny_model(family, seed=1, attn="eager").requires_grad_(True)


def test_rows_are_shifted_as_deepspeeds(opsd: Any) -> None:
    """The rows that predict completion tokens, and their labels, are DeepSpeed's response positions and targets."""
    rollouts = make_rollouts(6)
    ours, theirs = collate(rollouts, PAD), deepspeed_batch(opsd, rollouts)
    logits = torch.randn(*ours.input_ids.shape, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(theirs.select_causal_logits(logits)[theirs.response_mask], logits[ours.rows, ours.positions])
    assert torch.equal(theirs.target_ids[theirs.response_mask], ours.labels)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_learners_loss_equals_deepspeeds(opsd: Any, beta: float) -> None:
    """The learner's loss and gradients equal DeepSpeed's, which takes both models' logits of whole sequences."""
    rollouts, student = make_rollouts(5), trainable()
    total, found = learner_loss(student, rollouts, beta)
    batch = deepspeed_batch(opsd, rollouts)
    q_logits, p_logits = (
        batch.select_causal_logits(model(batch.input_ids, attention_mask=batch.attention_mask).logits)
        for model in (student, teacher_model())
    )
    shared = (q_logits[..., :NUM_TOKENS], p_logits[..., :NUM_TOKENS])
    expected = opsd.generalized_jsd_loss(*shared, batch.response_mask, beta=beta).loss
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=0)
    assert distance(found, gradients(student, expected)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_learners_loss_equals_trls(trl_loss: Any, beta: float, family: str) -> None:
    """The learner's loss and gradients equal TRL's, which takes both models' hidden states and LM heads, for plain,
    tied, soft-capped and scaled heads."""
    rollouts, student, teacher = make_rollouts(5), trainable(family), teacher_model()
    total, found = learner_loss(student, rollouts, beta)
    batch = collate(rollouts, PAD)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        mask[row, len(rollout.prompt_ids) : len(rollout.prompt_ids) + rollout.num_tokens] = True
    expected, _, _ = trl_loss(
        final_hidden(student, **inputs)[:, :-1],
        final_hidden(teacher, **inputs)[:, :-1],
        student.get_output_embeddings().weight[:NUM_TOKENS],
        teacher.get_output_embeddings().weight[:NUM_TOKENS],
        mask[:, 1:],
        beta,
        student_logit_scale=1 / getattr(student.config, "logits_scaling", 1.0),
        student_final_logit_softcapping=getattr(student.config, "final_logit_softcapping", None),
    )
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=0)
    assert distance(found, gradients(student, expected)) < 1e-5


# --- drafts ----------------------------------------------------------------------------------------------------------


def teacher_with_drafts(max_new_tokens: int, temperature: float) -> RolloutParams:
    """The teacher writes everything. A budget that is never spent keeps the student drafting, as an assistant does."""
    sampling = SamplingParams(temperature=temperature)
    return RolloutParams(
        rule=switching.teacher(), student=sampling, teacher=sampling, max_new_tokens=max_new_tokens, seed=3,
        teacher_budget=max_new_tokens,
    )  # fmt: skip


def test_greedy_drafts_equal_assisted_generation() -> None:
    """Greedy completions of rule `teacher` with the student's drafts equal transformers' assisted generation, teacher
    assisted by student."""
    models = pair("llama", teacher_vocab=NUM_TOKENS)
    params = teacher_with_drafts(24, temperature=0.0)
    found = write(models, params, max_draft_tokens=5, slots=3, drafter="student")
    teacher, student = models
    student.resize_token_embeddings(NUM_TOKENS, mean_resizing=False)  # assisted generation needs equal widths
    for task in tasks():
        prompt = torch.from_numpy(task.prompt.token_ids).long()[None]
        whole = teacher.generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=student, do_sample=False, max_new_tokens=24
        )
        rollout = found[task.rollout_id]
        assert rollout.stats.num_near_ties == 0 and rollout.token_ids.tolist() == whole[0, prompt.shape[1] :].tolist()
    accepted, rejected = (
        sum(getattr(r.stats, name) for r in found.values()) for name in ("num_accepted", "num_rejections")
    )
    assert accepted > 10 and rejected > 10, "drafts are accepted, and drafts are rejected"


SIZE, NUM_NEW = 3, 3  # ids, and tokens of a completion

Completion = tuple[int, ...]


def test_sampled_drafts_follow_the_law_of_assisted_generation() -> None:
    """Completions of rule `teacher` with the student's drafts, and of transformers' assisted generation, have the
    teacher's exact frequencies; the student's own do not."""
    teacher, student = (tiny_model(vocab_size=SIZE, seed=seed, initializer_range=0.12) for seed in (1, 2))
    prompt = torch.tensor([[2, 0, 1]])
    law = exact_law(teacher, prompt)
    torch.manual_seed(0)
    teacher.generation_config.eos_token_id = student.generation_config.eos_token_id = None
    options = {"do_sample": True, "max_new_tokens": NUM_NEW, "attention_mask": torch.ones_like(prompt)}
    assisted = [teacher.generate(prompt, assistant_model=student, **options)[0, 3:].tolist() for _ in range(400)]
    assert p_value(assisted, law) > 1e-3
    params = teacher_with_drafts(NUM_NEW, temperature=1.0)
    drafted = sampled(teacher, student, params, prompt)
    assert p_value([rollout.token_ids.tolist() for rollout in drafted], law) > 1e-3
    assert sum(rollout.stats.num_rejections for rollout in drafted) > 1000, "the models differ"
    alone = sampled(teacher, student, replace(params, rule=switching.student()), prompt)
    assert p_value([rollout.token_ids.tolist() for rollout in alone], law) < 1e-6


def exact_law(model: Any, prompt: Tensor) -> dict[Completion, float]:
    """The probability of every completion of a prompt [1, P]."""
    law = {}
    for completion in itertools.product(range(SIZE), repeat=NUM_NEW):
        ids = torch.tensor([completion])
        rows = model(torch.cat([prompt, ids], dim=1)).logits[0, -NUM_NEW - 1 : -1].double().softmax(-1)
        law[completion] = float(rows.gather(1, ids.T).prod())
    return law


def sampled(teacher: Any, student: Any, params: RolloutParams, prompt: Tensor) -> list[Rollout]:
    """4000 rollouts of one prompt, drafted by the student in blocks of two."""
    served = HFTeacher(teacher, vocab_size=SIZE, max_sessions=100, max_len=16)
    state = served.lm_head_state()
    assert state is not None
    worker = SwitchingGenerator(
        student=HFStudent(student, num_slots=100, max_len=16, vocab_size=SIZE), teacher=served,
        head=LMHead.from_state(state), stop_ids=frozenset(), max_draft_tokens=2, drafter="student",
    )  # fmt: skip
    one = Prompt(prompt_id="", text="", token_ids=prompt[0].numpy().astype(np.int32))
    tasks = [
        RolloutTask(rollout_id=i, batch=0, stage=0, completion_source=CompletionSource.ROLLOUT, prompt=one)
        for i in range(4000)
    ]
    found: list[Rollout] = []
    worker.run([GenerationRequest(task=task, params=params) for task in tasks], found.extend)
    return found


def p_value(completions: list[list[int]], law: dict[Completion, float]) -> float:
    """Of a chi-square test of completions against their law."""
    counts = Counter(tuple(completion) for completion in completions)
    expected = [len(completions) * law[completion] for completion in law]
    assert min(expected) > 2 and counts.keys() <= law.keys()
    return float(stats.chisquare([counts[completion] for completion in law], expected).pvalue)
