"""Evaluation of a shard: the student's completions by seed, and its comparison with the teacher on each token."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch
from test_rollout import _pick
from toy import STOP, VOCAB, ToyStudent, ToyTeacher, pair, rows_of, task

from switchkd.algo.noise import Purpose, gumbel, noise_bits
from switchkd.algo.sampling import SamplingParams
from switchkd.rollout.generator import SwitchingGenerator
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import GREEDY, EvalRow, EvalShard, Prompt

NUM_TOKENS = 100


def evaluate(prompts: list[Prompt], **shard) -> list[EvalRow]:  # type: ignore[no-untyped-def]
    """Rows of toy models, whose texts are lists of token ids."""
    p, q = pair()
    generator = SwitchingGenerator(
        student=ToyStudent(q, 3), teacher=ToyTeacher(p), head=None, stop_ids=frozenset({STOP}), max_draft_tokens=4
    )
    settings = {"seeds": (), "temperature": 1.0, "max_new_tokens": NUM_TOKENS, "with_teacher": False}
    # prompt numbers are those of the whole evaluation: here every third
    numbered = tuple((3 * i, prompt) for i, prompt in enumerate(prompts))
    return RolloutWorker({"": generator}, [], str).evaluate(EvalShard(prompts=numbered, **{**settings, **shard}))


def slow_completion(prompt: Prompt, index: int, seed: int, sampling: SamplingParams) -> list[int]:
    """The student's completion, token by token, with the noise of (seed, index, position, EVAL)."""
    _, q = pair()
    tokens, num_prompt = prompt.token_ids.tolist(), len(prompt.token_ids)
    while len(tokens) - num_prompt < NUM_TOKENS and STOP not in tokens[num_prompt:]:
        noise = gumbel(noise_bits(seed, index, len(tokens) - num_prompt, Purpose.EVAL, VOCAB))
        tokens.append(_pick(rows_of(q, tokens)[-1].double(), sampling, noise))
    return tokens[num_prompt:]


def test_each_seed_draws_its_own_completions() -> None:
    """The completion of a seed is drawn with that seed's noise, by prompt number; no two seeds share draws."""
    prompts = [task(i).prompt for i in range(5)]
    rows = evaluate(prompts, seeds=(0, 1, 7), temperature=0.8)
    assert [(row.seed, row.index) for row in rows] == [(seed, 3 * i) for seed in (0, 1, 7) for i in range(5)]
    for row in rows:
        expected = slow_completion(prompts[row.index // 3], row.index, row.seed, SamplingParams(temperature=0.8))
        assert ast.literal_eval(row.text) == expected and row.num_tokens == len(expected)
    assert len({row.text for row in rows}) == len(rows)


@pytest.mark.parametrize("num", [1, 64, 65, 150])
def test_each_token_of_a_long_completion_is_compared(num: int) -> None:
    """Agreement, KL and loss are sums over all tokens of a reference, and of a greedy completion, of any length."""
    p, q = pair()
    rng = np.random.default_rng(num)
    prompts = [task(i, reference_ids=rng.integers(1, VOCAB, num).astype(np.int32)).prompt for i in range(4)]
    rows = evaluate(prompts, with_teacher=True, with_loss=True)
    for prompt, row, lost in zip(prompts, rows[:4], rows[4:], strict=True):
        greedy = slow_completion(prompt, row.index, 0, SamplingParams(temperature=0.0))
        assert row.seed == lost.seed == GREEDY and ast.literal_eval(row.text) == greedy
        for tokens, agree, kl in (
            (prompt.reference_ids.tolist(), row.reference_agree, row.reference_kl),
            (greedy, row.greedy_agree, row.greedy_kl),
        ):
            whole = [*prompt.token_ids.tolist(), *tokens]
            first = len(prompt.token_ids) - 1
            log_p, log_q = (rows_of(chain, whole)[first:-1].double().log_softmax(-1) for chain in (p, q))
            assert agree == int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            assert kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
            if tokens != greedy:
                assert lost.reference_loss == pytest.approx(
                    -float(log_q[torch.arange(num), torch.tensor(tokens)].sum()), rel=1e-5
                )
        assert (row.reference_tokens, row.greedy_tokens, lost.loss_tokens) == (num, len(greedy), num)
    assert max(row.greedy_tokens for row in rows) > 64
