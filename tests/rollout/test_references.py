"""References of any length: each token has its own teacher row, from the teacher to the learner's batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_rollout import RULES, params
from tiny import NUM_TOKENS, PAD, tiny_model
from toy import STOP, VOCAB, ToyStudent, ToyTeacher, pair, rows_of, task

from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.lm_head import LMHead
from switchkd.learner.batching import collate
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.types import CompletionSource, Rollout

LENGTHS = (1, 63, 64, 65, 130, 200)


def scored(generator: SwitchingGenerator, references: list[np.ndarray]) -> list[Rollout]:
    """Data-set rollouts in order of their ids."""
    tasks = [task(i, completion_source=CompletionSource.DATASET, reference_ids=ids) for i, ids in enumerate(references)]
    a_mode = params(RULES["student"], wants_uncertainty=True, top_logprobs=3)
    found: list[Rollout] = []
    generator.run([GenerationRequest(task=each, params=a_mode) for each in tasks], found.extend)
    return sorted(found, key=lambda rollout: rollout.rollout_id)


def check(
    rollouts: list[Rollout], references: list[np.ndarray], expected: list[torch.Tensor], head: LMHead | None
) -> None:
    """Each token has the row, UnC and saved log-probs of `expected` logits; the batch has the same rows in order."""
    assert [rollout.token_ids.tolist() for rollout in rollouts] == [ids.tolist() for ids in references]
    for rollout, logits in zip(rollouts, expected, strict=True):
        assert rollout.teacher_output is not None and rollout.top_logprobs is not None
        labels = torch.from_numpy(rollout.token_ids).long()
        probs = logits.double().softmax(-1)
        unc = 1 - probs[torch.arange(len(labels)), labels]
        np.testing.assert_allclose(rollout.uncertainty, unc.numpy(), atol=1e-5)
        top = probs.topk(3).values.log().numpy()
        np.testing.assert_allclose(rollout.top_logprobs.teacher_logprobs, top, atol=1e-4)
    # in another order, as micro-batches have it
    batch = collate(rollouts[::-1], PAD)
    (rows,) = batch.teacher
    found = rows.values if head is None else head.logits(rows.values)
    torch.testing.assert_close(found, torch.cat(expected[::-1]), atol=1e-4, rtol=0)
    assert batch.labels.tolist() == np.concatenate(references[::-1]).tolist()
    assert torch.equal(batch.input_ids[batch.rows, batch.positions + 1], batch.labels)
    np.testing.assert_array_equal(batch.uncertainty, np.concatenate([r.uncertainty for r in rollouts[::-1]]))


def test_each_token_of_a_reference_has_its_row() -> None:
    """Rows, UnC and log-probs of references of 1 to 200 tokens belong to their tokens."""
    p, q = pair()
    generator = SwitchingGenerator(
        student=ToyStudent(q, 4), teacher=ToyTeacher(p), head=None, stop_ids=frozenset({STOP}), max_draft_tokens=4
    )
    rng = np.random.default_rng(0)
    references = [rng.integers(1, VOCAB, num).astype(np.int32) for num in LENGTHS]
    prompts = [task(i).prompt.token_ids.tolist() for i in range(len(LENGTHS))]
    expected = [
        rows_of(p, [*prompt, *ids.tolist()])[len(prompt) - 1 : -1]
        for prompt, ids in zip(prompts, references, strict=True)
    ]
    check(scored(generator, references), references, expected, None)


@pytest.mark.parametrize("output", ["hidden_states", "logits"])
def test_rows_of_long_references_equal_a_clean_forward(output: str) -> None:
    """The rows that a transformers teacher gives for references of 1 to 200 tokens are those of one forward pass."""
    model = tiny_model("llama", vocab_size=136)
    teacher = HFTeacher(model, vocab_size=NUM_TOKENS, max_sessions=4, max_len=240, output=output)  # type: ignore[arg-type]
    head = LMHead.from_state(teacher.head().to_state(), device="cpu")
    generator = SwitchingGenerator(
        student=HFStudent(tiny_model("llama", vocab_size=128), num_slots=4, max_len=240, vocab_size=NUM_TOKENS),
        teacher=teacher,
        head=head if output == "hidden_states" else None,
        stop_ids=frozenset({1}),
        max_draft_tokens=4,
    )
    rng = np.random.default_rng(1)
    references = [rng.integers(5, NUM_TOKENS, num).astype(np.int32) for num in LENGTHS]
    rollouts, expected = scored(generator, references), []
    for rollout in rollouts:
        whole = torch.tensor([[*rollout.prompt_ids.tolist(), *rollout.token_ids.tolist()]])
        with torch.no_grad():
            logits = model(whole).logits[0, len(rollout.prompt_ids) - 1 : -1, :NUM_TOKENS]
        expected.append(logits)
    check(rollouts, references, expected, head if output == "hidden_states" else None)
