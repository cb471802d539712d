"""For learner tests: rollouts with real teacher outputs, and a plain PyTorch step."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tiny import NUM_TOKENS, PAD, save_tiny, tiny_model

from switchkd.algo import losses
from switchkd.config.schema import LearnerConfig, StudentConfig
from switchkd.engines.models.lm_head import LMHeadState, final_hidden, lm_head_of
from switchkd.engines.wire import to_numpy
from switchkd.learner.batching import LossSpec
from switchkd.learner.settings import LearnerSettings
from switchkd.types import CompletionSource, Ragged, Rollout, TeacherOutput, TokenSource

TEACHER_VOCAB = 136  # wider than the student's table of 128; both are wider than the 120 tokens they share
NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.0}

FORWARD_KL = LossSpec(name="forward_kl", per_token=losses.forward_kl)
SKEWED = LossSpec(name="skew_reverse_kl", per_token=losses.skew_reverse_kl, numbers={"alpha": 0.1}, lm_coef=0.5)
ATKD = LossSpec(name="atkd", per_token=losses.atkd_tokens, numbers={"lam": 0.2}, hard_frac=0.5)
CROSS_ENTROPY = LossSpec(name="cross_entropy", per_token=losses.cross_entropy, needs_teacher=False)


def _flat(p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Infinite on even labels, with derivative 0."""
    return torch.where(labels % 2 == 0, math.inf, losses.forward_kl(p, q, labels, mask))


def _steep(p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A square root at 0: a finite value with an infinite derivative, also on `spoiled` rollouts."""
    kl = losses.forward_kl(p, q, labels, mask).nan_to_num()
    return (kl - kl.detach()).sqrt()


def _constant(p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """NaN without a gradient."""
    return torch.full(labels.shape, math.nan)


FLAT, STEEP, CONSTANT = (LossSpec(name=f.__name__, per_token=f) for f in (_flat, _steep, _constant))
BAD = (FORWARD_KL, FLAT, STEEP, CONSTANT)
"""Losses that cannot be trained on; FORWARD_KL only on `spoiled` rollouts."""


def student_folder(path: Path, family: str = "llama", **config: Any) -> Path:
    return save_tiny(path, family, seed=1, **config)


def teacher_model() -> Any:
    return tiny_model("llama", seed=2, vocab_size=TEACHER_VOCAB, hidden_size=24, num_attention_heads=3,
                      num_key_value_heads=1)  # fmt: skip


def teacher_lm_heads() -> dict[str, LMHeadState]:
    return {"": lm_head_of(teacher_model(), NUM_TOKENS).to_state()}


@torch.no_grad()
def make_rollouts(num: int, *, seed: int = 0, kind: str = "hidden_states", longest: int = 14) -> list[Rollout]:
    """Random rollouts of very different lengths with tokens of all three sources and teacher outputs."""
    rng = np.random.default_rng(seed)
    teacher = teacher_model()
    return [_rollout(i, teacher, rng, kind, longest) for i in range(num)]


def spoiled(rollouts: list[Rollout], index: int = 1) -> list[Rollout]:
    """The same rollouts with NaN in one teacher output."""
    teacher_output = rollouts[index].teacher_output
    assert teacher_output is not None
    rows = replace(teacher_output.rows, values=np.full_like(teacher_output.rows.values, math.nan))
    bad = replace(rollouts[index], teacher_output=replace(teacher_output, rows=rows))
    return [*rollouts[:index], bad, *rollouts[index + 1 :]]


def _rollout(index: int, teacher: Any, rng: np.random.Generator, kind: str, longest: int) -> Rollout:
    prompt, tokens = (rng.integers(5, NUM_TOKENS, n).astype(np.int32) for n in rng.integers(1, longest, 2))
    ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()[None]
    rows = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
    logits = teacher(ids).logits[0, rows, :NUM_TOKENS]
    if kind == "hidden_states":
        values, dtype = to_numpy(final_hidden(teacher, input_ids=ids)[0, rows])
    else:
        values, dtype = logits.numpy(), "float32"
    return Rollout(
        rollout_id=index,
        batch=0,
        stage=0,
        prompt_id="",
        completion_source=CompletionSource.ROLLOUT,
        prompt_ids=prompt,
        token_ids=tokens,
        sources=rng.integers(0, 3, len(tokens)).astype(np.uint8),
        weight_versions=np.zeros(len(tokens), np.int32),
        statistic=np.zeros(len(tokens), np.float32),
        threshold=np.zeros(len(tokens), np.float32),
        uncertainty=losses.uncertainty(logits, torch.from_numpy(tokens).long()).numpy(),
        teacher_output=TeacherOutput(kind=kind, dtype=dtype, rows=Ragged(values, np.array([len(tokens)], np.int32))),
        finish_reason="length",
    )


class NaiveLearner:
    """Trains one sequence at a time: no padding, whole rows of logits, one backward call, torch's AdamW."""

    def __init__(self, model: Any, *, clip: float = 1.0) -> None:
        self.model, self.clip, self.teacher = copy.deepcopy(model).requires_grad_(True), clip, teacher_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **NUMBERS)

    def step(self, rollouts: Sequence[Rollout], spec: LossSpec) -> tuple[float, float]:
        """Train one step; return (loss, gradient norm)."""
        loss = self.loss(rollouts, spec)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item(), norm.item()

    def loss(self, rollouts: Sequence[Rollout], spec: LossSpec) -> torch.Tensor:
        p_rows, q_rows, labels, sources = [], [], [], []
        for r in rollouts:
            ids = torch.from_numpy(np.concatenate([r.prompt_ids, r.token_ids])).long()[None]
            with torch.no_grad():
                p_logits = self.teacher(ids).logits[0, :, :NUM_TOKENS]
            q_logits = self.model(ids).logits[0, :, :NUM_TOKENS]
            for i in range(len(r.prompt_ids), ids.shape[1]):  # token i is predicted by the row before it
                p_rows.append(p_logits[i - 1])
                q_rows.append(q_logits[i - 1])
                labels.append(ids[0, i])
                sources.append(r.sources[i - len(r.prompt_ids)])
        return self._reduce(torch.stack(p_rows), torch.stack(q_rows), torch.stack(labels), sources, spec)

    def _reduce(self, p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor, sources: list[int],
                spec: LossSpec) -> torch.Tensor:  # fmt: skip
        mask = torch.ones(len(labels), dtype=torch.bool)
        if spec.hard_frac is not None:
            unc = losses.uncertainty(p, labels)
            hard = unc >= losses.atkd_threshold(unc, hard_frac=spec.hard_frac)
            each = spec.per_token(p, q, labels, mask, hard=hard, **spec.numbers)
            total = each[hard].mean() + each[~hard].mean()
        else:
            total = spec.per_token(p, q, labels, mask, **spec.numbers).mean()
        lm = torch.nn.functional.cross_entropy(q, labels, reduction="none")
        from_data = torch.tensor([s == TokenSource.DATA for s in sources])
        return total + spec.lm_coef * (lm * from_data).sum() / len(labels)


def settings_of(
    folder: Path, device: str = "cpu", attn: Literal["sdpa", "eager"] = "sdpa", **changes: Any
) -> LearnerSettings:
    # ZeRO-3 keeps small parameters whole, and all of these are small: nothing would be tested
    whole = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    shared = {"micro_batch_tokens": 40, "chunk_tokens": 5, "timeout_s": 60.0, "deepspeed": whole}
    student = StudentConfig(path=str(folder), device=device, attn=attn)
    return LearnerSettings(
        learner=LearnerConfig(**(shared | changes)), student=student, vocab_size=NUM_TOKENS, pad_id=PAD, threads=1
    )


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative Euclidean distance over all tensors."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    pairs = [(a[name].detach().double(), b[name].detach().double()) for name in a]
    return (
        sum((x - y).square().sum().item() for x, y in pairs) / sum(y.square().sum().item() for _, y in pairs)
    ) ** 0.5
